"""Things on walls, ceilings and tables."""

from d3epth_jax.data.procedural.parts import Part, Thing


def _clutter(*kinds):
    """Small things side by side; `scatter` moves them."""
    return tuple(
        Part(shape, role, (0.0, size[1] / 2, 0.0), size, pitch)
        for shape, role, size, pitch in kinds
    )


P = Part
FITTINGS = {
    # --- on walls and ceilings
    "door": Thing(
        (
            P("box", "trim", (0, 1.04, 0), (1.0, 2.08, 0.06)),
            P("box", "wood", (0, 1.0, -0.02), (0.86, 1.98, 0.06)),
            P("cylinder", "metal", (-0.36, 1.0, -0.08), (0.025, 0.12, 0.025), 0, 90),
            P("box", "trim", (0, 1.5, -0.04), (0.6, 0.7, 0.04)),
            P("box", "trim", (0, 0.5, -0.04), (0.6, 0.7, 0.04)),
        ),
        stretch=0.1,
    ),
    "window": Thing(
        (
            P("box", "window", (0, 1.5, 0.02), (1.3, 1.3, 0.02)),
            P("box", "trim", (-0.68, 1.5, -0.01), (0.07, 1.42, 0.09)),
            P("box", "trim", (0.68, 1.5, -0.01), (0.07, 1.42, 0.09)),
            P("box", "trim", (0, 2.18, -0.01), (1.42, 0.07, 0.09)),
            P("box", "trim", (0, 0.82, -0.06), (1.5, 0.06, 0.2)),
            P("box", "trim", (0, 1.5, 0), (0.05, 1.3, 0.05)),
            P("box", "cloth", (-0.85, 1.35, -0.08), (0.4, 2.2, 0.07)),
            P("box", "cloth", (0.85, 1.35, -0.08), (0.4, 2.2, 0.07)),
        ),
        stretch=0.35,
    ),
    "glass_door": Thing(
        (
            P("box", "window", (0, 1.05, 0.02), (2.2, 2.1, 0.02)),
            P("box", "trim", (0, 1.05, 0), (0.08, 2.1, 0.06)),
            P("box", "trim", (-1.1, 1.05, 0), (0.08, 2.1, 0.06)),
            P("box", "trim", (1.1, 1.05, 0), (0.08, 2.1, 0.06)),
            *(
                P("cylinder", "cloth", (1.15 + 0.14 * i, 1.15, -0.1), (0.15, 2.3, 0.15))
                for i in range(4)
            ),
        ),
        stretch=0.2,
    ),
    "curtain": Thing(
        tuple(
            P("cylinder", "cloth", (-0.6 + 0.17 * i, 1.15, 0), (0.19, 2.3, 0.14)) for i in range(8)
        ),
        stretch=0.3,
        jitter=0.1,
    ),
    "pictures": Thing(
        (
            P("box", "wood", (-0.5, 1.6, 0), (0.6, 0.8, 0.03)),
            P("box", "picture", (-0.5, 1.6, -0.01), (0.5, 0.7, 0.03)),
            P("box", "wood", (0.5, 1.7, 0), (0.5, 0.4, 0.03)),
            P("box", "picture", (0.5, 1.7, -0.01), (0.42, 0.32, 0.03)),
        ),
        stretch=0.4,
    ),
    "television": Thing(
        (
            P("box", "rubber", (0, 1.1, 0.05), (1.2, 0.7, 0.06)),
            P("box", "picture", (0, 1.1, 0.015), (1.14, 0.64, 0.01)),
            P("box", "wood", (0, 0.25, -0.1), (1.5, 0.45, 0.4)),
            P("box", "rubber", (0.3, 0.52, -0.1), (0.4, 0.08, 0.25)),
        ),
        stretch=0.25,
    ),
    "radiator": Thing(
        tuple(
            P("pillow", "plastic", (-0.49 + 0.14 * i, 0.45, 0), (0.1, 0.6, 0.12)) for i in range(8)
        ),
        stretch=0.3,
    ),
    "ceiling_lamp": Thing(
        (
            P("cylinder", "metal", (0, -0.3, 0), (0.02, 0.6, 0.02)),
            P("dome", "glow", (0, -0.7, 0), (0.5, 0.3, 0.5)),
        ),
        stretch=0.4,
    ),
    "ceiling_panels": Thing(
        tuple(P("box", "glow", (0, -0.01, -3 + 2.0 * i), (1.2, 0.03, 0.3)) for i in range(4)),
        stretch=0.4,
    ),
    "beams": Thing(
        tuple(P("box", "wood", (0, -0.08, -2.6 + 1.1 * i), (12.0, 0.18, 0.16)) for i in range(6)),
    ),
    # --- on a table
    "monitor": Thing(
        (
            P("pillow", "rubber", (0, 0.3, 0), (0.5, 0.36, 0.06), -4),
            P("box", "picture", (0, 0.3, -0.032), (0.44, 0.29, 0.01), -4),
            P("cylinder", "rubber", (0, 0.08, 0.03), (0.05, 0.15, 0.05)),
            P("cylinder", "rubber", (0, 0.01, 0.02), (0.24, 0.02, 0.2)),
            P("box", "plastic", (0, 0.012, -0.3), (0.44, 0.024, 0.14)),
            P("pillow", "rubber", (0.34, 0.02, -0.3), (0.06, 0.035, 0.1)),
        ),
    ),
    "laptop": Thing(
        (
            P("box", "metal", (0, 0.01, -0.1), (0.34, 0.02, 0.24)),
            P("box", "metal", (0, 0.13, 0.06), (0.34, 0.24, 0.01), 18),
            P("box", "picture", (0, 0.13, 0.052), (0.31, 0.2, 0.01), 18),
            P("box", "rubber", (0, 0.021, -0.08), (0.3, 0.004, 0.12)),
        ),
    ),
    "cups": Thing(
        _clutter(
            ("cylinder", "plastic", (0.08, 0.1, 0.08), 0),
            ("cylinder", "paint", (0.07, 0.12, 0.07), 0),
            ("cylinder", "picture", (0.066, 0.115, 0.066), 0),
            ("barrel", "trim", (0.09, 0.22, 0.09), 0),
            ("bowl", "plastic", (0.2, 0.08, 0.2), 0),
            ("ellipsoid", "paint", (0.09, 0.09, 0.09), 0),
            ("ellipsoid", "trim", (0.16, 0.13, 0.14), 0),
            ("cylinder", "metal", (0.012, 0.17, 0.012), 90),
        ),
        scatter=0.55,
        jitter=0.35,
    ),
    "books": Thing(
        _clutter(
            ("box", "paint", (0.2, 0.04, 0.28), 0),
            ("box", "picture", (0.22, 0.02, 0.3), 0),
            ("box", "trim", (0.15, 0.1, 0.2), 0),
            ("box", "plastic", (0.21, 0.004, 0.3), 0),
            ("box", "plastic", (0.21, 0.003, 0.3), 0),
            ("box", "card", (0.2, 0.16, 0.14), 0),
            ("pillow", "rubber", (0.07, 0.04, 0.15), 0),
            ("box", "paint", (0.05, 0.25, 0.18), 0),
        ),
        scatter=0.55,
        jitter=0.4,
    ),
    "desk_lamp": Thing(
        (
            P("cylinder", "metal", (0, 0.01, 0), (0.18, 0.03, 0.18)),
            P("cylinder", "metal", (0, 0.2, 0.06), (0.02, 0.42, 0.02), 18),
            P("cylinder", "metal", (0, 0.42, -0.02), (0.02, 0.34, 0.02), 120),
            P("dome", "glow", (0, 0.48, -0.18), (0.16, 0.13, 0.16)),
            P("barrel", "paint", (0.25, 0.08, 0.05), (0.1, 0.16, 0.1)),
            P("ellipsoid", "foliage", (0.25, 0.3, 0.05), (0.24, 0.34, 0.24)),
        ),
    ),
    "junk": Thing(
        (
            P("box", "paint", (0, 0.25, 0), (0.5, 0.5, 0.4)),
            P("box", "wood", (0.2, 0.5, 0), (0.9, 0.06, 0.2)),
            P("ellipsoid", "trim", (0, 0.25, 0), (0.5, 0.5, 0.5)),
            P("cylinder", "metal", (0, 0.6, 0), (0.06, 1.3, 0.06)),
            P("cylinder", "paint", (0, 0.3, 0), (0.4, 0.6, 0.4)),
            P("pillow", "cloth", (0, 0.2, 0), (0.6, 0.35, 0.5)),
            P("box", "card", (0, 0.7, 0), (0.3, 0.4, 0.5)),
            P("box", "plastic", (0, 0.9, 0), (0.7, 0.02, 0.5)),
        ),
        scale=(0.5, 1.5),
        stretch=0.4,
        scatter=0.7,
        jitter=0.5,
        tumble=60,
    ),
    "heap": Thing(  # of anything: what is near is then told by outlines and shading alone
        (
            P("box", "paint", (0, 0.3, 0), (0.3, 0.6, 0.2)),
            P("box", "card", (0, 0.2, 0), (0.4, 0.3, 0.3)),
            P("pillow", "cloth", (0, 0.3, 0), (0.5, 0.3, 0.4)),
            P("ellipsoid", "paint", (0, 0.5, 0), (0.3, 0.4, 0.3)),
            P("barrel", "trim", (0, 0.4, 0), (0.25, 0.4, 0.25)),
            P("bowl", "plastic", (0, 0.2, 0), (0.4, 0.2, 0.4)),
            P("box", "picture", (0, 0.6, 0), (0.5, 0.4, 0.02)),
            P("cylinder", "metal", (0, 0.5, 0), (0.05, 1.2, 0.05)),
        ),
        scale=(0.4, 2.2),
        stretch=0.5,
        scatter=0.6,
        jitter=0.7,
        tumble=180,
    ),
    "rug": Thing((P("box", "cloth", (0, 0.006, 0), (1.8, 0.012, 1.2)),), stretch=0.5),
}
