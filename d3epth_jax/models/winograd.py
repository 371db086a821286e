"""A 3x3 convolution by minimal filtering: 16 products for 2x2 cells of the output, not 36.

F(2x2, 3x3) of Winograd, as Lavin and Gray (Fast Algorithms for Convolutional Neural Networks, CVPR
2016) use it. It rounds as little as a plain sum (what is not finite reaches all of its tile). Their
larger tiles save more and round several times worse.
"""

import jax
import jax.numpy as jnp

# Tiles computed at once, in whole rows of them: enough for a fast product, and few enough for what
# lies between the products to stay in the cache of a core.
TILES = 512


def convolve(x, kernel, before: tuple[int, int], size: tuple[int, int]):
    """A picture [H, W, Cin] and a kernel [3, 3, Cin, Cout] -> [*size, Cout].

    before: the zeros above and left of x, none or more; those below and beside follow from size.
    """
    (height, width), (top, left) = size, before
    down, across = -(-height // 2), -(-width // 2)  # tiles
    bands = -(-down * across // TILES)
    rows = -(-down // bands)  # of tiles in a band
    bands = -(-down // rows)
    below, beside = 2 * rows * bands + 2 - top, 2 * across + 2 - left
    x = jnp.pad(x, ((top, below - x.shape[0]), (left, beside - x.shape[1]), (0, 0)))
    # A zero that has to wait for x. Else XLA makes the factors of all kernels of a network and the
    # arrays for all results as soon as it begins, and their memory is held from then on. And it is
    # read from memory, not computed anew by each that takes it, which would be long to compile.
    x = jax.lax.optimization_barrier(x)
    zero = jnp.where(x[top, left, 0] > 0, 0.0, -0.0).astype(x.dtype)
    kernels = [_of_kernel(row) for row in _of_kernel(kernel + zero)]

    def band(number, whole):
        start = 2 * rows * number
        tiles = jax.lax.dynamic_slice_in_dim(x, start, 2 * rows + 2)
        products = [
            [y @ k for y, k in zip(_of_input(row, 1, across), row_kernels, strict=True)]
            for row, row_kernels in zip(_of_input(tiles, 0, rows), kernels, strict=True)
        ]
        columns = [_of_output(*column) for column in zip(*products, strict=True)]
        cells = [_of_output(*row) for row in zip(*columns, strict=True)]
        cells = jnp.stack([jnp.stack(row, 2) for row in cells], 1)
        cells = cells.reshape(2 * rows, *whole.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(whole, cells, start, 0)

    whole = jnp.broadcast_to(zero, (2 * rows * bands, 2 * across, kernel.shape[-1]))
    return jax.lax.fori_loop(0, bands, band, whole)[:height, :width]


# Along one axis. Of 4 cells a, b, c, d of the input and 3 taps these make 4 factors each, of whose
# products _of_output makes 2 cells: a k0 + b k1 + c k2 and b k0 + c k1 + d k2.


def _of_input(x, axis: int, count: int):
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + 2 * count - 1, 2, axis) for i in range(4))
    return a - c, b + c, c - b, b - d


def _of_kernel(taps):
    first, middle, last = taps
    return first, (first + middle + last) / 2, (first - middle + last) / 2, last


def _of_output(p, q, r, s):
    return p + q + r, q - r - s
