"""Rays against primitives: which surface each pixel sees, exactly how far and how turned it is.

Every primitive is one convex body: the unit cube cut by a quadric, under an affine map. A scan over
the primitives carries one number per ray, so nothing is recomputed by fusion and memory stays flat.
Pixels are kept as separate planes [H, W] per component, which is what vector units like.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from d3epth_jax.data.procedural.materials import COLUMNS
from d3epth_jax.data.procedural.scenes import Scene, apply

_FAR = 1e9
_ID_BITS = 7  # primitives are told apart by the lowest bits of the distance


class Surface(NamedTuple):
    """What the pixels see, planes [H, W]; vectors are lists of three planes."""

    depth: jax.Array  # metres along the optical axis
    position: list  # world
    normal: list  # world, of unit length
    uv: tuple  # texture coordinates, metres
    number: jax.Array  # row of scene.materials
    material: dict  # of planes, by materials.COLUMNS
    is_object: jax.Array  # False: the shell
    is_sky: jax.Array
    in_shell: list  # the same position in units of the shell: its walls are at -1 and 1


def intersect(origin, direction, quadric):
    """Interval of a ray inside a primitive, in its own axes: entry, exit, 3 slab entries, curve.

    The body is x^2 + z^2 + a y^2 + b y + c <= 0 within [-1, 1]^3 for the quadric (a, b, c); origin
    and direction are three numbers or arrays. It is hit where entry < exit.
    """
    a, b, c = quadric
    ox, oy, oz = origin
    dx, dy, dz = direction
    starts, ends = [], []
    for o, d in zip(origin, direction, strict=True):
        inverse = 1 / jnp.where(jnp.abs(d) < 1e-9, 1e-9, d)
        middle, reach = -o * inverse, jnp.abs(inverse)
        starts.append(middle - reach)
        ends.append(middle + reach)
    # A t^2 + 2 B t + C <= 0; A >= 0 because a >= 0: the body is convex.
    A = dx * dx + dz * dz + a * dy * dy + 1e-12
    B = ox * dx + oz * dz + (a * oy + 0.5 * b) * dy
    C = ox * ox + oz * oz + (a * oy + b) * oy + c
    discriminant = B * B - A * C
    root = jnp.sqrt(jnp.maximum(discriminant, 0.0))
    curved = jnp.where(discriminant > 0, (-B - root) / A, _FAR)
    entry = jnp.maximum(jnp.maximum(starts[0], starts[1]), jnp.maximum(starts[2], curved))
    end = jnp.minimum(jnp.minimum(ends[0], ends[1]), jnp.minimum(ends[2], (-B + root) / A))
    return entry, end, starts, curved


def apply_to_pixels(matrix, vector):
    """matrix [3, 3] times three arrays."""
    return [sum(matrix[i, j] * vector[j] for j in range(3)) for i in range(3)]


def local_frames(scene: Scene, origin):
    """World -> unit primitives: matrices [P, 3, 3] and the origin in each [P, 3]."""
    matrix = scene.rotation / scene.half[:, :, None]
    return matrix, apply(matrix, origin - scene.centre)


def trace(scene: Scene, origin, directions, ragged, start):
    """Nearest primitive along each ray: int32 [...], distance and id in one, or INT32_MAX.

    The bits of a positive float order like integers: the lowest bits of the distance give way to
    the primitive's number and one integer minimum keeps both.
    """
    matrix, local_origin = local_frames(scene, origin)
    count = matrix.shape[0]
    number = jnp.arange(count, dtype=jnp.int32)
    raggedness = scene.materials[:count, COLUMNS.index("ragged")]

    def step(nearest, primitive):
        number, matrix, origin, quadric, rough = primitive
        direction = apply_to_pixels(matrix, directions)
        a, b, c = quadric
        entry, end, _, _ = intersect(origin, direction, (a, b, c + rough * ragged))
        hit = (entry < end) & (entry > start)
        bits = jax.lax.bitcast_convert_type(entry, jnp.int32) & -(1 << _ID_BITS) | number
        return jnp.where(hit, jnp.minimum(nearest, bits), nearest), None

    primitives = (number, matrix, local_origin, scene.quadric, raggedness)
    nothing = jnp.full(directions[0].shape, jnp.iinfo(jnp.int32).max, jnp.int32)
    return jax.lax.scan(step, nothing, primitives, unroll=2)[0]


def _see_shell(scene: Scene, direction):
    """Depth, face (-x +x -y +y -z +z), and the ray in units of the shell, as origin and direction.

    It is seen from inside, so that the exit counts.
    """
    shell = scene.shell_rotation / scene.shell_half[:, None]
    origin = apply(shell, scene.eye - scene.shell_centre)
    direction = apply_to_pixels(shell, direction)
    exits = []
    for o, d in zip(origin, direction, strict=True):
        d = jnp.where(jnp.abs(d) < 1e-9, 1e-9, d)
        exits.append((jnp.sign(d) - o) / d)
    t = jnp.minimum(jnp.minimum(exits[0], exits[1]), exits[2])
    axis = jnp.where(exits[1] == t, 1, jnp.where(exits[0] == t, 0, 2))
    positive = jnp.where(axis == 0, direction[0], jnp.where(axis == 1, *direction[1:])) > 0
    return t, 2 * axis + positive, (origin, direction)


def see(scene: Scene, direction, ragged) -> Surface:
    """The nearest surface along rays from the eye; directions have the forward component 1."""
    count = scene.centre.shape[0]
    shell_t, face, ray_in_shell = _see_shell(scene, direction)
    nearest = trace(scene, scene.eye, direction, ragged, 0.25)
    near_t = jax.lax.bitcast_convert_type(nearest & -(1 << _ID_BITS), jnp.float32)
    is_object = (nearest < jnp.iinfo(jnp.int32).max) & (near_t < shell_t)
    number = jnp.where(is_object, nearest & ((1 << _ID_BITS) - 1), count + face)

    # Everything known about the surface is brought to its pixels, one number at a time: as one
    # gather it takes three times as long on a CPU.
    matrix, origin = local_frames(scene, scene.eye)
    geometry = [matrix.reshape(-1, 9), origin, scene.quadric, scene.half]
    geometry = jnp.pad(jnp.concatenate(geometry, 1), ((0, 6), (0, 0)), constant_values=1.0)
    known = jnp.concatenate([geometry, scene.materials], 1).T  # [18 + M, P + 6]
    known = jax.lax.map(lambda row: row.at[number].get(mode="promise_in_bounds"), known)
    material = dict(zip(COLUMNS, known[18:], strict=True))

    # The hit once more for the winner alone, with the bits that trace() gave up.
    m = known[:9].reshape(3, 3, *number.shape)
    o, (a, b, c), half = known[9:12], known[12:15], known[15:18]
    d = apply_to_pixels(m, direction)
    entry, _, starts, curved = intersect(o, d, (a, b, c + material["ragged"] * ragged))
    on_curve = curved >= entry
    entry_face = [start >= entry for start in starts]
    entry = jnp.clip(entry, near_t, near_t * (1 + 2.0 ** (_ID_BITS - 22)))
    local = [o[i] + entry * d[i] for i in range(3)]
    gradient = [local[0], a * local[1] + 0.5 * b, local[2]]
    outward = [
        jnp.where(on_curve, gradient[i], jnp.where(entry_face[i], -jnp.sign(d[i]), 0.0))
        for i in range(3)
    ]
    inward = jnp.where(face % 2 == 1, -1.0, 1.0)
    walls = [jnp.where(face // 2 == i, inward, 0.0) for i in range(3)]
    normal = [
        jnp.where(
            is_object,
            sum(m[i, j] * outward[i] for i in range(3)),
            sum(scene.shell_rotation[i, j] * walls[i] for i in range(3)),
        )
        for j in range(3)
    ]
    length = jnp.sqrt(sum(n * n for n in normal) + 1e-20)

    depth = jnp.where(is_object, entry, shell_t)
    in_shell = [o + depth * d for o, d in zip(*ray_in_shell, strict=True)]

    # Texture coordinates: the face's two axes in metres; where it is curved, an oblique projection.
    metric = [
        jnp.where(is_object, local[i] * half[i], in_shell[i] * scene.shell_half[i])
        for i in range(3)
    ]
    object_axis = jnp.where(entry_face[1], 1, jnp.where(entry_face[0], 0, 2))
    axis = jnp.where(is_object, jnp.where(on_curve, 3, object_axis), face // 2)
    u = jnp.where(axis == 0, metric[2], metric[0] + jnp.where(axis == 3, 0.7 * metric[2], 0.0))
    v = jnp.where(axis == 1, metric[2], metric[1] + jnp.where(axis == 3, 0.3 * metric[2], 0.0))

    return Surface(
        depth=depth,
        position=[scene.eye[i] + depth * direction[i] for i in range(3)],
        normal=[n / length for n in normal],
        uv=(u, v),
        number=number,
        material=material,
        is_object=is_object,
        is_sky=~is_object & scene.outdoor & (face != 2),
        in_shell=in_shell,
    )
