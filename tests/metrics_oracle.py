"""METHOD 10 again, in float64 and by other means: what the package's evaluation is held against.

Written from the published formulas, one image at a time: valid pixels as vectors, the design matrix
and `lstsq` for the fit, whole images instead of blocks, pair by pair for the boundaries.
"""

import math

import numpy as np
from scipy import ndimage
from skimage import feature

# name: (low, high) of valid depth, clip, mask corner (top, bottom, left, right), fit resolution
ROWS = {
    "nyu": ((1e-3, 10), (1e-3, 10), lambda h, w: (45, 471, 41, 601), None),
    "kitti": (
        (1e-5, 80),
        (1e-5, 80),
        lambda h, w: tuple(
            math.floor(f * s)
            for f, s in ((0.3324324, h), (0.91351351, h), (0.0359477, w), (0.96405229, w))
        ),
        None,
    ),
    "eth3d": ((1e-5, math.inf), (1e-5, math.inf), None, 1024),
    "scannet": ((1e-3, 10), (1e-3, 10), None, None),
    "diode": ((0, math.inf), (0.6, 350), None, None),
    "ibims": ((1e-3, 50), (1e-3, 50), None, None),
    "hypersim": ((1e-5, 65), (1e-5, 65), None, None),
    "default": ((1e-3, 80), (1e-3, 80), None, None),
}


def valid(name, depth, mask):
    """The pixels [H,W] that a protocol counts."""
    (low, high), _, corner, _ = ROWS[name]
    counted = mask & np.greater(depth, low) & np.less(depth, high)
    if corner:
        y, x = np.indices(depth.shape)
        top, bottom, left, right = corner(*depth.shape)
        counted &= (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return counted


def align(pred, depth, counted, space, clip, resolution=None):
    """(metres [H,W], scale) of one image [H,W]."""
    pred, depth = pred.astype(np.float64), depth.astype(np.float64)
    to, back = {
        "depth": (lambda d: d, lambda v: v),
        "disparity": (lambda d: 1 / d, lambda v: 1 / np.maximum(v, 1e-3)),
        "sqrt_disparity": (lambda d: np.sqrt(1 / d), lambda v: 1 / np.maximum(v, 1e-3) ** 2),
    }[space]
    fit = counted & (pred > 0) if space != "depth" else counted.copy()
    if resolution and max(pred.shape) > resolution:
        ratio = max(pred.shape) / resolution
        sampled = np.zeros_like(fit)
        for i in range(int(pred.shape[0] / ratio)):
            for j in range(int(pred.shape[1] / ratio)):
                sampled[int(i * ratio), int(j * ratio)] = True
        fit &= sampled
    offset = pred[fit].mean()  # the same line, better conditioned
    design = np.column_stack([pred[fit] - offset, np.ones(fit.sum())])
    (scale, shift), *_ = np.linalg.lstsq(design, to(depth[fit]), rcond=None)
    metres = back(scale * (pred - offset) + shift)
    return np.clip(np.clip(metres, *clip), 1e-6, None), scale


def metrics(metres, depth, counted):
    p, d = metres[counted].astype(np.float64), depth[counted].astype(np.float64)
    e = np.log(p) - np.log(d)
    worst = np.maximum(p / d, d / p)
    return {
        "abs_rel": np.mean(np.abs(p - d) / d),
        "sq_rel": np.mean((p - d) ** 2 / d),
        "rmse": np.sqrt(np.mean((p - d) ** 2)),
        "rmse_log": np.sqrt(np.mean(e**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(d))),
        "delta1": np.mean(worst < 1.25),
        "delta2": np.mean(worst < 1.25**2),
        "delta3": np.mean(worst < 1.25**3),
        "i_rmse": np.sqrt(np.mean((1 / p - 1 / d) ** 2)),
        "silog": 100 * np.std(e),
    }


def boundary_f1(metres, depth, counted):
    """Whole images, each of four directions and each threshold by itself."""
    p, d = (1 / np.where(counted, x, 1).astype(np.float64) for x in (metres, depth))
    here = {
        "right": (np.s_[:, :-1], np.s_[:, 1:]),
        "left": (np.s_[:, 1:], np.s_[:, :-1]),
        "down": (np.s_[:-1], np.s_[1:]),
        "up": (np.s_[1:], np.s_[:-1]),
    }
    thresholds = np.linspace(1.05, 1.25, 10)
    scores = []
    for t in thresholds:
        precision, recall = [], []
        for a, b in here.values():
            both = counted[a] & counted[b]
            of_p, of_d = both & (p[b] / p[a] > t), both & (d[b] / d[a] > t)
            hits = np.count_nonzero(of_p & of_d)
            precision.append(hits / max(np.count_nonzero(of_p), 1))
            recall.append(hits / max(np.count_nonzero(of_d), 1))
        a, b = np.mean(precision), np.mean(recall)
        scores.append(2 * a * b / (a + b) if a + b else 0.0)
    return np.average(scores, weights=thresholds)


def boundary_errors(metres, edges):
    scaled = (metres - metres.min()) / (metres.max() - metres.min())
    found = feature.canny(scaled, np.sqrt(2), 0.15, 0.3)
    to_true = ndimage.distance_transform_edt(~edges)
    near = to_true[found & (to_true < 10)]
    to_found = ndimage.distance_transform_edt(~found) if found.any() else np.full(found.shape, 99.0)
    total = np.minimum(to_true[found], 10).sum() + np.minimum(to_found[edges], 10).sum()
    return {
        "dbe_acc": near.mean() if near.size else 10.0,
        "dbe_comp": total / (found.sum() + edges.sum()),
    }


def score(name, pred, sample, space):
    """Everything of one prediction [H,W] under the protocol `name`."""
    depth, mask = sample["depth"][..., 0], sample["mask"][..., 0]
    _, clip, _, resolution = ROWS[name]
    counted = valid(name, depth, mask)
    metres, scale = align(pred, depth, counted, space, clip, resolution)
    scores = metrics(metres, depth, counted) | {
        "boundary_f1": boundary_f1(metres, depth, counted),
        "negative_scale": float(scale < 0),
    }
    return scores | (boundary_errors(metres, sample["edges"][..., 0]) if "edges" in sample else {})
