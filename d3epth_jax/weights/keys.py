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

_NUMBERED = re.compile(rf"({'|'.join(NUMBERED)})_(\d+)")


def torch_key(path: Path) -> str:
    """('down_blocks_0', 'conv', 'kernel') -> 'down_blocks.0.conv.weight'.

    Raises ValueError if the leaf is not kernel, scale, embedding or bias.
    """
    *modules, leaf = path
    if leaf not in LEAVES:
        raise ValueError(f"parameter {'/'.join(path)}: the leaf must be one of {', '.join(LEAVES)}")
    names = [_NUMBERED.sub(r"\1.\2", m) if _NUMBERED.fullmatch(m) else m for m in modules]
    return ".".join([*names, LEAVES[leaf]])


def from_torch_layout(path: Path, array: np.ndarray) -> np.ndarray:
    """Reorders the axes of a torch array for the parameter at `path`."""
    return _transpose(path, array, _FROM_TORCH)


def to_torch_layout(path: Path, array: np.ndarray) -> np.ndarray:
    """Reorders the axes of our parameter at `path` for torch."""
    return _transpose(path, array, _TO_TORCH)


def flatten(params: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Nested dict -> {path: leaf}, in the tree's order."""
    flat = {}
    for name, value in params.items():
        path = (*prefix, name)
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dict."""
    params: dict[str, Any] = {}
    for (*modules, leaf), value in flat.items():
        node = params
        for name in modules:
            node = node.setdefault(name, {})
        node[leaf] = value
    return params


def _transpose(path: Path, array: np.ndarray, axes: Mapping[int, tuple[int, ...]]) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    # A rank without an entry keeps its axes: the shape check that follows names the key.
    return array.transpose(axes.get(array.ndim, tuple(range(array.ndim))))
