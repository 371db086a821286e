"""The form of a convolution that is fast on a CPU, against XLA's own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from d3epth_jax.models import convolution, convolve, winograd

NHWC = ("NHWC", "HWIO", "NHWC")
SAME, SD_VAE = ((1, 1), (1, 1)), ((0, 1), (0, 1))


class Once(nn.Module):
    @nn.compact
    def __call__(self, x):
        return convolution.conv("conv", 8, jnp.float32)(x)


def random(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture
def patches(monkeypatch):
    """Patches for every number of channels, as for a thousand."""
    monkeypatch.setitem(convolve.PATCHES, "all", ((1, None),) * 3)


CASES = pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((5, 7), 3, 1, SAME),
        ((5, 8), 3, 2, SAME),
        ((6, 8), 3, 2, SD_VAE),
        ((7, 9), 3, 2, SD_VAE),
        ((4, 5), 2, 1, ((1, 0), (0, 1))),
        ((6, 7), 2, 2, ((0, 0), (1, 0))),
        ((6, 9), 4, 2, ((2, 0), (1, 3))),
        ((3, 3), 1, 1, ((0, 0), (0, 0))),
        ((4, 3), 1, 2, ((0, 0), (0, 0))),
        ((1, 1), 3, 1, SAME),
        ((1, 2), 3, 2, SAME),
    ],
)


def check_against_xla(size, kernel, stride, padding, channels, batch=2):
    """The convolution and both gradients; returns the program of all three."""
    x, k = random(batch, *size, channels[0]), random(kernel, kernel, *channels)
    strides = (stride, stride)

    def plain(x, k):
        return jax.lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=NHWC)

    def with_gradients(function, x, k):
        y, pullback = jax.vjp(function, x, k)
        return y, *pullback(random(*y.shape))

    def ours(x, k):
        return with_gradients(lambda x, k: convolve.convolve(x, k, strides, padding), x, k)

    for expected, got in zip(with_gradients(plain, x, k), ours(x, k), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
    return str(jax.make_jaxpr(ours)(x, k))


@CASES
def test_patches_give_the_convolution_and_its_gradients(patches, size, kernel, stride, padding):
    program = check_against_xla(size, kernel, stride, padding, (6, 4))
    assert "conv_general_dilated" not in program


@pytest.fixture
def filtering(monkeypatch):
    """Minimal filtering for every size, as for the widest maps, in bands of few tiles."""
    monkeypatch.setattr(convolve, "WINOGRAD_CHANNELS_MIN", 1)
    monkeypatch.setattr(convolve, "WINOGRAD_MACS_MIN", 1)
    monkeypatch.setattr(winograd, "TILES", 8)


@pytest.mark.parametrize("padding", [SAME, SD_VAE, ((0, 0), (2, 1))])
@pytest.mark.parametrize("size", [(3, 3), (8, 8), (7, 8), (18, 5), (3, 40)])
def test_minimal_filtering_gives_the_convolution_and_its_gradients(filtering, size, padding):
    program = check_against_xla(size, 3, 1, padding, (6, 5), batch=1)
    assert program.count("conv_general_dilated") == 1  # the kernel's gradient
    assert program.count(" scan[") == 2


def transformed_gradients(transform, x, k, strides):
    """[(ours, XLA's)] for x and k, which are several for `vmap`: `jax.checkpoint` has the first."""
    if transform is jax.checkpoint:
        x, k = x[0], k[0]

    def gradients(function):
        def loss(x, k):
            return jnp.sin(transform(lambda x, k: function(x, k, strides, SAME))(x, k)).sum()

        return jax.grad(loss, (0, 1))(x, k)

    plain = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=NHWC)
    return list(zip(gradients(convolve.convolve), gradients(plain), strict=True))


TRANSFORMS = pytest.mark.parametrize("transform", [jax.checkpoint, jax.vmap])


@TRANSFORMS
def test_minimal_filtering_may_be_transformed(filtering, transform):
    x, k = random(3, 1, 6, 8, 5), random(3, 3, 3, 5, 7)
    for got, expected in transformed_gradients(transform, x, k, (1, 1)):
        np.testing.assert_allclose(got, expected, atol=5e-5)


@pytest.mark.parametrize("padding", [((3, 3), (1, 1)), ((-1, 2), (0, 0))])
def test_other_paddings_are_xlas(filtering, padding):
    check_against_xla((6, 7), 3, 1, padding, (6, 5), batch=1)


def test_minimal_filtering_stays_in_32_bits_where_64_are_on(filtering):
    with jax.enable_x64(True):
        y = convolve.convolve(random(1, 6, 8, 5), random(3, 3, 5, 7), (1, 1), SAME)
    assert y.dtype == jnp.float32


def test_minimal_filtering_holds_the_arrays_of_one_layer_at_a_time(filtering):
    def memory(layers):
        def network(x, kernels):
            for kernel in kernels:
                x = jnp.sin(convolve.convolve(x, kernel, (1, 1), SAME))
            return x

        kernels = [random(3, 3, 64, 64)] * layers
        compiled = jax.jit(network).lower(random(1, 24, 24, 64), kernels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(5) < 1.1 * memory(2)


@pytest.mark.parametrize("offset", [0, 3])
def test_minimal_filtering_rounds_as_little_as_xla(offset):
    x, k = random(1, 16, 16, 512) + offset, random(3, 3, 512, 8)
    taps, wide = (
        np.asarray(k, np.float64),
        np.pad(np.asarray(x[0], np.float64), ((1, 1), (1, 1), (0, 0))),
    )
    exact = sum(wide[i : i + 16, j : j + 16] @ taps[i, j] for i in range(3) for j in range(3))
    forms = winograd.convolve(x[0], k, (1, 1), (16, 16)), convolve._plain(x, k, (1, 1), SAME)[0]
    errors = [np.abs(form - exact).max() / exact.std() for form in forms]
    assert errors[0] < 2 * errors[1] < 1e-5


@CASES
@pytest.mark.parametrize("channels", [(8, 4), (5, 9)])
def test_gradients_put_no_zeros_between_rows(size, kernel, stride, padding, channels):
    program = check_against_xla(size, kernel, stride, padding, channels)
    assert "lhs_dilation=(2, 2)" not in program or kernel == 1


@TRANSFORMS
def test_strided_gradients_of_16_bits_may_be_transformed(transform):
    x, k = (array.astype(jnp.bfloat16) for array in (random(3, 2, 6, 8, 5), random(3, 3, 3, 5, 7)))
    for got, expected in transformed_gradients(transform, x, k, (2, 2)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(*(a.astype(np.float32) for a in (got, expected)), atol=0.05)


@pytest.mark.parametrize("channels", [(3, 24), (8, 6)])
def test_a_batch_on_several_devices_has_the_gradients_of_one(channels):
    devices = jax.devices()
    assert len(devices) > 1
    x, k = random(2 * len(devices), 6, 8, channels[0]), random(3, 3, *channels)

    @jax.jit
    def gradients(x, k):
        y, pullback = jax.vjp(lambda x, k: convolve.convolve(x, k, (2, 2), SAME), x, k)
        return pullback(jnp.sin(y))

    mesh = Mesh(devices, "data")
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    for got, expected in zip(gradients(split, k), gradients(x, k), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((1, 12, 12, 1024), True),
        ((1, 24, 24, 1024), False),
        ((1, 4, 4, 64), False),
        ((2, 24, 24, 3), True),
    ],
)
def test_only_pictures_and_small_maps_of_many_channels_are_taken_apart(shape, small):
    module, x = Once(), jnp.zeros(shape)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    program = str(jax.make_jaxpr(module.apply)(variables, x))
    assert ("conv_general_dilated" not in program) == small


@pytest.mark.parametrize(
    ("shape", "features", "dtype", "filtered"),
    [
        ((1, 192, 192, 256), 256, jnp.float32, True),
        ((1, 96, 97, 256), 512, jnp.float32, True),
        ((1, 96, 96, 256), 256, jnp.float32, False),
        ((2, 192, 192, 256), 256, jnp.float32, False),
        ((1, 192, 192, 256), 256, jnp.bfloat16, False),
        ((1, 384, 384, 256), 128, jnp.float32, False),
        ((1, 384, 384, 128), 256, jnp.float32, False),
    ],
)
def test_one_wide_and_large_map_of_32_bits_is_filtered(shape, features, dtype, filtered):
    x = jax.ShapeDtypeStruct(shape, dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, shape[-1], features), dtype)
    program = jax.make_jaxpr(lambda x, k: convolve.convolve(x, k, (1, 1), SAME))(x, kernel)
    assert ("conv_general_dilated" not in str(program)) == filtered


@pytest.mark.parametrize(
    ("options", "channels"),
    [({"rhs_dilation": (2, 2)}, 6), ({"feature_group_count": 2}, 3), ({"precision": None}, 6)],
)
def test_dilated_and_grouped_convolutions_are_xlas(patches, options, channels):
    x, k = random(2, 7, 8, 6), random(3, 3, channels, 4)
    expected = jax.lax.conv_general_dilated(x, k, (1, 1), SAME, dimension_numbers=NHWC, **options)
    got = convolve.convolve(x, k, (1, 1), SAME, **options)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.fixture
def weave(monkeypatch):
    """Woven row by row for every size, as for the largest maps."""
    monkeypatch.setattr(convolve, "WEAVE_ROWS_MIN", 1)


def phase_conv(x, kernel, bias, size, dtype=jnp.float32):
    params = {"params": {"kernel": convolution.phase_kernel(kernel), "bias": bias}}
    return convolution.PhaseConv(4, dtype).apply(params, x, size)


def plain_conv(x, kernel, bias, size, dtype=jnp.float32):
    x = convolution.upsample_nearest(x, size).astype(dtype)
    return convolve.convolve(x, kernel.astype(dtype), (1, 1), SAME) + bias.astype(dtype)


@pytest.mark.parametrize("batch", [1, 2])
def test_phases_woven_row_by_row_are_the_upsampled_convolution(weave, batch):
    x, kernel, bias = random(batch, 5, 7, 6), random(3, 3, 6, 4), random(4)
    program = str(jax.make_jaxpr(lambda x: phase_conv(x, kernel, bias, (10, 14)))(x))
    assert ("scan" in program) == (batch == 1)  # a batch may lie on several devices
    results = []
    for function in (plain_conv, phase_conv):
        y, pullback = jax.vjp(lambda *a, f=function: f(*a, (10, 14)), x, kernel, bias)
        results.append((y, *pullback(random(*y.shape))))
    for expected, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-5)


def test_a_kernel_in_phases_is_put_together_again_without_loss_in_16_bits():
    x, kernel, bias = random(1, 8, 8, 6), random(3, 3, 6, 4) + 5, random(4)
    args = x, kernel, bias, (15, 16), jnp.bfloat16
    exact = plain_conv(*args[:-1])
    errors = [jnp.abs(f(*args) - exact).mean() for f in (plain_conv, phase_conv)]
    assert errors[1] < 1.05 * errors[0]
