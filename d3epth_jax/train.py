"""The training loop: one for every stage, since a stage is only a loss function.

Order of initialisation: teacher read, student made (random, then whatever is pretrained), trainable
parameters split off, optimiser and weighting initialised, newest checkpoint restored.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import pathlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from d3epth_jax import data, losses, optim, sharding, steps, weighting
from d3epth_jax.checkpoint import Checkpoints, abstract
from d3epth_jax.data import loader
from d3epth_jax.data.sources.folder import FolderError
from d3epth_jax.evaluate import model_predictor
from d3epth_jax.evaluation import evaluate
from d3epth_jax.metric_writer import MetricWriter, read_metrics
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import DepthModel, count_params, init_params
from d3epth_jax.pipeline import DepthPipeline
from d3epth_jax.progress import Progress
from d3epth_jax.stages import latent, pixel
from d3epth_jax.train_state import init_train_state, merge, split_trainable
from d3epth_jax.typing import Params
from d3epth_jax.weights import hub

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run cannot go on: the loss is not finite."""


def run(config, workdir: pathlib.Path) -> pathlib.Path:
    """Trains as `config` says and returns the directory of the trained model, `workdir/model`.

    A finished run returns at once; an interrupted one goes on from its newest checkpoint, bit for
    bit as if it had never stopped (on CPU).
    """
    output = workdir / "model"
    total = config.train.steps
    with Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints:
        claim(workdir, config, in_use=checkpoints.latest is not None)
        if checkpoints.latest == total and output.is_dir():
            log.info("%s is already trained (%d steps)", output, total)
            tell_scores(config.stage, workdir)
            return output

        mesh = sharding.make_mesh(config.fsdp)
        training, validation = make_sources(config)
        batches = make_batches(config, mesh, training)

        teacher, teacher_params = read_teacher(config)
        model, params = make_student(config, teacher, teacher_params)
        patterns = list(config.trainable)
        if config.stage == "latent" and config.loss.beta.feat and teacher is not None:
            key = jax.random.fold_in(jax.random.key(config.seed), 1)
            size = (config.data.height, config.data.width)
            adapters = latent.init_adapters(model, teacher, key, *size)
            params = {**params, "adapters": adapters}
            patterns += ["adapters/"] if adapters else []
        log.info("student: %s", describe(model, params))
        trainable, rest = split_trainable(params, tuple(patterns))
        own_encoder = "encoder" in trainable or not _same(params, teacher_params, "encoder")
        loss_fn, tasks, beta = make_loss(
            config, model, teacher, own_encoder, "encoder" in trainable
        )

        frozen = sharding.put_params({"rest": rest, "teacher": teacher_params}, mesh)
        schedule = optim.make_schedule(total_steps=total, **config.schedule)
        tx = optim.make_optimizer(schedule, **config.optim)
        task_weights = make_weighting(config, len(tasks))

        init = functools.partial(init_train_state, tx=tx, weighting=task_weights)
        placement = sharding.params_sharding(jax.eval_shape(init, trainable), mesh)
        state = jax.jit(init, out_shardings=placement)(sharding.put_params(trainable, mesh))
        if checkpoints.latest is not None:
            state, position = checkpoints.restore(abstract(state))
            batches.set_state(position)
            log.info("resumed from step %d", int(state.step))

        train_step = jax.jit(
            steps.make_train_step(
                loss_fn,
                tx,
                task_weights,
                beta=beta,
                tasks=tasks,
                accumulate=config.train.accumulate,
                max_ema_decay=config.train.max_ema_decay,
            ),
            donate_argnums=0,
            out_shardings=(placement, sharding.replicated(mesh)),
        )

        def current_model() -> Params:
            return merge(state.ema, frozen["rest"])

        start = int(state.step)
        if start == 0 and config.train.save_start:
            hub.save_model(workdir / "model_start", model, current_model())
        writer = MetricWriter(workdir, start_step=start)
        progress = Progress(f"{config.stage} {workdir.name}", total, start=start)
        scores = {}
        profile = Profile(workdir / "profile", *config.train.profile)

        def validate(step: int) -> None:
            progress.clear()
            scores[step] = score(config, model, current_model(), validation, mesh, writer, step)

        if start == 0:
            validate(0)
        with contextlib.closing(writer), profile:
            for step in range(start + 1, total + 1):
                profile.at(step)
                batch = sharding.put_batch(next(batches), mesh)
                state, metrics = train_step(state, frozen, batch)
                if mesh.devices.flat[0].platform == "cpu":
                    # Steps in flight on several CPU devices would compete for XLA's threads.
                    jax.block_until_ready(metrics)
                progress.update(step, note=f"AbsRel {_last(scores)}")
                save = step % config.train.checkpoint_every == 0 or step == total
                if step % config.train.log_every == 0 or save:
                    values = {name: float(value) for name, value in metrics.items()}
                    values["learning_rate"] = float(schedule(step - 1))
                    writer.scalars(step, values)
                    require_finite(values, step, checkpoints.latest)
                if step % config.eval.every == 0 or step == total:
                    validate(step)
                if save:
                    checkpoints.save(step, state, batches.get_state())
            hub.save_model(output, model, current_model())
    tell_scores(config.stage, workdir)
    return output


