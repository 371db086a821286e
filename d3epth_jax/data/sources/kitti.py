"""KITTI: drives with annotated, semi-dense LiDAR depth (Geiger et al., 2013; Uhrig et al., 2017).

From https://www.cvlibs.net/datasets/kitti (registration; CC BY-NC-SA 3.0: no commercial use), the
raw data, synced and rectified, in PATH, PATH/raw_data or PATH/raw:
    2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png
and data_depth_annotated.zip, in PATH, PATH/data_depth_annotated or the folder `depth_path`:
    train|val/2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png
z-depth, uint16, metres = value / 256, 0 invalid. Marigold's kitti_eigen_split_test.tar, unpacked to
PATH, has the same without train|val.

Which frames are the Eigen test split is the user's to give (`eigen_list`), for instance BTS's and
Marigold's eigen_test_files_with_gt.txt: 697 lines "PICTURE DEPTH FOCAL_LENGTH", of which 45 have no
depth ("None"), so that 652 frames count.
"""

import functools
import logging
import re
from pathlib import Path

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.benchmarks import first_existing
from d3epth_jax.data.sources.files import FileSource, Item

log = logging.getLogger(__name__)

RAW_FOLDERS = ("", "raw_data", "raw")
DEPTH_FOLDERS = ("", "data_depth_annotated")
PARTS = ("train", "val")
SPLITS = ("eigen", *PARTS)
COUNTS_PER_METRE = 256.0
CROP = (352, 1216)  # the depth benchmark's, which fits into the pictures of all drives
PICTURE = re.compile(r"(\d{4}_\d\d_\d\d)/(\1_drive_\d{4}_sync)/(image_0[23])/data/(\d{10})\.png")


def kitti(
    path,
    *,
    split: str = "eigen",
    eigen_list: str = "",
    depth_path: str = "",
    benchmark_crop: bool = True,
    filename_list: str = "",
    on_error: str = "raise",
) -> FileSource:
    """KITTI's frames, named "2011_09_26_drive_0002_sync/image_02/0000000069"; a drive is a group.

    Args:
      path: a folder that holds the raw data, as above.
      split: "eigen", the lines of `eigen_list`; "train" or "val", every annotated frame of it.
      eigen_list: text file of lines "PICTURE DEPTH ...", relative to the folders above.
      depth_path: the folder of the annotated depth, if it is not in `path`.
      benchmark_crop: keep the lowest 352 rows and 1216 columns from (W - 1216) // 2 on (METHOD 10).
      filename_list: names, or lines that start with a picture as in `eigen_list`.
      on_error: as FileSource.

    Raises SourceError; ValueError for arguments that make no sense.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if (split == "eigen") != bool(eigen_list):
        raise ValueError(
            "split 'eigen' needs eigen_list, a file of lines 'PICTURE DEPTH ...'; others take none"
        )
    root = files.require_folder(path)
    depths = [files.require_folder(depth_path or path) / folder for folder in DEPTH_FOLDERS]
    if split == "eigen":
        items, problems = _listed(root, depths, Path(eigen_list))
    else:
        items, problems = _annotated(root, [folder / split for folder in depths]), []
    looked = eigen_list or " or ".join(str(folder / split) for folder in depths)
    return FileSource(
        root,
        items,
        functools.partial(read, benchmark_crop=benchmark_crop),
        shape=CROP if benchmark_crop else None,
        filename_list=filename_list,
        name_of=_name_of,
        problems=problems,
        absent=f"no frame with depth in {looked}",
        on_error=on_error,
    )


def read(item: Item, *, benchmark_crop: bool = True) -> files.Sample:
    """A frame; ValueError with all that is wrong with its files, by name."""
    parts = files.gather(item, {"image": image_lib.load, "depth": read_depth})
    if benchmark_crop:
        window = crop_window(*parts["image"].shape[:2], item.files["image"])
        parts = {kind: np.ascontiguousarray(part[window]) for kind, part in parts.items()}
    return files.as_sample(**parts)


def read_depth(path: Path) -> np.ndarray:
    return files.read_png_depth(path, COUNTS_PER_METRE)


def crop_window(height: int, width: int, path: Path) -> tuple[slice, slice]:
    """Rows and columns of the benchmark's crop; ValueError if the picture is smaller."""
    top, left = height - CROP[0], (width - CROP[1]) // 2
    if min(top, left) < 0:
        raise ValueError(f"{path}: {width}x{height} is smaller than the crop {CROP[1]}x{CROP[0]}")
    return slice(top, top + CROP[0]), slice(left, left + CROP[1])


def _listed(root: Path, depths: list[Path], eigen_list: Path) -> tuple[list[Item], list[str]]:
    """The list's frames that have depth, whether their files exist or not, and its bad lines."""
    try:
        lines = files.numbered_lines(eigen_list)
    except ValueError as error:
        return [], [str(error)]
    items, problems, without = [], [], 0
    for number, line in lines:
        picture, depth = [*line.split(), ""][:2]
        if not PICTURE.fullmatch(picture) or not depth or not files.is_below(depth):
            problems.append(
                f"{eigen_list}, line {number}: {line!r} is not 'DATE/DRIVE/image_02/data/NUMBER.png"
                " DEPTH ...', both relative and without '..'"
            )
        elif depth == "None":
            without += 1
        else:
            drive, _, rest = depth.partition("/")
            drives = [folder / part / drive for folder in depths for part in (*PARTS, "")]
            items.append(_item(root, picture, first_existing(drives) / rest))
    if without:
        log.info("%s: %d of its frames have no depth and are left out", eigen_list, without)
    return items, problems


def _annotated(root: Path, folders: list[Path]) -> list[Item]:
    """Every frame that has annotated depth, whether its picture exists or not."""
    items = []
    for folder in folders:
        for depth in sorted(folder.glob("*/proj_depth/groundtruth/image_0[23]/[!.]*.png")):
            drive, camera = depth.parts[-5], depth.parts[-2]
            picture = f"{drive[:10]}/{drive}/{camera}/data/{depth.name}"
            if PICTURE.fullmatch(picture):
                items.append(_item(root, picture, depth))
    return items


def _item(root: Path, picture: str, depth: Path) -> Item:
    date, drive, rest = picture.split("/", maxsplit=2)
    image = first_existing(root / folder / date / drive for folder in RAW_FOLDERS) / rest
    return Item(_name_of(picture), drive, {"image": image, "depth": depth})


def _name_of(path: str) -> str | None:
    found = PICTURE.fullmatch(path)
    return found and f"{found[2]}/{found[3]}/{found[4]}"
