"""`lax.conv_general_dilated` and its gradients, each in the form that is fast where it runs."""

import functools
import math

import jax
import jax.numpy as jnp

from d3epth_jax.models import winograd

NHWC = ("NHWC", "HWIO", "NHWC")
_plain = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=NHWC)
REWRITTEN_ON = {"cpu"}  # backends
# Where the product with all patches is faster: ranges (at least, at most) of cells of the output,
# channels in and channels out. XLA rearranges the kernel at each call, which is most of the time
# where a wide kernel meets a small map, and it is slow from a picture's channels to a few dozen.
PATCHES = {
    "wide": ((1, 512), (1024, None), (1, None)),
    "picture": ((1, 2**19), (1, 4), (1, 32)),
}
# Minimal filtering is faster from so many channels: with fewer its additions take what its products
# save. Below so many multiplications it saves little, and XLA takes a fifth of a second for each.
WINOGRAD_CHANNELS_MIN = 256
WINOGRAD_MACS_MIN = 10**10


def convolve(x, kernel, strides, padding, *, dimension_numbers=NHWC, **options):
    """`lax.conv_general_dilated` of NHWC and HWIO, in the form that is fast where it runs.

    On a CPU, one of stride 2, and a large one of one picture that is filtered (winograd.py), is for
    reverse mode only: `jax.jvp` raises TypeError.
    """
    plain = all(value in (None, 1, (1, 1)) for value in options.values())  # no dilation, no groups
    if not plain or jax.default_backend() not in REWRITTEN_ON:
        return _plain(x, kernel, strides, padding, dimension_numbers=dimension_numbers, **options)
    strides, padding = tuple(strides), tuple(map(tuple, padding))
    height, width = _output(x.shape, kernel.shape, strides, padding)
    sizes = x.shape[0] * height * width, *kernel.shape[2:]
    if _patches_are_faster(sizes):
        return _product(x, kernel, strides, padding)
    if strides == (2, 2) and min(kernel.shape[:2]) >= 2:
        return _halving(x, kernel, padding)
    if _may_be_filtered(x, kernel, strides, padding) and _filtering_is_faster(sizes):
        return _filtering(x, kernel, padding)
    return _plain(x, kernel, strides, padding)


def _patches_are_faster(sizes) -> bool:
    return any(
        all(low <= n <= (high or n) for n, (low, high) in zip(sizes, ranges, strict=True))
        for ranges in PATCHES.values()
    )


def _may_be_filtered(x, kernel, strides, padding) -> bool:
    padded = all(0 <= side <= 2 for pad in padding for side in pad)  # so is the gradient's then
    floats = x.dtype == kernel.dtype == jnp.float32
    # One picture: a batch may lie on several devices, and a loop would gather it on each.
    return len(x) == 1 and kernel.shape[:2] == (3, 3) and strides == (1, 1) and padded and floats


def _filtering_is_faster(sizes) -> bool:
    wide = min(sizes[1:]) >= WINOGRAD_CHANNELS_MIN
    return wide and 9 * math.prod(sizes) >= WINOGRAD_MACS_MIN


def _output(shape, kernel_shape, strides, padding):
    return [
        (side + sum(pad) - size) // stride + 1
        for side, pad, size, stride in zip(
            shape[1:3], padding, kernel_shape[:2], strides, strict=True
        )
    ]


def _product(x, kernel, strides, padding):
    """The product of the kernel with all its patches."""
    height, width = _output(x.shape, kernel.shape, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, right = strides
    patches = [
        x[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _kernel_gradient(cotangent, kernel, x, strides, padding):
    """XLA's own."""
    return jax.linear_transpose(lambda k: _plain(x, k, strides, padding), kernel)(cotangent)[0]


def _turned(kernel):
    """The kernel with which a convolution's gradient for its input is one."""
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _halving(x, kernel, padding):
    """XLA's convolution of stride 2, with a gradient for x of our own."""
    return _plain(x, kernel, (2, 2), padding)


def _halving_forward(x, kernel, padding):
    return _halving(x, kernel, padding), (x, kernel)


def _halving_backward(padding, kept, cotangent):
    x, kernel = kept
    to_x = _input_gradient(cotangent, kernel, x.shape, padding)
    return to_x, _kernel_gradient(cotangent, kernel, x, (2, 2), padding)


_halving.defvjp(_halving_forward, _halving_backward)


def _input_gradient(cotangent, kernel, shape, padding):
    """Of a convolution of stride 2, for its input of this shape: a convolution for each phase.

    XLA's own puts zeros between the rows and columns of the cotangent, and multiplies by them. This
    takes memory for one more array like x.
    """

    def taps_of(phase, axis):
        """The taps that meet rows (columns) of this parity, and how to pad the cotangent."""
        size, low = shape[1 + axis], padding[axis][0]
        first = (phase + low) % 2
        count = len(range(first, kernel.shape[axis], 2))
        farthest = (phase + low - first) // 2  # ahead of the row's own half, by its first tap
        pad = count - 1 - farthest, (size + 1) // 2 - 1 + farthest - (cotangent.shape[1 + axis] - 1)
        return slice(first, None, 2), pad

    def phase(a, b):
        (rows, above), (columns, beside) = taps_of(a, 0), taps_of(b, 1)
        return _plain(cotangent, _turned(kernel[rows, columns]), (1, 1), (above, beside))

    whole = weave([[phase(a, b) for b in (0, 1)] for a in (0, 1)])
    return whole[:, : shape[1], : shape[2]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _filtering(x, kernel, padding):
    """`winograd.convolve` of one picture, whose gradients keep x and the kernel alone."""
    height, width = _output(x.shape, kernel.shape, (1, 1), padding)
    (top, _), (left, _) = padding
    return winograd.convolve(x[0], kernel, (top, left), (height, width))[None]


def _filtering_forward(x, kernel, padding):
    return _filtering(x, kernel, padding), (x, kernel)


def _filtering_backward(padding, kept, cotangent):
    x, kernel = kept
    around = tuple((2 - low, 2 - high) for low, high in padding)
    to_x = convolve(cotangent, _turned(kernel), (1, 1), around)
    return to_x, _kernel_gradient(cotangent, kernel, x, (1, 1), padding)


_filtering.defvjp(_filtering_forward, _filtering_backward)


# A picture's map of so many elements is woven row by row on a CPU: of a stack, XLA keeps a copy
# for each layer that reads it, and the largest maps of a decoder are where its memory peaks. Not
# of a batch, which may lie on several devices: a loop over rows would gather it on each.
WEAVE_ROWS_MIN = 2**25


def weave(phases):
    """Maps [B, h, w, C] of even and odd rows, each of even and odd columns: [B, 2h, 2w, C]."""
    batch, height, width, channels = phases[0][0].shape

    def weave(phases, axis):
        return jnp.stack([jnp.stack(row, axis + 1) for row in phases], axis)

    large = batch == 1 and 4 * phases[0][0].size >= WEAVE_ROWS_MIN
    if large and jax.default_backend() == "cpu":
        rows = jax.tree.map(lambda x: x[0], phases)
        y = jax.lax.map(lambda phases: weave(phases, 0), rows)
    else:
        y = weave(phases, 2)
    return y.reshape(batch, 2 * height, 2 * width, channels)
