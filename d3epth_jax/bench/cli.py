"""d3epth bench: what models cost, how fast they are here, and beside diffusers.

As in cli.py, nothing heavy is imported before a command runs. What is to be measured is
plan.py's, how is measure.py's.
"""

import argparse
import collections
import datetime
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

from d3epth_jax import __version__
from d3epth_jax.argument_types import a_path
from d3epth_jax.bench import measure
from d3epth_jax.bench.plan import RESULTS, WHAT, plan, problems_of
from d3epth_jax.output import OK, SOME_FAILED, show

# What is measured where nothing else is said.
USUAL = {"what": ["predict"], "dtype": "float32", "batch": [1], "fold": "yes", "out": None}
USUAL |= {"size": "576x768", "train_size": "480x640", "train_batch": 32, "micro": 0}
USUAL |= {"no_remat": False, "runs": 7, "ahead": 1, "attention": "auto"}
ALL = USUAL | {"what": WHAT, "dtype": "bfloat16", "batch": [1, 8], "fold": "both"}
ALL |= {"out": pathlib.Path("bench")}

# What an option is of; elsewhere it would do nothing.
TIMED, TRAINED = {"predict", "stage1", "stage2"}, {"stage1", "stage2"}
OF = dict.fromkeys(("train_size", "train_batch", "micro", "no_remat"), TRAINED)
OF |= dict.fromkeys(("dtype", "runs", "ahead", "attention"), TIMED)
OF |= {"size": {"predict", "pieces"}, "batch": {"predict"}, "fold": {"predict"}}


def add_bench(commands) -> None:
    """`d3epth bench`."""
    parser = commands.add_parser(
        "bench",
        help="parameters, MACs, speed and memory of models, here",
        description="Measures presets (with random weights: they cost the same) or model"
        " directories, each in a process of its own. Without a network.",
        epilog="`d3epth bench --all` is what an accelerator is to show: all presets folded"
        " and not, one beside diffusers where that is installed, a stage-2 step with as many"
        " pictures of 32 at a time as fit (else a half, a quarter, ...: then also 32 by"
        " accumulation), rematerialised and not, stage 1 from cached"
        " latents, and the hours of a whole training; where MODELs are named, training and pieces"
        " of each. Exit code: 0 all done, 1 some measurements"
        " failed, 2 wrong arguments, 130 interrupted (what was done is kept: --resume goes on).",
    )
    parser.set_defaults(run=bench, fail=parser.error)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="a preset or a directory; --all: all presets")
    add("--all", action="store_true", help="everything (below); other options still count")
    add("--what", nargs="+", choices=WHAT,
        help="stage1 and stage2: a training step; pieces: MACs saved by each folding; default"
        " predict; --all: all four")  # fmt: skip
    add("--size", metavar="HxW", help="of pictures to predict; default 576x768")
    add("--train-size", metavar="HxW", help="of pictures to train on; default 480x640")
    add("--batch", nargs="+", type=int, metavar="N", help="pictures at a time; default 1")
    add("--train-batch", type=int, metavar="N", help="pictures of an optimiser step; default 32")
    add("--micro", type=int, metavar="N",
        help="of these at a time; default: all, or a half, a quarter, ... what first fits into the"
        " memory JAX may take (XLA_PYTHON_CLIENT_MEM_FRACTION); on a CPU one")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="default float32; --all: bfloat16")
    add("--attention", choices=("auto", "chunked"),
        help="chunked: should a GPU's fused kernel fail; default auto")  # fmt: skip
    add("--fold", choices=("yes", "no", "both"), help="default yes; --all: both")
    add("--no-remat", action="store_true", default=None, help="training keeps all activations")
    add(
        "--compare",
        choices=("diffusers",),
        help="the same weights through it, alternating; with --fold both beside the folded ones",
    )
    add("--runs", type=int, metavar="N", help="the median of so many; default 7")
    add("--ahead", type=int, metavar="N",
        help="so many models, or training steps, are read and compiled together, models in the"
        " device's memory, before they are measured one by one: much faster where there are cores"
        " for it; the time of compiling is not shown then, and as XLA chooses kernels by timing"
        " them, hold a row against one of --ahead 1, with another --out")  # fmt: skip
    add("--resume", action="store_true",
        help="keep what --out has, and measure what it has not")  # fmt: skip
    add("--out", type=a_path, metavar="DIR",
        help="bench.json, bench.md and macs.png; --all: bench")  # fmt: skip


