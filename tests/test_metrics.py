import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d3epth_jax import metrics

KEYS = {"abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "i_rmse", "silog"}
KEYS |= {"delta1", "delta2", "delta3"}
compute = jax.jit(metrics.compute, static_argnames=("min_depth", "max_depth"))
align = jax.jit(
    metrics.align_to_metric, static_argnames=("space", "min_depth", "max_depth", "max_resolution")
)
boundary_f1 = jax.jit(metrics.boundary_f1)


def sample(seed=0, shape=(3, 14, 19, 1), density=0.8):
    rng = np.random.default_rng(seed)
    target = rng.lognormal(0.5, 0.8, shape).astype(np.float32)
    pred = (target * rng.lognormal(0, 0.25, shape)).astype(np.float32)
    return pred, target, rng.uniform(size=shape) < density


def reference(pred, target, mask, low, high):
    """One image in float64, by boolean indexing."""
    valid = mask & (target > low) & (target < high)
    p, d = pred[valid].astype(np.float64), target[valid].astype(np.float64)
    p = np.clip(np.clip(p, low, high), 1e-6, None)
    e = np.log(p) - np.log(d)
    worst = np.maximum(p / d, d / p)
    return {
        "abs_rel": np.mean(np.abs(p - d) / d),
        "sq_rel": np.mean((p - d) ** 2 / d),
        "rmse": np.sqrt(np.mean((p - d) ** 2)),
        "rmse_log": np.sqrt(np.mean(e**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(d))),
        "delta1": np.mean(worst < 1.25),
        "delta2": np.mean(worst < 1.25**2),
        "delta3": np.mean(worst < 1.25**3),
        "i_rmse": np.sqrt(np.mean((1 / p - 1 / d) ** 2)),
        "silog": 100 * np.std(e),
    }


@pytest.mark.parametrize(("low", "high"), [(1e-3, 10.0), (0.5, 3.0), (0.0, np.inf)])
def test_metrics_equal_their_formulas(low, high):
    pred, target, mask = sample()
    pred[:, 0] = 0  # clipped
    ours = compute(pred, target, mask, min_depth=low, max_depth=high)
    assert set(ours) == KEYS
    for i in range(len(pred)):
        for name, value in reference(pred[i], target[i], mask[i], low, high).items():
            assert float(ours[name][i]) == pytest.approx(value, rel=2e-5), name


def test_unknown_pixels_never_matter():
    pred, target, mask = sample()
    value = compute(pred, target, mask, min_depth=1e-3, max_depth=10.0)
    for filler in (np.nan, np.inf, 0, -5):
        p, d = (np.where(mask, x, np.float32(filler)) for x in (pred, target))
        same = compute(p, d, mask, min_depth=1e-3, max_depth=10.0)
        for name in KEYS:
            np.testing.assert_array_equal(same[name], value[name])
    f1 = boundary_f1(pred, target, mask)
    p, d = (np.where(mask, x, np.float32(np.nan)) for x in (pred, target))
    np.testing.assert_array_equal(boundary_f1(p, d, mask), f1)


def test_a_perfect_prediction_and_one_off_by_a_factor():
    _, target, mask = sample()
    ours = compute(target, target, mask, min_depth=0.0, max_depth=np.inf)
    assert all(np.all(v == (1 if name.startswith("delta") else 0)) for name, v in ours.items())
    # mean(e^2) - mean(e)^2 in float32 would leave 100 sqrt(1e-7) = 0.03 here, or a NaN.
    factor = compute(3 * target, target, mask, min_depth=0.0, max_depth=np.inf)
    assert np.abs(factor["silog"]).max() < 1e-4
    np.testing.assert_allclose(factor["abs_rel"], 2, rtol=1e-6)


def test_an_image_without_a_valid_pixel_is_nan_and_alone():
    pred, target, mask = sample()
    mask[1] = False
    target[2] = 100  # beyond the range
    ours = compute(pred, target, mask, min_depth=1e-3, max_depth=10.0)
    ours["boundary_f1"] = boundary_f1(pred, target, mask)
    for name, value in ours.items():
        assert np.isfinite(value[0]), name
        assert np.isnan(value[1]), name
        assert np.isnan(value[2]) or name == "boundary_f1"


@pytest.mark.parametrize("space", ["depth", "disparity", "sqrt_disparity"])
def test_alignment_to_metres_is_least_squares_in_its_space(space):
    rng = np.random.default_rng(0)
    _, target, mask = sample(shape=(3, 24, 31, 1))
    power = {"depth": 1, "disparity": -1, "sqrt_disparity": -0.5}[space]
    values = target.astype(np.float64) ** power
    pred = (0.3 * values + 0.1 + rng.normal(0, 0.05, values.shape)).astype(np.float32)
    pred[:, :, :2] = 0
    low, high = 0.3, 8.0
    metres, scale = align(pred, target, mask, space=space, min_depth=low, max_depth=high)
    for i in range(len(pred)):
        fit = mask[i] & (target[i] > low) & (target[i] < high)
        if space != "depth":
            fit &= pred[i] > 0
        p = pred[i].astype(np.float64)
        design = np.stack([p[fit], np.ones(fit.sum())], 1)
        (s, t), *_ = np.linalg.lstsq(design, values[i][fit], rcond=None)
        expected = s * p + t
        if space != "depth":
            expected = np.maximum(expected, 1e-3) ** (1 / power)
        assert float(scale[i]) == pytest.approx(s, rel=1e-5)
        np.testing.assert_allclose(metres[i], np.clip(expected, low, high), rtol=2e-5)
    assert (metres == low).any() and (metres == high).any()  # clipping was at work


def test_alignment_of_a_large_offset_keeps_its_digits():
    _, target, mask = sample()
    pred = (1e3 + 1e-2 * target).astype(np.float32)
    metres, _ = align(pred, target, mask, space="depth", min_depth=0.0, max_depth=np.inf)
    for i in range(len(pred)):
        p, d = pred[i].astype(np.float64), target[i].astype(np.float64)
        s, t = np.polyfit(p[mask[i]] - 1e3, d[mask[i]], 1)
        np.testing.assert_allclose(metres[i], np.maximum(s * (p - 1e3) + t, 1e-6), atol=1e-4)


def test_alignment_without_a_fit_is_the_mean():
    pred, target, mask = sample()
    pred[:] = 0.5
    mask[2] = False
    metres, scale = align(pred, target, mask, space="depth", min_depth=1e-3, max_depth=1e3)
    np.testing.assert_array_equal(scale, 0)
    for i in (0, 1):
        np.testing.assert_allclose(metres[i], target[i][mask[i]].mean(), rtol=1e-5)
    assert np.isfinite(metres).all()


def test_large_images_are_fitted_on_a_nearest_subsampling():
    """As torch's nearest interpolation with scale factor 10/31 samples them."""
    pred, target, mask = sample(shape=(2, 20, 31, 1))
    options = {"space": "depth", "min_depth": 0.0, "max_depth": np.inf}
    metres, scale = align(pred, target, mask, max_resolution=10, **options)
    rows = np.floor(np.arange(int(20 * 10 / 31)) * 3.1).astype(int)
    columns = np.floor(np.arange(10) * 3.1).astype(int)
    for i in range(2):
        small = [x[i, rows][:, columns, 0] for x in (pred, target, mask)]
        s, t = np.polyfit(small[0][small[2]].astype(np.float64), small[1][small[2]], 1)
        assert float(scale[i]) == pytest.approx(s, rel=1e-4)
        np.testing.assert_allclose(metres[i], np.maximum(s * pred[i] + t, 1e-6), rtol=1e-4)
    same, _ = align(pred, target, mask, max_resolution=31, **options)
    np.testing.assert_array_equal(same, align(pred, target, mask, **options)[0])


def test_unknown_space_names_the_choices():
    with pytest.raises(ValueError, match="depth, disparity, sqrt_disparity"):
        metrics.align_to_metric(
            *map(jnp.asarray, sample()), space="log", min_depth=0.0, max_depth=1.0
        )


def reference_boundary_f1(pred, target, mask):
    """One image, pair by pair."""
    height, width = target.shape
    p, d = 1 / pred.astype(np.float64), 1 / target.astype(np.float64)
    thresholds = np.linspace(1.05, 1.25, 10)
    score = 0.0
    for t in thresholds:
        recalls, precisions = [], []
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            hits = predicted = true = 0
            for y, x in np.ndindex(height, width):
                other = y + dy, x + dx
                if not (0 <= other[0] < height and 0 <= other[1] < width):
                    continue
                if not (mask[y, x] and mask[other]):
                    continue
                in_pred, in_target = p[other] / p[y, x] > t, d[other] / d[y, x] > t
                predicted += in_pred
                true += in_target
                hits += in_pred and in_target
            recalls.append(hits / max(true, 1))
            precisions.append(hits / max(predicted, 1))
        r, c = np.mean(recalls), np.mean(precisions)
        score += (2 * r * c / (r + c) if r + c else 0.0) * t / thresholds.sum()
    return score


def test_boundary_f1_equals_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    shape = (3, 10, 13, 1)
    target = (2 * 1.1 ** rng.integers(0, 4, shape)).astype(np.float32)
    pred = (target * rng.lognormal(0, 0.06, shape)).astype(np.float32)
    mask = rng.uniform(size=shape) < 0.85
    ours = boundary_f1(pred, target, mask)
    for i in range(3):
        expected = reference_boundary_f1(*(x[i, ..., 0] for x in (pred, target, mask)))
        assert 0.2 < expected < 0.9
        assert float(ours[i]) == pytest.approx(expected, rel=1e-5)


def test_boundary_f1_drops_pairs_that_touch_unknown_ground_truth():
    target = np.ones((1, 6, 8, 1), np.float32)
    target[:, :, 4:] = 2  # one true edge
    mask = np.ones(target.shape, bool)
    assert boundary_f1(target, target, mask)[0] == pytest.approx(0.25)  # 1 of 4 directions
    pred = target.copy()
    pred[:, :, 1] = 3  # a false edge
    assert boundary_f1(pred, target, mask)[0] < 0.25
    mask[:, :, 1] = False  # not known there: no longer counted
    assert boundary_f1(pred, target, mask)[0] == pytest.approx(0.25)
    hole = np.where(mask, target, 0)  # depth 0 is not known either, whatever the mask says
    assert boundary_f1(pred, hole, np.ones_like(mask))[0] == pytest.approx(0.25)
    flat = np.ones_like(target)
    assert boundary_f1(flat, target, mask)[0] == 0
    mask[:] = False
    mask[:, ::2, ::2] = True  # no two neighbours known
    assert np.isnan(boundary_f1(pred, target, mask)[0])


def test_boundary_errors_are_those_of_ibims():
    from scipy.ndimage import distance_transform_edt
    from skimage.feature import canny

    columns = np.arange(60)
    pred = np.where(columns < 30, 1.0, 5.0) + np.zeros((40, 1))
    edges = np.zeros((40, 60), bool)
    edges[:, 33] = True
    found = canny((pred - 1) / 4, sigma=2**0.5, low_threshold=0.15, high_threshold=0.3)
    assert found.sum() > 20
    to_true, to_pred = distance_transform_edt(~edges), distance_transform_edt(~found)
    ours = metrics.depth_boundary_errors(pred, edges)
    assert ours["dbe_acc"] == pytest.approx(to_true[found].mean())
    total = np.minimum(to_true, 10)[found].sum() + np.minimum(to_pred, 10)[edges].sum()
    assert ours["dbe_comp"] == pytest.approx(total / (found.sum() + edges.sum()))
    assert 2 < ours["dbe_acc"] < 5
    assert metrics.depth_boundary_errors(7 * pred + 3, edges) == pytest.approx(ours)


def test_boundary_errors_without_edges():
    step = np.where(np.arange(60) < 8, 1.0, 5.0) + np.zeros((40, 1))
    edges = np.zeros((40, 60), bool)
    assert all(np.isnan(v) for v in metrics.depth_boundary_errors(step, edges).values())
    edges[:, 40] = True
    worst = {"dbe_acc": 10, "dbe_comp": 10}
    assert metrics.depth_boundary_errors(np.ones((40, 60)), edges) == worst  # nothing predicted
    assert metrics.depth_boundary_errors(step, edges) == worst  # nothing near
    with pytest.raises(ValueError, match=r"\(40, 60\).*\(40, 59\)"):
        metrics.depth_boundary_errors(step, edges[:, :59])
