"""What `d3epth bench` is to measure: a list of jobs, once its arguments hold."""

import argparse
import difflib
import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence

from d3epth_jax.output import cannot_be_made

WHAT = ["predict", "stage2", "stage1", "pieces"]
TRAINED = {"stage2": "d2_base", "stage1": "d3_light_small"}
RESULTS = "bench.json"
PACKAGES = ("torch", "diffusers", "transformers")


def problems_of(args: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the arguments."""
    from d3epth_jax.models import presets

    models, what, problems = _models_of(args), args.what, []
    if not models:
        problems.append("name a MODEL, or --all")
    for model in models:
        if not exists(model):
            problem = f"{model} is neither a model directory nor a preset"
            problem += f" ({', '.join(presets.PRESETS)})"
            problems.append(problem + _nearest(model))
    for option in ("size", "train_size"):
        text, flag = getattr(args, option), f"--{option.replace('_', '-')}"
        if min(size := _size(text)) < 8:
            problems.append(f"{flag} {text}: height x width is expected, such as 576x768")
        elif option == "train_size" and any(side % 8 for side in size):
            problems.append(f"{flag} {text}: training takes multiples of 8")
    counts = {"--runs": args.runs, "--train-batch": args.train_batch}
    counts |= {"--batch": min(args.batch), "--ahead": args.ahead}
    problems += [f"{key} must be at least 1, not {n}" for key, n in counts.items() if n < 1]
    if args.micro and (args.micro < 1 or args.train_batch % args.micro):
        problems.append(f"--micro {args.micro} does not divide --train-batch {args.train_batch}")
    if set(what) - {"predict"} and not (args.all and "predict" in what):
        for model in models:
            if model not in presets.PRESETS and exists(model):
                problem = f"{model}: training and pieces are measured of presets"
                problems.append(problem + _nearest(model))
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
            if exists(model) and model not in beside
        ]
    if args.compare and "predict" not in what:
        problems.append("--compare diffusers is of predictions: add predict to --what")
    if args.compare and (absent := _absent()):
        problems.append(
            f"--compare diffusers needs {', '.join(absent)}: pip install {' '.join(PACKAGES)}"
        )
    if args.resume and args.out is None:
        problems.append("--resume goes on with what is in --out: give --out")
    if args.out is not None and not args.resume and os.path.isfile(args.out / RESULTS):
        problems.append(
            f"--out {args.out} holds measurements already: --resume keeps them and adds to them; to"
            " begin anew name another folder"
        )
    if args.out is not None and (problem := cannot_be_made(args.out)):
        problems.append(f"--out {problem}")
    return problems


def plan(args: argparse.Namespace) -> list[dict]:
    """The measurements to make, of arguments without problems."""
    from d3epth_jax.models import presets

    models, what = _models_of(args), args.what
    folds = {"yes": [True], "no": [False], "both": [True, False]}[args.fold]
    known = [model for model in models if model in presets.PRESETS]
    # For --resume to compare: what is not kept need not be read for it, gigabytes of some models.
    weights = {model: _weights_of(model) if args.out else {} for model in models}
    compared = models if args.compare else []
    if args.all and not args.compare and not _absent():
        compared = [model for model in models if _reads_depth(model)][:1]

    def predictions(models: Sequence[str], fold: bool) -> list[dict]:
        return [
            {
                **{"what": "predict", "model": model, "size": _size(args.size), "batch": batch},
                **{"dtype": args.dtype, "attention": args.attention, "fold": fold},
                **{"runs": args.runs, **weights[model]},
                "compared": model in compared and fold == folds[0],
            }
            for model in models
            for batch in args.batch
            if "predict" in what
        ]

    def training(stage: str) -> list[dict]:
        # Of all presets one is enough.
        trained = known if args.models else [TRAINED[stage]]
        ways = [(not args.no_remat, args.micro)]  # rematerialised, pictures at a time
        if args.all and not args.no_remat:
            ways += [(False, args.micro)]
            # As stage 2's configs do it, whether or not all fit at once.
            fourth = [n for n in range(1, args.train_batch // 4 + 1) if args.train_batch % n == 0]
            accumulates = stage == "stage2" and fourth and not args.micro
            ways += [(False, fourth[-1])] if accumulates else []
        return [
            {
                **{"what": stage, "model": model, "size": _size(args.train_size)},
                **{"batch": args.train_batch, "dtype": args.dtype, "attention": args.attention},
                **{"runs": args.runs, "remat": remat, "micro": micro},
            }
            for model in trained
            for remat, micro in ways
            if stage in what
        ]

    pieces = [
        {"what": "pieces", "model": model, "size": _size(args.size)}
        for model in (known if args.models else known[:1])
        if "pieces" in what
    ]
    # What matters most comes first: time on an accelerator may be short.
    return [
        *predictions(models[:1], folds[0]),
        *(job for stage in TRAINED for job in training(stage)),
        *predictions(models[1:], folds[0]),
        *(job for fold in folds[1:] for job in predictions(models, fold)),
        *pieces,
    ]


def _weights_of(model: str) -> dict[str, str]:
    """{weights: digest} of a directory, which may hold others the next time; its JSON is not in."""
    from d3epth_jax.weights import hub

    return {"weights": hub.digest(model)} if is_model(model) else {}


def _models_of(args: argparse.Namespace) -> list[str]:
    from d3epth_jax.models import presets

    return args.models or (list(presets.PRESETS) if args.all else [])


def _size(text: str) -> list[int]:
    """[height, width]; zeros for what is no size."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    return [int(side) for side in found.groups()] if found else [0, 0]


def _absent() -> list[str]:
    """What diffusers' side needs and is not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def _nearest(name: str) -> str:
    """What to add where a preset is asked for."""
    from d3epth_jax.models import presets

    near = difflib.get_close_matches(name, presets.PRESETS, 1)
    return f": did you mean {near[0]}?" if near else ""


def exists(name: str) -> bool:
    from d3epth_jax.models import presets

    return name in presets.PRESETS or is_model(name)


def _reads_depth(name: str) -> bool:
    """Whether a UNet takes RGB and depth latent, which diffusers' pipeline always gives it."""
    from d3epth_jax.models import presets
    from d3epth_jax.weights import files

    if is_model(name):
        unet, vae = (
            files.read_json(_folder(name) / part / "config.json") for part in ("unet", "vae")
        )
        return unet.get("in_channels", 4) == 2 * vae.get("latent_channels", 4)
    if name not in presets.PRESETS:
        return False
    unet, autoencoder = presets.get(name)
    return unet.in_channels == 2 * autoencoder.latent_channels


def is_model(name: str) -> bool:
    return (_folder(name) / "model_index.json").is_file()


def _folder(name: str) -> pathlib.Path:
    """Of a model in a directory, or of one that comes with the package."""
    from d3epth_jax.weights.download import bundled

    return bundled(name) or pathlib.Path(name)
