"""The one rule between our parameter paths and torch's keys, and between the two layouts.

A path is torch's key with `.N` written `_N` and `weight` named by what it is: `kernel`, `scale` or
`embedding`. Only the names below are numbered lists in torch; `linear_1`, say, is a plain name.
Keys are always derived from our paths, never guessed from a file.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]

# Names of torch's ModuleList and Sequential containers.
NUMBERED = (
    "attentions",
    "conv",
    "down_blocks",
    "downsamplers",
    "layers",
    "net",
    "resnets",
    "to_out",
    "transformer_blocks",
    "up_blocks",
    "upsamplers",
)
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Kernel rank -> axes: Linear [out, in] <-> [in, out]; convolution [O, I, H, W] <-> [H, W, I, O].
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}

# Beginning of our path -> torch's: these convolutions stand beside encoder and decoder there.
_MOVED = {
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
}

# What files of other ages call differently -> the name that torch_key gives; None drops the tensor.
_VAE_ATTENTION = r"(.*mid_block\.attentions\.\d+)\."
AUTOENCODER_AGES = {  # diffusers before 0.17
    _VAE_ATTENTION + r"query\.(.*)": r"\1.to_q.\2",
    _VAE_ATTENTION + r"key\.(.*)": r"\1.to_k.\2",
    _VAE_ATTENTION + r"value\.(.*)": r"\1.to_v.\2",
    _VAE_ATTENTION + r"proj_attn\.(.*)": r"\1.to_out.0.\2",
}
TEXT_ENCODER_AGES = {  # a buffer that once was saved; the prefix, which not every version writes
    r"(?:text_model\.)?embeddings\.position_ids": None,
    r"((?:embeddings|encoder|final_layer_norm)\..*)": r"text_model.\1",
}

_NUMBERED = re.compile(rf"({'|'.join(NUMBERED)})_(\d+)")


def torch_key(path: Path) -> str:
    """('down_blocks_0', 'conv', 'kernel') -> 'down_blocks.0.conv.weight'.

    Raises ValueError if the leaf is not kernel, scale, embedding or bias.
    """
    *modules, leaf = path
    if leaf not in LEAVES:
        raise ValueError(f"parameter {'/'.join(path)}: the leaf must be one of {', '.join(LEAVES)}")
    names = [_NUMBERED.sub(r"\1.\2", m) if _NUMBERED.fullmatch(m) else m for m in modules]
    key = ".".join([*names, LEAVES[leaf]])
    for ours, theirs in _MOVED.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    return key


def modern_names(tensors: Mapping[str, Any], ages: Mapping[str, str | None]) -> dict[str, Any]:
    """Tensors under today's names, whatever age of diffusers or transformers wrote them.

    Raises ValueError listing the keys that would become one.
    """
    renamed, origin, problems = {}, {}, []
    for key, tensor in tensors.items():
        name = key
        for pattern, modern in ages.items():
            if match := re.fullmatch(pattern, key):
                name = modern and match.expand(modern)
                break
        if name is None:
            continue
        if name in renamed:
            problems.append(f"{origin[name]} and {key} are both {name}")
        renamed[name], origin[name] = tensor, key
    if problems:
        raise ValueError("\n  ".join(["tensors of two ages in one file:", *problems]))
    return renamed


def from_torch_layout(path: Path, array: np.ndarray, rank: int | None = None) -> np.ndarray:
    """Reorders the axes of a torch array for the parameter at `path`, of the given rank.

    A kernel of rank 2 may come as a 1x1 convolution's [O, I, 1, 1], as old autoencoders have it.
    """
    if rank == 2 and array.ndim == 4 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    return _transpose(path, array, _FROM_TORCH)


def to_torch_layout(path: Path, array: np.ndarray) -> np.ndarray:
    """Reorders the axes of our parameter at `path` for torch."""
    return _transpose(path, array, _TO_TORCH)


def _transpose(path: Path, array: np.ndarray, axes: Mapping[int, tuple[int, ...]]) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    # A rank without an entry keeps its axes: the shape check that follows names the key.
    return array.transpose(axes.get(array.ndim, tuple(range(array.ndim))))
