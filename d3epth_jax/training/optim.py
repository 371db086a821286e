"""The optimiser: AdamW with warm-up, decay and clipping (METHOD 7, 8)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MOMENTS = ("float32", "bfloat16")


def make_schedule(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 100,
    schedule: str = "exponential",
) -> optax.Schedule:
    """Linear warm-up, then a decay to 1 % of `learning_rate` at `total_steps` (or none)."""
    steps = max(total_steps - warmup_steps, 1)
    decays = {
        "exponential": optax.exponential_decay(learning_rate, steps, 0.01),
        "cosine": optax.cosine_decay_schedule(learning_rate, steps, alpha=0.01),
        "constant": optax.constant_schedule(learning_rate),
    }
    if schedule not in decays:
        raise ValueError(f"unknown schedule {schedule!r}: choose one of {list(decays)}")
    if warmup_steps == 0:
        return decays[schedule]
    # The first step moves already: a schedule that begins at 0 wastes it.
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decays[schedule]], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 1e-2,
    clip: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    moments: str = "float32",
) -> optax.GradientTransformation:
    """AdamW after clipping to the global norm `clip`, 0 for none; biases and norms do not decay.

    `moments` is the type in which both moments are kept; of bfloat16 they take half the memory.
    """
    if moments not in MOMENTS:
        raise ValueError(f"unknown optim.moments {moments!r}: choose one of {list(MOMENTS)}")
    adamw = optax.adamw(
        schedule,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    if moments == "bfloat16":
        adamw = state_in_bfloat16(adamw)
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw


class Bfloat16State(NamedTuple):
    """A transformation's state with its floating-point arrays in bfloat16."""

    step: jax.Array
    inner: Any


def state_in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the state of `inner` in bfloat16, computes in float32, and rounds at random.

    The nearest bfloat16 would not do: in one step Adam's second moment changes by up to a
    thousandth of itself, which is less than half a bfloat16's distance to the next, so it would
    stand still. Rounded up or down with the right odds it is right in the mean. What is drawn
    depends on the step's number alone: a resumed run repeats it.
    """

    def init(params):
        state = inner.init(params)
        return Bfloat16State(jnp.zeros((), jnp.int32), jax.tree.map(_nearest, state))

    def update(updates, state, params=None):
        updates, new = inner.update(updates, jax.tree.map(_float32, state.inner), params)
        leaves, structure = jax.tree.flatten(new)
        seeds = _hash(
            _hash(state.step.astype(jnp.uint32)) + jnp.arange(len(leaves), dtype="uint32")
        )
        rounded = [round_at_random(x, seed) for x, seed in zip(leaves, seeds, strict=True)]
        return updates, Bfloat16State(state.step + 1, structure.unflatten(rounded))

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, seed: jax.Array) -> jax.Array:
    """A float32 array as bfloat16 whose expected value is x; other types as they are.

    `seed` uint32 []. The odds are hashes of the places in x: JAX's generator, whose numbers are
    better than is needed, makes programs of hundreds of arrays slow to compile.
    """
    if x.dtype != jnp.float32:
        return x
    # A bfloat16 is the upper half of a float32: what is added carries over with the right odds.
    noise = _hash(jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) + seed) & 0xFFFF
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), up, x.astype(jnp.bfloat16))


def _hash(x: jax.Array) -> jax.Array:
    """Of uint32, every bit of it on every bit (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _nearest(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
