"""The layers of Stable Diffusion's UNet and KL autoencoder, NHWC.

Every numeric detail that a port can get wrong is one named constant or function here (METHOD 1),
so that tests/test_models_broken.py can break each on purpose and see parity fail.
Computation is in `dtype`, whatever type parameters have, but norms' statistics and softmax are
float32.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax.models.attention import attention
from d3epth_jax.models.convolution import ABSENT, conv
from d3epth_jax.models.group_norm import GroupNorm

TRANSFORMER_NORM_EPS = 1e-6  # GroupNorm before a transformer; ResNets have the config's norm_eps
LAYER_NORM_EPS = 1e-5
VAE_NORM_EPS = 1e-6  # everywhere in the KL autoencoder
MAX_PERIOD = 10_000.0  # of the sinusoidal time embedding


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by the error function; the tanh approximation differs by up to 5e-4.

    By erf, as torch does: jax.nn.gelu's complementary error function takes longer on a CPU.
    Float32 inside, since 1 + erf cancels where x is far below 0.
    """
    return (x * _below(x.astype(jnp.float32))).astype(x.dtype)


def _below(x):
    """The standard normal distribution's probability of less than x, float32."""
    return (1 + jax.lax.erf(x * (1 / math.sqrt(2)))) / 2


def group_norm(name: str, groups: int, eps: float, dtype: Any, *, silu: bool = False) -> GroupNorm:
    return GroupNorm(groups, eps, dtype, silu, name=name)


class LayerNorm(nn.Module):
    """Over the channels [..., C], statistics in float32.

    Linen's multiplies the scale with the inverse deviation first: an array as large as x, which on
    a CPU is written and read for nothing.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale, bias = (self.param(name, ABSENT, x.shape[-1:]) for name in ("scale", "bias"))
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, -1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + LAYER_NORM_EPS)
        return (x * scale + bias).astype(self.dtype)


def dense(name: str, features: int, dtype: Any, *, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=ABSENT, name=name)


def check_latent(what: str, x: jax.Array, channels: int) -> None:
    """Raises ValueError unless x is [B, h, w, channels]."""
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"{what} has shape {x.shape}, expected [B, height, width, {channels}]")


def check_image(what: str, image: jax.Array, channels: int, multiple: int) -> None:
    """`check_latent`, and ValueError unless both sides are multiples of a latent's cell."""
    check_latent(f"{what}: image", image, channels)
    if any(side % multiple for side in image.shape[1:3]):
        raise ValueError(
            f"{what}: an image of {image.shape[1]} x {image.shape[2]} pixels; both sides must be"
            f" multiples of {multiple}: pad it"
        )


def timestep_embedding(
    timestep: jax.Array, dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> jax.Array:
    """Sinusoidal embedding of timesteps, [B] -> float32 [B, dim], cosines first if flipped.

    `dim` is even; frequencies fall from 1 to 1/10000 (Vaswani et al. 2017, as in DDPM).
    """
    half = dim // 2
    exponent = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponent / np.float32(half - freq_shift))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)


class TimeEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoidal embedding, [B, C] -> [B, features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = nn.silu(dense("linear_1", self.features, self.dtype)(x))
        return dense("linear_2", self.features, self.dtype)(x)


class ResnetBlock(nn.Module):
    """Pre-norm residual block with the time embedding added between its two convolutions.

    x [B, h, w, Cin], temb [1 or B, T] with its SiLU already applied, or None in an autoencoder
    -> [B, h, w, features].
    """

    features: int
    groups: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, temb=None):
        h = group_norm("norm1", self.groups, self.eps, self.dtype, silu=True)(x)
        h = conv("conv1", self.features, self.dtype)(h)
        if temb is not None:
            shift = dense("time_emb_proj", self.features, self.dtype)(temb)
            h += shift[:, None, None]
        h = group_norm("norm2", self.groups, self.eps, self.dtype, silu=True)(h)
        h = conv("conv2", self.features, self.dtype)(h)
        if x.shape[-1] != self.features:
            x = conv("conv_shortcut", self.features, self.dtype, kernel_size=1)(x)
        return x + h


def project_and_attend(
    x: jax.Array,
    context: jax.Array,
    *,
    heads: int,
    dtype: Any,
    implementation: str,
    use_bias: bool = False,
) -> jax.Array:
    """Multi-head attention from x [B, N, C] to context [1 or B, M, D], with its projections.

    Called from a compact module, whose the projections become. `implementation`: of `attention`.
    `use_bias`: of to_q, to_k, to_v.
    """
    batch, tokens, channels = x.shape

    def project(name, inputs):
        y = dense(name, channels, dtype, use_bias=use_bias)(inputs)
        y = y.reshape(*y.shape[:2], heads, channels // heads)
        # A prompt shared by the batch is projected once.
        return jnp.broadcast_to(y, (batch, *y.shape[1:]))

    q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
    shared = context.shape[0] < batch
    out = attention(q, k, v, implementation=implementation, shared=shared)
    return dense("to_out_0", channels, dtype)(out.reshape(batch, tokens, channels))


class Attention(nn.Module):
    """Multi-head attention from x [B, N, C] to context [1 or B, M, D]."""

    heads: int
    dtype: Any
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x, context):
        settings = {name: getattr(self, name) for name in ("heads", "dtype", "implementation")}
        return project_and_attend(x, context, **settings)


