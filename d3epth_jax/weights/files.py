"""Safetensors files: one or sharded, mapped into memory, written whole or not at all.

Nothing is ever unpickled: .bin, .ckpt and .pth files are refused by name.
"""

import contextlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from d3epth_jax import atomic

log = logging.getLogger(__name__)

# safetensors' names of types; ml_dtypes gives NumPy, and with it safetensors, bfloat16.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}
PICKLES = (".bin", ".ckpt", ".pth", ".pt", ".pkl")


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file as read-only views of the mapped file: no byte is read yet.

    bfloat16 tensors have ml_dtypes' bfloat16. Raises FileNotFoundError, or ValueError if the file
    is not, or not all of, a safetensors file, or holds a type that is not read here.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix in PICKLES:
        raise ValueError(_is_a_pickle(path))
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # checks the header: its offsets lie in the file, fill it and fit the shapes
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    types = {key: entry["dtype"] for key, entry in entries.items()}
    if unread := [f"{key} ({kind})" for key, kind in types.items() if kind not in _DTYPES]:
        raise ValueError(f"{path}: types that are not read here: {', '.join(unread)}")
    if not any(np.prod(entry["shape"]) for entry in entries.values()):
        return {key: np.zeros(e["shape"], _DTYPES[e["dtype"]]) for key, e in entries.items()}
    data = np.memmap(path, np.uint8, mode="r", offset=8 + length)
    return {
        key: data[slice(*e["data_offsets"])].view(_DTYPES[e["dtype"]]).reshape(e["shape"])
        for key, e in entries.items()
    }


def read_folder(
    folder: str | os.PathLike, stem: str, *, variant: str | None = None
) -> dict[str, np.ndarray]:
    """Tensors of a component: `STEM.safetensors`, or the shards that its index file lists.

    variant: of `STEM.VARIANT.safetensors`; a component without files of that variant is read from
    its plain ones, with a warning. Raises FileNotFoundError or ValueError, naming every missing
    shard and every key on which index and shards disagree; pickles are named and refused.
    """
    folder = pathlib.Path(folder)
    for part in dict.fromkeys((variant, None)):
        single, index = _names(stem, part)
        if part != variant and ((folder / single).is_file() or (folder / index).is_file()):
            log.warning("%s has no variant %r: its plain weights are read", folder, variant)
        if (folder / single).is_file():
            return read(folder / single)
        if (folder / index).is_file():
            return _read_shards(folder, folder / index)
    raise FileNotFoundError(_what_is_there(folder, stem, variant))


def has_weights(folder: str | os.PathLike, stem: str, variant: str | None = None) -> bool:
    return any((pathlib.Path(folder) / name).is_file() for name in _names(stem, variant))


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all.

    The metadata says `format: pt`, without which diffusers does not load it.
    """
    arrays = {key: np.require(tensor, requirements="C") for key, tensor in tensors.items()}
    with atomic.replacing(path) as partial:
        safetensors.numpy.save_file(arrays, partial, {"format": "pt", **(metadata or {})})


@contextlib.contextmanager
def fresh_directory(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder to fill that takes the name `directory` in the end, replacing an old one.

    If filling it fails nothing changes, and nothing is left behind.
    """
    directory = pathlib.Path(os.path.abspath(directory))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as parent:
        fresh = pathlib.Path(parent) / "new"
        fresh.mkdir()
        yield fresh
        old = fresh.with_name("old")
        if directory.exists():
            directory.rename(old)
        try:
            fresh.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise


def read_json(path: pathlib.Path) -> dict:
    """An object in a JSON file; ValueError names a file that holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def single_name(stem: str, variant: str | None = None) -> str:
    """What the one file of a component's weights is called."""
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _names(stem: str, variant: str | None) -> tuple[str, str]:
    """The file of all weights, and the index of sharded ones."""
    part = f".{variant}" if variant else ""
    return single_name(stem, variant), f"{stem}.safetensors.index{part}.json"


def _read_shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, np.ndarray]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map")
    if odd := [name for name in where.values() if not isinstance(name, str)]:
        raise ValueError(f"{index}: a shard's name is a text, not {odd[0]!r}")
    shards = sorted(set(where.values()))
    if outside := [name for name in shards if name != pathlib.PurePath(name).name or "\\" in name]:
        raise ValueError(f"{index} names files outside its folder: {outside}")
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: shards that {index.name} lists are missing: {missing}")
    tensors, problems = {}, []
    for name in shards:
        found = read(folder / name)
        listed = {key for key, shard in where.items() if shard == name}
        problems += [f"{name} lacks {key}" for key in sorted(listed - found.keys())]
        problems += [f"{name} has unlisted {key}" for key in sorted(found.keys() - listed)]
        tensors |= found
    if problems:
        raise ValueError("\n  ".join([f"{index} does not fit its shards:", *problems]))
    return tensors


def _what_is_there(folder: pathlib.Path, stem: str, variant: str | None) -> str:
    """Why a folder has no weights to read, and what to do."""
    wanted = " or ".join(dict.fromkeys((_names(stem, variant)[0], _names(stem, None)[0])))
    message = f"{folder} has no weights {wanted}"
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    if pickles := [path for path in there if path.suffix in PICKLES]:
        message += "".join(f"\n  {_is_a_pickle(path)}" for path in pickles)
    others = [p.name for p in there if p.name.startswith(stem) and "safetensors" in p.name]
    if others:
        message += f"; there are {', '.join(others)}: give their variant"
    elif "snapshots" in folder.parts:  # of the hub's cache
        message += (
            "; of the hub nothing else was fetched: see there whether it has a variant, such as"
            " fp16, or only pickles (.bin), which are not read"
        )
    return message


def _is_a_pickle(path: pathlib.Path) -> str:
    return (
        f"{path} is a pickle and is not read, since unpickling runs whatever code is in it:"
        " save the model as safetensors where you trust it"
    )
