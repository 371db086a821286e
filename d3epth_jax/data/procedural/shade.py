"""Light on surfaces: shadows with soft edges, and corners that less light reaches."""

import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax.data.procedural.appearance import sides
from d3epth_jax.data.procedural.scenes import Scene
from d3epth_jax.data.procedural.trace import Surface, apply_to_pixels, trace

# Where `open_to_the_air` looks for what stands around: eight directions, three distances, in 128ths
# of the picture's width, and how far away a thing still counts.
AROUND = [
    (distance * np.sin(angle), distance * np.cos(angle))
    for distance in (2, 5, 11)
    for angle in np.arange(8) * np.pi / 4
]
REACH = 0.9  # metres


def soften(lit, softness):
    """Light that reaches a surface [H, W], its edges as blurred as `softness` in [0, 1] says."""

    step = max(1, lit.shape[1] // 128)

    def box(x, reach):
        for axis in (0, 1):
            x = (x + sides(x, axis, reach, most=3 * step)) / 3
        return x, x

    # A loop, so that what is lit is not found anew for every neighbour: a quarter of all time.
    little, much = jax.lax.scan(box, lit, np.int32([step, 3 * step]))[1]
    share = 2 * softness
    return jnp.where(
        share < 1, lit + share * (little - lit), little + (share - 1) * (much - little)
    )


def open_to_the_air(surface: Surface, strength):
    """Share of ambient light [H, W] that is left beside what stands near: 1 in the open.

    From the visible surfaces alone: a neighbouring pixel's surface that rises above this one's
    tangent plane, and is near, takes light away (screen-space ambient occlusion).
    """
    height, width = surface.depth.shape
    offsets = np.rint(np.array(AROUND) * width / 128).astype(np.int32)
    margin = int(np.abs(offsets).max())
    position = jnp.stack(surface.position)
    padded = jnp.pad(position, ((0, 0), (margin, margin), (margin, margin)), "edge")

    def add(taken, offset):
        start = (0, margin + offset[0], margin + offset[1])
        there = jax.lax.dynamic_slice(padded, start, position.shape) - position
        distance2 = jnp.sum(there * there, 0) + 1e-4
        rise = sum(t * n for t, n in zip(there, surface.normal, strict=True))
        rise = rise * jax.lax.rsqrt(distance2)
        return taken + jnp.maximum(rise - 0.1, 0) * jnp.maximum(1 - distance2 / REACH**2, 0), None

    # A loop, so that the surface is not traced anew for every neighbour.
    taken = jax.lax.scan(add, jnp.zeros((height, width)), offsets)[0]
    return jnp.exp(-0.45 * strength * taken)


def shade(scene: Scene, surface, blend, direction, ray):
    """Radiance, three [H, W]: a light with shadow, a fill light, ambient light, gloss, emission.

    direction: of the rays, three [H, W] with the forward component 1; ray: their lengths.
    """
    light, normal, material = scene.light, surface.normal, surface.material
    in_shell = surface.in_shell
    # Shadow rays start at the light, so that its position in each primitive is one number.
    lifted = [surface.position[i] + 0.01 * normal[i] for i in range(3)]
    from_light = [lifted[i] - light.position[i] for i in range(3)]
    distance2 = sum(d * d for d in from_light)
    distance = jnp.sqrt(distance2)
    shadow = trace(scene, light.position, from_light, 0.0, 1e-3)
    reached = jax.lax.bitcast_convert_type(shadow, jnp.float32)
    lit = ~(reached < 1 - 0.02 / distance)  # nothing hit reads as NaN

    # The sun enters rooms through panes in the walls: where does its ray pass the shell?
    to_sun = apply_to_pixels(scene.shell_rotation, [-d for d in from_light])
    leave = [
        (jnp.sign(d) - p) * h / jnp.where(jnp.abs(d) < 1e-9, 1e-9, d)
        for d, p, h in zip(to_sun, in_shell, scene.shell_half, strict=True)
    ]
    t = jnp.minimum(leave[0], leave[2])
    along = jnp.where(
        leave[0] < leave[2],
        in_shell[2] * scene.shell_half[2] + t * to_sun[2],
        in_shell[0] * scene.shell_half[0] + t * to_sun[0],
    )
    rise = in_shell[1] * scene.shell_half[1] + t * to_sun[1]
    on, size, glass, high = light.panes
    phase = along / size - jnp.floor(along / size)
    bar = jnp.abs(phase - 0.5 * glass) < 0.03
    top = scene.shell_half[1]
    pane = (phase < glass) & ~bar & (rise < 0.8 * top) & (rise > -top * (0.1 + 0.85 * high))
    lit = soften((lit & (pane | (on < 0.5))).astype(jnp.float32), light.softness)

    inverse = 1 / distance
    cosine = -sum(n * d for n, d in zip(normal, from_light, strict=True)) * inverse
    falloff = jnp.where(light.falloff > 0, 2.5 / (0.5 + distance2), 1.0)
    key = lit * jnp.maximum(cosine, 0.0) * falloff
    fill = 0.5 + 0.5 * sum(n * f for n, f in zip(normal, light.fill, strict=True))
    # Gloss: Blinn's half vector between the light and the eye.
    middle = [-from_light[i] * inverse - direction[i] / ray for i in range(3)]
    across = sum(m * n for m, n in zip(middle, normal, strict=True))
    across = across / jnp.sqrt(sum(m * m for m in middle) + 1e-9)
    shine = lit * material["gloss"] * jnp.maximum(across, 0.0) ** 40 * falloff
    # Corners of rooms are darker: less of the room is seen from there.
    gaps = [(1 - jnp.abs(p)) * h for p, h in zip(in_shell, scene.shell_half, strict=True)]
    corner = 1.0
    for gap in gaps:
        corner *= 1 - 0.35 * jnp.exp(-jnp.abs(gap) / 0.35)
    corner = jnp.where(surface.is_object | scene.outdoor, 1.0, corner / 0.65)
    corner *= open_to_the_air(surface, light.occlusion)

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
