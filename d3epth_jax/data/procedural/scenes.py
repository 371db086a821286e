"""A random scene from a key: a layout is drawn, its slots are filled and turned into primitives.

Everything here is a few hundred numbers per scene; the picture's pixels come in render.py. World
axes: x right, y up, z the horizontal direction of view; the camera stands above the origin.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from d3epth_jax.data.procedural import layouts, materials, objects
from d3epth_jax.data.procedural.light import Light, make_light
from d3epth_jax.data.procedural.parts import PARTS, ROLES

NEAR = 0.4  # metres around the camera that parts must leave free
TILTED = 0.15  # share of indoor scenes whose camera is rolled eight times as much, up to MOST_ROLL
MOST_ROLL = math.radians(25)
SQUARE_PIXELS = 0.4  # share of scenes whose pixels are square wherever others are not


class Scene(NamedTuple):
    """One scene: P primitives, and the shell: the room's inside, or outdoors ground and sky."""

    eye: Float[Array, "3"]
    axes: Float[Array, "3 3"]  # rows: right, up and forward of the camera
    tan_half_fov: Float[Array, "2"]  # across the width, and across as many pixels downwards
    outdoor: Bool[Array, ""]
    centre: Float[Array, "P 3"]
    rotation: Float[Array, "P 3 3"]  # rows: the primitive's axes
    half: Float[Array, "P 3"]
    quadric: Float[Array, "P 3"]
    shell_centre: Float[Array, "3"]
    shell_rotation: Float[Array, "3 3"]
    shell_half: Float[Array, "3"]
    materials: Float[Array, "P+6 M"]  # then the shell's faces: -x +x -y +y -z +z
    light: Light


def rotation_x(angle):
    c, s, o, i = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle), jnp.ones_like(angle)
    return jnp.stack([i, o, o, o, c, -s, o, s, c], -1).reshape(*angle.shape, 3, 3)


def rotation_y(angle):
    """Turns +z towards +x."""
    c, s, o, i = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle), jnp.ones_like(angle)
    return jnp.stack([c, o, s, o, i, o, -s, o, c], -1).reshape(*angle.shape, 3, 3)


def rotation_z(angle):
    c, s, o, i = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle), jnp.ones_like(angle)
    return jnp.stack([c, -s, o, s, c, o, o, o, i], -1).reshape(*angle.shape, 3, 3)


def multiply(a, b):
    """Products [..., 3, 3], written out: a dot rounds differently by batch size and by device."""
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], -2)


def apply(matrix, vector):
    """Matrices [..., 3, 3] times vectors [..., 3]."""
    return jnp.sum(matrix * vector[..., None, :], -1)


def between(u, bounds):
    """Uniform in bounds [..., 2]."""
    return bounds[..., 0] + u * (bounds[..., 1] - bounds[..., 0])


