"""NYU Depth V2, labelled: 1449 Kinect frames of 464 rooms, 640x480 (Silberman et al., ECCV 2012).

From https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html (for research; no licence is stated) the
labelled set, and its official split into 795 and 654 frames from SPLITS_URL below:
    nyu_depth_v2_labeled.mat    MATLAB 7.3, so HDF5: images uint8 [1449,3,640,480], rawDepths and
                                depths float32 metres [1449,640,480], scenes; 0 invalid
    splits.mat                  MATLAB 5: trainNdxs and testNdxs, counted from 1; in the same folder
or Marigold's nyu_labeled_extracted.tar, unpacked to PATH:
    test/SCENE/rgb_0001.png       the number is the frame's in the .mat, so names are the same
    test/SCENE/depth_0001.png     uint16 millimetres, 0 invalid
    test/SCENE/filled_0001.png    the same with holes filled in
Evaluation takes raw depth; the part of the frame that counts is the protocol's business.
"""

import re
from pathlib import Path

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data.sources import files
from d3epth_jax.data.sources.benchmarks import load_mat, stems
from d3epth_jax.data.sources.files import FileSource, Item, SourceError
from d3epth_jax.data.sources.hdf5 import open_hdf5

LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
SPLITS_URL = "http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat"
INDICES = {"train": "trainNdxs", "test": "testNdxs"}
DEPTHS = {"raw": ("rawDepths", "depth"), "filled": ("depths", "filled")}  # in .mat, of PNGs
COUNTS_PER_METRE = 1000.0


def nyu(
    path,
    *,
    split: str = "test",
    depth: str = "raw",
    filename_list: str = "",
    on_error: str = "raise",
) -> FileSource:
    """NYU's labelled frames, named "kitchen_0004/0001" in either layout; a scene is a group.

    Args:
      path: a folder with one of the layouts above, or the .mat itself.
      split: "test" (654), "train" (795), or "" for both.
      depth: "raw", as measured and evaluated, or "filled" in by the set's authors.
      filename_list: names, or lines as in Marigold's filename_list_test.txt.
      on_error: as FileSource.

    Raises SourceError; ValueError for arguments that make no sense.
    """
    for name, value, known in (("split", split, (*INDICES, "")), ("depth", depth, tuple(DEPTHS))):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    root = Path(path)
    mat = root if root.suffix == ".mat" else files.require_folder(path) / LABELLED
    in_mat, in_png = DEPTHS[depth]
    if root == mat or mat.is_file():
        (items, size), read = _mat_items(mat, split, in_mat), read_mat
    else:
        items, read, size = _png_items(root, split, in_png), read_png, None
    return FileSource(
        root,
        items,
        read,
        shape=size,
        filename_list=filename_list,
        name_of=_name_of,
        absent=f"neither {LABELLED} in it nor {split or 'test'}/SCENE/rgb_NNNN.png",
        on_error=on_error,
    )


def read_mat(item: Item) -> files.Sample:
    """A frame of the .mat; ValueError that names file and frame.

    The file is opened for each frame: an open one could not be sent to worker processes, nor be
    shared by them after a fork.
    """
    number = item.settings["number"]
    with open_hdf5(item.files["image"], f"frame {number}") as file:
        image, depth = (file[key][number - 1] for key in ("images", item.settings["depths"]))
    return files.as_sample(np.ascontiguousarray(image.T), depth.T)  # MATLAB has columns first


def read_png(item: Item) -> files.Sample:
    """A frame of Marigold's layout."""
    return files.as_sample(**files.gather(item, {"image": image_lib.load, "depth": read_depth}))


def read_depth(path: Path) -> np.ndarray:
    return files.read_png_depth(path, COUNTS_PER_METRE)


def _mat_items(path: Path, split: str, depths: str) -> tuple[list[Item], tuple[int, int]]:
    """The frames of a split, and the size of all; SourceError if the file is not what it should."""
    try:
        with open_hdf5(path, "sizes") as file:
            images, maps = file["images"].shape, file[depths].shape
        count, _, width, height = images if len(images) == 4 else (0, 0, 0, 0)
        if images != (count, 3, width, height) or maps != (count, width, height):
            raise ValueError(
                f"{path}: images {list(images)} and {depths} {list(maps)}, expected"
                " [N, 3, W, H] and [N, W, H]"
            )
        numbers = _read_split(path.parent / SPLITS, split, count)
        with open_hdf5(path, "names of scenes") as file:
            references = file["scenes"][0]  # to arrays of UTF-16 letters, one a frame
            scenes = ["".join(map(chr, file[references[n - 1]][()].ravel())) for n in numbers]
    except (OSError, ValueError) as error:
        raise SourceError(path, str(error).splitlines()) from error
    problems = [
        f"{path}: frame {number} is of a scene called {scene!r}, which is no name of a folder"
        for number, scene in zip(numbers, scenes, strict=True)
        if not re.fullmatch(r"\w+", scene, re.ASCII)
    ]
    if problems:
        raise SourceError(path, problems)
    paths = {"image": path, "depth": path}
    items = [
        Item(f"{scene}/{number:04d}", scene, paths, {"number": number, "depths": depths})
        for number, scene in zip(numbers, scenes, strict=True)
    ]
    return items, (height, width)


def _read_split(path: Path, split: str, count: int) -> list[int]:
    """The split's frames, counted from 1; ValueError if they cannot be had."""
    if not split:
        return list(range(1, count + 1))
    if not path.is_file():
        raise ValueError(f"{path}: missing: which frames are {split!r}; fetch it from {SPLITS_URL}")
    key = INDICES[split]
    numbers = np.asarray(load_mat(path).get(key, ())).ravel()
    if not numbers.size or not ((numbers >= 1) & (numbers <= count)).all():
        raise ValueError(f"{path}: {key} is not a list of numbers from 1 to {count}")
    return [int(number) for number in numbers]


def _png_items(root: Path, split: str, kind: str) -> list[Item]:
    """Every frame of which the picture or the wanted depth is there."""
    items = []
    for part in [split] if split else list(INDICES):
        for scene in sorted((root / part).glob("[!.]*")):
            heads = {"image": "rgb_", "depth": f"{kind}_"}
            found = {
                stem.removeprefix(head)
                for head in heads.values()
                for stem in stems(scene, ".png")
                if stem.startswith(head)
            }
            for number in sorted(found):
                paths = {key: scene / f"{head}{number}.png" for key, head in heads.items()}
                items.append(Item(f"{scene.name}/{number}", scene.name, paths))
    return items


def _name_of(path: str) -> str | None:
    found = re.fullmatch(r"(?:.*/)?([^/]+)/rgb_(\d+)\.png", path)
    return found and f"{found[1]}/{found[2]}"