def collapses(channels: int, heads: int, tokens: int) -> bool:
    """Whether attention to so few fixed tokens is cheaper as two products than with q and to_out.

    Multiplications per cell and channel: heads * (tokens - 1) twice, against channels + tokens.
    """
    return heads * (tokens - 1) < channels + tokens


class CollapsedAttention(nn.Module):
    """Attention from x [B, N, C] to `tokens` fixed ones, whose keys and values are in the kernels.

    Scores are taken relative to token 0, whose value is in to_out's bias: of two tokens what
    remains is a sigmoid. Made from Attention's parameters by weights/fold.py.
    """

    heads: int
    tokens: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        others = self.tokens - 1
        scores = dense("to_scores", self.heads * others, self.dtype, use_bias=False)(x)
        scores = scores.astype(jnp.float32)
        if others == 1:
            weights = nn.sigmoid(scores)
        else:
            scores = scores.reshape(*x.shape[:2], self.heads, others)
            scores = jnp.pad(scores, [(0, 0)] * 3 + [(1, 0)])
            weights = jax.nn.softmax(scores, axis=-1)[..., 1:].reshape(*x.shape[:2], -1)
        return dense("to_out_0", x.shape[-1], self.dtype)(weights.astype(self.dtype))


class Geglu(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020), [M, C] -> [M, features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return gated(*DenseHalves(self.features, self.dtype, name="proj")(x))


class DenseHalves(nn.Module):
    """A dense layer [M, C] -> [M, 2 * features] whose halves are computed apart.

    One array of both would be written only to be read in halves, which on a CPU takes longer than
    the product.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1], 2 * self.features
        kernel = self.param("kernel", ABSENT, shape).astype(self.dtype)
        bias = self.param("bias", ABSENT, shape[1:]).astype(self.dtype)
        halves = zip(jnp.split(kernel, 2, -1), jnp.split(bias, 2), strict=True)
        return [x.astype(self.dtype) @ half + offset for half, offset in halves]


@jax.custom_vjp
def gated(value: jax.Array, gate: jax.Array) -> jax.Array:
    """value * gelu(gate), with the gradient written out: JAX's own takes longer on a CPU.

    Reverse mode only, as `attention`: `jax.jvp` raises TypeError.
    """
    return value * gelu(gate)


def _gated_forward(value, gate):
    return gated(value, gate), (value, gate)


def _gated_backward(kept, cotangent):
    value, gate = (x.astype(jnp.float32) for x in kept)
    below = _below(gate)
    density = jnp.exp(-jnp.square(gate) / 2) / math.sqrt(2 * math.pi)
    d_value, d_gate = cotangent * gate * below, cotangent * value * (below + gate * density)
    return d_value.astype(cotangent.dtype), d_gate.astype(cotangent.dtype)


gated.defvjp(_gated_forward, _gated_backward)


class FeedForward(nn.Module):
    """Four times as wide inside, [..., C] -> [..., C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        # As one matrix: XLA's gradients of products with more dimensions are slower on a CPU.
        h = x.reshape(-1, x.shape[-1])
        h = Geglu(4 * x.shape[-1], self.dtype, name="net_0")(h)
        return dense("net_2", x.shape[-1], self.dtype)(h).reshape(x.shape)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt [1 or B, M, D], feed-forward; x [B, N, C].

    attention: its implementation.
    folded_tokens: of a prompt that is folded into the parameters; 0: it is not.
    """

    heads: int
    dtype: Any
    attention: str = "auto"
    folded_tokens: int = 0

    @nn.compact
    def __call__(self, x, prompt):
        h = LayerNorm(self.dtype, name="norm1")(x)
        x += Attention(self.heads, self.dtype, self.attention, name="attn1")(h, h)
        h = LayerNorm(self.dtype, name="norm2")(x)
        tokens = self.folded_tokens
        if tokens and collapses(x.shape[-1], self.heads, tokens):
            x += CollapsedAttention(self.heads, tokens, self.dtype, name="attn2")(h)
        else:
            x += Attention(self.heads, self.dtype, self.attention, name="attn2")(h, prompt)
        h = LayerNorm(self.dtype, name="norm3")(x)
        return x + FeedForward(self.dtype, name="ff")(h)


class SpatialTransformer(nn.Module):
    """A transformer block over the cells of x [B, h, w, C].

    Returns x plus the block's projection, and that projection alone (proj_out's output), which
    BK-SDM distils as a feature.
    """

    heads: int
    groups: int
    linear: bool
    dtype: Any
    attention: str = "auto"
    folded_tokens: int = 0

    @nn.compact
    def __call__(self, x, prompt):
        batch, height, width, channels = x.shape

        def project(name):
            if self.linear:
                return dense(name, channels, self.dtype)
            return conv(name, channels, self.dtype, kernel_size=1)

        h = group_norm("norm", self.groups, TRANSFORMER_NORM_EPS, self.dtype)(x)
        h = project("proj_in")(h).reshape(batch, height * width, channels)
        settings = (self.heads, self.dtype, self.attention, self.folded_tokens)
        block = TransformerBlock(*settings, name="transformer_blocks_0")
        h = block(h, prompt)
        h = project("proj_out")(h.reshape(batch, height, width, channels))
        return x + h, h
