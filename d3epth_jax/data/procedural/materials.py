"""Surfaces: colours and textures, drawn per scene, as data and one table per scene.

Albedos are drawn log-uniformly over most of their range, near and far alike.
"""

import jax.numpy as jnp
import numpy as np

from d3epth_jax.data.procedural.parts import ROLES

# Texture families. All are one function (`texture`): cells with joints, a tone per cell, parity,
# and noise. The columns: cell size lo, hi (m), height/width lo, hi, shift of every second row,
# joint width lo, hi (share of the cell); base, then weights of joint, cell tone, parity and noise
# in the blend from the first to the second colour; noise size lo, hi (m), its aspect lo, hi.
FAMILIES = {
    "plain": (1, 1, 1, 1, 0, 0, 0, 0.3, 0, 0, 0, 0.3, 0.3, 2, 0.7, 1.4),
    "stain": (1, 1, 1, 1, 0, 0, 0, 0.5, 0, 0, 0, 1.6, 0.1, 0.8, 0.5, 2),
    "grain": (1, 1, 1, 1, 0, 0, 0, 0.5, 0, 0, 0, 1.4, 0.01, 0.06, 0.5, 2),
    "coarse": (1, 1, 1, 1, 0, 0, 0, 0.5, 0, 0, 0, 2.2, 0.06, 3.0, 0.7, 1.4),
    "leaves": (1, 1, 1, 1, 0, 0, 0, 0.5, 0, 0, 0, 2.6, 0.08, 0.5, 0.7, 1.4),
    "planks": (0.08, 0.2, 6, 12, 0.37, 0.02, 0.05, 0.3, 0.7, 0.6, 0, 0.9, 0.03, 0.06, 6, 15),
    "veneer": (1, 1, 1, 1, 0, 0, 0, 0.4, 0, 0, 0, 1.3, 0.2, 0.6, 0.05, 0.15),
    "tiles": (0.15, 0.7, 0.8, 1.2, 0, 0.02, 0.06, 0.1, 0.9, 0.2, 0, 0.2, 0.2, 1, 1, 1),
    "bricks": (0.2, 0.32, 0.3, 0.4, 0.5, 0.04, 0.09, 0.2, 0.9, 0.6, 0, 0.4, 0.05, 0.3, 1, 1),
    "checker": (0.04, 0.5, 0.8, 1.2, 0, 0, 0, 0, 0, 0.1, 1, 0.2, 0.1, 1, 1, 1),
    "stripes": (0.02, 0.3, 99, 99, 0, 0, 0, 0, 0, 0.1, 1, 0.2, 0.1, 1, 1, 1),
    "storeys": (1.4, 3.5, 0.8, 1.5, 0, 0.35, 0.6, 0.0, 1.5, 0.5, 0, 0.15, 0.5, 3, 1, 1),
    "print": (0.03, 0.3, 0.5, 2, 0.3, 0, 0, 0.4, 0, 1.6, 0, 1.5, 0.03, 0.2, 0.5, 2),
}
# Roles of parts: hue lo, hi; saturation lo, hi; albedo lo, hi; the second colour's albedo ratio
# lo, hi; its hue shift; emission lo, hi; gloss lo, hi; families, equally likely.
MATERIALS = {
    "paint": "0 1  0 .9  .03 .8  .15 4  .3  0 0  0 .5 | plain plain grain checker stripes print",
    "trim": "0 1  0 .5  .03 .85  .3 2  .1  0 0  0 .5 | plain plain plain veneer grain",
    "wood": ".02 .12  .1 .75  .03 .6  .25 .9  .02  0 0  0 .4 | veneer veneer planks plain",
    "metal": ".5 .7  0 .15  .02 .6  .5 1.5  0  0 0  .2 1 | plain",
    "plastic": "0 1  0 .15  .3 .9  .2 1.2  .1  0 0  0 .5 | plain plain print",
    "foliage": ".14 .38  .2 .85  .02 .4  .05 .5  .06  0 0  0 .1 | leaves",
    "bark": ".03 .12  .1 .5  .02 .3  .3 .7  .02  0 0  0 0 | grain stain",
    "facade": "0 1  0 .35  .01 .2  1.2 8  .1  0 0  0 .2 | storeys storeys storeys bricks planks",
    "roof": ".95 1.1  0 .6  .03 .4  .5 1.5  .02  0 0  0 .2 | bricks stripes stain",
    "rubber": "0 1  0 .1  .01 .07  .6 1.5  0  0 0  0 .5 | plain",
    "skin": "0.02 .08  .3 .6  .06 .6  .7 1  0  0 0  0 .2 | plain",
    "glow": ".05 .15  0 .4  .5 .9  .9 1  0  0 3  0 0 | plain",
    "window": ".5 .65  0 .4  .01 .6  .3 1.5  .1  0 4  .2 1 | plain stain coarse tiles",
    "cloth": "0 1  0 .8  .02 .8  .15 4  .3  0 0  0 0 | plain grain stripes checker print",
    "picture": "0 1  0 .9  .02 .8  .1 4  .5  0 .6  0 .6 | print print stain plain",
    "wall": "0 1  0 .55  .04 .9  .4 1.5  .05  0 0  0 .1 | plain plain stain stripes bricks tiles",
    "floor": "0 .2  .05 .75  .03 .7  .2 2  .05  0 0  0 .7 | planks tiles grain checker print",
    "ceiling": ".05 .2  0 .15  .1 .9  .8 1.1  0  0 0  0 0 | plain plain tiles planks",
    "ground": ".06 .32  .05 .7  .04 .45  .15 3  .06  0 0  0 .1 | coarse coarse leaves stain tiles",
    "road": ".05 .7  0 .12  .03 .35  .6 1.3  0  0 0  0 .2 | coarse stain grain",
    "card": ".06 .1  .35 .65  .12 .5  .2 1.3  0  0 0  0 0 | plain plain print",
    "car": "0 1  0 .9  .01 .8  .9 1.1  0  0 0  .4 1 | plain",
    "marking": ".1 .16  0 .3  .3 .9  .6 .9  0  0 0  0 .1 | plain stain",
    "stone": ".05 .15  0 .3  .04 .6  .25 2  .02  0 0  0 .2 | stain tiles grain bricks",
}
# Columns of a material.
COLUMNS = (
    *("red", "green", "blue", "red2", "green2", "blue2", "emission", "gloss"),
    *("cell", "aspect", "shift", "joint", "base", "w_joint", "w_cell", "w_parity", "w_noise"),
    *("noise", "noise_aspect", "ragged"),
)


