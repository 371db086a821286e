"""ScanNet: RGB-D video of 1513 indoor scans (Dai et al., CVPR 2017).

From http://www.scan-net.org (an agreement to sign; no commercial use), as exported from the .sens
files by ScanNet's SensReader/python/reader.py --export_color_images --export_depth_images:
    sceneXXXX_XX/color/0.jpg    1296x968
    sceneXXXX_XX/depth/0.png    640x480, uint16 millimetres, 0 invalid
or as in scannet_frames_25k.zip, every 100th frame, and in Marigold's scannet_val_sampled_800_1.tar:
    sceneXXXX_XX/color/000300.jpg
    sceneXXXX_XX/depth/000300.png
in PATH, PATH/scans, PATH/scannet_frames_25k or PATH/tasks/scannet_frames_25k. Larger pictures are
brought to the depth's size, at which evaluation takes place; Marigold's already have it.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.benchmarks import stems
from d3epth_jax.data.sources.files import FileSource, Item

FOLDERS = ("", "scans", "scannet_frames_25k", "tasks/scannet_frames_25k")
COUNTS_PER_METRE = 1000.0
SAME_VIEW = 0.02  # by which the ratios of sides may differ: 1296:968 and 640:480 do by 0.4 %


def scannet(path, *, filename_list: str = "", on_error: str = "raise") -> FileSource:
    """ScanNet's frames, named "scene0406_02/000300" in either layout; a scan is a group.

    Args:
      path: a folder that holds the scans.
      filename_list: names, or lines as in Marigold's scannet_val_sampled_list_800_1.txt, the 800
        frames that papers evaluate on. Without one, all frames.
      on_error: as FileSource.

    Raises SourceError.
    """
    root = files.require_folder(path)
    return FileSource(
        root,
        _items(root),
        read,
        shape=shape,
        filename_list=filename_list,
        name_of=_name_of,
        absent="no sceneXXXX_XX/color/NUMBER.jpg in it, nor in " + ", ".join(FOLDERS[1:]),
        on_error=on_error,
    )


def read(item: Item) -> files.Sample:
    """A frame at its depth's size; ValueError that names a file and says what is wrong with it."""
    image = image_lib.load(item.files["image"])
    depth = files.read_png_depth(item.files["depth"], COUNTS_PER_METRE)
    height, width = depth.shape[:2]
    # Sides that are not in proportion are those of another picture, and FileSource says so.
    if abs(image.shape[1] * height / (image.shape[0] * width) - 1) < SAME_VIEW:
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        image = np.asarray(small)
    return files.as_sample(image, depth)


def shape(item: Item) -> tuple[int, int]:
    """(H, W) of the depth, from its header."""
    return image_lib.upright_size(item.files["depth"])


def _items(root: Path) -> list[Item]:
    """Every colour and every depth image, with or without the other."""
    items = []
    for folder in FOLDERS:
        for scan in sorted((root / folder).glob("scene????_??")):
            color, depth = scan / "color", scan / "depth"
            for stem in sorted(stems(color, ".jpg") | stems(depth, ".png")):
                if stem.isascii() and stem.isdigit():
                    pair = {"image": color / f"{stem}.jpg", "depth": depth / f"{stem}.png"}
                    items.append(Item(f"{scan.name}/{int(stem):06d}", scan.name, pair))
    return sorted(items, key=lambda item: item.name)


def _name_of(path: str) -> str | None:
    found = re.fullmatch(r"(?:.*/)?(scene\d{4}_\d\d)/color/(\d+)\.jpg", path)
    return found and f"{found[1]}/{int(found[2]):06d}"
