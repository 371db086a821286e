"""A teacher cache (METHOD 7): what a teacher gave for a source's pictures, and their mirror images.

    cache.json                              what was computed, with which teacher, of which samples
    latents-IIIII-of-NNNNN.safetensors      [n,F,...] of n samples: F is 1, or 2 with mirror images
        rgb_latent, teacher_latent, gt_latent   float16 [n,F,h,w,C]
        latent_mask, has_target                 uint8 [n,F,h,w,1] and [n,F], 0 or 1
A shard is whole or not there (training/cache.py writes them); the cache is whole once all are.
Its metadata has its arrays' SHA-256; the job that makes the cache verifies it, readers do not.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from d3epth_jax import atomic
from d3epth_jax.data.sources.files import Sample, SourceError
from d3epth_jax.weights import files

MANIFEST = "cache.json"
FORMAT = 1
FLAGS = ("latent_mask", "has_target")  # stored as bytes
CHECKSUM = "sha256"
AGAIN = "run its job again: python -m d3epth_jax.main --config=configs/cache.py --workdir="


class CachedLatents:
    """Random access to {key: [F,...]} for the asked keys, and the image where it is asked for.

    Args:
      folder: one source's part of a cache.
      keys: what to read: rgb_latent, teacher_latent, gt_latent, latent_mask, has_target.
      expected: entries of cache.json that must be these, as {"data": {"height": 480}}.
      mirrored: mirror images are needed.
      pictures, fit: the source that was cached, and the transform (sample, rng) -> sample that it
        was cached with, to give "image" uint8 [H,W,3] beside the latents, never mirrored.

    Raises SourceError: no cache, an unfinished or damaged one, or one of something else.
    """

    def __init__(
        self,
        folder,
        keys: Sequence[str],
        *,
        expected: Mapping | None = None,
        mirrored: bool = False,
        pictures=None,
        fit: Callable | None = None,
    ):
        self.folder, self._keys = Path(folder), tuple(keys)
        self._pictures, self._fit = pictures, fit
        self._open: dict[int, Mapping] = {}
        self.manifest = manifest = read_manifest(self.folder)
        again = f"{AGAIN}{self.folder.parent}"
        if not manifest:
            raise SourceError(self.folder, [f"no teacher cache here (no {MANIFEST}); {again}"])
        problems = [
            f"the cache has {key}: {there}, but this run has {here}"
            for key, there, here in differences(manifest, expected or {})
        ]
        if mirrored and manifest["sides"] == 1:
            problems.append("no mirror images in the cache: set data.flip=0, or cache them as well")
        if unknown := [key for key in keys if key not in manifest["shapes"]]:
            problems.append(
                f"the cache has no {', '.join(unknown)}: set loss.beta.gt=0, or cache with"
                " cache.target=True"
            )
        if pictures is not None:
            names = [pictures.name(i) for i in range(len(pictures))]
            if names != manifest["names"]:
                problems.append(
                    f"the source has {len(names)} samples, the cache {len(manifest['names'])}, and"
                    " not the same in one order"
                )
        self._shards = shards(manifest)
        if not problems:
            broken = [
                name
                for name, rows in self._shards
                if not is_whole(self.folder / name, rows, manifest)
            ]
            if broken:
                problems.append(
                    f"unfinished: {len(broken)} of {len(self._shards)} shards missing or damaged"
                    f" ({broken[0]} the first); {again}"
                )
        if problems:
            raise SourceError(self.folder, problems)

    def __len__(self) -> int:
        return len(self.manifest["names"])

    def __getitem__(self, i) -> Sample:
        shard, row = divmod(range(len(self))[i], self.manifest["shard_size"])
        if shard not in self._open:
            self._open[shard] = files.read(self.folder / self._shards[shard][0])
        arrays = self._open[shard]
        sample = {
            key: arrays[key][row].astype(bool) if key in FLAGS else arrays[key][row]
            for key in self._keys
        }
        if self._pictures is not None:
            sample["image"] = self._fit(self._pictures[i], None)["image"]
        return sample

    def name(self, i) -> str:
        return self.manifest["names"][i]

    def __getstate__(self):
        # Mapped files would travel to worker processes as their content.
        return self.__dict__ | {"_open": {}}


def read_manifest(folder: Path) -> dict:
    """The content of cache.json, {} where there is none. Raises SourceError for something else."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = files.read_json(path)
    except ValueError as error:
        raise SourceError(folder, [str(error)]) from error
    if manifest.get("format") != FORMAT:
        raise SourceError(folder, [f"{path} is not of a teacher cache, or of another version"])
    return manifest


def shards(manifest: Mapping) -> list[tuple[str, range]]:
    """(file name, numbers of its samples) of every shard."""
    total, size = len(manifest["names"]), manifest["shard_size"]
    count = -(-total // size)
    return [
        (f"latents-{k:05d}-of-{count:05d}.safetensors", range(k * size, min((k + 1) * size, total)))
        for k in range(count)
    ]


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a shard with its checksum, whole or not at all; equal arrays give equal files."""
    # Nothing else in the metadata: safetensors writes several entries in a random order.
    with atomic.replacing(path) as partial:
        safetensors.numpy.save_file(dict(arrays), partial, {CHECKSUM: _checksum(arrays)})


def is_intact(path: Path, rows: range, manifest: Mapping) -> bool:
    """Whether a shard is whole, and its content is what was written: reads all of it."""
    if not is_whole(path, rows, manifest):
        return False
    with safetensors.safe_open(path, framework="numpy") as shard:
        written = (shard.metadata() or {}).get(CHECKSUM)
    return written == _checksum(files.read(path))


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def is_whole(path: Path, rows: range, manifest: Mapping) -> bool:
    """Whether a shard is there, of the size that its header says, with the manifest's arrays."""
    try:
        arrays = files.read(path)
    except (FileNotFoundError, ValueError):
        return False
    wanted = {key: (len(rows), *shape) for key, shape in manifest["shapes"].items()}
    return {key: array.shape for key, array in arrays.items()} == wanted


def differences(manifest: Mapping, expected: Mapping) -> list[tuple[str, str, str]]:
    """(dotted key, there, here) of every entry of `expected` that the manifest has otherwise."""
    there, here = (_flat(json.loads(json.dumps(tree))) for tree in (manifest, expected))
    of_groups = {key: value for key, value in there.items() if key.split(".")[0] in expected}
    return [
        (key, _short(of_groups.get(key)), _short(here.get(key)))
        for key in sorted(of_groups.keys() | here.keys())
        if of_groups.get(key) != here.get(key)
    ]


def _flat(tree, prefix: str = "") -> dict:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else name).items()
    }


def _short(value) -> str:
    return f"{len(value)} of them" if isinstance(value, list) and len(value) > 3 else repr(value)
