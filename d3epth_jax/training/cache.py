"""The cache job: what a teacher gives for every picture and its mirror image, stored (METHOD 7)."""

import contextlib
import fcntl
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from d3epth_jax import atomic, data, ensemble, inference, sharding
from d3epth_jax.data import apart, loader
from d3epth_jax.data.sources import latents
from d3epth_jax.progress import Progress
from d3epth_jax.training import from_config, model_setup, training_data
from d3epth_jax.training.stages import latent
from d3epth_jax.weights import fold

log = logging.getLogger(__name__)

FLAGS = latents.FLAGS
LOCK = "lock"  # its bytes are locked, and never written


def run(config, workdir: pathlib.Path) -> None:
    """Fills `workdir`, a folder for each source, and goes on where it was interrupted.

    What is there is verified, and made again where it is damaged. Several hosts share the work.

    Raises ValueError where another teacher or other settings filled it, where another process is at
    work, and for latents that do not fit float16; SourceError for what is wrong with the pictures.
    """
    check(config)
    named = training_data.parts(config)
    sources = {name: data.make_source(**part.source) for name, part in named.items()}
    teacher = model_setup.read_teacher(config)
    lessons = make_lessons(config, teacher)
    identity = training_data.teacher_identity(config)
    manifests = {
        name: fill(workdir / name, sources[name], part, lessons, identity, config)
        for name, part in named.items()
    }
    finish(workdir, manifests)


def check(config) -> None:
    """Raises ValueError with what is wrong with the settings whatever the teacher is."""
    problems = []
    try:
        training_data.check(config)
    except ValueError as error:
        problems.append(str(error))
    if config.teacher.cache:
        problems.append("teacher.cache is for training; the cache that is made here is the workdir")
    if config.cache.ensemble < 1:
        problems.append(f"cache.ensemble is a number of members, not {config.cache.ensemble}")
    # A batch size below 1 is told by training_data.check.
    if config.cache.shard_size < 1 or config.cache.shard_size % max(config.data.batch_size, 1):
        problems.append(
            f"cache.shard_size={config.cache.shard_size} is not a multiple of"
            f" data.batch_size={config.data.batch_size}"
        )
    if problems:
        raise ValueError("\n".join(problems))


class Lessons(NamedTuple):
    """A teacher at work.

    Attributes:
      give: a batch of samples to {key: array [B,...]}, as `stages.latent.teach`.
      shapes: (height, width) to {key: shape of one sample}.
      settings: what decides the result, beside the samples and the teacher's weights.
    """

    give: Callable[[dict], dict[str, np.ndarray]]
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    settings: dict


def make_lessons(config, teacher: model_setup.Start) -> Lessons:
    """Raises ValueError for an ensemble of equal members, or a batch that devices cannot share."""
    model, members = teacher.model, config.cache.ensemble
    steps = model_setup.teacher_steps(config, model)
    if members > 1 and model.from_zeros:
        raise ValueError(
            f"{config.teacher.path} starts from zero latents, so all {members} members of an"
            " ensemble would be equal: set cache.ensemble=1"
        )
    # Every host fills shards of its own.
    mesh = sharding.make_mesh(devices=jax.local_devices())
    if config.data.batch_size % mesh.size:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} is not a multiple of the {mesh.size} devices"
        )
    settings = {
        "steps": steps,
        "ensemble": members,
        "target": config.cache.target,
        "dtype": config.model.dtype,
        "prediction_type": model.prediction_type,
        "schedule": model.schedule.to_dict(),
        "starts_at_zero": model.from_zeros,
    }
    model, params, *_ = from_config.fold_teacher(config, teacher)
    params = sharding.put_params(fold.cast_kernels(model, params), mesh)
    lesson = jax.jit(
        lambda params, batch: latent.teach(
            model, params, batch, steps=steps, with_target=config.cache.target
        )[0]
    )
    member = jax.jit(
        lambda params, rgb, image, number: latent.predict(
            model, params, rgb, image, steps=steps, member=number
        )[0]
    )
    decode = jax.jit(functools.partial(inference.decode_depth, model))
    encode = jax.jit(
        lambda params, depth: inference.encode_image(model, params, depth.repeat(3, -1))
    )

    def give(batch):
        batch = sharding.put_batch(batch, mesh)
        given = dict(lesson(params, batch))
        if members > 1:
            rgb, image = given["rgb_latent"], batch["image"]
            all_latents = [
                given["teacher_latent"],
                *(member(params, rgb, image, number) for number in range(1, members)),
            ]
            # [E,B,H,W,1] in [-1,1]
            maps = np.stack([np.asarray(decode(params, each)) for each in all_latents])
            merged = [ensemble.ensemble_depth(maps[:, i])[0] for i in range(maps.shape[1])]
            depth = sharding.put_batch(2 * np.stack(merged) - 1, mesh)
            given["teacher_latent"] = encode(params, depth)
        return {key: np.asarray(value) for key, value in given.items()}

    def shapes(height, width):
        pixels = {"image": (3, np.uint8), "depth": (1, np.float32), "mask": (1, bool)}
        batch = {
            key: jax.ShapeDtypeStruct((1, height, width, channels), kind)
            for key, (channels, kind) in pixels.items()
        }
        return {key: x.shape[1:] for key, x in jax.eval_shape(lesson, params, batch).items()}

    return Lessons(give, shapes, settings)


