"""What a training step costs: compiled for shapes alone, then run on random batches.

`python -m d3epth_jax.bench.train` answers `measure`'s requests (worker.py).
"""

import functools
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from d3epth_jax import macs, memory, sharding, weighting
from d3epth_jax.bench.predict import device, matmul_peak, most_memory, read
from d3epth_jax.bench.worker import serve
from d3epth_jax.models import presets
from d3epth_jax.models.config import TinyAutoencoderConfig
from d3epth_jax.models.depth_model import DepthModel, count_params
from d3epth_jax.training import optim, steps
from d3epth_jax.training.stages import latent, pixel
from d3epth_jax.training.train_state import TrainState, init_train_state, merge, split_trainable
from d3epth_jax.typing import Params
from d3epth_jax.weights import fold

NO_MEMORY = (RuntimeError, MemoryError)  # of the device as it is; of what is planned for it


class Recipe(NamedTuple):
    """A stage's training of one model, before anything is computed."""

    make_step: Callable[[int], Callable]  # of a count of micro-batches
    init_state: Callable[[Params], TrainState]
    trainable: Params
    frozen: Any
    make_batch: Callable[[int], dict]  # of a count of pictures
    macs: int  # of one picture, forward and gradients
    beta: dict[str, float]  # weights of the losses


