"""What `d3epth bench` measures: each job in processes of its own (worker.py).

Nothing heavy is imported here, as in cli.py: JAX and torch only ever run in those processes.
"""

import argparse
import contextlib
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from d3epth_jax.bench.plan import is_model

Todo = list[tuple[str, dict]]  # each job with its label


def waves(todo: Todo, ahead: int) -> Iterator[Todo]:
    """What is made ready together: `ahead` predictions, or so many training steps.

    All else is alone: pieces need no device, and a comparison has it for itself.
    """
    wave, before = [], None
    for label, job in todo:
        alone = job["what"] == "pieces" or job.get("compared")
        kind = None if alone else job["what"] == "predict"
        if wave and (alone or kind != before or len(wave) == ahead):
            yield wave
            wave = []
        wave.append((label, job))
        before = kind
    if wave:
        yield wave


@contextlib.contextmanager
def ready_together(wave: Todo) -> Iterator[list[list[Future]]]:
    """Of each job what `measured` takes beside it: what was made ready, or nothing of one alone.

    A failure is in the Future: it is told when its turn comes.
    """
    if len(wave) == 1:
        yield [[]]
        return
    # The workers end first, so that no thread is waited for that still waits for one.
    with ThreadPoolExecutor(len(wave)) as pool, contextlib.ExitStack() as stack:
        # Begun here: a thread would begin them after an interrupt too.
        try:
            begun = [stack.enter_context(_begun(job, shares=True)) for _, job in wave]
        except OSError as error:  # no temporary folder, for instance: told when its turn comes
            say(f"    they cannot be made ready together: {error}")
            stack.close()
            yield [[] for _ in wave]
            return
        futures = [
            pool.submit(_made_ready, job, ready, len(wave))
            for (_, job), ready in zip(wave, begun, strict=True)
        ]
        say("\n".join(f"{label} is made ready" for label, _ in wave))
        wait(futures)  # nothing else runs while one is measured
        yield [[future] for future in futures]


def measured(job: dict, args: argparse.Namespace, *ready: Future) -> dict:
    """The job and what was found, or the `error`."""
    from d3epth_jax.bench.worker import WorkerError

    measure = {"predict": _predict, "pieces": _pieces}.get(job["what"], _train)
    try:
        return job | measure(job, args, *(future.result() for future in ready))
    except (WorkerError, OSError) as error:  # such as a full disk
        say(f"    failed: {error}")
        return job | {"error": str(error)}


class Ready(NamedTuple):
    """A model, or a training step, in a process that waits to be asked."""

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
        ours = _worker(stack, "predict" if job["what"] == "predict" else "train", env)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        saves = job.get("compared") and not is_model(job["model"])
        saved = str(folder / "model") if saves else ""
        yield Ready(ours, folder, saved, {}, stack.close)


def _made_ready(job: dict, ready: Ready, together: int = 1) -> Ready:
    """Opened, counted and run twice; where several are made ready together also part by part.

    A training step is compiled.
    """
    ours, row = ready.ours, ready.row
    try:
        if job["what"] != "predict":
            settings = ("model", "size", "dtype", "attention", "remat", "micro", "batch")
            settings = {key: job[key] for key in settings} | {"shared": together > 1}
            row |= ours.ask("compile", stage=job["what"], **settings)
            row |= {"ahead": together} if together > 1 else {}
            return ready
        row |= ours.ask(
            "open",
            model=job["model"],
            size=job["size"],
            batch=job["batch"],
            dtype=job["dtype"],
            attention=job["attention"],
            folded=job["fold"],
            save=ready.saved,
        )
        # The first call compiles, the second still warms up; those that count follow directly.
        first = ours.ask("run", save=str(ready.folder / "ours.npy"))
        row |= ours.ask("count")
        ours.ask("run")
        if together == 1:
            row["first_s"], row["compile_s"] = first["seconds"], first["compile_s"]
        else:
            row["ahead"], row["memory"] = together, ours.ask("memory")
            for part in row["macs"]:
                ours.ask("part", part=part)
    except BaseException:
        ready.close()  # others need the memory
        raise
    return ready


