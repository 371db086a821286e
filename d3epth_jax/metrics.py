"""Depth metrics in metres, per image, and the alignment that comes before them.

The protocol of Marigold (Ke et al., CVPR 2024): fit, clip, measure, average over images. An image
without a valid pixel has metrics NaN, never a silent 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d3epth_jax.alignment import centre, fit_scale_shift, from_space, masked_mean, to_space
from d3epth_jax.typing import Depth, Mask, PerImage

_PIXELS = (1, 2, 3)
_EDGE_REACH = 10.0  # pixels; iBims-1 looks no farther for an edge's counterpart


def compute(
    pred: Depth, target: Depth, mask: Mask, *, min_depth: float, max_depth: float
) -> dict[str, PerImage]:
    """The usual metrics of a prediction already aligned to metres -> {name: [B]}, NaN if no pixel.

    pred, target: metres. The prediction is clipped to the range and to at least 1e-6 m, not
    aligned. Valid: mask and min_depth < target < max_depth; with range 0 to inf the mask decides
    alone. abs_rel, sq_rel [m], rmse [m], rmse_log (ln), log10, delta1..3 (shares below 1.25^i),
    i_rmse [1/m], silog (times 100): Eigen et al., NeurIPS 2014, and the KITTI benchmark.
    """
    mask = _in_range(target, mask, min_depth, max_depth)
    # Both are 1 outside the mask, where every error is 0.
    p = jnp.where(mask, _clip(pred, min_depth, max_depth), 1)
    d = jnp.where(mask, target, 1).astype(jnp.float32)
    empty = ~mask.any(_PIXELS)

    def mean(values: Depth) -> PerImage:
        return jnp.where(empty, jnp.nan, masked_mean(values, mask))

    log_error = jnp.log(p / d)
    ratio = jnp.maximum(p / d, d / p)
    # mean(e^2) - mean(e)^2 cancels for a prediction that is off by a factor only.
    centred, _ = centre(log_error, mask)
    return {
        "abs_rel": mean(jnp.abs(p - d) / d),
        "sq_rel": mean((p - d) ** 2 / d),
        "rmse": jnp.sqrt(mean((p - d) ** 2)),
        "rmse_log": jnp.sqrt(mean(log_error**2)),
        "log10": mean(jnp.abs(log_error)) / np.log(10),
        **{f"delta{i}": mean((ratio < 1.25**i).astype(jnp.float32)) for i in (1, 2, 3)},
        "i_rmse": jnp.sqrt(mean((1 / p - 1 / d) ** 2)),
        "silog": 100 * jnp.sqrt(mean(centred**2)),
    }


def align_to_metric(
    pred: Depth,
    target: Depth,
    mask: Mask,
    *,
    space: str,
    min_depth: float,
    max_depth: float,
    max_resolution: int | None = None,
) -> tuple[Depth, PerImage]:
    """Unconstrained least squares to the ground truth -> (metres, clipped to the range; scale [B]).

    pred: in `space` up to scale and shift; target: metres. The fit is over mask and min_depth <
    target < max_depth; in the disparity spaces also over pred > 0, and the fitted disparity is
    raised to 1e-3 before it is inverted. max_resolution: larger images are fitted on a nearest
    subsampling of that longest side (ETH3D). A negative scale means an inverted prediction; without
    two different predictions it is 0. ValueError for another space.
    """
    fit_mask = _in_range(target, mask, min_depth, max_depth)
    if space != "depth":
        fit_mask &= pred > 0
    # Without its mean a prediction with an offset keeps its digits in `scale * pred + shift`.
    pred = pred.astype(jnp.float32) - masked_mean(pred, fit_mask)[:, None, None, None]
    goal = to_space(target, space)
    small = [_shrink(array, max_resolution) for array in (pred, goal, fit_mask)]
    scale, shift, _ = fit_scale_shift(*small, min_valid=2)
    fitted = scale[:, None, None, None] * pred + shift[:, None, None, None]
    if space != "depth":
        fitted = from_space(jnp.maximum(fitted, 1e-3), space)
    return _clip(fitted, min_depth, max_depth), scale


def boundary_f1(pred: Depth, target: Depth, mask: Mask) -> PerImage:
    """How well depth edges are placed, in [0, 1] -> [B] (Depth Pro, Bochkovskii et al., 2025).

    pred, target: metres, the prediction aligned and clipped. An edge: neighbours whose inverse
    depths differ by more than a factor t; F1 from precision and recall averaged over four
    directions, then averaged over t = 1.05..1.25 with weight t. Unlike upstream, pairs that touch
    an unknown pixel (masked, or of depth 0) are dropped. NaN for an image without a known pair.
    """
    mask = mask & (target > 0)
    inverse = [
        1 / jnp.maximum(jnp.where(mask, x, 1).astype(jnp.float32), 1e-6) for x in (pred, target)
    ]
    known = [_pairs(mask, axis) for axis in (1, 2)]
    known = [near & far for near, far in known]

    def f1(threshold):
        recall, precision = jnp.zeros(len(mask)), jnp.zeros(len(mask))
        for axis, both in zip((1, 2), known, strict=True):
            (p_near, p_far), (d_near, d_far) = (_pairs(x, axis) for x in inverse)
            for p_ratio, d_ratio in (
                (p_far / p_near, d_far / d_near),
                (p_near / p_far, d_near / d_far),
            ):
                p_edge, d_edge = both & (p_ratio > threshold), both & (d_ratio > threshold)
                hits = (p_edge & d_edge).sum(_PIXELS)
                recall += hits / jnp.maximum(d_edge.sum(_PIXELS), 1) / 4
                precision += hits / jnp.maximum(p_edge.sum(_PIXELS), 1) / 4
        total = precision + recall
        return 2 * precision * recall / jnp.where(total > 0, total, 1)

    thresholds = np.linspace(1.05, 1.25, 10, dtype=np.float32)
    scores = jax.lax.map(f1, jnp.asarray(thresholds))  # [10,B]
    score = (scores * (thresholds / thresholds.sum())[:, None]).sum(0)
    measured = known[0].any(_PIXELS) | known[1].any(_PIXELS)
    return jnp.where(measured, score, jnp.nan)


def depth_boundary_errors(pred: np.ndarray, true_edges: np.ndarray) -> dict[str, float]:
    """iBims-1 depth boundary errors of one image, pixels: dbe_acc and dbe_comp (Koch et al., 2018).

    pred: depth [H,W] (any scale; min-max scaled here); true_edges: [H,W], non-zero at edges. Both
    NaN if there is no true edge; 10, the largest, if the prediction has none near one. Needs SciPy
    and scikit-image; NumPy, not jittable.
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


def _in_range(target: Depth, mask: Mask, min_depth: float, max_depth: float) -> Mask:
    return mask & (target > min_depth) & (target < max_depth)


def _clip(pred: Depth, min_depth: float, max_depth: float) -> Depth:
    return jnp.clip(pred.astype(jnp.float32), max(min_depth, 1e-6), max_depth)


def _pairs(values: Float[Array, "B H W 1"] | Mask, axis: int):
    """(near, far): all pairs of neighbours along an axis."""
    size = values.shape[axis]
    near = jax.lax.slice_in_dim(values, 0, size - 1, axis=axis)
    return near, jax.lax.slice_in_dim(values, 1, size, axis=axis)


def _shrink(values: Float[Array, "B H W 1"] | Mask, max_resolution: int | None):
    """Nearest-neighbour subsampling until the longest side is at most `max_resolution`."""
    factor = max(values.shape[1:3]) / (max_resolution or max(values.shape[1:3]))
    if factor <= 1:
        return values
    rows, columns = (
        (np.arange(int(size / factor)) * factor).astype(int) for size in values.shape[1:3]
    )
    return values[:, rows][:, :, columns]
