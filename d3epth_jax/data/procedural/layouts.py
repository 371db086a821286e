"""Kinds of scenes, as data: how often, which camera and room, and what stands where.

Lengths in metres, angles in degrees. The room (or, outdoors, the ground) has a frame of its own,
turned by `yaw` against the view: its +z is the wall (the end of the street) ahead, x is to the
right, the camera stands at the origin. Positive pitch looks up.
"""

import functools
from typing import NamedTuple

import numpy as np

from d3epth_jax.data.procedural.objects import THINGS

Range = tuple[float, float]

# Ways to place an object; the meaning of a slot's ranges `a` and `b`.
VIEW, PLAN, WALL, ON_FIRST, CEILING = range(5)
#  VIEW      a: direction as a share of half the picture's width, b: distance from the camera
#  PLAN      a: x in the frame, b: z in the frame
#  WALL      a: position along a random wall (0 to 1), b: gap to the wall
#  ON_FIRST  a, b: position on top of the first slot's object, as shares of its half size
#  CEILING   as VIEW, hanging from the ceiling


class Slot(NamedTuple):
    things: str  # names, equally likely; "nothing" keeps the slot empty
    place: int
    a: Range = (-1.0, 1.0)
    b: Range = (0.0, 0.0)
    y: Range = (0.0, 0.0)
    turn: Range = (-180.0, 180.0)  # yaw against the frame (WALL: against the wall)


class Layout(NamedTuple):
    weight: float
    fov: Range  # along the longer side of the picture
    height: Range  # of the camera
    pitch: Range
    yaw: Range
    left: Range  # distances from the camera to the four walls
    right: Range
    ahead: Range
    behind: Range
    ceiling: Range
    slots: tuple[Slot, ...]
    roll: float = 3.0
    outdoor: bool = False


SEATS = "chair slat_chair slat_chair armchair office_chair rocking_chair"
TALL = "wardrobe shelf shelf cabinet drawers counter sofa bed radiator television door"
LOW = "table round_table long_table sofa cartons carton junk pot_plant bed desk person rack"
ON_WALL = "window window window glass_door pictures pictures curtain door nothing"
CLUTTER = "junk junk heap heap cups books cartons carton rug bins pot_plant"
# What a picture is taken of: near, and in the middle of it.
SUBJECT = SEATS + " person floor_lamp pot_plant ladder carton cartons table drawers junk"
SUBJECT += 7 * " nothing"
_FLAT = (-8.0, 8.0)
_FRAMES = Slot("pictures pictures window nothing", WALL, (0.0, 1.0), y=(-0.4, 0.4), turn=(0, 0))

