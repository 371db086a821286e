"""What every source of files is: a list of items, checked as a whole, and a way to read one.

A source module lists the items of its public layout and says how one is read; the rest is here.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from d3epth_jax import image as image_lib

log = logging.getLogger(__name__)

Sample = dict[str, np.ndarray]

PLAUSIBLE_MEDIAN = (0.01, 1000.0)  # metres; outside, the unit is likely wrong
LISTED = 100  # problems printed; `SourceError.problems` has them all


class SourceError(ValueError):
    """Everything wrong with a source (`.root`), in one message; `.problems` lists it."""

    def __init__(self, root, problems: Sequence[str]):
        self.root, self.problems = root, list(problems)
        super().__init__(f"{root}: {told(self.problems)}")


def told(problems: Sequence[str]) -> str:
    """How many there are, and the first of them line by line."""
    listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
    hidden = len(problems) - LISTED
    more = f"\n  and {hidden} more (`d3epth data check` lists all)" if hidden > 0 else ""
    return f"{len(problems)} problem(s):{listed}{more}"


@dataclass(frozen=True)
class Item:
    """One sample, not yet read.

    Attributes:
      name: unique in its source, safe as a relative path ("ai_001_001/cam_00/0000").
      group: what means are taken over, and what is held out as a whole: scene, city, sensor.
      files: all that must exist, by what they hold: "image", "depth", and others.
      settings: what `read` needs besides, such as {"depth_scale": 1000.0}.
    """

    name: str
    group: str
    files: Mapping[str, Path]
    settings: Mapping[str, Any] = field(default_factory=dict)


class FileSource:
    """Random access to samples: image uint8 [H,W,3], depth metres f32 [H,W,1], mask bool [H,W,1].

    Args:
      root: the data set's folder.
      items: its samples, in a fixed order.
      read: item -> sample; a function that workers can unpickle. It raises OSError or ValueError
        saying what is wrong with which file. 0 is the depth where the mask is False.
      shape: (H, W) of every sample, or item -> (H, W) without reading all of it; None: the
        picture's.
      filename_list: text file of item names or of lines as in published lists: only these, in its
        order (`choose`).
      name_of: a picture's path in a published list -> item name, None if it is no such path.
      problems: what was found wrong while the items were listed.
      absent: the problem where there is no item.
      min_valid: a depth map with fewer known pixels is a problem.
      check: "names" looks whether the files exist, "content" also decodes every sample (`check`).
      on_error: "raise" lists every problem in one SourceError; "skip" drops such items, logs them,
        and keeps them in `.problems`.

    Raises SourceError.
    """

    def __init__(
        self,
        root,
        items: Iterable[Item],
        read: Callable[[Item], Sample],
        *,
        shape: tuple[int, int] | Callable[[Item], tuple[int, int]] | None = None,
        filename_list: str = "",
        name_of: Callable[[str], str | None] | None = None,
        problems: Sequence[str] = (),
        absent: str = "no sample found in it",
        min_valid: int = 16,
        check: str = "names",
        on_error: str = "raise",
    ):
        for name, value, known in (
            ("check", check, ("names", "content")),
            ("on_error", on_error, ("raise", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {value!r}")
        self.root = Path(root)
        self._read, self._shape, self._min_valid = read, shape, min_valid
        items, repeated = _unique(items)
        problems = [*problems, *repeated]
        if filename_list and items:
            items, unknown = choose(items, filename_list, name_of)
            problems += unknown
        if not items and not problems:
            problems.append(absent)
        found = {
            "names": lambda: [_missing(item) for item in items],
            "content": lambda: _in_threads(self._problems, items),
        }[check]()
        self._items = [item for item, bad in zip(items, found, strict=True) if not bad]
        problems += [problem for bad in found for problem in bad]
        # One file may be missing to many items, such as a camera's parameters.
        problems = list(dict.fromkeys(problems))
        if problems and (on_error == "raise" or not self._items):
            raise SourceError(root, problems)
        if problems:
            skipped = f"{len(items) - len(self._items)} of {len(items)} samples skipped"
            log.warning("%s: %s, %s", root, skipped, told(problems))
        self.problems = problems

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i) -> Sample:
        item = self._items[i]
        sample = self._read(item)
        if different := unequal(item.files, {k: sample[k] for k in ("image", "depth")}):
            raise ValueError(different)
        return sample

    def name(self, i) -> str:
        """Unique name, "source/00010"; safe as a relative path."""
        return self._items[i].name

    def group(self, i) -> str:
        """Where the sample comes from, for means per source."""
        return self._items[i].group

    def files(self, i) -> Mapping[str, Path]:
        return self._items[i].files

    def shape(self, i) -> tuple[int, int]:
        """(H, W) of the sample, without reading all of it."""
        item = self._items[i]
        if self._shape is None:
            return image_lib.upright_size(item.files["image"])
        return self._shape(item) if callable(self._shape) else self._shape

    def check(self, i) -> list[str]:
        """What is wrong with the sample's content; it is read in full: damage hides in the body."""
        return self._problems(self._items[i])

    def judge(self, i, sample: Sample) -> list[str]:
        """What is wrong with the content of sample i, once read: `check` without reading."""
        return implausible(sample, self._items[i], self._min_valid)

    def _problems(self, item: Item) -> list[str]:
        if missing := _missing(item):
            return missing
        try:
            return implausible(self._read(item), item, self._min_valid)
        except (OSError, ValueError) as error:
            return str(error).splitlines()


