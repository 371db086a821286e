"""d3epth bench: what models cost, how fast they are here, and beside diffusers.

As in cli.py, nothing heavy is imported before a command runs; JAX and torch only ever run in the
processes that are measured (bench_worker.py).
"""

import argparse
import contextlib
import datetime
import difflib
import functools
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile

OK, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130

WHAT = ["predict", "stage2", "stage1", "pieces"]
# What is measured where nothing else is said.
ALL = {"what": WHAT, "dtype": "bfloat16", "batch": [1, 8], "fold": "both"}
ALL |= {"out": pathlib.Path("bench")}
USUAL = {"what": ["predict"], "dtype": "float32", "batch": [1], "fold": "yes", "out": None}
TRAINED = {"stage2": "d2_base", "stage1": "d3_light_small"}
PACKAGES = ("torch", "diffusers", "transformers")
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
    add("--dtype", choices=("float32", "bfloat16"), help="default float32; --all: bfloat16")
    add("--fold", choices=("yes", "no", "both"), help="default yes; --all: both")
    add("--no-remat", action="store_true", help="training keeps all activations")
    add("--compare", choices=("diffusers",), help="the same weights through it, alternating")
    add("--runs", type=int, default=7, metavar="N", help="the median of so many")
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
    jobs = plan(args)
    rows, failed = _measured_before(args), False
    try:
        for number, job in enumerate(jobs, 1):
            before = [row for row in rows if _is_of(row, job)]
            there = [row for row in before if "error" not in row and _is_enough(row, job)]
            _say(f"[{number}/{len(jobs)}] {name(job)} {'is there' if there else '...'}")
            now = there[0] if there else _measured(job, args) | _when()
            failed |= "error" in now
            rows = [row for row in rows if row not in before] + [now]
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
    return {key: job[key] for key in job if key not in EXTENT}.items() <= row.items()


def _is_enough(row: dict, job: dict) -> bool:
    return all(row.get(key, 0) >= job.get(key, 0) for key in EXTENT)


def plan(args: argparse.Namespace) -> list[dict]:
    """The measurements to make. Ends the program with every problem of the arguments."""
    from d3epth_jax.models import presets

    problems = []
    models = args.models or (list(presets.PRESETS) if args.all else [])
    if not models:
        problems.append("name a MODEL, or --all")
    for model in models:
        if not _exists(model):
            near = difflib.get_close_matches(model, presets.PRESETS, 1)
            problems.append(
                f"{model} is neither a model directory nor a preset ({', '.join(presets.PRESETS)})"
                + (f": did you mean {near[0]}?" if near else "")
            )
    sizes = {}
    for option in ("size", "train_size"):
        text, flag = getattr(args, option), f"--{option.replace('_', '-')}"
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        sizes[option] = [int(side) for side in found.groups()] if found else [0, 0]
        if min(sizes[option]) < 8:
            problems.append(f"{flag} {text}: height x width is expected, such as 576x768")
        elif option == "train_size" and any(side % 8 for side in sizes[option]):
            problems.append(f"{flag} {text}: training takes multiples of 8")
    counts = {"--runs": args.runs, "--train-batch": args.train_batch}
    counts |= {"--batch": min(args.batch)}
    problems += [f"{key} must be at least 1, not {n}" for key, n in counts.items() if n < 1]
    what = args.what
    if set(what) - {"predict"} and not (args.all and "predict" in what):
        problems += [
            f"{model}: training and pieces are measured of presets"
            for model in models
            if model not in presets.PRESETS
        ]
    beside = []
    for model in models:
        try:
            beside += [model] if _reads_depth(model) else []
        except (OSError, ValueError) as error:
            problems.append(f"{model} is not a whole model: {error}")
    if args.compare:
        problems += [
            f"{model}: its UNet takes the RGB latent alone, which diffusers' pipeline does not run"
            for model in models
            if _exists(model) and model not in beside
        ]
    absent = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if args.compare and absent:
        problems.append(
            f"--compare diffusers needs {', '.join(absent)}: pip install {' '.join(PACKAGES)}"
        )
    if args.resume and args.out is None:
        problems.append("--resume goes on with what is in --out: give --out")
    try:
        _measured_before(args)
    except ValueError as error:
        problems.append(f"--resume: {error}")
    if args.out is not None:
        there = next(path for path in (args.out, *args.out.parents) if os.path.lexists(path))
        if not (os.path.isdir(there) and os.access(there, os.W_OK)):
            problems.append(f"--out {args.out} cannot be made: {there} cannot be written to")
    if problems:
        args.fail("\n  ".join(["cannot measure:", *problems]))

    folds = {"yes": [True], "no": [False], "both": [True, False]}[args.fold]
    known = [model for model in models if model in presets.PRESETS]

    def predictions(fold: bool) -> list[dict]:
        return [
            {
                **{"what": "predict", "model": model, "size": sizes["size"], "batch": batch},
                **{
                    "runs": args.runs,
                    "dtype": args.dtype,
                    "fold": fold,
                    "compared": model in compared and fold == folds[0],
                },
            }
            for model in models
            for batch in args.batch
        ]

    compared = models if args.compare else beside[:1] if args.all and not absent else []
    # What matters most comes first: time on an accelerator may be short.
    jobs = predictions(folds[0]) if "predict" in what else []
    for stage, usual in TRAINED.items():
        if stage in what:
            one = known[:1] if stage == "stage2" else known[-1:]
            one = [usual] if usual in known else one
            jobs += [
                {
                    **{"what": stage, "model": model, "size": sizes["train_size"]},
                    **{"batch": args.train_batch, "dtype": args.dtype, "runs": args.runs},
                    "remat": not args.no_remat,
                }
                for model in (one if args.all else known)
            ]
    if "pieces" in what:
        jobs += [
            {"what": "pieces", "model": model, "size": sizes["size"]}
            for model in (known[:1] if args.all else known)
        ]
    return jobs + (predictions(folds[1]) if "predict" in what and folds[1:] else [])


