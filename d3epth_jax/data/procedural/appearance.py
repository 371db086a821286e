"""Looks per pixel: noise, textures, the sky, and the camera. Colours are linear until `develop`."""

import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax.data.procedural.light import Light
from d3epth_jax.data.procedural.materials import lerp


def hash_unit(x, y, seed):
    """Uniform [0, 1) from integer coordinates: multiply and xor-shift, the same on every device."""
    h = (
        x.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
        ^ y.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
        ^ seed.astype(jnp.uint32)
    )
    h = (h ^ h >> 15) * jnp.uint32(0x2C1B3C6D)
    h = (h ^ h >> 13) * jnp.uint32(0x297A2D39)
    # By way of int32: AVX2 has no conversion from unsigned integers.
    return (h >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)


def value_noise(x, y, seed):
    """Smooth noise in [0, 1): hashed lattice values, blended with a cubic."""
    i, j = jnp.floor(x), jnp.floor(y)
    s, t = x - i, y - j
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    i, j = i.astype(jnp.int32), j.astype(jnp.int32)
    low = lerp(s, hash_unit(i, j, seed), hash_unit(i + 1, j, seed))
    return lerp(t, low, lerp(s, hash_unit(i, j + 1, seed), hash_unit(i + 1, j + 1, seed)))


def fractal_noise(x, y, seed, footprint=0.0, octaves=3):
    """A few octaves around 0; octaves finer than the pixel's footprint (in cells) fade away."""

    def add(total, octave):
        gain, weight, salt = octave
        fade = weight * jnp.clip(1.5 - 2 * gain * footprint, 0.0, 1.0)
        noise = value_noise(x * gain + 17 * gain, y * gain, seed + salt)
        return total + fade * (noise - 0.5), None

    # A loop, not unrolled: a third of the code to compile, and computed once whoever reads it.
    number = np.arange(octaves)
    each = (jnp.float32(2.0**number), jnp.float32(0.6**number), jnp.uint32(number))
    return jax.lax.scan(add, jnp.zeros_like(x), each)[0]


def texture(material, u, v, footprint, seed):
    """Blend in [0, 1] between a material's colours at (u, v) metres; `footprint`: of a pixel."""
    m = material
    height = m["cell"] * m["aspect"]
    row = jnp.floor(v / height)
    across = u / m["cell"] + m["shift"] * row
    column = jnp.floor(across)
    fu, fv = across - column, v / height - row
    sharp = jnp.clip(1.5 - footprint / (0.5 * jnp.minimum(m["cell"], height)), 0.0, 1.0)
    joint = ((fu < m["joint"]) | (fv < m["joint"] / m["aspect"])).astype(jnp.float32)
    mean_joint = m["joint"] * (1 + 1 / m["aspect"])
    tone = hash_unit(column.astype(jnp.int32), row.astype(jnp.int32), seed) - 0.5
    parity = column + row - 2 * jnp.floor((column + row) / 2)
    blend = m["base"] + m["w_noise"] * fractal_noise(
        u / m["noise"], v / (m["noise"] * m["noise_aspect"]), seed, footprint / m["noise"]
    )
    blend += m["w_joint"] * lerp(sharp, mean_joint, joint)
    blend += m["w_cell"] * sharp * tone + m["w_parity"] * lerp(sharp, 0.5, parity)
    return jnp.clip(blend, 0.0, 1.0)


def sky(light: Light, direction):
    """Radiance of the sky, three [H, W], for unnormalised directions, three [H, W]."""
    x, y, z = direction
    y = y / jnp.sqrt(x * x + y * y + z * z)
    rise = jnp.sqrt(jnp.clip(y, 0.0, 1.0))
    inverse = 1 / (jnp.maximum(y, 0.0) + 0.12)
    scale = 1 / light.cloud[1]
    noise = fractal_noise(x * inverse * scale, z * inverse * scale, light.seed)
    cover = jnp.clip(light.cloud[0] * (0.4 + 2 * noise), 0.0, 1.0)
    cloud = 1.1 * jnp.max(light.sky)
    return [lerp(cover, lerp(rise, light.sky[0, c], light.sky[1, c]), cloud) for c in range(3)]


def through_haze(light: Light, radiance, distance):
    """What is left of radiance, three [H, W], after `distance` [H, W] metres of air."""
    clear = jnp.exp(-light.haze_density * distance)
    return [clear * r + (1 - clear) * haze for r, haze in zip(radiance, light.haze, strict=True)]


def sides(x, axis: int, reach=1, most: int = 1):
    """The sum of the two neighbours `reach` <= `most` away along an axis; the edge is repeated."""
    edge = jnp.pad(x, [(most, most) if i == axis else (0, 0) for i in range(x.ndim)], "edge")
    low, high = (
        jax.lax.dynamic_slice_in_dim(edge, most + step, x.shape[axis], axis)
        for step in (-reach, reach)
    )
    return low + high


def develop(light: Light, radiance):
    """Camera: radiance, three [H, W], to uint8 [H, W, 3]: exposure, lens, tone curve, sensor."""
    target, soft, gamma, saturation, red, blue, vignette, blur, noise, veil, curve = light.lens
    height, width = radiance[0].shape
    luminance = 0.3 * radiance[0] + 0.6 * radiance[1] + 0.1 * radiance[2]
    # Metering by the square of the mean root: a bright window weighs less than its radiance.
    metered = jnp.mean(jnp.sqrt(luminance + 1e-6)) ** 2
    row = jax.lax.broadcasted_iota(jnp.float32, (height, width), 0)
    column = jax.lax.broadcasted_iota(jnp.float32, (height, width), 1)
    radius2 = (2 * (row + 0.5) / height - 1) ** 2 + (2 * (column + 0.5) / width - 1) ** 2
    gain = target / metered * (1 - 0.5 * vignette * radius2)
    image = jnp.stack(radiance) * jnp.stack([red, jnp.ones_like(red), blue])[:, None, None] * gain
    grey = jnp.mean(image, 0)
    image = jnp.maximum(grey + saturation * (image - grey), 0.0)
    image = jnp.minimum(image, 4.0)
    for axis in (1, 2):  # blur in light, before the tone curve, as a lens does
        image = (image + blur * sides(image, axis)) / (1 + 2 * blur)
    image = lerp(soft, jnp.minimum(image, 1.0), 1 - jnp.exp(-1.4 * image))
    image = (image + 1e-5) ** (gamma / 2.2)
    image = lerp(curve, image, image * image * (3 - 2 * image))
    image = veil + (1 - veil) * image
    grains = jnp.stack(
        [
            hash_unit(row.astype(jnp.int32), column.astype(jnp.int32), light.seed + jnp.uint32(s))
            for s in range(4)
        ]
    )
    image += 2.5 * noise * (grains[:3] + grains[3] - 1)
    return jnp.round(255 * jnp.clip(jnp.moveaxis(image, 0, -1), 0, 1)).astype(jnp.uint8)


def framed(light: Light, image):
    """The picture in its frame, if it has one, and a mask [H, W] of the pixels within it."""
    height, width = image.shape[:2]
    across = jax.lax.broadcasted_iota(jnp.float32, (height, width), 1) + 0.5
    down = jax.lax.broadcasted_iota(jnp.float32, (height, width), 0) + 0.5
    left, right, top, bottom, grey = light.frame
    within = (across > left * width) & (across < (1 - right) * width)
    within &= (down > top * height) & (down < (1 - bottom) * height)
    return jnp.where(within[..., None], image, jnp.round(255 * grey).astype(jnp.uint8)), within