def fill(folder: pathlib.Path, source, part, lessons: Lessons, teacher: dict, config) -> dict:
    """Computes this host's shards of one source that are not there yet; returns the manifest."""
    sides = 2 if part.flip > 0 else 1
    manifest = {
        "format": latents.FORMAT,
        "about": {
            "teacher": config.teacher.path,
            "source": apart.origin(source),
        },
        "teacher": teacher,
        "made": lessons.settings,
        "data": training_data.described(part),
        "sides": sides,
        "names": [source.name(i) for i in range(len(source))],
        "shard_size": config.cache.shard_size,
        "shapes": {
            key: (sides, *shape) for key, shape in lessons.shapes(part.height, part.width).items()
        },
    }
    with claim(folder, manifest) as missing:
        if missing:
            make(folder, missing, source, part, lessons, config)
        else:
            log.info("%s: nothing to make", folder)
    return manifest


def make(
    folder: pathlib.Path,
    missing: Sequence[tuple[str, range]],
    source,
    part,
    lessons: Lessons,
    config,
) -> None:
    """Computes and writes shards, each a file's name and the numbers of its samples."""
    sides, size = 2 if part.flip > 0 else 1, config.data.batch_size
    transforms = training_data.standard_transforms(part, flip=0)

    def both_sides(batch: dict) -> dict[str, np.ndarray]:
        """{key: [n,F,...]} as stored; the last batch is filled up, so that one program does all."""
        count = len(batch["image"])
        batch = {key: np.concatenate([x, *[x[-1:]] * (size - count)]) for key, x in batch.items()}
        mirrored = {key: np.ascontiguousarray(x[:, :, ::-1]) for key, x in batch.items()}
        results = [lessons.give(each) for each in (batch, mirrored)[:sides]]
        return {key: np.stack([each[key] for each in results], 1)[:count] for key in results[0]}

    indices = [i for _, rows in missing for i in rows]
    batches = loader.make_loader(
        Chosen(source, indices),
        transforms,
        batch_size=size,
        seed=0,
        shuffle=False,
        num_epochs=1,
        num_workers=config.data.num_workers,
    )
    progress = Progress(f"cache {folder.name}", len(indices), unit="sample")
    done = 0
    for name, rows in missing:
        results = []
        for start in rows[::size]:
            results.append(both_sides(next(batches)))
            done += len(results[-1]["rgb_latent"])
            require_float16(results[-1], source, start)
            progress.update(done)
        arrays = {
            key: np.concatenate([each[key] for each in results]).astype(
                np.uint8 if key in FLAGS else np.float16
            )
            for key in results[0]
        }
        latents.write(folder / name, arrays)


