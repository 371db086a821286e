"""Any directory of RGB + depth pairs, checked as a whole before the first step of training.

Layouts: an index (JSON list of objects, or CSV with the same columns), else folders `rgb/` and
`depth/` beside each other at any level, paired by file stem. Index fields:
    rgb, depth    paths relative to the index's folder, or to the folder `source` in it
    source, name  optional: group and name of the pair (default: none, and the picture's stem)
    depth_scale   optional: counts per metre of this depth PNG (default: the argument's)
Depth is 16-bit (or 32-bit integer) PNG, metres = value / depth_scale, or .npy in metres; z-depth.
0, negative, NaN and Inf mean "no depth here"; sparse LiDAR and dense maps alike.
"""

import csv
import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image

from d3epth_jax import image as image_lib

log = logging.getLogger(__name__)

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
DEPTHS = {".png", ".npy"}
PLAUSIBLE_MEDIAN = (0.01, 1000.0)  # metres; outside, the scale is likely wrong
LISTED = 100  # problems printed; `FolderError.problems` has them all


class FolderError(ValueError):
    """Everything wrong with a folder (`.root`) of pairs, in one message; `.problems` lists it."""

    def __init__(self, root, problems: Sequence[str]):
        self.root, self.problems = root, list(problems)
        listed = "".join(f"\n  {problem}" for problem in self.problems[:LISTED])
        hidden = len(self.problems) - LISTED
        more = f"\n  and {hidden} more (see .problems)" if hidden > 0 else ""
        super().__init__(f"{root}: {len(self.problems)} problem(s) with the pairs:{listed}{more}")


@dataclass(frozen=True)
class Pair:
    group: str
    name: str
    rgb: Path
    depth: Path
    depth_scale: float | None  # counts per metre; .npy needs none


def read_depth(path, depth_scale: float | None = None) -> np.ndarray:
    """Depth map as float32 metres [H, W, 1], 0 where there is none.

    Raises ValueError saying what is wrong with the file, without its name.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        try:
            depth = np.load(path, allow_pickle=False).squeeze()
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"unreadable .npy: {error}") from error
        if depth.ndim != 2 or depth.dtype.kind not in "fiu":
            raise ValueError(f"not a depth map: {depth.dtype} {list(depth.shape)}, expected [H, W]")
        depth = depth.astype(np.float32)
    else:
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"unreadable: {error}") from error
        if not picture.mode.startswith("I"):
            raise ValueError(
                f"Pillow mode {picture.mode!r}, not 16-bit or 32-bit integer: a depth PNG of "
                "8 bits or with colours is a visualisation, not depth"
            )
        if depth_scale is None:
            raise ValueError("no depth_scale: give counts per metre (1000 for millimetres)")
        depth = np.asarray(picture).astype(np.float32) / np.float32(depth_scale)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))[..., None]


def _check(pair: Pair, min_valid: int) -> tuple[tuple[int, int] | None, list[str]]:
    """The pair's (H, W) and what is wrong with it. Decodes both files: damage hides in the body."""
    problems, shape, depth = [], None, None
    if not pair.rgb.is_file():
        problems.append(f"{pair.rgb}: missing picture")
    else:
        try:
            shape = image_lib.load(pair.rgb).shape[:2]
        except (OSError, image_lib.ImageError) as error:
            problems.append(str(error))
    if not pair.depth.is_file():
        problems.append(f"{pair.depth}: missing depth")
    else:
        try:
            depth = read_depth(pair.depth, pair.depth_scale)
        except ValueError as error:
            problems.append(f"{pair.depth}: {error}")
    if depth is None:
        return shape, problems

    if shape is not None and depth.shape[:2] != shape:
        sizes = [f"{width}x{height}" for height, width in (shape, depth.shape[:2])]
        problems.append(f"{pair.rgb}: picture is {sizes[0]} but its depth {pair.depth} {sizes[1]}")
    known = depth[depth > 0]
    if known.size < max(min_valid, 1):
        problems.append(
            f"{pair.depth}: {known.size or 'no'} valid pixel(s), {max(min_valid, 1)} are needed"
        )
    elif not PLAUSIBLE_MEDIAN[0] <= (median := float(np.median(known))) <= PLAUSIBLE_MEDIAN[1]:
        unit = "the .npy is probably not in metres"
        if pair.depth.suffix.lower() != ".npy":
            unit = f"depth_scale {pair.depth_scale:g} is probably wrong"
        problems.append(f"{pair.depth}: median depth {median:g} m is implausible; {unit}")
    return shape, problems


