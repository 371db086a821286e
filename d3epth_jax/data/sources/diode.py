"""DIODE: laser-scanned rooms and streets, 1024x768 (Vasiljevic et al., arXiv:1908.00463).

From https://diode-dataset.org (MIT licence), val.tar.gz (2.6 GB, 771 pictures: 325 indoors, 446
outdoors) or train.tar.gz (81 GB), unpacked in PATH:
    val/indoors|outdoor/scene_SSSSS/scan_NNNNN/SSSSS_NNNNN_indoors_TTT_PPP.png
    val/indoors|outdoor/scene_SSSSS/scan_NNNNN/SSSSS_NNNNN_indoors_TTT_PPP_depth.npy       metres
    val/indoors|outdoor/scene_SSSSS/scan_NNNNN/SSSSS_NNNNN_indoors_TTT_PPP_depth_mask.npy  1: valid
where PATH may be val itself, as in Marigold's diode_val.tar. Depth is float32 [768,1024,1]; the
mask [768,1024] alone says where it counts, besides that NaN, inf, 0 and less never do.
"""

import re
from pathlib import Path

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.benchmarks import stems
from d3epth_jax.data.sources.files import FileSource, Item

DOMAINS = ("indoors", "outdoor")
ENDS = {"image": ".png", "depth": "_depth.npy", "mask": "_depth_mask.npy"}


def diode(
    path, *, split: str = "val", filename_list: str = "", on_error: str = "raise"
) -> FileSource:
    """DIODE's pictures, named by their path ("indoors/scene_00021/scan_00189/00021_...").

    Args:
      path: the folder that holds val and train, or one of these.
      split: "val" or "train", which `path` may also be the folder of.
      filename_list: names, or lines as in Marigold's diode_val_all_filename_list.txt.
      on_error: as FileSource.

    Groups are "indoors" and "outdoor". Raises SourceError; ValueError for another split, also
    of that of `path`.
    """
    if split not in ("val", "train"):
        raise ValueError(f"split must be 'val' or 'train', got {split!r}")
    root = files.require_folder(path)
    folder = root if any((root / domain).is_dir() for domain in DOMAINS) else root / split
    if folder == root and {root.resolve().name, split} == {"val", "train"}:
        raise ValueError(
            f"{root} is the folder of the other split: set split={root.resolve().name}"
        )
    return FileSource(
        root,
        _items(folder),
        read,
        filename_list=filename_list,
        name_of=_name_of,
        absent=f"no {{indoors,outdoor}}/scene_*/scan_*/NAME.png in {folder}",
        on_error=on_error,
    )


def read(item: Item) -> files.Sample:
    """A picture; ValueError with all that is wrong with its files, by name."""
    parts = files.gather(item, {"image": image_lib.load, "depth": read_npy, "mask": read_npy})
    return files.as_sample(parts["image"], parts["depth"], parts["mask"] > 0)


def read_npy(path: Path) -> np.ndarray:
    """Numbers [H,W] of an .npy of [H,W] or [H,W,1]; ValueError that names the file."""
    array = files.read_npy(path)
    if array.dtype.kind not in "fiub" or array.ndim < 2 or array.shape[2:] not in ((), (1,)):
        raise ValueError(f"{path}: {array.dtype} {list(array.shape)}, expected numbers [H,W,1]")
    return array.reshape(array.shape[:2])


def _items(folder: Path) -> list[Item]:
    """Every picture of which any file is there."""
    items = []
    for domain in DOMAINS:
        for scan in sorted((folder / domain).glob("scene_*/scan_*")):
            arrays = stems(scan, ENDS["depth"]) | stems(scan, ENDS["mask"])
            for stem in sorted(stems(scan, ENDS["image"]) | arrays):
                paths = {kind: scan / f"{stem}{end}" for kind, end in ENDS.items()}
                name = (scan / stem).relative_to(folder).as_posix()
                items.append(Item(name, domain, paths))
    return items


def _name_of(path: str) -> str | None:
    found = re.fullmatch(r"(?:.*/)?((?:indoors|outdoor)/[^/]+/[^/]+/[^/]+)\.png", path)
    return found and found[1]
