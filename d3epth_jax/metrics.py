"""Depth metrics in metres, per image, and the alignment that comes before them (NumPy, float64).

The protocol of Marigold (Ke et al., CVPR 2024): fit, clip, measure, average over images. An image
without a valid pixel has metrics NaN, never a silent 0. Float64, since a prediction with a large
offset has lost its digits in float32; in blocks of rows, so that an ETH3D picture of 24 megapixels
needs no more memory than its arrays. Arrays are [B,H,W,1], of any float type, masks boolean; all
functions raise ValueError for others.
"""

from collections.abc import Callable, Iterator

import numpy as np

from d3epth_jax.typing import check_maps

# Depth to the power of this is what a space holds (METHOD 2).
EXPONENT = {"depth": 1.0, "disparity": -1.0, "sqrt_disparity": -0.5}
ALIGNMENTS = (*EXPONENT, "none")
LEAST_DEPTH = 1e-6  # metres; no aligned prediction is nearer
LEAST_DISPARITY = 1e-3  # of either disparity, once it is fitted and before it is inverted
THRESHOLDS = np.linspace(1.05, 1.25, 10)  # of the boundary F1
_EDGE_REACH = 10.0  # pixels; iBims-1 looks no farther for an edge's counterpart
_BLOCK = 2**20  # pixels worked on at once


def compute(
    pred: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    *,
    min_depth: float,
    max_depth: float,
) -> dict[str, np.ndarray]:
    """The usual metrics of a prediction already aligned to metres -> {name: [B]}, NaN if no pixel.

    pred, target: metres. The prediction is clipped to the range and to at least 1e-6 m, not
    aligned. Valid: mask and min_depth < target < max_depth; with range 0 to inf the mask decides
    alone. abs_rel, sq_rel [m], rmse [m], rmse_log (ln), log10, delta1..3 (shares below 1.25^i),
    i_rmse [1/m], silog (times 100): Eigen et al., NeurIPS 2014, and the KITTI benchmark.
    """

    def one(pred, target, mask):
        count, sums = 0, {}
        for rows in _row_blocks(target.shape):
            known = mask[rows] & (target[rows] > min_depth) & (target[rows] < max_depth)
            d = target[rows][known].astype(np.float64)
            p = _clip(pred[rows][known].astype(np.float64), min_depth, max_depth)
            count += d.size
            for name, values in _errors(p, d):
                sums[name] = sums.get(name, 0.0) + values.sum()
        mean = {name: total / count if count else np.nan for name, total in sums.items()}
        roots = {name: np.sqrt(mean.pop(name)) for name in ("rmse", "rmse_log", "i_rmse")}
        spread = roots["rmse_log"] ** 2 - mean.pop("log") ** 2
        return {**mean, **roots, "silog": 100 * np.sqrt(np.maximum(spread, 0))}

    images = [one(*arrays) for arrays in _images(pred, target, mask)]
    return {name: np.array([image[name] for image in images]) for name in images[0]}


