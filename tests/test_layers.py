"""Layers that are written out for speed, against JAX's and Linen's own and against float64."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d3epth_jax.models import layers

TYPES = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8}  # about half a unit in the last place


def random(*shape, dtype=jnp.float32, scale=3.0):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_gelu_is_exact_also_far_below_zero(dtype):
    x = jnp.linspace(-4, 4, 401).astype(dtype)
    exact = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in np.asarray(x, np.float64)])
    got = np.asarray(jax.jit(layers.gelu)(x), np.float64)
    assert layers.gelu(x).dtype == dtype
    error = {jnp.float32: 1e-6, jnp.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(got, exact, rtol=error, atol=5e-7)


@pytest.mark.parametrize("dtype", TYPES)
def test_gated_has_the_gradient_of_its_formula(dtype):
    value, gate, cotangent = (random(5, n, dtype=dtype) for n in (100, 100, 100))
    gate = gate[::-1]

    def plain(value, gate):
        return value * jax.nn.gelu(gate, approximate=False)

    wide = [x.astype(jnp.float32) for x in (value, gate)]
    expected, expected_pullback = jax.vjp(plain, *wide)
    got, pullback = jax.vjp(layers.gated, value, gate)
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected, rtol=4 * TYPES[dtype], atol=TYPES[dtype]
    )
    gradients = zip(
        pullback(cotangent), expected_pullback(cotangent.astype(jnp.float32)), strict=True
    )
    for ours, theirs in gradients:
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs, rtol=2 * TYPES[dtype], atol=TYPES[dtype]
        )


@pytest.mark.parametrize("dtype", TYPES)
def test_layer_norm_is_linens(dtype):
    x, cotangent = random(2, 7, 24, dtype=dtype) + 5, random(2, 7, 24, dtype=dtype)
    params = {"params": {"scale": random(24), "bias": random(24)}}
    results = []
    for module in (
        layers.LayerNorm(dtype),
        nn.LayerNorm(epsilon=layers.LAYER_NORM_EPS, dtype=dtype, use_fast_variance=False),
    ):
        y, pullback = jax.vjp(module.apply, params, x)
        assert y.dtype == dtype
        results.append([y, *jax.tree.leaves(pullback(cotangent))])
    for ours, theirs in zip(*results, strict=True):
        scale = float(jnp.abs(theirs.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            ours.astype(jnp.float32),
            theirs.astype(jnp.float32),
            rtol=2 * TYPES[dtype],
            atol=TYPES[dtype] * scale,
        )


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_group_norm_is_linens_and_so_is_its_gradient(dtype, silu):
    x, cotangent = random(2, 5, 7, 24, dtype=dtype) + 5, random(2, 5, 7, 24, dtype=dtype)
    params = {"params": {"scale": random(24), "bias": random(24)}}
    wide = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    linen = nn.GroupNorm(6, epsilon=1e-3, use_fast_variance=False)

    def expected(params, x):
        y = linen.apply(params, x)
        return nn.silu(y) if silu else y

    module = layers.group_norm(None, 6, 1e-3, dtype, silu=silu)
    results = []
    for function, inputs in ((module.apply, (x, cotangent)), (expected, wide)):
        y, pullback = jax.vjp(function, params, inputs[0])
        results.append([y, *jax.tree.leaves(pullback(inputs[1]))])
    assert results[0][0].dtype == results[0][3].dtype == dtype
    for ours, theirs in zip(*results, strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs, rtol=2 * TYPES[dtype], atol=TYPES[dtype] * scale
        )


def large_mean(rng):
    return 1000 + 0.1 * rng.standard_normal((1, 40, 50, 8))


def unlike_the_cells_that_are_taken_for_the_mean(rng):
    x = rng.standard_normal((1, 40, 50, 8))
    x[:, ::8, ::8] = 1000
    return x


def one_cell(rng):
    return 100 + rng.standard_normal((3, 1, 1, 8))


def channels_far_apart(rng):
    return 1000 * np.arange(8) + rng.standard_normal((2, 9, 7, 8))


@pytest.mark.parametrize(
    "make",
    [large_mean, unlike_the_cells_that_are_taken_for_the_mean, one_cell, channels_far_apart],
)
def test_group_norm_and_its_gradient_are_float64s_to_rounding(make):
    x = np.asarray(make(np.random.default_rng(0)), np.float32)
    cotangent = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    module = layers.group_norm(None, 4, 1e-6, jnp.float32)
    params = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    got, pullback = jax.vjp(module.apply, params, x)
    of_params, of_x = pullback(cotangent)

    groups = np.asarray(x, np.float64).reshape(len(x), -1, 4, 2)
    c = np.asarray(cotangent, np.float64).reshape(groups.shape)
    inverse = (groups.var((1, 3), keepdims=True) + 1e-6) ** -0.5
    normal = (groups - groups.mean((1, 3), keepdims=True)) * inverse
    along = (c * normal).mean((1, 3), keepdims=True)
    expected = inverse * (c - c.mean((1, 3), keepdims=True) - normal * along)
    np.testing.assert_allclose(got, normal.reshape(x.shape), atol=3e-5)
    size = np.abs(inverse * c).max()  # of what is subtracted from each other
    np.testing.assert_allclose(of_x, expected.reshape(x.shape), atol=3e-5 * size)
    of_scale = (c * normal).sum((0, 1)).reshape(-1)
    np.testing.assert_allclose(
        of_params["params"]["scale"], of_scale, atol=3e-5 * np.abs(c * normal).sum()
    )


def test_group_norm_of_a_constant_map_is_zero():
    module = layers.group_norm(None, 4, 1e-6, jnp.float32)
    params = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    constant = jnp.full((1, 20, 30, 8), 0.1)
    np.testing.assert_allclose(module.apply(params, constant), 0, atol=1e-4)
    gradient = jax.grad(lambda x: module.apply(params, x)[0, 0, 0, 0])(constant)
    assert jnp.isfinite(gradient).all()
