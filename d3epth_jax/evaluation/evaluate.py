"""The evaluation job: saved models, saved predictions and trivial predictors, in one table."""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Sequence

from d3epth_jax import data
from d3epth_jax.evaluation import baselines
from d3epth_jax.evaluation.protocols import Protocol, make_protocol
from d3epth_jax.evaluation.scores import Predictor, batch_size_for, evaluate, name_of, spread
from d3epth_jax.metrics import EXPONENT
from d3epth_jax.output import show
from d3epth_jax.pipeline import DepthPipeline
from d3epth_jax.weights.download import may_be_read, no_model

log = logging.getLogger(__name__)

BASELINES = ("constant", "ramp", "mean map")
# Of the evaluation's settings: what replaces the protocol's own value, where it is set.
CHANGES = (
    "min_depth",
    "max_depth",
    "clip",
    "crop",
    "processing_resolution",
    "fit_resolution",
    "alignment",
)


def run(config, workdir: pathlib.Path) -> None:
    """Writes evaluation.{csv,json,md,png} and evaluation_worst.png and prints the table."""
    check(config)
    require_models(config)
    workdir.mkdir(parents=True, exist_ok=True)  # what cannot be written to is told before the work
    source = data.make_source(**config.eval.source)
    predictors = make_predictors(config, source)
    models, predictions = wanted(config)
    judged = [name for name in predictors if name in models | predictions]
    results = evaluate(
        predictors,
        source,
        protocol_of(config.eval),
        title=f"evaluation on {config.eval.source.name}",
        data=", ".join(
            f"{k} {v}" for k, v in config.eval.source.items() if v not in ("", None, ())
        ),
        num_images=config.eval.num_images,
        batch_size=config.eval.batch_size,
        num_pictures=config.eval.num_pictures,
        pictured=tuple(config.pictured) or None,
        num_worst=config.eval.num_pictures,
        worst_of=next(iter(judged), list(predictors)[-1]),
    )
    show(f"\n{results.table()}\n")  # first: it may be that it cannot be saved
    for name in judged:
        if results.mean(name, "negative_scale") > 0.5:
            log.warning(
                "%s is upside down on most pictures (s<0): is its space right?%s",
                *(name, f" (predictions.{name}.space)" if name in predictions else ""),
            )
    if all(math.isnan(results.mean(name)) for name in predictors):
        raise ValueError(
            "not one pixel of the ground truth counts in this protocol (above): is the source's"
            " unit right, such as depth_scale? `d3epth data check` looks at it"
        )
    if (workdir / "evaluation.json").is_file():
        log.warning("the evaluation that was in %s is replaced", workdir)
    results.save(workdir)
    log.info("table, per-image scores and galleries: %s", workdir / "evaluation*.*")


def protocol_of(settings) -> Protocol:
    """The protocol that an evaluation's settings name, with what they change in it."""
    return make_protocol(settings.protocol, **{key: settings.get(key) for key in CHANGES})


def too_small(settings, name: str, **least: float) -> list[str]:
    """What is wrong with the numbers of a group of settings, `name`, that have a least value."""
    return [
        f"{name}.{key} is at least {bound}, not {settings[key]}"
        for key, bound in least.items()
        if not settings[key] >= bound  # nor NaN
    ]


def wrong_settings(settings, models: Sequence[str]) -> list[str]:
    """What is wrong with a group `eval`, a training's too, where these models are evaluated."""
    problems = too_small(settings, "eval", num_images=0, num_pictures=0, batch_size=1)
    try:
        protocol_of(settings)
    except ValueError as error:
        problems.append(str(error))
    if models and settings.get("alignment") == "none":
        problems.append(
            "eval.alignment=none is for predictions in metres, and models predict depth up to a"
            f" scale and a shift: {', '.join(models)}"
        )
    return problems


def check(config) -> None:
    """Raises ValueError for what is wrong with the settings whatever the models are."""
    models, predictions = wanted(config)
    problems = wrong_settings(config.eval, sorted(models))
    if not (config.baselines or models or predictions):
        problems.append(
            "nothing to evaluate: no baseline, and no path in `models` and `predictions`, such as"
            " models.student or predictions.NAME.path"
        )
    if unknown := set(config.baselines) - set(BASELINES):
        problems.append(f"unknown baselines {sorted(unknown)}: choose from {list(BASELINES)}")
    if both := sorted(models.keys() & predictions.keys()):
        problems.append(f"{both} are names of both models and predictions")
    if config.shuffled and config.shuffled not in (*config.baselines, *models, *predictions):
        problems.append(
            f"shuffled={config.shuffled!r} is none of the baselines, models and predictions"
        )
    for name, settings in predictions.items():
        if settings.space not in EXPONENT:
            problems.append(
                f"predictions.{name}.space {settings.space!r}: choose one of {list(EXPONENT)}"
            )
    if problems:
        raise ValueError("\n".join(problems))


