"""Torch's tensors <-> our parameter trees, strict both ways, and safetensors files.

An autoencoder's two trees convert as one: `from_torch(tensors, {"encoder": ..., "decoder": ...})`
gives diffusers' prefixes `encoder.` and `decoder.`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from d3epth_jax.weights import keys

LISTED = 5  # tensors that are told by name


def from_torch(
    tensors: Mapping[str, np.ndarray], abstract_params: Mapping[str, Any], *, dtype: Any = None
) -> dict[str, Any]:
    """Arranges torch tensors as the tree `abstract_params` (leaves with a .shape).

    Leaves are NumPy arrays in their own dtype, or in `dtype`. Kernels, which torch arranges
    otherwise, are views where no dtype is asked for: of tensors mapped from a file they are read
    only when they are used. Raises ValueError listing every missing, unexpected and wrongly shaped
    key.
    """
    expected = {
        keys.torch_key(path): (path, x) for path, x in flatten_dict(abstract_params).items()
    }
    problems = [
        f"missing: {key} {_torch_shape(*expected[key])}" for key in expected if key not in tensors
    ]
    problems += [
        f"unexpected: {key} {t.shape}" for key, t in tensors.items() if key not in expected
    ]
    flat = {}
    for key, (path, abstract) in expected.items():
        if key not in tensors:
            continue
        array = keys.from_torch_layout(path, tensors[key], len(abstract.shape))
        if array.shape != abstract.shape:
            wanted = _torch_shape(path, abstract)
            problems.append(f"wrong shape: {key} is {tensors[key].shape}, the model has {wanted}")
        if dtype is not None and array.dtype != dtype:
            array = array.astype(dtype)
        elif array.flags.c_contiguous:
            # JAX may use such an array where it lies: a mapped file is no place for parameters.
            array = array.copy()
        flat[path] = array
    if problems:
        raise ValueError("\n  ".join(["the weights do not fit the model:", *problems]))
    return unflatten_dict(flat)


def to_torch(params: Mapping[str, Any], *, dtype: Any = None) -> dict[str, np.ndarray]:
    """Gives our parameters torch's keys and layout, in their own dtype or in `dtype`."""
    return {
        keys.torch_key(path): np.asarray(
            keys.to_torch_layout(path, np.asarray(x)), dtype, order="C"
        )
        for path, x in flatten_dict(params).items()
    }


def require_range(folders: Mapping[str, Mapping[str, Any]], dtype: Any) -> None:
    """Raises ValueError naming the tensors of {folder: params} that would become infinite."""
    beyond = [
        f"{folder}: {keys.torch_key(path)}"
        for folder, params in folders.items()
        for path, x in flatten_dict(params).items()
        if _overflows(np.asarray(x), dtype)
    ]
    if beyond:
        more = [f"and {len(beyond) - LISTED} more"] if len(beyond) > LISTED else []
        told = f"{len(beyond)} tensor(s) have numbers that {np.dtype(dtype)} cannot hold; choose"
        raise ValueError("\n  ".join([f"{told} another number type:", *beyond[:LISTED], *more]))


def _overflows(x: np.ndarray, dtype: Any) -> bool:
    """Whether numbers that are finite now would not be so in `dtype`."""
    finite = x[np.isfinite(x)]
    if not finite.size:
        return False
    with np.errstate(over="ignore"):
        ends = np.asarray([finite.min(), finite.max()]).astype(dtype)
    return not np.isfinite(ends).all()


def taesd_to_diffusers(
    encoder_tensors: Mapping[str, np.ndarray], decoder_tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Renames upstream TAESD's two files (keys `N...`) to AutoencoderTiny's keys.

    Upstream's decoder counts its tanh clamp as layer 0, diffusers' does not. Raises ValueError
    listing the keys that do not begin with a layer number.
    """
    renamed, problems = {}, []
    for name, first, tensors in (("encoder", 0, encoder_tensors), ("decoder", 1, decoder_tensors)):
        for key, tensor in tensors.items():
            layer, _, rest = key.partition(".")
            if layer.isdecimal() and int(layer) >= first:
                renamed[f"{name}.layers.{int(layer) - first}.{rest}"] = tensor
            else:
                problems.append(f"{name}: {key}")
    if problems:
        raise ValueError("\n  ".join(["these are not TAESD's keys:", *problems]))
    return renamed


def _torch_shape(path: keys.Path, abstract: Any) -> tuple[int, ...]:
    return keys.to_torch_layout(path, np.broadcast_to(np.float32(0), abstract.shape)).shape
