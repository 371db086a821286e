import functools
import json

import numpy as np
import pytest

from d3epth_jax.data.loader import (
    ProceduralIterator,
    batches,
    iterate,
    make_loader,
    mixed,
    standard_transforms,
)
from d3epth_jax.data.transforms import choose_side, fit_to, horizontal_flip


class Numbered:
    """Samples that tell where each pixel came from: depth is its number in the source image."""

    def __init__(self, length, shape=(12, 16)):
        self.length, self.shape = length, shape

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        height, width = self.shape
        number = np.arange(height * width).reshape(height, width, 1)
        image = np.concatenate([number % 200, np.full_like(number, i), number * 0], axis=-1)
        return {
            "image": image.astype(np.uint8),
            "depth": number.astype(np.float32) + 1,
            "mask": number % 3 > 0,
        }


TRANSFORMS = standard_transforms((8, 8))
OPTIONS = {"batch_size": 4, "seed": 5, "shuffle": True}


def owners(batch):
    """Which sample of the source each image of the batch is."""
    return batch["image"][:, 0, 0, 1].tolist()


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("size", [(60, 80), (8, 8), (12, 16), (90, 150), (6, 16), (45, 61)])
def test_fit_to_keeps_image_depth_and_mask_aligned(crop, size):
    # A picture whose value is its depth: a slope of 2 per column and 1 per row.
    value = np.arange(60)[:, None, None] + 2 * np.arange(80)[None, :, None]
    sample = {
        "image": np.repeat(value, 3, axis=-1).astype(np.uint8),
        "depth": value.astype(np.float32),
        "mask": value % 2 == 0,
    }
    result = fit_to(sample, np.random.default_rng(1), size=size, crop=crop)
    assert result["image"].shape == (*size, 3) and result["image"].dtype == np.uint8
    assert result["depth"].shape == (*size, 1) and result["mask"].dtype == bool
    # Never bilinear: no new depth appears, and the mask still belongs to its depth.
    np.testing.assert_array_equal(result["depth"], np.round(result["depth"]))
    np.testing.assert_array_equal(result["mask"], result["depth"] % 2 == 0)
    # Nearest is half a pixel off at most (1.5 of the slopes), rounding half a level, and neither
    # leans to a side.
    off = result["image"][..., :1].astype(float) - result["depth"]
    inside = off[1:-1, 1:-1]  # the filter's border repeats pixels
    assert np.abs(inside).max() <= 2 and abs(inside.mean()) < 0.3


def test_fit_to_without_scaling_is_a_crop():
    sample = Numbered(1)[0]
    result = fit_to(sample, np.random.default_rng(0), size=(12, 9), crop="center")
    for key in sample:
        np.testing.assert_array_equal(result[key], sample[key][:, 3:12])
    corners = {
        int(fit_to(sample, np.random.default_rng(i), size=(12, 9))["depth"][0, 0, 0])
        for i in range(60)
    }
    assert corners == set(range(1, 9))  # all eight places, the last one too
    with pytest.raises(ValueError, match="crop must be"):
        fit_to(sample, np.random.default_rng(0), size=(4, 4), crop="left")


def test_stretched_is_the_whole_picture():
    value = np.repeat(np.repeat(np.arange(1, 7).reshape(2, 3, 1), 4, axis=0), 2, axis=1)
    sample = {
        "image": np.repeat(10 * value, 3, axis=-1).astype(np.uint8),  # [8,6,3]: 2x3 flat fields
        "depth": value.astype(np.float32),
        "mask": value != 6,
    }
    result = fit_to(sample, np.random.default_rng(0), size=(4, 12), crop="stretch")
    fields = np.repeat(np.repeat(value[::4, ::2], 2, axis=0), 4, axis=1)
    np.testing.assert_array_equal(result["depth"], fields)
    np.testing.assert_array_equal(result["mask"], fields != 6)
    middles = result["image"][:, 1::4, :1]  # away from where two fields are blended
    np.testing.assert_allclose(middles[[0, -1]], 10 * fields[[0, -1], 1::4], atol=2)


