"""Rays against a scene's primitives, and shading: image, exact z-depth and mask.

Every primitive is one convex body: the unit cube cut by a quadric, under an affine map. A scan over
the primitives carries one number per ray, so nothing is recomputed by fusion and memory stays flat.
"""

import functools
import math

import jax
import jax.numpy as jnp

from d3epth_jax.data.procedural import appearance
from d3epth_jax.data.procedural.materials import COLUMNS
from d3epth_jax.data.procedural.scenes import Scene, apply, make_scene

MAX_DEPTH = 80.0  # metres; what lies farther is shown, but masked like the sky
_FAR = 1e9
_ID_BITS = 7  # primitives are told apart by the lowest bits of the distance


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


def _apply(matrix, vector):
    """matrix [3, 3] times three arrays."""
    return [sum(matrix[i, j] * vector[j] for j in range(3)) for i in range(3)]


def _local(scene: Scene, origin):
    """World -> unit primitives: matrices [P, 3, 3] and the origin in each [P, 3]."""
    matrix = scene.rotation / scene.half[:, :, None]
    return matrix, apply(matrix, origin - scene.centre)


def trace(scene: Scene, origin, directions, ragged, start):
    """Nearest primitive along each ray: int32 [...], distance and id in one, or INT32_MAX.

    The bits of a positive float order like integers: the lowest bits of the distance give way to
    the primitive's number and one integer minimum keeps both.
    """
    matrix, local_origin = _local(scene, origin)
    count = matrix.shape[0]
    number = jnp.arange(count, dtype=jnp.int32)
    raggedness = scene.materials[:count, COLUMNS.index("ragged")]

    def step(nearest, primitive):
        number, matrix, origin, quadric, rough = primitive
        direction = _apply(matrix, directions)
        a, b, c = quadric
        entry, end, _, _ = intersect(origin, direction, (a, b, c + rough * ragged))
        hit = (entry < end) & (entry > start)
        bits = jax.lax.bitcast_convert_type(entry, jnp.int32) & -(1 << _ID_BITS) | number
        return jnp.where(hit, jnp.minimum(nearest, bits), nearest), None

    primitives = (number, matrix, local_origin, scene.quadric, raggedness)
    nothing = jnp.full(directions[0].shape, jnp.iinfo(jnp.int32).max, jnp.int32)
    return jax.lax.scan(step, nothing, primitives, unroll=2)[0]


