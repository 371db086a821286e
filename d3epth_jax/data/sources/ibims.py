"""iBims-1: 100 indoor pictures with laser-scanned depth and depth edges (Koch et al., 2018).

From https://doi.org/10.14459/2018mp1455541 (mediaTUM, whose page states the licence), either of
ibims1_core_raw.zip, in PATH or PATH/ibims1_core_raw:
    rgb/NAME.png             640x480
    depth/NAME.png           uint16, metres = value * 50 / 65535, 0 invalid
    mask_invalid/NAME.png    0: invalid
    mask_transp/NAME.png     0: transparent object
    edges/NAME.png           not 0: depth edge, from which boundary errors are measured
ibims1_core_mat.zip, in PATH or PATH/ibims1_core_mat:
    NAME.mat                 struct `data` with the same fields, depth in metres
NAME is a kind of room and a number, "corridor_01". A pixel counts if depth and both masks say so,
as in the authors' evaluation script.
"""

from pathlib import Path

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.benchmarks import load_mat, stems
from d3epth_jax.data.sources.files import FileSource, Item

KINDS = ("rgb", "depth", "mask_invalid", "mask_transp", "edges")
COUNTS_PER_METRE = 65535 / 50


def ibims(path, *, filename_list: str = "", on_error: str = "raise") -> FileSource:
    """iBims-1's pictures, named "corridor_01"; a kind of room is a group.

    Args:
      path: a folder with one of the layouts above; the first is taken where both are there.
      filename_list: names, one a line, as in the set's imagelist.txt.
      on_error: as FileSource.

    Samples also have "edges", bool [H,W,1]. Raises SourceError.
    """
    root = files.require_folder(path)
    items, read, shape = _png_items(root), read_png, None
    if not items:
        items, read, shape = _mat_items(root), read_mat, mat_shape
    return FileSource(
        root,
        items,
        read,
        shape=shape,
        filename_list=filename_list,
        name_of=_name_of,
        absent="neither rgb/NAME.png nor NAME.mat in it, in ibims1_core_raw or in ibims1_core_mat",
        on_error=on_error,
    )


def read_png(item: Item) -> files.Sample:
    """A picture of the raw layout; ValueError with all that is wrong with its files, by name."""
    readers = dict.fromkeys(KINDS[2:], read_mask)
    return _sample(files.gather(item, {"image": image_lib.load, "depth": read_depth} | readers))


def read_depth(path: Path) -> np.ndarray:
    return files.read_png_depth(path, COUNTS_PER_METRE)


def read_mask(path: Path) -> np.ndarray:
    """Where a picture of 1 or 8 bits is not black, bool [H,W,1]."""
    return image_lib.load(path)[..., :1] > 0


def read_mat(item: Item) -> files.Sample:
    """A picture of the MATLAB layout; ValueError that names the file."""
    path = item.files["image"]
    data = load_mat(path).get("data")
    lacking = [k for k in KINDS if not isinstance(data, dict) or np.ndim(data.get(k)) < 2]
    if lacking:
        raise ValueError(f"{path}: no {', '.join(lacking)} in a struct called data")
    parts = {"image" if kind == "rgb" else kind: data[kind] for kind in KINDS}
    image = parts["image"]
    if image.dtype != np.uint8 or image.shape[2:] != (3,):
        raise ValueError(f"{path}: rgb is {image.dtype} {list(image.shape)}, not uint8 [H,W,3]")
    if different := files.unequal(dict.fromkeys(parts, path), parts):
        raise ValueError(different)
    return _sample(parts | {kind: parts[kind][..., None] > 0 for kind in KINDS[2:]})


def mat_shape(item: Item) -> tuple[int, int]:
    """(H, W); MATLAB files of this kind are compressed, so all of it is read."""
    return read_mat(item)["image"].shape[:2]


def _sample(parts: dict) -> files.Sample:
    valid = parts["mask_invalid"] & parts["mask_transp"]
    return files.as_sample(parts["image"], parts["depth"], valid) | {"edges": parts["edges"]}


def _png_items(root: Path) -> list[Item]:
    """Every picture of which any file is there."""
    for folder in (root, root / "ibims1_core_raw"):
        found = set().union(*(stems(folder / kind, ".png") for kind in KINDS))
        if found:
            paths = {"image" if kind == "rgb" else kind: folder / kind for kind in KINDS}
            return [
                Item(stem, _room(stem), {k: p / f"{stem}.png" for k, p in paths.items()})
                for stem in sorted(found)
            ]
    return []


def _mat_items(root: Path) -> list[Item]:
    for folder in (root, root / "ibims1_core_mat"):
        if found := stems(folder, ".mat"):
            paths = {stem: folder / f"{stem}.mat" for stem in sorted(found)}
            return [Item(s, _room(s), {"image": p, "depth": p}) for s, p in paths.items()]
    return []


def _room(stem: str) -> str:
    return stem.rpartition("_")[0] or stem


def _name_of(path: str) -> str | None:
    return Path(path).stem