def _errors(p: np.ndarray, d: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What each metric takes the mean of, per pixel, before any root."""
    error, log_error = p - d, np.log(p) - np.log(d)
    yield "abs_rel", np.abs(error) / d
    yield "sq_rel", error**2 / d
    yield "rmse", error**2
    yield "i_rmse", (1 / p - 1 / d) ** 2
    yield "rmse_log", log_error**2
    yield "log", log_error
    yield "log10", np.abs(log_error) / np.log(10)
    ratio = np.maximum(p / d, d / p)
    for i in (1, 2, 3):
        yield f"delta{i}", ratio < 1.25**i


def align_to_metric(
    pred: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    *,
    space: str,
    alignment: str = "",
    min_depth: float,
    max_depth: float,
    max_resolution: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Unconstrained least squares to the ground truth -> (metres in min..max_depth; scale [B]).

    pred: in `space`, up to scale and shift; target: metres; mask: the pixels to fit, which are
    those that count, depth range included. alignment: the space of the fit, "" the prediction's
    own; elsewhere it is first converted, as if it were right up to scale, and what is not above
    1e-6 counts as that. "none": no fit, the prediction is metric. As soon as a disparity is
    involved the fit is over pred > 0; a fitted disparity is raised to 1e-3 before it is inverted.
    max_resolution: larger images are fitted on a nearest subsampling of that longest side (ETH3D),
    unless no pixel of it counts; 0 for none.

    A negative scale means an inverted prediction; without two different predictions it is 0, and
    the mean is the answer, or the farthest depth where no disparity is above 0. ValueError for
    another space.
    """
    if space not in EXPONENT or alignment not in ("", *ALIGNMENTS):
        raise ValueError(
            f"unknown space {space!r} or alignment {alignment!r}; choose of {', '.join(ALIGNMENTS)}"
        )
    fitted_space = space if alignment in ("", "none") else alignment
    exponent = EXPONENT[fitted_space]

    def converted(values):
        values = values.astype(np.float64)
        if fitted_space == space:
            return values
        return np.maximum(values, LEAST_DEPTH) ** (exponent / EXPONENT[space])

    def pairs(pred, target, mask):
        """The values to fit, block by block: predictions, and the ground truth in that space."""
        for rows in _row_blocks(target.shape):
            known = mask[rows]
            if {space, fitted_space} != {"depth"}:
                known = known & (pred[rows] > 0) & (target[rows] > 0)
            yield converted(pred[rows][known]), target[rows][known].astype(np.float64) ** exponent

    def one(pred, target, mask):
        scale, mean, shift = 1.0, 0.0, 0.0
        if alignment != "none":
            small = [_shrink(array, max_resolution) for array in (pred, target, mask)]
            if not small[2].any():  # a sparse ground truth that the subsampling misses
                small = pred, target, mask
            scale, mean, shift = _fit(lambda: pairs(*small))
        metres = np.empty(pred.shape)
        for rows in _row_blocks(pred.shape):
            # Without its mean a prediction with an offset keeps its digits.
            fitted = scale * (converted(pred[rows]) - mean) + shift
            if fitted_space != "depth":
                fitted = np.maximum(fitted, LEAST_DISPARITY) ** (1 / exponent)
            metres[rows] = _clip(fitted, min_depth, max_depth)
        return metres, scale

    metres, scales = zip(*(one(*arrays) for arrays in _images(pred, target, mask)), strict=True)
    # A single image is not copied: it may have 24 megapixels.
    return metres[0][None] if len(metres) == 1 else np.stack(metres), np.array(scales)


def _fit(pairs: Callable) -> tuple[float, float, float]:
    """(scale, mean of p, mean of d) of least squares d = scale (p - mean p) + mean d."""
    count, sum_p, sum_d, largest = 0, 0.0, 0.0, 0.0
    for p, d in pairs():
        count, sum_p, sum_d = count + p.size, sum_p + p.sum(), sum_d + d.sum()
        largest = max(largest, np.abs(p).max(initial=0))
    if not count:
        return 0.0, 0.0, 0.0
    mean_p, mean_d = sum_p / count, sum_d / count
    product = power = 0.0
    for p, d in pairs():
        centred = p - mean_p
        product += (centred * (d - mean_d)).sum()
        power += (centred**2).sum()
    # What float64's rounding leaves of a constant prediction is no variance.
    varies = power / count > (1e-13 * largest) ** 2
    return product / power if varies else 0.0, mean_p, mean_d


def boundary_f1(pred: np.ndarray, target: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """How well depth edges are placed, in [0, 1] -> [B] (Depth Pro, Bochkovskii et al., 2025).

    pred, target: metres, the prediction aligned and clipped. An edge: neighbours whose inverse
    depths differ by more than a factor t; F1 from precision and recall averaged over four
    directions, then averaged over t = 1.05..1.25 with weight t. Unlike upstream, pairs that touch
    an unknown pixel (masked, or of depth 0) are dropped. NaN for an image without a known pair.
    """

    def one(pred, target, mask):
        # [predicted, true, both; direction; how many thresholds a pair exceeds]
        pairs, known_pairs = np.zeros((3, 4, len(THRESHOLDS) + 1), int), 0
        for rows in _row_blocks(target.shape):
            height = rows.stop - rows.start
            rows = slice(rows.start, rows.stop + 1)  # the next block's first row is a neighbour
            known = (mask[rows] & (target[rows] > 0))[..., 0]
            inverse = [
                1 / np.maximum(np.where(known, x[rows][..., 0], 1).astype(np.float64), LEAST_DEPTH)
                for x in (pred, target)
            ]
            near_far = (np.s_[:-1], np.s_[1:]), (np.s_[:height, :-1], np.s_[:height, 1:])
            for axis, (near, far) in enumerate(near_far):
                both = known[near] & known[far]
                known_pairs += both.sum()
                ratios = [x[far][both] / x[near][both] for x in inverse]
                for turn, (p, d) in enumerate((ratios, [1 / ratio for ratio in ratios])):
                    edge = (p > THRESHOLDS[0]) | (d > THRESHOLDS[0])
                    p, d = (np.searchsorted(THRESHOLDS, x[edge]) for x in (p, d))
                    for kind, exceeded in enumerate((p, d, np.minimum(p, d))):
                        found = np.bincount(exceeded, minlength=len(THRESHOLDS) + 1)
                        pairs[kind, 2 * axis + turn] += found
        if not known_pairs:
            return np.nan
        # Pairs that exceed a threshold exceed all below it: [3, direction, threshold].
        predicted, true, hits = pairs[..., ::-1].cumsum(-1)[..., -2::-1]
        precision = (hits / np.maximum(predicted, 1)).mean(0)
        recall = (hits / np.maximum(true, 1)).mean(0)
        total = precision + recall
        f1 = 2 * precision * recall / np.where(total > 0, total, 1)
        return (f1 * THRESHOLDS).sum() / THRESHOLDS.sum()

    return np.array([one(*arrays) for arrays in _images(pred, target, mask)])


def depth_boundary_errors(pred: np.ndarray, true_edges: np.ndarray) -> dict[str, float]:
    """iBims-1 depth boundary errors of one image, pixels: dbe_acc and dbe_comp (Koch et al., 2018).

    pred: depth [H,W] (any scale; min-max scaled here); true_edges: [H,W], non-zero at edges. Both
    NaN if there is no true edge; 10, the largest, if the prediction has none near one. Needs SciPy
    and scikit-image.
    """
    from scipy import ndimage
    from skimage import feature

    if pred.shape != true_edges.shape or pred.ndim != 2:
        raise ValueError(f"prediction {pred.shape} and edges {true_edges.shape} must be one [H,W]")
    true_edges = true_edges.astype(bool)
    if not true_edges.any():
        return {"dbe_acc": float("nan"), "dbe_comp": float("nan")}
    span = float(np.ptp(pred))
    scaled = (pred - pred.min()).astype(np.float64) / (span or 1.0)
    edges = feature.canny(scaled, sigma=np.sqrt(2), low_threshold=0.15, high_threshold=0.3)
    to_true = ndimage.distance_transform_edt(~true_edges)
    # Without an edge there is nothing to measure to: SciPy would answer with arbitrary numbers.
    to_pred = ndimage.distance_transform_edt(~edges) if edges.any() else np.inf
    to_true, to_pred = np.minimum(to_true, _EDGE_REACH), np.minimum(to_pred, _EDGE_REACH)
    near = edges & (to_true < _EDGE_REACH)
    accuracy = to_true[near].mean() if near.any() else _EDGE_REACH
    distances = (to_true * edges + to_pred * true_edges).sum()
    completeness = distances / (edges.sum() + true_edges.sum())
    return {"dbe_acc": float(accuracy), "dbe_comp": float(completeness)}


def _images(*arrays) -> Iterator[tuple[np.ndarray, ...]]:
    """The images of prediction, depth and mask, [H,W,1] each; ValueError as of `check_maps`."""
    arrays = [np.asarray(array) for array in arrays]
    check_maps(*arrays)
    return zip(*arrays, strict=True)


def _clip(pred: np.ndarray, min_depth: float, max_depth: float) -> np.ndarray:
    return np.clip(pred, max(min_depth, LEAST_DEPTH), max_depth)


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    height, width = shape[:2]
    step = max(1, _BLOCK // width)
    return (slice(first, min(first + step, height)) for first in range(0, height, step))


def _shrink(values: np.ndarray, max_resolution: int) -> np.ndarray:
    """Nearest-neighbour subsampling of [H,W,1] to that longest side, as torch's nn.Upsample."""
    factor = max_resolution / max(values.shape[:2]) if max_resolution else 1
    if factor >= 1:
        return values
    rows, columns = ((np.arange(int(s * factor)) / factor).astype(int) for s in values.shape[:2])
    return values[rows[:, None], columns]