def claim(workdir: pathlib.Path, config, *, in_use: bool) -> None:
    """Writes the config to the workdir; ValueError if it is in use by a run with other settings.

    A finished or interrupted run is never mistaken for, or mixed with, another one; one that died
    before its first checkpoint, of a wrong setting perhaps, left nothing to mix.
    """
    path = workdir / "config.json"
    now = json.loads(config.to_json_best_effort())
    if in_use and path.exists():
        before, wanted = (flatten_dict(c, sep=".") for c in (json.loads(path.read_text()), now))
        changed = [
            f"{key}: {before.get(key)} -> {wanted.get(key)}"
            for key in sorted(before.keys() | wanted.keys())
            if before.get(key) != wanted.get(key)
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with other settings; choose another --workdir or delete it."
                f" Changed: {'; '.join(changed)}"
            )
    path.write_text(json.dumps(now, indent=2) + "\n")


def make_sources(config):
    """The (training, validation) sources, every problem of both in one error; kept apart."""
    training = dict(config.data.source)
    if training["name"] == "procedural":
        training |= {"height": config.data.height, "width": config.data.width}
    sources, errors = [], []
    for settings in (training, config.eval.source):
        try:
            sources.append(data.make_source(**settings))
        except FolderError as error:
            errors.append(error)
    if errors:
        roots = " and ".join(dict.fromkeys(str(error.root) for error in errors))
        # Both splits of one folder meet some problems, such as a missing file.
        problems = dict.fromkeys(problem for error in errors for problem in error.problems)
        raise FolderError(roots, list(problems)) from errors[0]
    if config.eval.source.get("path", "") == training.get("path"):
        require_apart(*sources)
    return sources


def make_batches(config, mesh, source):
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
    if config.data.source.name == "procedural":
        return loader.ProceduralIterator(
            source,
            config.data.batch_size // jax.process_count(),
            place=functools.partial(sharding.put_batch, mesh=mesh),
            **process,
        )
    return loader.make_loader(
        source,
        loader.standard_transforms(
            (config.data.height, config.data.width), flip=config.data.flip, crop=config.data.crop
        ),
        batch_size=config.data.batch_size // jax.process_count(),
        seed=config.seed,
        shuffle=True,
        num_workers=config.data.num_workers,
        **process,
    )


def require_apart(training, validation) -> None:
    """Raises ValueError if samples of one folder are both trained and evaluated on."""
    names = [{source.name(i) for i in range(len(source))} for source in (training, validation)]
    if both := sorted(names[0] & names[1]):
        raise ValueError(
            f"{len(both)} pairs are both trained and evaluated on, {both[0]} the first: give"
            " data.source and eval.source the splits train and validation, and one hold-out"
        )


