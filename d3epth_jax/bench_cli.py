"""d3epth bench: what models cost, how fast they are here, and beside diffusers.

As in cli.py, nothing heavy is imported before a command runs; JAX and torch only ever run in the
processes that are measured (bench_worker.py).
"""

import argparse
import collections
import contextlib
import datetime
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from d3epth_jax.bench_plan import WHAT, is_model, plan

OK, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130

# What is measured where nothing else is said.
ALL = {"what": WHAT, "dtype": "bfloat16", "batch": [1, 8], "fold": "both"}
ALL |= {"out": pathlib.Path("bench")}
USUAL = {"what": ["predict"], "dtype": "float32", "batch": [1], "fold": "yes", "out": None}
RESULTS = "bench.json"


def add_bench(commands) -> None:
    """`d3epth bench`."""
    parser = commands.add_parser(
        "bench",
        help="parameters, MACs, speed and memory of models, here",
        description="Measures presets (with random weights: they cost the same) or model"
        " directories, each in a process of its own. Without a network.",
        epilog="`d3epth bench --all` is everything an accelerator is to show: all presets folded"
        " and not, one beside diffusers where that is installed, a stage-2 step with the largest"
        " batch that fits and with 32 by accumulation, stage 1 from cached latents, and the hours"
        " of a whole training. Exit code: 0 all done, 1 some measurements failed, 2 wrong"
        " arguments, 130 interrupted (what was done is kept: --resume goes on).",
    )
    parser.set_defaults(run=bench, fail=parser.error)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="a preset or a directory; --all: all presets")
    add("--all", action="store_true", help="everything (below); other options still count")
    add("--what", nargs="+", choices=WHAT,
        help="stage1 and stage2: a training step; pieces: MACs saved by each folding; default"
        " predict; --all: all four")  # fmt: skip
    add("--size", default="576x768", metavar="HxW", help="of pictures to predict")
    add("--train-size", default="480x640", metavar="HxW", help="of pictures to train on")
    add("--batch", nargs="+", type=int, metavar="N", help="pictures at a time; default 1")
    add("--train-batch", type=int, default=32, metavar="N", help="pictures of an optimiser step")
    add("--micro", type=int, default=0, metavar="N",
        help="of these at a time; default: as many as fit, then as many of those as divide it; on"
        " a CPU one")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="default float32; --all: bfloat16")
    add("--fold", choices=("yes", "no", "both"), help="default yes; --all: both")
    add("--no-remat", action="store_true", help="training keeps all activations")
    add("--compare", choices=("diffusers",), help="the same weights through it, alternating")
    add("--runs", type=int, default=7, metavar="N", help="the median of so many")
    add("--ahead", type=int, default=1, metavar="N",
        help="so many models (beside nothing) are read and compiled together, all in the device's"
        " memory, before they are measured one by one: much faster where there are cores for it;"
        " 'first call' says nothing then, and as XLA chooses kernels by timing them, hold a row"
        " against one of --ahead 1")  # fmt: skip
    add("--resume", action="store_true",
        help="keep what --out has, and measure what it has not; else it begins anew")  # fmt: skip
    add("--out", type=pathlib.Path, metavar="DIR",
        help="bench.json, bench.md and macs.png; --all: bench")  # fmt: skip


