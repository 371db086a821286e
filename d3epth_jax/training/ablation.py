"""The ablation job: many small trainings, each evaluated, and what they show (ablation_report.py).

An arm is a training with its own settings and the arm that it goes on from, if any. Folders:
seed0/ARM with the training's files and scenes/ and real/ (evaluations), teacher/ (its evaluations),
files/, cache/.
"""

import json
import logging
import pathlib
from collections.abc import Iterable, Mapping

import jax

from d3epth_jax import atomic, data, hosts, macs, sharding
from d3epth_jax.evaluation import evaluate
from d3epth_jax.output import show
from d3epth_jax.training import (
    ablation_report,
    cache,
    check_config,
    from_config,
    model_setup,
    runs,
    train,
    training_data,
)
from d3epth_jax.training.train_state import merge

log = logging.getLogger(__name__)

COST = "step_macs.json"  # in an arm's folder: MACs of a step, written once it is trained
SEEDS_APART = 10_000  # of the scenes that a seed of the ablation is trained on


def run(config, workdir: pathlib.Path) -> None:
    """Runs every arm with every seed and writes ablation.{md,json,png} after each of them.

    What is finished is not run again. An arm whose training fails is told at the end, and what goes
    on from it is left out. Raises ValueError for settings that make no sense or are not those that
    the workdir was made with, TrainingError for arms that failed.
    """
    check(config)
    for job in evaluations(config, config.teacher).values():
        data.make_source(**job.eval.source)  # what is wrong with it is told before hours of work
    evaluate_once(config, config.teacher, workdir / "teacher", baselines=("constant", "ramp"))
    chosen = [config.arms[name].train for name in config.order]
    if any(job.data.source.name == "tfds" for job in chosen):
        write_files(config.files, workdir / "files")
    if any(job.teacher.cache for job in chosen):
        cache.run(config.cache, workdir / "cache")
    failed = {}
    for seed in config.seeds:
        for name in config.order:
            needed = chain(config.arms, config.arms[name].macs_of or name)
            if seed not in seeds_of(config, name) or any((seed, each) in failed for each in needed):
                continue
            try:
                run_arm(config, workdir, name, seed)
            except train.TrainingError as error:
                log.error("arm %s, seed %d failed: %s", name, seed, error)
                failed[seed, name] = str(error)
                continue
            ablation_report.write(workdir, trained(config, workdir), config.comparisons)
    if failed:
        listed = [f"{name}, seed {seed}: {error}" for (seed, name), error in failed.items()]
        raise train.TrainingError("\n  ".join(["arms that failed:", *listed]))
    show(f"\n{(workdir / 'ablation.md').read_text()}")


def check(config) -> None:
    """Raises ValueError with everything that is wrong with the settings of all arms."""
    hosts.require_one("ablation")
    problems = []

    def ask(where, function, *args):
        try:
            function(*args)
        except ValueError as error:
            problems.append(f"{where}: {error}")

    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        problems.append(f"seeds: at least one, each once, not {tuple(config.seeds)}")
    if unknown := sorted({*config.order, *sum(config.comparisons, ())} - set(config.arms)):
        problems.append(f"no arms are called {unknown}: there are {sorted(config.arms)}")
    if not config.order:
        problems.append("order: no arm to run")
    for number, name in enumerate(config.order):
        if name not in config.arms:
            continue
        arm = config.arms[name]
        for other in filter(None, (arm.after, arm.macs_of)):
            if other not in config.order[:number]:
                problems.append(f"arms.{name} needs {other!r} before it in `order`")
            elif not set(seeds_of(config, name)) <= set(seeds_of(config, other)):
                problems.append(f"arms.{name} has seeds that {other!r} lacks, which it needs")
        if arm.after and arm.macs_of:
            problems.append(f"arms.{name}: `after` and `macs_of` exclude each other")
        ask(f"arms.{name}", check_config.check, arm.train)
    if any(config.arms[name].train.teacher.cache for name in config.order if name in config.arms):
        ask("cache", cache.check, config.cache)
    for name, job in evaluations(config, config.teacher).items():
        ask(f"evaluations.{name}", evaluate.check, job)
    if problems:
        raise ValueError("\n".join(problems))


def evaluations(config, model, baselines: tuple[str, ...] = ()) -> dict:
    """{name: job} of the evaluations that every model gets, of the model of a directory."""
    jobs = {name: job.copy_and_resolve_references() for name, job in config.evaluations.items()}
    for job in jobs.values():
        job.models.model, job.baselines = str(model), baselines
    return {name: job for name, job in jobs.items() if name != "real" or config.real}


def evaluate_once(config, model, folder: pathlib.Path, baselines: tuple[str, ...] = ()) -> None:
    """Evaluates the model of a directory into `folder`/NAME, where that is not done yet."""
    for name, job in evaluations(config, model, baselines).items():
        out = folder / name
        done = (out / "evaluation.json").is_file()
        out.mkdir(parents=True, exist_ok=True)
        runs.claim(out, job, in_use=done)
        if not done:
            evaluate.run(job, out)


