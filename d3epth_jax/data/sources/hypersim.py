"""Hypersim: rendered interiors, 1024x768 (Roberts et al., ICCV 2021), from either of two layouts.

The public release, as downloaded (https://github.com/apple/ml-hypersim, 1.9 TB, CC BY-SA 3.0):
    ai_VVV_NNN/images/scene_cam_XX_final_hdf5/frame.IIII.color.hdf5                 HDR colour
    ai_VVV_NNN/images/scene_cam_XX_final_preview/frame.IIII.tonemap.jpg            its preview
    ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5      distance
    ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.IIII.render_entity_id.hdf5  -1: nothing there
in PATH, or in PATH/scenes, PATH/evermotion_dataset/scenes (as the repository) or PATH/raw_data (as
Marigold's). Not in the archives is the split, metadata_images_split_scene_v1.csv: it comes from
evermotion_dataset/analysis in the same repository, and is looked for in PATH, PATH/analysis,
PATH/evermotion_dataset/analysis and PATH/../analysis.

What Marigold's preprocess_hypersim.py writes (https://github.com/prs-eth/Marigold):
    SPLIT/filename_meta_SPLIT.csv
    SPLIT/ai_VVV_NNN/rgb_cam_XX_frIIII.png
    SPLIT/ai_VVV_NNN/depth_plane_cam_XX_frIIII.png    z-depth, uint16 millimetres, 0 invalid
where PATH may also be SPLIT itself. These depths were cut to 16 bits: from 65.536 m on they begin
again at 0, which nothing in the file shows. The release has no such fault.

Pinhole camera for all scenes, as Marigold takes it; a few were rendered with a shifted lens.
"""

import csv
import functools
import re
from pathlib import Path

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.files import FileSource, Item, SourceError
from d3epth_jax.data.sources.hdf5 import open_hdf5

FOCAL_LENGTH, WIDTH = 886.81, 1024  # pixels; another width scales the focal length
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # ours: its own name
SPLIT_CSV = "metadata_images_split_scene_v1.csv"
SPLIT_URL = (
    f"https://github.com/apple/ml-hypersim/blob/main/evermotion_dataset/analysis/{SPLIT_CSV}"
)
CSV_FOLDERS = ("", "analysis", "evermotion_dataset/analysis", "../analysis")
SCENE_FOLDERS = ("", "scenes", "evermotion_dataset/scenes", "raw_data")
COLUMNS = (
    "scene_name",
    "camera_name",
    "frame_id",
    "included_in_public_release",
    "split_partition_name",
)
COLOURS = {
    "tone_mapped": "final_hdf5/frame.{:04d}.color.hdf5",
    "preview": "final_preview/frame.{:04d}.tonemap.jpg",
}
DATASET = "dataset"  # the one of each file
DISTANCE = "geometry_hdf5/frame.{:04d}.depth_meters.hdf5"
ENTITIES = "geometry_hdf5/frame.{:04d}.render_entity_id.hdf5"

LUMA = np.array([0.3, 0.59, 0.11], np.float32)
GAMMA = 2.2
BRIGHT = 0.8  # of the picture's 90 % quantile of brightness, after tone mapping
DARKEST = 1e-4  # below, a picture is black rather than divided by almost nothing


def hypersim(
    path,
    *,
    split: str = "train",
    colour: str = "tone_mapped",
    filename_list: str = "",
    on_error: str = "raise",
) -> FileSource:
    """Hypersim's released frames, named "ai_001_001/cam_00/0000"; the layout is found in the tree.

    Args:
      path: a folder that holds one of the layouts above.
      split: "train" (59,543 frames), "validation" (7,386), "test" (7,690) of the official split by
        scenes; "" for all of them, in the second layout all whose filename_meta CSV is there.
      colour: "tone_mapped" from the HDR colours (`tone_map`), or "preview", the JPEG its authors
        made of them by the same rule; a download can then leave out color.hdf5.
      filename_list: names, or lines as in Marigold's filename_list_val_filtered.txt, for either
        layout ("ai_003_010/rgb_cam_00_fr0047.png ...", with or without SPLIT/ before).
      on_error: as FileSource.

    Depth is z in metres, as rendered: no far plane. Invalid: no object, not finite, not positive.
    Raises SourceError; ValueError for arguments that make no sense.
    """
    if split not in (*SPLITS, ""):
        raise ValueError(f"split must be one of {list(SPLITS)}, or '' for all, got {split!r}")
    split = SPLITS.get(split, "")
    if colour not in COLOURS:
        raise ValueError(f"colour must be one of {tuple(COLOURS)}, got {colour!r}")
    root = files.require_folder(path)
    metas = _find_metas(root)
    if metas and colour == "preview":
        raise ValueError(f"{root}: has PNGs made by Marigold's script, which have no 'preview'")
    if metas:
        (items, problems), read, shape = _png_items(root, split, metas), read_png, None
    else:
        (items, problems), read, shape = _raw_items(root, split, colour), read_raw, raw_shape
    return FileSource(
        root,
        items,
        read,
        shape=shape,
        filename_list=filename_list,
        name_of=_name_of,
        problems=problems,
        on_error=on_error,
    )


