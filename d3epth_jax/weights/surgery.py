"""Changes of shape or meaning that turn one model's weights into another's."""

import dataclasses
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.depth_model import DepthModel, abstract_params
from d3epth_jax.models.presets import SINGLE_STEP
from d3epth_jax.typing import Params
from d3epth_jax.weights import keys

BIASES = ("keep", "halve")  # of a widened conv_in


def widen_conv_in(
    unet_params: Mapping[str, Any], *, bias: Literal["keep", "halve"]
) -> dict[str, Any]:
    """Doubles conv_in's input channels: W8 = concat(W4, W4) / 2 (METHOD 1).

    On a doubled input the widened layer gives what the old one gave. The bias is kept (Marigold,
    Ke et al. 2024) or halved (E2E-FT, Garcia et al. 2025). Returns a new tree; other leaves are
    shared.
    """
    if bias not in BIASES:
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

    The same as in one step at the last timestep: a model of one step elsewhere becomes another.

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


def thin(model: DepthModel, params: Params, widths: tuple[int, ...]) -> tuple[DepthModel, Params]:
    """The same UNet with fewer channels at each level: where a narrower student starts.

    Of every layer's channels those stay that are evenly spaced: a start that is far from the
    teacher, and much nearer to it than random weights are (Xu et al., "Initializing Models with
    Larger Ones", ICLR 2024). They keep to their attention head and, but where an up block joins
    what comes from below with a skip, to their norm group. ValueError for more channels than there
    are, or for widths with which other layers need a shortcut.
    """
    before = model.unet.block_out_channels
    if len(widths) != len(before) or any(map(operator.gt, widths, before)):
        raise ValueError(f"widths {before} cannot be thinned to {widths}")
    unet = dataclasses.replace(model.unet, block_out_channels=widths)
    model = dataclasses.replace(model, unet=unet)
    whole, shapes = flatten_dict(params["unet"]), flatten_dict(abstract_params(model)["unet"])
    if other := whole.keys() ^ shapes.keys():
        raise ValueError(
            f"widths {before} cannot be thinned to {widths}: one of them alone has"
            f" {in_modules(sorted(other))}"
        )

    def evenly(count: int, of: int) -> np.ndarray:
        return np.arange(count) * of // count

    def kept(path: keys.Path, axis: int, count: int, of: int) -> np.ndarray:
        reads = path[-2] == "norm1" or (path[-1] == "kernel" and axis == 2)
        if not reads or not (joined := _joined_levels(path, unet)):
            return evenly(count, of)
        below, skip = (evenly(widths[level], before[level]) for level in joined)
        return np.concatenate([below, before[joined[0]] + skip])

    thinned = {}
    for path, shape in shapes.items():
        thinned[path] = np.asarray(whole[path])
        for axis, (count, of) in enumerate(zip(shape.shape, whole[path].shape, strict=True)):
            thinned[path] = np.take(thinned[path], kept(path, axis, count, of), axis)
    return model, {**params, "unet": unflatten_dict(thinned)}


def _joined_levels(path: keys.Path, unet: UNetConfig) -> tuple[int, int] | None:
    """The levels that the input of an up block's ResNet is of: from below, and the skip's."""
    match = re.fullmatch(
        r"up_blocks_(\d+)/resnets_(\d+)/(norm1|conv1|conv_shortcut)", "/".join(path[:-1])
    )
    if not match:
        return None
    block, layer, last = int(match[1]), int(match[2]), len(unet.block_out_channels) - 1
    level = last - block
    below = level if layer else min(level + 1, last)
    skip = level if layer < unet.layers_per_block else max(level - 1, 0)
    return below, skip


class Copied(NamedTuple):
    """A student's parameters after a copy, and what became of every path.

    Attributes:
      params: the student's tree.
      taken: the paths that have the teacher's values.
      fresh: those that keep their own, with the reason: none of the teacher's fits.
      left_out: the teacher's paths that nothing was made of.
    """

    params: Params
    taken: list[keys.Path]
    fresh: dict[keys.Path, str]
    left_out: list[keys.Path]


