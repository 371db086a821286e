import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3epth_jax import alignment, losses
from d3epth_jax.metrics import boundary_f1

fit = jax.jit(alignment.fit_scale_shift)
aligned = jax.jit(alignment.aligned_residual)


def sample(seed=0, shape=(3, 12, 16, 1), density=0.7):
    rng = np.random.default_rng(seed)
    pred = rng.uniform(-1, 1, shape).astype(np.float32)
    target = (2.5 * pred + rng.normal(0, 0.3, shape) + 4).astype(np.float32)
    return pred, target, rng.uniform(size=shape) < density


def reference(pred, target, mask):
    """Float64 least squares over the valid pixels of one image, by NumPy's own solver."""
    p, d = pred[mask].astype(np.float64), target[mask].astype(np.float64)
    return np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), d, rcond=None)[0]


def test_fit_is_least_squares():
    pred, target, mask = sample()
    scale, shift, valid = fit(pred, target, mask)
    expected = np.array([reference(*image) for image in zip(pred, target, mask, strict=True)])
    np.testing.assert_allclose(np.stack([scale, shift], 1), expected, rtol=2e-6)
    assert valid.all() and scale.dtype == shift.dtype == jnp.float32


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    slope=st.floats(0.01, 100) | st.floats(-100, -0.01),
    offset=st.floats(-50, 50),
)
def test_an_exact_affine_relation_is_recovered(seed, slope, offset):
    pred, _, mask = sample(seed)
    target = (slope * pred.astype(np.float64) + offset).astype(np.float32)
    scale, shift, valid = fit(pred, target, mask)
    rounding = 1e-6 * (1 + abs(offset))
    np.testing.assert_allclose(scale, slope, rtol=1e-5, atol=rounding)
    np.testing.assert_allclose(shift, offset, rtol=1e-5, atol=1e-5 * abs(slope) + rounding)
    assert valid.all()
    residual, same_scale, _ = aligned(pred, target, mask)
    np.testing.assert_allclose(same_scale, scale, rtol=1e-6)
    assert np.abs(residual).max() < 1e-6 * (abs(slope) + abs(offset) + 1)


@pytest.mark.parametrize("where", ["prediction", "target"])
def test_a_large_offset_does_not_cancel(where):
    """Offset 1e3 with spread 1e-2: the textbook determinant form has no digit left here."""
    pred, target, mask = sample()
    if where == "prediction":
        pred = (1e3 + 1e-2 * pred).astype(np.float32)
    else:
        target = (1e3 + 1e-2 * target).astype(np.float32)
    residual, scale, valid = aligned(pred, target, mask)
    assert valid.all()
    for i in range(len(pred)):
        p, d = pred[i][mask[i]].astype(np.float64), target[i][mask[i]].astype(np.float64)
        p, d = p - p.mean(), d - d.mean()
        s = (p @ d) / (p @ p)
        assert float(scale[i]) == pytest.approx(s, rel=1e-5)
        expected = s * p - d
        error = np.abs(np.asarray(residual[i])[mask[i]] - expected).max()
        assert error < 1e-4 * np.abs(expected).mean()


def degenerate(kind):
    pred, target, mask = sample()
    if kind == "empty":
        mask[:] = False
    elif kind == "one pixel":
        mask[:] = False
        mask[:, 3, 4] = True
    elif kind == "constant prediction":
        pred[:] = 1e3 / 3
    elif kind == "constant target":
        target[:] = 7.3
    return pred, target, mask


KINDS = ["empty", "one pixel", "constant prediction", "constant target"]


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_images_are_finite_and_not_valid(kind):
    pred, target, mask = degenerate(kind)
    scale, shift, valid = fit(pred, target, mask)
    assert not valid.any()
    assert np.abs(scale).max() < 1e-6
    mean = [d[m].mean() if m.any() else 0 for d, m in zip(target, mask, strict=True)]
    np.testing.assert_allclose(shift, mean, rtol=1e-6, atol=1e-6)
    residual, _, _ = aligned(pred, target, mask)
    honest = np.where(mask, np.reshape(mean, (-1, 1, 1, 1)) - target, 0)
    np.testing.assert_allclose(residual, honest, atol=2e-6)


@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize("stop", [False, True])
def test_masked_pixels_never_matter_and_gradients_are_finite(kind, stop):
    pred, target, mask = map(jnp.asarray, degenerate(kind))

    @jax.jit
    def value_and_grad(pred, target):
        def value(pred, target):
            residual, scale, _ = alignment.aligned_residual(
                pred, target, mask, stop_gradient_alignment=stop
            )
            _, shift, _ = alignment.fit_scale_shift(pred, target, mask)
            return (residual**2).sum() + scale.sum() + shift.sum()

        return jax.value_and_grad(value, (0, 1))(pred, target)

    value, gradients = value_and_grad(pred, target)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    for filler in (np.nan, np.inf, -np.inf):
        filled = [jnp.where(mask, x, filler) for x in (pred, target)]
        same_value, same_gradients = value_and_grad(*filled)
        assert same_value == value
        for a, b in zip(gradients, same_gradients, strict=True):
            np.testing.assert_array_equal(a, b)