def test_standard_transforms_pass_their_options_on():
    sample, rng = Numbered(1)[0], np.random.default_rng(0)
    fit, flip = standard_transforms([12, 9], flip=1.0, crop="center")
    result = flip(fit(sample, rng), rng)
    np.testing.assert_array_equal(result["depth"], sample["depth"][:, 3:12][:, ::-1])


def test_flip():
    sample = Numbered(1)[0]
    rng = np.random.default_rng(0)
    flipped = horizontal_flip(sample, rng, probability=1)
    for key in sample:
        np.testing.assert_array_equal(flipped[key], sample[key][:, ::-1])
    assert_same(horizontal_flip(sample, rng, probability=0), sample)
    count = sum(horizontal_flip(sample, rng)["depth"][0, 0, 0] > 1 for _ in range(400))
    assert 160 < count < 240


def test_transforms_do_not_touch_their_input():
    sample, copy = Numbered(1)[0], Numbered(1)[0]
    for transform in (functools.partial(fit_to, size=(12, 16)), horizontal_flip):
        result = transform(sample, np.random.default_rng(3))
        for value in result.values():
            value.flags.writeable and value.fill(0)
        sample = Numbered(1)[0] if result is sample else sample
        assert_same(sample, copy)


@pytest.mark.parametrize("steps", [0, 3, 8])
def test_resume_equals_the_uninterrupted_run(steps):
    source = Numbered(10)  # an epoch ends inside the third batch
    loader = make_loader(source, TRANSFORMS, **OPTIONS)
    for _ in range(steps):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(6)]
    resumed = make_loader(source, TRANSFORMS, **OPTIONS)
    next(resumed)
    resumed.set_state(state)
    for batch in expected:
        assert_same(next(resumed), batch)


def test_randomness_follows_seed_and_epoch():
    def first(seed):
        loader = make_loader(Numbered(4), TRANSFORMS, **{**OPTIONS, "seed": seed})
        return [next(loader) for _ in range(3)]

    epochs = first(5)
    for one, two in zip(epochs, first(5), strict=True):
        assert_same(one, two)
    assert len({tuple(owners(batch)) for batch in epochs}) > 1  # a new order every epoch
    by_owner = [batch["depth"][np.argsort(owners(batch))] for batch in epochs]
    assert not np.array_equal(by_owner[0], by_owner[1])  # and other crops of the same sample
    assert not np.array_equal(epochs[0]["depth"], first(6)[0]["depth"])


def test_a_source_smaller_than_the_batch():
    loader = make_loader(Numbered(25), TRANSFORMS, batch_size=32, seed=0, shuffle=True)
    first, second = owners(next(loader)), owners(next(loader))
    assert len(first) == 32
    stream = first + second
    assert sorted(stream[:25]) == sorted(stream[25:50]) == list(range(25))