_room = (
    Slot(TALL, WALL, (0.0, 1.0)),
    Slot(TALL, WALL, (0.0, 1.0)),
    Slot(TALL + " nothing nothing pot_plant cartons", WALL, (0.0, 1.0)),
    Slot(ON_WALL, WALL, (0.0, 1.0), y=(-0.15, 0.2), turn=(0, 0)),
    Slot(ON_WALL, WALL, (0.0, 1.0), y=(-0.15, 0.2), turn=(0, 0)),
    Slot(LOW, VIEW, (-0.9, 0.9), (1.0, 3.5), turn=(-20, 20)),
    Slot(LOW + " nothing nothing", VIEW, (-1.0, 1.0), (1.5, 5.0), turn=(-20, 20)),
    Slot(SEATS, VIEW, (-1.0, 1.0), (0.9, 3.5)),
    Slot(SEATS + " nothing", VIEW, (-1.0, 1.0), (1.2, 4.0)),
    Slot(SUBJECT, VIEW, (-0.5, 0.5), (0.6, 2.0)),
    Slot(
        "ceiling_lamp ceiling_panels beams nothing nothing",
        CEILING,
        (-0.8, 0.8),
        (1, 4),
        turn=(0, 0),
    ),
    Slot("partition pillar nothing nothing nothing", PLAN, (-1.5, 1.5), (2.0, 5.0), turn=_FLAT),
    _FRAMES,
    Slot(CLUTTER, VIEW, (-1.0, 1.0), (0.8, 4.0)),
    Slot(CLUTTER + " " + SEATS, VIEW, (-1.0, 1.0), (1.5, 5.0)),
)
_heap = (
    Slot(TALL, WALL, (0.0, 1.0)),
    Slot(TALL + " nothing nothing", WALL, (0.0, 1.0)),
    *(Slot(ON_WALL + " pictures", WALL, (0.0, 1.0), y=(-0.4, 0.4), turn=(0, 0)),) * 2,
    *(Slot("heap heap junk", VIEW, (-1.0, 1.0), (0.8, 4.5), y=(0.0, 0.8)),) * 4,
    *(Slot("carton cartons " + CLUTTER, VIEW, (-1.0, 1.0), (0.8, 4.0)),) * 4,
    *(Slot(SEATS + " " + LOW, VIEW, (-1.0, 1.0), (1.2, 5.0)),) * 2,
    Slot("rug rug nothing", VIEW, (-0.5, 0.5), (1.0, 2.5)),
)
_desk = (
    Slot("desk table long_table desk counter", PLAN, (-0.4, 0.4), (0.7, 1.5), turn=(-30, 30)),
    Slot("monitor monitor laptop", ON_FIRST, (-0.5, 0.5), (0.0, 0.6), turn=(-35, 35)),
    Slot("cups", ON_FIRST, (-0.5, 0.5), (-0.6, 0.3)),
    Slot("books", ON_FIRST, (-0.5, 0.5), (-0.6, 0.3)),
    Slot("cups books", ON_FIRST, (-0.6, 0.6), (-0.4, 0.4)),
    Slot("desk_lamp pot_plant laptop monitor nothing", ON_FIRST, (-0.8, 0.8), (-0.3, 0.7)),
    Slot(SEATS + " nothing", VIEW, (-0.8, 0.8), (1.0, 3.0)),
    Slot(LOW + " shelf cabinet", VIEW, (-1.0, 1.0), (2.5, 6.0)),
    Slot(TALL, WALL, (0.0, 1.0)),
    Slot(TALL, WALL, (0.0, 1.0)),
    Slot(ON_WALL, WALL, (0.0, 1.0), y=(-0.15, 0.2), turn=(0, 0)),
    Slot("junk rack nothing nothing", VIEW, (-1.0, 1.0), (2.5, 5.0)),
    Slot("books cups", ON_FIRST, (-0.8, 0.8), (-0.8, 0.8)),
    _FRAMES,
    Slot(CLUTTER, VIEW, (-1.0, 1.0), (1.5, 5.0)),
)
_corridor = (
    *(Slot("door door window pictures radiator", WALL, (0.0, 1.0), turn=(0, 0)),) * 5,
    Slot("cabinet shelf bins cartons drawers pot_plant nothing", WALL, (0.0, 1.0)),
    Slot("cabinet chair cartons drawers nothing", WALL, (0.0, 1.0)),
    Slot("person carton office_chair stairs ladder nothing", VIEW, (-0.5, 0.5), (1.5, 6.0)),
    Slot("person chair cartons nothing", VIEW, (-0.7, 0.7), (2.0, 9.0)),
    Slot("partition partition nothing", PLAN, (-0.3, 0.3), (4.0, 9.0), turn=(0, 0)),
    Slot("ceiling_panels ceiling_lamp beams", CEILING, (0.0, 0.0), (4.0, 5.0), turn=(0, 0)),
    Slot("pillar nothing", PLAN, (-1.2, 1.2), (1.5, 6.0), turn=(0, 0)),
    *(Slot("pictures door window nothing", WALL, (0.0, 1.0), y=(-0.3, 0.3), turn=(0, 0)),) * 2,
    Slot(CLUTTER + " nothing", VIEW, (-1.0, 1.0), (1.0, 7.0)),
)
_SIDE = "building building house garages treeline hedge wall"
_street = (
    Slot("road road road track nothing", PLAN, (-1.5, 1.5), (0.0, 0.0), turn=(0, 0)),
    Slot(_SIDE, PLAN, (-17, -9), (5, 14), turn=(-95, -85)),
    Slot(_SIDE, PLAN, (9, 17), (5, 14), turn=(85, 95)),
    Slot(_SIDE + " treeline", PLAN, (-20, -9), (20, 40), turn=(-100, -80)),
    Slot(_SIDE + " treeline", PLAN, (9, 20), (20, 40), turn=(80, 100)),
    Slot("building treeline treeline hill nothing", PLAN, (-15, 15), (55, 75), turn=_FLAT),
    Slot("car car van nothing", PLAN, (-4.5, -1.5), (6, 30), turn=(-4, 4)),
    Slot("car car van person", PLAN, (1.5, 5), (5, 25), turn=(-4, 4)),
    Slot("tree conifer bush bare_tree", PLAN, (-8, -4.2), (5, 25)),
    Slot("tree conifer bush bare_tree", PLAN, (4.2, 8), (5, 25)),
    Slot("lamp_post sign person bins", PLAN, (-5, -3.5), (4, 18), turn=(-90, 0)),
    Slot("guardrail fence hedge sign lamp_post nothing", PLAN, (3.8, 5.5), (7, 14), turn=(90, 90)),
    Slot("car van lamp_post person bins bush", PLAN, (-5.5, -2.5), (5, 35), turn=(-4, 4)),
    Slot("car van lamp_post person sign tree", PLAN, (2.5, 5.5), (5, 35), turn=(-4, 4)),
    Slot("tree bare_tree treeline building bush", PLAN, (-12, 12), (25, 60), turn=_FLAT),
)
_GREEN = "tree tree conifer bush bush bare_tree"
_park = (
    Slot("track nothing nothing road", PLAN, (-2, 2), (0, 0), turn=(-15, 15)),
    Slot(_GREEN, VIEW, (-1, 1), (4, 10)),
    Slot(_GREEN, VIEW, (-1, 1), (5, 15)),
    Slot(_GREEN, VIEW, (-1, 1), (8, 25)),
    Slot(_GREEN, VIEW, (-1, 1), (12, 40)),
    Slot("treeline treeline hedge", VIEW, (-1, 1), (15, 60), turn=(-40, 40)),
    Slot("treeline hill house building", VIEW, (-1, 1), (30, 70), turn=(-40, 40)),
    Slot("treeline nothing hedge", PLAN, (4, 10), (12, 20), turn=(60, 100)),
    Slot("rocks grass grass", VIEW, (-1, 1), (2, 6)),
    Slot("grass rocks fence", VIEW, (-1, 1), (3, 9)),
    Slot("person person sign bush nothing", VIEW, (-0.8, 0.8), (3, 12)),
    Slot("hill fence wall nothing", VIEW, (-1, 1), (25, 60)),
    Slot("grass rocks bush", VIEW, (-1, 1), (2, 7)),
    Slot("bush bare_tree tree rocks fence", VIEW, (-1, 1), (4, 14)),
    Slot("bare_tree bush person heap nothing", VIEW, (-1, 1), (5, 20)),
)
_yard = (
    Slot("building house garages wall wall", PLAN, (-4, 4), (6, 14), turn=(-35, 35)),
    Slot("motorcycle motorcycle car bins table", VIEW, (-0.5, 0.5), (2.2, 4.5), turn=(-40, 40)),
    Slot("person chair cartons rack ladder", VIEW, (-0.9, 0.9), (2.5, 6)),
    Slot("bush tree hedge", VIEW, (-1, 1), (3, 8)),
    Slot("bush tree bare_tree pot_plant", VIEW, (-1, 1), (3, 9)),
    Slot("junk bins rocks cartons", VIEW, (-1, 1), (2.5, 6)),
    Slot("wall fence hedge garages", PLAN, (-8, -3), (3, 8), turn=(-100, -70)),
    Slot("wall fence hedge nothing", PLAN, (3, 8), (3, 8), turn=(70, 100)),
    Slot("car van motorcycle nothing", VIEW, (-1, 1), (5, 11)),
    Slot("treeline house building", VIEW, (-1, 1), (14, 30), turn=(-30, 30)),
    Slot("lamp_post sign nothing", VIEW, (-1, 1), (2, 6)),
    Slot("grass nothing", VIEW, (-1, 1), (2, 5)),
    Slot("heap junk cartons bins", VIEW, (-1, 1), (2, 6)),
    Slot("bush fence rack chair person", VIEW, (-1, 1), (3, 9)),
    Slot("tree bare_tree car house garages", VIEW, (-1, 1), (7, 20), turn=(-40, 40)),
)
_OPEN = ((200.0, 300.0),) * 5  # left, right, ahead, behind, ceiling: sky, never walls
_WALLS = ((0.5, 4.5), (0.5, 4.5), (2.0, 9.0), (0.5, 3.0), (2.2, 3.6))

