"""The optimiser: AdamW with warm-up, decay and clipping (METHOD 7, 8)."""

import jax
import optax

SCHEDULES = ("exponential", "cosine", "constant")


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
        raise ValueError(f"unknown schedule {schedule!r}: choose one of {list(SCHEDULES)}")
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
) -> optax.GradientTransformation:
    """AdamW after clipping to the global norm `clip`; biases and norms do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            schedule,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
