"""Trees, buildings, vehicles and what else stands along roads and in parks."""

import numpy as np

from d3epth_jax.data.procedural.parts import PARTS, Part, Thing


def _foliage(count, radius, height, spread, squash=0.8):
    """`count` ellipsoids around a vertical axis; the golden angle makes them look unordered."""
    return tuple(
        Part(
            "ellipsoid",
            "foliage",
            (
                spread * np.cos(2.4 * i) * (i > 0),
                height + (i / max(count - 1, 1) - 0.5) * spread * 1.2,
                spread * np.sin(2.4 * i) * (i > 0),
            ),
            (2 * radius, 2 * radius * squash, 2 * radius),
        )
        for i in range(count)
    )


P = Part
OUTDOORS = {
    "tree": Thing(
        (
            P("cylinder", "bark", (0, 1.5, 0), (0.32, 3.2, 0.32), 3),
            *_foliage(7, 1.25, 4.2, 1.2),
        ),
        scale=(0.6, 2.2),
        stretch=0.3,
        jitter=0.35,
        scatter=0.3,
    ),
    "conifer": Thing(
        (
            P("cylinder", "bark", (0, 0.8, 0), (0.3, 1.8, 0.3)),
            *(
                P("dome", "foliage", (0, 1.9 + 0.95 * i, 0), (3.0 - 0.4 * i, 2.0, 3.0 - 0.4 * i))
                for i in range(7)
            ),
        ),
        scale=(0.5, 1.8),
        stretch=0.3,
        jitter=0.15,
    ),
    "bare_tree": Thing(
        (
            P("cylinder", "bark", (0, 1.6, 0), (0.24, 3.4, 0.24), 4),
            *(
                P(
                    "cylinder",
                    "bark",
                    (0.6 * np.cos(2.4 * i), 2.6 + 0.35 * i, 0.6 * np.sin(2.4 * i)),
                    (0.09, 2.0, 0.09),
                    35 * np.sin(2.4 * i),
                    -35 * np.cos(2.4 * i),
                )
                for i in range(7)
            ),
        ),
        scale=(0.6, 1.8),
        jitter=0.25,
        tumble=15,
    ),
    "bush": Thing(
        _foliage(8, 0.55, 0.5, 0.75, squash=0.95),
        scale=(0.5, 2.0),
        stretch=0.3,
        jitter=0.4,
        scatter=0.3,
    ),
    "grass": Thing(
        tuple(P("ellipsoid", "foliage", (0, 0.15, 0), (0.5, 0.45, 0.5)) for _ in range(PARTS)),
        scale=(0.4, 1.5),
        jitter=0.6,
        scatter=2.0,
    ),
    "hedge": Thing(
        (
            P("pillow", "foliage", (-2.0, 0.7, 0), (4.2, 1.5, 1.0)),
            P("pillow", "foliage", (2.0, 0.75, 0.1), (4.2, 1.6, 1.0)),
            *(P("ellipsoid", "foliage", (-3 + 2.0 * i, 1.2, 0), (2.0, 1.1, 1.2)) for i in range(4)),
        ),
        scale=(0.6, 2.5),
        stretch=0.3,
        jitter=0.25,
    ),
    "treeline": Thing(
        tuple(
            P("ellipsoid", "foliage", (-17.5 + 5.0 * i, 2.8, 0), (7.0, 7.5, 4.0)) for i in range(8)
        ),
        scale=(0.6, 2.0),
        stretch=0.3,
        jitter=0.35,
        scatter=1.2,
    ),
    "rocks": Thing(
        tuple(P("ellipsoid", "stone", (0, 0.15, 0), (0.9, 0.7, 0.7)) for _ in range(PARTS)),
        scale=(0.3, 1.5),
        jitter=0.6,
        scatter=1.5,
        tumble=30,
    ),
    "hill": Thing(
        (P("ellipsoid", "ground", (0, -1.0, 0), (60.0, 9.0, 45.0)),),
        scale=(0.5, 1.5),
        stretch=0.5,
    ),
    "car": Thing(
        (
            P("pillow", "car", (0, 0.62, 0), (1.75, 0.75, 4.3)),
            P("pillow", "window", (0, 1.13, 0.15), (1.5, 0.62, 2.3)),
            P("pillow", "car", (0, 1.36, 0.15), (1.45, 0.2, 1.9)),
            *(
                P("cylinder", "rubber", (0.78 * i, 0.32, 1.3 * j), (0.64, 0.22, 0.64), 0, 90)
                for i in (-1, 1)
                for j in (-1, 1)
            ),
            P("box", "marking", (0, 0.55, 0), (1.2, 0.1, 4.28)),
        ),
        scale=(0.9, 1.1),
        stretch=0.08,
    ),
    "van": Thing(
        (
            P("box", "car", (0, 1.4, 0.4), (2.1, 2.1, 4.6)),
            P("pillow", "car", (0, 0.95, -2.2), (2.0, 1.3, 1.8)),
            P("pillow", "window", (0, 1.7, -1.9), (1.9, 0.8, 1.0)),
            *(
                P("cylinder", "rubber", (0.95 * i, 0.38, 1.7 * j), (0.76, 0.26, 0.76), 0, 90)
                for i in (-1, 1)
                for j in (-1, 1)
            ),
        ),
        scale=(0.8, 1.4),
        stretch=0.15,
    ),
    "motorcycle": Thing(  # along x
        (
            P("cylinder", "rubber", (-0.72, 0.32, 0), (0.64, 0.12, 0.64), 90),
            P("cylinder", "rubber", (0.72, 0.32, 0), (0.64, 0.12, 0.64), 90),
            P("pillow", "car", (-0.05, 0.78, 0), (0.6, 0.28, 0.3), 0, -8),
            P("pillow", "rubber", (0.45, 0.75, 0), (0.7, 0.14, 0.28), 0, 6),
            P("pillow", "metal", (0, 0.4, 0), (0.5, 0.4, 0.3)),
            P("cylinder", "metal", (-0.58, 0.65, 0), (0.07, 0.8, 0.16), 0, -25),
            P("cylinder", "metal", (-0.45, 1.0, 0), (0.04, 0.7, 0.04), 90),
            P("cylinder", "metal", (0.45, 0.3, 0.16), (0.08, 0.9, 0.08), 0, 82),
        ),
        scale=(0.85, 1.15),
        stretch=0.05,
    ),
    "building": Thing(
        (
            P("box", "facade", (0, 5.0, 0), (12.0, 10.0, 8.0)),
            P("box", "roof", (0, 10.2, 0), (12.6, 0.5, 8.6)),
            P("box", "wood", (-2.5, 1.1, -4.0), (1.2, 2.2, 0.12)),
            P("box", "window", (2.5, 1.4, -4.0), (3.5, 1.8, 0.1)),
            P("box", "stone", (0, 0.25, -4.0), (12.1, 0.5, 0.2)),
            P("box", "trim", (2.5, 2.7, -4.6), (4.0, 0.1, 1.2), 10),
            P("box", "facade", (-3.5, 6.0, -4.3), (2.5, 4.5, 0.8)),
            P("box", "trim", (0, 3.4, -4.05), (12.1, 0.25, 0.2)),
        ),
        scale=(0.6, 1.8),
        stretch=0.35,
    ),
    "house": Thing(
        (
            P("box", "facade", (0, 1.6, 0), (8.0, 3.2, 6.0)),
            P("box", "roof", (0, 4.2, -1.65), (8.8, 0.2, 4.4), -35),
            P("box", "roof", (0, 4.2, 1.65), (8.8, 0.2, 4.4), 35),
            P("box", "facade", (0, 3.9, 0), (7.8, 1.6, 2.6)),
            P("box", "wood", (-1.0, 1.05, -3.0), (1.0, 2.1, 0.12)),
            P("box", "window", (2.0, 1.6, -3.0), (1.6, 1.2, 0.1)),
            P("box", "window", (-2.8, 1.6, -3.0), (1.2, 1.2, 0.1)),
            P("box", "stone", (2.2, 5.2, 0.8), (0.6, 1.6, 0.6)),
        ),
        scale=(0.8, 1.5),
        stretch=0.3,
    ),
    "garages": Thing(
        (
            P("box", "facade", (0, 1.4, 0), (12.0, 2.8, 5.0)),
            *(P("box", "paint", (-4 + 4.0 * i, 1.05, -2.5), (2.6, 2.1, 0.1)) for i in range(3)),
            P("box", "roof", (0, 2.9, -0.2), (12.4, 0.2, 5.6)),
        ),
        scale=(0.8, 1.4),
        stretch=0.25,
    ),
    "wall": Thing(
        (
            P("box", "facade", (0, 1.0, 0), (9.0, 2.0, 0.3)),
            P("box", "stone", (0, 2.03, 0), (9.1, 0.08, 0.42)),
        ),
        scale=(0.6, 1.8),
        stretch=0.4,
    ),
    "fence": Thing(
        (
            *(P("box", "wood", (-4 + 1.6 * i, 0.6, 0), (0.12, 1.2, 0.12)) for i in range(6)),
            P("box", "wood", (0, 1.0, -0.05), (9.0, 0.12, 0.05)),
            P("box", "wood", (0, 0.55, -0.05), (9.0, 0.12, 0.05)),
        ),
        stretch=0.3,
    ),
    "guardrail": Thing(
        (
            P("pillow", "metal", (0, 0.65, 0), (24.0, 0.32, 0.1)),
            *(P("box", "metal", (-10.5 + 3.5 * i, 0.35, 0.08), (0.12, 0.7, 0.1)) for i in range(7)),
        ),
        stretch=0.15,
    ),
    "lamp_post": Thing(
        (
            P("cylinder", "metal", (0, 3.0, 0), (0.14, 6.0, 0.14)),
            P("cylinder", "metal", (0, 6.0, -0.7), (0.08, 1.6, 0.08), 90),
            P("pillow", "metal", (0, 5.95, -1.4), (0.25, 0.12, 0.6)),
        ),
        scale=(0.6, 1.5),
        stretch=0.2,
    ),
    "sign": Thing(
        (
            P("cylinder", "metal", (0, 1.3, 0.03), (0.06, 2.6, 0.06)),
            P("cylinder", "picture", (0, 2.4, -0.02), (0.65, 0.03, 0.65), 90),
            P("box", "marking", (0, 1.9, -0.02), (0.5, 0.3, 0.03)),
        ),
        scale=(0.7, 1.3),
    ),
    "bins": Thing(
        (
            P("post", "paint", (0, 0.5, 0), (0.6, 1.0, 0.7)),
            P("pillow", "trim", (0, 1.03, 0), (0.64, 0.1, 0.74)),
            P("cylinder", "metal", (1.0, 0.45, 0), (0.45, 0.9, 0.45)),
            P("box", "card", (-0.8, 0.25, 0), (0.6, 0.5, 0.5)),
        ),
    ),
    "road": Thing(
        (
            P("box", "road", (0, 0.0, 60), (7.0, 0.02, 180.0)),
            P("box", "marking", (-3.2, 0.005, 60), (0.14, 0.02, 180.0)),
            P("box", "marking", (3.2, 0.005, 60), (0.14, 0.02, 180.0)),
            P("box", "marking", (0, 0.005, 8), (0.14, 0.02, 3.0)),
            P("box", "marking", (0, 0.005, 17), (0.14, 0.02, 3.0)),
            P("box", "marking", (0, 0.005, 26), (0.14, 0.02, 3.0)),
            P("box", "stone", (-5.0, 0.03, 60), (2.4, 0.16, 180.0)),
            P("box", "stone", (5.0, 0.03, 60), (2.4, 0.16, 180.0)),
        ),
        scale=(0.8, 1.3),
        stretch=0.25,
    ),
    "track": Thing(
        (
            P("box", "ground", (-0.8, 0.0, 40), (0.6, 0.02, 160.0)),
            P("box", "ground", (0.8, 0.0, 40), (0.6, 0.02, 160.0)),
            P("ellipsoid", "window", (0.6, 0.0, 6), (0.9, 0.03, 3.0)),
            P("ellipsoid", "window", (-0.7, 0.0, 10), (1.2, 0.03, 4.0)),
        ),
        stretch=0.3,
    ),
}
