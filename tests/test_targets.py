import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3epth_jax import targets

SPACES = {"depth": lambda d: d, "disparity": lambda d: 1 / d, "sqrt_disparity": lambda d: d**-0.5}
FLOATS = st.floats(width=32, allow_subnormal=False) | st.just(-math.nan)
quantiles = jax.jit(targets.quantiles_2_98)
order_statistics = jax.jit(targets.order_statistics)
normalize = jax.jit(targets.normalize, static_argnames=("space", "min_valid"))


def sample(seed=0, density=0.7, shape=(3, 10, 14, 1)):
    rng = np.random.default_rng(seed)
    depth = rng.lognormal(1, 0.7, shape).astype(np.float32)
    return depth, rng.uniform(size=shape) < density


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), density=st.floats(0, 1))
def test_quantiles_are_numpys_of_the_valid_pixels(seed, density):
    depth, mask = sample(seed, density)
    low, high = quantiles(np.where(mask, depth, np.float32(np.nan)), mask)
    for i in range(len(depth)):
        known = depth[i][mask[i]].astype(np.float64)
        expected = np.quantile(known, [0.02, 0.98]) if len(known) else [0, 0]
        np.testing.assert_allclose([low[i], high[i]], expected, rtol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    values=st.lists(FLOATS, min_size=1, max_size=40),
    data=st.data(),
)
def test_order_statistics_are_those_of_sorting(values, data):
    values = np.float32([values, values[::-1]])
    rank = st.integers(0, values.shape[1] - 1)
    ranks = np.int32(data.draw(st.lists(st.tuples(rank, rank, rank), min_size=2, max_size=2)))
    got = order_statistics(values, ranks)
    np.testing.assert_array_equal(got, np.take_along_axis(np.sort(values), ranks, -1))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("filler", [0.0, -1.0, np.nan, np.inf])
def test_normalize_equals_the_formula(space, filler):
    depth, mask = sample()
    target, valid = normalize(np.where(mask, depth, np.float32(filler)), mask, space=space)
    assert valid.all() and target.dtype == jnp.float32
    for i in range(len(depth)):
        values = SPACES[space](depth[i].astype(np.float64))
        low, high = np.quantile(values[mask[i]], [0.02, 0.98])
        expected = np.clip(2 * (values - low) / (high - low) - 1, -1, 1)
        np.testing.assert_allclose(target[i], np.where(mask[i], expected, 0), atol=2e-6)


def test_target_does_not_depend_on_units():
    depth, mask = sample()
    metres, _ = normalize(depth, mask)
    millimetres, _ = normalize(1000 * depth, mask)
    np.testing.assert_allclose(metres, millimetres, atol=2e-6)


def test_images_without_a_target_are_zero_and_not_valid():
    depth, mask = sample()
    depth[0] = 3.3
    mask[1] = False
    mask[2] = False
    mask[2, :1, :15] = True  # 14 pixels
    target, valid = normalize(depth, mask)
    assert not valid.any()
    np.testing.assert_array_equal(target, 0)
    target, valid = normalize(depth, mask, min_valid=14)
    np.testing.assert_array_equal(valid, [False, False, True])
    assert target[2].min() == -1 and target[2].max() == 1


@pytest.mark.parametrize("space", SPACES)
def test_invalid_pixels_take_the_farthest_value(space):
    depth, mask = sample()
    mask[2] = False
    target, _ = normalize(depth, mask, space=space)
    broken = jnp.where(mask, target, jnp.nan)
    filled = targets.fill_invalid(broken, jnp.asarray(mask), space=space)
    farthest = 1 if space == "depth" else -1
    for i in (0, 1):
        np.testing.assert_array_equal(filled[i][mask[i]], target[i][mask[i]])
        np.testing.assert_array_equal(filled[i][~mask[i]], farthest)
        at = np.argmax(np.where(mask[i], depth[i], 0))  # the same pixel in every space
        assert np.ravel(target[i])[at] == farthest
    np.testing.assert_array_equal(filled[2], 0)


def test_a_latent_cell_is_valid_if_all_its_pixels_are():
    _, mask = sample(density=0.98, shape=(2, 24, 40, 1))
    cells = targets.latent_mask(jnp.asarray(mask))
    assert cells.shape == (2, 3, 5, 1) and cells.dtype == bool
    for b, y, x in np.ndindex(2, 3, 5):
        assert cells[b, y, x, 0] == mask[b, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].all()
    assert 0 < cells.sum() < cells.size
    np.testing.assert_array_equal(targets.latent_mask(jnp.asarray(mask), factor=1), mask)


def test_errors_name_what_is_wrong():
    depth, mask = map(jnp.asarray, sample())
    with pytest.raises(ValueError, match="depth, disparity, sqrt_disparity"):
        targets.normalize(depth, mask, space="log")
    with pytest.raises(ValueError, match="depth, disparity, sqrt_disparity"):
        targets.fill_invalid(depth, mask, space="log")
    with pytest.raises(ValueError, match=r"10x14 pixels .* cells of 8"):
        targets.latent_mask(mask)


def test_a_mask_of_numbers_is_refused():
    depth = jnp.ones((1, 4, 4, 1))
    with pytest.raises(Exception, match=r"boolean|mask"):
        targets.normalize(depth, jnp.full(depth.shape, 255, jnp.uint8))
