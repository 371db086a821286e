"""Pictures in every form that a caller may give them in, as arrays."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from d3epth_jax import image as image_lib


def as_arrays(images) -> list[np.ndarray]:
    """Pictures as arrays [H,W,3] of one size: uint8, or float32 in [0,1] where that keeps more.

    `images` is a path, a PIL picture, an array [H,W], [H,W,1|3|4], a list of these, or an array
    [N,H,W,C]. Raises ValueError that names everything that cannot be used.
    """
    if isinstance(images, str | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray | jax.Array) and images.ndim < 4
    ):
        images = [images]
    listed = isinstance(images, Sequence | np.ndarray | jax.Array)
    if not listed or isinstance(images, bytes) or not len(images):
        raise ValueError("no picture given: a path, a PIL picture, an array, or a list of these")
    pictures, problems = [], []
    for number, given in enumerate(images):
        try:
            pictures.append(_as_picture(given))
        except (OSError, ValueError) as error:
            problems.append(f"number {number}: {error}")
            continue
        if pictures[-1].shape[:2] != pictures[0].shape[:2]:
            sizes = [f"{p.shape[1]}x{p.shape[0]}" for p in (pictures[-1], pictures[0])]
            problems.append(f"number {number}: {sizes[0]} pixels, but the first has {sizes[1]}")
    if problems:
        raise ValueError("\n  ".join(["pictures that cannot be used:", *problems]))
    return pictures


def _as_picture(given) -> np.ndarray:
    if isinstance(given, str | os.PathLike):
        return image_lib.load(given)
    if isinstance(given, Image.Image):
        return image_lib.from_pil(given)
    array = np.asarray(given)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"an array [H,W] or [H,W,1|3|4] is expected, not {list(array.shape)}")
    array = array[..., :3] if array.shape[-1] == 4 else array
    array = np.broadcast_to(array, (*array.shape[:2], 3))
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        image_lib.require_16_bits(array.max())
        return array.astype(np.float32) / 65535
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        raise ValueError(f"uint8, uint16, or float in [0,1] is expected, not {array.dtype}")
    array = array.astype(np.float32)
    if not (array >= 0).all() or not (array <= 1).all():  # also false for NaN
        raise ValueError("a float picture must be finite and in [0,1]")
    return array
