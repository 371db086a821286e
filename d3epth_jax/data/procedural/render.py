"""From scenes to pictures: the camera, and the public `render`."""

import functools
import math

import jax
import jax.numpy as jnp

from d3epth_jax.data.procedural import appearance
from d3epth_jax.data.procedural.scenes import Scene, make_scene
from d3epth_jax.data.procedural.shade import shade
from d3epth_jax.data.procedural.trace import see

MAX_DEPTH = 80.0  # metres; what lies farther is shown, but masked like the sky


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

    radiance = appearance.through_haze(light, radiance, surface.depth * ray)
    sky = appearance.sky(light, direction)
    radiance = [jnp.where(surface.is_sky, s, r) for s, r in zip(sky, radiance, strict=True)]
    image, pictured = appearance.framed(light, appearance.develop(light, radiance))
    mask = ~surface.is_sky & (surface.depth < MAX_DEPTH) & pictured
    return {
        "image": image,
        "depth": jnp.where(mask, surface.depth, 0.0)[..., None],
        "mask": mask[..., None],
    }


@functools.partial(jax.jit, static_argnames=("height", "width", "pixel_aspects"))
def render(
    seed,
    indices,
    *,
    height: int,
    width: int,
    pixel_aspects: tuple[float, float] = (1.0, 1.0),
):
    """Scenes by number: {"image" uint8 [B,H,W,3], "depth" float32 [B,H,W,1] m, "mask" [B,H,W,1]}.

    Depth is along the optical axis and 0 where the mask is False: sky, all beyond MAX_DEPTH, and
    the frame that some pictures have, as rectified ones do.
    A scene depends on (seed, index) and the picture's shape alone, not on the batch, and its layout
    not on the resolution: bit for bit within one compiled program, up to rounding between programs.
    `pixel_aspects`: width over height of a scene's pixels, log-uniform between the two but for a
    share of square ones: as pictures of other shapes that are stretched to this one.
    Group after group of scenes is rendered, few per device on a CPU, which is fastest while it
    stays within its cache, and many elsewhere.
    """

    keys = jax.random.key(seed)

    def scene(index):
        return make_scene(jax.random.fold_in(keys, index), pixel_aspects, height / width)

    scenes = jax.vmap(scene)(indices)
    batch = indices.shape[0]
    at_once = 4 if jax.default_backend() == "cpu" else 64
    size = math.gcd(batch, at_once * jax.device_count())

    def group(v):  # [B, ...] -> [steps, size, ...], strided: a sharded batch stays sharded
        return jnp.swapaxes(v.reshape(size, batch // size, *v.shape[1:]), 0, 1)

    one = functools.partial(render_scene, height=height, width=width)
    out = jax.lax.map(jax.vmap(one), jax.tree.map(group, scenes))
    return jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1).reshape(batch, *v.shape[2:]), out)
