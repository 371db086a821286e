"""Changes of shape or meaning that turn one model's weights into another's."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from d3epth_jax.models.config import UNetConfig
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.models.presets import SINGLE_STEP
from d3epth_jax.typing import Params
from d3epth_jax.weights import keys


def widen_conv_in(
    unet_params: Mapping[str, Any], *, bias: Literal["keep", "halve"]
) -> dict[str, Any]:
    """Doubles conv_in's input channels: W8 = concat(W4, W4) / 2 (METHOD 1).

    On a doubled input the widened layer gives what the old one gave. The bias is kept (Marigold,
    Ke et al. 2024) or halved (E2E-FT, Garcia et al. 2025). Returns a new tree; other leaves are
    shared.
    """
    if bias not in ("keep", "halve"):
        raise ValueError(f"bias = {bias!r}; choose 'keep' (Marigold) or 'halve' (E2E-FT)")
    conv_in = unet_params["conv_in"]
    kernel = np.asarray(conv_in["kernel"])  # [3, 3, in, out]
    widened = {
        "kernel": np.concatenate([kernel, kernel], axis=2) / 2,
        "bias": np.asarray(conv_in["bias"]) * (1.0 if bias == "keep" else 0.5),
    }
    return {**unet_params, "conv_in": {k: v.astype(kernel.dtype) for k, v in widened.items()}}


def to_single_step(
    model: DepthModel, params: Params, *, widen: Literal["", "keep", "halve"] = ""
) -> tuple[DepthModel, Params]:
    """The same depth from zero latents, in the form in which everything is trained here (METHOD 1).

    Any Stable Diffusion, Marigold or E2E-FT becomes a v-prediction model of zero SNR and one
    trailing step: then z0 = -v, whatever latents diffusers starts from. The head is scaled by
    what z0 = -output was short of at the last timestep; the noise half of conv_in, which zero
    latents never reach, becomes zero. `widen` doubles the input channels first, with that treatment
    of the bias: what a plain Stable Diffusion needs (`widen_conv_in`). Raises ValueError where z0
    is undefined (epsilon at zero SNR).
    """
    latent = model.autoencoder.latent_channels
    schedule, last = model.schedule, model.schedule.num_train_timesteps - 1
    # z0 of output 1 and latent 0 is what the new z0 = -output must reproduce.
    gain = -float(schedule.z0(np.float32(1), np.float32(0), last))
    unet = dict(params["unet"])
    if widen:
        unet = widen_conv_in(unet, bias=widen)
    kernel = np.array(unet["conv_in"]["kernel"])
    kernel[:, :, latent:] = 0
    unet["conv_in"] = {**unet["conv_in"], "kernel": kernel}
    if gain != 1:
        unet["conv_out"] = {
            name: (np.asarray(x) * np.float32(gain)).astype(x.dtype)
            for name, x in unet["conv_out"].items()
        }
    model = dataclasses.replace(
        model,
        unet=dataclasses.replace(model.unet, in_channels=kernel.shape[2]),
        schedule=dataclasses.replace(SINGLE_STEP, num_train_timesteps=last + 1),
        timestep=last,
        denoising_steps=1,
        starts_at_zero=False,
    )
    return model, {**params, "unet": unet}


def copy_from_teacher(
    student: UNetConfig, teacher: UNetConfig, student_params: Params, teacher_params: Params
) -> tuple[Params, list[str]]:
    """A pruned UNet's parameters from its teacher's, as BK-SDM does (METHOD 6).

    Returns the student's tree and the paths of what has no source there and keeps the values of
    `student_params`. Raises ValueError, naming every parameter whose source has another shape.
    """
    levels, more = len(student.block_out_channels), len(teacher.block_out_channels)
    source = keys.flatten(teacher_params)
    copied, random, problems = {}, [], []
    for path, own in keys.flatten(student_params).items():
        origin = _teacher_path(path, pruned=student.layers_per_block < teacher.layers_per_block,
                               dropped=more - levels)  # fmt: skip
        if origin not in source:
            copied[path] = own
            random.append("/".join(path))
        elif source[origin].shape != own.shape:
            problems.append(
                f"{'/'.join(path)} {own.shape} <- {'/'.join(origin)} {source[origin].shape}"
            )
        else:
            copied[path] = source[origin]
    if problems:
        raise ValueError("\n  ".join(["the student is no pruned teacher:", *problems]))
    return keys.unflatten(copied), random


def _teacher_path(path: keys.Path, *, pruned: bool, dropped: int) -> keys.Path:
    """Where BK-SDM takes a student's parameter from; `dropped` innermost levels are missing."""
    first, *rest = path
    if match := re.fullmatch(r"up_blocks_(\d+)", first):
        first = f"up_blocks_{int(match[1]) + dropped}"
        # Of the teacher's three layers the first and the last stay: they meet the same skips.
        if pruned and rest[0] in ("resnets_1", "attentions_1"):
            rest[0] = rest[0].replace("_1", "_2")
    return (first, *rest)
