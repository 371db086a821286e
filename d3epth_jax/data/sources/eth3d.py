"""ETH3D's high-resolution multi-view training set: 13 scenes, 454 pictures (Schöps et al., 2017).

From https://www.eth3d.net/datasets (CC BY-NC-SA 4.0: no commercial use), the archives
SCENE_dslr_jpg.7z and SCENE_dslr_depth.7z of all 13 scenes, unpacked into one folder PATH:
    SCENE/images/dslr_images/DSC_0001.JPG                6048x4032, not undistorted
    SCENE/ground_truth_depth/dslr_images/DSC_0001.JPG    no JPEG but raw float32, row by row
or Marigold's eth3d.tar, unpacked to PATH:
    rgb/SCENE/images/dslr_images/DSC_0001.JPG
    depth/SCENE_dslr_depth/SCENE/ground_truth_depth/dslr_images/DSC_0001.JPG
z-depth in metres, little-endian; inf: the laser saw nothing there. Depth fits the distorted
pictures only: those of SCENE_dslr_undistorted are not used.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.benchmarks import stems
from d3epth_jax.data.sources.files import FileSource, Item

PICTURES, DEPTHS = "images/dslr_images", "ground_truth_depth/dslr_images"


def eth3d(path, *, filename_list: str = "", on_error: str = "raise") -> FileSource:
    """ETH3D's pictures, named "office/DSC_0219"; a scene is a group.

    Args:
      path: a folder with one of the layouts above.
      filename_list: names or Marigold's eth3d_filename_list.txt; which of both layouts is there
        does not matter.
      on_error: as FileSource.

    Pictures stay as their pixels are stored, whatever EXIF says of the camera's pose, since the
    depth is stored so too. Raises SourceError.
    """
    root = files.require_folder(path)
    return FileSource(
        root,
        _items(root),
        read,
        shape=shape,
        filename_list=filename_list,
        name_of=_name_of,
        absent=f"no {PICTURES}/NAME.JPG in it, in its scenes or in rgb/SCENE",
        on_error=on_error,
    )


def read(item: Item) -> files.Sample:
    """A picture and its depth; ValueError that names a file and says what is wrong with it."""
    picture, depth = item.files["image"], item.files["depth"]
    height, width = shape(item)
    size, wanted = depth.stat().st_size, 4 * height * width
    if size != wanted:
        raise ValueError(
            f"{depth}: {size} bytes, but its picture {picture} has {width}x{height} pixels, of"
            f" which float32 depth is {wanted} bytes"
        )
    try:
        with Image.open(picture) as file:
            image = np.asarray(file.convert("RGB"))
    except image_lib.DAMAGE as error:
        raise ValueError(f"{picture}: damaged or truncated picture: {error}") from error
    return files.as_sample(image, np.fromfile(depth, "<f4").reshape(height, width))


def shape(item: Item) -> tuple[int, int]:
    """(H, W) from the picture's header; the depth has none."""
    path = item.files["image"]
    try:
        with Image.open(path) as file:
            return file.size[::-1]
    except FileNotFoundError:
        raise
    except (*image_lib.DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture that Pillow can read: {error}") from error


def _items(root: Path) -> list[Item]:
    """Every picture and every depth map, with or without the other."""
    packed = (root / "rgb").is_dir() or (root / "depth").is_dir()
    pattern = "depth/*/*/" if packed else "*/"
    folders = [*root.glob(("rgb/*/" if packed else "*/") + PICTURES), *root.glob(pattern + DEPTHS)]
    items = []
    for scene in sorted({folder.parts[-3] for folder in folders}):
        pictures, depths = root / scene / PICTURES, root / scene / DEPTHS
        if packed:
            pictures = root / "rgb" / scene / PICTURES
            depths = root / "depth" / f"{scene}_dslr_depth" / scene / DEPTHS
        for stem in sorted(stems(pictures, ".JPG") | stems(depths, ".JPG")):
            pair = {"image": pictures / f"{stem}.JPG", "depth": depths / f"{stem}.JPG"}
            items.append(Item(f"{scene}/{stem}", scene, pair))
    return items


def _name_of(path: str) -> str | None:
    found = re.fullmatch(rf"(?:.*/)?([^/]+)/{PICTURES}/([^/]+)\.JPG", path)
    return found and f"{found[1]}/{found[2]}"