def train_if_absent(path: str, config) -> None:
    """Trains the model that is to be at `path`, where it is not there and `config` makes it.

    Any other absent path is left to fail by name: a typo must not start a training.
    """
    wanted = pathlib.Path(path)
    if config is not None and not wanted.is_dir() and wanted.parent == pathlib.Path(config.workdir):
        log.info("no model at %s: training it first", path)
        run(config, wanted.parent)


def read_teacher(config) -> tuple[DepthModel | None, Params]:
    """The teacher, trained first by its own config where there is none yet; (None, {}) without."""
    if not config.teacher.path:
        return None, {}
    train_if_absent(config.teacher.path, config.teacher.get("config"))
    teacher, params = hub.load_model(config.teacher.path, dtype=config.model.dtype)
    log.info("teacher: %s, %s", config.teacher.path, describe(teacher, params))
    return teacher, params


def make_student(
    config, teacher: DepthModel | None, teacher_params: Params
) -> tuple[DepthModel, Params]:
    """The model to train: read from `config.init`, or random with parts of the teacher."""
    computing = {"dtype": config.model.dtype, "remat": config.model.remat}
    if config.init:
        first = config.get("init_config")
        if first is not None:
            # On the same pairs and with the same teacher as this run.
            first.update(data=config.data, eval=config.eval, teacher=config.teacher)
        train_if_absent(config.init, first)
        return hub.load_model(config.init, **computing)
    for part in ("encoder", "decoder"):
        if config.model[part] not in ("own", "teacher"):
            raise ValueError(f"model.{part} is {config.model[part]!r}: choose own or teacher")
    unet, autoencoder = presets.get(config.model.preset)
    parts = [part for part in ("encoder", "decoder") if config.model[part] == "teacher"]
    if parts and teacher is None:
        raise ValueError(f"model.{parts[0]}='teacher', but there is no teacher (teacher.path)")
    for part in parts:
        fields = [f.name for f in dataclasses.fields(autoencoder) if part in f.name]
        autoencoder = dataclasses.replace(
            autoencoder, **{name: getattr(teacher.autoencoder, name) for name in fields}
        )
    model = DepthModel(
        unet,
        autoencoder,
        presets.SINGLE_STEP,
        prediction_type=config.model.prediction_type,
        processing_resolution=config.model.processing_resolution,
        **computing,
    )
    params = init_params(model, config.seed)
    return model, {**params, **{part: teacher_params[part] for part in parts}}


def make_loss(
    config, model: DepthModel, teacher: DepthModel | None, own_encoder: bool, encoder_trains: bool
):
    """The stage's (loss function, dynamically weighted tasks, beta); a beta of 0 drops its term.

    own_encoder: the student's encoder is, or will become, another than the teacher's.
    """
    beta = {name: value for name, value in config.loss.beta.items() if value}
    if not encoder_trains:
        beta.pop("enc", None)
    terms = tuple(beta)
    if config.stage == "pixel":
        preset = config.loss.preset
        if preset not in losses.PRESETS:
            choices = sorted(losses.PRESETS)
            raise ValueError(f"unknown loss.preset {preset!r}: choose one of {choices}")
        options = losses.PRESETS[preset] | dict(config.loss.options)
        return (
            pixel.make_loss(model, teacher, terms=terms, **options),
            tuple(task for task in pixel.TASKS if task in beta),
            beta,
        )
    if config.stage != "latent":
        raise ValueError(f"unknown stage {config.stage!r}: choose pixel or latent")
    if teacher is None:
        raise ValueError("the latent stage distils a teacher: set teacher.path")
    loss_fn = latent.make_loss(model, teacher, terms=terms, share_encoder=not own_encoder)
    return loss_fn, (), beta


