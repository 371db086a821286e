"""The evaluation job: saved models and trivial predictors, over one source, in one table."""

import logging
import pathlib

from d3epth_jax import baselines, data
from d3epth_jax.evaluation import Predictor, evaluate
from d3epth_jax.pipeline import DepthPipeline

log = logging.getLogger(__name__)


def run(config, workdir: pathlib.Path) -> None:
    """Writes evaluation.{csv,json,md,png} to the workdir and prints the table."""
    check(config)
    predictors = make_predictors(config)
    results = evaluate(
        predictors,
        data.make_source(**config.eval.source),
        title=f"evaluation on {config.eval.source.name}",
        min_depth=config.eval.min_depth,
        max_depth=config.eval.max_depth,
        num_images=config.eval.num_images,
        batch_size=config.eval.batch_size,
        num_pictures=config.eval.num_pictures,
        pictured=tuple(config.pictured) or None,
    )
    results.save(workdir)
    print(f"\n{results.table()}\n", flush=True)
    log.info("table, per-image scores and gallery: %s", workdir / "evaluation.*")


BASELINES = ("constant", "ramp", "mean map")


def check(config) -> None:
    """Raises ValueError for what is wrong with the settings whatever the models are."""
    problems = []
    if unknown := set(config.baselines) - set(BASELINES):
        problems.append(f"unknown baselines {sorted(unknown)}: choose from {list(BASELINES)}")
    if config.shuffled and config.shuffled not in (*config.baselines, *config.models):
        problems.append(f"shuffled={config.shuffled!r} is none of the baselines and models")
    if problems:
        raise ValueError("\n".join(problems))


def make_predictors(config) -> dict[str, Predictor]:
    """The rows of the table: baselines, then models, then the shuffled control."""
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
    missing = [path for path in config.models.values() if not pathlib.Path(path).is_dir()]
    if missing:
        raise FileNotFoundError(f"no model directory at {missing}: train it first, or name another")
    predictors = {name: Predictor(makers[name]()) for name in config.baselines}
    # A ConfigDict sorts its keys; `order` says which models come first in the table.
    names = sorted(config.models, key=lambda name: (*config.order, name).index(name))
    for name in names:
        pipeline = DepthPipeline.from_pretrained(config.models[name])
        predictors[name] = model_predictor(pipeline, config.eval)
    if config.shuffled:
        shuffled = predictors[config.shuffled]
        predictors[f"{config.shuffled}, pictures shuffled"] = Predictor(
            shuffled.predict, shuffled.space, shuffled=True
        )
    return predictors


def model_predictor(pipeline: DepthPipeline, settings) -> Predictor:
    """A pipeline as a predictor, at the settings of an evaluation config."""
    resolution = settings.processing_resolution

    def predict(images):
        return pipeline(
            images,
            processing_resolution=None if resolution < 0 else resolution,
            batch_size=settings.batch_size,
        ).prediction

    return Predictor(predict, pipeline.model.prediction_type)
