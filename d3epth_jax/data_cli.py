"""d3epth data check | build | speed: what a data set holds, the set made fast, how fast it is.

As in cli.py, nothing heavy is imported before a command runs.
"""

import argparse
import ast
import difflib
import inspect
import logging
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from d3epth_jax.argument_types import a_path, in_range
from d3epth_jax.output import OK, SOME_FAILED, UNUSABLE, cannot_be_written, show
from d3epth_jax.progress import Progress
from d3epth_jax.tables import format_table

FILTERS = ("min_range", "min_contrast", "max_invalid")
SHEET_ROWS = 12
BATCH = 4  # of the speed measured
USUAL = {"folder": {"depth_scale": 1000.0}}  # settings of a source, as in configs/common.py


def add_data(commands) -> None:
    """`d3epth data` and its subcommands."""
    parser = commands.add_parser("data", help="check data sets, and write them as fast shards")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_check, _add_build, _add_speed):
        add(commands)


def _add_check(commands) -> None:
    parser = commands.add_parser(
        "check",
        help="read everything; say what is in it and what is wrong",
        description="Decodes every sample; prints sizes, depth and valid share for each group, and"
        " every problem by file.",
        epilog="Exit code: 0 all is well, 1 problems found, 2 nothing to read or wrong arguments.",
    )
    parser.set_defaults(run=check)
    _add_source(parser)
    add = parser.add_argument
    add("--out", type=a_path, metavar="PNG", help=f"draw {SHEET_ROWS} samples as a sheet")
    add("--write-list", type=a_path, metavar="TXT",
        help="write names without problems that pass the filters, for `filename_list`")  # fmt: skip
    _add_filters(parser)


def _add_build(commands) -> None:
    parser = commands.add_parser(
        "build",
        help="write a source as sharded ArrayRecord, for this project and for TFDS",
        description="Writes OUT/NAME/1.0.0, which tfds:NAME/SPLIT reads, and tfds.data_source(NAME,"
        " split=SPLIT, data_dir=OUT). Run again, it goes on where it was and mends damaged shards.",
        epilog="Exit code: 0 finished, 1 broken samples, nothing finished, 2 wrong arguments.",
    )
    parser.set_defaults(run=build)
    _add_source(parser)
    add = parser.add_argument
    add("--out", required=True, type=a_path, help="folder of data sets")
    add("--name", help="of the data set; default: the source's")
    add("--split", help="its name there; default: the source's own, its setting `split`")
    add("--height", type=in_range(int, 1), help="scale and crop to this size; default: as they are")
    add("--width", type=in_range(int, 1))
    add("--crop", choices=("center", "kitti", "stretch"),
        help="which part is kept of what is scaled; default: center")  # fmt: skip
    add("--workers", type=in_range(int, 0), metavar="N",
        help="processes; 0: this one; default: one for each core")  # fmt: skip
    add("--shards", type=in_range(int, 1), metavar="N",
        help="files; default: one for every 256 samples")  # fmt: skip
    add("--on-error", choices=("raise", "skip"), default="raise",
        help="skip: leave unreadable samples out, and list them in the manifest")  # fmt: skip
    _add_filters(parser)


def _add_speed(commands) -> None:
    parser = commands.add_parser(
        "speed",
        help="images per second and core, as training loads them",
        description="Reads at random with the training's transforms, in one thread.",
    )
    parser.set_defaults(run=speed)
    _add_source(parser)
    add = parser.add_argument
    add("--height", type=in_range(int, 1), default=480)
    add("--width", type=in_range(int, 1), default=640)
    add("--seconds", type=in_range(float, 0.1), default=10.0, help="how long to measure")


def _add_source(parser) -> None:
    add = parser.add_argument
    add("source", help="its name in configs, such as folder or hypersim, or tfds:NAME[/SPLIT]")
    add("path", type=a_path, help="the data set's folder (TFDS: the folder of data sets)")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the source; repeat as needed. A folder's depth_scale is 1000 counts "
        "per metre if not set")  # fmt: skip


def _add_filters(parser) -> None:
    add = parser.add_argument
    add("--min-range", type=in_range(float, 0), metavar="M", help="least span of depth, metres")
    add("--min-contrast", type=in_range(int, 0, 255), metavar="N",
        help="least span of the picture's 0..255")  # fmt: skip
    add("--max-invalid", type=in_range(float, 0, 1), metavar="SHARE",
        help="most pixels without depth, 0..1")  # fmt: skip
    usual = "--min-range 0.5 --min-contrast 10 --max-invalid 0.03"
    parser.epilog = f"{parser.epilog} Usual filters of Hypersim's training set: {usual}."


