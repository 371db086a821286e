"""The losses of both stages: pure functions of arrays that return one value per image, float32.

Pixel space: the shift-and-scale-invariant loss and the edge-aware gradient Huber loss, which
together are the Hybrid Depth Loss of D^3epth (Chuang et al., ACML 2025; the second one's form is
our reading, the paper gives its name). Latent space: output and feature distillation.
Predictions and targets are [B,H,W,1] in any float type, masks boolean, True where depth is known;
ValueError for others. A pixel without depth, a sky's for instance, must not be in the mask.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from d3epth_jax.alignment import aligned_residual, masked_mean
from d3epth_jax.typing import Depth, Flags, Latent, Mask, PerImage, check_mask

PENALTIES = ("l1", "trimmed_l1")
IMAGE_WEIGHTS = ("valid", "pixels")

# What a stage does around these functions: which target they see and how images are weighted.
# e2e_compat is E2E-FT (Garcia et al., WACV 2025): metric targets, every valid pixel counts alike,
# so an outdoor frame weighs about ten times an indoor one.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"normalize_target": True, "image_weights": "valid"},
    "e2e_compat": {"normalize_target": False, "image_weights": "pixels"},
}

_PIXELS = (1, 2, 3)


def scale_shift_invariant(
    pred: Depth,
    target: Depth,
    mask: Mask,
    *,
    penalty: str = "l1",
    stop_gradient_alignment: bool = False,
    min_valid: int = 16,
) -> PerImage:
    """Mean absolute residual after the best scale and shift of each image -> [B].

    The fit is least squares and the penalty L1, as in E2E-FT (Garcia et al., 2025); "trimmed_l1"
    drops the largest 20 % of the residuals (MiDaS, Ranftl et al., 2022). An inverted prediction
    scores the same as an upright one: log `negative_scale` of `hybrid_depth`. Images without a fit
    get the mean |d - mean(d)|; `image_weights` leaves them out. ValueError for another penalty.
    """
    _check_penalty(penalty)
    residual, _, _ = aligned_residual(
        pred,
        target,
        mask,
        stop_gradient_alignment=stop_gradient_alignment,
        min_valid=min_valid,
    )
    return _penalize(residual, mask, penalty)


def edge_aware_gradient_huber(
    pred: Depth,
    target: Depth,
    mask: Mask,
    *,
    delta: float = 0.05,
    alpha: float = 5.0,
    tau: float = 0.1,
    num_scales: int = 4,
    stop_gradient_alignment: bool = False,
    min_valid: int = 16,
) -> PerImage:
    """Huber penalty on the gradients of the aligned residual, weighted by true edges -> [B].

    delta: where the penalty, of unit slope, turns from quadratic to linear; alpha: extra weight of
    a true edge (0: none); tau: the step of the target that counts as a full edge; both steps in
    units of the target. num_scales: every 1st, 2nd, 4th, ... pixel. Our reading of D^3epth's
    Edge-aware Gradient Huber loss. ValueError for options out of range.
    """
    _check_edge_options(delta, alpha, tau, num_scales)
    residual, _, _ = aligned_residual(
        pred,
        target,
        mask,
        stop_gradient_alignment=stop_gradient_alignment,
        min_valid=min_valid,
    )
    return _edge_huber(residual, target, mask, delta, alpha, tau, num_scales)


def hybrid_depth(
    pred: Depth,
    target: Depth,
    mask: Mask,
    *,
    penalty: str = "l1",
    delta: float = 0.05,
    alpha: float = 5.0,
    tau: float = 0.1,
    num_scales: int = 4,
    stop_gradient_alignment: bool = False,
    min_valid: int = 16,
) -> dict[str, PerImage | Flags]:
    """Both terms of the Hybrid Depth Loss from one alignment -> {"ssi", "edge", "valid", ...}.

    ssi, edge: [B], as the functions above, unweighted (D^3epth weights them dynamically, see
    `weighting`); valid: bool [B], whether the image may carry a loss; negative_scale: bool [B],
    whether the prediction is upside down (scale < 0), which neither term can see.
    """
    check_options(penalty, delta, alpha, tau, num_scales)
    residual, scale, valid = aligned_residual(
        pred,
        target,
        mask,
        stop_gradient_alignment=stop_gradient_alignment,
        min_valid=min_valid,
    )
    return {
        "ssi": _penalize(residual, mask, penalty),
        "edge": _edge_huber(residual, target, mask, delta, alpha, tau, num_scales),
        "valid": valid,
        "negative_scale": scale < 0,
    }


def latent_distillation(
    pred_latent: Latent,
    target_latent: Latent,
    mask: Bool[Array, "B h w 1"] | None = None,
) -> PerImage:
    """Mean squared error of a latent over its valid cells and all channels -> [B].

    mask: cells, from `targets.latent_mask`; None means all. 0 for an image without a valid cell.
    ValueError for latents of different shapes, a mask of another, or one that is not boolean.
    """
    cells = (*pred_latent.shape[:3], 1)
    if pred_latent.shape != target_latent.shape or (mask is not None and mask.shape != cells):
        shapes = [list(x.shape) for x in (pred_latent, target_latent, mask) if x is not None]
        raise ValueError(f"latents must be [B,h,w,C] alike and their mask [B,h,w,1], not {shapes}")
    if mask is not None:
        check_mask(mask)
    pred, target = pred_latent.astype(jnp.float32), target_latent.astype(jnp.float32)
    if mask is None:
        mask = jnp.ones((*pred.shape[:3], 1), bool)
    error = jnp.where(mask, pred - target, 0) ** 2
    return masked_mean(error.mean(-1, keepdims=True), mask)


def feature_distillation(
    student_features: Sequence[Float[Array, "B ..."]],
    teacher_features: Sequence[Float[Array, "B ..."]],
) -> PerImage:
    """Sum over pairs of MSE(student, teacher) / mean(teacher^2), both per image -> [B].

    Feature distillation of BK-SDM (Kim et al., ECCV 2024); the teacher's power (a constant to the
    gradient) makes layers and teachers comparable. A teacher feature that is all zero divides by 1.
    ValueError if the lists do not pair up, naming every pair of unequal shapes.
    """
    if len(student_features) != len(teacher_features):
        raise ValueError(
            f"{len(student_features)} student features for {len(teacher_features)} teacher features"
        )
    pairs = list(zip(student_features, teacher_features, strict=True))
    problems = [
        f"pair {index}: student {tuple(s.shape)}, teacher {tuple(t.shape)}"
        for index, (s, t) in enumerate(pairs)
        if s.shape != t.shape
    ]
    if problems or not pairs:
        raise ValueError("features to distil: " + ("; ".join(problems) or "no pair given"))
    return sum(_relative_error(student, teacher) for student, teacher in pairs)


def image_weights(mask: Mask, valid: Flags, *, kind: str = "valid") -> PerImage:
    """n_b, the weight of each image in the batch's value, float32 [B]; 0 where not valid.

    kind "valid": each image alike; "pixels": its number of valid pixels (E2E-FT, for metric
    targets). ValueError for another kind.
    """
    check_mask(mask)
    if kind not in IMAGE_WEIGHTS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(IMAGE_WEIGHTS)}")
    weights = mask.sum(_PIXELS) if kind == "pixels" else jnp.ones(valid.shape)
    return jnp.where(valid, weights, 0).astype(jnp.float32)


def batch_sums(losses: PerImage, weights: PerImage) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum n_b L_b, sum n_b), to be added up over micro-batches and devices before dividing.

    An image of weight 0 takes no part whatever its loss is, NaN included; only a prediction that is
    NaN itself still makes the gradient NaN.
    """
    if losses.ndim != 1 or losses.shape != weights.shape:
        raise ValueError(
            f"a loss and a weight for each image, [B], not {losses.shape} and {weights.shape}"
        )
    counted = jnp.where(weights > 0, losses, 0)
    return (weights * counted).sum(), weights.sum()


