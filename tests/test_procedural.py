"""The embedded source: exact geometry, scenes that are functions of (seed, index), statistics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d3epth_jax.data import procedural
from d3epth_jax.data.procedural import layouts, objects
from d3epth_jax.data.procedural.render import render_scene
from d3epth_jax.data.procedural.scenes import (
    MOST_ROLL,
    SQUARE_PIXELS,
    TILTED,
    make_scene,
    rotation_y,
)
from d3epth_jax.data.procedural.trace import intersect, see

HEIGHT, WIDTH = 24, 32


def small(seed, indices, height=HEIGHT, width=WIDTH):
    indices = jnp.asarray(indices, jnp.int32)
    return jax.device_get(procedural.render(seed, indices, height=height, width=width))


@pytest.fixture(scope="module")
def many():
    """200 scenes, in batches of one size so that one program serves most tests."""
    batches = [small(0, np.arange(k, k + 8)) for k in range(0, 200, 8)]
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def entry(origin, direction, shape):
    start, end, _, _ = intersect(origin, direction, objects.SHAPES[shape])
    return float(start) if float(start) < float(end) else None


@pytest.mark.parametrize(
    ("shape", "origin", "direction", "expected"),
    [
        ("box", (0, 0, -5), (0, 0, 1), 4.0),
        ("box", (0.99, 0.99, -5), (0, 0, 1), 4.0),
        ("box", (1.01, 0, -5), (0, 0, 1), None),
        ("ellipsoid", (0, 0, -5), (0, 0, 1), 4.0),
        ("ellipsoid", (0.6, 0, -5), (0, 0, 2), (5 - 0.8) / 2),  # the parameter, not the length
        ("ellipsoid", (0.8, 0.8, -5), (0, 0, 1), None),
        ("cylinder", (0.6, 0.9, -5), (0, 0, 1), 4.2),
        ("cylinder", (0.6, 1.1, -5), (0, 0, 1), None),
        ("cylinder", (0.3, 4, 0.3), (0, -1, 0), 3.0),  # its lid
        ("cylinder", (0.8, 4, 0.8), (0, -1, 0), None),
        ("dome", (0.0, -1 + 1e-4, -5), (0, 0, 1), 4.0),  # x^2 + z^2 <= (1 - y) / 2
        ("dome", (0.0, 0.5, -5), (0, 0, 1), 4.5),
        ("bowl", (0.0, -0.5, -5), (0, 0, 1), 4.5),
        ("box", (0, 0, 5), (0, 0, 1), -6.0),  # behind the origin
    ],
)
def test_intersections_by_hand(shape, origin, direction, expected):
    found = entry([jnp.float32(o) for o in origin], [jnp.float32(d) for d in direction], shape)
    assert found is None if expected is None else found == pytest.approx(expected, abs=2e-4)


def one_box(distance, yaw=0.0, shape="box", half=(50.0, 50.0, 1.0), height=60.0):
    """A scene with one primitive ahead of a level camera, everything else put out of the way."""
    abstract = jax.eval_shape(make_scene, jax.random.key(0))
    scene = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract)
    count = scene.centre.shape[0]
    return scene._replace(
        eye=jnp.array([0.0, height, 0.0]),
        axes=jnp.eye(3),
        tan_half_fov=jnp.ones(2),
        outdoor=jnp.bool_(True),
        centre=jnp.tile(jnp.array([0.0, -1e3, 0.0]), (count, 1))
        .at[5]
        .set(jnp.array([0.0, height, distance])),
        rotation=jnp.tile(jnp.eye(3), (count, 1, 1)).at[5].set(rotation_y(jnp.float32(yaw)).T),
        half=jnp.full((count, 3), 1e-3).at[5].set(jnp.array(half)),
        quadric=jnp.tile(jnp.array(objects.SHAPES["box"]), (count, 1))
        .at[5]
        .set(jnp.array(objects.SHAPES[shape])),
        shell_centre=jnp.array([0.0, 100.0, 0.0]),
        shell_rotation=jnp.eye(3),
        shell_half=jnp.array([200.0, 100.0, 200.0]),
        materials=scene.materials.at[:, -1].set(0.0),  # smooth silhouettes
        light=scene.light._replace(frame=jnp.zeros(5)),
    )


pictured = jax.jit(functools.partial(render_scene, height=HEIGHT, width=WIDTH))
COLUMN = (np.arange(WIDTH) + 0.5) / WIDTH * 2 - 1  # x / z of a pixel where tan(fov / 2) = 1


def test_pixels_need_not_be_square():
    square = one_box(8.0, half=(2.1, 2.1, 1.0))  # its front is 7 away, the rest is sky
    squeezed = square._replace(tan_half_fov=jnp.array([1.0, 0.5]))
    seen = [np.isclose(pictured(scene)["depth"][..., 0], 7) for scene in (square, squeezed)]
    assert [(x.any(1).sum(), x.any(0).sum()) for x in seen] == [(10, 10), (20, 10)]


def test_scenes_are_as_often_square_framed_and_tilted_as_is_said():
    def drawn(index):
        scene = make_scene(jax.random.fold_in(jax.random.key(5), index), (0.4, 2.5))
        right = scene.axes[0]  # level but for the roll
        return scene.tan_half_fov, scene.light.frame, right[1], scene.outdoor

    fov, frame, rise, outdoor = map(np.asarray, jax.vmap(drawn)(jnp.arange(512)))
    aspect = fov[:, 0] / fov[:, 1]
    assert 0.4 <= aspect.min() < 0.45 and 2.3 < aspect.max() <= 2.5
    assert np.mean(aspect == 1) == pytest.approx(SQUARE_PIXELS, abs=0.07)
    framed = frame[:, :4].any(1)
    assert np.mean(framed) == pytest.approx(0.12, abs=0.05)
    assert frame[:, :4].max() < 0.05
    # Beyond the 3 degrees of most layouts: of heaps nearly all, of other rooms those made steeper.
    tilted = np.abs(rise) > np.sin(np.radians(3.5))
    indoor = {name: row for name, row in layouts.LAYOUTS.items() if not row.outdoor}
    heaps = indoor["heap"].weight / sum(row.weight for row in indoor.values())
    expected = heaps * (1 - 3.5 / 25) + (1 - heaps) * TILTED * (1 - 3.5 / 24)
    assert tilted[~outdoor].mean() == pytest.approx(expected, abs=0.06)
    assert not tilted[outdoor].any() and np.abs(rise).max() <= np.sin(MOST_ROLL) + 1e-6


@pytest.mark.parametrize("slenderness", [0.75, 1.0, 1.5])
def test_the_longer_side_of_a_picture_has_the_layouts_field_of_view(slenderness):
    """Whichever it is, and however wide pixels are: a telephone held upright sees as far up."""

    def longer(index, *shape):
        across, down = make_scene(jax.random.key(index), *shape).tan_half_fov
        return jnp.maximum(across, slenderness * down)

    found = jax.vmap(lambda index: longer(index, (0.4, 2.5), slenderness))(jnp.arange(64))
    wide = jax.vmap(lambda index: make_scene(jax.random.key(index)).tan_half_fov[0])(jnp.arange(64))
    np.testing.assert_allclose(found, wide, rtol=1e-5)
    assert 40 < np.degrees(2 * np.arctan(wide)).min() < np.degrees(2 * np.arctan(wide)).max() < 90


def test_things_stand_within_an_upright_picture_as_often_as_within_a_wide_one():
    def share(aspect):
        def within(index):
            scene = make_scene(jax.random.key(index), (aspect, aspect))
            x, _, z = jnp.moveaxis((scene.centre - scene.eye) @ scene.axes.T, -1, 0)
            there = scene.centre[:, 1] > -100  # not put out of the way
            inside = there & (z > 0) & (jnp.abs(x) < scene.tan_half_fov[0] * z)
            return jnp.sum(inside) / jnp.sum(there), scene.outdoor

        share, outdoor = jax.vmap(within)(jnp.arange(256))
        return np.mean(share[outdoor])

    assert share(0.42) > 0.85 * share(1.0)  # 0.90; 0.80 if they were placed for a wide one


def test_an_upright_picture_is_of_the_scene_of_its_shape():
    out = small(3, np.arange(2), height=WIDTH, width=HEIGHT)
    key = jax.random.fold_in(jax.random.key(3), 1)
    scene = make_scene(key, slenderness=WIDTH / HEIGHT)
    expected = jax.jit(functools.partial(render_scene, height=WIDTH, width=HEIGHT))(scene)
    assert_same_up_to_rounding({k: v[1] for k, v in out.items()}, jax.device_get(expected))


def test_scenes_of_another_version_are_refused():
    with pytest.raises(ValueError, match="version 0 are asked for"):
        procedural.ProceduralSource(0, 8, 8, 1, version=0)


@pytest.mark.parametrize("aspects", [(0.0, 1.0), (2.0, 1.0), (1.0,)])
def test_pixel_aspects_that_are_none_are_refused(aspects):
    with pytest.raises(ValueError, match="lower first"):
        procedural.ProceduralSource(0, 8, 8, 1, pixel_aspects=aspects)


def test_depth_is_z_depth_not_ray_length():
    out = pictured(one_box(5.0))  # a wall at z = 4 over the whole picture
    np.testing.assert_allclose(out["depth"], 4.0, rtol=1e-6)
    assert out["mask"].all()


def test_slanted_wall_has_inverse_depth_linear_in_the_column():
    yaw = 0.4
    depth = np.asarray(pictured(one_box(5.0, yaw))["depth"])[..., 0]
    # Points p with n . (p - centre) = -1, n = (sin yaw, 0, cos yaw).
    expected = (5.0 * np.cos(yaw) - 1.0) / (np.cos(yaw) + np.sin(yaw) * COLUMN)
    np.testing.assert_allclose(depth, np.broadcast_to(expected, depth.shape), rtol=1e-5)


def test_sphere_and_ground_by_hand():
    out = pictured(one_box(5.0, 0.0, "ellipsoid", (2.0, 2.0, 2.0), height=1.0))
    y = (HEIGHT / WIDTH) * (1 - (np.arange(HEIGHT) + 0.5) / HEIGHT * 2)
    a = 1 + COLUMN[None] ** 2 + y[:, None] ** 2  # |(x, y, 1)|^2; sphere of radius 2 at z = 5
    discriminant = 25 - a * 21
    sphere = (5 - np.sqrt(np.maximum(discriminant, 0))) / a
    ground = np.where(y < 0, 1.0 / np.maximum(-y, 1e-9), np.inf)[:, None] * np.ones_like(a)
    expected = np.minimum(np.where(discriminant > 0, sphere, np.inf), ground)
    seen = expected < procedural.MAX_DEPTH
    np.testing.assert_array_equal(out["mask"][..., 0], seen)
    np.testing.assert_allclose(np.asarray(out["depth"])[seen, 0], expected[seen], rtol=2e-4)
    assert (np.asarray(out["depth"])[~seen] == 0).all()
    assert seen.any() and not seen.all()  # the sky above is masked


def test_a_frame_hides_picture_and_depth():
    scene = one_box(5.0)
    frame = jnp.array([0.25, 0.125, 0.0, 0.5, 1.0])
    out = pictured(scene._replace(light=scene.light._replace(frame=frame)))
    within = np.zeros((HEIGHT, WIDTH), bool)
    within[:12, 8:28] = True
    np.testing.assert_array_equal(out["mask"][..., 0], within)
    assert (np.asarray(out["image"])[~within] == 255).all()
    assert (np.asarray(out["depth"])[~within] == 0).all()


def rays(height, width):
    y, x = np.mgrid[:height, :width]
    across, up = x - (width - 1) / 2, (height - 1) / 2 - y
    return [jnp.float32(r) for r in (across / width * 2, up / width * 2, np.ones((height, width)))]


def test_positions_in_the_room_are_those_in_the_world_for_objects_too():
    scene = jax.jit(make_scene)(jax.random.fold_in(jax.random.key(2), 4))
    assert not scene.outdoor
    direction = rays(24, 32)
    world = [sum(scene.axes[j, i] * direction[j] for j in range(3)) for i in range(3)]
    surface = jax.jit(see)(scene, world, 0.0)
    metres = np.stack(surface.in_shell, -1) * scene.shell_half
    rebuilt = metres @ np.asarray(scene.shell_rotation) + scene.shell_centre
    np.testing.assert_allclose(rebuilt, np.stack(surface.position, -1), atol=1e-4)
    assert 0.1 < np.mean(surface.is_object) < 0.9


def test_shapes_types_and_ranges(many):
    assert many["image"].shape == (200, HEIGHT, WIDTH, 3) and many["image"].dtype == np.uint8
    assert many["depth"].shape == (200, HEIGHT, WIDTH, 1) and many["depth"].dtype == np.float32
    assert many["mask"].shape == many["depth"].shape and many["mask"].dtype == bool
    depth, mask = many["depth"], many["mask"]
    assert np.isfinite(depth).all()
    assert (depth[~mask] == 0).all()
    assert depth[mask].min() > 0.1 and depth[mask].max() < procedural.MAX_DEPTH


def test_every_scene_is_worth_learning_from(many):
    share = many["mask"].mean((1, 2, 3))
    assert share.min() >= 0.2
    assert (share > 0.7).mean() > 0.7
    for depth, mask, image in zip(many["depth"], many["mask"], many["image"], strict=True):
        valid = depth[mask]
        assert np.percentile(valid, 98) > 1.1 * np.percentile(valid, 2)  # not a constant
        assert image.std() > 1.0
    # Dark, bright and over-exposed pictures all occur.
    level = many["image"].mean((1, 2, 3))
    assert level.min() < 50 and level.max() > 170
    assert len(np.unique(many["image"].reshape(200, -1), axis=0)) == 200


def test_brightness_does_not_tell_distance(many):
    """Mean correlation of brightness with depth over pictures stays within 0.2 of zero."""
    found = []
    for depth, mask, image in zip(many["depth"], many["mask"], many["image"], strict=True):
        bright, valid = image.mean(-1)[mask[..., 0]], depth[mask]
        found.append(np.corrcoef(bright, np.log(valid))[0, 1])
    assert abs(np.mean(found)) < 0.2
    assert np.min(found) < -0.3 and np.max(found) > 0.3  # single pictures go both ways


def test_pictures_have_edges_and_contrast():
    """Steps right and down that add up to a tenth: of real pictures' pixels a quarter have them."""
    image = procedural.render(3, np.arange(64), height=96, width=128)["image"]
    grey = np.asarray(image).mean(-1) / 255
    step = np.abs(np.diff(grey, axis=1))[..., :-1] + np.abs(np.diff(grey, axis=2))[:, :-1]
    assert 0.09 < np.mean(step > 0.1) < 0.25
    assert 0.17 < grey.std((1, 2)).mean() < 0.25


