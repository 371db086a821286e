"""Virtual KITTI 2: five rendered drives, 1242x375 (Cabon, Murray, Humenberger, arXiv:2001.10773).

From https://europe.naverlabs.com/proxy-virtual-worlds-vkitti-2 (registration; CC BY-NC-SA 3.0: no
commercial use), vkitti_2.0.3_rgb.tar and vkitti_2.0.3_depth.tar, unpacked into one folder PATH:
    SceneNN/VARIATION/frames/rgb/Camera_C/rgb_IIIII.jpg
    SceneNN/VARIATION/frames/depth/Camera_C/depth_IIIII.png    z-depth, uint16 centimetres
or each into its own: PATH/vkitti_2.0.3_rgb and PATH/vkitti_2.0.3_depth, or, as Marigold has them,
PATH/rgb and PATH/depth. The sky is 65535 and invalid.

By default this is what Marigold's lists name: 20,148 frames to train on (scenes 02, 06, 18 and 20)
and 5,364 to validate (scene 01), from both cameras in six of the ten variations: without fog, rain
and the turns by 30 degrees.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.files import FileSource, Item, SourceError

FRAMES = {"Scene01": 447, "Scene02": 233, "Scene06": 270, "Scene18": 339, "Scene20": 837}
SPLITS = {
    "train": ("Scene02", "Scene06", "Scene18", "Scene20"),
    "validation": ("Scene01",),
    "": tuple(FRAMES),
}
VARIATIONS = ("clone", "morning", "overcast", "sunset", "15-deg-left", "15-deg-right")
OTHERS = ("fog", "rain", "30-deg-left", "30-deg-right")
CAMERAS = ("Camera_0", "Camera_1")
FOLDERS = (("", ""), ("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth"), ("rgb", "depth"))
SKY = 65535
COUNTS_PER_METRE = 100.0


def vkitti2(
    path,
    *,
    split: str = "train",
    scenes: Sequence[str] = (),
    variations: Sequence[str] = VARIATIONS,
    cameras: Sequence[str] = CAMERAS,
    filename_list: str = "",
    on_error: str = "raise",
) -> FileSource:
    """Virtual KITTI 2's frames, named "Scene02/clone/Camera_0/00000"; a scene is a group.

    Args:
      path: a folder with one of the layouts above. Every frame the set has is expected there.
      split: "train", "validation", or "" for all five scenes.
      scenes: of the split's scenes, only these; () all.
      variations, cameras: which; the defaults are Marigold's.
      filename_list: names, or lines as in Marigold's vkitti_train.txt, for any of the layouts
        ("rgb/Scene02/clone/frames/rgb/Camera_0/rgb_00000.jpg ...").
      on_error: as FileSource.

    Raises SourceError; ValueError for arguments that make no sense.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train', 'validation' or '' for all, got {split!r}")
    for name, values, known in (
        ("scenes", scenes, SPLITS[split]),
        ("variations", variations, VARIATIONS + OTHERS),
        ("cameras", cameras, CAMERAS),
    ):
        if unknown := [value for value in values if value not in known]:
            where = f" of split {split!r}" if name == "scenes" and split else ""
            raise ValueError(f"{name} names {unknown}; those{where} are {list(known)}")
    root = files.require_folder(path)
    rgb, depth = _find_folders(root)
    items = [
        _item(rgb, depth, f"{scene}/{variation}", camera, frame)
        for scene in scenes or SPLITS[split]
        for variation in variations
        for camera in cameras
        for frame in range(FRAMES[scene])
    ]
    return FileSource(
        root, items, read, filename_list=filename_list, name_of=_name_of, on_error=on_error
    )


def read(item: Item) -> files.Sample:
    """A frame; ValueError that names the file if one is unreadable."""
    parts = files.gather(item, {"image": image_lib.load, "depth": files.read_png_counts})
    counts = parts["depth"]
    depth = counts.astype(np.float32) / np.float32(COUNTS_PER_METRE)
    return files.as_sample(parts["image"], depth, counts != SKY)


def _item(rgb: Path, depth: Path, sequence: str, camera: str, frame: int) -> Item:
    return Item(
        name=f"{sequence}/{camera}/{frame:05d}",
        group=sequence.partition("/")[0],
        files={
            "image": rgb / f"{sequence}/frames/rgb/{camera}/rgb_{frame:05d}.jpg",
            "depth": depth / f"{sequence}/frames/depth/{camera}/depth_{frame:05d}.png",
        },
    )


def _name_of(path: str) -> str | None:
    """The name of the picture of this path in Marigold's lists."""
    form = r"(?:.*/)?(\w+/[^/]+)/frames/rgb/(\w+)/rgb_(\d+)\.jpg"
    found = re.fullmatch(form, path, re.ASCII)
    return found and f"{found[1]}/{found[2]}/{found[3]}"


def _find_folders(root: Path) -> tuple[Path, Path]:
    """Where the scenes' pictures and their depth lie."""
    pairs = [(root / rgb, root / depth) for rgb, depth in FOLDERS]
    for pair in pairs:
        if any((folder / scene).is_dir() for folder in pair for scene in FRAMES):
            return pair
    looked = ", ".join(str(folder) for folder in dict.fromkeys(sum(pairs, ())))
    raise SourceError(root, [f"none of {', '.join(FRAMES)} in {looked}"])