def _same(params: Params, teacher_params: Params, part: str) -> bool:
    """Whether a part of the student is the teacher's, array by array."""
    mine, its = (jax.tree.leaves_with_path(p.get(part, {})) for p in (params, teacher_params))
    return [path for path, _ in mine] == [path for path, _ in its] and all(
        a.shape == b.shape and np.array_equal(a, b)
        for (_, a), (_, b) in zip(mine, its, strict=True)
    )


def make_weighting(config, num_tasks: int) -> weighting.Weighting:
    if num_tasks == 0:
        return weighting.static(0)  # stage 1 has fixed coefficients only
    dwa = config.weighting.dwa
    choices = {
        "dwa": lambda: weighting.dwa(
            num_tasks, **dict(dwa, ratio_clip=tuple(dwa.ratio_clip) or None)
        ),
        "static": lambda: weighting.static(num_tasks),
        "uncertainty": lambda: weighting.uncertainty(num_tasks),
    }
    if config.weighting.name not in choices:
        raise ValueError(
            f"unknown weighting {config.weighting.name!r}: choose one of {sorted(choices)}"
        )
    return choices[config.weighting.name]()


def score(config, model, params, source, mesh, writer: MetricWriter, step: int) -> float:
    """Evaluates the current model, writes metrics and a gallery, and returns its AbsRel."""
    pipeline = DepthPipeline(model, params, mesh=mesh)
    results = evaluate(
        {config.stage: model_predictor(pipeline, config.eval)},
        source,
        title=f"step {step}",
        min_depth=config.eval.min_depth,
        max_depth=config.eval.max_depth,
        num_images=config.eval.num_images,
        batch_size=config.eval.batch_size,
        num_pictures=config.eval.num_pictures,
    )
    names = [key for key in results.rows[0] if key not in ("predictor", "image", "group")]
    writer.scalars(step, {key: results.mean(config.stage, key) for key in names}, prefix="eval")
    if results.pictures is not None:
        writer.picture(step, "predictions", results.pictures)
    sources = ""
    if len(results.groups) > 1:
        sources = f", mean of sources {results.mean_over_groups(config.stage):.4f}"
    log.info("step %d: AbsRel %.4f%s", step, results.mean(config.stage), sources)
    return results.mean(config.stage)


def tell_scores(stage: str, workdir: pathlib.Path) -> None:
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "eval/abs_rel" in row]
    first, last = rows[0]["eval/abs_rel"], rows[-1]["eval/abs_rel"]
    log.info("%s %s: AbsRel before %.4f, after %.4f", stage, workdir.name, first, last)


def require_finite(values: dict[str, float], step: int, checkpoint: int | None) -> None:
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if broken:
        raise TrainingError(
            f"step {step}: not finite: {broken}. The newest checkpoint is of step {checkpoint};"
            " lower schedule.learning_rate or optim.clip, or set model.dtype to float32"
        )


def describe(model: DepthModel, params: Params) -> str:
    parts = ", ".join(
        f"{name} {count_params(tree) / 1e6:.2f}M"
        for name, tree in params.items()
        if name != "prompt"
    )
    return f"{count_params(params) / 1e6:.2f}M parameters ({parts}), {model.dtype}"


class Profile(contextlib.ExitStack):
    """A JAX profile of `count` steps from step `first` on; none where `count` is 0."""

    def __init__(self, directory: pathlib.Path, first: int, count: int):
        super().__init__()
        self._directory, self._first, self._end = directory, first, first + count

    def at(self, step: int) -> None:
        if step == self._first < self._end:
            self.enter_context(jax.profiler.trace(str(self._directory)))
        elif step == self._end > self._first:
            self.close()
            log.info("profile of steps %d to %d in %s", self._first, step - 1, self._directory)


def _last(scores: dict[int, float]) -> str:
    return f"{list(scores.values())[-1]:.3f}" if scores else "-"
