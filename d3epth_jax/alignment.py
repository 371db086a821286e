"""Closed-form scale and shift between two depth maps, and the spaces depth is predicted in."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from d3epth_jax.typing import Depth, Flags, Mask, PerImage, check_maps

SPACES = ("depth", "disparity", "sqrt_disparity")
_PIXELS = (1, 2, 3)


def to_space(depth: Depth, space: str) -> Depth:
    """Depth in metres -> depth, disparity 1/d or square-root disparity 1/sqrt(d).

    Depth grows with distance, the disparities fall; the square root is DepthMaster's (Song et al.,
    2025). Where depth is not above zero (or is NaN) a disparity is 0, with zero gradient.
    ValueError for another space.
    """
    if _known(space) == "depth":
        return depth.astype(jnp.float32)
    return _where_positive(depth, lambda d: 1 / d if space == "disparity" else 1 / jnp.sqrt(d))


def from_space(values: Depth, space: str) -> Depth:
    """The inverse of `to_space`: back to depth, 0 where a disparity is not above zero."""
    if _known(space) == "depth":
        return values.astype(jnp.float32)
    return _where_positive(values, lambda v: 1 / v if space == "disparity" else (1 / v) ** 2)


def _known(space: str) -> str:
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r}; choose one of {', '.join(SPACES)}")
    return space


def _where_positive(values: Depth, function: Callable[[Depth], Depth]) -> Depth:
    values = values.astype(jnp.float32)
    positive = values > 0
    # The inner `where` keeps the division, and so its gradient, finite where it is not used.
    return jnp.where(positive, function(jnp.where(positive, values, 1)), 0)


def masked_mean(values: Float[Array, "B h w 1"], mask: Bool[Array, "B h w 1"]) -> PerImage:
    """Mean over the valid pixels (or cells) of each image, float32; 0 where there are none."""
    values = jnp.where(mask, values, 0).astype(jnp.float32)
    count = mask.sum(_PIXELS)  # an integer: float32 cannot count past 2^24
    return values.sum(_PIXELS) / jnp.maximum(count, 1)


def centre(values: Depth, mask: Mask, stop_gradient: bool = False) -> tuple[Depth, PerImage]:
    """(values less their masked mean, that mean); 0 outside the mask.

    Twice: the first mean of large values is rounded, the mean of the small rest is not.
    """
    values = values.astype(jnp.float32)
    constant = jax.lax.stop_gradient if stop_gradient else lambda x: x
    first = constant(masked_mean(values, mask))
    rest = values - first[:, None, None, None]
    second = constant(masked_mean(rest, mask))
    return jnp.where(mask, rest - second[:, None, None, None], 0), first + second


def fit_scale_shift(
    pred: Depth, target: Depth, mask: Mask, *, min_valid: int = 16
) -> tuple[PerImage, PerImage, Flags]:
    """Least squares: the (scale, shift) of each image minimising sum mask (scale p + shift - d)^2.

    Masked pixels never matter, NaN and Inf included. valid is False with fewer than `min_valid`
    pixels or where prediction or target is constant; a constant prediction has scale 0 and shift
    mean(d). Gradients are finite everywhere if the unmasked predictions and targets are. ValueError
    for other shapes than [B,H,W,1] alike, and for a mask that is not boolean.
    """
    check_maps(pred, target, mask)
    centred, mean = centre(pred, mask)
    centred_target, mean_target = centre(target, mask)
    scale, valid = _fit(pred, centred, target, centred_target, mask, min_valid)
    return scale, mean_target - scale * mean, valid


def aligned_residual(
    pred: Depth,
    target: Depth,
    mask: Mask,
    *,
    stop_gradient_alignment: bool = False,
    min_valid: int = 16,
) -> tuple[Depth, PerImage, Flags]:
    """(residual, scale, valid): scale p + shift - d at the best fit, float32, 0 outside the mask.

    Formed as scale p' - d' from centred values: `scale p + shift - d` would cancel where an offset
    is large against the spread. `stop_gradient_alignment` makes scale and shift constants to the
    gradient. Without a fit the scale is 0 and the residual is the honest mean(d) - d. ValueError as
    of `fit_scale_shift`.

    An image with an unmasked target that is NaN or infinite, as a sky's, has a residual of NaN, is
    not valid, and has no gradient. One with such a prediction has a gradient of NaN, to be noticed.
    """
    check_maps(pred, target, mask)
    known = jnp.isfinite(target)
    measured = (known | ~mask).all(_PIXELS)
    centred, _ = centre(pred, mask, stop_gradient_alignment)
    centred_target, _ = centre(jnp.where(known, target, 0), mask)
    scale, valid = _fit(pred, centred, target, centred_target, mask, min_valid)
    if stop_gradient_alignment:
        scale = jax.lax.stop_gradient(scale)
    residual = scale[:, None, None, None] * centred - centred_target
    residual = jnp.where(measured[:, None, None, None], residual, jnp.nan)
    return residual, scale, valid & measured


def _fit(
    pred: Depth,
    centred: Depth,
    target: Depth,
    centred_target: Depth,
    mask: Mask,
    min_valid: int,
) -> tuple[PerImage, Flags]:
    """(scale, valid); the scale is 0 wherever the prediction does not determine it."""
    fits = (mask.sum(_PIXELS) >= min_valid) & _varies(pred, centred, mask)
    product, power = (centred * centred_target).sum(_PIXELS), (centred**2).sum(_PIXELS)
    scale = jnp.where(fits, product / jnp.where(fits, power, 1), 0)
    return scale, fits & _varies(target, centred_target, mask)


def _varies(values: Depth, centred: Depth, mask: Mask) -> Flags:
    """Whether the variance exceeds what float32 rounding of the values could have left behind."""
    variance = masked_mean(centred**2, mask)
    floor = (1e-6 * masked_mean(jnp.abs(values), mask)) ** 2 + 1e-12
    return variance > floor
