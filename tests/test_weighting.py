import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3epth_jax import weighting

BOTH = jnp.asarray([True, True])
STRATEGIES = {
    "dwa": lambda: weighting.dwa(2, window=4),
    "static": lambda: weighting.static(2),
    "uncertainty": lambda: weighting.uncertainty(2),
}


def history(steps, num_tasks=2, seed=0):
    """Losses of different size that fall at different rates, with noise."""
    rng = np.random.default_rng(seed)
    rates, sizes = rng.uniform(0.01, 0.1, num_tasks), 10.0 ** rng.uniform(-2, 2, num_tasks)
    fall = np.exp(-rates * np.arange(steps)[:, None]) * sizes
    return (fall * rng.uniform(0.8, 1.25, (steps, num_tasks))).astype(np.float32)


def run(strategy, losses, valid=None, state=None):
    """The weights before each update and after the last one, [steps + 1, K], and the state."""
    state = strategy.init() if state is None else state
    update, weights = jax.jit(strategy.update), jax.jit(strategy.weights)
    valid = np.ones(losses.shape, bool) if valid is None else valid
    seen = [weights(state)]
    for loss, ok in zip(losses, valid, strict=True):
        state = update(state, jnp.asarray(loss), jnp.asarray(ok))
        seen.append(weights(state))
    return np.stack(seen), state


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_dwa_reproduces_liu_et_al_step_by_step(num_tasks, temperature):
    """w_k(t-1) = L_k(t-1) / L_k(t-2), lambda_k(t) = K softmax(w / T), 1 for the first two."""
    losses = history(20, num_tasks)
    strategy = weighting.dwa(
        num_tasks, temperature=temperature, window=1, ratio_clip=None, normalize=False
    )
    weights, _ = run(strategy, losses)
    for t in range(len(losses) + 1):
        expected = np.ones(num_tasks)
        if t >= 2:
            ratio = losses[t - 1].astype(np.float64) / losses[t - 2]
            expected = num_tasks * softmax(ratio / temperature)
        np.testing.assert_allclose(weights[t], expected, rtol=2e-6)


def reference_dwa(losses, valid, window, clip, temperature=2.0):
    """METHOD 5 in plain Python, task by task over the list of window means."""
    steps, num_tasks = losses.shape
    out = []
    for t in range(steps + 1):
        means = [[] for _ in range(num_tasks)]
        references = np.ones(num_tasks)
        for k in range(num_tasks):
            for start in range(0, t, window):
                end = start + window
                seen = losses[start : min(end, t), k][valid[start : min(end, t), k]]
                if not means[k] and len(seen):
                    references[k] = seen.astype(np.float64).mean()
                if end <= t and len(seen):
                    means[k].append(seen.astype(np.float64).mean())
                elif end <= t and means[k]:
                    means[k].append(means[k][-1])
        ratio = np.array([np.clip(m[-1] / m[-2], *clip) if len(m) > 1 else 1.0 for m in means])
        out.append(num_tasks * softmax(ratio / temperature) / references)
    return np.stack(out)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_dwa_follows_method_5_with_windows_and_missing_losses(seed, share):
    losses = history(30, seed=seed)
    valid = np.random.default_rng(seed).uniform(size=losses.shape) < share
    weights, _ = run(DWA_5, np.where(valid, losses, np.float32(np.nan)), valid)
    np.testing.assert_allclose(weights, reference_dwa(losses, valid, 5, (0.5, 2.0)), rtol=1e-5)


DWA_5 = weighting.dwa(2, window=5)


def test_reference_is_the_first_windows_mean_and_then_frozen():
    losses = history(12)
    weights, state = run(weighting.dwa(2, window=4), losses)
    np.testing.assert_array_equal(weights[0], 1)
    for t in (1, 2, 3, 4, 5, 7):  # lambda is 1 until step 8
        np.testing.assert_allclose(1 / weights[t], losses[: min(t, 4)].mean(0), rtol=1e-6)
    np.testing.assert_allclose(state.reference, losses[:4].mean(0), rtol=1e-6)


