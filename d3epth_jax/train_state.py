"""What changes during training, and how parameters are told apart by path."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import register_dataclass

from d3epth_jax.typing import Params
from d3epth_jax.weighting import Weighting


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds; frozen parameters and teachers never enter it.

    Attributes:
      step: optimiser steps done.
      params: the trainable parameters only, a nested dict.
      opt_state: optax state of `params`.
      ema: moving average of `params`: what is evaluated and saved.
      weighting: state of the dynamic task weighting (METHOD 5).
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params
    weighting: Any


def init_train_state(
    params: Params, tx: optax.GradientTransformation, weighting: Weighting
) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params),
        weighting=weighting.init(),
    )


def ema_decay(step: jax.Array, maximum: float) -> jax.Array:
    """min(maximum, (1 + n) / (10 + n)) after n steps (METHOD 7)."""
    return jnp.minimum(maximum, (1.0 + step) / (10.0 + step))


def split_trainable(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits parameters into (trainable, frozen) by regular expressions matched from the start.

    `("unet/", "decoder/layers_9")` trains the UNet and the decoder's last convolution.

    Raises:
      ValueError: patterns that match no parameter, all of them, with the trees there are.
    """
    flat = flatten_dict(params, sep="/")
    matched = {pattern: {path for path in flat if re.match(pattern, path)} for pattern in patterns}
    if idle := [pattern for pattern, paths in matched.items() if not paths]:
        raise ValueError(
            f"trainable patterns that match no parameter: {idle}; parameters begin with"
            f" {sorted({path.split('/')[0] + '/' for path in flat})}"
        )
    chosen = set().union(*matched.values()) if matched else set()
    if not chosen:
        raise ValueError("no trainable patterns: nothing would train")
    trainable = {path: value for path, value in flat.items() if path in chosen}
    frozen = {path: value for path, value in flat.items() if path not in chosen}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def merge(trainable: Params, frozen: Params) -> Params:
    """The whole tree again; inside `jit` this moves no data."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trainable))