def read_raw(item: Item) -> files.Sample:
    """A frame of the release; whatever is wrong with its files is told in one ValueError."""
    arrays = files.gather(
        item, {"image": read_colour, "depth": read_map, "render_entity_id": read_map}
    )
    known = arrays["render_entity_id"] != -1
    image = arrays["image"]
    if image.dtype != np.uint8:
        image = tone_map(image, known)
    distance = arrays["depth"].astype(np.float32)
    return files.as_sample(image, distance * depth_per_distance(*distance.shape), known)


def raw_shape(item: Item) -> tuple[int, int]:
    """(H, W) from the header of the frame's distances; raises as `open_hdf5`."""
    with open_hdf5(item.files["depth"]) as file:
        return file[DATASET].shape[:2]


def read_png(item: Item) -> files.Sample:
    """A frame of Marigold's layout."""
    return files.as_sample(**files.gather(item, {"image": image_lib.load, "depth": read_depth}))


def read_depth(path: Path) -> np.ndarray:
    return files.read_png_depth(path, 1000.0)


def read_colour(path: Path) -> np.ndarray:
    """HDR colour [H,W,3] of an HDF5 file, or uint8 of a preview."""
    return read_map(path, channels=(3,)) if path.suffix == ".hdf5" else image_lib.load(path)


def read_map(path: Path, channels: tuple[int, ...] = ()) -> np.ndarray:
    """The numbers [H,W] in one of Hypersim's files; ValueError that names it."""
    with open_hdf5(path) as file:
        array = np.asarray(file[DATASET])
    if array.ndim < 2 or array.shape[2:] != channels or array.dtype.kind not in "fiu":
        expected = ", ".join(["H", "W", *map(str, channels)])
        raise ValueError(f"{path}: {array.dtype} {list(array.shape)}, expected [{expected}]")
    return array


@functools.lru_cache(maxsize=8)
def depth_per_distance(height: int, width: int) -> np.ndarray:
    """z over the distance to the camera's centre, float32 [H,W]: f / |(x, y, f)| (METHOD 9)."""
    focal_length = FOCAL_LENGTH * width / WIDTH
    x = np.arange(width) + 0.5 - width / 2
    y = np.arange(height)[:, None] + 0.5 - height / 2
    ratio = (focal_length / np.sqrt(x**2 + y**2 + focal_length**2)).astype(np.float32)
    ratio.setflags(write=False)  # shared by all frames
    return ratio


def tone_map(colour: np.ndarray, known: np.ndarray) -> np.ndarray:
    """HDR colour [H,W,3] as uint8: scaled so that the 90 % quantile of brightness becomes 0.8.

    The reference rule of ml-hypersim (scene_generate_images_tonemap.py). known: bool [H,W], the
    pixels whose brightness counts; none leaves the scale at 1, a quantile below 1e-4 gives black.
    Colours that are NaN or negative become black, +inf becomes the largest float16, so white.
    Cut, not rounded, to 8 bits, as the previews and Marigold's PNGs are.
    """
    largest = float(np.finfo(np.float16).max)
    colour = np.nan_to_num(colour.astype(np.float32), nan=0.0, posinf=largest, neginf=0.0)
    scale = 1.0
    if known.any():
        bright = float(np.percentile((colour @ LUMA)[known], 90))
        scale = BRIGHT**GAMMA / bright if bright >= DARKEST else 0.0
    colour = np.clip(colour * np.float32(scale), 0, 1) ** np.float32(1 / GAMMA)
    return (colour * 255).astype(np.uint8)