def test_stopping_the_gradient_leaves_scale_times_identity():
    pred, target, mask = map(jnp.asarray, sample())
    jacobian = jax.jacobian(
        lambda p: alignment.aligned_residual(p, target, mask, stop_gradient_alignment=True)[0].sum()
    )(pred)
    scale, _, _ = fit(pred, target, mask)
    expected = mask * np.asarray(scale)[:, None, None, None]
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6)


def test_min_valid_is_a_threshold():
    pred, target, mask = sample()
    mask[:] = False
    mask[:, :2, :8] = True
    assert fit(pred, target, mask)[2].all()
    mask[0, 0, 0] = False
    np.testing.assert_array_equal(fit(pred, target, mask)[2], [False, True, True])
    loose = alignment.fit_scale_shift(*map(jnp.asarray, (pred, target, mask)), min_valid=15)
    assert loose[2].all()


def test_vmap_and_half_precision():
    pred, target, mask = sample(shape=(4, 6, 8, 1))
    straight = fit(pred, target, mask)
    folded = jax.vmap(fit)(*(x.reshape(2, 2, 6, 8, 1) for x in (pred, target, mask)))
    for a, b in zip(straight, folded, strict=True):
        np.testing.assert_allclose(np.ravel(b), a, rtol=1e-6)
    half = jnp.asarray(pred, jnp.bfloat16)
    scale, _, _ = fit(half, target, mask)
    exact, _, _ = fit(half.astype(jnp.float32), target, mask)
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, exact, rtol=2e-6)


@pytest.mark.parametrize("space", alignment.SPACES)
def test_spaces_round_trip(space):
    depth = jnp.asarray(np.geomspace(0.1, 100, 48, dtype=np.float32).reshape(1, 6, 8, 1))
    values = alignment.to_space(depth, space)
    power = {"depth": 1, "disparity": -1, "sqrt_disparity": -0.5}[space]
    np.testing.assert_allclose(values, np.asarray(depth, np.float64) ** power, rtol=1e-6)
    np.testing.assert_allclose(alignment.from_space(values, space), depth, rtol=1e-6)


@pytest.mark.parametrize("space", ["disparity", "sqrt_disparity"])
@pytest.mark.parametrize("convert", [alignment.to_space, alignment.from_space])
def test_spaces_of_impossible_depth_are_zero_with_finite_gradient(space, convert):
    depth = jnp.asarray([0.0, -1.0, np.nan, np.inf]).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(jnp.ravel(convert(depth, space)), 0)
    assert np.isfinite(jax.grad(lambda d: convert(d, space).sum())(depth)).all()


def test_unknown_space_names_the_choices():
    for convert in (alignment.to_space, alignment.from_space):
        with pytest.raises(ValueError, match="depth, disparity, sqrt_disparity"):
            convert(jnp.ones((1, 2, 2, 1)), "log")


def test_a_target_that_is_not_finite_within_the_mask_takes_no_part():
    """A sky of infinite depth under `mask = depth > 0`."""
    pred, target, mask = map(jnp.asarray, sample())
    known = mask.at[:2, 0, 0].set(True)
    for filler in (np.nan, np.inf):
        sky = target.at[0, 0, 0].set(filler)
        residual, _, valid = aligned(pred, sky, known)
        assert np.isnan(residual[0]).all() and not valid[0] and valid[1:].all()

        def loss(pred, sky=sky):
            terms = losses.hybrid_depth(pred, sky, known)
            return losses.batch_mean(terms["ssi"] + terms["edge"], terms["valid"])

        gradient = jax.jit(jax.grad(loss))(pred)
        assert not gradient[0].any() and gradient[1:].any() and np.isfinite(gradient).all()
        broken = jax.jit(jax.grad(loss))(pred.at[1, 0, 0].set(np.nan))
        assert np.isnan(broken[1]).any(), "a broken prediction is noticed"


def test_maps_that_would_broadcast_or_weigh_are_refused():
    pred, target, mask = sample()
    turned = [np.moveaxis(x, -1, 1) for x in (pred, target, mask)]
    for wrong in (
        (pred, target[:1], mask),
        (pred, np.repeat(target, 3, -1), mask),
        (pred[:, :1, :1], target, mask),
        (pred[..., 0], target[..., 0], mask[..., 0]),
        turned,  # [B,1,H,W], as torch has them
    ):
        for function in (alignment.fit_scale_shift, losses.hybrid_depth, boundary_f1):
            with pytest.raises(ValueError, match=r"must be of one shape \[B,H,W,1\], not \[\d"):
                function(*wrong)
    for kind in (np.uint8, np.float32):
        for function in (alignment.fit_scale_shift, losses.hybrid_depth, boundary_f1):
            with pytest.raises(ValueError, match=r"a mask is boolean, .* not (uint8|float32)"):
                function(pred, target, mask.astype(kind))