def _is_below(text: str) -> bool:
    """Whether a name from outside stays below the folder it is joined to, on any system."""
    path = Path(text)
    drive = PureWindowsPath(text).drive
    return not (path.is_absolute() or ".." in path.parts or "\\" in text or drive)


def _positive(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _read_index(path: Path, depth_scale: float | None) -> tuple[list[Pair], list[str]]:
    """Pairs of an index file, and what is wrong with its entries."""
    try:
        if path.suffix.lower() == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                entries = list(csv.DictReader(file))
        else:
            entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, csv.Error) as error:
        raise FolderError(path, [f"unreadable index: {error}"]) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FolderError(path, ["an index is a list of objects with the fields rgb and depth"])

    pairs, problems = [], []
    for number, entry in enumerate(entries):
        texts = {key: str(entry.get(key) or "") for key in ("rgb", "depth", "source", "name")}
        bad = [f"no field {key!r}" for key in ("rgb", "depth") if not texts[key]]
        bad += [
            f"{key} {text!r} may leave the folder; use a relative path with '/' and without '..'"
            for key, text in texts.items()
            if not _is_below(text)
        ]
        scale = entry.get("depth_scale")
        if scale in (None, ""):
            scale = depth_scale
        elif (scale := _positive(scale)) is None:
            bad.append(f"depth_scale {entry['depth_scale']!r} is not a positive number")
        if bad:
            problems += [f"{path.name}, entry {number}: {text}" for text in bad]
            continue
        source = texts["source"]
        name = texts["name"] or Path(texts["rgb"]).stem
        pairs.append(
            Pair(
                group=source or path.parent.name,
                name=f"{source}/{name}" if source else name,
                rgb=_locate(path.parent, source, texts["rgb"]),
                depth=_locate(path.parent, source, texts["depth"]),
                depth_scale=scale,
            )
        )
    return pairs, problems


def _locate(root: Path, source: str, text: str) -> Path:
    """The file in the folder of its source, or beside it where only that exists."""
    inside, beside = root / source / text, root / text
    return beside if beside.is_file() and not inside.is_file() else inside


def _find_pairs(root: Path, depth_scale: float | None) -> tuple[list[Pair], list[str]]:
    """Pairs rgb/NAME.* and depth/NAME.* below the root, and the files without a partner."""
    pairs, problems = [], []
    for folder, children, _ in os.walk(root):
        children.sort()
        folder = Path(folder)
        if not {"rgb", "depth"} <= set(children):
            continue
        found = []
        for kind, suffixes in (("rgb", PICTURES), ("depth", DEPTHS)):
            files: dict[str, Path] = {}
            for file in sorted((folder / kind).iterdir()):
                if file.suffix.lower() not in suffixes or file.name.startswith("."):
                    continue
                if file.stem in files:
                    problems.append(f"{file}: same name as {files[file.stem].name}; keep one")
                files[file.stem] = file
            found.append(files)
        pictures, depths = found
        source = folder.relative_to(root).as_posix().removeprefix(".")
        for stem in sorted(pictures | depths):
            if stem not in depths:
                wanted = folder / "depth" / stem
                problems.append(f"{pictures[stem]}: missing depth {wanted}.png or .npy")
            elif stem not in pictures:
                wanted = folder / "rgb" / stem
                problems.append(f"{depths[stem]}: missing picture {wanted}.png or .jpg")
            else:
                group, name = source or root.name, f"{source}/{stem}" if source else stem
                pairs.append(Pair(group, name, pictures[stem], depths[stem], depth_scale))
    return pairs, problems