class Chosen:
    """Some samples of a source, by their numbers."""

    def __init__(self, source, indices: Sequence[int]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i):
        return self._source[self._indices[i]]


def mine(manifest: dict) -> dict[int, tuple[str, range]]:
    """This host's shards by number; which ones depends on nothing that is there already."""
    numbered = list(enumerate(latents.shards(manifest)))
    return dict(numbered[jax.process_index() :: jax.process_count()])


@contextlib.contextmanager
def claim(folder: pathlib.Path, manifest: dict) -> Iterator[list[tuple[str, range]]]:
    """Writes down what the cache is, and gives this host's shards that are missing or damaged.

    They are this process's alone until the context is left. Damaged ones are deleted.

    ValueError if another teacher or other settings have begun to fill the folder, or another
    process is making one of the shards now.
    """
    own = mine(manifest)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        for number in own:
            # A byte for each shard, so that any numbers of hosts keep apart.
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(
                    f"{folder}: another process is filling this cache now; wait for it, or choose"
                    " another --workdir"
                ) from error
        require_same(folder, manifest)
        names = {name for name, _ in own.values()}
        for partial in folder.glob(".*.partial"):  # of a job that was killed
            written = partial.name[1:].rsplit(".", 2)[0]
            # Another host may be at work on the others.
            if written in names or jax.process_count() == 1:
                partial.unlink()
        if not (folder / latents.MANIFEST).is_file():
            atomic.write_json(folder / latents.MANIFEST, manifest)
        missing = [
            (name, rows)
            for name, rows in own.values()
            if not latents.is_intact(folder / name, rows, manifest)
        ]
        damaged = [name for name, _ in missing if (folder / name).is_file()]
        if damaged:
            log.warning("%s: damaged, and made again: %s", folder, ", ".join(damaged))
        for name in damaged:  # so that no reader takes it for a good one
            (folder / name).unlink()
        yield missing


def require_same(folder: pathlib.Path, manifest: dict) -> None:
    """ValueError if a folder has a cache that was made otherwise, wherever its pictures lay."""
    before = latents.read_manifest(folder)
    wanted = {key: value for key, value in manifest.items() if key != "about"}
    if before and (changed := latents.differences(before, wanted)):
        told = "; ".join(f"{key}: {there} -> {here}" for key, there, here in changed)
        raise ValueError(
            f"{folder} holds a teacher cache of something else; choose another --workdir or delete"
            f" it. Changed: {told}"
        )


def finish(workdir: pathlib.Path, manifests: dict[str, dict]) -> None:
    """Says whether the cache is complete; ValueError if it is not and no other host is at work."""
    missing = []
    for part, manifest in manifests.items():
        own = mine(manifest)
        for number, (name, rows) in enumerate(latents.shards(manifest)):
            # Its own it has just verified or written.
            good = latents.is_whole if number in own else latents.is_intact
            if not good(workdir / part / name, rows, manifest):
                missing.append(f"{part}/{name}")
    if not missing:
        log.info("train on it with --config.teacher.cache=%s", workdir)
        return
    told = f"{workdir}: {len(missing)} shards are missing or damaged: {', '.join(missing)}"
    if jax.process_count() == 1:
        raise ValueError(f"{told}; run the job again")
    log.warning("%s; other hosts make them: run the job again if they have stopped", told)


def require_float16(arrays: dict[str, np.ndarray], source, start: int) -> None:
    """ValueError that names the samples whose latents are not finite in float16."""
    limit, problems = float(np.finfo(np.float16).max), []
    for key in arrays.keys() - set(FLAGS):
        largest = np.abs(arrays[key].astype(np.float32)).reshape(len(arrays[key]), -1).max(1)
        for i in np.flatnonzero(~(largest <= limit)):  # also true for NaN
            problems.append(f"{source.name(start + int(i))}: {key} reaches {largest[i]:g}")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(
            f"latents that float16 (up to {limit:g}) cannot hold; train without a cache of this"
            f" teacher (teacher.cache=''):\n  {listed}"
        )
