"""Any directory of RGB + depth pairs, checked as a whole before the first step of training.

Layouts: an index (JSON list of objects, or CSV with the same columns), else folders `rgb/` and
`depth/` beside each other at any level, paired by the path below them without its suffix ("x", or
"SCENE/x"). Where pairs lie in rgb/ and depth/ themselves, folders below them are not read; a
warning names those that hold pairs too. Hidden folders are passed over. Links to folders are
followed, and no folder is visited twice. Index fields:
    rgb, depth    paths relative to the index's folder, or to the folder `source` in it
    source, name  optional: group and name of the pair (default: none, and the picture's stem)
    depth_scale   optional: counts per metre of this depth PNG (default: the argument's)
Depth is 16-bit (or 32-bit integer) PNG, metres = value / depth_scale, or .npy in metres; z-depth.
0, negative, NaN and Inf mean "no depth here"; sparse LiDAR and dense maps alike.
"""

import csv
import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.files import FileSource, Item, Problem, SourceError

log = logging.getLogger(__name__)

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
DEPTHS = {".png", ".npy"}


def folder(
    path,
    *,
    index: str = "",
    depth_scale: float | None = None,
    split: str = "",
    holdout_every: int = 5,
    holdout_sources: Sequence[str] = (),
    filename_list: str = "",
    min_valid: int = 16,
    on_error: str = "raise",
) -> FileSource:
    """The pairs below a folder; every file is decoded once, so that training dies of none later.

    Args:
      path: the root folder.
      index: JSON or CSV file, absolute or relative to `path`; paths in it are relative to its own
        folder. Default: index.json or index.csv in `path` if there is one, else rgb/ + depth/.
      depth_scale: counts per metre of depth PNGs whose index entry gives none.
      split: "train", "validation", or "" for all. Every `holdout_every`-th pair is held out, in
        index order. Consecutive frames of a video are near-duplicates, so such a hold-out
        measures memory more than depth: there, hold out whole sources by `holdout_sources`.
      filename_list: as FileSource. It moves no pair across the split, so that a list of the whole
        set does for both of its parts.
      min_valid, on_error: as FileSource.

    Raises SourceError; ValueError for arguments that make no sense.
    """
    if depth_scale is not None and files.positive(depth_scale) is None:
        raise ValueError(f"depth_scale must be a positive number, got {depth_scale!r}")
    root = files.require_folder(path)
    if not index:
        index = next((n for n in ("index.json", "index.csv") if (root / n).is_file()), "")
    items, found = (
        _find_pairs(root, depth_scale) if not index else _read_index(root / index, depth_scale)
    )
    # Of files that a list does not ask for it does not matter what is wrong.
    problems = [text for name, text in found if not (name and filename_list)]
    if not items and not found:
        problems.append("no pairs: neither an index nor folders rgb/ and depth/ beside each other")
    everything = items
    if split and items:
        # Before the files are looked at, and before a list narrows them, so that neither a damaged
        # pair nor an unlisted one moves another across the split.
        items = _split(items, split, holdout_every, holdout_sources)
        if not items:
            problems.append(f"split {split!r} is empty")
    if filename_list:
        listed, unknown = files.choose(everything, filename_list, broken=found)
        of_split = {item.name: item for item in items}
        items = [of_split[item.name] for item in listed if item.name in of_split]
        problems += unknown
        if not items and not problems:
            problems.append(f"{filename_list}: it names no pair of split {split!r}")
    return FileSource(
        root,
        items,
        read,
        problems=problems,
        min_valid=min_valid,
        check="content",
        on_error=on_error,
    )


def read(item: Item) -> files.Sample:
    """The pair, whatever is wrong with either file told in one ValueError."""
    depth = functools.partial(read_depth, depth_scale=item.settings["depth_scale"])
    return files.as_sample(**files.gather(item, {"image": image_lib.load, "depth": depth}))


