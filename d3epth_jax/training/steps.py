"""The train step: the one place that forms sum_k beta_k w_k L_k (METHOD 3, 5)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from d3epth_jax.losses import batch_sums
from d3epth_jax.training.train_state import TrainState, ema_decay, merge
from d3epth_jax.weighting import Weighting


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    weighting: Weighting,
    *,
    beta: Mapping[str, float],
    tasks: tuple[str, ...] = (),
    accumulate: int = 1,
    weights_from_data: bool = False,
    max_ema_decay: float = 0.9999,
):
    """A function step(state, frozen, batch) -> (state, metrics), to be jitted by the caller.

    The total is sum_k beta_k w_k L_k with L_k = sum_b n_b L_kb / sum_b n_b over the whole batch:
    numerators and denominators are summed apart over micro-batches, and, since the batch is one
    global array, over devices and hosts.

    Args:
      loss_fn: loss_fn(params, frozen, batch) -> (losses, weights, metrics), each {name: [B]};
        `weights` holds the n_b of every loss, and may hold those of a metric (else 1).
      tx: the optimiser; `tx.update` sees the gradient of the trainable parameters only.
      weighting: gives w for `tasks`, in that order; every other loss has w = 1.
      beta: the fixed coefficient of every loss that loss_fn returns.
      tasks: names of the dynamically weighted losses.
      accumulate: number of micro-batches; it must divide the batch size.
      weights_from_data: no n_b depends on params (stage 1). Micro-batches' denominators are then
        known before any gradient, and one backward pass serves all losses; else it takes one for
        every array of n_b.
      max_ema_decay: upper limit of the moving average's decay.

    frozen holds {"rest": parameters that do not train, "teacher": its parameters if there is one}.
    """

    def totals(params, frozen, batch, coefficients, known):
        """What is differentiated, as a tuple, with the denominators that are still to divide it.

        known: the whole batch's denominators by name, or None.
        """
        losses, weights, metrics = loss_fn(merge(params, frozen["rest"]), frozen, batch)
        if set(losses) != set(beta):
            raise ValueError(f"loss_fn returns {sorted(losses)}, beta has {sorted(beta)}")
        sums, counts = {}, {}
        for name, value in (losses | metrics).items():
            n = jnp.asarray(weights.get(name, jnp.ones_like(value)), jnp.float32)
            sums[name], counts[name] = batch_sums(value, n)
        if accumulate == 1:
            known = counts
        if known is not None:
            total = sum(coefficients[name] * _mean(sums[name], known[name]) for name in losses)
            divided = jnp.float32(1 / accumulate)  # already: summed over micro-batches it is 1
            return (total,), ((divided,), sums, counts)
        groups = _groups(losses, weights)
        numerators = tuple(sum(coefficients[n] * sums[n] for n in group) for group in groups)
        return numerators, (tuple(counts[group[0]] for group in groups), sums, counts)

    def gradients(params, frozen, batch, coefficients, known=None):
        """One gradient tree, and one backward pass, per entry of `totals`."""
        values, pullback, aux = jax.vjp(
            lambda p: totals(p, frozen, batch, coefficients, known), params, has_aux=True
        )
        basis = [tuple(jnp.float32(i == j) for j in range(len(values))) for i in range(len(values))]
        return tuple(pullback(cotangent)[0] for cotangent in basis), aux

    def accumulated(params, frozen, batch, coefficients):
        if accumulate == 1:
            return gradients(params, frozen, batch, coefficients)

        def split(x):
            # Strided, so that every micro-batch stays spread over all devices.
            return jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)

        known = None
        if weights_from_data:
            # Of all this the compiler keeps what the counts need: masks, and no network.
            known = totals(params, frozen, batch, coefficients, None)[1][-1]

        def of_part(part):
            return gradients(params, frozen, part, coefficients, known)

        def add(total, part):
            return jax.tree.map(jnp.add, total, of_part(part)), None

        micro = jax.tree.map(split, batch)
        one = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
        return jax.lax.scan(add, zeros, micro)[0]

    def train_step(state: TrainState, frozen, batch) -> tuple[TrainState, dict]:
        task_weights = dict(zip(tasks, weighting.weights(state.weighting), strict=True))
        coefficients = {name: b * task_weights.get(name, 1.0) for name, b in beta.items()}

        per_group, (denominators, sums, counts) = accumulated(
            state.params, frozen, batch, coefficients
        )
        gradient = jax.tree.map(
            lambda *gs: sum(_mean(g, n) for g, n in zip(gs, denominators, strict=True)), *per_group
        )
        means = {name: _mean(sums[name], counts[name]) for name in sums}

        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema:
            decay = ema_decay(state.step, max_ema_decay)
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        task_state = state.weighting
        if tasks:
            task_state = weighting.update(
                task_state,
                jnp.stack([means[name] for name in tasks]),
                jnp.stack([counts[name] > 0 for name in tasks]),
            )
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            weighting=task_state,
        )
        metrics = {
            "loss": sum(coefficients[name] * means[name] for name in beta),
            "grad_norm": optax.global_norm(gradient),
            **{f"loss/{name}": means[name] for name in beta},
            **{f"weight/{name}": w for name, w in task_weights.items()},
            **{name: mean for name, mean in means.items() if name not in beta},
        }
        return new_state, metrics

    return train_step


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
    return total / jnp.maximum(count, jnp.finfo(jnp.float32).tiny)


def _groups(losses: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]) -> list[list[str]]:
    """Names of losses by the array of n_b they share; identity of the traced array is static.

    While micro-batches are summed no denominator is known, so losses that share one can share a
    gradient tree, and others cannot.
    """
    groups = {}
    for name in losses:
        groups.setdefault(id(weights[name]), []).append(name)
    return list(groups.values())