def seeds_of(config, name: str) -> tuple[int, ...]:
    return tuple(config.seeds)[: config.arms[name].seeds or None]


def run_arm(config, workdir: pathlib.Path, name: str, seed: int) -> None:
    """Trains and evaluates an arm with a seed: of its scenes, and of its weights if random."""
    arm, folder = config.arms[name], workdir / f"seed{seed}"
    log.info("arm %s, seed %d: %s", name, seed, arm.title)
    job = arm.train.copy_and_resolve_references()
    job.seed = seed
    if "seed" in job.data.source:
        job.data.source.seed += SEEDS_APART * (seed + 1)  # none sees the teacher's scenes
    if arm.after:
        job.init = str(folder / arm.after / "model")
    costs = read_costs(workdir, config.order)
    if name not in costs:
        costs[name] = step_macs(job)
    job.train.steps = steps_of(config.arms, costs, name)
    model = train.run(job, folder / name)
    # Now that the settings are the folder's for good.
    atomic.write_text(folder / name / COST, f"{costs[name]}\n")
    evaluate_once(config, model, folder / name)


def read_costs(workdir: pathlib.Path, names: Iterable[str]) -> dict[str, int]:
    """{arm: MACs of a training step} of those that are trained, with any seed."""
    found = {name: sorted(workdir.glob(f"seed*/{name}/{COST}")) for name in names}
    return {name: json.loads(paths[0].read_text()) for name, paths in found.items() if paths}


def chain(arms: Mapping, name: str) -> list[str]:
    """An arm and all that it goes on from, first to last."""
    before = arms[name].after
    return [*(chain(arms, before) if before else ()), name]


def steps_of(arms: Mapping, costs: Mapping[str, int], name: str) -> int:
    """How many steps an arm trains, after those of the arm that it goes on from."""
    if not arms[name].macs_of:
        return arms[name].train.train.steps
    return max(1, round(total_macs(arms, costs, arms[name].macs_of) / costs[name]))


def total_macs(arms: Mapping, costs: Mapping[str, int], name: str) -> int:
    """MACs of an arm's training, and of all that it goes on from."""
    return sum(steps_of(arms, costs, each) * costs[each] for each in chain(arms, name))


def trained(config, workdir: pathlib.Path) -> dict[str, ablation_report.Arm]:
    """What the report has to know of every arm that is trained, in the table's order."""
    costs = read_costs(workdir, config.order)
    return {
        name: ablation_report.Arm(
            title=config.arms[name].title,
            seeds=seeds_of(config, name),
            steps=sum(steps_of(config.arms, costs, each) for each in chain(config.arms, name)),
            step_macs=costs[name],
            macs=total_macs(config.arms, costs, name),
        )
        for name in config.order
        if name in costs
    }


def step_macs(config) -> int:
    """MACs of a training step, its whole batch: of the gradient of the real loss, traced, not run.

    Taps on the padding are not counted: in a gradient they are also what a stride left out.
    """
    config = config.copy_and_resolve_references()
    config.model.update(dtype="float32", remat=False)  # as macs.countable
    mesh = sharding.make_mesh(config.fsdp)
    batches = training_data.make_batches(config, mesh, training_data.make_sources(config)[0])
    batch = jax.eval_shape(lambda: next(batches))
    teacher, student, trainable, rest = model_setup.make_models(config)
    stage = from_config.make_stage(config, teacher, student, trainable, rest)

    def total(params, batch):
        losses, _, _ = stage.loss_fn(merge(params, stage.frozen["rest"]), stage.frozen, batch)
        return sum(losses[name].sum() for name in stage.beta)

    with macs.plain_forms():
        return macs.count(jax.grad(total), trainable, batch).valid


def write_files(settings, folder: pathlib.Path) -> None:
    """Writes rendered scenes as a data set of TFDS' layout, `scenes` in `folder`, once."""
    # Imported here: tensorflow_datasets takes seconds.
    from d3epth_jax.data import build

    log.info("%d rendered scenes as files: %s", settings.length, folder)
    scenes = NamedScenes(data.make_source(**settings))
    build.build(scenes, folder, dataset="scenes", origin=json.loads(settings.to_json()))


class NamedScenes:
    """A source that makes batches as one that is read in order and has names, for a build."""

    BATCH = 16

    def __init__(self, source):
        self._source, self._number, self._samples = source, None, []
        self.seed = source.seed

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        number, place = divmod(index, self.BATCH)
        if number != self._number:
            first = number * self.BATCH
            # The last batch is filled up by earlier scenes: one program renders all.
            indices = [i % len(self) for i in range(first, first + self.BATCH)]
            self._samples, self._number = data.read_samples(self._source, indices), number
        return self._samples[place]

    def name(self, index: int) -> str:
        return f"{index:06d}"

    def group(self, index: int) -> str:
        return "all"