def _unique(pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """The first pair of each name, and the later ones as problems: names name output files."""
    by_name: dict[str, Pair] = {}
    problems = []
    for pair in pairs:
        if by_name.setdefault(pair.name, pair) is not pair:
            problems.append(
                f"{pair.rgb}: {pair.name!r} is already the name of {by_name[pair.name].rgb}"
            )
    return list(by_name.values()), problems


def _choose(pairs: list[Pair], filename_list) -> tuple[list[Pair], list[str]]:
    """The pairs a list names, in its order, and the names it gives in vain."""
    names = [line.strip() for line in Path(filename_list).read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name]
    by_name = {pair.name: pair for pair in pairs}
    problems = [f"{filename_list}: no pair is called {n!r}" for n in names if n not in by_name]
    return [by_name[name] for name in names if name in by_name], problems


def _split(
    pairs: list[Pair], split: str, holdout_every: int, holdout_sources: Sequence[str]
) -> list[Pair]:
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


class FolderSource:
    """Random access to RGB + depth pairs: image uint8 [H,W,3], depth metres f32 [H,W,1], mask bool.

    Args:
      path: the root folder.
      index: JSON or CSV file, absolute or relative to `path`; paths in it are relative to its own
        folder. Default: index.json or index.csv in `path` if there is one, else rgb/ + depth/.
      depth_scale: counts per metre of depth PNGs whose index entry gives none.
      split: "train", "validation", or "" for all. Every `holdout_every`-th pair is held out, in
        index order. Consecutive frames of a video are near-duplicates, so such a hold-out
        measures memory more than depth: there, hold out whole sources by `holdout_sources`.
      filename_list: text file of names as `.name(i)` gives them, one a line: only these.
      min_valid: a depth map with fewer known pixels is a problem.
      on_error: "raise" lists every problem in one FolderError; "skip" drops such pairs, and logs
        them by name. Both read every file once, here, so that training does not die of one later.

    Raises FolderError; ValueError for arguments that make no sense.
    """

    def __init__(
        self,
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
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if depth_scale is not None and _positive(depth_scale) is None:
            raise ValueError(f"depth_scale must be a positive number, got {depth_scale!r}")
        root = Path(path)
        if not root.is_dir():
            raise FolderError(root, ["no such folder"])
        if not index:
            index = next((n for n in ("index.json", "index.csv") if (root / n).is_file()), "")
        pairs, problems = (
            _find_pairs(root, depth_scale) if not index else _read_index(root / index, depth_scale)
        )
        pairs, repeated = _unique(pairs)
        problems += repeated
        if not pairs and not problems:
            problems.append(
                "no pairs: neither an index nor folders rgb/ and depth/ beside each other"
            )
        if filename_list:
            pairs, unknown = _choose(pairs, filename_list)
            problems += unknown
        # Before the files are looked at, so that a damaged one moves no other across the split.
        if split and pairs:
            pairs = _split(pairs, split, holdout_every, holdout_sources)
            if not pairs:
                problems.append(f"split {split!r} is empty")

        with ThreadPoolExecutor() as pool:
            checked = list(pool.map(lambda pair: _check(pair, min_valid), pairs))
        self._pairs = [pair for pair, (_, bad) in zip(pairs, checked, strict=True) if not bad]
        self._shapes = [shape for shape, bad in checked if not bad]
        problems += [problem for _, bad in checked for problem in bad]
        if problems and (on_error == "raise" or not self._pairs):
            raise FolderError(root, problems)
        if problems:
            dropped = len(pairs) - len(self._pairs)
            log.warning(
                "%s: %d of %d pairs skipped, %d problem(s):\n  %s",
                root,
                dropped,
                len(pairs),
                len(problems),
                "\n  ".join(problems),
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, i) -> dict[str, np.ndarray]:
        pair = self._pairs[i]
        depth = read_depth(pair.depth, pair.depth_scale)
        return {"image": image_lib.load(pair.rgb), "depth": depth, "mask": depth > 0}

    def name(self, i) -> str:
        """Unique name, "source/00010"; safe as a relative path."""
        return self._pairs[i].name

    def group(self, i) -> str:
        """Where the pair comes from: the index's `source`, or the folder; for means per source."""
        return self._pairs[i].group

    def shape(self, i) -> tuple[int, int]:
        """(H, W) without reading the file."""
        return self._shapes[i]