def implausible(sample: Sample, item: Item, min_valid: int) -> list[str]:
    """What a sample that could be read still shows to be wrong."""
    where = item.files["depth"]
    different = unequal(item.files, {kind: sample[kind] for kind in ("image", "depth")})
    problems = [different] if different else []
    record = item.settings.get("record")
    told = where if record is None else f"{where}, record {record}"
    known = sample["depth"][sample["mask"]]
    if known.size < max(min_valid, 1):
        problems.append(
            f"{told}: {known.size or 'no'} valid pixel(s), {max(min_valid, 1)} are needed"
        )
    elif not PLAUSIBLE_MEDIAN[0] <= (median := float(np.median(known))) <= PLAUSIBLE_MEDIAN[1]:
        unit = "its unit is probably another"
        if where.suffix.lower() == ".npy":
            unit = "the .npy is probably not in metres"
        elif "depth_scale" in item.settings:
            unit = f"depth_scale {item.settings['depth_scale']:g} is probably wrong"
        problems.append(f"{told}: median depth {median:g} m is implausible; {unit}")
    return problems


def gather(item: Item, readers: Mapping[str, Callable[[Path], np.ndarray]]) -> dict:
    """{kind: what its reader makes of the item's file}, all of the picture's height and width.

    Raises ValueError with everything that is wrong with any of the files.
    """
    arrays, problems = {}, []
    for kind, reader in readers.items():
        try:
            arrays[kind] = reader(item.files[kind])
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if not problems and (different := unequal(item.files, arrays)):
        problems.append(different)
    if problems:
        raise ValueError("\n".join(problems))
    return arrays


def unequal(paths: Mapping[str, Path], arrays: Mapping[str, np.ndarray]) -> str:
    """What to say of arrays that have not the height and width of "image"; "" if all have."""
    sizes = {kind: f"{array.shape[1]}x{array.shape[0]}" for kind, array in arrays.items()}
    size = sizes["image"]
    others = [f"its {kind} {paths[kind]} {s}" for kind, s in sizes.items() if s != size]
    return f"{paths['image']}: picture is {size} but {', '.join(others)}" if others else ""


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy, which is never unpickled; ValueError that names an unreadable file."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: unreadable .npy: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path}: unreadable .npy: it is an .npz, an archive of arrays")
    return array


def read_png_depth(path: Path, depth_scale: float) -> np.ndarray:
    """Depth [H,W,1] in metres, float32, of a 16-bit (or 32-bit integer) PNG; 0 stays 0.

    depth_scale: counts per metre. Raises ValueError that names the file.
    """
    return (read_png_counts(path).astype(np.float32) / np.float32(depth_scale))[..., None]