def test_ratio_clip_bounds_the_weights():
    losses = np.asarray([[1, 1], [100, 1e-6]], np.float32)
    weights, _ = run(weighting.dwa(2, window=1, normalize=False), losses)
    np.testing.assert_allclose(weights[-1], 2 * softmax(np.array([2.0, 0.5]) / 2), rtol=1e-6)


def test_a_loss_of_zeros_has_no_magnitude_to_be_divided_by():
    losses = np.zeros((6, 2), np.float32)
    losses[:, 1] = 4.0
    for clip in ((0.5, 2.0), None):
        weights, _ = run(weighting.dwa(2, window=2, ratio_clip=clip), losses)
        np.testing.assert_allclose(weights[-1], [1, 0.25], rtol=1e-6)


@pytest.mark.parametrize("name", ["dwa", "uncertainty"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_invalid_and_broken_losses_leave_their_task_alone(name, bad):
    losses = history(11)
    clean, _ = run(STRATEGIES[name](), losses)
    losses[::3, 1] = bad
    weights, _ = run(STRATEGIES[name](), losses)  # said to be valid, but not a number
    masked, _ = run(
        STRATEGIES[name](), np.where(np.isfinite(losses), losses, 7), np.isfinite(losses)
    )
    assert np.isfinite(weights).all()
    np.testing.assert_array_equal(weights, masked)
    if name == "uncertainty":  # its tasks do not interact
        np.testing.assert_array_equal(weights[:, 0], clean[:, 0])


def test_static_weights_are_one():
    weights, state = run(weighting.static(2), history(3))
    np.testing.assert_array_equal(weights, 1)
    assert jax.tree.leaves(state) == []


def test_uncertainty_follows_kendall():
    losses = history(40)
    weights, _ = run(weighting.uncertainty(2), losses)
    s = np.zeros(2)
    for t in range(len(losses) + 1):
        np.testing.assert_allclose(weights[t], np.exp(-s), rtol=2e-5)
        if t < len(losses):
            s = s - 0.025 * (1 - np.exp(-s) * losses[t])
    steady, _ = run(weighting.uncertainty(2), np.tile(np.float32([0.5, 2.0]), (400, 1)))
    np.testing.assert_allclose(steady[-1], [2, 0.5], rtol=1e-2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_state_survives_saving_in_the_middle_of_a_window(name, tmp_path):
    strategy, losses = STRATEGIES[name](), history(15)
    straight, end = run(strategy, losses)
    _, middle = run(strategy, losses[:6])  # windows are 4 long
    leaves, structure = jax.tree.flatten(middle)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as file:
        restored = jax.tree.unflatten(structure, [file[f"arr_{i}"] for i in range(len(leaves))])
    resumed, resumed_end = run(strategy, losses[6:], state=restored)
    np.testing.assert_array_equal(resumed, straight[6:])
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(resumed_end), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_state_keeps_its_shape_and_the_weights_have_no_gradient(name):
    strategy = STRATEGIES[name]()
    state = strategy.init()
    after = strategy.update(state, jnp.ones(2), BOTH)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    weights = strategy.weights(after)
    assert weights.shape == (2,) and weights.dtype == jnp.float32
    # As a carry of a loop, where every type must close.
    scanned, _ = jax.lax.scan(
        lambda s, x: (strategy.update(s, x, BOTH), strategy.weights(s)), state, jnp.ones((9, 2))
    )
    gradient = jax.grad(lambda x: strategy.weights(strategy.update(scanned, x, BOTH)).sum())
    np.testing.assert_array_equal(gradient(jnp.ones(2)), 0)


@pytest.mark.parametrize(
    "options",
    [
        {"num_tasks": 0},
        {"window": 0},
        {"temperature": 0.0},
        {"ratio_clip": (2.0, 0.5)},
        {"ratio_clip": (1.0,)},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="dwa needs"):
        weighting.dwa(**({"num_tasks": 2} | options))
