"""The train step: the one place that forms sum_k beta_k w_k L_k (METHOD 3, 5)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from d3epth_jax.train_state import TrainState, ema_decay, merge
from d3epth_jax.weighting import Weighting


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    weighting: Weighting,
    *,
    beta: Mapping[str, float],
    tasks: tuple[str, ...] = (),
    accumulate: int = 1,
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
      max_ema_decay: upper limit of the moving average's decay.

    frozen holds {"rest": parameters that do not train, "teacher": its parameters if there is one}.
    """

    def numerators(params, frozen, batch, coefficients):
        """Per group of losses that share their n_b: sum_k c_k sum_b n_b L_kb; and the sums."""
        losses, weights, metrics = loss_fn(merge(params, frozen["rest"]), frozen, batch)
        if set(losses) != set(beta):
            raise ValueError(f"loss_fn returns {sorted(losses)}, beta has {sorted(beta)}")
        sums, counts = {}, {}
        for name, value in (losses | metrics).items():
            n = jnp.asarray(weights.get(name, jnp.ones_like(value)), jnp.float32)
            # `where`: an image without weight may hold anything.
            sums[name] = jnp.sum(n * jnp.where(n > 0, value, 0.0))
            counts[name] = jnp.sum(n)
        groups = _groups(losses, weights)
        totals = tuple(sum(coefficients[name] * sums[name] for name in group) for group in groups)
        denominators = tuple(counts[group[0]] for group in groups)
        return totals, (denominators, sums, counts)

    def gradients(params, frozen, batch, coefficients):
        """One gradient tree per group: a single backward pass where all losses share their n_b."""
        totals, pullback, aux = jax.vjp(
            lambda p: numerators(p, frozen, batch, coefficients), params, has_aux=True
        )
        basis = [tuple(jnp.float32(i == j) for j in range(len(totals))) for i in range(len(totals))]
        return tuple(pullback(cotangent)[0] for cotangent in basis), aux

    def accumulated(params, frozen, batch, coefficients):
        if accumulate == 1:
            return gradients(params, frozen, batch, coefficients)

        def split(x):
            # Strided, so that every micro-batch stays spread over all devices.
            return jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)

        micro = jax.tree.map(split, batch)
        one = jax.eval_shape(
            gradients, params, frozen, jax.tree.map(lambda x: x[0], micro), coefficients
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)

        def body(total, part):
            return jax.tree.map(jnp.add, total, gradients(params, frozen, part, coefficients)), None

        return jax.lax.scan(body, zeros, micro)[0]

    def train_step(state: TrainState, frozen, batch) -> tuple[TrainState, dict]:
        task_weights = dict(zip(tasks, weighting.weights(state.weighting), strict=True))
        coefficients = {name: b * task_weights.get(name, 1.0) for name, b in beta.items()}

        per_group, (denominators, sums, counts) = accumulated(
            state.params, frozen, batch, coefficients
        )
        scales = [1 / jnp.maximum(n, 1e-12) for n in denominators]
        gradient = jax.tree.map(
            lambda *gs: sum(s * g for s, g in zip(scales, gs, strict=True)), *per_group
        )
        means = {name: sums[name] / jnp.maximum(counts[name], 1e-12) for name in sums}

        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step, max_ema_decay)
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
            ema=jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params),
            weighting=task_state,
        )
        size = jax.tree.leaves(batch)[0].shape[0]
        metrics = {
            "loss": sum(coefficients[name] * means[name] for name in beta),
            "grad_norm": optax.global_norm(gradient),
            **{f"loss/{name}": means[name] for name in beta},
            **{f"weight/{name}": w for name, w in task_weights.items()},
            **{name: mean for name, mean in means.items() if name not in beta},
        }
        if tasks:
            metrics["images_without_loss"] = size - jnp.minimum(counts[tasks[0]], size)
        return new_state, metrics

    return train_step


def _groups(losses: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]) -> list[list[str]]:
    """Names of losses by the array of n_b they share; identity of the traced array is static."""
    groups = {}
    for name in losses:
        groups.setdefault(id(weights[name]), []).append(name)
    return list(groups.values())