def _place(u, table, thing, extent, half_fov, yaw, walls, ceiling, top):
    """Position [G, 3] and yaw [G] of every slot's object in the room's frame."""
    left, right, ahead, behind = walls
    a, b, y, turn = (between(u[:, i], table["range"][:, i]) for i in range(4))
    place = table["place"]
    view = jnp.stack([b * jnp.sin(a * half_fov - yaw), b * jnp.cos(a * half_fov - yaw)], -1)

    # Walls: ahead, right, left, behind; s runs along the wall, seen from inside to the right.
    wall = jnp.sum(u[:, 4:5] > jnp.array([0.5, 0.74, 0.98]), -1)
    wall_yaw = jnp.array([0.0, 0.5, -0.5, 1.0])[wall] * jnp.pi
    s_low = jnp.stack([-left, -ahead, jnp.full_like(left, 0.5), -right])[wall] + extent[:, 0]
    s_high = jnp.stack([right, jnp.full_like(left, -0.5), ahead, left])[wall] - extent[:, 0]
    s = jnp.where(s_low < s_high, s_low + a * (s_high - s_low), 0.5 * (s_low + s_high))
    gap = jnp.stack([ahead, right, left, behind])[wall] - extent[:, 2] - b
    c, d = jnp.cos(wall_yaw), jnp.sin(wall_yaw)
    on_wall = jnp.stack([s * c + gap * d, gap * c - s * d], -1)

    reach = jnp.maximum(extent[:, 0], extent[:, 2]) * 0.8
    low = jnp.stack([-left + reach, -behind + reach], -1)
    high = jnp.stack([right - reach, ahead - reach], -1)

    def kind(k):
        return (place == k)[:, None]

    plan = jnp.where(kind(layouts.PLAN), jnp.stack([a, b], -1), view)
    plan = jnp.where(low < high, jnp.clip(plan, low, high), 0.5 * (low + high))
    plan = jnp.where(kind(layouts.WALL), on_wall, plan)
    turn = jnp.where(place == layouts.WALL, wall_yaw + 0.02 * turn, turn)
    # On top of the first object, turned with it.
    c, d = jnp.cos(turn[0]), jnp.sin(turn[0])
    x, z = a * extent[0, 0] * 0.9, b * extent[0, 2] * 0.9
    on_first = plan[0] + jnp.stack([x * c + z * d, z * c - x * d], -1)
    first = place == layouts.ON_FIRST
    plan = jnp.where(first[:, None], on_first, plan)
    turn = jnp.where(first, turn[0] + turn, turn)
    y = jnp.where(first, top, y) + jnp.where(place == layouts.CEILING, ceiling, 0.0)
    return jnp.stack([plan[:, 0], y, plan[:, 1]], -1), turn


