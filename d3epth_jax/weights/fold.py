"""Exact constant folding: what never changes between pictures goes into the parameters.

`fold(model, params)` gives a model of fewer operations, equal to the other but for rounding. The
folded parameters share every array that did not change with the others.

    time        one timestep: its embedding becomes a bias of each ResNet's first convolution
    prompt      one prompt: attention to its few tokens becomes two products, without q, k, v
    latent      the depth latent starts at zero: conv_in loses the channels that read it
    head        then the UNet's output is the depth latent itself, conv_out scaled
    upsampling  nearest upsampling and 3x3 convolution become four 2x2 convolutions
    mean        depth is the mean of the decoder's channels: its last convolution gives just that
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from d3epth_jax.models import convolution, layers
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.typing import Params
from d3epth_jax.weights import keys

Flat = dict[keys.Path, np.ndarray]
PHASES = 6  # axes of a kernel of convolution.PhaseConv


def fold(
    model: DepthModel, params: Params, pieces: Iterable[str] | None = None
) -> tuple[DepthModel, Params]:
    """(model, parameters) with these pieces folded; None: all that a single step allows.

    `time`, `latent` and `head` mean one step of inference from a zero latent (SINGLE_STEP).
    `prompt` and `upsampling` can be folded inside a training step too (`fold_in_training`). What is
    folded already stays as it is. Raises ValueError for unknown pieces, for a head of which the
    latent is no multiple, and where training's single step is at another timestep than inference's.
    """
    there = foldable(model)
    pieces = there if pieces is None else tuple(pieces)
    start = int(model.schedule.timesteps(1)[0])
    if unknown := sorted(set(pieces) - set(PIECES)):
        raise ValueError(f"unknown pieces {unknown}: choose from {list(PIECES)}")
    if "head" in pieces and model.schedule.clip_sample:
        raise ValueError("clip_sample cuts the latent: the head cannot be folded")
    if set(pieces) & set(SINGLE_STEP) and model.timestep != start:
        raise ValueError(
            f"the model's timestep is {model.timestep}, but its schedule takes a single step at"
            f" {start}: {', '.join(SINGLE_STEP)} cannot be folded for both; set one to the other,"
            " or do not fold"
        )
    flat = flatten_dict(params)
    for piece in there:
        if piece in pieces:
            model = _FOLDS[piece](model, flat)
    return model, unflatten_dict(flat)


def foldable(model: DepthModel, *, single_step: bool = True) -> tuple[str, ...]:
    """What is not folded yet: for one step from a zero latent, or for any steps and latents."""
    absent = {
        "time": model.folding.time,
        "prompt": not model.needs_prompt,
        "latent": not model.takes_depth,
        "head": model.folding.head or model.schedule.clip_sample,
        "mean": model.folding.mean,
    }
    if not single_step:
        absent |= dict.fromkeys(SINGLE_STEP, True)
    return tuple(piece for piece in PIECES if not absent.get(piece))


def fold_teacher(
    model: DepthModel, params: Params, *, single_step: bool
) -> tuple[DepthModel, Params]:
    """A teacher that does not train, and gives the same z0 and features but for rounding.

    single_step: it takes its one step from a zero latent.
    """
    if single_step:
        # The head gives z0, as in training: a DDIM step that ends where no noise is left.
        schedule = dataclasses.replace(model.schedule, set_alpha_to_one=True)
        model = dataclasses.replace(model, schedule=schedule)
    return fold(model, params, foldable(model, single_step=single_step))


def fold_in_training(model: DepthModel, params: Params) -> tuple[DepthModel, Params]:
    """A training step's model and traced parameters, with fewer operations forth and back.

    The gradient flows through the folding, to the parameters as they are saved.
    """
    return fold(model, params, TRAINING)


def fold_frozen(model: DepthModel, trainable: Params, rest: Params) -> tuple[DepthModel, Params]:
    """Folds every network that is frozen as a whole: (model, the new `rest`).

    The gradient flows through them as it would otherwise. Merged with `trainable` they are the
    parameters of the model that is returned; what is saved is made with the `rest` given.
    """
    whole = {part: tree for part, tree in rest.items() if part not in trainable}
    pieces = ("upsampling", "mean") if "decoder" in whole else ("upsampling",)
    model, folded = fold(model, whole, pieces)
    return model, {**rest, **folded}


def cast_kernels(model: DepthModel, params: Params) -> Params:
    """Kernels in the model's compute type, to which each call would cast them.

    No number that is computed changes: norms, biases, the prompt and the decoder's last
    convolution, which compute in float32 or cost nothing to cast, stay as they are, and so do the
    phases of upsampling, which are put together again in float32 where a size is odd.
    """
    flat, kind = flatten_dict(params), jnp.dtype(model.dtype)
    exact = ("prompt",), ("decoder", _last_of_decoder(flat), "kernel")
    cast = {
        path: x if x.ndim in (0, 1, PHASES) or path in exact else x.astype(kind, copy=False)
        for path, x in flat.items()
    }
    return unflatten_dict(cast)


def _time(model: DepthModel, flat: Flat) -> DepthModel:
    unet = model.unet
    width = unet.block_out_channels[0]
    temb = layers.timestep_embedding(
        np.asarray([model.timestep]),
        width,
        flip_sin_to_cos=unet.flip_sin_to_cos,
        freq_shift=unet.freq_shift,
    )
    temb = np.asarray(temb, np.float64)
    for layer in ("linear_1", "linear_2"):
        kernel, bias = (
            _pop(flat, ("unet", "time_embedding", layer, n)) for n in ("kernel", "bias")
        )
        temb = _silu(temb @ kernel + bias)  # the second: every ResNet begins with it
    for path in [p for p in flat if p[-2:] == ("time_emb_proj", "kernel")]:
        block = path[:-2]
        kernel, bias = (_pop(flat, (*block, "time_emb_proj", n)) for n in ("kernel", "bias"))
        _add(flat, (*block, "conv1", "bias"), (temb @ kernel + bias)[0])
    return _note(model, time=True)


def _prompt(model: DepthModel, flat: Flat) -> DepthModel:
    prompt = _exact(flat["prompt",])[0]  # [N, D]
    tokens = len(prompt)
    for path in [p for p in flat if p[-3:] == ("attn2", "to_q", "kernel")]:
        block = path[:-2]
        channels = flat[path].shape[0]
        heads = _heads(model, path)
        if not layers.collapses(channels, heads, tokens):
            continue
        kind = flat[path].dtype
        q, k, v, out, bias = (
            _pop(flat, (*block, *names))
            for names in (
                ("to_q", "kernel"),
                ("to_k", "kernel"),
                ("to_v", "kernel"),
                ("to_out_0", "kernel"),
                ("to_out_0", "bias"),
            )
        )
        xp = _library(prompt, q, k, v, out)
        q = q.reshape(channels, heads, -1)
        key, value = ((prompt @ x).reshape(tokens, heads, -1) for x in (k, v))
        out = out.reshape(heads, -1, channels)
        scores = xp.einsum("chd,nhd->chn", q, key[1:] - key[:1]) * q.shape[-1] ** -0.5
        mixed = xp.einsum("nhd,hdc->hnc", value[1:] - value[:1], out)
        folded = {
            ("to_scores", "kernel"): scores.reshape(channels, -1),
            ("to_out_0", "kernel"): mixed.reshape(-1, channels),
            ("to_out_0", "bias"): bias + xp.einsum("hd,hdc->c", value[0], out),
        }
        flat |= {(*block, *names): x.astype(kind) for names, x in folded.items()}
    model = _note(model, prompt_tokens=tokens)
    if not model.needs_prompt:
        del flat["prompt",]
    return model


def _latent(model: DepthModel, flat: Flat) -> DepthModel:
    channels = model.autoencoder.latent_channels
    path = ("unet", "conv_in", "kernel")
    flat[path] = flat[path][:, :, :channels]
    model = dataclasses.replace(model, unet=dataclasses.replace(model.unet, in_channels=channels))
    return _note(model, latent=True)


def _head(model: DepthModel, flat: Flat) -> DepthModel:
    """One DDIM step from zero is a factor: of v and epsilon, and of the sample."""
    schedule = model.schedule
    factor = float(schedule.step(np.float64(1), np.float64(0), model.timestep, 1))
    for name in ("kernel", "bias"):
        _scale(flat, ("unet", "conv_out", name), factor)
    direct = dataclasses.replace(schedule, prediction_type="sample", set_alpha_to_one=True)
    return _note(dataclasses.replace(model, schedule=direct), head=True)


def _upsampling(model: DepthModel, flat: Flat) -> DepthModel:
    before = model.folding.upsampling
    paths = [p for p in flat if p[0] not in before and _follows_upsampling(p, flat)]
    for path in paths:
        # At least float32, which PhaseConv needs where a size is odd; a kernel may have 16 bits.
        kind = np.promote_types(flat[path].dtype, np.float32)
        flat[path] = convolution.phase_kernel(_exact(flat[path])).astype(kind)
    return _note(model, upsampling=tuple(sorted({*before, *(path[0] for path in paths)})))


def _follows_upsampling(path: keys.Path, flat: Flat) -> bool:
    """By name; the tiny decoder's are those without a bias."""
    without_bias = path[0] == "decoder" and (*path[:-1], "bias") not in flat
    return path[-1] == "kernel" and ("upsamplers_0" in path or without_bias)


