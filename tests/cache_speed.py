"""How much faster stage 1 is from a teacher cache: `python -m tests.cache_speed [ROUNDS]`.

A quarter of d3_small's width, so a sixteenth of its work: Stable Diffusion 2's UNet as teacher,
BK-SDM's small one as student, the KL autoencoder. One core runs the steps, as it does each device's
part in training. The ways take turns; what is compared is the least processor time that each took,
to which other work on the machine adds little.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import optax

from d3epth_jax import sharding, weighting
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import DepthModel, init_params
from d3epth_jax.training import steps
from d3epth_jax.training.stages import latent
from d3epth_jax.training.train_state import init_train_state, split_trainable
from d3epth_jax.weights import fold

# The innermost maps are 3x4: those smaller than the kernel XLA convolves ten times more slowly.
BATCH, HEIGHT, WIDTH = 16, 192, 256
WITHOUT, WITH = {"gt": 1.0, "out": 1.0}, {"gt": 1.0, "out": 1.0, "feat": 0.1}
WAYS = {  # name: (terms, the teacher's steps, from the cache)
    "online": (WITHOUT, 1, False),
    "cached": (WITHOUT, 1, True),
    "online, features": (WITH, 1, False),
    "cached, features": (WITH, 1, True),
    "online, 4 steps": (WITHOUT, 4, False),
}
RATIOS = {  # name: (slow, fast, at least)
    "a_feat = 0": ("online", "cached", 2.5),
    "with online features": ("online, features", "cached, features", 1.7),
    "against a 4-step teacher": ("online, 4 steps", "cached", 4.0),
}


def quarter(name: str) -> DepthModel:
    unet, autoencoder = presets.get(name)
    unet = dataclasses.replace(
        unet,
        block_out_channels=tuple(width // 4 for width in unet.block_out_channels),
        attention_head_dim=(1, 2, 5, 5),  # numbers of heads: a quarter of them, as wide as there
        cross_attention_dim=unet.cross_attention_dim // 4,
        norm_num_groups=8,
    )
    autoencoder = dataclasses.replace(
        autoencoder,
        block_out_channels=tuple(width // 4 for width in autoencoder.block_out_channels),
        norm_num_groups=8,
    )
    return DepthModel(unet, autoencoder, presets.SINGLE_STEP)


def make_step(terms: dict, teacher_steps: int, cached: bool, student, teacher):
    """A function that runs one training step, and waits for it."""
    (model, params), (teacher, of_teacher) = student, teacher
    if teacher_steps > 1:
        teacher = dataclasses.replace(teacher, denoising_steps=teacher_steps)
    teacher, of_teacher = fold.fold_teacher(teacher, of_teacher, single_step=teacher_steps == 1)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (BATCH, HEIGHT, WIDTH, 3)).astype(np.uint8),
        "depth": rng.uniform(1, 10, (BATCH, HEIGHT, WIDTH, 1)).astype(np.float32),
        "mask": np.ones((BATCH, HEIGHT, WIDTH, 1), bool),
    }
    if cached:
        cells = (BATCH, HEIGHT // 8, WIDTH // 8, 4)
        names = ("rgb_latent", "teacher_latent", "gt_latent")
        batch = {name: rng.standard_normal(cells).astype(np.float16) for name in names}
        batch |= {"latent_mask": np.ones((*cells[:3], 1), bool), "has_target": np.ones(BATCH, bool)}
        needed = ("unet", "prompt") if "feat" in terms else ()
        of_teacher = {part: of_teacher[part] for part in needed if part in of_teacher}
    loss_fn = latent.make_loss(
        model, teacher, terms=tuple(terms), teacher_steps=teacher_steps, cached=cached
    )
    trainable, rest = split_trainable(params, ("unet/",))
    rest = rest if not cached else {key: rest[key] for key in rest if key == "prompt"}
    tx, weights = (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(5e-5)),
        weighting.static(0),
    )
    step = jax.jit(steps.make_train_step(loss_fn, tx, weights, beta=terms), donate_argnums=0)
    mesh = sharding.make_mesh()
    frozen = sharding.put_params({"rest": rest, "teacher": of_teacher}, mesh)
    trainable = sharding.put_params(trainable, mesh)
    held = [jax.jit(lambda p: init_train_state(p, tx, weights))(trainable)]

    def run():
        held[0], metrics = step(held[0], frozen, sharding.put_batch(batch, mesh))
        assert np.isfinite(jax.block_until_ready(metrics)["loss"])

    return run


def main(rounds: int = 7) -> dict[str, float]:
    """Prints steps per second and the ratios; returns these."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # before JAX starts
    sharding.use_cpu_cores(1)
    student, teacher = (
        (model, init_params(model, 0)) for model in map(quarter, ("d3_small", "d2_base"))
    )
    runs = {name: make_step(*way, student, teacher) for name, way in WAYS.items()}
    for run in runs.values():
        run()  # compiles
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    best = {name: min(times) for name, times in seconds.items()}
    for name, fastest in best.items():
        print(f"{name:18} {1 / fastest:6.3f} steps/s of one core", file=sys.stderr)
    ratios = {name: best[slow] / best[fast] for name, (slow, fast, _) in RATIOS.items()}
    for name, ratio in ratios.items():
        print(f"{name:26} {ratio:5.2f} (wanted: {RATIOS[name][2]})", file=sys.stderr)
    return ratios


def in_its_own_process(rounds: int) -> dict[str, float]:
    """What `main` returns; for tests, in whose process programs are not optimised."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.cache_speed", str(rounds)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
