"""What `data` and `eval.source` of a config name, made: sources, kept apart, and batches.

`data` describes one source with its size, crop, flip, far limit and filters, which is all of the
training data or, with `data.also`, what the shares of the others leave.
"""

import functools
import pathlib
import re
from collections.abc import Mapping

import jax

from d3epth_jax import data, sharding
from d3epth_jax.data import apart, filters, loader
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.data.sources.latents import CachedLatents
from d3epth_jax.data.transforms import CROPS, choose_side
from d3epth_jax.evaluation.evaluate import too_small
from d3epth_jax.training.stages import latent
from d3epth_jax.weights import hub

MAIN = "main"  # the name of what `data` itself describes


def parts(config) -> dict:
    """{name: its settings} of all that is trained on, `data` itself first."""
    return {MAIN: config.data} | {name: p for name, p in config.data.also.items() if name != MAIN}


def key_of(name: str) -> str:
    """Where a part's settings are in a config."""
    return "data" if name == MAIN else f"data.also.{name}"


def shares(config) -> list[float]:
    """Of the batches, for each of `parts`."""
    others = [part.share for part in config.data.also.values()]
    return [1 - sum(others), *others]


def check(config) -> None:
    """Raises ValueError with everything wrong with the settings of the data, without reading it."""
    problems, mixed = [], bool(config.data.also)
    caches = config.teacher.cache or config.get("job") == "cache"
    for name, part in parts(config).items():
        where = key_of(name)
        problems += too_small(part, where, height=1, width=1)
        if part.crop not in CROPS:
            problems.append(f"unknown {where}.crop {part.crop!r}: choose one of {CROPS}")
        if not 0 <= part.flip <= 1:
            problems.append(f"{where}.flip is a probability, not {part.flip}")
        if not re.fullmatch(r"[\w-]+", name):
            problems.append(f"{where}: a name of letters, digits, _ and - is needed")
        if part.source.name == "procedural" and not caches:
            problems += _of_scenes(part, where)
        if part.source.name == "procedural" and mixed:
            problems.append(
                f"{where}.source: rendered scenes are made in whole batches on the device and"
                " cannot be mixed with sources of files"
            )
    if MAIN in config.data.also:
        problems.append(f"data.also.{MAIN}: {MAIN!r} is what `data` itself is called")
    if not all(share > 0 for share in shares(config)):
        told = ", ".join(f"{name} {part.share:g}" for name, part in config.data.also.items())
        problems.append(f"shares of data.also are positive and sum to less than 1, not {told}")
    if caches:
        problems += _cannot_be_cached(config)
    if problems:
        raise ValueError("\n".join(problems))


def _of_scenes(part, where: str) -> list[str]:
    """What is set although rendered scenes, always fresh and whole, have no use for it."""
    unused = {"crop": "random", "flip": 0.5, "max_depth": 0, **filters.NO_FILTER}
    given = {key: part[key] for key in ("crop", "flip", "max_depth")} | dict(part.filter)
    return [
        f"{where}{'.filter' if key in part.filter else ''}.{key}={value} does nothing to rendered"
        f" scenes: leave it at {unused[key]}"
        for key, value in given.items()
        if value != unused[key]
    ]


def _cannot_be_cached(config) -> list[str]:
    problems = []
    if config.get("stage") == "pixel":
        problems.append("teacher.cache: only the latent stage learns from cached latents")
    for name, part in parts(config).items():
        where = key_of(name)
        if part.source.name == "procedural":
            problems.append(f"{where}.source: rendered scenes never repeat; a cache is of files")
        if part.crop == "random":
            hint = f"set {where}.crop=center, or stretch"
            problems.append(f"a teacher cache holds one crop of a picture: {hint}")
    return problems


def make_sources(config) -> tuple[dict, object]:
    """({name: source} to train on, the validation source), every problem of all in one error.

    No sample is in both. Raises SourceError; ValueError for settings that make no sense.
    """
    made, errors = {}, []
    identity = teacher_identity(config) if config.teacher.cache else None
    makers = {name: functools.partial(_make_part, config, name, identity) for name in parts(config)}
    validation = functools.partial(data.make_source, **config.eval.source)
    for name, make in {**makers, "": validation}.items():
        try:
            made[name] = make()
        except SourceError as error:
            errors.append(error)
    if errors:
        roots = " and ".join(dict.fromkeys(str(error.root) for error in errors))
        # Both splits of one folder meet some problems, such as a missing file.
        problems = dict.fromkeys(problem for error in errors for problem in error.problems)
        raise SourceError(roots, list(problems)) from errors[0]
    validation = made.pop("")
    for name, part in parts(config).items():
        apart.require_apart(made[name], validation)
        roots = [getattr(source, "root", None) for source in (made[name], validation)]
        same = None not in roots and roots[0].resolve() == roots[1].resolve()
        if same and part.source.name == config.eval.source.name:
            require_one_reading(part.source, config.eval.source)
    return made, validation


