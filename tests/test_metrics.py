import numpy as np
import pytest

from d3epth_jax import metrics
from d3epth_jax.metrics import align_to_metric as align
from d3epth_jax.metrics import boundary_f1, compute
from tests import metrics_oracle

KEYS = {"abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "i_rmse", "silog"}
KEYS |= {"delta1", "delta2", "delta3"}


def sample(seed=0, shape=(3, 14, 19, 1), density=0.8):
    rng = np.random.default_rng(seed)
    target = rng.lognormal(0.5, 0.8, shape).astype(np.float32)
    pred = (target * rng.lognormal(0, 0.25, shape)).astype(np.float32)
    return pred, target, rng.uniform(size=shape) < density


@pytest.mark.parametrize(("low", "high"), [(1e-3, 10.0), (0.5, 3.0), (0.0, np.inf)])
def test_metrics_equal_their_formulas(low, high):
    pred, target, mask = sample()
    pred[:, 0] = 0  # clipped
    ours = compute(pred, target, mask, min_depth=low, max_depth=high)
    assert set(ours) == KEYS
    for i in range(len(pred)):
        counted = mask[i] & (target[i] > low) & (target[i] < high)
        clipped = np.clip(pred[i].astype(np.float64), max(low, 1e-6), high)
        for name, value in metrics_oracle.metrics(clipped, target[i], counted).items():
            assert ours[name][i] == pytest.approx(value, rel=1e-9), name


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


SPACES = {"depth": 1, "disparity": -1, "sqrt_disparity": -0.5}


@pytest.mark.parametrize("space", SPACES)
def test_alignment_to_metres_is_least_squares_in_its_space(space):
    rng = np.random.default_rng(0)
    _, target, mask = sample(shape=(3, 24, 31, 1))
    values = target.astype(np.float64) ** SPACES[space]
    pred = (0.3 * values + 0.1 + rng.normal(0, 0.05, values.shape)).astype(np.float32)
    pred[:, :, :2] = 0
    low, high = 0.3, 8.0
    counted = mask & (target > low) & (target < high)
    metres, scale = align(pred, target, counted, space=space, min_depth=low, max_depth=high)
    for i in range(len(pred)):
        arrays = (x[i, ..., 0] for x in (pred, target, counted))
        expected, slope = metrics_oracle.align(*arrays, space, (low, high))
        assert scale[i] == pytest.approx(slope, rel=1e-9)
        np.testing.assert_allclose(metres[i, ..., 0], expected, rtol=1e-9)
    assert (metres == low).any() and (metres == high).any()  # clipping was at work


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 1e3), (50, 1e6), (1e4, -1e4)])
def test_an_affine_prediction_is_perfect_whatever_its_offset(space, scale, offset):
    _, target, mask = sample()
    if space != "depth":
        offset = abs(offset)  # the fit is over prediction > 0
    pred = scale * target.astype(np.float64) ** SPACES[space] + offset
    metres, _ = align(pred, target, mask, space=space, min_depth=1e-3, max_depth=80.0)
    scores = compute(metres, target, mask, min_depth=1e-3, max_depth=80.0)
    assert (scores["abs_rel"] < 1e-6).all() and (scores["delta1"] == 1).all()


@pytest.mark.parametrize("space", SPACES)
def test_an_affine_prediction_in_float32_is_perfect_too(space):
    _, target, mask = sample()
    pred = (7 * target.astype(np.float64) ** SPACES[space] + 1).astype(np.float32)
    metres, _ = align(pred, target, mask, space=space, min_depth=1e-3, max_depth=80.0)
    assert (compute(metres, target, mask, min_depth=0, max_depth=80)["abs_rel"] < 1e-6).all()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("alignment", SPACES)
def test_a_prediction_can_be_aligned_in_another_space_than_its_own(space, alignment):
    _, target, mask = sample()
    pred = 3 * target.astype(np.float64) ** SPACES[space]  # right up to scale, so in every space
    options = {"space": space, "alignment": alignment, "min_depth": 1e-3, "max_depth": 80.0}
    metres, scale = align(pred, target, mask, **options)
    np.testing.assert_allclose(metres[mask], target[mask], rtol=1e-9)
    assert (scale > 0).all()
    if alignment != space:  # with a shift it is right in its own space alone
        shifted, _ = align(pred + 1, target, mask, **options)
        assert np.abs(shifted / target - 1)[mask].mean() > 0.02


def test_a_depth_of_zero_is_the_nearest_also_where_disparities_are_aligned():
    _, target, mask = sample()
    pred = target.copy()
    pred[:, 3:5] = 0
    metres, scale = align(
        pred, target, mask, space="depth", alignment="disparity", min_depth=0.1, max_depth=80.0
    )
    assert (metres[:, 3:5] == 0.1).all()
    np.testing.assert_allclose(scale, 1)  # they are not fitted
    pred = 1 / target
    pred[:, 3:5] = 0
    options = {"space": "disparity", "alignment": "depth", "min_depth": 0.1, "max_depth": 80.0}
    assert (align(pred, target, mask, **options)[0][:, 3:5] == 80).all()  # no disparity: far