def render_scene(scene: Scene, height: int, width: int):
    """Image uint8 [H, W, 3], depth float32 [H, W, 1] in metres along the optical axis, mask."""
    count = scene.centre.shape[0]
    pixel = 2 * scene.tan_half_fov / width
    row = jax.lax.broadcasted_iota(jnp.float32, (height, width), 0)
    column = jax.lax.broadcasted_iota(jnp.float32, (height, width), 1)
    x, y = pixel * (column - (width - 1) / 2), pixel * ((height - 1) / 2 - row)
    # The forward component is 1, so a ray's parameter is the z-depth.
    direction = [x * r + y * u + f for r, u, f in scene.axes.T]
    seed = scene.light.seed
    ragged = 2.5 * appearance.fractal_noise(x * 25, y * 25, seed)

    # Shell: from inside, so the exit counts.
    shell = scene.shell_rotation / scene.shell_half[:, None]
    shell_origin = apply(shell, scene.eye - scene.shell_centre)
    shell_direction = _apply(shell, direction)
    exits = []
    for o, d in zip(shell_origin, shell_direction, strict=True):
        d = jnp.where(jnp.abs(d) < 1e-9, 1e-9, d)
        exits.append((jnp.sign(d) - o) / d)
    shell_t = jnp.minimum(jnp.minimum(exits[0], exits[1]), exits[2])
    face_axis = jnp.where(exits[1] == shell_t, 1, jnp.where(exits[0] == shell_t, 0, 2))
    positive = jnp.where(
        face_axis == 0,
        shell_direction[0] > 0,
        jnp.where(face_axis == 1, shell_direction[1] > 0, shell_direction[2] > 0),
    )

    nearest = trace(scene, scene.eye, direction, ragged, 0.25)
    number = nearest & ((1 << _ID_BITS) - 1)
    near_t = jax.lax.bitcast_convert_type(nearest & -(1 << _ID_BITS), jnp.float32)
    is_object = (nearest < jnp.iinfo(jnp.int32).max) & (near_t < shell_t)
    number = jnp.where(is_object, number, count + 2 * face_axis + positive)

    # One gather brings everything known about the surface to its pixels.
    matrix, local_origin = _local(scene, scene.eye)
    geometry = [matrix.reshape(-1, 9), local_origin, scene.quadric, scene.half]
    geometry = jnp.pad(jnp.concatenate(geometry, 1), ((0, 6), (0, 0)), constant_values=1.0)
    known = jnp.concatenate([geometry, scene.materials], 1).T  # [18 + M, P + 6]
    known = jnp.take(known, number, axis=1)
    material = dict(zip(COLUMNS, known[18:], strict=True))

    # The exact hit, once more for the winner alone.
    m = known[:9].reshape(3, 3, height, width)
    o, (a, b, c), half = known[9:12], known[12:15], known[15:18]
    d = _apply(m, direction)
    entry, _, starts, curved = intersect(o, d, (a, b, c + material["ragged"] * ragged))
    local = [o[i] + entry * d[i] for i in range(3)]
    on_curve = curved >= entry
    gradient = [local[0], a * local[1] + 0.5 * b, local[2]]
    normal = [
        jnp.where(on_curve, gradient[i], jnp.where(starts[i] >= entry, -jnp.sign(d[i]), 0.0))
        for i in range(3)
    ]
    normal = [sum(m[i, j] * normal[i] for i in range(3)) for j in range(3)]  # to world
    metric = [local[i] * half[i] for i in range(3)]
    face = [starts[i] >= entry for i in range(3)]

    t = jnp.where(is_object, entry, shell_t)
    hit = [scene.eye[i] + t * direction[i] for i in range(3)]
    shell_local = [shell_origin[i] + t * shell_direction[i] for i in range(3)]
    inward = jnp.where(positive, -1.0, 1.0)
    shell_normal = [
        sum(jnp.where(face_axis == i, inward, 0.0) * scene.shell_rotation[i, j] for i in range(3))
        for j in range(3)
    ]
    normal = [jnp.where(is_object, n, s) for n, s in zip(normal, shell_normal, strict=True)]
    length = jnp.sqrt(sum(n * n for n in normal) + 1e-20)
    normal = [n / length for n in normal]

    # Texture coordinates in metres: the face's two axes; an oblique projection where it is curved.
    metric = [
        jnp.where(is_object, q, s * h)
        for q, s, h in zip(metric, shell_local, scene.shell_half, strict=True)
    ]
    axis = jnp.where(
        is_object,
        jnp.where(on_curve, 3, jnp.where(face[1], 1, jnp.where(face[0], 0, 2))),
        face_axis,
    )
    u = jnp.where(axis == 0, metric[2], metric[0] + jnp.where(axis == 3, 0.7 * metric[2], 0.0))
    v = jnp.where(axis == 1, metric[2], metric[1] + jnp.where(axis == 3, 0.3 * metric[2], 0.0))
    ray = jnp.sqrt(sum(d * d for d in direction))
    facing = jnp.abs(sum(n * d for n, d in zip(normal, direction, strict=True))) / ray
    footprint = pixel * t / jnp.sqrt(facing + 0.02)
    texture_seed = seed + number.astype(jnp.uint32) * jnp.uint32(7919)
    blend = appearance.texture(material, u, v, footprint, texture_seed)

    radiance = _shade(scene, material, blend, hit, normal, direction, ray, shell_local, is_object)
    haze = jnp.exp(-scene.light.haze_density * t * ray)
    is_sky = ~is_object & scene.outdoor & ((face_axis != 1) | positive)
    background = appearance.sky(scene.light, direction)
    radiance = [
        jnp.where(is_sky, background[i], haze * radiance[i] + (1 - haze) * scene.light.haze[i])
        for i in range(3)
    ]
    mask = ~is_sky & (t < MAX_DEPTH)
    depth = jnp.where(mask, t, 0.0)
    return {
        "image": appearance.develop(scene.light, radiance),
        "depth": depth[..., None],
        "mask": mask[..., None],
    }