def test_the_mean_depth_map_explains_little(many):
    """Layouts vary: the mean map of log depth leaves most of the variance within pictures."""
    log = np.where(many["mask"], np.log(np.maximum(many["depth"], 1e-3)), np.nan)[..., 0]
    log = log - np.nanmedian(log, axis=(1, 2), keepdims=True)
    residual = log - np.nanmean(log, axis=0)
    assert np.nanvar(residual) > 0.6 * np.nanvar(log)


def test_a_scene_depends_on_seed_and_index_alone(many):
    order = np.array([17, 3, 90, 3, 3, 5, 199, 0])  # other places, other company
    again = small(0, order)
    for name in many:
        np.testing.assert_array_equal(again[name], many[name][order])
    other = small(1, order)
    assert (other["depth"] != again["depth"]).any((1, 2, 3)).all()


def assert_same_up_to_rounding(out, expected):
    """Another program may fuse, hence round, otherwise: a pixel on a texture's edge may flip."""
    np.testing.assert_array_equal(out["mask"], expected["mask"])
    error = np.abs(out["depth"] - expected["depth"]) > 1e-4 * expected["depth"]
    assert error.mean() < 1e-3
    levels = np.abs(out["image"].astype(int) - expected["image"])
    assert (levels > 2).mean() < 0.01


