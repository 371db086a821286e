"""Several predictions of one picture as one: aligned, merged by the median (NumPy, SciPy).

Marigold's test-time ensembling (Ke et al., CVPR 2024, section 3.3; METHOD 1): scales and shifts
have the cost sum_{i<j} RMSE(aligned_i, aligned_j) + 0.02 (|min median| + |1 - max median|).

Minimised to the end, this loses the picture: shrinking all members to nothing costs 0.02 and no
more. Marigold does not get there because it stops after two steps of a numerical gradient. Here
the members keep the sum of their standard deviations, and the pairs' term is minimised to the end.
Between members that are mostly noise, twice as strong as what they share, Marigold's half-way
shrinking has the lower cost for that reason; between members that agree better ours has.
Nothing is lost, for a common scale and shift leaves no trace in the result; and what remains is
convex, with one minimum, and needs no pixels: all means are equal there, so that the members'
correlations say everything.
"""

import numpy as np
from scipy import optimize

from d3epth_jax.image import resize_nearest_exact

REGULARIZER = 0.02
FLAT = 1e-6  # a smaller range is noise: such a member is not stretched


def ensemble_depth(
    predictions: np.ndarray, *, max_resolution: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions [E,H,W,1] to (depth in [0,1], uncertainty), each float32 [H,W,1].

    Uncertainty is the median absolute deviation, in units of the depth's range. Members are aligned
    on at most `max_resolution` pixels a side. Raises ValueError for fewer than two members, members
    that are not finite, or another shape.
    """
    return merge(predictions, *align(predictions, max_resolution=max_resolution))


def align(predictions: np.ndarray, *, max_resolution: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """The scale and shift, float64 [E] each, that bring affine-invariant members together.

    Their cost is never above that of Marigold's start, which stretches each member to 0..1.
    """
    _check(predictions)
    pixels = _shrunk(predictions, max_resolution)[..., 0].astype(np.float64)
    pixels = pixels.reshape(len(pixels), -1)
    low, span = pixels.min(1), np.ptp(pixels, axis=1)
    scale = np.where(span < FLAT, 0, 1 / np.maximum(span, FLAT))
    shift = -scale * low
    if not scale.any():
        return scale, shift

    pixels = pixels * scale[:, None] + shift[:, None]
    mean = pixels.mean(1)
    start_median = lower_median(pixels)
    pixels -= mean[:, None]
    covariance = pixels @ pixels.T / pixels.shape[1]
    deviation = np.sqrt(np.diag(covariance))
    inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)

    found = optimize.minimize(
        disagreement,
        np.ones_like(deviation),
        covariance * np.outer(inverse, inverse),
        method="BFGS",
        jac=True,
    )
    relative = found.x * inverse
    relative *= deviation.sum() / (relative @ deviation)
    median = lower_median(relative[:, None] * pixels)
    level = start_median.min() - median.min()
    start_cost = _cost(_rmse(np.ones_like(mean), mean, covariance), start_median)
    if not _cost(_rmse(relative, 0 * mean, covariance), median + level) <= start_cost:
        return scale, shift
    return relative * scale, relative * (shift - mean) + level


def merge(
    predictions: np.ndarray, scale: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Median and median absolute deviation of the aligned members, in the median's min-max range.

    As torch's, the median of an even number is the lower of the middle two.
    """
    column = (-1, 1, 1, 1)
    scale, shift = (np.asarray(x, np.float32).reshape(column) for x in (scale, shift))
    aligned = np.asarray(predictions, np.float32) * scale + shift
    median = lower_median(aligned)
    deviation = lower_median(np.abs(aligned - median))
    low = median.min()
    span = np.maximum(median.max() - low, np.float32(1e-6))
    return (median - low) / span, deviation / span


def lower_median(values: np.ndarray) -> np.ndarray:
    """Over the first axis; of an even number, the lower of the middle two."""
    middle = (len(values) - 1) // 2
    return np.partition(values, middle, axis=0)[middle]


def disagreement(spread: np.ndarray, correlation: np.ndarray) -> tuple[float, np.ndarray]:
    """sum_{i<j} RMSE(aligned_i, aligned_j) / sum_i spread_i, and its gradient [E].

    `spread` are the standard deviations of aligned members of equal means. A member without content
    has zeros in `correlation` [E,E], on the diagonal too, and does not count in the sum.
    """
    present = np.diag(correlation)
    total = present @ spread
    if not total > 0:
        return np.inf, np.zeros_like(spread)
    rmse = _rmse(spread, np.zeros_like(spread), correlation)
    slope = np.divide(1, rmse, out=np.zeros_like(rmse), where=rmse > 0)  # of equal members: 0
    pull = (slope * ((spread * present)[:, None] - spread * correlation)).sum(1)
    value = rmse.sum() / 2 / total
    return value, (pull - value * present) / total


def _rmse(scale: np.ndarray, level: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """[E,E] between scale * member + level, for members of mean zero with this covariance."""
    product = covariance * np.outer(scale, scale)
    power = np.diag(product)
    gap = level[:, None] - level
    return np.sqrt(np.maximum(power[:, None] + power - 2 * product + gap**2, 0))


def _cost(rmse: np.ndarray, median: np.ndarray) -> float:
    """Marigold's, from all pairs' RMSE [E,E]."""
    return rmse.sum() / 2 + REGULARIZER * (abs(median.min()) + abs(1 - median.max()))


def _check(predictions: np.ndarray) -> None:
    if predictions.ndim != 4 or predictions.shape[-1] != 1 or 0 in predictions.shape:
        raise ValueError(f"expected predictions [E,H,W,1], got shape {list(predictions.shape)}")
    if len(predictions) < 2:
        raise ValueError(f"an ensemble has at least 2 members, not {len(predictions)}")
    finite = np.isfinite(predictions).all(axis=(1, 2, 3))
    if not finite.all():
        numbers = ", ".join(map(str, np.flatnonzero(~finite)))
        raise ValueError(f"ensemble members that are not finite: number {numbers}")


def _shrunk(predictions: np.ndarray, resolution: int) -> np.ndarray:
    height, width = predictions.shape[1:3]
    longest = max(height, width)
    if longest <= resolution:
        return predictions
    size = tuple(max(1, side * resolution // longest) for side in (height, width))
    return resize_nearest_exact(predictions, size)
