"""Predictors that need no model: what any depth model has to beat."""

import itertools

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data import read_samples


def constant(images: np.ndarray) -> np.ndarray:
    """The same depth everywhere; pictures [N,H,W,3] to [N,H,W,1]."""
    return np.ones((*images.shape[:3], 1), np.float32)


def ramp(images: np.ndarray) -> np.ndarray:
    """1 - row/H: what is lower in a picture is nearer."""
    n, height, width, _ = images.shape
    column = 1 - np.arange(height, dtype=np.float32) / height
    return np.broadcast_to(column[None, :, None, None], (n, height, width, 1)).copy()


class MeanMap:
    """The mean normalised depth map of training scenes, resized to each picture."""

    def __init__(self, source, *, num_images: int, height: int, width: int):
        """Averages (d - q2)/(q98 - q2) over the valid pixels of the first `num_images` samples."""
        total = np.zeros((height, width, 1))
        count = np.zeros((height, width, 1))
        wanted = range(min(num_images, len(source)))
        parts = (read_samples(source, wanted[i : i + 16]) for i in wanted[::16])
        for sample in itertools.chain.from_iterable(parts):
            depth, mask = sample["depth"], sample["mask"]
            if mask.sum() < 2:
                continue
            low, high = np.quantile(depth[mask], [0.02, 0.98])
            if high <= low:
                continue
            normal = np.clip((depth - low) / (high - low), 0, 1)
            normal = image_lib.resize_nearest_exact(normal, (height, width))
            known = image_lib.resize_nearest_exact(mask, (height, width))
            total += np.where(known, normal, 0)
            count += known
        seen = count > 0
        if not seen.any():
            raise ValueError("no training sample has a usable depth map: there is no mean map")
        mean = total / np.maximum(count, 1)
        self.map = np.where(seen, mean, mean[seen].mean()).astype(np.float32)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        resized = image_lib.resize(self.map, images.shape[1:3], antialias=True)
        return np.repeat(resized[None], len(images), 0)