def test_a_larger_program_and_sharding_change_nothing(many):
    devices = math.gcd(jax.device_count(), 4)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    order = np.array([17, 3, 90, 12])

    @jax.jit
    def program(seed, indices):
        return procedural.render(seed, indices + 1, height=HEIGHT, width=WIDTH)

    out = program(0, jax.device_put(jnp.asarray(order - 1, jnp.int32), spread))
    assert_same_up_to_rounding(jax.device_get(out), {k: v[order] for k, v in many.items()})


def test_resolution_changes_sampling_not_the_scene(many):
    fine = small(0, np.arange(8), 2 * HEIGHT, 2 * WIDTH)
    for k in range(8):
        a, b = many["depth"][k][many["mask"][k]], fine["depth"][k][fine["mask"][k]]
        assert b.mean() == pytest.approx(a.mean(), rel=0.06)
        assert fine["mask"][k].mean() == pytest.approx(many["mask"][k].mean(), abs=0.04)


def test_source(many):
    source = procedural.ProceduralSource(seed=0, height=HEIGHT, width=WIDTH, length=5)
    assert len(source) == 5
    items = [source[i] for i in range(5)]
    for item, depth in zip(items, many["depth"], strict=False):
        assert {k: type(v) for k, v in item.items()} == dict.fromkeys(many, np.ndarray)
        np.testing.assert_allclose(item["depth"], depth, rtol=1e-4)
    # Pictures together: a pixel that flips on a shadow's edge takes 2 % of one along.
    together = {name: np.stack([item[name] for item in items]) for name in many}
    assert_same_up_to_rounding(together, {k: v[:5] for k, v in many.items()})
    batch = source.batch(np.full(8, 4))
    for name in many:
        assert isinstance(batch[name], jax.Array)
        np.testing.assert_array_equal(batch[name][2], many[name][4])
    with pytest.raises(IndexError, match="5 scenes"):
        source[5]


