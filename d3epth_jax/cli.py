"""The command line: d3epth predict photo.jpg

A subcommand is a function that adds its arguments, and one that runs it and returns the exit code;
`main` lists them. Nothing heavy is imported before a command runs: `--help` answers at once.
"""

import argparse
import contextlib
import functools
import itertools
import logging
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from d3epth_jax import __version__, atomic, data_cli
from d3epth_jax.argument_types import a_name, a_path, in_range
from d3epth_jax.bench import cli as bench_cli
from d3epth_jax.output import INTERRUPTED, OK, SOME_FAILED, UNUSABLE, cannot_be_made, show
from d3epth_jax.pictures import EXPECTED, Picture, find_pictures, name_outputs, reason

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code (argparse exits by itself with 2)."""
    parser = argparse.ArgumentParser(prog="d3epth", description="Depth from single pictures.")
    parser.add_argument("--version", action="version", version=f"d3epth {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_predict, add_convert, bench_cli.add_bench, data_cli.add_data):
        add(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("d3epth_jax").setLevel(logging.INFO)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\nd3epth: interrupted; what was done by then stays", file=sys.stderr)
        return INTERRUPTED


def add_predict(commands) -> None:
    parser = commands.add_parser(
        "predict",
        help="depth maps of pictures",
        description="Writes, for each picture NAME: NAME_depth.png (16 bits, 0..65535 is the "
        "prediction's 0..1), NAME_color.png, and NAME.npy (float32 [H,W]). It is relative: up to a "
        "scale and a shift, of depth or of what the model predicts instead, of which large may be "
        "near; the last line says which. Unreadable pictures are skipped and listed at the end.",
        epilog="Exit code: 0 all done, 1 some pictures failed, 2 no usable model or arguments, "
        "130 interrupted.",
    )
    parser.set_defaults(run=predict, fail=parser.error)
    add = parser.add_argument
    add("inputs", nargs="+", type=a_path, metavar="IMAGE_OR_DIR", help="folders: recursively")
    add("--model", type=a_name,
        help="a directory in diffusers' layout, a hub id OWNER/NAME, or one that comes with the "
        "package: nano (the default), nano-teacher")  # fmt: skip
    add("--out", default="depth_maps", type=a_path,
        help="folder of the results, made as needed; default: depth_maps")  # fmt: skip
    add("--processing-resolution", type=in_range(int, 0), metavar="N",
        help="longest side the networks see; 0: the picture's; default: the model's")  # fmt: skip
    add("--steps", type=in_range(int, 1), metavar="N", help="denoising steps; default: the model's")
    add("--ensemble-size", type=in_range(int, 1), default=1, metavar="N",
        help="predictions per picture that are merged (models of many steps only)")  # fmt: skip
    add("--batch-size", type=in_range(int, 1), default=1, metavar="N",
        help="pictures of one size computed together")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--attention", choices=("auto", "chunked"), default="auto",
        help="chunked: without an NVIDIA GPU's fused kernel, should that fail")  # fmt: skip
    add("--color-map", choices=("Spectral", "gray"), default="Spectral",
        help="Spectral (the default): near is red, far is blue; gray: near is black, far is white; "
        "whatever the model predicts")  # fmt: skip
    add("--uncertainty", action="store_true",
        help="also NAME_uncertainty.npy: how far the ensemble's members differ")  # fmt: skip
    add("--seed", type=in_range(int, 0, 2**32 - 1), metavar="N",  # JAX looks at no further bits
        help="of the initial latents, the same for each picture")  # fmt: skip
    _add_where(parser)


def _add_where(parser) -> None:
    """Which version of a model, and from where."""
    add = parser.add_argument
    add("--revision", type=a_name, help="of a hub model: branch, tag or commit")
    add("--variant", type=a_name, help="of the weights that are read, such as fp16")
    add("--subfolder", type=a_name, help="of the model's repository or directory")
    add("--cache-dir", type=a_name, help="of hub models")
    add("--offline", action="store_true", help="only use hub models that are in the cache")


def _where(args: argparse.Namespace) -> dict:
    return {
        "revision": args.revision,
        "variant": args.variant,
        "subfolder": args.subfolder,
        "cache_dir": args.cache_dir,
        "local_files_only": args.offline,
    }


def add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="a model to another layout or number type",
        description="Reads a model directory, a hub model, or the newest checkpoint of a training "
        "run (its workdir; averaged weights), and writes a directory that diffusers reads too. "
        "Nothing is written unless all of it could be read.",
    )
    parser.set_defaults(run=convert)
    add = parser.add_argument
    add("source", type=a_name,
        help="a model directory, a hub id OWNER/NAME, or the workdir of a run")  # fmt: skip
    add("out", type=a_path, help="the directory to write; an old one is replaced")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as they are")
    add("--save-variant", type=a_name, metavar="NAME",
        help="put into the names of the weights' files (fp16)")  # fmt: skip
    add("--layout", choices=("diffusers", "orbax"), default="diffusers",
        help="orbax: weights as one Orbax tree, for JAX alone")  # fmt: skip
    _add_where(parser)


def convert(args: argparse.Namespace) -> int:
    """`d3epth convert`: the exit code."""
    import numpy as np

    from d3epth_jax import sharding
    from d3epth_jax.training import model_setup
    from d3epth_jax.weights import hub

    run = pathlib.Path(args.source)
    of_a_model = args.revision or args.variant or args.subfolder
    is_run = (run / "checkpoints").is_dir() and not of_a_model
    try:
        hub.require_replaceable(args.out)
        if args.out.exists() and run.is_dir() and args.out.samefile(run):
            raise FileExistsError(f"{args.out} is the source: choose another directory")
        if is_run or args.layout == "orbax":
            sharding.require_devices()
        if is_run:
            model, params, text = model_setup.read_run(run)
        else:
            model, params, text, _ = hub.load_model(args.source, param_dtype=None, **_where(args))
        dtype = args.dtype and np.dtype(args.dtype)  # ml_dtypes, which hub imports, knows bfloat16
        hub.save_model(
            args.out, model, params, text,
            dtype=dtype, variant=args.save_variant, layout=args.layout,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"d3epth: {args.source} cannot be converted:\n{error}", file=sys.stderr)
        return UNUSABLE
    show(f"{args.source} is in {args.out} now")
    return OK


def predict(args: argparse.Namespace) -> int:
    """`d3epth predict`: the exit code, after everything that can be predicted has been."""
    from d3epth_jax.progress import Progress

    if args.uncertainty and args.ensemble_size < 3:
        args.fail("--uncertainty compares an ensemble's members: set --ensemble-size to 3 or more")
    # Made with the first result; what cannot be made is told before a model is fetched and loaded.
    if problem := cannot_be_made(args.out):
        args.fail(f"--out {problem}")

    failed: dict[pathlib.Path, str] = {}
    pictures = name_outputs(find_pictures(args.inputs, failed), args.out)
    batches = list(_batches(pictures, args.batch_size, failed))
    _tell(failed)
    total = len(failed) + sum(map(len, batches))
    if not batches:
        return _summary(args.out, total, failed)
    try:
        predictor, quantity = _load_predictor(args)
    except EXPECTED as error:
        name = args.model or "that comes with the package"
        print(f"d3epth: the model {name} cannot be used:\n{error}", file=sys.stderr)
        return UNUSABLE

    about = f"depth map: {quantity}, by {args.model or 'nano'}"
    write = functools.partial(_write, color_map=args.color_map, about=about)
    progress, done = Progress("predict", total, unit="picture"), len(failed)
    for batch in batches:
        before = len(failed)
        _predict_batch(predictor, write, batch, args.batch_size, failed)
        if len(failed) > before:
            progress.clear()
            _tell(failed, before)
        done += len(batch)
        progress.update(done)
    return _summary(args.out, total, failed, quantity)


def _batches(
    pictures: Sequence[Picture], batch_size: int, failed: dict[pathlib.Path, str]
) -> Iterator[list[Picture]]:
    """Pictures of one size, `batch_size` at a time; sorted by size, so that each compiles once."""
    from d3epth_jax import image

    sizes = {}
    for picture in pictures:
        with _failing([picture], failed, Exception):
            sizes[picture] = image.upright_size(picture.path)
    for _, group in itertools.groupby(sorted(sizes, key=sizes.get), key=sizes.get):
        group = list(group)
        yield from (group[i : i + batch_size] for i in range(0, len(group), batch_size))


def _load_predictor(args: argparse.Namespace):
    """A function (uint8 pictures, batch size) -> DepthOutput, and what it predicts, in words.

    Raises OSError or ValueError for what would fail with any picture.
    """
    import jax

    from d3epth_jax import sharding
    from d3epth_jax.compilation_cache import use_compilation_cache
    from d3epth_jax.pipeline import DepthPipeline
    from d3epth_jax.weights.download import BUNDLED

    use_compilation_cache()
    sharding.require_devices()
    model = args.model or BUNDLED["nano"]  # not by name: a folder may be called so
    how = {"dtype": args.dtype, "attention": args.attention}
    pipe = DepthPipeline.from_pretrained(model, **how, **_where(args))
    settings = {
        "processing_resolution": args.processing_resolution,
        "num_inference_steps": args.steps,
        "ensemble_size": args.ensemble_size,
        "output_uncertainty": args.uncertainty,
    }
    if args.seed is not None:
        settings["key"] = jax.random.key(args.seed)
    pipe.check(batch_size=args.batch_size, **settings)
    kind = pipe.model.prediction_type
    quantity = f"{kind}, {'far' if kind == 'depth' else 'near'} is large"
    return lambda arrays, batch_size: pipe(arrays, batch_size=batch_size, **settings), quantity


def _predict_batch(
    predictor, write, batch: Sequence[Picture], batch_size: int, failed: dict[pathlib.Path, str]
) -> None:
    from d3epth_jax import image

    arrays = {}
    for picture in batch:
        with _failing([picture], failed, Exception):
            arrays[picture] = image.load(picture.path)
    if arrays:
        _predict_arrays(predictor, write, arrays, batch_size, failed)


def _predict_arrays(predictor, write, arrays: dict, batch_size: int, failed) -> None:
    trouble: dict[pathlib.Path, str] = {}
    with _failing(arrays, trouble):
        out = predictor(list(arrays.values()), batch_size)
    if trouble and batch_size > 1:  # such as for want of memory: one by one
        for picture, array in arrays.items():
            _predict_arrays(predictor, write, {picture: array}, 1, failed)
        return
    failed.update(trouble)
    for number, picture in enumerate([] if trouble else arrays):
        with _failing([picture], failed):
            write(picture, out, number)


def _write(picture: Picture, out, number: int, *, color_map: str, about: str) -> None:
    import numpy as np

    from d3epth_jax import image

    prediction = out.prediction[number]
    if not np.isfinite(prediction).all():
        raise ValueError("the model predicts NaN or infinity for this picture")
    color = image.visualize_depth(out.far[number], color_map=color_map)
    save_png = functools.partial(image.save_png, about=f"{about}, of {picture.path.name}")
    # First, for it says that the others are results too.
    _save(save_png, picture.file("_color.png"), color)
    _save(_save_npy, picture.file(".npy"), prediction[..., 0])
    depth = image.export_depth_to_16bit_png(prediction)
    _save(save_png, picture.file("_depth.png"), depth)
    uncertainty = picture.file("_uncertainty.npy")
    if out.uncertainty is not None:
        _save(_save_npy, uncertainty, out.uncertainty[number, ..., 0])
    elif not picture.file("_uncertainty_color.png").exists():  # of a picture NAME_uncertainty
        uncertainty.unlink(missing_ok=True)  # it belonged to a former map


def _save(save, path: pathlib.Path, array) -> None:
    """save(path, array), with an error that names this file: what fails is listed by picture."""
    try:
        save(path, array)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def _save_npy(path: pathlib.Path, array) -> None:
    import numpy as np

    with atomic.replacing(path) as partial, partial.open("wb") as file:
        np.save(file, np.asarray(array, np.float32), allow_pickle=False)


@contextlib.contextmanager
def _failing(
    pictures: Iterable[Picture], failed: dict[pathlib.Path, str], errors=EXPECTED
) -> Iterator[None]:
    """Notes an error of these pictures instead of raising it.

    While a file is read, `errors` is Exception: a damaged one may make Pillow raise anything, and
    must not cost the other pictures.
    """
    try:
        yield
    except errors as error:
        log.debug("failed", exc_info=True)
        failed.update({picture.path: reason(error, picture.path) for picture in pictures})


def _tell(failed: dict[pathlib.Path, str], first: int = 0) -> None:
    for path, why in list(failed.items())[first:]:
        print(f"d3epth: skipped {path}: {why}", file=sys.stderr)


def _summary(
    out: pathlib.Path, total: int, failed: dict[pathlib.Path, str], quantity: str = ""
) -> int:
    done = total - len(failed)
    where = f"; results are in {out} ({quantity})" if done else ""
    show(f"{done} of {total} pictures predicted{where}")
    if not failed:
        return OK
    lines = [f"{path}: {reason}" for path, reason in failed.items()]
    print("\n  ".join([f"d3epth: {len(failed)} failed:", *lines]), file=sys.stderr)
    return SOME_FAILED
