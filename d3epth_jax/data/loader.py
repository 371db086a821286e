"""From a source to batches whose position can be saved: Grain for files, arithmetic for scenes.

Both iterators give dicts of arrays [B, ...], and `get_state()` / `set_state()` with a
JSON-serialisable state from which the very same batches follow.
"""

import functools
import signal
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np
from absl import flags

from d3epth_jax.data.filters import NO_FILTER
from d3epth_jax.data.transforms import (
    empty_rejected,
    fit_to,
    horizontal_flip,
    limit_depth,
)

Transform = Callable[[dict, np.random.Generator], dict]


def standard_transforms(
    size: tuple[int, int],
    *,
    flip: float = 0.5,
    crop: str = "random",
    max_depth: float = 0.0,
    filters: Mapping[str, float] | None = None,
) -> list[Transform]:
    """What METHOD 9 does to a sample before it is trained on.

    Args:
      size: (H, W), which is covered and cropped to (`fit_to`, `crop`).
      flip: probability of a horizontal flip.
      max_depth: metres; beyond is unknown. 0 for no limit.
      filters: arguments of `filters.rejection`, seen by the whole picture as its source gives it; a
        sample that fails has no known pixel.
    """
    chain: list[Transform] = []
    if filters and NO_FILTER | dict(filters) != NO_FILTER:
        chain.append(functools.partial(empty_rejected, **filters))
    if max_depth:
        chain.append(functools.partial(limit_depth, max_depth=max_depth))
    return [
        *chain,
        functools.partial(fit_to, size=tuple(size), crop=crop),
        functools.partial(horizontal_flip, probability=flip),
    ]


def batches(
    source,
    transforms: Sequence[Transform] = (),
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """This process's batches of one source, addressed by their number; None repeats for ever.

    Every transform is called as transform(sample, rng), in turn, with a generator that depends only
    on the seed and the sample's position, so nothing random needs saving. Every epoch has a new
    order. Repeating comes before batching: batches run across epochs, so a source may be smaller
    than a batch. With `num_epochs` the last batch may be short.

    Processes take whole batches in turn, after all randomness: put together, the batches of a step
    are the same samples in the same order for any `process_count` of one global batch size, so a
    run may resume on another number of hosts. With `num_epochs`, shares may differ by one batch.
    """
    if len(source) == 0:
        raise ValueError("the source is empty")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index {process_index} is not below process_count {process_count}"
        )
    dataset = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(num_epochs)
    if transforms:
        # One generator for all: a transform that draws nothing changes nothing for the others.
        dataset = dataset.random_map(functools.partial(_in_turn, transforms=tuple(transforms)))
    return dataset.batch(batch_size)[process_index::process_count]


def _in_turn(sample: dict, rng: np.random.Generator, transforms: Sequence[Transform]) -> dict:
    for transform in transforms:
        sample = transform(sample, rng)
    return sample


def mixed(datasets: Sequence[grain.MapDataset], shares: Sequence[float]) -> grain.MapDataset:
    """Whole batches of several sources in a fixed order, `shares` of them each (to within 1 %).

    Each batch comes from one source, whose shape it has: mixing samples would mix shapes. And since
    the order depends on the step alone, all processes take that step's batch from one source.
    """
    if len(datasets) != len(shares) or not all(share > 0 for share in shares):
        raise ValueError(f"{len(datasets)} sources need as many positive shares, not {shares}")
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, shares)


def iterate(
    dataset: grain.MapDataset, *, num_workers: int = 0, num_threads: int = 4
) -> grain.DatasetIterator:
    """Iterator of a dataset of batches, read ahead.

    `num_threads` batches are prepared at once in each of `num_workers` processes (0: in this one);
    the batches do not depend on either, but a saved state fits only its own `num_workers`.
    """
    # Grain would buffer 500 elements, and an element is a whole batch here.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    iterable = dataset.to_iter_dataset(options)
    if num_workers > 0:
        # Grain's workers read absl flags, which are unparsed in a notebook or another entry point.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_ignore_interrupts)
    return iter(iterable)


def _ignore_interrupts(*_) -> None:
    """A terminal's Ctrl-C reaches workers too, and the training that it ends still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    source,
    transforms: Sequence[Transform] = (),
    *,
    num_workers: int = 0,
    num_threads: int = 4,
    **of_batches,
) -> grain.DatasetIterator:
    """Iterator of this process's batches of one source: `iterate(batches(source, ...))`."""
    dataset = batches(source, transforms, **of_batches)
    return iterate(dataset, num_workers=num_workers, num_threads=num_threads)


class ProceduralIterator:
    """Endless batches of a procedural source: scenes number step * global batch + arange.

    `source.batch(indices int32 [B])` makes a batch of arrays, on the device; indices wrap at
    len(source). As in `batches`, `batch_size` is this process's, and a step's global batch does
    not depend on the number of processes.

    `place` moves {"indices": this process's indices} to devices before the scenes are made: split
    over a mesh there (`sharding.put_batch`), they are also rendered split, as one global batch.
    """

    def __init__(
        self,
        source,
        batch_size: int,
        start: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        place: Callable[[Mapping[str, np.ndarray]], Mapping] | None = None,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index {process_index} is not below process_count {process_count}"
            )
        self._source = source
        self._batch_size = batch_size
        self._step = start
        self._process_index = process_index
        self._process_count = process_count
        self._place = place

    def __iter__(self):
        return self

    def __next__(self):
        # Python integers until the wrap: a long run's step * batch exceeds int32.
        first = (self._step * self._process_count + self._process_index) * self._batch_size
        indices = (first % len(self._source) + np.arange(self._batch_size)) % len(self._source)
        indices = indices.astype(np.int32)
        if self._place is not None:
            indices = self._place({"indices": indices})["indices"]
        batch = self._source.batch(indices)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        self._step = int(state["step"])