def _predict(job: dict, args: argparse.Namespace, ready: Ready | None = None) -> dict:
    from d3epth_jax.bench.worker import WorkerError

    with contextlib.ExitStack() as stack:
        if ready:
            stack.callback(ready.close)
            ready.ours.ask("run")  # it has waited
        else:
            begun = stack.enter_context(_begun(job, shares=job["compared"]))
            ready = _made_ready(job, begun)
        ours, folder, saved, row, _ = ready
        row["seconds"] = [ours.ask("run")["seconds"] for _ in range(args.runs)]
        if "memory" not in row:
            row["memory"] = ours.ask("memory")
        row["parts"], asked = {}, "parts"
        try:
            row["matmul"] = ours.ask("matmul", dtype=job["dtype"])["flops"]
            for part in row["macs"]:
                ours.ask("part", part=part)  # it has waited, or compiles now
                times = [ours.ask("part", part=part)["seconds"] for _ in range(args.runs)]
                row["parts"][part] = times
            if job["compared"]:
                asked = "diffusers"
                theirs = _worker(stack, "compare_diffusers", {})
                _compare(job, args, ours, theirs, folder, saved, row)
        except (WorkerError, OSError) as error:  # the whole has been measured
            say(f"    {asked} failed: {error}")
            row["error"] = f"{asked}: {error}"
    return row


def _compare(job, args, ours, theirs, folder: pathlib.Path, saved: str, row: dict) -> None:
    """Fills row["compare"], variant by variant: what is measured stays if the next one fails.

    {variant: alternating times of pipeline and parts, memory, difference of the depth maps}.
    """
    import numpy as np

    from d3epth_jax.bench.worker import WorkerError, random_picture

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
    if (row["platform"] == "cpu") != (row["theirs"]["device"] == "cpu"):
        raise WorkerError(
            f"JAX computes on {row['device']}, torch on {row['theirs']['device']}: install both for"
            " the same device, or hide the other one (CUDA_VISIBLE_DEVICES=)"
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
        say(f"    diffusers {variant}: ratio {ratio:.2f}, largest difference {difference:.1e}")


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


def _train(job: dict, args: argparse.Namespace, ready: Ready | None = None) -> dict:
    """A step of the largest micro-batch, and one of the whole batch by accumulation.

    Where the micro-batch is given, only the second. Each is in a process of its own: an accelerator
    does not forget the most memory it ever had.
    """
    from d3epth_jax.bench.worker import WorkerError

    def step(micro: int, batch: int, ready: Ready | None = None) -> dict:
        with contextlib.ExitStack() as stack:
            if ready:
                stack.callback(ready.close)
            else:
                begun = stack.enter_context(_begun(job, shares=False))
                ready = _made_ready(job | {"micro": micro, "batch": batch}, begun)
            result = ready.ours.ask("step", runs=args.runs)
            matmul = ready.ours.ask("matmul", dtype=job["dtype"])["flops"]
            return ready.row | {"matmul": matmul, "result": result}

    batch = job["batch"]
    row = step(job["micro"], batch, ready)
    largest = row.pop("result")
    if ready:
        del largest["compile_s"]
    row["results"] = [largest]
    micro = next(n for n in range(largest["micro"], 0, -1) if batch % n == 0)
    try:
        if largest.get("after_failure"):
            del largest["memory"]  # of the batch that did not fit
            row["results"] = [step(largest["micro"], largest["micro"])["result"]]
        if micro < batch and not job["micro"]:
            row["results"].append(step(micro, batch)["result"])
    except (WorkerError, OSError) as error:  # one has been measured
        say(f"    failed: {error}")
        row["error"] = f"after a step of {largest['micro']}: {error}"
    return row


def _pieces(job: dict, args: argparse.Namespace) -> dict:
    del args
    with contextlib.ExitStack() as stack:
        worker = _worker(stack, "predict", {})
        return {"pieces": worker.ask("pieces", model=job["model"], size=job["size"])}


def _worker(stack: contextlib.ExitStack, module: str, env: dict):
    from d3epth_jax.bench.worker import Worker

    # A program read from a cache would tell nothing of compiling it.
    env = {"JAX_ENABLE_COMPILATION_CACHE": "false", **env}
    return stack.enter_context(Worker(f"d3epth_jax.bench.{module}", env))


@functools.cache
def device() -> dict:
    """The device that workers compute on, and their JAX: asked of one, to leave it free here."""
    with contextlib.ExitStack() as stack:
        return _worker(stack, "predict", {}).ask("device")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