def make_scene(
    key, pixel_aspects: tuple[float, float] = (1.0, 1.0), slenderness: float = 0.75
) -> Scene:
    """The scene of one key: a pure function, nothing is rendered.

    pixel_aspects: width over height of a pixel, log-uniform between the two; slenderness: height
    over width of the picture, counted in pixels.
    """
    table = {k: jnp.asarray(v) for k, v in layouts.tables().items()}
    parts = {k: jnp.asarray(v) for k, v in objects.tables().items()}
    slots, things = table["choice"].shape[1:]
    # One draw for everything: the generator is most of what a small program compiles.
    shapes = ((20,), (slots, 12), (slots, PARTS, 8), (slots + 1, 7, 16), (64,))
    sizes = [math.prod(shape) for shape in shapes]
    flat = jnp.split(jax.random.uniform(key, (sum(sizes),)), np.cumsum(sizes)[:-1].tolist())
    u, u_slots, u_parts, u_materials, u_light = (
        f.reshape(shape) for f, shape in zip(flat, shapes, strict=True)
    )
    kind = jnp.sum(u[0] > table["weight"][:-1])
    table = {k: v[kind] for k, v in table.items()}

    fov, pitch, yaw, roll = (between(u[1 + i], table["angle"][i]) for i in range(4))
    roll = jnp.where((u[13] < TILTED) & ~table["outdoor"], 8 * roll, roll)
    roll = jnp.clip(roll, -MOST_ROLL, MOST_ROLL)
    tint = materials.make_tint(u[14:20], table["outdoor"])
    low, high = table["length"][:, 0], table["length"][:, 1]
    lengths = low * (high / low) ** u[5:11]  # log-uniform
    narrowest, widest = pixel_aspects
    aspect = narrowest * (widest / narrowest) ** u[12]
    aspect = jnp.where(u[11] < SQUARE_PIXELS, 1.0, aspect)
    # The longer side of the picture, upright or not, has the layout's field of view.
    across = jnp.minimum(1.0, aspect / slenderness)
    tan_half_fov = jnp.tan(fov / 2) * jnp.stack([across, across / aspect])
    height, *walls, ceiling = lengths
    height = jnp.minimum(height, ceiling - 0.25)
    eye = jnp.stack([jnp.zeros_like(height), height, jnp.zeros_like(height)])
    axes = multiply(rotation_x(-pitch), rotation_z(roll)).T

    # Objects.
    u = u_slots
    thing = jnp.sum(u[:, :1] > table["choice"], -1).clip(max=things - 1)
    part = {k: v[thing] for k, v in parts.items()}
    scale_low, scale_high, stretch, scatter, jitter, tumble = part["spread"].T
    scale = scale_low * (scale_high / scale_low) ** u[:, 1]
    scale = scale[:, None] * (1 + stretch[:, None] * (2 * u[:, 2:5] - 1))  # [G, 3]
    extent = part["extent"] * scale
    position, turn = _place(
        u[:, 5:10],
        table,
        thing,
        extent,
        jnp.arctan(tan_half_fov[0]),
        yaw,
        walls,
        ceiling,
        part["top"][0] * scale[0, 1],
    )

    # Parts, in the object's own axes: centre c, rotation own axes -> object.
    u = 2 * u_parts - 1

    def spread(x):  # over the parts of an object
        return x[:, None]

    wander = spread(scatter)[..., None] * scale[:, None] * u[..., :3] * jnp.array([1.0, 0.0, 1.0])
    size = 1 + spread(jitter)[..., None] * u[..., 3:4] * jnp.ones(3)
    twist = spread(tumble)[..., None] * u[..., 4:7]
    pitched = multiply(
        rotation_x(part["angles"][..., 0] + twist[..., 0]),
        rotation_z(part["angles"][..., 1] + twist[..., 2]),
    )
    turned = twist[..., 1] + jnp.where(spread(scatter) > 0, jnp.pi * u[..., 7], 0.0)
    own = multiply(rotation_y(turned), pitched)  # [G, K, 3, 3], columns: the part's axes
    stretch_own = apply(jnp.swapaxes(own, -1, -2) ** 2, scale[:, None])
    half = part["half"] * size * stretch_own
    centre = part["centre"] * scale[:, None] + wander
    centre = centre.at[..., 1].multiply(jnp.where(spread(scatter) > 0, size[..., 1], 1.0))

    # Object -> frame -> world.
    frame_to_world = rotation_y(yaw)
    to_world = rotation_y(turn + yaw)[:, None]
    place = apply(frame_to_world, position)
    centre = apply(to_world, centre) + place[:, None]
    centre = centre.reshape(-1, 3)
    own = multiply(to_world, own)
    rotation = jnp.swapaxes(own, -1, -2).reshape(-1, 3, 3)
    half = half.reshape(-1, 3)

    # Parts that would touch the camera, and unused slots, are put out of the way.
    local = apply(rotation, eye - centre)
    distance = jnp.linalg.norm(jnp.maximum(jnp.abs(local) - half, 0.0), axis=-1)
    near = jnp.where(table["outdoor"], 2 * NEAR, NEAR)
    near = jnp.where(part["role"].reshape(-1) == ROLES.index("foliage"), 4 * NEAR, near)
    keep = part["used"].reshape(-1) & (distance > near)
    centre = jnp.where(keep[:, None], centre, jnp.array([0.0, -1e3, 0.0]))
    half = jnp.where(keep[:, None], half, 1e-3)

    left, right, ahead, behind = walls
    shell_half = jnp.stack([left + right, ceiling, ahead + behind]) / 2
    shell_centre = jnp.stack([(right - left) / 2, ceiling / 2, (ahead - behind) / 2])
    outdoor = table["outdoor"]
    light = make_light(u_light, outdoor, shell_centre, shell_half, frame_to_world)
    return Scene(
        eye=eye,
        axes=axes,
        tan_half_fov=tan_half_fov,
        outdoor=outdoor,
        centre=centre,
        rotation=rotation,
        half=half,
        quadric=part["quadric"].reshape(-1, 3),
        shell_centre=apply(frame_to_world, shell_centre),
        shell_rotation=frame_to_world.T,
        shell_half=shell_half,
        materials=materials.make_materials(u_materials, part["role"], outdoor, tint),
        light=light,
    )