def read_depth(path, depth_scale: float | None = None) -> np.ndarray:
    """Depth map as float32 metres [H, W, 1], 0 where there is none.

    Raises ValueError saying what is wrong with which file.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        depth = files.read_npy(path).squeeze()
        if depth.ndim != 2 or depth.dtype.kind not in "fiu":
            shape = f"{depth.dtype} {list(depth.shape)}"
            raise ValueError(f"{path}: not a depth map: {shape}, expected [H, W]")
        depth = depth.astype(np.float32)[..., None]
    elif depth_scale is None:
        files.read_png_counts(path)  # what is wrong with the file itself comes first
        raise ValueError(f"{path}: no depth_scale: set the counts per metre, 1000 for millimetres")
    else:
        depth = files.read_png_depth(path, depth_scale)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _read_index(path: Path, depth_scale: float | None) -> tuple[list[Item], list[Problem]]:
    """Pairs of an index file, and what is wrong with its entries."""
    try:
        if path.suffix.lower() == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                entries = list(csv.DictReader(file))
        else:
            entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, csv.Error) as error:
        raise SourceError(path, [f"unreadable index: {error}"]) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SourceError(path, ["an index is a list of objects with the fields rgb and depth"])

    pairs, problems = [], []
    for number, entry in enumerate(entries):
        texts = {key: str(entry.get(key) or "") for key in ("rgb", "depth", "source", "name")}
        bad = [f"no field {key!r}" for key in ("rgb", "depth") if not texts[key]]
        bad += [
            f"{key} {text!r} may leave the folder; use a relative path with '/' and without '..'"
            for key, text in texts.items()
            if not files.is_below(text)
        ]
        scale = entry.get("depth_scale")
        if scale in (None, ""):
            scale = depth_scale
        elif (scale := files.positive(scale)) is None:
            bad.append(f"depth_scale {entry['depth_scale']!r} is not a positive number")
        elif scale != 1 and texts["depth"].lower().endswith(".npy"):
            bad.append(
                f"depth_scale {scale:g} is of no use to {texts['depth']}: a .npy holds metres; save"
                " it in metres, and leave depth_scale out"
            )
        if bad:
            problems += [("", f"{path.name}, entry {number}: {text}") for text in bad]
            continue
        source = texts["source"]
        name = texts["name"] or Path(texts["rgb"]).stem
        pairs.append(
            Item(
                name=f"{source}/{name}" if source else name,
                group=source or path.parent.name,
                files={
                    "image": _locate(path.parent, source, texts["rgb"]),
                    "depth": _locate(path.parent, source, texts["depth"]),
                },
                settings={"depth_scale": scale},
            )
        )
    return pairs, problems


def _locate(root: Path, source: str, text: str) -> Path:
    """The file in the folder of its source, or beside it where only that exists."""
    inside, beside = root / source / text, root / text
    return beside if beside.is_file() and not inside.is_file() else inside


def _find_pairs(root: Path, depth_scale: float | None) -> tuple[list[Item], list[Problem]]:
    """Pairs rgb/NAME.* and depth/NAME.* below the root, and files that make no pair."""
    pairs, problems = [], []
    for folder, children in _walk(root):
        children[:] = [name for name in children if not name.startswith(".")]  # such as .Trash
        if not {"rgb", "depth"} <= set(children):
            continue
        source = folder.relative_to(root).as_posix().removeprefix(".")
        subfolders = sorted({*_subfolders(folder / "rgb"), *_subfolders(folder / "depth")})
        for below in subfolders:
            pictures = _by_stem(folder / "rgb" / below, PICTURES)
            depths = _by_stem(folder / "depth" / below, DEPTHS)
            group = "/".join(filter(None, (source, below)))
            for stem in sorted(pictures | depths):
                name = f"{group}/{stem}" if group else stem
                found = [*pictures.get(stem, []), *depths.get(stem, [])]
                wrong = [
                    f"{other}: same name as {first.name}; keep one"
                    for first, *others in (x[stem] for x in (pictures, depths) if stem in x)
                    for other in others
                ]
                if stem not in depths:
                    wanted = folder / "depth" / below / stem
                    wrong.append(f"{found[0]}: missing depth {wanted}.png or .npy")
                if stem not in pictures:
                    wanted = folder / "rgb" / below / stem
                    wrong.append(f"{found[0]}: missing image {wanted}.png or .jpg")
                if wrong:
                    problems += [(name, text) for text in wrong]
                    continue
                pair = dict(zip(("image", "depth"), found, strict=True))
                pairs.append(Item(name, group or root.name, pair, {"depth_scale": depth_scale}))
            if not below and pictures and depths:
                # What lies below pairs is previews, other sizes and the like.
                _tell_unread(folder, [name for name in subfolders if name])
                break
    return pairs, problems


def _tell_unread(folder: Path, subfolders: Sequence[str]) -> None:
    """Warns of folders that seem to hold pairs, and are not read."""
    unread = [
        below
        for below in subfolders
        if _by_stem(folder / "rgb" / below, PICTURES).keys()
        & _by_stem(folder / "depth" / below, DEPTHS).keys()
    ]
    if unread:
        log.warning(
            "%s: pairs lie in rgb/ and depth/ themselves, so those in %d folder(s) below them are"
            " not read: %s. If they should be, move the others to a folder of their own too",
            *(folder, len(unread), ", ".join(unread[:10]) + " ..." * (len(unread) > 10)),
        )


def _by_stem(folder: Path, suffixes: set[str]) -> dict[str, list[Path]]:
    """A folder's files of these suffixes, none where it is not there."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix.lower() in suffixes and not file.name.startswith("."):
            found.setdefault(file.stem, []).append(file)
    return found


def _subfolders(top: Path) -> Iterator[str]:
    """Paths of the folders below rgb/ or depth/ that may hold its files, "" for itself."""
    for folder, children in _walk(top):
        yield folder.relative_to(top).as_posix().removeprefix(".")
        # A folder with both in it is a source of its own; hidden ones hold some program's copies.
        inner = {"rgb", "depth"} <= set(children)
        children[:] = [name for name in children if not (inner or name.startswith("."))]


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder and the folders in it, which the caller may prune; links are followed.

    Links come last, so that what is there without them keeps its name and its place in the order.
    """
    # A link to a folder that holds this one leads back here, and to all that is beside it.
    visited = set(top.resolve().parents)
    starts = [top]
    for start in starts:  # grows
        for path, children, _ in os.walk(start):
            folder = Path(path)
            if (real := folder.resolve()) in visited:
                children.clear()
                continue
            visited.add(real)
            children.sort()
            yield folder, children
            starts += [folder / name for name in children if (folder / name).is_symlink()]


def _split(
    pairs: list[Item], split: str, holdout_every: int, holdout_sources: Sequence[str]
) -> list[Item]:
    """Train or validation part; whole sources are held out if any is named, else every n-th."""
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train', 'validation' or '' for all, got {split!r}")
    groups = sorted({pair.group for pair in pairs})
    if unknown := sorted(set(holdout_sources) - set(groups)):
        raise ValueError(f"holdout_sources names {unknown}; the sources are {groups}")
    if not holdout_sources and holdout_every < 2:
        raise ValueError(f"holdout_every must be at least 2, got {holdout_every}")
    held_out = [
        pair.group in holdout_sources
        if holdout_sources
        else number % holdout_every == holdout_every - 1
        for number, pair in enumerate(pairs)
    ]
    wanted = split == "validation"
    return [pair for pair, held in zip(pairs, held_out, strict=True) if held == wanted]
