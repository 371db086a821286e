"""The training loop: one for every stage, since a stage is only a loss function.

Order of initialisation: teacher read, student made (random, then whatever is pretrained), trainable
parameters split off, optimiser and weighting initialised, newest checkpoint restored.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import time
from typing import Any

import jax
import optax

from d3epth_jax import hosts, sharding
from d3epth_jax import image as image_lib
from d3epth_jax.checkpoint import Checkpoints, abstract
from d3epth_jax.evaluation.evaluate import model_predictor, protocol_of
from d3epth_jax.evaluation.scores import evaluate
from d3epth_jax.metric_writer import MetricWriter, read_metrics
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.pipeline import DepthPipeline
from d3epth_jax.progress import Progress
from d3epth_jax.training import (
    check_config,
    curves,
    from_config,
    model_setup,
    runs,
    steps,
    training_data,
)
from d3epth_jax.training.train_state import HostAverage, TrainState, init_train_state, merge
from d3epth_jax.typing import Params
from d3epth_jax.weights import hub
from d3epth_jax.weights.prompt import PromptEncoder

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run cannot go on: the loss is not finite."""


def run(config, workdir: pathlib.Path) -> pathlib.Path:
    """Trains as `config` says and returns the directory of the trained model, `workdir/model`.

    A finished run returns at once; an interrupted one goes on from its newest checkpoint, bit for
    bit as if it had never stopped (on CPU). SIGTERM and Ctrl-C end it after a step, with a
    checkpoint, as KeyboardInterrupt.
    """
    output = workdir / "model"
    check_config.check(config)
    if (
        config.get("init_config")
        and pathlib.Path(config.init).parent.resolve() == workdir.resolve()
    ):
        raise ValueError(f"{workdir} is where the model to start from, {config.init}, is trained")
    with (
        runs.alone(workdir),
        Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints,
    ):
        in_use = checkpoints.latest is not None
        if not in_use and output.is_dir() and any(output.iterdir()):
            hub.require_replaceable(output)
            raise FileExistsError(  # it might be taken for what this run makes
                f"{output} is there, and no checkpoint of its training is left: choose another"
                " --workdir or delete it"
            )
        runs.claim(workdir, config, in_use=in_use)
        if checkpoints.latest == config.train.steps and output.is_dir():
            runs.claim_origins(workdir, config, in_use=True)
            log.info("%s is already trained (%d steps)", output, config.train.steps)
        else:
            # Told now, not after data is read or the last step is made.
            hub.require_replaceable(output)
            model_setup.require_models(config)
            training = prepare(config, workdir, checkpoints)
            train(training, checkpoints, output)
    tell_scores(config.stage, workdir)
    return output


@dataclasses.dataclass
class Training:
    """What a run is made of; `state`, the average and the position in `batches` change by the step.

    Attributes:
      model, rest, text: as saved, with the average of what is trained.
      computed, frozen: the model as it computes, with constants folded, and all that is not
        trained, teacher included, on the devices.
      average: of the parameters where the host keeps it.
    """

    config: Any
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    batches: Any
    validation: Any
    model: DepthModel
    rest: Params
    text: PromptEncoder | None
    computed: DepthModel
    frozen: dict
    state: TrainState
    average: HostAverage | None
    schedule: optax.Schedule
    step: "OneProgramPerShape"

    def averaged(self) -> Params:
        return self.average.params if self.average else self.state.ema

    def save_model(self, directory: pathlib.Path) -> None:
        params = merge(hosts.gathered(self.averaged()), self.rest)
        if hosts.is_first():
            hub.save_model(directory, self.model, params, self.text)
        hosts.meet(f"{directory} is written")

    def validate(self, step: int, writer: MetricWriter) -> float:
        params = hosts.gathered(merge(self.averaged(), self.frozen["rest"]))
        validation = self.computed, params, self.validation
        found = score(self.config, *validation, self.mesh, writer, step)
        if hosts.is_first():
            image_lib.save_png(self.workdir / "curves.png", curves.curves(self.workdir))
        return found