def _filters(args: argparse.Namespace) -> dict:
    return {key: getattr(args, key) for key in FILTERS if getattr(args, key) is not None}


def check(args: argparse.Namespace) -> int:
    """`d3epth data check`: the exit code."""
    from d3epth_jax.data import check as checking
    from d3epth_jax.data.sources import files

    try:
        settings = _settings(args)
        for file in (args.write_list, args.out):
            if file and (problem := cannot_be_written(file)):
                raise ValueError(problem)
        listing = logging.getLogger(files.__name__)
        listing.setLevel(logging.ERROR)  # what is skipped, which the list at the end tells too
        try:
            source, problems = _open(args, settings, skip=True)
        finally:
            listing.setLevel(logging.NOTSET)
        filters = _filters(args)
        progress = Progress("check", len(source), unit="sample")
        findings = checking.inspect_all(source, filters, progress.update)
        findings, of_the_set = checking.check_units(source, findings)
        problems += checking.damaged_shards(source) + of_the_set
    except (OSError, ValueError) as error:
        return _unusable(error)
    show(_table(findings))
    problems += [problem for finding in findings for problem in finding.problems]
    sound = [i for i, finding in enumerate(findings) if not finding.problems]
    kept = [i for i in sound if not findings[i].rejected]
    if filters:
        show(f"{len(kept)} of {len(sound)} samples without problems pass the filters")
    if problems := list(dict.fromkeys(problems)):
        show("\n  ".join([f"{len(problems)} problem(s):", *problems]))
    try:
        if args.write_list:
            args.write_list.parent.mkdir(parents=True, exist_ok=True)
            names = "".join(f"{findings[i].name}\n" for i in kept)
            args.write_list.write_text(names, encoding="utf-8")
            show(f"{args.write_list}: {len(kept)} names")
        if args.out and sound:
            _draw(source, findings, sound, args.out)
            show(f"{args.out}: contact sheet")
    except (OSError, ValueError) as error:
        return _unusable(error)
    return SOME_FAILED if problems else OK


def build(args: argparse.Namespace) -> int:
    """`d3epth data build`: the exit code."""
    from d3epth_jax import data
    from d3epth_jax.data import build as building
    from d3epth_jax.data.sources.files import SourceError

    try:
        settings = _settings(args)
        source_name, set_name, _ = data.name_parts(args.source)
        if (args.height is None) != (args.width is None):
            raise ValueError("--height and --width belong together")
        if args.crop and args.height is None:
            raise ValueError(f"--crop {args.crop} needs --height and --width")
        split = _split(args, settings)
        source, unlisted = _open(args, settings, skip=args.on_error == "skip")
        progress = Progress("build", len(source), unit="sample")
        made = building.build(
            source,
            args.out,
            dataset=args.name or set_name.partition("/")[0] or source_name,
            split=split,
            origin={
                "name": args.source,
                **settings,
                "path": str(args.path.resolve()),
            },
            size=None if args.height is None else (args.height, args.width),
            crop=args.crop or "center",
            shards=args.shards,
            filters=_filters(args),
            on_error=args.on_error,
            unlisted=unlisted,
            workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
            progress=progress.update,
        )
    except SourceError as error:
        print(f"d3epth: {error}", file=sys.stderr)
        return SOME_FAILED
    except (OSError, ValueError) as error:
        return _unusable(error)
    folder = args.out / made["plan"]["dataset"] / building.VERSION
    lost = made["unreadable"] + len(unlisted)
    show(
        f"{folder}, split {made['plan']['split']}: {made['samples']} samples in"
        f" {len(made['shards'])} shards; {made['dropped']} dropped by filters,"
        f" {lost} problem(s) (manifest-{made['plan']['split']}.json lists them)"
    )
    return OK


def speed(args: argparse.Namespace) -> int:
    """`d3epth data speed`: the exit code."""
    from d3epth_jax.data import loader

    try:
        source, _ = _open(args, _settings(args))
        size = args.height, args.width
        batches = loader.make_loader(
            source,
            loader.standard_transforms(size),
            batch_size=BATCH,
            seed=0,
            shuffle=True,
            num_threads=1,
        )
        next(batches)
        count, wall, cpu = 0, time.monotonic(), time.process_time()
        while time.monotonic() - wall < args.seconds:
            next(batches)
            count += BATCH
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    except (OSError, ValueError) as error:
        return _unusable(error)
    show(
        f"{count / cpu:.1f} images/s per core at {size[0]}x{size[1]} ({1000 * cpu / count:.1f} ms"
        f" of processor time each; {count / wall:.1f} images/s by the clock);"
        f" 16 cores: {16 * count / cpu:.0f} images/s"
    )
    return OK