def test_data_tables():
    assert sum(row.weight for row in layouts.LAYOUTS.values()) == pytest.approx(1.0)
    outdoor = sum(row.weight for row in layouts.LAYOUTS.values() if row.outdoor)
    assert outdoor == pytest.approx(0.4)
    named = {n for row in layouts.LAYOUTS.values() for s in row.slots for n in s.things.split()}
    assert named == set(objects.THINGS), "things never placed, or placed but unknown"
    assert all(len(thing.parts) <= objects.PARTS for thing in objects.THINGS.values())
    slots = {len(row.slots) for row in layouts.LAYOUTS.values()}
    assert len(slots) == 1 and slots.pop() * objects.PARTS + 6 <= 128  # seven bits of trace()


def test_things_stand_on_the_largest_face_of_what_carries_them():
    carriers = {
        name
        for row in layouts.LAYOUTS.values()
        if any(slot.place == layouts.ON_FIRST for slot in row.slots)
        for name in row.slots[0].things.split()
    }
    tops = dict(zip(objects.THINGS, objects.tables()["top"], strict=True))
    assert carriers
    for name in carriers:
        board = max(objects.THINGS[name].parts, key=lambda part: part.size[0] * part.size[2])
        assert tops[name] == pytest.approx(board.centre[1] + board.size[1] / 2, abs=0.01), name