def prepare(config, workdir: pathlib.Path, checkpoints: Checkpoints) -> Training:
    """Reads data and models, and puts everything where the newest checkpoint, if any, says."""
    in_use = checkpoints.latest is not None
    mesh = sharding.make_mesh(config.fsdp)
    sources, validation = training_data.make_sources(config)
    runs.claim_samples(workdir, sources, in_use=in_use)
    batches = training_data.make_batches(config, mesh, sources)

    train_what_is_absent(config)
    teacher, student, trainable, rest = model_setup.make_models(config)
    # Now that models of the hub are in its cache, and so have a commit.
    runs.claim_origins(workdir, config, in_use=in_use)
    model, _, text = student
    model_setup.check_sizes(config, model)
    stage = from_config.make_stage(config, teacher, student, trainable, rest)
    frozen = sharding.put_params(stage.frozen, mesh)
    tx, schedule = from_config.make_optimizer(config)
    task_weights = from_config.make_weighting(config, len(stage.tasks))
    on_host = config.train.host_ema_every
    average = HostAverage(trainable, on_host, config.train.max_ema_decay) if on_host else None
    init = functools.partial(
        init_train_state, tx=tx, weighting=task_weights, host_average=bool(on_host)
    )
    placement = sharding.params_sharding(jax.eval_shape(init, trainable), mesh)
    state = jax.jit(init, out_shardings=placement)(sharding.put_params(trainable, mesh))
    if in_use:
        wanted = abstract(state)
        if average:
            wanted = dataclasses.replace(wanted, ema=average.params)
        state, position = checkpoints.restore(wanted)
        if average:
            average.params, state = state.ema, dataclasses.replace(state, ema={})
        batches.set_state(position)
        log.info("resumed from step %d", int(state.step))
    step = OneProgramPerShape(jit_step(config, stage, tx, task_weights, placement, mesh))
    return Training(
        config=config,
        workdir=workdir,
        mesh=mesh,
        batches=batches,
        validation=validation,
        model=model,
        rest=rest,
        text=text,
        computed=stage.model,
        frozen=frozen,
        state=state,
        average=average,
        schedule=schedule,
        step=step,
    )


def train(training: Training, checkpoints: Checkpoints, output: pathlib.Path) -> None:
    """All steps that are left, with their metrics, checkpoints and evaluations; then the model."""
    config, workdir, mesh = training.config, training.workdir, training.mesh
    start, total = int(training.state.step), config.train.steps
    if start == 0 and config.train.save_start:
        training.save_model(workdir / "model_start")
    in_use = checkpoints.latest is not None
    scored = in_use and start in scores_of(workdir)
    writer = MetricWriter(workdir, start_step=start if in_use else -1)
    progress = Progress(f"{config.stage} {workdir.name}", total, start=start)
    profile = Profile(workdir / "profile", *config.train.profile)
    found = None  # AbsRel of the last evaluation
    depthless = False
    if not scored and (start % config.eval.every == 0 or start == total):
        # The run begins, or ended between this checkpoint and its scores.
        found = training.validate(start, writer)
    waited, since = 0.0, time.monotonic()
    with contextlib.closing(writer), profile, hosts.asked_to_end() as ending:
        for step in range(start + 1, total + 1):
            profile.at(step)
            asked = time.monotonic()
            batch = next(training.batches)
            waited += time.monotonic() - asked
            batch = sharding.put_batch(batch, mesh)
            training.state, metrics = training.step(training.state, training.frozen, batch)
            if mesh.devices.flat[0].platform == "cpu":
                # Steps in flight on several CPU devices would compete for XLA's threads.
                jax.block_until_ready(metrics)
            if training.average:
                training.average.update(step, training.state.params, last=step == total)
            progress.update(step, note=f"AbsRel {'-' if found is None else f'{found:.3f}'}")
            end = ending()  # asked once: it may come at any time
            save = end or step % config.train.checkpoint_every == 0 or step == total
            log_line = save or step % config.train.log_every == 0
            if log_line:
                values = {name: float(value) for name, value in metrics.items()}
                values["learning_rate"] = float(training.schedule(step - 1))
                # Share of the time since the last such line that the host waited for data. What an
                # accelerator was given is done by now: the metrics were.
                values["data_wait"] = waited / (time.monotonic() - since)
                writer.scalars(step, values)
                require_finite(values, step, checkpoints)
                depthless |= tell_if_depthless(values, step, told=depthless)
            if save:
                whole = dataclasses.replace(training.state, ema=training.averaged())
                checkpoints.save(step, whole, training.batches.get_state())
            if end:
                raise KeyboardInterrupt(f"ended after step {step}, of which a checkpoint is kept")
            if log_line:
                waited, since = 0.0, time.monotonic()
            if step % config.eval.every == 0 or step == total:
                began = time.monotonic()
                progress.clear()
                found = training.validate(step, writer)
                since += time.monotonic() - began
        training.save_model(output)


def jit_step(config, stage: from_config.Stage, tx, task_weights, placement, mesh):
    """The jitted training step; the old state's memory becomes the new one's."""
    step = steps.make_train_step(
        stage.loss_fn,
        tx,
        task_weights,
        beta=stage.beta,
        tasks=stage.tasks,
        accumulate=config.train.accumulate,
        weights_from_data=stage.weights_from_data,
        max_ema_decay=config.train.max_ema_decay,
    )
    placements = placement, sharding.replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=placements)