def bench(args: argparse.Namespace) -> int:
    """`d3epth bench`: the exit code. Asked to end (SIGTERM), it ends its processes too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _bench(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _bench(args: argparse.Namespace) -> int:
    from d3epth_jax.bench.report import name

    given = [key for key in OF if getattr(args, key) is not None]
    for key, value in (ALL if args.all else USUAL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    problems, rows, failed = problems_of(args), [], False
    for key in given:
        if not OF[key].intersection(args.what):
            of = " or ".join(sorted(OF[key]))
            problems.append(f"--{key.replace('_', '-')} does nothing without --what {of}")
    try:
        rows = _measured_before(args)
    except ValueError as error:
        problems.append(f"--resume: {error}")
    if args.out is not None and not problems:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.out):
                pass
        except OSError as error:
            problems.append(f"--out {args.out} cannot be written to: {error}")
    if problems:
        args.fail("\n  ".join(["cannot measure:", *problems]))
    jobs = plan(args)
    todo, here = [], _code() if rows else ""
    done = [row for row in rows if "error" not in row]
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {name(job)}"
        there = [row for row in done if _is_of(row, job) and _is_enough(row, job)]
        if there:
            code = there[-1].get("code", "unknown code")
            measure.say(f"{label} is there" + (f", of {code}" if code != here else ""))
        elif job not in [other for _, other in todo]:
            todo.append((label, job))
    if rows:
        rows = _in_order(rows, jobs)
        failed |= not _save(args, rows)
    waves = collections.deque(measure.waves(todo, args.ahead))
    try:
        while waves:
            wave = waves.popleft()
            with measure.ready_together(wave) as models:
                for (label, job), ready in zip(wave, models, strict=True):
                    measure.say(f"{label} ...")
                    now = measure.measured(job, args, *ready) | when()
                    rows = _in_order(_replaced(rows, job, now), jobs)
                    failed |= not _save(args, rows)
                    if "error" in now and ready:  # alone it may find the memory
                        measure.say("    it is measured alone, after the others")
                        waves.append([(label, job)])
                    else:
                        failed |= "error" in now
    except KeyboardInterrupt:
        if rows:
            _show(args, rows)
        raise
    _show(args, rows)
    return SOME_FAILED if failed else OK


def _measured_before(args: argparse.Namespace) -> list[dict]:
    """What --resume keeps; ValueError if it cannot be read or compared with what is measured here.

    A row says which device it was measured on, and with which JAX.
    """
    from d3epth_jax.bench.worker import WorkerError, machine

    path = args.out and args.out / RESULTS
    if not (args.resume and path and path.is_file()):
        return []
    try:
        saved = json.loads(path.read_text())
        rows, keys = saved["rows"], ("device", "platform", "jax")
        there = [saved["machine"], *({k: row[k] for k in keys if k in row} for row in rows)]
        here = machine() | measure.device()
        other = next((place for place in there if not place.items() <= here.items()), None)
    except WorkerError as error:
        raise ValueError(f"no device to compare with: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: delete it ({error!r})") from error
    if other:
        words = ", ".join(str(value) for value in other.values())
        raise ValueError(f"{path} was measured on another machine ({words}): give another --out")
    return rows


def when(program: str = "d3epth") -> dict:
    """What a row says of its making: files may hold those of several calls."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"date": now, "command": " ".join([program, *sys.argv[1:]]), "code": _code()}


def _code() -> str:
    """The package's version, and its commit where it lies in a git checkout of its own."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():  # git would tell of a checkout around it
        return __version__
    git = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty= modified"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} {found.stdout.strip()}"


EXTENT = ("runs", "compared")  # more of them is as good


def _is_of(row: dict, job: dict) -> bool:
    """Whether a row is of what a job measures, were it with fewer runs or without a comparison."""
    row = {"attention": "auto"} | row  # files of before it was an option
    return {key: job[key] for key in job if key not in EXTENT}.items() <= row.items()


def _replaced(rows: list[dict], job: dict, now: dict) -> list[dict]:
    """The rows with one more, which takes the place of those that say no more than it does.

    And of what a directory's weights of before gave: no table would tell which is which.
    """
    of_any_weights = {key: value for key, value in job.items() if key != "weights"}

    def covered(row: dict) -> bool:
        pairs = zip(_extent(row), _extent(now), strict=True)
        old = row.get("weights") != job.get("weights") and "error" not in now
        return _is_of(row, of_any_weights) and (old or all(was <= new for was, new in pairs))

    return [*(row for row in rows if not covered(row)), now]


def _extent(row: dict) -> tuple[int, int, int]:
    """How much a row says: whether it holds a measurement, and all of it; variants; runs."""
    if not any(key in row for key in ("seconds", "results", "pieces")):
        return 0, 0, 0
    return 1 + ("error" not in row), len(row.get("compare", {})), row.get("runs", 0)


def _in_order(rows: list[dict], jobs: list[dict]) -> list[dict]:
    """As the jobs are planned, after what is of none of them."""
    return sorted(rows, key=lambda r: next((i for i, j in enumerate(jobs) if _is_of(r, j)), -1))


def _is_enough(row: dict, job: dict) -> bool:
    return all(row.get(key, 0) >= job.get(key, 0) for key in EXTENT)


def _show(args: argparse.Namespace, rows: list[dict]) -> None:
    from d3epth_jax.bench import report

    show(report.markdown(rows))
    if args.out is not None:
        show(f"results are in {args.out}")


def _save(args: argparse.Namespace, rows: list[dict]) -> bool:
    """All files anew after each measurement; whether they could be written. If not it goes on."""
    try:
        if args.out is not None:
            _write(args, rows)
    except OSError as error:
        measure.say(f"    what was measured cannot be saved: {error}")
        return False
    return True


def _write(args: argparse.Namespace, rows: list[dict]) -> None:
    from d3epth_jax import atomic
    from d3epth_jax.bench import report
    from d3epth_jax.bench.worker import machine

    content = {"machine": machine(), "rows": rows}
    text = report.document(**content)
    atomic.write_text(args.out / RESULTS, json.dumps(content, indent=1))
    atomic.write_text(args.out / "bench.md", text)
    if chart := report.macs_chart(rows):
        with atomic.replacing(args.out / "macs.png") as partial:
            chart.save(partial, "png")
