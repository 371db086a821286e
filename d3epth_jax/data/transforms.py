"""Transforms of one sample, each a pure function of (sample, NumPy generator); no JAX.

A sample is {"image": uint8 [H,W,3], "depth": float32 metres [H,W,1], "mask": bool [H,W,1]}. All
three go through the same geometry, so a pixel of the depth stays under its pixel of the image.
Options are bound by functools.partial, which worker processes can unpickle.
"""

import math

import numpy as np

from d3epth_jax.data.filters import rejection
from d3epth_jax.image import resize, resize_nearest_exact

Sample = dict[str, np.ndarray]

CROPS = ("random", "center", "kitti", "stretch")


def empty_rejected(sample: Sample, rng: np.random.Generator, **limits) -> Sample:
    """A sample that the filters leave out (`filters.rejection`) knows no pixel any more.

    It stays where it is in the epoch, so that positions are exact, and carries no loss.
    """
    if not rejection(sample, **limits):
        return sample
    unknown = {key: np.zeros_like(sample[key]) for key in ("depth", "mask")}
    return {"image": sample["image"], **unknown}


def limit_depth(sample: Sample, rng: np.random.Generator, *, max_depth: float) -> Sample:
    """What is farther than `max_depth` metres is unknown."""
    mask = sample["mask"] & (sample["depth"] <= max_depth)
    depth = np.where(mask, sample["depth"], np.float32(0))
    return {"image": sample["image"], "depth": depth, "mask": mask}


def fit_to(
    sample: Sample, rng: np.random.Generator, *, size: tuple[int, int], crop: str = "random"
) -> Sample:
    """Scale until the picture just covers `size` = (H, W), then crop to it.

    crop: "random", "center", or "kitti": KITTI's benchmark crop, the bottom rows and the middle
    columns of the picture as it is, nothing scaled; ValueError for a picture smaller than that.
    Or "stretch": all of the picture, whatever its shape, as a model sees it that predicts at one
    shape alone (its `processing_aspect`).

    The image is bilinear with antialiasing, rounded to uint8; depth and mask are nearest-exact,
    never bilinear: a mean across an edge is a depth that is nowhere (METHOD 2). Nearest also drops
    points of sparse LiDAR when shrinking (by the square of the factor), and a crop may hold none:
    such a sample has an all-False mask and carries no loss.
    """
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {CROPS}, got {crop!r}")
    height, width = sample["image"].shape[:2]
    scale = 1 if crop == "kitti" else max(size[0] / height, size[1] / width)
    if height * scale < size[0] - 0.5 or width * scale < size[1] - 0.5:
        raise ValueError(
            f"a picture of {width}x{height} has no crop 'kitti' of {size[1]}x{size[0]}: it is not"
            " scaled; set a smaller height and width, or crop='center'"
        )
    # The epsilon keeps an exact fit exact: 3 * (64 / 3) may come out just above 64.
    covering = tuple(
        wanted if crop == "stretch" else max(wanted, math.ceil(side * scale - 1e-6))
        for side, wanted in zip((height, width), size, strict=True)
    )
    spare = covering[0] - size[0], covering[1] - size[1]
    if crop == "random":
        top, left = (int(rng.integers(space + 1)) for space in spare)
    else:
        top, left = (space // 2 for space in spare)
    if crop == "kitti":
        top = spare[0]
    window = slice(top, top + size[0]), slice(left, left + size[1])

    image = resize(sample["image"], covering, antialias=True)[window]
    return {
        "image": np.rint(image).clip(0, 255).astype(np.uint8),
        "depth": resize_nearest_exact(sample["depth"], covering)[window],
        "mask": resize_nearest_exact(sample["mask"], covering)[window],
    }


def horizontal_flip(
    sample: Sample, rng: np.random.Generator, *, probability: float = 0.5
) -> Sample:
    """Mirror left and right with the given probability; z-depth does not change."""
    if rng.random() >= probability:
        return sample
    return {key: np.ascontiguousarray(value[:, ::-1]) for key, value in sample.items()}


def choose_side(sample: Sample, rng: np.random.Generator, *, probability: float = 0.5) -> Sample:
    """Of a cached sample (sources/latents.py), what belongs to the picture or to its mirror image.

    Arrays [F,...] become [...]. For the same generator the choice is that of `horizontal_flip`.
    """
    side = int(rng.random() < probability)
    chosen = {key: value[side] for key, value in sample.items() if key != "image"}
    if "image" in sample:
        image = sample["image"]
        chosen["image"] = np.ascontiguousarray(image[:, ::-1]) if side else image
    return chosen