def wanted(config) -> tuple[dict, dict]:
    """({name: directory} of models, {name: settings} of predictions), less those without a path."""
    models = {name: path for name, path in config.models.items() if path}
    predictions = config.get("predictions") or {}
    return models, {name: settings for name, settings in predictions.items() if settings.path}


def require_models(config) -> None:
    """Raises FileNotFoundError with all model directories that are missing."""
    missing = [
        f"models.{name}: {no_model(path)}: train it first, or name another"
        for name, path in wanted(config)[0].items()
        if not may_be_read(path)
    ]
    if missing:
        raise FileNotFoundError("\n".join(missing))


def make_predictors(config, source) -> dict[str, Predictor]:
    """The rows of the table: baselines, models, saved predictions, then the shuffled control.

    Baselines also come in every space that something else is aligned in: a fit of disparities
    weighs distances otherwise, and what a model gains by that alone it did not see in a picture.
    Raises ValueError with all prediction files that are missing or unusable for the source.
    """
    makers = {
        "constant": lambda: baselines.constant,
        "ramp": lambda: baselines.ramp,
        "mean map": lambda: baselines.MeanMap(
            data.make_source(**config.mean_map.source),
            num_images=config.mean_map.num_images,
            height=config.mean_map.height,
            width=config.mean_map.width,
        ),
    }
    models, predictions = wanted(config)
    saved = saved_predictions(predictions, source, config.eval.num_images)
    protocol = protocol_of(config.eval)
    of_models = {}
    # A ConfigDict sorts its keys; `order` says which come first in the table.
    for name in sorted(models, key=lambda name: (*config.order, name).index(name)):
        pipeline = DepthPipeline.from_pretrained(models[name])
        predictor = model_predictor(pipeline, protocol, config.eval.batch_size)
        note = f"the model {models[name]}, {predictor.note}"
        of_models[name] = dataclasses.replace(predictor, note=note)
    judged = of_models | saved
    spaces = {p.space for p in judged.values()} if not protocol.alignment else set()
    predictors = {}
    for name in config.baselines:
        depth = makers[name]()
        predictors[name] = Predictor(depth)
        for space in sorted(spaces - {"depth"}):
            predictors[f"{name} in {space}"] = Predictor(baselines.falling(depth), space)
    predictors |= judged
    if config.shuffled:
        own = predictors[config.shuffled]
        predictors[f"{config.shuffled}, pictures shuffled"] = Predictor(
            own.predict, own.space, own.note, shuffled=True
        )
    return predictors


def saved_predictions(predictions, source, num_images: int) -> dict[str, Predictor]:
    """Directories of predictions {name: settings path, space, scale} as predictors of a source."""
    samples = {
        name_of(source, i): (
            _picture_stem(source, i),
            source.shape(i) if hasattr(source, "shape") else None,
        )
        for i in (spread(len(source), num_images) if predictions else ())
    }
    found, problems = {}, []
    for name, settings in predictions.items():
        try:
            predict = baselines.SavedPredictions(settings.path, samples, scale=settings.scale)
        except ValueError as error:
            problems.append(f"predictions.{name}: {error}")
            continue
        smallest, largest = (f"{h}x{w}" for h, w in (min(predict.sizes), max(predict.sizes)))
        pixels = smallest if smallest == largest else f"{smallest} to {largest}"
        note = f"files of {settings.path}, {pixels} pixels, resized bilinearly where these differ"
        found[name] = Predictor(predict, settings.space, note)
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _picture_stem(source, index: int) -> list[str]:
    """The picture's path below the source's root: what `d3epth predict ROOT` calls its results."""
    if not hasattr(source, "files"):
        return []
    picture = pathlib.Path(source.files(index)["image"])
    root = pathlib.Path(source.root)
    return [picture.relative_to(root).with_suffix("").as_posix()] if root in picture.parents else []


def model_predictor(pipeline: DepthPipeline, protocol: Protocol, batch_size: int) -> Predictor:
    """A pipeline as a predictor, at the inference size of a protocol."""
    resolution = protocol.processing_resolution
    by_default = resolution < 0
    if by_default:
        resolution = pipeline.model.processing_resolution

    def predict(images, names):
        return pipeline(
            images,
            processing_resolution=resolution,
            batch_size=batch_size_for(images.shape[1:3], batch_size),
        ).prediction

    size = f"longest side {resolution} px" if resolution else "the picture's own size"
    if resolution and pipeline.model.processing_aspect:
        size += f", stretched to {pipeline.model.processing_aspect:.3g} times as wide as high"
    note = f"processed at {size}{' (its default)' * by_default}, predictions resized bilinearly"
    return Predictor(predict, pipeline.model.prediction_type, note)