def batch_mean(losses: PerImage, weights: PerImage) -> Float[Array, ""]:
    """sum n_b L_b / sum n_b of one batch; 0, with zero gradient, if no image carries weight."""
    numerator, denominator = batch_sums(losses, weights)
    return numerator / jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)


def check_options(penalty: str, delta: float, alpha: float, tau: float, num_scales: int) -> None:
    """Raises ValueError as the losses with these options would."""
    _check_penalty(penalty)
    _check_edge_options(delta, alpha, tau, num_scales)


def _check_penalty(penalty: str) -> None:
    if penalty not in PENALTIES:
        raise ValueError(f"unknown penalty {penalty!r}; choose one of {', '.join(PENALTIES)}")


def _check_edge_options(delta: float, alpha: float, tau: float, num_scales: int) -> None:
    problems = [
        text
        for bad, text in (
            (not delta > 0, f"delta must be positive, not {delta}"),
            (not alpha >= 0, f"alpha must not be negative, not {alpha}"),
            (not tau > 0, f"tau must be positive, not {tau}"),
            (not num_scales >= 1, f"num_scales must be at least 1, not {num_scales}"),
        )
        if bad
    ]
    if problems:
        raise ValueError("edge_aware_gradient_huber: " + "; ".join(problems))


def _penalize(residual: Depth, mask: Mask, penalty: str) -> PerImage:
    """Mean |residual| over valid pixels or the smallest 80 % of them; residual is 0 elsewhere."""
    magnitude = jnp.abs(residual)
    if penalty == "l1":
        return masked_mean(magnitude, mask)
    count = mask.sum(_PIXELS)
    kept = count - count // 5
    ordered = jnp.sort(jnp.where(mask, magnitude, jnp.inf).reshape(len(mask), -1), axis=-1)
    smallest = jnp.where(jnp.arange(ordered.shape[-1]) < kept[:, None], ordered, 0)
    return smallest.sum(-1) / jnp.maximum(kept, 1)


