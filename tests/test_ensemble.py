import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from diffusers import MarigoldDepthPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from d3epth_jax import ensemble


def members(count, height=31, width=45, noise=0.03, seed=0, spikes=False):
    """Affine copies of one relief, each with errors of its own; spikes are single wrong pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / width
    relief = 0.5 + 0.3 * np.sin(5 * x) * np.cos(4 * y) + 0.4 * ((x > 0.4) & (y < 0.5))
    result = []
    for _ in range(count):
        a, b, c = rng.uniform(0, 9, 3)
        error = noise * np.sin(a * x + b * y + c)
        scale = rng.uniform(0.2, 0.5)
        copy = scale * (relief + error) + rng.uniform(0, 0.3)
        if spikes:
            copy[rng.integers(height), rng.integers(width)] = rng.choice([0, 1])
        result.append(copy + rng.normal(size=copy.shape) * noise / 20)
    return np.stack(result)[..., None].astype(np.float32)


def diffusers_ensemble(predictions, parameters=None):
    """(prediction, uncertainty, (s, t)) of the reference, with given (s, t) or its own."""
    used, minimize = [], scipy.optimize.minimize

    def watch(function, start, **options):
        found = scipy.optimize.OptimizeResult(x=parameters)
        if parameters is None:
            found = minimize(function, start, **options)
        used.append(found.x)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scipy.optimize, "minimize", watch)
        depth = torch.from_numpy(np.moveaxis(predictions, -1, 1))
        maps = MarigoldDepthPipeline.ensemble_depth(depth, output_uncertainty=True)
    return *(x[0, 0].numpy()[..., None] for x in maps), used[0]


def marigold_cost(predictions, scale, shift):
    """METHOD 1 word by word, in float64."""
    aligned = [s * p.astype(np.float64) + t for p, s, t in zip(predictions, scale, shift)]  # noqa: B905
    total = 0.0
    for i in range(len(aligned)):
        for j in range(i):
            total += np.sqrt(((aligned[i] - aligned[j]) ** 2).mean())
    median = np.sort(aligned, axis=0)[(len(aligned) - 1) // 2]
    return total + 0.02 * (abs(median.min()) + abs(1 - median.max()))


def start_of(predictions):
    flat = predictions.reshape(len(predictions), -1).astype(np.float64)
    scale = 1 / np.ptp(flat, axis=1)
    return scale, -scale * flat.min(1)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10])
def test_merge_equals_diffusers(count):
    predictions = members(count)
    rng = np.random.default_rng(count)
    scale, shift = rng.uniform(0.5, 2, count), rng.normal(size=count) * 0.1
    prediction, uncertainty = ensemble.merge(predictions, scale, shift)
    expected = diffusers_ensemble(predictions, np.concatenate([scale, shift]))
    assert prediction.dtype == uncertainty.dtype == np.float32
    np.testing.assert_allclose(prediction, expected[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(uncertainty, expected[1], rtol=0, atol=1e-6)
    assert prediction.min() == 0 and prediction.max() == 1
    assert uncertainty.max() > 0.01 or count == 2  # of two, the lower deviation is always 0


@pytest.mark.parametrize("spikes", [False, True])
@pytest.mark.parametrize(
    ("count", "noise"),
    [(2, 0.05), (3, 0.02), (3, 1.0), (4, 0.1), (5, 0.005), (5, 0.5), (6, 0.0005), (10, 0.05)],
)
def test_cost_is_not_above_diffusers_nor_the_starts(count, noise, spikes):
    for seed in range(3):
        predictions = members(count, noise=noise, seed=seed, spikes=spikes)
        scale, shift = ensemble.align(predictions)
        cost = marigold_cost(predictions, scale, shift)
        theirs = np.split(diffusers_ensemble(predictions)[2], 2)
        assert cost <= marigold_cost(predictions, *theirs)
        start = start_of(predictions)
        assert cost <= marigold_cost(predictions, *start) + 1e-12
        # And the members did not shrink together to get there, which is cheaper still.
        deviations = predictions.std(axis=(1, 2, 3))
        assert scale @ deviations == pytest.approx(start[0] @ deviations, rel=1e-5)


def test_cost_at_the_resolution_of_alignment():
    predictions = members(3, height=700, width=1111, noise=0.1)
    small = ensemble._shrunk(predictions, 1024)
    assert small.shape == (3, 645, 1024, 1)  # 645.2: floor
    scale, shift = ensemble.align(predictions)
    theirs = np.split(diffusers_ensemble(predictions)[2], 2)
    assert marigold_cost(small, scale, shift) <= marigold_cost(small, *theirs)
    prediction, uncertainty = ensemble.ensemble_depth(predictions)
    assert prediction.shape == uncertainty.shape == (700, 1111, 1)


def test_full_descent_of_the_published_cost_would_lose_the_picture():
    # Why the sum of deviations is held: all members shrunk to nothing cost 0.02.
    predictions = members(5)
    scale, shift = ensemble.align(predictions)
    assert marigold_cost(predictions, 0 * scale, 0 * shift) == pytest.approx(0.02)
    assert marigold_cost(predictions, scale, shift) > 0.02


def test_merging_comes_nearer_to_the_truth_than_a_member():
    truth = members(1, noise=0)[0]
    truth = (truth - truth.min()) / np.ptp(truth)
    predictions = members(10, noise=0.05, spikes=True)

    def error(prediction):
        design = np.stack([prediction.ravel(), np.ones(prediction.size)], 1)
        fit = np.linalg.lstsq(design, truth.ravel(), rcond=None)[0]
        return np.sqrt(np.mean((design @ fit - truth.ravel()) ** 2))

    merged = error(ensemble.ensemble_depth(predictions)[0])
    assert merged < 0.5 * np.mean([error(p) for p in predictions])
    assert merged <= error(diffusers_ensemble(predictions)[0])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_gradient_equals_finite_differences(count):
    rng = np.random.default_rng(count)
    pixels = rng.normal(size=(count, 50)) + rng.normal(size=50)
    correlation = np.corrcoef(pixels)
    correlation[-1] = correlation[:, -1] = 0 if count > 2 else correlation[-1]  # no content
    spread = rng.uniform(0.5, 2, count)

    def value(x):
        return ensemble.disagreement(x, correlation)[0]

    steps = 1e-6 * np.eye(count)
    numeric = [(value(spread + step) - value(spread - step)) / 2e-6 for step in steps]
    gradient = ensemble.disagreement(spread, correlation)[1]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)
    assert gradient @ spread == pytest.approx(0, abs=1e-12)  # a common scale does not matter


def test_the_minimum_is_the_only_one():
    correlation = np.corrcoef(members(6, noise=0.2).reshape(6, -1))
    ends = [
        scipy.optimize.minimize(
            ensemble.disagreement, start, correlation, method="BFGS", jac=True
        ).x
        for start in np.random.default_rng(0).uniform(0.2, 5, (5, 6))
    ]
    ends = [end / end.sum() for end in ends]
    np.testing.assert_allclose(ends, np.broadcast_to(ends[0], (5, 6)), atol=1e-4)


def test_affine_copies_are_recovered():
    relief = members(1)[0].astype(np.float64)
    scales, shifts = np.array([1, 0.2, 5, 0.7]), np.array([0, 0.3, -2, 0.01])
    predictions = scales[:, None, None, None] * relief + shifts[:, None, None, None]
    scale, shift = ensemble.align(predictions)
    assert marigold_cost(predictions, scale, shift) < 1e-6
    prediction, uncertainty = ensemble.ensemble_depth(predictions)
    expected = (relief - relief.min()) / np.ptp(relief)
    np.testing.assert_allclose(prediction, expected, rtol=0, atol=1e-6)
    assert uncertainty.max() < 1e-6


def test_members_without_content_are_finite():
    flat = np.stack([np.full((7, 9, 1), v, np.float32) for v in (0.3, 0.3, 0.7)])
    some = np.concatenate([members(4, 7, 9), flat])
    nearly = flat + np.random.default_rng(0).uniform(0, 1e-7, flat.shape).astype(np.float32)
    equal = np.repeat(members(1, 7, 9), 4, 0)
    for predictions in (flat, flat[:2], some, some[3:5], nearly, equal, flat[:, :1, :1]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prediction, uncertainty = ensemble.ensemble_depth(predictions)
        for array in (prediction, uncertainty):
            assert array.shape == predictions.shape[1:] and np.isfinite(array).all()
        assert prediction.min() >= 0 and prediction.max() <= 1
    np.testing.assert_array_equal(ensemble.ensemble_depth(flat)[0], 0)
    # One member that saw nothing does not spoil four that did.
    with_flat = ensemble.ensemble_depth(some[:5])[0]
    assert np.corrcoef(with_flat.ravel(), some[0].ravel())[0, 1] > 0.95


def test_wrong_members_are_named():
    with pytest.raises(ValueError, match="at least 2 members, not 1"):
        ensemble.ensemble_depth(members(1))
    broken = members(4)
    broken[1, 3, 3], broken[3, 0, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="not finite: number 1, 3"):
        ensemble.ensemble_depth(broken)
    with pytest.raises(ValueError, match=r"\[E,H,W,1\], got shape \[4, 31, 45\]"):
        ensemble.ensemble_depth(members(4)[..., 0])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(0, 99),
    st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
    st.lists(st.floats(-3, 3), min_size=6, max_size=6),
)
def test_what_an_affine_change_of_members_leaves(count, seed, scales, shifts):
    predictions = members(count, 9, 13, noise=0.1, seed=seed).astype(np.float64)
    column = (count, 1, 1, 1)
    changed = predictions * np.reshape(scales[:count], column) + np.reshape(shifts[:count], column)
    cost = marigold_cost(predictions, *ensemble.align(predictions))
    assert marigold_cost(changed, *ensemble.align(changed)) == pytest.approx(cost, rel=0.02)
    prediction, uncertainty = ensemble.ensemble_depth(changed)
    assert prediction.min() == 0 and prediction.max() == 1 and uncertainty.min() >= 0