def _settings(args: argparse.Namespace) -> dict:
    """The source's arguments from --set; ValueError for one it does not have, or without files."""
    known = _arguments(args.source)
    if "path" not in known:
        raise ValueError(f"{args.source} makes its samples: it has no folder {args.path} to read")
    settings = {}
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write KEY=VALUE")
        if key not in known or key == "path":
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known)}"
            raise ValueError(f"--set {text}: {args.source} has no setting {key!r}{hint}")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = (value,) if isinstance(known[key].default, tuple) else value
    return settings


def _arguments(source: str):
    """The arguments by name of a source's function."""
    from d3epth_jax import data

    return inspect.signature(data.source_function(data.name_parts(source)[0])).parameters


def _split(args: argparse.Namespace, settings: dict) -> str:
    """What a source's samples are called in a built set: never "train" by mere default."""
    from d3epth_jax import data

    known = _arguments(args.source).get("split")
    of_the_source = settings.get("split", known.default if known else "")
    if split := args.split or data.name_parts(args.source)[2] or of_the_source:
        return split
    of_a_part = ", or --set split=... for one of its own" if known else ""
    raise ValueError(
        f"{args.source} does not say of which split all its samples are: give --split NAME, such as"
        f" train{of_a_part}"
    )


def _open(args: argparse.Namespace, settings: dict, *, skip: bool = False):
    """The source, and the problems for which it lacks samples: of one that skips, as by `skip`."""
    from d3epth_jax import data

    if not args.path.is_dir():
        raise NotADirectoryError(f"{args.path}: no such folder")
    settings = USUAL.get(args.source, {}) | settings
    if skip and "on_error" in _arguments(args.source):
        settings = {"on_error": "skip"} | settings
    try:
        source = data.make_source(args.source, path=args.path, **settings)
    except TypeError as error:  # no arithmetic on settings expects it
        raise ValueError(f"--set: a value of the wrong type: {error}") from error
    return source, list(getattr(source, "problems", ()))


def _unusable(error: Exception) -> int:
    print(f"d3epth: {error}", file=sys.stderr)
    return UNUSABLE


def _table(findings: Sequence) -> str:
    """A row for each group, and one for all."""
    groups: dict[str, list] = {}
    for finding in findings:
        groups.setdefault(finding.group, []).append(finding)
    if len(groups) > 1:
        groups["all"] = list(findings)
    head = ("group", "samples", "size", "2..98 % (m)", "medians (m)", "known")
    return format_table(head, [_row(name, group) for name, group in groups.items()])


def _row(name: str, findings: Sequence) -> tuple[str, ...]:
    read = [finding for finding in findings if finding.size != (0, 0)]
    sizes = list(
        dict.fromkeys(f"{f.size[1]}x{f.size[0]}" for f in sorted(read, key=lambda f: f.size))
    )
    depths = [finding.depth for finding in read if finding.valid > 0]
    low, middle, high = zip(*depths, strict=True) if depths else ((), (), ())
    return (
        name,
        str(len(findings)),
        " to ".join(dict.fromkeys((sizes[0], sizes[-1]))) if sizes else "-",
        f"{min(low):.3g} .. {max(high):.3g}" if depths else "-",
        f"{min(middle):.3g} .. {max(middle):.3g}" if depths else "-",
        f"{100 * sum(f.valid for f in read) / len(read):.1f} %" if read else "-",
    )


def _draw(source, findings: Sequence, indices: Sequence[int], path: pathlib.Path) -> None:
    """Samples spread evenly over the source, each as picture and depth."""
    from d3epth_jax import gallery, image

    count = min(SHEET_ROWS, len(indices))
    chosen = [indices[(2 * k + 1) * len(indices) // (2 * count)] for k in range(count)]
    rows = []
    for i in chosen:
        sample, title = source[i], findings[i].name.replace("/", "\n")
        image_depth_mask = (sample[key] for key in ("image", "depth", "mask"))
        rows.append(gallery.row(*image_depth_mask, {}, title=title))
    cells, titles = [list(row.cells.values()) for row in rows], [row.title for row in rows]
    image.save_png(path, gallery.contact_sheet(cells, ["picture", "depth"], titles))
