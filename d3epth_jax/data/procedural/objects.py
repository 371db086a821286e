"""All things that scenes are made of, by name, and as arrays."""

import functools

import numpy as np

from d3epth_jax.data.procedural.fittings import FITTINGS
from d3epth_jax.data.procedural.furniture import FURNITURE
from d3epth_jax.data.procedural.outdoors import OUTDOORS
from d3epth_jax.data.procedural.parts import PARTS, ROLES, SHAPES

THINGS = FURNITURE | FITTINGS | OUTDOORS


@functools.cache
def tables() -> dict[str, np.ndarray]:
    """THINGS as arrays: per part [T, PARTS, ...], per thing [T, ...]."""
    count = len(THINGS)
    out = {
        "centre": np.zeros((count, PARTS, 3), np.float32),
        "half": np.zeros((count, PARTS, 3), np.float32),
        "quadric": np.tile(np.float32(SHAPES["box"]), (count, PARTS, 1)),
        "angles": np.zeros((count, PARTS, 2), np.float32),
        "role": np.zeros((count, PARTS), np.int32),
        "used": np.zeros((count, PARTS), bool),
        # scale lo, scale hi, stretch, scatter, jitter, tumble
        "spread": np.zeros((count, 6), np.float32),
        "extent": np.zeros((count, 3), np.float32),  # half width, height, half depth
        "top": np.zeros(count, np.float32),
    }
    for t, thing in enumerate(THINGS.values()):
        out["spread"][t] = (
            *thing.scale,
            thing.stretch,
            thing.scatter,
            thing.jitter,
            np.radians(thing.tumble),
        )
        for k, part in enumerate(thing.parts):
            out["centre"][t, k] = part.centre
            out["half"][t, k] = np.asarray(part.size) / 2
            out["quadric"][t, k] = SHAPES[part.shape]
            out["angles"][t, k] = np.radians((part.pitch, part.roll))
            out["role"][t, k] = ROLES.index(part.role)
            out["used"][t, k] = True
            upright = not (part.pitch or part.roll)
            reach = np.abs(part.centre) + (out["half"][t, k] if upright else 0)
            out["extent"][t] = np.maximum(out["extent"][t], reach)
        out["top"][t] = out["extent"][t, 1] if thing.top is None else thing.top
    return out