def _mean(model: DepthModel, flat: Flat) -> DepthModel:
    for name in ("kernel", "bias"):
        path = ("decoder", _last_of_decoder(flat), name)
        x = np.asarray(flat[path])
        flat[path] = x.astype(np.float64).mean(-1, keepdims=True).astype(x.dtype)
    autoencoder = dataclasses.replace(model.autoencoder, out_channels=1)
    return _note(dataclasses.replace(model, autoencoder=autoencoder), mean=True)


def _last_of_decoder(flat: Flat) -> str:
    numbered = [path[1] for path in flat if path[0] == "decoder" and "layers_" in path[1]]
    return max(numbered, key=lambda name: int(name.removeprefix("layers_")), default="conv_out")


_FOLDS = {
    "time": _time,
    "prompt": _prompt,
    "latent": _latent,
    "head": _head,
    "upsampling": _upsampling,
    "mean": _mean,
}
PIECES = tuple(_FOLDS)
SINGLE_STEP = ("time", "latent", "head")  # the others hold for any latents and number of steps
TRAINING = ("prompt", "upsampling")


def _note(model: DepthModel, **folded) -> DepthModel:
    return dataclasses.replace(model, folding=dataclasses.replace(model.folding, **folded))


def _heads(model: DepthModel, path: keys.Path) -> int:
    """Of the UNet's attention at a path: a level's heads, and the middle is the last level."""
    heads = model.unet.heads
    side, _, number = path[1].rpartition("_blocks_")
    if side == "down":
        return heads[int(number)]
    return heads[-1 - int(number)] if side == "up" else heads[-1]


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _pop(flat: Flat, path: keys.Path) -> np.ndarray:
    return _exact(flat.pop(path))


def _exact(x) -> np.ndarray | jax.Array:
    """Sums over thousands of products are formed in float64, but for parameters in training."""
    return x.astype(jnp.float32) if isinstance(x, jax.core.Tracer) else np.asarray(x, np.float64)


def _library(*arrays):
    return jnp if any(isinstance(x, jax.core.Tracer) for x in arrays) else np


def _add(flat: Flat, path: keys.Path, value: np.ndarray) -> None:
    flat[path] = (np.asarray(flat[path], np.float64) + value).astype(flat[path].dtype)


def _scale(flat: Flat, path: keys.Path, factor: float) -> None:
    flat[path] = (np.asarray(flat[path], np.float64) * factor).astype(flat[path].dtype)
