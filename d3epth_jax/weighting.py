"""Dynamic task weighting: how much each loss counts, learnt from how the losses fall.

A `Weighting` is a triple of pure functions, like an optax transformation. Its state is a pytree
that lives in the train state and the checkpoint; `update` runs once per optimiser step on losses
already reduced over micro-batches and devices. The weights multiply the losses beside the fixed
factors beta of the configuration, which they exclude.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

State = Any
Tasks = Float[Array, " K"]

_TINY = 1e-8  # a mean of at most that is zero: divided by it, a loss would be all that counts


class Weighting(NamedTuple):
    """init() -> state; weights(state) -> float32 [K]; update(state, losses, valid) -> state.

    losses: float [K], valid: bool [K]. `weights` are constants to the gradient. A loss that is not
    valid, or not finite, leaves its task's statistics as they are.
    """

    init: Callable[[], State]
    weights: Callable[[State], Tasks]
    update: Callable[[State, Tasks, Bool[Array, " K"]], State]


class DwaState(NamedTuple):
    """Running statistics of K losses; a window is `window` optimiser steps."""

    step: Int[Array, ""]  # within the current window
    total: Tasks  # sum of the current window's valid losses
    count: Int[Array, " K"]  # and their number
    last: Tasks  # mean of the last full window
    before: Tasks  # mean of the one before
    full: Int[Array, " K"]  # how many full windows have a mean
    reference: Tasks  # mean of the first window: running, then frozen


def dwa(
    num_tasks: int,
    *,
    temperature: float = 2.0,
    window: int = 500,
    ratio_clip: tuple[float, float] | None = (0.5, 2.0),
    normalize: bool = True,
) -> Weighting:
    """Dynamic weight averaging: a loss that falls more slowly counts more (Liu et al., CVPR 2019).

    lambda = K softmax(r / temperature), r the ratio of the means of the last two full windows,
    clipped to `ratio_clip` (None: not, as published); lambda = 1 until there are two. Windows of
    optimiser steps stand for the paper's epochs. `normalize` divides by each loss's mean in the
    first window, as DWA itself does not balance magnitudes. A window without a valid loss, or in
    which all are zero, keeps its predecessor's mean. ValueError for options out of range.
    """
    ends = tuple(ratio_clip or (0.0, float("inf")))
    clips = len(ends) == 2 and 0 <= ends[0] <= ends[1]
    if num_tasks < 1 or window < 1 or not temperature > 0 or not clips:
        raise ValueError(
            "dwa needs num_tasks >= 1, window >= 1, temperature > 0 and ratio_clip (low, high) or "
            f"None, not {num_tasks}, {window}, {temperature} and {ratio_clip}"
        )

    low, high = ends

    def init() -> DwaState:
        zeros, none = jnp.zeros(num_tasks), jnp.zeros(num_tasks, jnp.int32)
        return DwaState(
            step=jnp.zeros((), jnp.int32),
            total=zeros,
            count=none,
            last=zeros,
            before=zeros,
            full=none,
            reference=jnp.ones(num_tasks),
        )

    def weights(state: DwaState) -> Tasks:
        ratio = jnp.clip(state.last / jnp.maximum(state.before, _TINY), low, high)
        ratio = jnp.where(state.full >= 2, ratio, 1)
        share = num_tasks * jax.nn.softmax(ratio / temperature)
        scale = state.reference if normalize else 1
        return jax.lax.stop_gradient(share / scale)

    def update(state: DwaState, losses: Tasks, valid: Bool[Array, " K"]) -> DwaState:
        losses, valid = _usable(losses, valid)
        step = state.step + 1
        total, count = state.total + losses, state.count + valid
        told = total > _TINY * count  # zeros say nothing of how large a loss is
        mean = jnp.where(told, total / jnp.maximum(count, 1), state.last)
        first = (state.full == 0) & told
        ends = step >= window
        known = told | (state.full > 0)  # no mean yet: the window does not count as full
        return DwaState(
            step=jnp.where(ends, 0, step),
            total=jnp.where(ends, 0, total),
            count=jnp.where(ends, 0, count),
            last=jnp.where(ends, mean, state.last),
            before=jnp.where(ends, state.last, state.before),
            full=jnp.minimum(state.full + (ends & known), 2),
            reference=jnp.where(first, mean, state.reference),
        )

    return Weighting(init, weights, update)


def static(num_tasks: int) -> Weighting:
    """Every weight is 1: the fixed factors beta alone decide. The state is empty."""

    def init() -> tuple[()]:
        return ()

    def weights(state: tuple[()]) -> Tasks:
        return jnp.ones(num_tasks)

    def update(state: tuple[()], losses: Tasks, valid: Bool[Array, " K"]) -> tuple[()]:
        return state

    return Weighting(init, weights, update)


def uncertainty(num_tasks: int) -> Weighting:
    """Homoscedastic uncertainty, w = exp(-s) (Kendall et al., CVPR 2018). The state is s [K].

    s follows the gradient of exp(-s) L + s by plain descent, s <- s - 0.025 (1 - exp(-s) L), so it
    needs no optimiser of its own; it settles where w = 1 / L.
    """

    def init() -> Tasks:
        return jnp.zeros(num_tasks)

    def weights(state: Tasks) -> Tasks:
        return jax.lax.stop_gradient(jnp.exp(-state))

    def update(state: Tasks, losses: Tasks, valid: Bool[Array, " K"]) -> Tasks:
        losses, valid = _usable(losses, valid)
        return jnp.where(valid, state - 0.025 * (1 - jnp.exp(-state) * losses), state)

    return Weighting(init, weights, update)


def _usable(losses: Tasks, valid: Bool[Array, " K"]) -> tuple[Tasks, Bool[Array, " K"]]:
    """The losses as constants, 0 where not valid: one NaN would stay in a running mean for good."""
    losses = jax.lax.stop_gradient(losses.astype(jnp.float32))
    valid = valid & jnp.isfinite(losses)
    return jnp.where(valid, losses, 0), valid