def _measured(job: dict, args: argparse.Namespace) -> dict:
    """The job and what was found, or the `error`."""
    from d3epth_jax.bench_worker import WorkerError

    measure = {"predict": _predict, "pieces": _pieces}.get(job["what"], _train)
    try:
        return job | measure(job, args)
    except WorkerError as error:
        _say(f"    failed: {error}")
        return job | {"error": str(error)}


def _predict(job: dict, args: argparse.Namespace) -> dict:
    from d3epth_jax.bench_worker import WorkerError

    with contextlib.ExitStack() as stack:
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if job["compared"] else {}
        ours = _worker(stack, "bench", env)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        saved = str(folder / "model") if job["compared"] and not _is_model(job["model"]) else ""
        row = ours.ask(
            "open",
            model=job["model"],
            size=job["size"],
            batch=job["batch"],
            dtype=job["dtype"],
            folded=job["fold"],
            save=saved,
        )
        # The first call compiles, the second still warms up; the others follow without a pause.
        row["first_s"] = ours.ask("run", save=str(folder / "ours.npy"))["seconds"]
        row |= ours.ask("count")
        ours.ask("run")
        row["seconds"] = [ours.ask("run")["seconds"] for _ in range(args.runs)]
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
    """A step of the largest micro-batch, and one of the whole batch by accumulation."""
    settings = {key: job[key] for key in ("model", "size", "batch", "dtype", "remat")}

    def step(micro: int = 0) -> dict:
        # In a process of its own: an accelerator does not forget the most memory it ever had.
        with contextlib.ExitStack() as stack:
            worker = _worker(stack, "bench", {})
            return worker.ask("train", stage=job["what"], runs=args.runs, micro=micro, **settings)

    row = step()
    results, batch = [row.pop("result")], job["batch"]
    micro = next(n for n in range(results[0]["micro"], 0, -1) if batch % n == 0)
    if micro < batch:
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


def _exists(name: str) -> bool:
    from d3epth_jax.models import presets

    return name in presets.PRESETS or _is_model(name)


def _reads_depth(name: str) -> bool:
    """Whether a UNet takes RGB and depth latent, which diffusers' pipeline always gives it."""
    from d3epth_jax.models import presets

    if _is_model(name):
        unet, vae = (
            json.loads((_folder(name) / part / "config.json").read_text())
            for part in ("unet", "vae")
        )
        return unet.get("in_channels", 4) == 2 * vae.get("latent_channels", 4)
    if name not in presets.PRESETS:
        return False
    unet, autoencoder = presets.get(name)
    return unet.in_channels == 2 * autoencoder.latent_channels


def _is_model(name: str) -> bool:
    return (_folder(name) / "model_index.json").is_file()


def _folder(name: str) -> pathlib.Path:
    """Of a model in a directory, or of one that comes with the package."""
    from d3epth_jax.weights.download import bundled

    return bundled(name) or pathlib.Path(name)


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
