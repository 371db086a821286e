"""Predictors that need no model: trivial ones, which any model has to beat, and saved predictions.

All are called as predict(pictures uint8 [N,H,W,3], their samples' names) -> [N,H,W,1].
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax.data import read_samples
from d3epth_jax.data.sources import files


def constant(images: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """The same depth everywhere."""
    return np.ones((*images.shape[:3], 1), np.float32)


def ramp(images: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """1 - row/H: what is lower in a picture is nearer."""
    n, height, width, _ = images.shape
    column = 1 - np.arange(height, dtype=np.float32) / height
    return np.broadcast_to(column[None, :, None, None], (n, height, width, 1)).copy()


def falling(predict: Callable) -> Callable:
    """Such a predictor of depth in [0, 1] as one of disparity, which falls with distance.

    Above zero everywhere: no disparity is fitted elsewhere.
    """
    return lambda images, names=(): 2 - predict(images, names)


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

    def __call__(self, images: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
        resized = image_lib.resize(self.map, images.shape[1:3], antialias=True)
        return np.repeat(resized[None], len(images), 0)


class SavedPredictions:
    """Predictions of anybody's model, one file per sample.

    Looked for below `path` by the sample's name: NAME.npy [H,W] or [H,W,1], else NAME.png of 16
    bits, else NAME_depth.png, as `d3epth predict` calls it; or as Marigold's inference calls those
    of its benchmarks (`stems_of`). They are resized bilinearly to the ground truth's size, as
    Marigold resizes its own to the input's.

    Args:
      path: the folder.
      samples: {name: (other names to look for, ground truth's (H, W), or None if not known)}.
      scale: values are divided by it, such as a PNG's counts per metre; it matters only to
        predictions that are metric already.

    Raises ValueError that lists every missing, unreadable or misshapen file.
    """

    def __init__(
        self,
        path,
        samples: Mapping[str, tuple[Iterable[str], tuple[int, int] | None]],
        *,
        scale: float = 1.0,
    ):
        if files.positive(scale) is None:
            raise ValueError(f"{path}: scale must be a positive number, got {scale!r}")
        self._scale, self._files, problems = scale, {}, []
        self.sizes: set[tuple[int, int]] = set()
        for name, (others, size) in samples.items():
            stems = stems_of((name, *others))
            wanted = [Path(path) / f"{s}{end}" for s in stems for end in FILES]
            found = next((file for file in wanted if file.is_file()), None)
            if found is None:
                ends = f"each with {', '.join(FILES)}"
                looked = f"looked for {', '.join(stems)}, {ends}" if stems else "not a path below"
                problems.append(f"{name}: no prediction; {looked}")
                continue
            self._files[name] = found
            try:
                values = read_prediction(found)
                if size is not None:
                    _require_one_aspect(found, values.shape[:2], size)
                self.sizes.add(values.shape[:2])
            except (OSError, ValueError) as error:
                problems.append(str(error))
        if problems:
            told = [f"{path}: {len(problems)} prediction(s) cannot be used:"]
            told += problems[: files.LISTED]
            if (hidden := len(problems) - files.LISTED) > 0:
                told.append(f"and {hidden} more")
            raise ValueError("\n  ".join(told))

    def __call__(self, images: np.ndarray, names: Sequence[str]) -> np.ndarray:
        return np.stack([self._one(name, images.shape[1:3]) for name in names])

    def _one(self, name: str, size: tuple[int, int]) -> np.ndarray:
        values = read_prediction(self._files[name])
        _require_one_aspect(self._files[name], values.shape[:2], size)
        if self._scale != 1:
            values = values / np.asarray(self._scale, values.dtype)
        return image_lib.resize(values, size, antialias=False)


FILES = (".npy", ".png", "_depth.png")


def stems_of(names: Iterable[str]) -> list[str]:
    """Paths without suffix at which a prediction may lie: the names, then as Marigold makes them.

    That is pred_X beside X and beside rgb_X, and X_pred beside X_rgb (its DepthFileNameMode).
    Names that could leave the folder are left out.
    """
    names = [name for name in names if files.is_below(name)]
    stems = list(names)
    for name in names:
        folder, slash, stem = name.rpartition("/")
        stems.append(f"{folder}{slash}pred_{stem.removeprefix('rgb_')}")
        if stem.endswith("_rgb"):
            stems.append(f"{folder}{slash}{stem.removesuffix('_rgb')}_pred")
    return list(dict.fromkeys(stems))


def read_prediction(path: Path) -> np.ndarray:
    """A saved prediction [H,W,1], float32 or float64. Raises ValueError that names the file."""
    if path.suffix == ".png":
        counts = files.read_png_counts(path)
        return counts.astype(np.float32)[..., None]
    values = files.read_npy(path)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
        shape = f"{values.dtype} {list(values.shape)}"
        raise ValueError(f"{path}: not a depth map: {shape}, expected numbers [H,W] or [H,W,1]")
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: holds NaN or infinity")
    return values.astype(np.result_type(values, np.float32), copy=False)[..., None]


def _require_one_aspect(path: Path, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Up to a pixel: the shorter side of a processing size is rounded down."""
    (h, w), (height, width) = size, wanted
    if min(abs(h - w * height / width), abs(w - h * width / height)) > 1:
        raise ValueError(
            f"{path}: prediction is {w}x{h} but its ground truth {width}x{height} (width x height),"
            " of another shape: it cannot be resized to it"
        )
