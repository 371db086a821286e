"""The losses against float64 references written from the formulas, in torch for its autograd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d3epth_jax import losses

SHAPE = (3, 12, 17, 1)  # odd and even sides: the coarser scales cut differently


def sample(seed=0, shape=SHAPE, density=0.8):
    """Prediction, target in [-1,1] with steps, mask."""
    rng = np.random.default_rng(seed)
    target = np.cumsum(rng.normal(0, 0.1, shape), 1) + (rng.uniform(size=shape) < 0.1)
    target = np.clip(target, -1, 1).astype(np.float32)
    pred = (0.4 * target + 0.2 + rng.normal(0, 0.15, shape)).astype(np.float32)
    return pred, target, rng.uniform(size=shape) < density


def reference_residual(p, d, m, stop=False):
    """One image [H,W] in float64 -> residual, with the unknown pixels left at 0."""
    valid_p, valid_d = p[m], d[m]
    centred, goal = valid_p - valid_p.mean(), valid_d - valid_d.mean()
    scale = (centred * goal).sum() / (centred * centred).sum()
    shift = valid_d.mean() - scale * valid_p.mean()
    if stop:
        scale, shift = scale.detach(), shift.detach()
    residual = torch.zeros_like(p)
    residual[m] = scale * valid_p + shift - valid_d
    return residual


def reference_ssi(p, d, m, penalty="l1", stop=False):
    errors = reference_residual(p, d, m, stop)[m].abs()
    if penalty == "trimmed_l1":
        errors = errors.sort().values[: len(errors) - int(0.2 * len(errors))]
    return errors.mean()


def reference_edge(p, d, m, delta=0.05, alpha=5.0, tau=0.1, num_scales=4, stop=False):
    residual = reference_residual(p, d, m, stop)
    height, width = p.shape
    total = 0.0
    for scale in range(num_scales):
        step, numerator, denominator = 2**scale, 0.0, 0.0
        for dy, dx in ((0, step), (step, 0)):
            for y in range(0, height - dy, step):
                for x in range(0, width - dx, step):
                    if not (m[y, x] and m[y + dy, x + dx]):
                        continue
                    jump = abs(float(d[y + dy, x + dx] - d[y, x]))
                    weight = 1 + alpha * min(1.0, jump / tau)
                    r = (residual[y + dy, x + dx] - residual[y, x]).abs()
                    penalty = r**2 / (2 * delta) if r <= delta else r - delta / 2
                    numerator = numerator + weight * penalty
                    denominator += weight
        total = total + numerator / max(denominator, 1.0)
    return total / num_scales


def check(ours, reference, arrays, rtol=1e-5, gradient_atol=2e-6):
    """Values [B] and gradients in the prediction agree with the reference, image by image."""
    pred, target, mask = arrays

    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_values(p):
        values = ours(p, target, mask)
        return values.sum(), values

    gradient, values = jax.jit(gradient_and_values)(pred)
    assert values.shape == (len(pred),) and values.dtype == jnp.float32
    for i in range(len(pred)):
        p = torch.tensor(pred[i, ..., 0], dtype=torch.float64, requires_grad=True)
        d, m = torch.tensor(target[i, ..., 0]).double(), torch.tensor(mask[i, ..., 0])
        expected = reference(p, d, m)
        expected.backward()
        assert float(values[i]) == pytest.approx(expected.item(), rel=rtol)
        np.testing.assert_allclose(gradient[i, ..., 0], p.grad.numpy(), atol=gradient_atol)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("penalty", losses.PENALTIES)
def test_ssi_equals_its_reference(penalty, stop):
    ours = functools.partial(
        losses.scale_shift_invariant, penalty=penalty, stop_gradient_alignment=stop
    )
    check(ours, lambda *x: reference_ssi(*x, penalty=penalty, stop=stop), sample())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.0},
        {"delta": 0.5, "tau": 1.0},
        {"num_scales": 1},
        {"num_scales": 6},  # coarser than the picture: a scale without a pair counts 0
    ],
)
def test_edge_loss_equals_its_reference(options):
    ours = functools.partial(losses.edge_aware_gradient_huber, **options)
    check(ours, lambda *x: reference_edge(*x, **options), sample())


def test_edge_loss_with_stopped_alignment_equals_its_reference():
    ours = functools.partial(losses.edge_aware_gradient_huber, stop_gradient_alignment=True)
    check(ours, lambda *x: reference_edge(*x, stop=True), sample(1))


hybrid = jax.jit(losses.hybrid_depth)
ssi = jax.jit(losses.scale_shift_invariant)
edge = jax.jit(losses.edge_aware_gradient_huber)
trimmed = jax.jit(lambda *x: losses.scale_shift_invariant(*x, penalty="trimmed_l1"))
TERMS = {"ssi": ssi, "trimmed": trimmed, "edge": edge}


def test_hybrid_is_both_terms_from_one_alignment():
    pred, target, mask = sample()
    pred[1] *= -1
    mask[2] = False
    out = hybrid(pred, target, mask)
    assert set(out) == {"ssi", "edge", "valid", "negative_scale"}
    np.testing.assert_allclose(out["ssi"], ssi(pred, target, mask), rtol=1e-6)
    np.testing.assert_allclose(out["edge"], edge(pred, target, mask), rtol=1e-6)
    np.testing.assert_array_equal(out["valid"], [True, True, False])
    np.testing.assert_array_equal(out["negative_scale"], [False, True, False])
    options = {"penalty": "trimmed_l1", "alpha": 1.0, "delta": 0.2, "tau": 0.3, "num_scales": 2}
    out = jax.jit(functools.partial(losses.hybrid_depth, **options))(pred, target, mask)
    np.testing.assert_allclose(out["ssi"], trimmed(pred, target, mask), rtol=1e-6)
    del options["penalty"]
    alone = jax.jit(functools.partial(losses.edge_aware_gradient_huber, **options))
    np.testing.assert_allclose(out["edge"], alone(pred, target, mask), rtol=1e-6)


nonzero = st.floats(0.05, 20) | st.floats(-20, -0.05)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), slope=nonzero, offset=st.floats(-10, 10))
def test_identities(seed, slope, offset):
    """Affine in the prediction: unchanged. Affine in the target: scaled by |slope|."""
    pred, target, mask = sample(seed)
    moved_pred = (slope * pred + offset).astype(np.float32)
    moved_target = (slope * target + offset).astype(np.float32)
    # Moving the arrays rounds them: by their size against their spread.
    rtol = 1e-5 * (1 + abs(offset / slope))
    for name, loss in TERMS.items():
        value = loss(pred, target, mask)
        np.testing.assert_allclose(loss(moved_pred, target, mask), value, rtol=rtol)
        if name != "edge":  # its delta and tau are in units of the target
            scaled = loss(pred, moved_target, mask)
            np.testing.assert_allclose(scaled, abs(slope) * value, rtol=rtol)
    inverted = hybrid(moved_pred, target, mask)["negative_scale"]
    upright = hybrid(pred, target, mask)["negative_scale"]
    np.testing.assert_array_equal(inverted, upright ^ (slope < 0))


@pytest.mark.parametrize("where", ["prediction", "target", "both"])
def test_offset_a_thousand_with_spread_a_hundredth_is_right_to_1e_4(where):
    pred, target, mask = sample()
    if where != "target":
        pred = (1e3 + 1e-2 * pred).astype(np.float32)
    if where != "prediction":
        target = (1e3 + 1e-2 * target).astype(np.float32)
    for i in range(len(pred)):
        image = [torch.tensor(x[i, ..., 0]) for x in (pred, target, mask)]
        p, d, m = image[0].double(), image[1].double(), image[2]
        for name, reference in (("ssi", reference_ssi), ("edge", reference_edge)):
            value = float(TERMS[name](pred, target, mask)[i])
            assert value == pytest.approx(float(reference(p, d, m)), rel=1e-4)


gradients = {
    name: jax.jit(jax.grad(lambda p, d, m, loss=loss: loss(p, d, m).sum(), (0, 1)))
    for name, loss in TERMS.items()
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("value", [0.0, 0.3, 1e3 / 3])
def test_constant_planes_have_zero_gradient(name, value):
    pred, target, mask = sample()
    plane = np.full_like(pred, value)
    for p, d in ((plane, target), (plane, plane), (pred, plane)):
        gradient, _ = gradients[name](p, d, mask)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", TERMS)
def test_masked_pixels_never_matter(name):
    pred, target, mask = sample()
    value, gradient = TERMS[name](pred, target, mask), gradients[name](pred, target, mask)
    for filler in (np.nan, np.inf, -np.inf, 1e30):
        p, d = (np.where(mask, x, np.float32(filler)) for x in (pred, target))
        np.testing.assert_array_equal(TERMS[name](p, d, mask), value)
        for ours, same in zip(gradients[name](p, d, mask), gradient, strict=True):
            assert np.isfinite(ours).all()
            np.testing.assert_array_equal(ours, same)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), density=st.floats(0, 1), filler=st.sampled_from([np.nan, np.inf]))
def test_any_mask_gives_finite_values_and_gradients(seed, density, filler):
    pred, target, mask = sample(seed, density=density)
    pred, target = (np.where(mask, x, np.float32(filler)) for x in (pred, target))
    out = hybrid(pred, target, mask)
    assert np.isfinite(out["ssi"]).all() and np.isfinite(out["edge"]).all()
    np.testing.assert_array_equal(out["valid"], mask.sum((1, 2, 3)) >= 16)
    for name in TERMS:
        assert all(np.isfinite(g).all() for g in gradients[name](pred, target, mask))


@pytest.mark.parametrize("kind", ["empty", "one pixel", "constant prediction", "constant target"])
def test_degenerate_images_carry_no_weight(kind):
    pred, target, mask = sample()
    if kind == "empty":
        mask[1] = False
    elif kind == "one pixel":
        mask[1] = False
        mask[1, 3, 4] = True
    elif kind == "constant prediction":
        pred[1] = 0.7
    else:
        target[1] = 0.7
    out = hybrid(pred, target, mask)
    np.testing.assert_array_equal(out["valid"], [True, False, True])
    assert not out["negative_scale"][1]
    others = np.array([0, 2])
    for name in ("ssi", "edge"):
        assert np.isfinite(out[name]).all()
        assert all(np.isfinite(g).all() for g in gradients[name](pred, target, mask))
        for kind_of_weight in losses.IMAGE_WEIGHTS:
            weights = losses.image_weights(jnp.asarray(mask), out["valid"], kind=kind_of_weight)
            without = losses.batch_mean(out[name][others], weights[others])
            np.testing.assert_allclose(losses.batch_mean(out[name], weights), without, rtol=1e-6)
    if kind == "constant prediction":  # the honest value: mean |d - mean d|
        d = target[1][mask[1]]
        assert float(out["ssi"][1]) == pytest.approx(np.abs(d - d.mean()).mean(), rel=1e-5)


def test_batch_value_is_a_ratio_of_sums():
    values, weights = jnp.asarray([1.0, 2.0, np.nan]), jnp.asarray([3.0, 1.0, 0.0])
    numerator, denominator = losses.batch_sums(values, weights)
    assert (float(numerator), float(denominator)) == (5, 4)
    assert float(losses.batch_mean(values, weights)) == 1.25
    np.testing.assert_allclose(jax.grad(losses.batch_mean)(values, weights), [0.75, 0.25, 0])
    nothing = jax.value_and_grad(losses.batch_mean)(values, jnp.zeros(3))
    np.testing.assert_array_equal(jnp.hstack(nothing), 0)


def test_image_weights():
    mask = jnp.asarray(sample()[2])
    valid = jnp.asarray([True, False, True])
    np.testing.assert_array_equal(losses.image_weights(mask, valid), [1, 0, 1])
    pixels = losses.image_weights(mask, valid, kind="pixels")
    np.testing.assert_array_equal(pixels, mask.sum((1, 2, 3)) * np.array([1, 0, 1]))
    for preset in losses.PRESETS.values():
        assert preset["image_weights"] in losses.IMAGE_WEIGHTS
    assert losses.PRESETS["e2e_compat"] == {"normalize_target": False, "image_weights": "pixels"}


def test_half_precision_in_float32_out():
    pred, target, mask = sample()
    half = jnp.asarray(pred, jnp.bfloat16)
    for loss in TERMS.values():
        value = loss(half, target, mask)
        assert value.dtype == jnp.float32
        exact = loss(half.astype(jnp.float32), target, mask)
        np.testing.assert_allclose(value, exact, rtol=2e-6)


def test_vmap_equals_a_batch():
    arrays = sample(shape=(4, 8, 9, 1))
    folded = jax.jit(jax.vmap(losses.hybrid_depth))(*(x.reshape(2, 2, 8, 9, 1) for x in arrays))
    for name, value in hybrid(*arrays).items():
        np.testing.assert_allclose(np.ravel(folded[name]), value, rtol=1e-6)


def test_latent_distillation_is_a_masked_mean_square():
    rng = np.random.default_rng(0)
    ours, goal = jnp.asarray(rng.normal(size=(2, 2, 3, 4, 5)), jnp.float32)
    cells = jnp.asarray(rng.uniform(size=(2, 3, 4, 1)) < 0.5)
    np.testing.assert_allclose(
        losses.latent_distillation(ours, goal), ((ours - goal) ** 2).mean((1, 2, 3)), rtol=1e-6
    )
    expected = [((o - g)[c[..., 0]] ** 2).mean() for o, g, c in zip(ours, goal, cells, strict=True)]
    value = losses.latent_distillation(ours, goal, cells)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    gradient = jax.grad(lambda x, g: losses.latent_distillation(x, g, cells).sum())
    broken = jnp.where(cells, goal, jnp.nan)
    np.testing.assert_array_equal(losses.latent_distillation(ours, broken, cells), value)
    np.testing.assert_array_equal(gradient(ours, broken), gradient(ours, goal))
    for wrong in ((ours, goal[..., :1]), (ours, goal, cells[:1]), (ours, goal[:1], cells)):
        with pytest.raises(ValueError, match=r"latents must be .* alike"):
            losses.latent_distillation(*wrong)
    with pytest.raises(ValueError, match="a mask is boolean"):
        losses.latent_distillation(ours, goal, cells.astype(np.uint8))
    nothing = losses.latent_distillation(ours, goal, jnp.zeros_like(cells))
    np.testing.assert_array_equal(nothing, 0)
    assert losses.latent_distillation(ours.astype(jnp.bfloat16), goal).dtype == jnp.float32


def test_feature_distillation_is_relative_to_the_teachers_power():
    rng = np.random.default_rng(0)
    student = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 4, 5, 3), (2, 2, 2, 8))]
    teacher = [jnp.asarray(3 * rng.normal(size=f.shape), jnp.float32) for f in student]
    expected = sum(
        ((s - t) ** 2).mean((1, 2, 3)) / (t**2).mean((1, 2, 3))
        for s, t in zip(student, teacher, strict=True)
    )
    np.testing.assert_allclose(losses.feature_distillation(student, teacher), expected, rtol=1e-6)
    # A common factor, as between layers or teachers, drops out.
    louder = losses.feature_distillation([100 * f for f in student], [100 * f for f in teacher])
    np.testing.assert_allclose(louder, expected, rtol=1e-5)
    # The power is a constant: only the error itself has a gradient in the teacher.
    to_teacher = jax.grad(lambda t: losses.feature_distillation(student[:1], [t]).sum())(teacher[0])
    to_student = jax.grad(lambda s: losses.feature_distillation([s], teacher[:1]).sum())(student[0])
    np.testing.assert_allclose(to_teacher, -to_student, rtol=1e-6)
    silent = losses.feature_distillation(student[:1], [jnp.zeros_like(student[0])])
    np.testing.assert_allclose(silent, (student[0] ** 2).mean((1, 2, 3)), rtol=1e-6)


def test_features_that_do_not_pair_up_are_all_named():
    a, b, c = jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2, 4)), jnp.ones((1, 4, 4, 3))
    with pytest.raises(ValueError, match="2 student features for 1 teacher"):
        losses.feature_distillation([a, b], [a])
    with pytest.raises(ValueError, match=r"pair 0: .*2, 3\).*pair 2: .*4, 4, 3\)"):
        losses.feature_distillation([a, b, c], [b, b, a])
    with pytest.raises(ValueError, match="no pair"):
        losses.feature_distillation([], [])


def test_unknown_options_name_the_choices():
    pred, target, mask = map(jnp.asarray, sample())
    for loss in (losses.scale_shift_invariant, losses.hybrid_depth):
        with pytest.raises(ValueError, match="l1, trimmed_l1"):
            loss(pred, target, mask, penalty="l2")
    with pytest.raises(ValueError, match="valid, pixels"):
        losses.image_weights(mask, jnp.ones(3, bool), kind="images")
    for loss in (losses.edge_aware_gradient_huber, losses.hybrid_depth):
        with pytest.raises(ValueError, match=r"delta.*alpha.*tau.*num_scales"):
            loss(pred, target, mask, delta=0.0, alpha=-1.0, tau=0.0, num_scales=0)


@pytest.mark.parametrize("shapes", [((3,), (3, 1)), ((3, 1), (3,)), ((2, 4, 4, 1), (2,))], ids=str)
def test_a_mean_of_anything_but_a_loss_for_each_image_is_refused(shapes):
    with pytest.raises(Exception, match=r"[Ss]hape|for each image"):
        losses.batch_mean(*map(jnp.ones, shapes))