def bench(args: argparse.Namespace) -> int:
    """`d3epth bench`: the exit code."""
    from d3epth_jax.bench_report import name

    for key, value in (ALL if args.all else USUAL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    problems, rows, failed = [], [], False
    try:
        rows = _measured_before(args)
    except ValueError as error:
        problems = [f"--resume: {error}"]
    jobs = plan(args, problems)
    todo = []
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {name(job)}"
        if any(_is_of(row, job) and _is_enough(row, job) for row in rows if "error" not in row):
            _say(f"{label} is there")
        elif job not in [other for _, other in todo]:
            todo.append((label, job))
    if rows:
        rows = _in_order(rows, jobs)
        _save(args, rows)
    waves = collections.deque(_waves(todo, args.ahead))
    try:
        while waves:
            wave = waves.popleft()
            with _ready_together(wave) as models:
                for (label, job), ready in zip(wave, models, strict=True):
                    _say(f"{label} ...")
                    now = _measured(job, args, *ready) | _when()
                    if "error" in now and ready:  # alone it may find the memory
                        waves.append([(label, job)])
                        continue
                    failed |= "error" in now
                    rows = _in_order([r for r in rows if not _is_of(r, job)] + [now], jobs)
                    _save(args, rows)
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
    from d3epth_jax.bench_worker import WorkerError, machine

    path = args.out and args.out / RESULTS
    if not (args.resume and path.is_file()):
        return []
    try:
        saved = json.loads(path.read_text())
        rows, keys = saved["rows"], ("device", "platform", "jax")
        there = [saved["machine"], *({k: row[k] for k in keys if k in row} for row in rows)]
        here = machine() | _device()
        other = next((place for place in there if not place.items() <= here.items()), None)
    except WorkerError as error:
        raise ValueError(f"no device to compare with: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: delete it ({error!r})") from error
    if other:
        words = ", ".join(str(value) for value in other.values())
        raise ValueError(f"{path} was measured on another machine ({words}): give another --out")
    return rows


@functools.cache
def _device() -> dict:
    """The device that workers compute on, and their JAX: asked of one, to leave it free here."""
    with contextlib.ExitStack() as stack:
        return _worker(stack, "bench", {}).ask("device")


def _when() -> dict:
    """What a row says of its making: files may hold those of several calls."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"date": now, "command": " ".join(["d3epth", *sys.argv[1:]])}


EXTENT = ("runs", "compared")  # more of them is as good


def _is_of(row: dict, job: dict) -> bool:
    """Whether a row is of what a job measures, were it with fewer runs or without a comparison."""
    row = {"micro": 0} | row  # of before there was --micro
    return {key: job[key] for key in job if key not in EXTENT}.items() <= row.items()


def _in_order(rows: list[dict], jobs: list[dict]) -> list[dict]:
    """As the jobs are planned, after what is of none of them."""
    return sorted(rows, key=lambda r: next((i for i, j in enumerate(jobs) if _is_of(r, j)), -1))


def _is_enough(row: dict, job: dict) -> bool:
    return all(row.get(key, 0) >= job.get(key, 0) for key in EXTENT)


Todo = list[tuple[str, dict]]  # each job with its label


def _waves(todo: Todo, ahead: int) -> Iterator[Todo]:
    """What is made ready together: predictions, `ahead` of them. All else has the memory alone."""
    wave = []
    for label, job in todo:
        alone = job["what"] != "predict" or job["compared"]
        if wave and (alone or len(wave) == ahead):
            yield wave
            wave = []
        wave.append((label, job))
        if alone:
            yield wave
            wave = []
    if wave:
        yield wave


@contextlib.contextmanager
def _ready_together(wave: Todo) -> Iterator[list[list[Future]]]:
    """Of each job what `_measured` takes beside it: the model made ready, or nothing of one alone.

    A failure is in the Future: it is told when its turn comes.
    """
    if len(wave) == 1:
        yield [[]]
        return
    # The workers end first, so that no thread is waited for that still waits for one.
    with ThreadPoolExecutor(len(wave)) as pool, contextlib.ExitStack() as stack:
        # Begun here: a thread would begin them after an interrupt too.
        begun = [stack.enter_context(_begun(job, shares=True)) for _, job in wave]
        futures = [
            pool.submit(_made_ready, job, ready, len(wave))
            for (_, job), ready in zip(wave, begun, strict=True)
        ]
        _say("\n".join(f"{label} is made ready" for label, _ in wave))
        wait(futures)  # nothing else runs while one is measured
        yield [[future] for future in futures]


def _measured(job: dict, args: argparse.Namespace, *ready: Future) -> dict:
    """The job and what was found, or the `error`."""
    from d3epth_jax.bench_worker import WorkerError

    measure = {"predict": _predict, "pieces": _pieces}.get(job["what"], _train)
    try:
        return job | measure(job, args, *(future.result() for future in ready))
    except WorkerError as error:
        _say(f"    failed: {error}")
        return job | {"error": str(error)}


class Ready(NamedTuple):
    """A model in a process that waits to be asked."""

    ours: Any
    folder: pathlib.Path
    saved: str  # the model's directory, where diffusers is to read it
    row: dict  # what is known of it
    close: Callable[[], None]


@contextlib.contextmanager
def _begun(job: dict, *, shares: bool) -> Iterator[Ready]:
    """shares: the device's memory, with other processes."""
    with contextlib.ExitStack() as stack:
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if shares else {}
        ours = _worker(stack, "bench", env)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        saved = str(folder / "model") if job["compared"] and not is_model(job["model"]) else ""
        yield Ready(ours, folder, saved, {}, stack.close)


def _made_ready(job: dict, ready: Ready, together: int = 1) -> Ready:
    """Opened, counted and run twice; where several are made ready together also part by part."""
    ours, row = ready.ours, ready.row
    try:
        row |= ours.ask(
            "open",
            model=job["model"],
            size=job["size"],
            batch=job["batch"],
            dtype=job["dtype"],
            folded=job["fold"],
            save=ready.saved,
        )
        # The first call compiles, the second still warms up; those that count follow directly.
        first = ours.ask("run", save=str(ready.folder / "ours.npy"))
        row |= ours.ask("count")
        ours.ask("run")
        if together == 1:
            row["first_s"] = first["seconds"]
        else:
            row["ahead"], row["memory"] = together, ours.ask("memory")
            for part in row["macs"]:
                ours.ask("part", part=part)
    except BaseException:
        ready.close()  # others need the memory
        raise
    return ready


def _predict(job: dict, args: argparse.Namespace, ready: Ready | None = None) -> dict:
    from d3epth_jax.bench_worker import WorkerError

    with contextlib.ExitStack() as stack:
        if ready:
            stack.callback(ready.close)
            for request in ({"do": "run"}, *({"do": "part", "part": p} for p in ready.row["macs"])):
                ready.ours.ask(**request)  # it has waited
        else:
            begun = stack.enter_context(_begun(job, shares=job["compared"]))
            ready = _made_ready(job, begun)
        ours, folder, saved, row, _ = ready
        row["seconds"] = [ours.ask("run")["seconds"] for _ in range(args.runs)]
        if "memory" not in row:
            row["memory"] = ours.ask("memory")
        row["matmul"] = ours.ask("matmul", dtype=job["dtype"])["flops"]
        row["parts"] = {
            part: [ours.ask("part", part=part)["seconds"] for _ in range(args.runs)]
            for part in row["macs"]
        }
        if job["compared"]:
            theirs = _worker(stack, "compare_diffusers", {})
            try:
                _compare(job, args, ours, theirs, folder, saved, row)
            except WorkerError as error:  # ours has been measured
                _say(f"    diffusers failed: {error}")
                row["error"] = f"diffusers: {error}"
    return row


def _compare(job, args, ours, theirs, folder: pathlib.Path, saved: str, row: dict) -> None:
    """Fills row["compare"], variant by variant: what is measured stays if the next one fails.

    {variant: alternating times of pipeline and parts, memory, difference of the depth maps}.
    """
    import numpy as np

    from d3epth_jax.bench_worker import random_picture

    picture = str(folder / "picture.npy")
    np.save(picture, random_picture(job["size"]))
    row["theirs"] = theirs.ask(
        "open",
        directory=saved or job["model"],
        size=job["size"],
        batch=job["batch"],
        dtype=job["dtype"],
        steps=row["steps"],
    )
    result = row["compare"] = {}
    for variant in row["theirs"]["variants"]:
        theirs.ask("prepare", variant=variant)
        output = folder / f"{variant}.npy"
        theirs.ask("run", picture=picture, save=str(output))
        run = {"ours": (ours, {"do": "run"}), "theirs": (theirs, {"do": "run", "picture": picture})}
        turns = {"pipeline": _alternating(args.runs, run)}
        memory = theirs.ask("memory")  # of the pipeline, as ours
        for part in row["macs"]:
            request = {"do": "part", "part": part}
            run = {"ours": (ours, request), "theirs": (theirs, request)}
            turns[part] = _alternating(args.runs, run)
        times = {who: {name: found[who] for name, found in turns.items()} for who in run}
        mine, its = (np.load(path) for path in (folder / "ours.npy", output))
        result[variant] = {
            **times,
            "memory": memory,
            "difference": float(np.abs(mine - its).max()),
            "depth_std": float(its.std()),
        }
        ratio = np.median(times["theirs"]["pipeline"]) / np.median(times["ours"]["pipeline"])
        difference = result[variant]["difference"]
        _say(f"    diffusers {variant}: ratio {ratio:.2f}, largest difference {difference:.1e}")


def _alternating(runs: int, requests: dict) -> dict[str, list[float]]:
    """Seconds of each one's (worker, request), in turns."""
    seconds = {who: [] for who in requests}
    for _ in range(runs):
        for who, (worker, request) in requests.items():
            # The system may take memory from a process that waits: it is fetched back in a run
            # that does not count.
            worker.ask(**request)
            seconds[who].append(worker.ask(**request)["seconds"])
    return seconds


def _train(job: dict, args: argparse.Namespace) -> dict:
    """A step of the largest micro-batch, and one of the whole batch by accumulation.

    Where the micro-batch is given, only the second.
    """
    settings = {key: job[key] for key in ("model", "size", "batch", "dtype", "remat")}

    def step(micro: int) -> dict:
        # In a process of its own: an accelerator does not forget the most memory it ever had.
        with contextlib.ExitStack() as stack:
            worker = _worker(stack, "bench", {})
            return worker.ask("train", stage=job["what"], runs=args.runs, micro=micro, **settings)

    row = step(job["micro"])
    results, batch = [row.pop("result")], job["batch"]
    micro = next(n for n in range(results[0]["micro"], 0, -1) if batch % n == 0)
    if micro < batch and not job["micro"]:
        results.append(step(micro)["result"])
    return row | {"results": results}


def _pieces(job: dict, args: argparse.Namespace) -> dict:
    del args
    with contextlib.ExitStack() as stack:
        worker = _worker(stack, "bench", {})
        return {"pieces": worker.ask("pieces", model=job["model"], size=job["size"])}


def _worker(stack: contextlib.ExitStack, module: str, env: dict):
    from d3epth_jax.bench_worker import Worker

    return stack.enter_context(Worker(f"d3epth_jax.{module}", env))


def _show(args: argparse.Namespace, rows: list[dict]) -> None:
    from d3epth_jax import bench_report

    print(bench_report.markdown(rows))
    if args.out is not None:
        print(f"results are in {args.out}")


def _save(args: argparse.Namespace, rows: list[dict]) -> None:
    """All files anew after each measurement: whatever comes then, they are there."""
    from d3epth_jax import atomic, bench_report
    from d3epth_jax.bench_worker import machine

    if args.out is None:
        return
    content = {"machine": machine(), "rows": rows}
    text = bench_report.document(**content)
    for name, data in ((RESULTS, json.dumps(content, indent=1)), ("bench.md", text)):
        with atomic.replacing(args.out / name) as partial:
            partial.write_text(data)
    chart = bench_report.macs_chart(rows)
    if chart is None:  # there may be one of before
        (args.out / "macs.png").unlink(missing_ok=True)
    else:
        with atomic.replacing(args.out / "macs.png") as partial:
            chart.save(partial, "png")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