def _edge_huber(
    residual: Depth,
    target: Depth,
    mask: Mask,
    delta: float,
    alpha: float,
    tau: float,
    num_scales: int,
) -> PerImage:
    target = jax.lax.stop_gradient(jnp.where(mask, target, 0).astype(jnp.float32))
    total = jnp.zeros(len(mask))
    for scale in range(num_scales):
        r, d, m = (array[:, :: 2**scale, :: 2**scale] for array in (residual, target, mask))
        numerator, denominator = jnp.zeros(len(mask)), jnp.zeros(len(mask))
        for axis in (1, 2):
            edge = jnp.minimum(1, jnp.abs(jnp.diff(d, axis=axis)) / tau)
            # [B,H-1,W,1] or [B,H,W-1,1]; a pair counts where both its pixels are known.
            weight = jnp.where(_both(m, axis), 1 + alpha * edge, 0)
            numerator += (weight * _huber(jnp.diff(r, axis=axis), delta)).sum(_PIXELS)
            denominator += weight.sum(_PIXELS)
        total += numerator / jnp.maximum(denominator, 1)
    return total / num_scales


def _both(mask: Mask, axis: int) -> Bool[Array, "B _ _ 1"]:
    size = mask.shape[axis]
    here = jax.lax.slice_in_dim(mask, 0, max(size - 1, 0), axis=axis)
    return here & jax.lax.slice_in_dim(mask, 1, size, axis=axis)


def _huber(r: Float[Array, "*any"], delta: float) -> Float[Array, "*any"]:
    """Huber's function divided by delta: quadratic near 0, slope 1 in the tail."""
    size = jnp.abs(r)
    return jnp.where(size <= delta, r**2 / (2 * delta), size - delta / 2)


def _relative_error(student: Float[Array, "B ..."], teacher: Float[Array, "B ..."]) -> PerImage:
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    axes = tuple(range(1, teacher.ndim))
    power = jax.lax.stop_gradient((teacher**2).mean(axes))
    return ((student - teacher) ** 2).mean(axes) / jnp.where(power > 1e-12, power, 1)
