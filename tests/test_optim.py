"""AdamW with its moments in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d3epth_jax.training import optim


def test_rounding_at_random_is_right_in_the_mean():
    x = jnp.asarray([1.001, -3.01, 1e-30, 0.0, 1.0, jnp.inf], jnp.float32)
    seeds = jax.random.bits(jax.random.key(0), (4000,), jnp.uint32)
    rounded = np.asarray(jax.vmap(lambda seed: optim.round_at_random(x, seed))(seeds), np.float32)
    np.testing.assert_allclose(rounded.mean(0), x, rtol=2e-4)
    assert len(np.unique(rounded[:, 0])) == 2  # its two neighbours, and nothing else
    assert (rounded[:, 3:] == np.asarray(x[3:])).all()
    step = jnp.asarray([3], jnp.int32)
    assert optim.round_at_random(step, seeds[0]) is step


def test_a_second_moment_in_bfloat16_follows_small_changes():
    """From 1 towards 4 by a thousandth a step: the nearest bfloat16 would be 1 for ever."""
    params = jnp.zeros(2000)
    adam = optax.scale_by_adam()
    kept = optim.state_in_bfloat16(adam)
    state, exact = kept.init(params), adam.init(params)
    start = {"mu": jnp.ones(2000), "nu": jnp.ones(2000)}
    exact = exact._replace(**start)
    state = state._replace(
        inner=exact._replace(**jax.tree.map(lambda x: x.astype(jnp.bfloat16), start))
    )
    gradient = jnp.full(2000, 2.0)
    for _ in range(50):
        _, state = jax.jit(kept.update)(gradient, state)
        _, exact = adam.update(gradient, exact)
    assert state.inner.nu.dtype == jnp.bfloat16
    assert exact.nu[0] > 1.1
    mean = np.asarray(state.inner.nu, np.float32).mean()
    np.testing.assert_allclose(mean, exact.nu[0], rtol=2e-3)


def test_moments_in_bfloat16_take_half_and_train_as_well():
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 16))}
    wanted = jax.random.normal(jax.random.key(1), (16, 16))

    def loss(params):
        return jnp.mean(jnp.square(params["kernel"] - wanted))

    ends, sizes = [], []
    for moments in optim.MOMENTS:
        tx = optim.make_optimizer(optax.constant_schedule(1e-2), moments=moments)

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        now, state = params, tx.init(params)
        sizes.append(sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim))
        for _ in range(400):
            now, state = step(now, state)
        ends.append(float(loss(now)))
    assert sizes[1] == sizes[0] / 2
    assert ends[0] < 0.1 * float(loss(params))
    assert ends[1] < 1.1 * ends[0]


@pytest.mark.parametrize("clip", [0.0, 1e9])
def test_gradients_are_not_clipped_where_none_is_asked_for(clip):
    params, grads = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.full((2, 2), 100.0)}
    tx = optim.make_optimizer(optax.constant_schedule(0.1), clip=clip, weight_decay=0.0)
    small = optim.make_optimizer(optax.constant_schedule(0.1), clip=1.0, weight_decay=0.0)
    state = tx.init(params)
    moments = optax.tree.get(tx.update(grads, state, params)[1], "mu")["kernel"]
    np.testing.assert_allclose(moments, 10.0, rtol=1e-6)
    clipped = optax.tree.get(small.update(grads, small.init(params), params)[1], "mu")["kernel"]
    np.testing.assert_allclose(np.linalg.norm(clipped), 0.1, rtol=1e-6)


def test_another_type_of_moments_is_refused():
    with pytest.raises(ValueError, match=r"optim.moments 'int8'.*float32.*bfloat16"):
        optim.make_optimizer(optax.constant_schedule(1e-2), moments="int8")
