"""Light, air, sky and lens of a scene, drawn so that brightness says nothing about distance.

Lamps stand anywhere, also near the camera; haze may be dark; the exposure is drawn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from d3epth_jax.data.procedural.materials import hsv, lerp, log_lerp


class Light(NamedTuple):
    position: jax.Array  # [3]; the sun is a point far away, so that one shadow test serves both
    colour: jax.Array  # [3]
    falloff: jax.Array  # 0 for the sun, 1 for a lamp
    ambient: jax.Array  # [2, 3] from below, from above
    fill: jax.Array  # [3] direction of a second light without shadow
    fill_colour: jax.Array
    panes: jax.Array  # [4] sun through windows: on, size, share of glass, height
    haze: jax.Array  # [3]
    haze_density: jax.Array  # 1/m
    sky: jax.Array  # [2, 3] horizon, zenith
    cloud: jax.Array  # [2] amount, size
    softness: jax.Array  # of the shadows' edges, in [0, 1]
    occlusion: jax.Array  # how much darker it is where things stand close
    lens: jax.Array  # [11], see develop
    frame: jax.Array  # [5] shares of the picture left, right, top, bottom; grey level
    seed: jax.Array  # uint32


def make_light(u, outdoor, centre, half, to_world) -> Light:
    """Light, air, sky and lens from draws u [64]; `centre`, `half`, `to_world`: the room's box."""
    night = u[0] < 0.12
    # The sun: any azimuth, low or high; indoors it shines in through windows (panes).
    azimuth, elevation = 2 * jnp.pi * u[1], jnp.radians(lerp(u[2], 10.0, 70.0))
    flat = jnp.cos(elevation)
    sun = 150.0 * jnp.stack([flat * jnp.sin(azimuth), jnp.sin(elevation), flat * jnp.cos(azimuth)])
    # A lamp: anywhere in the upper room, sometimes over the camera (near things bright, far dark).
    lamp = centre + half * jnp.stack([1.7 * u[3] - 0.85, lerp(u[4], 0.2, 0.93), 1.7 * u[5] - 0.85])
    lamp = jnp.sum(to_world * lamp, -1)
    flash = jnp.stack([0.3 * u[3] - 0.15, jnp.minimum(1.5 * half[1], 1.0 + u[4]), 0.1 * u[5]])
    lamp = jnp.where(u[6] < 0.2, flash, lamp)
    sunny = outdoor & (u[6] > 0.1) | (u[7] < 0.35)
    warm = hsv(0.04 + 0.1 * u[8], 0.5 * u[9] ** 2, jnp.float32(1.0))
    strength = jnp.where(
        sunny, jnp.where(outdoor, 4.0 * u[10] ** 1.5, 2 + 6 * u[10]), 0.5 + 5 * u[10]
    )
    strength = jnp.where(outdoor & night, 0.05 * strength, strength)

    sky_value = jnp.where(night, 0.02 + 0.05 * u[11], lerp(u[11], 0.25, 1.3))
    zenith = hsv(lerp(u[12], 0.54, 0.66), u[13] * 0.85, sky_value)
    pale = hsv(lerp(u[14], 0.0, 0.7), 0.35 * u[15] ** 2, sky_value * lerp(u[16], 0.6, 1.5))
    horizon = lerp(u[17], zenith, pale)
    up = jnp.where(
        outdoor, 0.7 * zenith + 0.3 * horizon, hsv(u[18], 0.2 * u[19], 0.15 + 0.7 * u[20])
    )
    ambient = jnp.stack([up * lerp(u[21], 0.25, 0.9), up])
    fill_azimuth, fill_rise = 2 * jnp.pi * u[48], 0.6 * u[49]
    flat = jnp.sqrt(1 - fill_rise**2)
    fill = jnp.stack([flat * jnp.sin(fill_azimuth), fill_rise, flat * jnp.cos(fill_azimuth)])
    fill_colour = hsv(u[22], 0.4 * u[23] ** 2, 0.8 * u[24] * jnp.mean(up))

    haze = jnp.where(outdoor, horizon * lerp(u[25], 0.4, 1.2), hsv(u[26], 0.3 * u[27], u[28]))
    thick = log_lerp(u[29], 0.002, 0.03)
    density = jnp.where(outdoor, thick * (u[30] < 0.75), 0.04 * u[29] * (u[30] < 0.06))
    target = log_lerp(u[31], 0.13, 0.5)
    target = jnp.where(u[32] < 0.12, target * 2.2, jnp.where(u[32] > 0.86, target * 0.2, target))
    lens = jnp.stack(
        [
            target,
            u[33],  # clipped or soft highlights
            lerp(u[34], 0.8, 1.4),  # gamma
            lerp(u[35], 0.7, 1.6) * (u[36] > 0.05),  # saturation; some pictures are grey
            lerp(u[37], 0.85, 1.18),  # red and blue balance
            lerp(u[38], 0.85, 1.18),
            0.6 * u[39] ** 2,  # vignetting
            0.4 * u[40] ** 2,  # blur: weight of the neighbours
            0.018 * u[41] ** 4,  # sensor noise
            0.08 * u[42] ** 3,  # black level, veil
            u[61],  # how S-shaped the tone curve is
        ]
    )
    # Rectified pictures and screenshots have frames, black or white, seldom grey.
    has_frame = u[53] < 0.12
    frame = jnp.where(has_frame, 0.045 * u[54] * lerp(u[55:59], 0.3, 1.0), 0.0)
    grey = jnp.where(u[59] < 0.45, 1.0, jnp.where(u[59] < 0.9, 0.0, u[60]))
    return Light(
        position=jnp.where(sunny, sun, lamp),
        colour=strength * warm,
        falloff=jnp.where(sunny, 0.0, 1.0),
        ambient=ambient * jnp.where(outdoor, 1.0, 0.6),
        fill=fill,
        fill_colour=fill_colour,
        panes=jnp.stack(
            [
                jnp.where(sunny & ~outdoor, 1.0, 0.0),
                lerp(u[43], 0.9, 2.5),
                lerp(u[44], 0.4, 0.85),
                u[45],
            ]
        ),
        haze=haze,
        haze_density=density,
        sky=jnp.stack([horizon, zenith]),
        cloud=jnp.stack([u[46] * 1.2, log_lerp(u[47], 0.15, 0.6)]),
        softness=jnp.minimum(jnp.where(outdoor, 0.36, 1.2) * u[51], 1.0),
        occlusion=u[52] ** 0.7,
        lens=lens,
        frame=jnp.append(frame, grey),
        seed=(u[50] * 2**23).astype(jnp.uint32),
    )
