"""Light, air and camera of the embedded scenes, held against what can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d3epth_jax.data.procedural import appearance, materials, objects, shade
from d3epth_jax.data.procedural.trace import see
from tests.test_procedural import one_box, rays


def pictured(scene):
    """What 96x128 pixels show of a scene without textures: surface, green radiance [H, W]."""
    direction = rays(96, 128)
    surface = see(scene, direction, 0.0)
    ray = jnp.sqrt(sum(d * d for d in direction))
    radiance = shade.shade(scene, surface, jnp.zeros_like(ray), direction, ray)
    return surface, np.asarray(radiance[1])


def test_a_box_casts_its_shadow_and_faces_are_lit_by_the_cosine():
    scene = one_box(6.0, half=(1.0, 1.0, 1.0), height=2.0)  # from 1 to 3 above the ground
    light = jax.tree.map(jnp.zeros_like, scene.light)
    far = 1000 * jnp.array([-0.6, 0.8, 0.0])  # a sun at the left, 53 degrees high
    light = light._replace(position=far, colour=jnp.ones(3))
    material = jnp.zeros_like(scene.materials)
    scene = scene._replace(light=light, materials=material.at[:, :6].set(1.0))
    surface, radiance = pictured(scene)
    x, y, z = (np.asarray(p) for p in surface.position)
    ground = np.asarray(surface.normal[1] > 0.99) & ~np.asarray(surface.is_object)
    # A ray to the sun from (x, 0, z) passes heights 1 to 3 between x - 0.75 and x - 2.25.
    shadow = (x - 2.25 < 1) & (x - 0.75 > -1) & (z > 5) & (z < 7)
    edge = np.minimum(abs(x - 3.25), abs(x + 0.25)) < 0.1
    edge |= np.minimum(abs(z - 5), abs(z - 7)) < 0.1
    assert (ground & shadow & ~edge).sum() > 50
    np.testing.assert_allclose(radiance[ground & shadow & ~edge], 0.0, atol=1e-6)
    lit = ground & ~shadow & ~edge & (z < 30)
    distance = np.sqrt((x + 600) ** 2 + (y - 800) ** 2 + z**2)
    np.testing.assert_allclose(radiance[lit], (800 / distance)[lit], rtol=1e-3)  # about 0.8
    front = np.asarray(surface.is_object) & (np.asarray(surface.normal[2]) < -0.99)
    np.testing.assert_allclose(radiance[front], (z / distance)[front], rtol=1e-2)  # beside it


@pytest.mark.parametrize(
    ("softness", "expected"),
    [(0.0, [0, 0, 0, 0, 1, 1, 1, 1]), (0.5, [0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1])],
)
def test_shadows_edges_by_hand(softness, expected):
    lit = np.tile(np.repeat(np.float32([0, 1]), 4), (3, 1))
    np.testing.assert_allclose(shade.soften(lit, softness), [expected] * 3, atol=1e-6)


def test_the_softest_shadow_keeps_its_amount_of_light():
    lit = np.tile(np.repeat(np.float32([0, 1]), 16), (9, 1))
    soft = np.asarray(shade.soften(lit, 1.0))
    assert soft.mean() == pytest.approx(0.5, abs=1e-6)
    assert (np.diff(soft, axis=1) >= -1e-6).all() and np.diff(soft, axis=1).max() < 0.2


def test_corners_are_darker_than_open_floor_and_by_how_much_is_drawn():
    def share(strength):  # of ambient light on a floor before a wall 3 ahead
        scene = one_box(4.0, half=(50.0, 50.0, 1.0), height=1.0)
        surface = see(scene, rays(96, 128), 0.0)
        normal = np.stack(surface.normal)
        floor = np.isclose(normal[1], 1.0, atol=1e-3)
        left = np.asarray(shade.open_to_the_air(surface, strength))
        return left, floor, np.asarray(surface.depth)

    left, floor, depth = share(1.0)
    corner, near = left[floor & (depth > 2.8)], left[floor & (depth < 1.6)]
    assert floor.any() and (~floor).any()
    assert near.min() > 0.99 and corner.max() < 0.9
    assert ((left > 0) & (left <= 1)).all()
    np.testing.assert_allclose(share(0.5)[0], np.sqrt(left), rtol=1e-5)


def test_a_tint_draws_all_colours_together():
    u = jax.random.uniform(jax.random.key(0), (3, 7, 16))
    roles = jnp.zeros((2, objects.PARTS), int)
    common = jnp.array([0.5, 0.25, 0.125])

    def colours(share):
        table = materials.make_materials(u, roles, jnp.bool_(False), (share, common))
        return np.asarray(table[:, :6]).reshape(-1, 3)

    plain, half, whole = (np.log(colours(share) + 1e-3) for share in (0.0, 0.5, 1.0))
    assert np.ptp(plain, axis=0).min() > 1
    np.testing.assert_allclose(whole, np.log(np.tile(common, (len(whole), 1)) + 1e-3), atol=1e-4)
    assert (np.std(half, 0) < 0.6 * np.std(plain, 0)).all()


def test_the_sun_shines_through_panes_where_its_rays_pass_the_wall():
    """A room of 4 m by 6 m, 3 m high; the sun at the left, 53 degrees high."""
    scene = one_box(0.0, half=(1e-3, 1e-3, 1e-3), height=1.5)
    light = jax.tree.map(jnp.zeros_like, scene.light)
    sun = 1000 * jnp.array([-0.6, 0.8, 0.0])
    panes = jnp.array([1.0, 1.0, 0.5, 0.0])  # every metre one of half a metre with a bar amid
    scene = scene._replace(
        outdoor=jnp.bool_(False),
        centre=scene.centre.at[5].set(jnp.array([0.0, -1e3, 0.0])),
        shell_centre=jnp.array([0.0, 1.5, 0.0]),
        shell_half=jnp.array([2.0, 1.5, 3.0]),
        materials=jnp.zeros_like(scene.materials).at[:, :6].set(1.0),
        light=light._replace(position=sun, colour=jnp.ones(3), panes=panes),
    )
    surface, radiance = pictured(scene)
    x, _, z = (np.asarray(p) for p in surface.position)
    floor = np.asarray(surface.normal[1] > 0.99)
    # Glass from 1.35 m to 2.7 m above the floor, which the sun's rays pass before (x, z).
    passed, phase = (x + 2) * 0.8 / 0.6, z % 1
    bar = (phase > 0.22) & (phase < 0.28)
    glass = (passed > 1.35) & (passed < 2.7) & (phase < 0.5) & ~bar
    edge = np.minimum(abs(passed - 1.35), abs(passed - 2.7)) < 0.03
    edge |= np.min([abs(phase - p) for p in (0, 0.22, 0.28, 0.5, 1)], 0) < 0.02
    assert (floor & glass & ~edge).sum() > 100 and (floor & ~glass & ~edge).sum() > 100
    np.testing.assert_array_equal(radiance[floor & ~edge] > 0.1, glass[floor & ~edge])


def test_haze_takes_half_of_the_light_after_its_half_length():
    light = jax.tree.map(jnp.zeros_like, one_box(5.0).light)
    light = light._replace(haze=jnp.array([0.0, 0.5, 1.0]), haze_density=jnp.log(2.0) / 10)
    distance = jnp.array([[0.0, 10.0, 1e6]])
    seen = appearance.through_haze(light, [jnp.ones((1, 3))] * 3, distance)
    expected = [[[1, 0.5, 0]], [[1, 0.75, 0.5]], [[1, 1, 1]]]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


LENS = {
    **{"target": 0.2, "soft": 0.0, "gamma": 1.0, "saturation": 1.0, "red": 1.0, "blue": 1.0},
    **{"vignette": 0.0, "blur": 0.0, "noise": 0.0, "veil": 0.0, "curve": 0.0},
}


def developed(radiance, **lens):
    light = jax.tree.map(jnp.zeros_like, one_box(5.0).light)
    light = light._replace(lens=jnp.array(list((LENS | lens).values())), seed=jnp.uint32(7))
    return np.asarray(appearance.develop(light, list(jnp.float32(radiance)))).astype(int)


def level(linear):
    return np.round(255 * linear ** (1 / 2.2))


def test_a_camera_exposes_to_its_target_whatever_the_light_is():
    for light in (0.01, 1.0, 100.0):
        picture = developed(np.full((3, 4, 5), light))
        np.testing.assert_allclose(picture, level(0.2), atol=1)
    assert developed(np.ones((3, 4, 5)), target=2.0).min() == 255  # over-exposed
    assert (developed(np.ones((3, 4, 5)), target=2.0, soft=1.0) < 255).all()


def test_each_property_of_a_lens_does_what_its_name_says():
    colours = np.float32([1.0, 0.4, 0.1])[:, None, None] * np.ones((3, 24, 32))
    plain = developed(colours)
    assert plain[0, 0, 0] > plain[0, 0, 1] > plain[0, 0, 2]
    assert np.ptp(developed(colours, saturation=0.0)[0, 0]) == 0
    assert developed(colours, red=0.9)[0, 0, 0] < plain[0, 0, 0]
    assert developed(colours, blue=1.1)[0, 0, 2] > plain[0, 0, 2]
    assert developed(0 * colours, veil=0.1).min() > developed(0 * colours).max()
    assert developed(colours, gamma=1.2)[0, 0, 1] < plain[0, 0, 1]
    even = np.ones((3, 4, 5))  # is exposed to the target
    for grey, curved in ((0.25, 0.15625), (0.5, 0.5), (0.75, 0.84375)):  # x^2 (3 - 2 x)
        picture = developed(even, target=grey**2.2, curve=1.0)
        np.testing.assert_allclose(picture, 255 * curved, atol=1)
    dark = developed(colours, vignette=0.6)
    assert dark[0, 0, 1] < dark[12, 16, 1] <= plain[12, 16, 1]
    spread = np.std(developed(np.ones((3, 64, 64)), noise=0.02)[..., 1])
    assert 2.5 * 0.02 * 255 / np.sqrt(6) == pytest.approx(spread, rel=0.1)  # of two uniform draws
    line = np.zeros((3, 9, 9))
    line[:, :, 4] = 1
    assert (developed(line)[4, (3, 5)] < 5).all() and (
        developed(line, blur=0.5)[4, (3, 5)] > 50
    ).all()
