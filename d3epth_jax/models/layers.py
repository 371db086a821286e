"""The layers of Stable Diffusion's UNet and KL autoencoder, NHWC.

Every numeric detail that a port can get wrong is one named constant or function here (METHOD 1),
so that tests/test_models_broken.py can break each on purpose and see parity fail.
Parameters are float32 and computation is in `dtype`, but norms' statistics and softmax are float32.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax.models.attention import attention

TRANSFORMER_NORM_EPS = 1e-6  # GroupNorm before a transformer; ResNets have the config's norm_eps
LAYER_NORM_EPS = 1e-5
VAE_NORM_EPS = 1e-6  # everywhere in the KL autoencoder
DOWNSAMPLE_PADDING = ((1, 1), (1, 1))
VAE_DOWNSAMPLE_PADDING = ((0, 1), (0, 1))
MAX_PERIOD = 10_000.0  # of the sinusoidal time embedding
# Random parameters are depth_model.init_params' business: Linen is only asked for shapes, and
# tracing its own initialisers would take a third of that.
_ABSENT = nn.initializers.zeros
_NHWC = ("NHWC", "HWIO", "NHWC")


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by the error function; the tanh approximation differs by up to 5e-4."""
    return jax.nn.gelu(x, approximate=False)


def group_norm(name: str, groups: int, eps: float, dtype: Any) -> nn.GroupNorm:
    # The two-pass variance: E[x^2] - E[x]^2 cancels where the mean is large.
    return nn.GroupNorm(groups, epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def layer_norm(name: str, dtype: Any) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=dtype, use_fast_variance=False, name=name)


def conv(
    name: str,
    features: int,
    dtype: Any,
    *,
    kernel_size: int = 3,
    strides: int = 1,
    padding: tuple | None = None,
    use_bias: bool = True,
) -> nn.Conv:
    """A convolution; by default its padding keeps the size."""
    pad = kernel_size // 2
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=strides,
        padding=padding or ((pad, pad), (pad, pad)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=_ABSENT,
        conv_general_dilated=_convolve,
        name=name,
    )


def dense(name: str, features: int, dtype: Any, *, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=_ABSENT, name=name)


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


