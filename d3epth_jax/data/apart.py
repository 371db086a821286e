"""Whether a sample is both trained and evaluated on, under whatever name, and copied or not."""

import os
import pathlib

from d3epth_jax.data import manifest
from d3epth_jax.data.sources.latents import CachedLatents


def require_apart(training, validation) -> None:
    """Raises ValueError if a sample is both trained and evaluated on, under whatever name."""
    seeds = [getattr(source, "seed", None) for source in (training, validation)]
    if None not in seeds and seeds[0] == seeds[1]:
        raise ValueError(
            f"the scenes of one seed are both trained and evaluated on: give data.source.seed and"
            f" eval.source.seed, both {seeds[0]}, different values"
        )
    # Of a cached or built source the pictures need not be there any more.
    copied = any(isinstance(s, CachedLatents) or _has_shards(s) for s in (training, validation))
    identity = _names_in_root if copied else _pictures
    if both := identity(training) & identity(validation):
        first = min(both)
        raise ValueError(
            f"{len(both)} samples are both trained and evaluated on, {' '.join(first)} the first:"
            " give data.source and eval.source the splits train and validation, and one hold-out"
        )


def origin(source) -> str | None:
    """The folder that the samples of a source come from, or that of their copies if many; of
    rendered scenes their seed."""
    roots = {root for root, _ in _names_in_root(source)}
    if len(roots) == 1:
        return roots.pop()
    if (seed := getattr(source, "seed", None)) is not None:
        return f"scenes of seed {seed}"
    return getattr(source, "root", None) and str(source.root)


def _names_in_root(source) -> set[tuple[str, ...]]:
    """The samples by the folder that they come from, also where they were copied from it."""
    cached = isinstance(source, CachedLatents)
    root = source.manifest["about"]["source"] if cached else getattr(source, "root", None)
    if root is None:
        return set()
    if not cached or os.path.isabs(root):  # of what was cached of built scenes `origin` is no path
        root = str(pathlib.Path(root).resolve())
    built = _built_from(source)
    names = enumerate(map(source.name, range(len(source))))
    if not built:
        return {(root, name) for _, name in names}
    return {(built[pathlib.Path(source.files(i)["image"]).name], name) for i, name in names}


def _has_shards(source) -> bool:
    """Whether its root is a set of TFDS, as `d3epth data build` writes too."""
    return hasattr(source, "files") and (source.root / "dataset_info.json").is_file()


def _built_from(source) -> dict[str, str]:
    """{shard: what `d3epth data build` read it from}; empty for a source that it did not write."""
    if not _has_shards(source):
        return {}
    found = {}
    for each in manifest.read_manifests(source.root).values():
        found |= dict.fromkeys(each["shards"], each["root"])
    return found


def _pictures(source) -> set[tuple[str, ...]]:
    """What each sample of files is read from: its picture, and its name where many share a file."""
    if not hasattr(source, "files"):
        return set()
    folders = {}

    def resolved(path: pathlib.Path) -> str:
        if path.parent not in folders:
            folders[path.parent] = path.parent.resolve()
        return str(folders[path.parent] / path.name)

    pictures = [resolved(pathlib.Path(source.files(i)["image"])) for i in range(len(source))]
    if len(set(pictures)) == len(pictures):
        return {(picture,) for picture in pictures}
    return {(picture, source.name(i)) for i, picture in enumerate(pictures)}