def hsv(h, s, v):
    """Colours [..., 3] from hue, saturation and value in [0, 1]; hue wraps around."""
    k = (jnp.array([5.0, 3.0, 1.0]) + 6 * h[..., None]) % 6
    wheel = jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    return v[..., None] * (1 - s[..., None] * wheel)


def lerp(u, low, high):
    return low + u * (high - low)


def log_lerp(u, low, high):
    return low * (high / low) ** u


def make_tint(u, outdoor):
    """How far a scene's colours are drawn together, and to which one [3], from draws u [6].

    Real rooms are white on white and brown on brown: colour alone does not tell things apart.
    """
    share = jnp.where(u[0] < 0.3, lerp(u[1], 0.3, 0.98), 0.0) * jnp.where(outdoor, 0.6, 1.0)
    hue = jnp.where(u[2] < 0.65, lerp(u[3], 0.02, 0.14), u[3])
    return share, hsv(hue, 0.5 * u[4] ** 1.5, log_lerp(u[5], 0.06, 0.9))


def make_materials(u, roles, outdoor, tint):
    """Materials [G * PARTS + 6, len(COLUMNS)] from draws u [G + 1, 7, 16].

    Parts of one object share a material where they share a role. All colours are drawn towards one
    of the scene's own: `tint` is how far, 0 to 1, and the colour.
    """
    numbers, families = zip(*(MATERIALS[role].split("|") for role in ROLES), strict=True)
    role_rows = np.float32([row.split() for row in numbers])
    names = list(FAMILIES)
    family_of = [row.split() for row in families]
    chance = np.cumsum([[f.count(n) / len(f) for n in names] for f in family_of], 1)
    wall, floor, ceiling = (ROLES.index(r) for r in ("wall", "floor", "ceiling"))
    faces = (
        jnp.array([wall, wall, floor, ceiling, wall, wall])
        .at[2]
        .set(jnp.where(outdoor, ROLES.index("ground"), floor))
    )
    # Draws: 7 variants per object, picked by role, so that four legs look alike.
    u_parts = jnp.take_along_axis(u[:-1], (roles % 7)[..., None], 1).reshape(-1, 16)
    # Usually all walls are alike; some rooms have one of another colour.
    u_faces = u[-1][np.array([0, 0, 2, 3, 0, 0])]
    odd = u[-1, 4, 0] < 0.3
    u_faces = u_faces.at[5].set(jnp.where(odd, u[-1, 5], u_faces[5]))
    u = jnp.concatenate([u_parts, u_faces])
    role = jnp.concatenate([roles.reshape(-1), faces])

    row = jnp.asarray(role_rows)[role].T
    hue = lerp(u[:, 0], row[0], row[1])
    saturation = lerp(u[:, 1] ** 1.5, row[2], row[3])
    albedo = log_lerp(u[:, 2], row[4], row[5])
    second = jnp.clip(albedo * log_lerp(u[:, 3], row[6], row[7]), 0.005, 0.95)
    colour = hsv(hue, saturation, albedo)
    colour2 = hsv(
        hue + row[8] * (2 * u[:, 4] - 1), saturation * (0.6 + 0.6 * u[:, 5]).clip(0, 1), second
    )
    share, common = tint
    colour, colour2 = (
        jnp.exp(lerp(share, jnp.log(c + 1e-3), jnp.log(common))) for c in (colour, colour2)
    )
    emission = lerp(u[:, 6] ** 2, row[9], row[10])
    gloss = lerp(u[:, 7] ** 2, row[11], row[12])
    family = jnp.sum(u[:, 8:9] > jnp.asarray(chance)[role], -1).clip(max=len(names) - 1)
    fam = jnp.asarray(np.float32(list(FAMILIES.values())))[family].T
    columns = [
        *colour.T,
        *colour2.T,
        emission,
        gloss,
        log_lerp(u[:, 9], fam[0], fam[1]),
        log_lerp(u[:, 10], fam[2], fam[3]),
        fam[4],
        lerp(u[:, 11], fam[5], fam[6]),
        *fam[7:12],
        log_lerp(u[:, 12], fam[12], fam[13]),
        log_lerp(u[:, 13], fam[14], fam[15]),
        (role == ROLES.index("foliage")) * (0.15 + 0.3 * u[:, 14]),
    ]
    return jnp.stack(columns, -1)
