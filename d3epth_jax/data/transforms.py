"""Transforms of one sample, each a pure function of (sample, NumPy generator); no JAX.

A sample is {"image": uint8 [H,W,3], "depth": float32 metres [H,W,1], "mask": bool [H,W,1]}. All
three go through the same geometry, so a pixel of the depth stays under its pixel of the image.
Options are bound by functools.partial, which worker processes can unpickle.
"""

import math

import numpy as np

from d3epth_jax.image import resize, resize_nearest_exact

Sample = dict[str, np.ndarray]


def fit_to(
    sample: Sample, rng: np.random.Generator, *, size: tuple[int, int], crop: str = "random"
) -> Sample:
    """Scale until the picture just covers `size` = (H, W), then crop to it ("random" | "center").

    The image is bilinear with antialiasing, rounded to uint8; depth and mask are nearest-exact,
    never bilinear: a mean across an edge is a depth that is nowhere (METHOD 2). Nearest also drops
    points of sparse LiDAR when shrinking (by the square of the factor), and a crop may hold none:
    such a sample has an all-False mask and carries no loss.
    """
    if crop not in ("random", "center"):
        raise ValueError(f"crop must be 'random' or 'center', got {crop!r}")
    height, width = sample["image"].shape[:2]
    scale = max(size[0] / height, size[1] / width)
    # The epsilon keeps an exact fit exact: 3 * (64 / 3) may come out just above 64.
    covering = tuple(
        max(wanted, math.ceil(side * scale - 1e-6))
        for side, wanted in zip((height, width), size, strict=True)
    )
    spare = covering[0] - size[0], covering[1] - size[1]
    if crop == "random":
        top, left = (int(rng.integers(space + 1)) for space in spare)
    else:
        top, left = (space // 2 for space in spare)
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