def test_one_epoch_in_order():
    loader = make_loader(Numbered(10), batch_size=4, seed=0, shuffle=False, num_epochs=1)
    assert [owners(batch) for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_processes_share_an_epoch():
    options = {"batch_size": 4, "seed": 2, "shuffle": True, "num_epochs": 1}
    parts = [
        [
            i
            for batch in make_loader(Numbered(21), **options, process_index=p, process_count=3)
            for i in owners(batch)
        ]
        for p in range(3)
    ]
    together = [i for part in parts for i in part]
    assert len(together) == len(set(together)) == 21
    with pytest.raises(ValueError, match="process_index 3"):
        make_loader(Numbered(21), **options, process_index=3, process_count=3)


def test_the_global_batch_does_not_depend_on_the_number_of_processes():
    whole = make_loader(Numbered(9), TRANSFORMS, batch_size=6, seed=2, shuffle=True)
    parts = [
        make_loader(
            Numbered(9),
            TRANSFORMS,
            batch_size=2,
            seed=2,
            shuffle=True,
            process_index=p,
            process_count=3,
        )
        for p in range(3)
    ]
    for _ in range(4):
        pieces = [next(part) for part in parts]
        joined = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        assert_same(joined, next(whole))
    # So a run of one process may go on with three.
    parts[1].set_state(whole.get_state())
    assert_same(next(parts[1]), {key: value[2:4] for key, value in next(whole).items()})


def test_worker_processes_give_the_same_batches():
    source = Numbered(10)
    here = make_loader(source, TRANSFORMS, **OPTIONS)
    there = make_loader(source, TRANSFORMS, **OPTIONS, num_workers=2)
    for _ in range(3):
        assert_same(next(there), next(here))
    state = json.loads(json.dumps(there.get_state()))
    there.set_state(state)
    for _ in range(2):
        assert_same(next(there), next(here))
    there.close()


def test_bad_arguments():
    with pytest.raises(ValueError, match="empty"):
        batches(Numbered(0), (), batch_size=1, seed=0, shuffle=False)
    with pytest.raises(ValueError, match="batch_size"):
        batches(Numbered(1), (), batch_size=0, seed=0, shuffle=False)


SOURCES = ((Numbered(10), (8, 8)), (Numbered(7, (10, 30)), (8, 24)), (Numbered(5), (4, 4)))


def mix(count=2, shares=(0.9, 0.1), batch_size=4, num_workers=0, **process):
    datasets = [
        batches(source, standard_transforms(size), batch_size=batch_size, seed=seed, shuffle=True,
                **process)
        for seed, (source, size) in enumerate(SOURCES[:count])
    ]  # fmt: skip
    return iterate(mixed(datasets, shares), num_workers=num_workers)


def test_a_mix_has_the_asked_shares_in_batches_of_one_shape():
    loader = mix(3, (0.6, 0.3, 0.1))
    shapes = [next(loader)["image"].shape[1:3] for _ in range(100)]
    counts = [shapes.count(size) for _, size in SOURCES]
    np.testing.assert_allclose(counts, (60, 30, 10), atol=1)
    # Spread out, not one source after the other.
    counts = [shapes[:20].count(size) for _, size in SOURCES]
    np.testing.assert_allclose(counts, (12, 6, 2), atol=1)


def test_a_mix_gives_each_source_the_batches_it_gives_alone():
    loader = mix(2, (0.75, 0.25))
    alone = [
        make_loader(source, standard_transforms(size), batch_size=4, seed=seed, shuffle=True)
        for seed, (source, size) in enumerate(SOURCES[:2])
    ]
    for _ in range(12):
        batch = next(loader)
        assert_same(batch, next(alone[batch["image"].shape[2] == 24]))


@pytest.mark.parametrize("num_workers,steps", [(0, 5), (2, 9)])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_mix_resumes_exactly(num_workers, steps, processes):
    """For every process; and their batches of a step are of one source and make the global one."""
    options = {"shares": (0.75, 0.25), "num_workers": num_workers, "batch_size": 4 // processes}
    loaders = [mix(**options, process_index=p, process_count=processes) for p in range(processes)]
    whole = mix(shares=(0.75, 0.25))
    for _ in range(steps):
        for loader in (*loaders, whole):
            next(loader)
    states = [json.loads(json.dumps(loader.get_state())) for loader in loaders]
    resumed = [mix(**options, process_index=p, process_count=processes) for p in range(processes)]
    for loader, state in zip(resumed, states, strict=True):
        loader.set_state(state)
    seen = set()
    for _ in range(5):
        expected = next(whole)
        for group in (loaders, resumed):
            pieces = [next(loader) for loader in group]
            joined = {key: np.concatenate([piece[key] for piece in pieces]) for key in expected}
            assert_same(joined, expected)
        seen.add(expected["image"].shape)
    assert len(seen) == 2
    if num_workers:
        for loader in (*loaders, *resumed):
            loader.close()


def test_a_mix_needs_a_positive_share_for_each():
    with pytest.raises(ValueError, match="positive shares"):
        mix(2, (1.0, 0.0))
    with pytest.raises(ValueError, match="2 sources need as many"):
        mix(2, (1.0,))


def test_filters_and_far_limit_take_pixels_and_never_samples():
    class Scenes:
        """A bright scene of 1 m to its number + 1 metres; an eighth of it unknown."""

        def __len__(self):
            return 4

        def __getitem__(self, i):
            depth = np.linspace(1, 1 + i, 64, dtype=np.float32).reshape(8, 8, 1)
            image = np.full((8, 8, 3), 100, np.uint8)
            image[0] = 100 + 10 * (i != 2)
            mask = np.arange(64).reshape(8, 8, 1) >= 8
            return {"image": image, "depth": depth * mask, "mask": mask}

    def known(**settings):
        transforms = standard_transforms((8, 8), flip=0, crop="center", **settings)
        options = {"batch_size": 4, "seed": 0, "shuffle": False, "num_epochs": 1}
        batch = next(make_loader(Scenes(), transforms, **options))
        assert not batch["depth"][~batch["mask"]].any() and batch["mask"].dtype == bool
        return batch["mask"].sum((1, 2, 3)).tolist()

    none = {"min_range": 0.0, "min_contrast": 0, "max_invalid": 1.0}
    assert known() == known(filters=none) == [56] * 4
    assert known(filters=none | {"min_range": 0.5}) == [0, 56, 56, 56]
    assert known(filters=none | {"min_contrast": 10}) == [56, 56, 0, 56]
    assert known(filters=none | {"max_invalid": 0.12}) == [0] * 4
    # Beyond the limit is unknown, and that is no reason to leave a sample out.
    assert known(max_depth=2.0, filters=none | {"max_invalid": 0.13}) == [56, 56, 24, 14]


def test_kittis_crop_is_the_bottom_and_the_middle_unscaled():
    sample = Numbered(1)[0]
    result = fit_to(sample, np.random.default_rng(0), size=(8, 10), crop="kitti")
    for key in sample:
        np.testing.assert_array_equal(result[key], sample[key][4:, 3:13])
    with pytest.raises(ValueError, match="picture of 16x12 has no crop 'kitti' of 18x8"):
        fit_to(sample, np.random.default_rng(0), size=(8, 18), crop="kitti")


def test_a_cached_side_is_the_one_that_a_flip_would_have_given():
    sample = Numbered(1)[0]
    both = {key: np.stack([value, value[:, ::-1]]) for key, value in sample.items()}
    for seed in range(8):
        for probability in (0, 0.5, 1):
            expected = horizontal_flip(sample, np.random.default_rng(seed), probability=probability)
            cached = both | {"image": sample["image"]}
            got = choose_side(cached, np.random.default_rng(seed), probability=probability)
            assert_same(got, expected)


class Scenes:
    def __len__(self):
        return 2**31 - 1

    def batch(self, indices):
        assert indices.dtype == np.int32
        return {"depth": indices}


def test_procedural_iterator():
    iterator = ProceduralIterator(Scenes(), 4)
    np.testing.assert_array_equal(next(iterator)["depth"], [0, 1, 2, 3])
    np.testing.assert_array_equal(next(iterator)["depth"], [4, 5, 6, 7])
    state = json.loads(json.dumps(iterator.get_state()))
    expected = next(iterator)
    resumed = ProceduralIterator(Scenes(), 4)
    resumed.set_state(state)
    assert_same(next(resumed), expected)
    assert_same(next(ProceduralIterator(Scenes(), 4, start=2)), expected)

    parts = [ProceduralIterator(Scenes(), 2, process_index=p, process_count=2) for p in range(2)]
    for step in range(3):
        joined = np.concatenate([next(part)["depth"] for part in parts])
        np.testing.assert_array_equal(joined, np.arange(4) + 4 * step)

    placed = ProceduralIterator(Scenes(), 2, place=lambda batch: {"indices": batch["indices"] + 7})
    np.testing.assert_array_equal(next(placed)["depth"], [7, 8])

    # Beyond int32 the indices begin anew.
    far = ProceduralIterator(Scenes(), 4, start=2**29)
    np.testing.assert_array_equal(next(far)["depth"], [1, 2, 3, 4])
