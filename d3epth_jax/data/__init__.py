"""Data: sources give {image, depth in metres, mask}, transforms and loader make batches."""

import importlib

SOURCES = {
    "folder": ("d3epth_jax.data.sources.folder", "FolderSource"),
    "procedural": ("d3epth_jax.data.procedural", "ProceduralSource"),
}


def make_source(name: str, **settings):
    """A source by its name in configs; the other settings are its arguments."""
    if name not in SOURCES:
        raise ValueError(f"unknown data source {name!r}: choose one of {sorted(SOURCES)}")
    module, function = SOURCES[name]
    return getattr(importlib.import_module(module), function)(**settings)