_NARROW = ((0.5, 2.0), (0.5, 2.0), (5.0, 12.0), (1.0, 2.0), (2.2, 3.5))
_OUT = (2.5, True)

# Share, field of view along the longer side, height, pitch, yaw, the five distances, slots.
LAYOUTS = {
    "room": Layout(0.20, (45, 85), (1.0, 1.7), (-28, 6), (-50, 50), *_WALLS, _room),
    "room_from_above": Layout(0.05, (45, 85), (1.7, 3.2), (-60, -22), (-50, 50), *_WALLS, _room),
    "room_from_below": Layout(0.06, (45, 80), (0.2, 0.6), (-15, 16), (-50, 50), *_WALLS, _room),
    "heap": Layout(0.11, (40, 85), (0.3, 1.9), (-50, 14), (-50, 50), *_WALLS, _heap, 25.0),
    "desk": Layout(0.11, (40, 70), (1.05, 1.7), (-50, -14), (-45, 45), *_WALLS, _desk),
    "corridor": Layout(0.07, (50, 90), (0.8, 1.8), (-18, 6), (-22, 22), *_NARROW, _corridor),
    "street": Layout(0.15, (50, 90), (1.2, 2.2), (-10, 4), (-18, 18), *_OPEN, _street, *_OUT),
    "park": Layout(0.14, (45, 80), (0.8, 2.2), (-16, 4), (-60, 60), *_OPEN, _park, *_OUT),
    "yard": Layout(0.11, (45, 75), (0.8, 2.0), (-20, 3), (-30, 30), *_OPEN, _yard, *_OUT),
}


@functools.cache
def tables() -> dict[str, np.ndarray]:
    """LAYOUTS as arrays: per layout [L, ...], per slot [L, G, ...]; angles in radians."""
    names, rows = list(THINGS), list(LAYOUTS.values())
    slots = [row.slots for row in rows]

    def choice(slot):  # cumulative probabilities over THINGS
        listed = slot.things.split()
        return np.cumsum([listed.count(name) / len(listed) for name in names])

    weight = np.array([row.weight for row in rows])
    return {
        "weight": np.cumsum(weight / weight.sum()).astype(np.float32),
        "angle": np.radians(
            [[r.fov, r.pitch, r.yaw, (-r.roll, r.roll)] for r in rows], dtype=np.float32
        ),
        "length": np.float32(
            [[r.height, r.left, r.right, r.ahead, r.behind, r.ceiling] for r in rows]
        ),
        "outdoor": np.array([r.outdoor for r in rows]),
        "choice": np.float32([[choice(s) for s in row] for row in slots]),
        "place": np.array([[s.place for s in row] for row in slots], np.int32),
        "range": np.float32([[[s.a, s.b, s.y, np.radians(s.turn)] for s in row] for row in slots]),
    }
