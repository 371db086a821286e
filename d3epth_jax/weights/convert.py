"""Torch's tensors <-> our parameter trees, strict both ways, and safetensors files.

An autoencoder's two trees convert as one: `from_torch(tensors, {"encoder": ..., "decoder": ...})`
gives diffusers' prefixes `encoder.` and `decoder.`.
"""

import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  makes NumPy, and with it safetensors, know bfloat16
import numpy as np
import safetensors
import safetensors.numpy

from d3epth_jax.weights import keys


def from_torch(
    tensors: Mapping[str, np.ndarray], abstract_params: Mapping[str, Any], *, dtype: Any = None
) -> dict[str, Any]:
    """Arranges torch tensors as the tree `abstract_params` (leaves with a .shape).

    Leaves are NumPy arrays in their own dtype, or in `dtype`. Raises ValueError listing every
    missing, unexpected and wrongly shaped key.
    """
    expected = {
        keys.torch_key(path): (path, x) for path, x in keys.flatten(abstract_params).items()
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
        array = keys.from_torch_layout(path, tensors[key])
        if array.shape != abstract.shape:
            wanted = _torch_shape(path, abstract)
            problems.append(f"wrong shape: {key} is {tensors[key].shape}, the model has {wanted}")
        flat[path] = array if dtype is None else array.astype(dtype)
    if problems:
        raise ValueError("\n  ".join(["the weights do not fit the model:", *problems]))
    return keys.unflatten(flat)


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Gives our parameters torch's keys and layout; dtypes stay."""
    return {
        keys.torch_key(path): np.ascontiguousarray(keys.to_torch_layout(path, np.asarray(x)))
        for path, x in keys.flatten(params).items()
    }


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


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a safetensors file; bfloat16 tensors are NumPy arrays of ml_dtypes' bfloat16.

    Raises FileNotFoundError, or ValueError if the file is not, or not all of, a safetensors file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all: a temporary name first, then a rename.

    The metadata says `format: pt`, without which diffusers does not load it.
    """
    path = pathlib.Path(path)
    arrays = {key: np.require(tensor, requirements="C") for key, tensor in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        safetensors.numpy.save_file(arrays, temporary, {"format": "pt", **(metadata or {})})
        # mkstemp's file is private; a released file is readable like any other.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _torch_shape(path: keys.Path, abstract: Any) -> tuple[int, ...]:
    return keys.to_torch_layout(path, np.broadcast_to(np.float32(0), abstract.shape)).shape
