"""Runs the jobs of a config: python -m d3epth_jax.main --config=configs/quickstart.py

A config is one job (`config.job`) or a chain of them (`config.jobs`, names of sub-configs run in
that order, each in its own folder of the workdir). `{workdir}` in any string means the workdir.
Exit code: 0 all done, 2 a mistake in the settings or files (--verbosity=1 shows where), 130
interrupted.
"""

import logging
import os
import pathlib
import sys
import time

if __name__ == "__main__":  # before the imports below start threads
    from d3epth_jax import memory

    memory.keep_freed()

from absl import app, flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from d3epth_jax import config_arguments, hosts, sharding
from d3epth_jax.compilation_cache import use_compilation_cache
from d3epth_jax.output import INTERRUPTED

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Output folder; the config's own by default.")
DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "One of several processes that train together, each started with the same arguments: auto on a"
    " TPU pod, under Slurm, Open MPI or Kubernetes; else ADDRESS:PORT,COUNT,INDEX of process 0's"
    " address, how many there are, and which one this is.",
)
flags.mark_flag_as_required("config")

log = logging.getLogger("d3epth_jax")


@config_arguments.in_a_sentence()
def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"unknown arguments {argv[1:]}; settings look like --config.seed=1")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    log.setLevel(logging.INFO)
    config = CONFIG.value
    workdir = pathlib.Path(os.path.expanduser(WORKDIR.value or config.workdir))
    sharding.use_cpu_cores(config.cpu_devices)
    use_compilation_cache()
    if DISTRIBUTED.value:
        hosts.join(DISTRIBUTED.value)
        log.setLevel(logging.INFO if hosts.is_first() else logging.WARNING)
    sharding.require_devices()
    # On CPUs the first meeting of all gives up after half a minute: it must not be in a long job.
    hosts.meet("joined")
    jobs = {name: config[name] for name in config.jobs} if "jobs" in config else {"": config}
    began = time.monotonic()
    filled = {name: fill_in(job, workdir) for name, job in jobs.items()}
    check_jobs(filled)
    try:
        for name, job in filled.items():
            run_job(job, workdir / name)
    except KeyboardInterrupt as error:
        log.warning(
            "interrupted: %s; the same command goes on", str(error) or "what was done is kept"
        )
        sys.exit(INTERRUPTED)
    log.info("done in %.0f s; everything is in %s", time.monotonic() - began, workdir)


def _jobs() -> dict:
    """{name: (function that checks a config, function that runs it in a workdir)}."""
    # Imported here: `--help` and a typo in a config need no JAX.
    from d3epth_jax.evaluation import evaluate
    from d3epth_jax.training import ablation, cache, check_config, train

    return {
        "ablation": (ablation.check, ablation.run),
        "cache": (cache.check, cache.run),
        "eval": (evaluate.check, lambda *job: hosts.on_first(lambda: evaluate.run(*job))),
        "train": (check_config.check, train.run),
    }


def run_job(config: ConfigDict, workdir: pathlib.Path) -> None:
    log.info("%s: %s", config.job, workdir)
    _, run = _jobs()[config.job]
    run(config, workdir)


def check_jobs(jobs: dict[str, ConfigDict]) -> None:
    """Raises ValueError with what is wrong with the settings of any job, before the first runs."""
    known, problems = _jobs(), []
    for name, config in jobs.items():
        prefix = f"{name}." if name else ""
        problems += [f"set --config.{prefix}{key}=PATH" for key in _unset(config)]
        try:
            if config.job not in known:
                raise ValueError(f"unknown job {config.job!r}: choose one of {sorted(known)}")
            check, _ = known[config.job]
            check(config)
        except ValueError as error:
            problems.append(f"{name}: {error}" if name else str(error))
    if problems:
        raise ValueError("\n".join(problems))


def _unset(config: ConfigDict) -> list[str]:
    """Keys of paths that a config leaves open, as "DIR", less those of what is trained first."""
    flat = flatten_dict(config.to_dict(), sep=".")
    return [
        key
        for key, value in flat.items()
        if value == "DIR" and "init_config" not in key and not pathlib.Path(value).exists()
    ]


def fill_in(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """A copy with `{workdir}`, and a `~/` at the beginning, replaced in all strings that are
    values themselves."""
    filled = config.copy_and_resolve_references()
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            filled[name] = fill_in(value, workdir)
        elif isinstance(value, str):
            home = os.path.expanduser(value) if value.startswith("~/") else value
            filled[name] = home.replace("{workdir}", str(workdir))
    return filled


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=config_arguments.parse))