def read_png_counts(path: Path) -> np.ndarray:
    """The integers [H,W] of a 16-bit or 32-bit PNG. Raises ValueError that names the file."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: unreadable: {error}") from error
    if not picture.mode.startswith("I"):
        raise ValueError(
            f"{path}: Pillow mode {picture.mode!r}, not 16-bit or 32-bit integer: a depth PNG of"
            " 8 bits or with colours is a visualisation, not depth"
        )
    return np.asarray(picture)


def as_sample(image: np.ndarray, depth: np.ndarray, mask: np.ndarray | None = None) -> Sample:
    """{image, depth, mask} from a picture and metres; unknown: not finite, not positive, masked."""
    depth = np.asarray(depth, np.float32).reshape(*depth.shape[:2], 1)
    known = np.isfinite(depth) & (depth > 0)
    if mask is not None:
        known &= mask.reshape(known.shape)
    return {"image": image, "depth": np.where(known, depth, np.float32(0)), "mask": known}


def is_below(text: str) -> bool:
    """Whether a name from outside stays below the folder it is joined to, on any system."""
    path = Path(text)
    drive = PureWindowsPath(text).drive
    return not (path.is_absolute() or ".." in path.parts or "\\" in text or drive)


def positive(text) -> float | None:
    """A finite positive number, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def require_folder(path) -> Path:
    """The folder as a Path; SourceError if there is none."""
    root = Path(path)
    if not root.is_dir():
        raise SourceError(root, ["no such folder"])
    return root


def _missing(item: Item) -> list[str]:
    return [f"{path}: missing {kind}" for kind, path in item.files.items() if not path.is_file()]


def _in_threads(function, items: Sequence[Item]) -> list:
    with ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 4)) as pool:
        return list(pool.map(function, items))


def _unique(items: Iterable[Item]) -> tuple[list[Item], list[str]]:
    """The first item of each name; the later ones, and names no list can hold, are problems.

    Names name output files and are written to tables.
    """
    by_name: dict[str, Item] = {}
    problems = []
    for item in items:
        # A line break, or bytes that are no UTF-8 (lone surrogates).
        if re.search("[\n\r\ud800-\udfff]", item.name):
            problems.append(f"{item.name!r}: such a name cannot be written to a list: rename it")
            continue
        if (first := by_name.setdefault(item.name, item)) is not item:
            problems.append(
                f"{item.files['image']}: {item.name!r} is already the name of"
                f" {first.files['image']}: rename one (in an index by `name` or `source`)"
            )
    return list(by_name.values()), problems


Problem = tuple[str, str]  # of which sample, "" where that is not known, and what


def choose(
    items: list[Item],
    filename_list,
    name_of: Callable[[str], str | None] | None = None,
    broken: Sequence[Problem] = (),
) -> tuple[list[Item], list[str]]:
    """The items a list names, in its order and once each, and what it names in vain.

    broken: what is wrong with files that are no items, told of those that the list names.

    A line is an item's name, or with `name_of` the path of its picture and what else the published
    lists have ("rgb depth ..."). Such a line whose depth is "None", as in KITTI's, is passed over.
    """
    try:
        lines = numbered_lines(filename_list)
    except ValueError as error:
        return [], [str(error)]
    known = {item.name: item for item in items}
    chosen, problems = {}, []
    for number, line in lines:
        name = wanted = line
        if name_of and line not in known:
            wanted, *others = line.split()
            if others[:1] == ["None"]:
                continue
            name = wanted if wanted in known else name_of(wanted)
        if name in known:
            chosen[name] = known[name]
        else:
            problems.append(f"{filename_list}, line {number}: no sample is called {wanted!r}")
            problems += [text for of, text in broken if of == name]
    if not chosen and not problems:
        problems.append(f"{filename_list}: it names no sample")
    return list(chosen.values()), problems


def numbered_lines(path) -> list[tuple[int, str]]:
    """(number, stripped line) of a text file's lines that are not empty; ValueError names it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable list of names in UTF-8: {error}") from error
    lines = enumerate(text.splitlines(), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]