def copy_from_teacher(
    student: UNetConfig, teacher: UNetConfig, student_params: Params, teacher_params: Params
) -> Copied:
    """A pruned UNet's parameters from its teacher's, as BK-SDM does (METHOD 6).

    What the teacher lacks, or has in another shape, keeps the values of `student_params`. Raises
    ValueError, naming all of that, where it is more than half of the student.
    """
    levels, more = len(student.block_out_channels), len(teacher.block_out_channels)
    source, own = flatten_dict(teacher_params), flatten_dict(student_params)
    origins = {
        path: _teacher_path(
            path,
            pruned=student.layers_per_block < teacher.layers_per_block,
            dropped=more - levels,
        )
        for path in own
    }
    fresh = {}
    for path, origin in origins.items():
        if origin not in source:
            fresh[path] = "not in the teacher"
        elif source[origin].shape != own[path].shape:
            fresh[path] = f"{own[path].shape} <- {'/'.join(origin)} {source[origin].shape}"
    total, lost = (sum(own[path].size for path in paths) for paths in (own, fresh))
    if 2 * lost > total:
        listed = (f"{'/'.join(path)}: {why}" for path, why in fresh.items())
        headline = f"the student is no pruned teacher, which gives it {1 - lost / total:.0%}:"
        raise ValueError("\n  ".join([headline, *listed]))
    taken = {path: origin for path, origin in origins.items() if path not in fresh}
    params = {path: source[taken[path]] if path in taken else own[path] for path in own}
    used = set(taken.values())
    left_out = [path for path in source if path not in used]
    return Copied(unflatten_dict(params), list(taken), fresh, left_out)


def in_modules(paths: Iterable[keys.Path]) -> str:
    """The modules that paths belong to, for a log: "conv_in, down_blocks_0/resnets_0"."""
    return ", ".join(dict.fromkeys("/".join(path[:-1][:2]) for path in paths)) or "nothing"


def _teacher_path(path: keys.Path, *, pruned: bool, dropped: int) -> keys.Path:
    """Where BK-SDM takes a student's parameter from; `dropped` innermost levels are missing."""
    first, *rest = path
    if match := re.fullmatch(r"up_blocks_(\d+)", first):
        first = f"up_blocks_{int(match[1]) + dropped}"
        # Of the teacher's three layers the first and the last stay: they meet the same skips.
        if pruned and rest[0] in ("resnets_1", "attentions_1"):
            rest[0] = rest[0].replace("_1", "_2")
    return (first, *rest)


def prune_tiny_autoencoder(
    config: TinyAutoencoderConfig, params: Params, like: TinyAutoencoderConfig
) -> tuple[TinyAutoencoderConfig, Params]:
    """A tiny autoencoder {encoder, decoder} with no more blocks at any stage than `like` has.

    Of a stage's blocks the first stay. Raises ValueError if the two have not as many stages, or
    have other widths.
    """
    fields = ("num_encoder_blocks", "num_decoder_blocks")
    stages = [len(c.num_encoder_blocks) for c in (config, like)]
    if stages[0] != stages[1]:
        raise ValueError(
            f"the autoencoder has {stages[0]} stages, so cells of {config.downsampling} pixels;"
            f" {stages[1]} stages with cells of {like.downsampling} are wanted"
        )
    widths = [
        (c.encoder_block_out_channels[0], c.decoder_block_out_channels[0]) for c in (config, like)
    ]
    if widths[0] != widths[1]:
        raise ValueError(
            f"the autoencoder is {widths[0]} channels wide (encoder, decoder), {widths[1]} are"
            " wanted: blocks can be left out, channels not"
        )
    fewer = {name: tuple(map(min, getattr(config, name), getattr(like, name))) for name in fields}
    pruned = dataclasses.replace(config, **fewer)
    kept = {}
    for side in ("encoder", "decoder"):
        mine, its = (_tiny_layers(side, c) for c in (pruned, config))
        kept[side] = {name: params[side][its[role]] for role, name in mine.items()}
    return pruned, kept


def _tiny_layers(side: str, config: TinyAutoencoderConfig) -> dict[tuple, str]:
    """What a layer does -> its name.

    Torch's nn.Sequential numbers layers in order: a block dropped shifts all numbers after it.
    """
    counts = getattr(config, f"num_{side}_blocks")
    blocks = [[("block", stage, i) for i in range(n)] for stage, n in enumerate(counts)]
    roles: list[tuple | None] = []  # None: without parameters
    if side == "encoder":
        for stage, its_blocks in enumerate(blocks):
            roles += [("conv", stage), *its_blocks]
    else:
        roles += [("first",), None]  # and its activation
        for stage, its_blocks in enumerate(blocks[:-1]):
            roles += [*its_blocks, None, ("conv", stage)]  # upsampled before
        roles += blocks[-1]
    return {role: f"layers_{i}" for i, role in enumerate([*roles, ("last",)]) if role}
