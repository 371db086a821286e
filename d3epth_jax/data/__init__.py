"""Data: sources give {image, depth in metres, mask}, transforms and loader make batches."""

import importlib
import inspect
from collections.abc import Iterable, Sequence

import numpy as np

SOURCES = {
    "folder": ("d3epth_jax.data.sources.folder", "folder"),
    "hypersim": ("d3epth_jax.data.sources.hypersim", "hypersim"),
    "tfds": ("d3epth_jax.data.sources.tfds", "tfds"),
    "procedural": ("d3epth_jax.data.procedural", "ProceduralSource"),
    "vkitti2": ("d3epth_jax.data.sources.vkitti2", "vkitti2"),
    "nyu": ("d3epth_jax.data.sources.nyu", "nyu"),
    "kitti": ("d3epth_jax.data.sources.kitti", "kitti"),
    "eth3d": ("d3epth_jax.data.sources.eth3d", "eth3d"),
    "scannet": ("d3epth_jax.data.sources.scannet", "scannet"),
    "diode": ("d3epth_jax.data.sources.diode", "diode"),
    "ibims": ("d3epth_jax.data.sources.ibims", "ibims"),
}


def make_source(name: str, **settings):
    """A source by its name in configs; the other settings are its arguments.

    "tfds:NAME/SPLIT" is tfds with dataset="NAME", split="SPLIT".
    """
    name, dataset, split = name_parts(name)
    if dataset and name == "tfds":
        settings = settings | {"dataset": dataset} | ({"split": split} if split else {})
    elif dataset:
        raise ValueError(f"data source {name!r} takes no {dataset!r}; only tfds:NAME does")
    require_settings(name, settings)
    return source_function(name)(**settings)


def name_parts(name: str) -> tuple[str, str, str]:
    """A source's name and, of "tfds:NAME/SPLIT", data set and split; NAME may have a "/" itself."""
    name, _, dataset = name.partition(":")
    dataset, _, split = dataset.rpartition("/") if "/" in dataset else (dataset, "", "")
    return name, dataset, split


def require_settings(name: str, settings: Iterable[str]) -> None:
    """Raises ValueError if a source does not take just these settings, with those that it takes."""
    takes = inspect.signature(source_function(name)).parameters
    needs = {key for key, value in takes.items() if value.default is value.empty}
    unknown, missing = sorted(set(settings) - set(takes)), sorted(needs - set(settings))
    wrong = [f"does not take {', '.join(unknown)}"] if unknown else []
    wrong += [f"needs {', '.join(missing)}"] if missing else []
    if wrong:
        raise ValueError(
            f"data source {name!r} {' and '.join(wrong)}; its settings are {', '.join(takes)}. A"
            " config's `source` is replaced as a whole, as by a function of configs/common.py"
        )


def source_function(name: str):
    """The function behind a name in SOURCES."""
    if name not in SOURCES:
        raise ValueError(f"unknown data source {name!r}: choose one of {sorted(SOURCES)}")
    module, function = SOURCES[name]
    return getattr(importlib.import_module(module), function)


def read_samples(source, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Samples of a source as NumPy arrays: at once where it makes batches, else one by one."""
    if not hasattr(source, "batch"):
        return [source[i] for i in indices]
    batch = {name: np.asarray(value) for name, value in source.batch(list(indices)).items()}
    return [{name: value[j] for name, value in batch.items()} for j in range(len(indices))]
