"""What the things in the scenes are made of: simple convex parts, sizes in metres.

A part is the unit cube cut by one quadric (trace.py), so boxes, cylinders, ellipsoids, bowls and
rounded boxes share one intersection routine. Objects stand on y = 0, their back is at +z.
"""

from typing import NamedTuple

PARTS = 8  # part slots of every object; unused ones are removed when the scene is built

# x^2 + z^2 + a y^2 + b y + c <= 0 inside the unit cube: (a, b, c).
SHAPES = {
    "box": (0.0, 0.0, -9.0),
    "cylinder": (0.0, 0.0, -1.0),
    "ellipsoid": (1.0, 0.0, -1.0),
    "dome": (0.0, 0.5, -0.5),  # paraboloid, closed at the top
    "bowl": (0.0, -0.5, -0.5),
    "pillow": (1.0, 0.0, -1.75),  # a box with rounded edges and corners
    "post": (0.0, 0.0, -1.5),  # a box with rounded upright edges
    "barrel": (0.35, 0.0, -1.0),
}
ROLES = (
    *("paint", "trim", "wood", "metal", "plastic", "foliage", "bark", "facade", "roof"),
    *("rubber", "skin", "glow", "window", "cloth", "picture", "wall", "floor", "ceiling"),
    *("ground", "road", "card", "car", "marking", "stone"),
)


class Part(NamedTuple):
    shape: str
    role: str
    centre: tuple[float, float, float]
    size: tuple[float, float, float]  # full extent along the part's own axes
    pitch: float = 0.0  # degrees about x, then roll about z
    roll: float = 0.0


class Thing(NamedTuple):
    parts: tuple[Part, ...]
    scale: tuple[float, float] = (0.85, 1.2)  # drawn once per object
    stretch: float = 0.15  # each axis is drawn anew within 1 -+ stretch
    scatter: float = 0.0  # metres by which each part wanders on the plan
    jitter: float = 0.0  # relative spread of each part's size
    tumble: float = 0.0  # degrees by which each part turns about every axis
    top: float | None = None  # height that things stand on; its whole height if not given
