"""GroupNorm (Wu and He 2018) with the SiLU that mostly follows it, and their gradient as one.

Both are bound by memory: what counts is how often a map is read and written. Linen's reduces over
space and over a group's channels in one, which is slow on a CPU, and for the SiLU automatic
differentiation keeps arrays as large as the map. Here sums are taken by channel, and the backward
pass computes the rest again from the input and its statistics.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SOME = 8  # every 8th cell of every 8th row


class GroupNorm(nn.Module):
    """x [B, h, w, C] -> [B, h, w, C] in `dtype`, statistics in float32.

    silu: that of the result, in float32 too.
    """

    groups: int
    eps: float
    dtype: Any
    silu: bool = False

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return group_norm(x, scale, bias, self.groups, self.eps, self.dtype, self.silu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(x, scale, bias, groups: int, eps: float, dtype, silu: bool = False):
    """x [B, h, w, C], scale and bias [C] -> [B, h, w, C] in `dtype`. Reverse mode only."""
    return _forward(x, scale, bias, groups, eps, dtype, silu)[0]


def _forward(x, scale, bias, groups, eps, dtype, silu):
    shift, mean, inverse = _statistics(x, groups, eps)
    y = _centred(x, shift, mean) * (inverse * scale) + bias
    if silu:
        y *= jax.nn.sigmoid(y)
    return y.astype(dtype), (x, scale, bias, shift, mean, inverse)


def _statistics(x, groups: int, eps: float):
    """(shift, mean less shift, inverse deviation) of every channel's group, float32 [B, 1, 1, C].

    E[x^2] - E[x]^2 would cancel where the mean is large: x is taken relative to the mean of a few
    of its cells, which leaves one pass over it where sums are fused, and also mean and shift apart.
    """
    shift = x[:, ::SOME, ::SOME].astype(jnp.float32)
    shift = _of_groups(jnp.mean(shift, (1, 2), keepdims=True), groups)
    offset = x.astype(jnp.float32) - shift
    mean, square = (
        _of_groups(jnp.mean(y, (1, 2), keepdims=True), groups) for y in (offset, jnp.square(offset))
    )
    variance = jnp.maximum(square - jnp.square(mean), 0)
    return shift, mean, jax.lax.rsqrt(variance + eps)


def _centred(x, shift, mean):
    return (x.astype(jnp.float32) - shift) - mean


def _of_groups(x, groups: int):
    """Channels' values [B, 1, 1, C] as the means of their groups."""
    means = x.reshape(*x.shape[:-1], groups, -1).mean(-1, keepdims=True)
    return jnp.broadcast_to(means, (*means.shape[:-1], x.shape[-1] // groups)).reshape(x.shape)


def _backward(groups, eps, dtype, silu, kept, cotangent):
    x, scale, bias, shift, mean, inverse = kept
    normal = _centred(x, shift, mean) * inverse
    d_y = cotangent.astype(jnp.float32)
    if silu:
        y = normal * scale + bias
        gate = jax.nn.sigmoid(y)
        d_y *= gate * (1 + y * (1 - gate))
    # Means over space by channel; what is needed of the groups follows from these.
    of_bias = jnp.mean(d_y, (1, 2), keepdims=True)
    of_scale = jnp.mean(d_y * normal, (1, 2), keepdims=True)
    shared, along = (_of_groups(each * scale, groups) for each in (of_bias, of_scale))
    d_x = inverse * (d_y * scale - shared - normal * along)
    cells = x.shape[1] * x.shape[2]
    d_scale, d_bias = (cells * jnp.sum(each, (0, 1, 2)) for each in (of_scale, of_bias))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


group_norm.defvjp(_forward, _backward)
