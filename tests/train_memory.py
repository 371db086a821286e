"""What a training step of configs/stage2.py:24gb holds: `python -m tests.train_memory [WIDTH]`.

The full-size program is compiled for shapes alone, without weights or data; WIDTH 0.25 makes every
network a quarter as wide. The bytes of arguments are exact anywhere. Those of temporaries are this
machine's compiler's: on a CPU XLA computes bfloat16 convolutions in float32, so with copies, and
plans buffers otherwise than on a GPU.
"""

import argparse
import dataclasses
import json
import os
import sys

import jax
import numpy as np

from configs import stage2
from d3epth_jax import sharding
from d3epth_jax.bench.cli import when
from d3epth_jax.bench.predict import device
from d3epth_jax.bench.train import planned
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import DepthModel, abstract_params
from d3epth_jax.training import from_config, model_setup, train
from d3epth_jax.training.train_state import init_train_state, split_trainable
from tests.cache_speed import quarter

CARD = 24 * 2**30


def model_of(width: float) -> DepthModel:
    full = DepthModel(*presets.get("d2_base"), presets.SINGLE_STEP)
    return full if width == 1 else quarter("d2_base")


def count(width: float) -> dict[str, int]:
    """Bytes of the step, by kind, and their sum `peak`."""
    config = stage2.get_config("24gb")
    settings = {"dtype": config.model.dtype, "remat": config.model.remat}
    model = dataclasses.replace(model_of(width), **settings)
    # Zeros take no memory until they are written to; only the frozen part is.
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(model))
    trainable, rest = split_trainable(params, tuple(config.trainable))
    student = model_setup.Start(model, params)
    stage = from_config.make_stage(config, model_setup.Start(), student, trainable, rest)
    tx, _ = from_config.make_optimizer(config)
    weights = from_config.make_weighting(config, len(stage.tasks))
    state = jax.eval_shape(
        lambda: init_train_state(
            trainable, tx, weights, host_average=bool(config.train.host_ema_every)
        )
    )
    size = config.data.batch_size, config.data.height, config.data.width
    batch = {"image": ((*size, 3), "uint8"), "depth": ((*size, 1), "float32")}
    batch["mask"] = (*size, 1), "bool"
    batch = {name: jax.ShapeDtypeStruct(*kind) for name, kind in batch.items()}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    placement = sharding.params_sharding(state, mesh)
    step = train.jit_step(config, stage, tx, weights, placement, mesh)
    compiled = step.lower(state, stage.frozen, batch).compile()

    memory = compiled.memory_analysis()
    kinds = {
        name: getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "temp", "output", "alias")
    }
    kinds["peak"] = planned(compiled)
    parts = {"state": state, "frozen": stage.frozen, "batch": batch}
    return kinds | {
        name: sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for name, tree in parts.items()
    }


def main(width: float) -> dict[str, int]:
    sharding.use_cpu_cores(1)
    counted = count(width)
    for name, size in counted.items():
        print(f"{name:9} {size / 2**30:7.3f} GiB", file=sys.stderr)
    if width == 1:
        print(f"of the card's {CARD / 2**30:.0f} GiB", file=sys.stderr)
    return counted


if __name__ == "__main__":
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "width", metavar="WIDTH", nargs="?", type=float, choices=(1, 0.25), default=1
    )
    counted = main(parser.parse_args().width)
    print(json.dumps(counted | device() | when("python -m tests.train_memory")))