def _raw_items(root: Path, split: str, colour: str) -> tuple[list[Item], list[str]]:
    """The released frames of a split, whether their files exist or not."""
    scenes = next((root / f for f in SCENE_FOLDERS if any((root / f).glob("*/images"))), None)
    table = next(
        (root / f / SPLIT_CSV for f in CSV_FOLDERS if (root / f / SPLIT_CSV).is_file()), None
    )
    problems = []
    if scenes is None:
        problems.append(
            f"no scene ai_VVV_NNN/images in {_listed(root, SCENE_FOLDERS)}, nor"
            " filename_meta_SPLIT.csv of Marigold's script in it or in its folder SPLIT"
        )
    if table is None:
        problems.append(
            f"no {SPLIT_CSV} in {_listed(root, CSV_FOLDERS)}; it is not in the scenes' archives but"
            f" here: {SPLIT_URL}"
        )
    if problems:
        raise SourceError(root, problems)
    frames, problems = read_table(table, split)
    items = []
    for scene, camera, frame in frames:
        start = f"{scenes}/{scene}/images/scene_{camera}_"
        kinds = {"image": COLOURS[colour], "depth": DISTANCE, "render_entity_id": ENTITIES}
        paths = {kind: Path(start + form.format(frame)) for kind, form in kinds.items()}
        items.append(Item(f"{scene}/{camera}/{frame:04d}", scene, paths))
    return items, problems


def _find_metas(root: Path) -> dict[str, Path]:
    """{split: CSV that Marigold's script wrote for it}, in the root or the split's folder."""
    paths = {split: f"filename_meta_{split}.csv" for split in SPLITS.values()}
    return {
        split: folder / name
        for split, name in paths.items()
        for folder in (root, root / split)
        if (folder / name).is_file()
    }


def _png_items(root: Path, split: str, metas: dict[str, Path]) -> tuple[list[Item], list[str]]:
    """The frames that Marigold's script wrote, whether their files still exist or not."""
    if split and split not in metas:
        found = ", ".join(str(path) for path in metas.values())
        raise SourceError(
            root, [f"no filename_meta_{split}.csv in it or in {split}/; found {found}"]
        )
    items, problems = [], []
    for part in [split] if split else list(metas):
        frames, wrong = read_table(metas[part], part)
        problems += wrong
        for scene, camera, frame in frames:
            start, end = metas[part].parent / scene, f"{camera}_fr{frame:04d}.png"
            paths = {"image": start / f"rgb_{end}", "depth": start / f"depth_plane_{end}"}
            items.append(Item(f"{scene}/{camera}/{frame:04d}", scene, paths))
    return items, problems


def read_table(path: Path, split: str) -> tuple[list[tuple[str, str, int]], list[str]]:
    """(scene, camera, frame) of the released frames of a split ("": of all), and the bad lines."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise SourceError(path, [f"unreadable table: {error}"]) from error
    if lacking := [name for name in COLUMNS if rows and rows[0].get(name) is None]:
        raise SourceError(path, [f"no column {name!r}" for name in lacking])
    frames, problems = [], []
    for number, row in enumerate(rows, start=2):
        scene, camera, frame, released, part = (row[name] or "" for name in COLUMNS)
        if released.strip().lower() != "true" or split not in ("", part):
            continue
        if not all(re.fullmatch(r"\w+", text, re.ASCII) for text in (scene, camera)) or not (
            frame.isascii() and frame.isdigit()
        ):
            problems.append(f"{path}, line {number}: no frame is named {(scene, camera, frame)}")
            continue
        frames.append((scene, camera, int(frame)))
    return frames, problems


def _name_of(path: str) -> str | None:
    """The name of the picture of this path in Marigold's lists."""
    found = re.fullmatch(r"(?:.*/)?([^/]+)/rgb_([^/]+)_fr(\d+)\.png", path, re.ASCII)
    return found and f"{found[1]}/{found[2]}/{int(found[3]):04d}"


def _listed(root: Path, folders) -> str:
    return ", ".join(str(root / folder) for folder in folders)