def _make_part(config, name: str, teacher: dict | None):
    part = parts(config)[name]
    settings = dict(part.source)
    if settings["name"] == "procedural":
        settings |= {"height": part.height, "width": part.width}
    if not config.teacher.cache:
        return data.make_source(**settings)
    keys = latent.LESSON + (latent.TARGET if config.loss.beta.gt else ())
    pictures = fit = None
    if encodes_itself(config):
        pictures = data.make_source(**settings)
        fit = functools.partial(loader.fit_to, size=(part.height, part.width), crop=part.crop)
    return CachedLatents(
        pathlib.Path(config.teacher.cache) / name,
        keys,
        expected={"teacher": teacher, "data": described(part)},
        mirrored=part.flip > 0,
        pictures=pictures,
        fit=fit,
    )


def encodes_itself(config) -> bool:
    """Whether the student of the latent stage may read pictures, not the teacher's RGB latent."""
    # A regular expression that begins otherwise, or has alternatives, may match the encoder.
    trains = any(
        "|" in each or not each.startswith(("unet", "decoder")) for each in config.trainable
    )
    return trains or bool(config.init or config.autoencoder.path) or config.model.encoder == "own"


def described(part) -> dict:
    """The settings that decide what a sample is before it is mirrored; where it lies does not."""
    source = {key: value for key, value in part.source.items() if key != "path"}
    kept = ("height", "width", "crop", "max_depth")
    return {"source": source, "filter": dict(part.filter), **{key: part[key] for key in kept}}


def teacher_identity(config) -> dict:
    """What a cache and its readers must agree on: which weights, and how many steps were asked."""
    version = {key: config.teacher[key] or None for key in ("revision", "variant")}
    digest = hub.digest(hub.locate(config.teacher.path, **version))
    variant = {"variant": version["variant"]} if version["variant"] else {}
    return {"digest": digest, **variant, "steps": config.teacher.steps}


def require_one_reading(training, validation) -> None:
    """Raises ValueError if one folder is read in two ways, with another scale for instance."""
    differing = {
        key: (training[key], validation[key])
        for key in training
        if key not in ("path", "split", "filename_list") and training[key] != validation[key]
    }
    if differing:
        told = "; ".join(f"{key} {one!r} and {other!r}" for key, (one, other) in differing.items())
        raise ValueError(
            f"data.source and eval.source read one folder in two ways: {told}. Set both alike, as"
            " --config.data.source.KEY=... --config.eval.source.KEY=..."
        )


def make_batches(config, mesh, sources: Mapping):
    """The iterator over this process's part of the training batches."""
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if config.data.batch_size % mesh.size:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} is not a multiple of the {mesh.size} devices"
        )
    if config.data.batch_size % (mesh.size * config.train.accumulate):
        raise ValueError(
            f"data.batch_size={config.data.batch_size} cannot be cut into train.accumulate="
            f"{config.train.accumulate} micro-batches on {mesh.size} devices"
        )
    batch_size = config.data.batch_size // jax.process_count()
    if config.data.source.name == "procedural":
        return loader.ProceduralIterator(
            sources[MAIN],
            batch_size,
            place=functools.partial(sharding.put_batch, mesh=mesh),
            **process,
        )
    datasets = [
        loader.batches(
            sources[name],
            transforms(config, part),
            batch_size=batch_size,
            seed=config.seed + number,
            shuffle=True,
            **process,
        )
        for number, (name, part) in enumerate(parts(config).items())
    ]
    mixed = loader.mixed(datasets, shares(config))
    return loader.iterate(mixed, num_workers=config.data.num_workers)


def transforms(config, part) -> list[loader.Transform]:
    """From a sample of a part's source to what a batch holds."""
    if config.teacher.cache:
        return [functools.partial(choose_side, probability=part.flip)]
    return standard_transforms(part, part.flip)


def standard_transforms(part, flip: float) -> list[loader.Transform]:
    """What METHOD 9 does to a part's samples."""
    return loader.standard_transforms(
        (part.height, part.width),
        flip=flip,
        crop=part.crop,
        max_depth=part.max_depth,
        filters=dict(part.filter),
    )
