"""What changes during training, and how parameters are told apart by path."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
      ema: moving average of `params`: what is evaluated and saved. Empty on the device where the
        host keeps it (HostAverage).
      weighting: state of the dynamic task weighting (METHOD 5).
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params
    weighting: Any


def init_train_state(
    params: Params,
    tx: optax.GradientTransformation,
    weighting: Weighting,
    *,
    host_average: bool = False,
) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema={} if host_average else jax.tree.map(jnp.copy, params),
        weighting=weighting.init(),
    )


def ema_decay(step: jax.Array, maximum: float) -> jax.Array:
    """min(maximum, (1 + n) / (10 + n)) after n steps (METHOD 7)."""
    return jnp.minimum(maximum, (1.0 + step) / (10.0 + step))


class HostAverage:
    """The moving average of parameters in the host's memory, of one process, every `every` steps.

    Its decay is the product of those steps' (`ema_decay`); the parameters of the last stand for
    those of all. It depends on the step's number alone, so that a resumed run goes on as before.
    """

    def __init__(self, params: Params, every: int, maximum: float):
        self.params = jax.tree.map(np.array, params)
        self._every, self._maximum = every, maximum

    def update(self, step: int, params: Params, *, last: bool = False) -> None:
        """Takes in the parameters after `step` steps, if it is their turn or they are the last."""
        behind = step % self._every
        if behind and not last:
            return
        before = np.arange(step - (behind or self._every), step)
        decay = np.float32(np.prod(np.minimum(self._maximum, (1 + before) / (10 + before))))
        # New arrays: a checkpoint may still be writing the old ones.
        self.params = jax.tree.map(
            lambda e, p: decay * e + (1 - decay) * np.asarray(p), self.params, params
        )


def split_trainable(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits parameters into (trainable, frozen) by regular expressions matched from the start.

    `("unet/", "decoder/layers_9")` trains the UNet and the decoder's last convolution. The prompt's
    embedding never trains: it is what the text encoder makes of "" (METHOD 1).

    Raises:
      ValueError: patterns that match no parameter, all of them, with the trees there are.
    """
    flat = flatten_dict(params, sep="/")
    may = [path for path in flat if path != "prompt"]
    matched = {pattern: {path for path in may if re.match(pattern, path)} for pattern in patterns}
    if idle := [pattern for pattern, paths in matched.items() if not paths]:
        raise ValueError(
            f"trainable patterns that match no parameter: {idle}; parameters begin with"
            f" {sorted({path.split('/')[0] + '/' for path in may})}"
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