def train_what_is_absent(config) -> None:
    """Trains the model to start from, where it is not there and the config makes it.

    Any other absent path is left to fail by name: a typo must not start a training.
    """
    first = config.get("init_config")
    if not config.init or first is None:
        return
    # On the same pairs and with the same teacher as this run.
    same = config.copy_and_resolve_references()
    first.update(data=same.data, eval=same.eval, teacher=same.teacher)
    wanted = pathlib.Path(config.init)
    if not wanted.is_dir() and wanted.parent == pathlib.Path(first.workdir):
        log.info("no model at %s: training it first", wanted)
        run(first, wanted.parent)


def score(config, model, params, source, mesh, writer: MetricWriter, step: int) -> float:
    """Evaluates the current model, writes metrics and a gallery, and returns its AbsRel."""
    # Not folded any further: at every evaluation that would take longer than it saves.
    pipeline = DepthPipeline(model, params, mesh=hosts.local_mesh(mesh), fold=False)
    protocol = protocol_of(config.eval)
    results = evaluate(
        {config.stage: model_predictor(pipeline, protocol, config.eval.batch_size)},
        source,
        protocol,
        title=f"step {step}",
        num_images=config.eval.num_images,
        batch_size=config.eval.batch_size,
        num_pictures=config.eval.num_pictures,
    )
    scores = {key: results.mean(config.stage, key) for key in results.metrics}
    writer.scalars(step, scores, prefix="eval")
    if results.pictures is not None:
        writer.picture(step, "predictions", results.pictures)
    sources = ""
    if len(results.groups) > 1:
        sources = f", mean of sources {results.mean_over_groups(config.stage):.4f}"
    log.info("step %d: AbsRel %.4f%s", step, results.mean(config.stage), sources)
    return results.mean(config.stage)


def scores_of(workdir: pathlib.Path) -> dict[int, float | None]:
    """{step: AbsRel} of a run's evaluations so far."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return {row["step"]: row["eval/abs_rel"] for row in rows if "eval/abs_rel" in row}


def tell_scores(stage: str, workdir: pathlib.Path) -> None:
    scores = list(scores_of(workdir).values()) or [None]
    first, last = (math.nan if score is None else score for score in (scores[0], scores[-1]))
    log.info("%s %s: AbsRel before %.4f, after %.4f", stage, workdir.name, first, last)


def tell_if_depthless(values: dict[str, float], step: int, told: bool) -> bool:
    """Whether no picture of the step was compared with its depth; a line in the log unless told."""
    depthless = 1 in (values.get("without_loss"), values.get("without_gt"))
    depthless &= not values.get("negative_scale")  # upside down they are, not without depth
    if depthless and not told:
        log.warning(
            "step %d: no picture of the batch has depth to be compared with (without_loss or"
            " without_gt is 1): are depth_scale, data.max_depth and data.filter right? A latent's"
            " cell needs all its pixels known: with sparse depth set loss.beta.gt to 0. Or are all"
            " predictions one value, as of a training that went astray? See workdir/pictures",
            step,
        )
    return depthless


def require_finite(values: dict[str, float], step: int, checkpoints: Checkpoints) -> None:
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if broken:
        raise TrainingError(
            f"step {step}: not finite: {broken}. The newest checkpoint is of step"
            f" {checkpoints.latest}. Lower schedule.learning_rate or optim.clip, or set model.dtype"
            " to float32, with another --workdir; `init`, this one's path, goes on from there"
        )


class OneProgramPerShape:
    """A jitted step(state, frozen, batch) that warns where more is compiled than batches explain.

    Every shape of batch has its own program, made at its first step. One more would mean that
    something else changes between steps, and minutes lost each time.
    """

    def __init__(self, step):
        self._step, self._shapes, self._expected = step, set(), 0

    @property
    def programs(self) -> int:
        return self._step._cache_size()

    def __call__(self, state, frozen, batch):
        shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in batch.items())
        if shapes not in self._shapes:
            self._shapes.add(shapes)
            self._expected += 1
        result = self._step(state, frozen, batch)
        if self.programs > self._expected:
            self._expected = self.programs
            log.warning("the training step was compiled again, for a batch seen before: %s", shapes)
        return result


class Profile(contextlib.ExitStack):
    """A JAX profile of `count` steps from step `first` >= 1 on; none where `count` is 0.

    A run that goes on amid these steps makes none, and says so; one that ends early keeps what it
    has.
    """

    def __init__(self, directory: pathlib.Path, first: int, count: int):
        super().__init__()
        self._directory, self._first, self._end = directory, first, first + count
        self._begun = False

    def at(self, step: int) -> None:
        if step == self._first < self._end:
            self._begun = True
            self.enter_context(jax.profiler.trace(str(self._directory)))
        elif step == self._end > self._first:
            self.close()
            if self._begun:
                log.info("profile of steps %d to %d in %s", self._first, step - 1, self._directory)
            else:
                log.warning("no profile: this run began after step %d", self._first)
