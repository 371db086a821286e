"""Random scenes ray-traced in JAX, with exact depth: training data that needs no download."""

from d3epth_jax.data.procedural.render import MAX_DEPTH, render
from d3epth_jax.data.procedural.source import ProceduralSource

__all__ = ["MAX_DEPTH", "ProceduralSource", "render"]