def test_metric_predictions_need_no_alignment():
    _, target, mask = sample()
    for space, power in SPACES.items():
        pred = (2 * target.astype(np.float64)) ** power
        options = {"space": space, "alignment": "none", "min_depth": 1e-3, "max_depth": 500.0}
        metres, scale = align(pred, target, mask, **options)
        np.testing.assert_allclose(metres, 2 * target, rtol=1e-9)
        np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_alignment_without_a_fit_is_the_mean(dtype, value):
    pred, target, mask = sample()
    pred = np.full(pred.shape, value, dtype)
    mask[2] = False
    metres, scale = align(pred, target, mask, space="depth", min_depth=1e-3, max_depth=1e3)
    np.testing.assert_array_equal(scale, 0)
    for i in (0, 1):
        np.testing.assert_allclose(metres[i], target[i][mask[i]].astype(float).mean(), rtol=1e-6)
    assert np.isfinite(metres).all()


@pytest.mark.parametrize(
    "shape, longest",
    [((20, 31), 10), ((31, 20), 10), ((63, 95), 10), ((40, 100), 10), ((1000, 8), 999)],
)
def test_large_images_are_fitted_on_a_nearest_subsampling(shape, longest):
    """As torch's nearest interpolation with a scale factor samples them."""
    import torch

    pred, target, mask = sample(shape=(2, *shape, 1))
    options = {"space": "depth", "min_depth": 0.0, "max_depth": np.inf}
    metres, scale = align(pred, target, mask, max_resolution=longest, **options)
    resized = [
        torch.nn.functional.interpolate(
            torch.tensor(x[..., 0].astype(np.float64))[:, None],
            scale_factor=longest / max(shape),
            mode="nearest",
        )[:, 0].numpy()
        for x in (pred, target, mask)
    ]
    for i in range(2):
        p, d, m = (x[i] for x in resized)
        s, t = np.polyfit(p[m > 0], d[m > 0], 1)
        assert scale[i] == pytest.approx(s, rel=1e-9)
        np.testing.assert_allclose(metres[i], np.maximum(s * pred[i] + t, 1e-6), rtol=1e-6)
    same, _ = align(pred, target, mask, max_resolution=max(shape), **options)
    np.testing.assert_array_equal(same, align(pred, target, mask, **options)[0])


def test_a_sparse_truth_that_the_subsampling_misses_is_fitted_on_all_its_pixels():
    pred, target, mask = sample(shape=(1, 40, 40, 1))
    mask[:] = False
    mask[:, 1::4, 1::4] = True
    target[mask] = 2 * pred[mask] + 3
    metres, scale = align(
        pred, target, mask, space="depth", min_depth=0.0, max_depth=np.inf, max_resolution=10
    )
    assert scale[0] == pytest.approx(2, rel=1e-5)
    np.testing.assert_allclose(metres[mask], target[mask], rtol=1e-5)


def test_unknown_spaces_and_mixed_shapes_are_named():
    options = {"min_depth": 0.0, "max_depth": 1.0}
    with pytest.raises(ValueError, match=r"'log'.*sqrt_disparity"):
        align(*sample(), space="log", **options)
    with pytest.raises(ValueError, match="'log'"):
        align(*sample(), space="depth", alignment="log", **options)
    pred, target, mask = sample()
    with pytest.raises(ValueError, match=r"\[3, 14, 18, 1\].*\[3, 14, 19, 1\]"):
        compute(pred[:, :, 1:], target, mask, **options)
    with pytest.raises(ValueError, match="one shape"):
        boundary_f1(pred[..., 0], target[..., 0], mask[..., 0])


def test_blocks_of_rows_change_nothing(monkeypatch):
    pred, target, mask = sample(shape=(2, 23, 30, 1))

    def everything():
        options = {"space": "disparity", "min_depth": 0.1, "max_depth": 20.0}
        metres, scale = align(pred, target, mask, **options)
        values = compute(metres, target, mask, min_depth=0.1, max_depth=20.0)
        return {**values, "scale": scale, "f1": boundary_f1(metres, target, mask)}

    whole = everything()
    for rows in (1, 7, 22):
        monkeypatch.setattr(metrics, "_BLOCK", 30 * rows)
        for name, value in everything().items():
            np.testing.assert_allclose(value, whole[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_boundary_f1_equals_its_formula(seed):
    rng = np.random.default_rng(seed)
    shape = (3, 10, 13, 1)
    target = (2 * 1.1 ** rng.integers(0, 4, shape)).astype(np.float32)
    pred = (target * rng.lognormal(0, 0.06, shape)).astype(np.float32)
    mask = rng.uniform(size=shape) < 0.85
    ours = boundary_f1(pred, target, mask)
    for i in range(3):
        expected = metrics_oracle.boundary_f1(*(x[i, ..., 0] for x in (pred, target, mask)))
        assert 0.2 < expected < 0.9
        assert ours[i] == pytest.approx(expected, rel=1e-9)


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
