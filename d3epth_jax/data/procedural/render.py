"""From scenes to pictures: shading, and the public `render`."""

import functools
import math

import jax
import jax.numpy as jnp

from d3epth_jax.data.procedural import appearance
from d3epth_jax.data.procedural.scenes import Scene, make_scene
from d3epth_jax.data.procedural.trace import apply_to_pixels, see, trace

MAX_DEPTH = 80.0  # metres; what lies farther is shown, but masked like the sky


def shade(scene: Scene, surface, blend, direction, ray):
    """Radiance, three [H, W]: a light with shadow, a fill light, ambient light, gloss, emission."""
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
    gaps = [(1 - jnp.abs(p)) * h for p, h in zip(in_shell, scene.shell_half, strict=True)]
    corner = 1.0
    for gap in gaps:
        corner *= 1 - 0.35 * jnp.exp(-jnp.abs(gap) / 0.35)
    corner = jnp.where(surface.is_object | scene.outdoor, 1.0, corner / 0.65)

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


def render_scene(scene: Scene, height: int, width: int):
    """Image uint8 [H, W, 3], depth float32 [H, W, 1] in metres along the optical axis, mask."""
    across, down = 2 * scene.tan_half_fov / width
    row = jax.lax.broadcasted_iota(jnp.float32, (height, width), 0)
    column = jax.lax.broadcasted_iota(jnp.float32, (height, width), 1)
    x, y = across * (column - (width - 1) / 2), down * ((height - 1) / 2 - row)
    # The forward component is 1, so a ray's parameter is the z-depth.
    direction = [x * right + y * up + forward for right, up, forward in scene.axes.T]
    light = scene.light
    # Foliage has ragged outlines: its radius varies with the ray, whatever the resolution.
    ragged = 2.5 * appearance.fractal_noise(x * 25, y * 25, light.seed)
    surface = see(scene, direction, ragged)

    ray = jnp.sqrt(sum(d * d for d in direction))
    facing = jnp.abs(sum(n * d for n, d in zip(surface.normal, direction, strict=True))) / ray
    footprint = jnp.maximum(across, down) * surface.depth / jnp.sqrt(facing + 0.02)
    texture_seed = light.seed + surface.number.astype(jnp.uint32) * jnp.uint32(7919)
    blend = appearance.texture(surface.material, *surface.uv, footprint, texture_seed)
    radiance = shade(scene, surface, blend, direction, ray)

    clear = jnp.exp(-light.haze_density * surface.depth * ray)
    radiance = [
        jnp.where(surface.is_sky, sky, clear * near + (1 - clear) * haze)
        for sky, near, haze in zip(
            appearance.sky(light, direction), radiance, light.haze, strict=True
        )
    ]
    mask = ~surface.is_sky & (surface.depth < MAX_DEPTH)
    return {
        "image": appearance.develop(light, radiance),
        "depth": jnp.where(mask, surface.depth, 0.0)[..., None],
        "mask": mask[..., None],
    }


@functools.partial(jax.jit, static_argnames=("height", "width", "pixel_aspects", "at_once"))
def render(
    seed,
    indices,
    *,
    height: int,
    width: int,
    pixel_aspects: tuple[float, float] = (1.0, 1.0),
    at_once: int | None = None,
):
    """Scenes by number: {"image" uint8 [B,H,W,3], "depth" float32 [B,H,W,1] m, "mask" [B,H,W,1]}.

    Depth is along the optical axis and 0 where the mask is False: sky, and all beyond MAX_DEPTH.
    A scene depends on (seed, index) alone, not on the batch, and its layout not on the resolution:
    bit for bit within one compiled program, up to rounding between programs.
    `pixel_aspects`: width over height of a scene's pixels, log-uniform between the two but for a
    share of square ones: as pictures of other shapes that are stretched to this one.
    `at_once` scenes per device are rendered together, group after group: by default few on a CPU,
    which is fastest while it stays within its cache, and many elsewhere.
    """

    def scene(index):
        return make_scene(jax.random.fold_in(jax.random.key(seed), index), pixel_aspects)

    scenes = jax.vmap(scene)(indices)
    batch = indices.shape[0]
    at_once = at_once or (4 if jax.default_backend() == "cpu" else 64)
    size = math.gcd(batch, at_once * jax.device_count())

    def group(v):  # [B, ...] -> [steps, size, ...], strided: a sharded batch stays sharded
        return jnp.swapaxes(v.reshape(size, batch // size, *v.shape[1:]), 0, 1)

    one = functools.partial(render_scene, height=height, width=width)
    out = jax.lax.map(jax.vmap(one), jax.tree.map(group, scenes))
    return jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1).reshape(batch, *v.shape[2:]), out)