def upsample_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Doubles [B, h, w, C] by repetition and cuts it to `size` (at most 2h, 2w).

    Where a skip is odd this equals torch's nearest interpolation to that size; `jax.image.resize`
    samples at half-pixel centres and does not.
    """
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x[:, : size[0], : size[1]]


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
        h = nn.silu(group_norm("norm1", self.groups, self.eps, self.dtype)(x))
        h = conv("conv1", self.features, self.dtype)(h)
        if temb is not None:
            shift = dense("time_emb_proj", self.features, self.dtype)(temb)
            h += shift[:, None, None]
        h = nn.silu(group_norm("norm2", self.groups, self.eps, self.dtype)(h))
        h = conv("conv2", self.features, self.dtype)(h)
        if x.shape[-1] != self.features:
            x = conv("conv_shortcut", self.features, self.dtype, kernel_size=1)(x)
        return x + h


def project_and_attend(
    x: jax.Array, context: jax.Array, *, heads: int, dtype: Any, use_bias: bool = False
) -> jax.Array:
    """Multi-head attention from x [B, N, C] to context [1 or B, M, D], with its projections.

    Called from a compact module, whose the projections become. `use_bias`: of to_q, to_k, to_v.
    """
    batch, tokens, channels = x.shape

    def project(name, inputs):
        y = dense(name, channels, dtype, use_bias=use_bias)(inputs)
        y = y.reshape(*y.shape[:2], heads, channels // heads)
        # A prompt shared by the batch is projected once.
        return jnp.broadcast_to(y, (batch, *y.shape[1:]))

    out = attention(project("to_q", x), project("to_k", context), project("to_v", context))
    return dense("to_out_0", channels, dtype)(out.reshape(batch, tokens, channels))


class Attention(nn.Module):
    """Multi-head attention from x [B, N, C] to context [1 or B, M, D]."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, context):
        return project_and_attend(x, context, heads=self.heads, dtype=self.dtype)


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
    """Gated linear unit with GELU (Shazeer 2020), [..., C] -> [..., features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = dense("proj", 2 * self.features, self.dtype)(x)
        value, gate = jnp.split(x, 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    """Four times as wide inside, [..., C] -> [..., C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = Geglu(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return dense("net_2", x.shape[-1], self.dtype)(h)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt [1 or B, M, D], feed-forward; x [B, N, C].

    folded_tokens: of a prompt that is folded into the parameters; 0: it is not.
    """

    heads: int
    dtype: Any
    folded_tokens: int = 0

    @nn.compact
    def __call__(self, x, prompt):
        h = layer_norm("norm1", self.dtype)(x)
        x += Attention(self.heads, self.dtype, name="attn1")(h, h)
        h = layer_norm("norm2", self.dtype)(x)
        tokens = self.folded_tokens
        if tokens and collapses(x.shape[-1], self.heads, tokens):
            x += CollapsedAttention(self.heads, tokens, self.dtype, name="attn2")(h)
        else:
            x += Attention(self.heads, self.dtype, name="attn2")(h, prompt)
        h = layer_norm("norm3", self.dtype)(x)
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
        block = TransformerBlock(
            self.heads, self.dtype, self.folded_tokens, name="transformer_blocks_0"
        )
        h = block(h, prompt)
        h = project("proj_out")(h.reshape(batch, height, width, channels))
        return x + h, h


class Downsample(nn.Module):
    """Strided convolution, [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), C]."""

    dtype: Any
    padding: tuple | None = None  # None: the UNet's

    @nn.compact
    def __call__(self, x):
        padding = self.padding or DOWNSAMPLE_PADDING
        return conv("conv", x.shape[-1], self.dtype, strides=2, padding=padding)(x)


def upsample_conv(
    x: jax.Array,
    size: tuple[int, int],
    name: str,
    features: int,
    dtype: Any,
    *,
    phases: bool,
    use_bias: bool = True,
) -> jax.Array:
    """Nearest upsampling to `size` (at most twice x's) and a 3x3 convolution, called `name`.

    Called from a compact module. `phases`: computed as PhaseConv, from its kernel.
    """
    if phases:
        return PhaseConv(features, dtype, use_bias, name=name)(x, size)
    return conv(name, features, dtype, use_bias=use_bias)(upsample_nearest(x, size))


class Upsample(nn.Module):
    """`upsample_conv` without a change of channels."""

    dtype: Any
    phases: bool

    @nn.compact
    def __call__(self, x, size):
        return upsample_conv(x, size, "conv", x.shape[-1], self.dtype, phases=self.phases)


class PhaseConv(nn.Module):
    """Nearest upsampling and a 3x3 convolution in one: four 2x2 convolutions at low resolution.

    An output cell sees two rows and two columns of x, which depend on whether its row and column
    are even; kernel [2, 2, 2, 2, Cin, Cout] has the taps of each case (`phase_kernel`). 4/9 of the
    multiplications. Where `size` cuts the last row or column off, its neighbour sees padding
    instead: there the 3x3 form is computed.
    """

    features: int
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, size):
        batch, height, width, channels = x.shape
        shape = (2, 2, 2, 2, channels, self.features)
        kernel = self.param("kernel", _ABSENT, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if size == (2 * height, 2 * width):
            phases = [
                [_convolve(x, kernel[a, b], (1, 1), ((1 - a, a), (1 - b, b))) for b in (0, 1)]
                for a in (0, 1)
            ]
            # [B, h, 2, w, 2, C]
            y = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)
            y = y.reshape(batch, *size, self.features)
        else:
            y = _convolve(upsample_nearest(x, size), whole_kernel(kernel), (1, 1), ((1, 1), (1, 1)))
        if self.use_bias:
            y += self.param("bias", _ABSENT, (self.features,)).astype(self.dtype)
        return y


def phase_kernel(kernel):
    """A 3x3 kernel [3, 3, Cin, Cout] as PhaseConv's: taps that meet the same cell are added."""
    xp = np if isinstance(kernel, np.ndarray) else jnp

    def split(k):
        # An even row sees the row before and, twice, its own; an odd one its own twice, and the
        # next.
        return xp.stack([xp.stack([k[0], k[1] + k[2]]), xp.stack([k[0] + k[1], k[2]])])

    rows = split(kernel)  # [a, row, 3, Cin, Cout]
    both = split(xp.moveaxis(rows, 2, 0))  # [b, column, a, row, Cin, Cout]
    return xp.transpose(both, (2, 0, 3, 1, 4, 5))


def whole_kernel(kernel):
    """The inverse of `phase_kernel`."""

    def join(k):
        return jnp.stack([k[0, 0], k[1, 0] - k[0, 0], k[1, 1]])

    rows = join(jnp.transpose(kernel, (0, 2, 1, 3, 4, 5)))  # [3, b, column, Cin, Cout]
    return jnp.moveaxis(join(jnp.moveaxis(rows, 0, 2)), 1, 0)


# XLA's convolutions on a CPU rearrange the kernel at each call, which is most of their time where
# a wide kernel meets a small map: there the product with all patches takes 0.3 to 0.9 of it.
PATCHES_MAX_CELLS, PATCHES_MIN_CHANNELS = 512, 1024


def _convolve(x, kernel, strides, padding, *, dimension_numbers=_NHWC, **options):
    """`lax.conv_general_dilated` of NHWC and HWIO, in the form that is fast where it runs."""
    taps = kernel.shape[:2]
    height, width = (
        (side + sum(pad) - size) // stride + 1
        for side, pad, size, stride in zip(x.shape[1:3], padding, taps, strides, strict=True)
    )
    small = x.shape[0] * height * width <= PATCHES_MAX_CELLS
    wide = kernel.shape[2] >= PATCHES_MIN_CHANNELS
    plain = all(value in (None, 1, (1, 1)) for value in options.values())  # no dilation, no groups
    if not (small and wide and plain and jax.default_backend() == "cpu"):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=dimension_numbers, **options
        )
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, right = strides
    patches = [
        x[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
        for i in range(taps[0])
        for j in range(taps[1])
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])