def _shade(scene, material, blend, hit, normal, direction, ray, shell_local, is_object):
    """Radiance, three [H, W]: a light with shadow, a fill light, ambient light, gloss, emission."""
    light = scene.light
    # Shadow rays start at the light, so that its position in each primitive is one number.
    lifted = [hit[i] + 0.01 * normal[i] for i in range(3)]
    from_light = [lifted[i] - light.position[i] for i in range(3)]
    distance2 = sum(d * d for d in from_light)
    distance = jnp.sqrt(distance2)
    shadow = trace(scene, light.position, from_light, 0.0, 1e-3)
    reached = jax.lax.bitcast_convert_type(shadow, jnp.float32)
    lit = ~(reached < 1 - 0.02 / distance)  # nothing hit reads as NaN

    # The sun enters rooms through panes in the walls: where does its ray pass the shell?
    to_sun = _apply(scene.shell_rotation, [-d for d in from_light])
    leave = [
        (jnp.sign(d) - p) * h / jnp.where(jnp.abs(d) < 1e-9, 1e-9, d)
        for d, p, h in zip(to_sun, shell_local, scene.shell_half, strict=True)
    ]
    t = jnp.minimum(leave[0], leave[2])
    along = jnp.where(
        leave[0] < leave[2],
        shell_local[2] * scene.shell_half[2] + t * to_sun[2],
        shell_local[0] * scene.shell_half[0] + t * to_sun[0],
    )
    rise = shell_local[1] * scene.shell_half[1] + t * to_sun[1]
    on, size, glass, high = light.panes
    phase = along / size - jnp.floor(along / size)
    bar = jnp.abs(phase - 0.5 * glass) < 0.03
    top = scene.shell_half[1]
    pane = (phase < glass) & ~bar & (rise < 0.8 * top) & (rise > -top * (0.1 + 0.85 * high))
    lit &= pane | (on < 0.5)

    inverse = 1 / distance
    cosine = -sum(n * d for n, d in zip(normal, from_light, strict=True)) * inverse
    falloff = jnp.where(light.falloff > 0, 2.5 / (0.5 + distance2), 1.0)
    key = jnp.where(lit, jnp.maximum(cosine, 0.0) * falloff, 0.0)
    fill = 0.5 + 0.5 * sum(n * f for n, f in zip(normal, light.fill, strict=True))
    # Gloss: Blinn's half vector between the light and the eye.
    middle = [-from_light[i] * inverse - direction[i] / ray for i in range(3)]
    across = sum(m * n for m, n in zip(middle, normal, strict=True))
    across = across / jnp.sqrt(sum(m * m for m in middle) + 1e-9)
    shine = jnp.where(lit, material["gloss"] * jnp.maximum(across, 0.0) ** 40 * falloff, 0.0)
    # Corners of rooms are darker: less of the room is seen from there.
    gaps = [(1 - jnp.abs(p)) * h for p, h in zip(shell_local, scene.shell_half, strict=True)]
    corner = 1.0
    for gap in gaps:
        corner *= 1 - 0.35 * jnp.exp(-jnp.abs(gap) / 0.35)
    corner = jnp.where(is_object | scene.outdoor, 1.0, corner / 0.65)

    # A scan over the colours, because XLA would otherwise compute all of the above anew for each.
    def colour(_, x):
        first, second, below, above, key_colour, fill_colour = x
        albedo = first + blend * (second - first)
        around = below + upness * (above - below)
        received = corner * (around + fill * fill_colour) + key * key_colour
        return None, albedo * (received + emission) + shine * key_colour

    upness, emission, shine = 0.5 + 0.5 * normal[1], material["emission"], 0.5 * shine
    first = jnp.stack([material[c] for c in ("red", "green", "blue")])
    second = jnp.stack([material[c] for c in ("red2", "green2", "blue2")])
    return jax.lax.scan(
        colour, None, (first, second, *light.ambient, light.colour, light.fill_colour)
    )[1]


@functools.partial(jax.jit, static_argnames=("height", "width", "at_once"))
def render(seed, indices, *, height: int, width: int, at_once: int | None = None):
    """Scenes by number: {"image" uint8 [B,H,W,3], "depth" float32 [B,H,W,1] m, "mask" [B,H,W,1]}.

    Depth is along the optical axis and 0 where the mask is False: sky, and all beyond MAX_DEPTH.
    A scene depends on (seed, index) alone, not on the batch, and its layout not on the resolution:
    bit for bit within one compiled program, up to rounding between programs.
    `at_once` scenes per device are rendered together, group after group: by default few on a CPU,
    which is fastest while it stays within its cache, and many elsewhere.
    """
    scenes = jax.vmap(lambda i: make_scene(jax.random.fold_in(jax.random.key(seed), i)))(indices)
    batch = indices.shape[0]
    at_once = at_once or (4 if jax.default_backend() == "cpu" else 64)
    size = math.gcd(batch, at_once * jax.device_count())

    def group(v):  # [B, ...] -> [steps, size, ...], strided: a sharded batch stays sharded
        return jnp.swapaxes(v.reshape(size, batch // size, *v.shape[1:]), 0, 1)

    one = functools.partial(render_scene, height=height, width=width)
    out = jax.lax.map(jax.vmap(one), jax.tree.map(group, scenes))
    return jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1).reshape(batch, *v.shape[2:]), out)
