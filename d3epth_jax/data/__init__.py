"""Data: sources give {image, depth in metres, mask}, transforms and loader make batches."""

import importlib
from collections.abc import Sequence

import numpy as np

SOURCES = {
    "folder": ("d3epth_jax.data.sources.folder", "folder"),
    "hypersim": ("d3epth_jax.data.sources.hypersim", "hypersim"),
    "procedural": ("d3epth_jax.data.procedural", "ProceduralSource"),
    "vkitti2": ("d3epth_jax.data.sources.vkitti2", "vkitti2"),
}


def make_source(name: str, **settings):
    """A source by its name in configs; the other settings are its arguments."""
    if name not in SOURCES:
        raise ValueError(f"unknown data source {name!r}: choose one of {sorted(SOURCES)}")
    module, function = SOURCES[name]
    return getattr(importlib.import_module(module), function)(**settings)


def read_samples(source, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Samples of a source as NumPy arrays: at once where it makes batches, else one by one."""
    if not hasattr(source, "batch"):
        return [source[i] for i in indices]
    batch = {name: np.asarray(value) for name, value in source.batch(list(indices)).items()}
    return [{name: value[j] for name, value in batch.items()} for j in range(len(indices))]