class Training:
    """One training step, measured; the methods are the requests."""

    def compile(self, batch: int, micro: int = 0, shared: bool = False, **settings) -> dict:
        """Compiles the step, with nothing of it on the device but what does not train.

        Args:
          batch: pictures of a step of the optimiser.
          micro: pictures at a time, a divisor of `batch`; 0: `batch`, its half, a quarter, ...,
            the first that fits, in a step of their own (on a CPU one, since its memory has no limit
            that could be met without being ended by the system).
          shared: the device's memory, with other processes. A step that runs out of it is an error
            then, for it may fit alone; one planned beyond the limit would not.
          settings: `recipe`'s.
        """
        sharding.require_devices()
        self.recipe, self.no_other = recipe(**settings), bool(micro) or shared
        memory.forget_peak()
        if micro:
            self._compile(micro, batch // micro)
        elif jax.default_backend() == "cpu":
            self._compile(1)
        else:
            largest_that_fits(self._compile, batch, MemoryError if shared else NO_MEMORY)
        return {"trained": count_params(self.recipe.trainable), **device()}

    def _compile(self, micro: int, accumulate: int = 1) -> None:
        """Raises MemoryError if the plan of the compiled step is beyond the device's limit."""
        make_step, init_state, trainable, frozen, make_batch, *_ = self.recipe
        self.micro, self.accumulate = micro, accumulate
        state = jax.eval_shape(init_state, trainable)
        batch = jax.eval_shape(lambda: make_batch(micro * accumulate))
        step = jax.jit(make_step(accumulate), donate_argnums=0)
        lowered = step.lower(state, frozen, batch)
        began = time.perf_counter()
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - began
        stats = jax.devices()[0].memory_stats() or {}
        if (needed := planned(self.program)) > (limit := stats.get("bytes_limit", np.inf)):
            raise MemoryError(f"a batch of {micro} takes {needed} bytes of {limit}")

    def step(self, runs: int) -> dict:
        """The compiled step, `runs` times after one that does not count.

        Where it takes more memory than was planned, that of the next smaller batch that fits, with
        "after_failure": the most memory in use is the larger one's then.
        """
        found, failed = None, False
        while found is None:
            if failed:  # not in the handler, where the error holds the failed step's arrays
                gc.collect()
                largest_that_fits(self._compile, self.micro // 2)
            try:
                found = self._run(runs)
            except NO_MEMORY as error:
                if not is_out_of_memory(error) or self.no_other or self.micro == 1:
                    raise
                failed = True
        return found | {"after_failure": failed}

    def matmul(self, dtype: str) -> dict:
        """As predict.py's, after the step: its memory is not the step's."""
        return {"flops": matmul_peak(dtype)}

    def _run(self, runs: int) -> dict:
        count = self.micro * self.accumulate
        # A copy, since the step overwrites it.
        state = jax.jit(self.recipe.init_state)(self.recipe.trainable)
        data, seconds = jax.device_put(self.recipe.make_batch(count)), []
        for _ in range(1 + runs):
            began = time.perf_counter()
            state, metrics = self.program(state, self.recipe.frozen, data)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
        return {
            "micro": self.micro,
            "accumulate": self.accumulate,
            "compile_s": self.compile_s,
            "seconds": seconds[1:],
            "loss": float(metrics["loss"]),
            "macs": self.recipe.macs * count,
            "memory": most_memory(),
        }


def planned(program) -> int:
    """Bytes that a compiled program takes, its arguments included."""
    plan = program.memory_analysis()
    kinds = ("argument", "temp", "output")
    held = sum(getattr(plan, f"{kind}_size_in_bytes") for kind in kinds)
    return held - plan.alias_size_in_bytes


def recipe(
    stage: str,
    model: str,
    size: tuple[int, int],
    dtype: str,
    remat: bool,
    attention: str = "auto",
) -> Recipe:
    """The training of a preset.

    Args:
      stage: "stage2" is the hybrid loss in pixels, through the decoder; "stage1" distils from
        cached latents, with the teacher's UNet alone, for its features.
      remat: whether activations are computed again for gradients.
    """
    objective = {"stage1": latent, "stage2": pixel}[stage]
    student, params = read(model, dtype, attention=attention, remat=remat)
    patterns = ["unet/"]
    if stage == "stage2" and isinstance(student.autoencoder, TinyAutoencoderConfig):
        patterns.append("decoder/")  # METHOD 8: light decoders train, the KL decoder does not
    teacher, of_teacher, adapters, own_encoder = None, {}, {}, False
    if stage == "stage1":
        teacher, of_teacher, adapters = _teacher(student, model, size)
        # As configs/stage1.py: an encoder that is not the teacher's learns its RGB latent.
        own_encoder = presets.get(model)[1] != presets.get(teacher_of(model))[1]
        patterns += ["encoder/"] if own_encoder else []
    if adapters:
        params, patterns = {**params, "adapters": adapters}, [*patterns, "adapters/"]
    trainable, rest = split_trainable(params, tuple(patterns))
    # As from_config.make_stage: what does not train is folded, and cast once.
    student, rest = fold.fold_frozen(student, trainable, rest)
    frozen = jax.device_put({"rest": fold.cast_kernels(student, rest), "teacher": of_teacher})
    forward = _forward(student, merge(trainable, rest), size)
    if stage == "stage2":
        loss_fn, beta = pixel.make_loss(student), {"ssi": 1.0, "edge": 0.5}
        macs_each = macs.of_training(forward, [p.split("/")[0] for p in patterns], ["decoder"])
        task_weights = weighting.dwa(len(pixel.TASKS))
    else:
        beta = {"gt": 1.0, "out": 1.0, "feat": 0.1}
        beta |= {"enc": 1.0} if own_encoder else {}
        loss_fn = latent.make_loss(
            student, teacher, terms=tuple(beta), share_encoder=not own_encoder, cached=True
        )
        trains = ["unet", "encoder"] if own_encoder else ["unet"]
        macs_each = macs.of_training({part: forward[part] for part in trains}, trains)
        macs_each += _forward(teacher, of_teacher, size)["unet"]
        task_weights = weighting.static(0)
    make_batch = _pairs
    if stage == "stage1":
        make_batch = functools.partial(_cached, student, pictures=own_encoder)
    tx = optim.make_optimizer(optim.make_schedule(3e-5, total_steps=20_000))

    def make_step(accumulate: int) -> Callable:
        return steps.make_train_step(
            loss_fn,
            tx,
            task_weights,
            beta=beta,
            tasks=objective.TASKS,
            accumulate=accumulate,
            weights_from_data=objective.WEIGHTS_FROM_DATA,
        )

    return Recipe(
        make_step,
        lambda params: init_train_state(params, tx, task_weights),
        trainable,
        frozen,
        lambda count: make_batch(count, size),
        macs_each,
        beta,
    )


def largest_that_fits(attempt: Callable[[int], None], limit: int, errors=NO_MEMORY) -> None:
    """`attempt(n)` for n = limit, its half, ... 1, until memory suffices.

    Raises MemoryError if it never does, and errors that are none of `errors` at once.
    """
    size = limit
    while size:
        try:
            return attempt(size)
        except errors as error:
            if not is_out_of_memory(error):
                raise
            why = str(error)  # not the error, which holds arrays
        size //= 2
        gc.collect()
    raise MemoryError(f"not even a batch of 1 fits in memory: {why}")


def is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )


def _teacher(student: DepthModel, name: str, size) -> tuple[DepthModel, Params, Params]:
    """(teacher, its UNet's parameters, adapters of features) for stage 1 from a cache."""
    teacher, params = read(teacher_of(name), student.dtype, attention=student.attention)
    teacher, params = fold.fold(teacher, params)
    adapters = latent.init_adapters(student, teacher, jax.random.key(0), *size)
    needed = {part: params[part] for part in ("unet", "prompt") if part in params}
    return teacher, fold.cast_kernels(teacher, needed), adapters


def teacher_of(name: str) -> str:
    """The preset that a preset's student is distilled from: of the same kind, by its name."""
    return next((f"d2_{kind}" for kind in ("light", "nano") if kind in name), "d2_base")


def _pairs(count: int, size) -> dict:
    """A batch of stage 2."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, *size, 3), np.uint8),
        "depth": rng.uniform(1, 10, (count, *size, 1)).astype(np.float32),
        "mask": np.ones((count, *size, 1), bool),
    }


def _cached(model: DepthModel, count: int, size, *, pictures: bool) -> dict:
    """A batch of stage 1 as a teacher cache holds it, with the pictures or without."""
    rng = np.random.default_rng(0)
    cells = count, *(side // model.downsample for side in size)
    names = ("rgb_latent", "gt_latent", "teacher_latent")
    shape = *cells, model.autoencoder.latent_channels
    return {
        **{name: rng.standard_normal(shape, np.float32).astype(np.float16) for name in names},
        "latent_mask": np.ones((*cells, 1), bool),
        "has_target": np.ones(count, bool),
        **({"image": rng.integers(0, 256, (count, *size, 3), np.uint8)} if pictures else {}),
    }


def _forward(model: DepthModel, params: Params, size) -> dict[str, int]:
    """MACs of one picture in each network, as a training step computes it."""
    tokens = params["prompt"].shape[1] if "prompt" in params else 2
    folded = macs.folded(model, fold.TRAINING, tokens)
    return {part: found.dense for part, found in macs.of_model(*folded, size).items()}


if __name__ == "__main__":
    training = Training()
    serve({name: getattr(training, name) for name in ("compile", "step", "matmul")})
