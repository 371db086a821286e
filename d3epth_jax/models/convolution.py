"""Convolutions and changes of size as layers, NHWC.

Numeric details are named here as in layers.py (METHOD 1), for tests to break on purpose.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax.models.convolve import convolve, weave

DOWNSAMPLE_PADDING = ((1, 1), (1, 1))
VAE_DOWNSAMPLE_PADDING = ((0, 1), (0, 1))
# Random parameters are depth_model.init_params' business: Linen is only asked for shapes, and
# tracing its own initialisers would take a third of that.
ABSENT = nn.initializers.zeros


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
        kernel_init=ABSENT,
        conv_general_dilated=convolve,
        name=name,
    )


def upsample_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Doubles [B, h, w, C] by repetition and cuts it to `size` (at most 2h, 2w).

    Where a skip is odd this equals torch's nearest interpolation to that size; `jax.image.resize`
    samples at half-pixel centres and does not.
    """
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x[:, : size[0], : size[1]]


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
        _, height, width, channels = x.shape
        shape = (2, 2, 2, 2, channels, self.features)
        kernel = self.param("kernel", ABSENT, shape)
        x = x.astype(self.dtype)
        bias = 0
        if self.use_bias:
            bias = self.param("bias", ABSENT, (self.features,)).astype(self.dtype)
        if size != (2 * height, 2 * width):
            x = upsample_nearest(x, size)
            # In float32: differences of rounded sums would be rounded worse than the kernel.
            kernel = whole_kernel(kernel.astype(jnp.float32)).astype(self.dtype)
            return convolve(x, kernel, (1, 1), ((1, 1), (1, 1))) + bias
        kernel = kernel.astype(self.dtype)
        return weave(
            [
                [convolve(x, kernel[a, b], (1, 1), ((1 - a, a), (1 - b, b))) + bias for b in (0, 1)]
                for a in (0, 1)
            ]
        )


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
