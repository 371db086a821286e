"""The teacher cache: made once, resumed exactly, and to the student the same as its teacher."""

import dataclasses
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cache as cache_config
from configs import common, quickstart
from d3epth_jax import ensemble, image, inference, sharding
from d3epth_jax.data.sources import latents
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.data.sources.latents import CachedLatents
from d3epth_jax.metric_writer import read_metrics
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.training import cache, from_config, model_setup, train, training_data
from d3epth_jax.training.stages import latent
from d3epth_jax.weights import files, hub
from tests import cache_speed
from tests.conftest import small_model, small_unet, with_teachers_autoencoder, write_pairs

TEACHER = small_model(small_unet((8,), channels=8))
KEYS = latent.LESSON + latent.TARGET


def lively(model, seed: int):
    """Parameters of which no branch ends in zeros: every path of the networks counts."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (x + rng.normal(0, 0.05, x.shape)).astype(np.float32), init_params(model, seed)
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "model"
    hub.save_model(directory, TEACHER, lively(TEACHER, 1))
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = write_pairs(tmp_path_factory.mktemp("pairs"), 12, height=32, width=56)
    # One depth everywhere has no range to normalise: no target.
    image.save_png(root / "depth/003.png", np.full((32, 56), 3000, np.uint16))
    return root


def caching(pairs, teacher, **data):
    config = cache_config.get_config("tiny")
    config.teacher.path = str(teacher)
    config.data.source = common.folder(str(pairs), split="train")
    config.data.update(height=32, width=48, batch_size=2, **{"crop": "center", **data})
    config.cache.update(target=True, shard_size=4)
    return config


def training(pairs, teacher, folder="", **data):
    config = with_teachers_autoencoder(quickstart.stage1(tiny=True), teacher)
    config.teacher.cache, config.model.prediction_type = str(folder), TEACHER.prediction_type
    config.data.source = common.folder(str(pairs), split="train")
    config.data.update(height=32, width=48, batch_size=4, crop="center", **data)
    config.eval.source = common.folder(str(pairs), split="validation")
    config.eval.update(num_images=0, num_pictures=0, batch_size=2, every=100)
    config.loss.beta.gt = 1.0
    config.train.update(steps=2, log_every=1, save_start=False)
    return config


@pytest.fixture(scope="module")
def cached(pairs, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    cache.run(caching(pairs, teacher), folder)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shards_hold_float16_latents_of_both_sides(cached, teacher, pairs):
    source = CachedLatents(cached / "main", KEYS, mirrored=True)
    pictures = training_data.data.make_source(**common.folder(str(pairs), split="train"))
    assert len(source) == len(pictures) == 10
    assert [source.name(i) for i in range(10)] == [pictures.name(i) for i in range(10)]
    sample = source[-1]
    for key in ("rgb_latent", "teacher_latent", "gt_latent"):
        assert sample[key].dtype == np.float16 and sample[key].shape == (2, 4, 6, 4)
    # The picture's top left is masked (a column is left of it), the mirror image's top right.
    assert not sample["latent_mask"][0, 0, 0] and not sample["latent_mask"][1, 0, -1]
    assert sample["latent_mask"].sum() == 2 * (4 * 6 - 1)
    flat = [i for i in range(10) if source.name(i) == "003"]
    assert [i for i in range(10) if not source[i]["has_target"].all()] == flat
    # Of the last shard, which has 2 samples of 4.
    model, params, *_ = hub.load_model(teacher)
    fitted = training_data.loader.fit_to(pictures[9], None, size=(32, 48), crop="center")
    for side, picture in enumerate((fitted["image"], fitted["image"][:, ::-1])):
        encode = jax.jit(lambda p, x: inference.encode_image(model, p, inference.to_float(x)))
        expected = encode(params, picture[None])
        np.testing.assert_allclose(sample["rgb_latent"][side], expected[0], rtol=1e-3, atol=1e-3)


def test_an_interrupted_cache_is_finished_bit_for_bit(
    cached, pairs, teacher, tmp_path, monkeypatch
):
    config = caching(pairs, teacher)
    written, write = [], latents.write

    def killed(path, arrays):
        if len(written) == 1:
            (path.parent / f".{path.name}.0123.partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path)
        write(path, arrays)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(latents, "write", killed)
        cache.run(config, tmp_path)
    with pytest.raises(SourceError, match=r"unfinished: 2 of 3 shards.*run its job again"):
        CachedLatents(tmp_path / "main", KEYS)
    first = contents(tmp_path)[f"main/{written[0].name}"]
    (tmp_path / "main" / written[0].name).write_bytes(first[:-10])  # and a disk that was full
    cache.run(config, tmp_path)
    assert contents(tmp_path) == contents(cached)

    monkeypatch.setattr(latents, "write", lambda *_: pytest.fail("computed again"))
    cache.run(config, tmp_path)


@pytest.fixture
def quick(pairs, teacher, monkeypatch):
    """A job whose teacher gives some of the picture's pixels: no networks to compile."""
    lessons = cache.Lessons(
        give=lambda batch: {"rgb_latent": batch["image"][:, ::8, ::8] / np.float32(255)},
        shapes=lambda height, width: {"rgb_latent": (height // 8, width // 8, 3)},
        settings={"steps": 1},
    )
    monkeypatch.setattr(cache, "make_lessons", lambda *_: lessons)
    return caching(pairs, teacher)


FIRST, SECOND, THIRD = (f"latents-{k:05d}-of-00003.safetensors" for k in range(3))


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_hosts_share_the_shards_whoever_comes_first(quick, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "d3epth_jax.training.cache")
    cache.run(quick, tmp_path / "one")
    everything, folder = contents(tmp_path / "one"), tmp_path / "several/main"

    def host(number):
        caplog.clear()
        monkeypatch.setattr(jax, "process_index", lambda: number)
        cache.run(quick, folder.parent)
        return caplog.text

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    folder.mkdir(parents=True)
    of_another = folder / f".{SECOND}.0123.partial"
    of_another.write_bytes(b"half")
    assert f"1 shards are missing or damaged: main/{SECOND};" in host(0)
    assert "train on" not in caplog.text and of_another.is_file()
    assert "train on it" in host(1) and contents(folder.parent) == everything
    damage(folder / SECOND)  # another host has still to make it again
    assert "train on" not in host(0)
    assert "train on it" in host(1) and contents(folder.parent) == everything


def test_two_processes_do_not_fill_one_folder(quick, tmp_path):
    cache.run(quick, tmp_path)
    folder = tmp_path / "main"
    (folder / THIRD).unlink()
    code = (
        "import sys; from d3epth_jax.training import cache; at = cache.pathlib.Path(sys.argv[1])\n"
        "with cache.claim(at, cache.latents.read_manifest(at)) as missing: print(missing)"
    )
    command = [sys.executable, "-c", code, folder]
    with cache.claim(folder, latents.read_manifest(folder)) as missing:
        assert missing == [(THIRD, range(8, 10))]
        at_work = folder / f".{THIRD}.0123.partial"
        at_work.write_bytes(b"half")
        other = subprocess.run(command, capture_output=True, text=True)
        assert "another process is filling this cache now" in other.stderr, other
        assert at_work.is_file()


def test_damaged_shards_are_made_again(quick, tmp_path):
    cache.run(quick, tmp_path)
    before, folder = contents(tmp_path), tmp_path / "main"
    damage(folder / SECOND)
    arrays = {key: np.array(x) for key, x in files.read(folder / THIRD).items()}
    files.write(folder / THIRD, arrays)  # without a checksum
    CachedLatents(folder, ["rgb_latent"])  # to readers they look whole
    with cache.claim(folder, latents.read_manifest(folder)) as missing:
        assert [name for name, _ in missing] == [SECOND, THIRD]
        assert not (folder / SECOND).exists()  # or a reader would take it for a good one
    cache.run(quick, tmp_path)
    assert contents(tmp_path) == before


def test_a_cache_without_all_its_shards_is_an_error(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "write", lambda *_: None)
    with pytest.raises(ValueError, match=f"3 shards are missing or damaged: main/{FIRST}"):
        cache.run(quick, tmp_path)


def test_a_cache_says_where_its_pictures_lay_from_everywhere(quick, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(pairs)
    quick.data.source.path = "."
    cache.run(quick, tmp_path)
    assert latents.read_manifest(tmp_path / "main")["about"]["source"] == str(pairs.resolve())


@pytest.mark.parametrize("change,message", [
    ({"cache.target": False}, r"made.target: True -> False"),
    ({"data.width": 40}, r"data.width: 48 -> 40"),
    ({"data.source.holdout_every": 3}, r"holdout_every: 5 -> 3.*names: 10 of them -> 8"),
    ({"teacher.path": "other"}, r"teacher.digest"),
])  # fmt: skip
def test_other_settings_do_not_mix_with_a_cache(change, message, cached, pairs, teacher, tmp_path):
    hub.save_model(tmp_path / "other", TEACHER, lively(TEACHER, 2))
    if "teacher.path" in change:
        change = {"teacher.path": str(tmp_path / "other")}
    before = contents(cached)
    config = caching(pairs, teacher)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        cache.run(config, cached)
    assert contents(cached) == before


@pytest.mark.parametrize("change,message", [
    ({"data.width": 40}, r"data.width: 48, but this run has 40"),
    ({"data.filter.min_range": 0.5}, r"data.filter.min_range: 0.0, but this run has 0.5"),
    ({"teacher.steps": 2}, r"teacher.steps: 0, but this run has 2"),
    ({"data.crop": "random"}, r"set data.crop=center"),
    ({"data.source": common.procedural(1, 100)}, r"rendered scenes never repeat"),
    ({"teacher.cache": "nowhere"}, r"no teacher cache here.*configs/cache.py"),
])  # fmt: skip
def test_training_refuses_a_cache_of_something_else(change, message, cached, pairs, teacher):
    config = training(pairs, teacher, cached)
    for key, value in change.items():
        if key == "data.source":
            config.data.source = value
        else:
            config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        training_data.check(config)
        training_data.make_sources(config)


def test_what_a_cache_lacks_is_named(pairs, teacher, tmp_path):
    config = caching(pairs, teacher, flip=0.0)
    config.cache.target = False
    cache.run(config, tmp_path)
    with pytest.raises(SourceError, match=r"beta.gt=0, or cache with cache.target=True") as error:
        training_data.make_sources(training(pairs, teacher, tmp_path))
    assert "no mirror images" in str(error.value)
    config = training(pairs, teacher, tmp_path, flip=0.0)
    config.loss.beta.gt = 0.0
    sources, _ = training_data.make_sources(config)
    assert sources["main"][0].keys() == set(latent.LESSON)


def test_cached_pairs_are_kept_apart_from_the_evaluation(cached, pairs, teacher):
    config = training(pairs, teacher, cached)
    config.eval.source.split = ""
    config.data.source.path = "not there any more"
    with pytest.raises(ValueError, match="10 samples are both trained and evaluated on"):
        training_data.make_sources(config)


def batch_and_loss(config, student, params, share: bool):
    """A batch as training makes it, and the losses' gradient on it."""
    sources, _ = training_data.make_sources(config)
    mesh = sharding.make_mesh()
    batches = training_data.make_batches(config, mesh, sources)
    next(batches)
    batch = next(batches)
    teacher = model_setup.read_teacher(config)
    loss_fn = latent.make_loss(
        student,
        teacher.model,
        terms=tuple(term for term, beta in config.loss.beta.items() if beta),
        share_encoder=share,
        teacher_steps=model_setup.teacher_steps(config, teacher.model),
        cached=bool(config.teacher.cache),
    )
    frozen = {"teacher": from_config.frozen_teacher(config, teacher)}

    def total(params, frozen, batch):
        losses, weights, metrics = loss_fn(params, frozen, batch)
        mean = {k: (weights[k] * losses[k]).sum() / weights[k].sum() for k in losses}
        return sum(mean.values()), (losses, weights, metrics)

    (_, everything), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
        params, frozen, batch
    )
    return batch, frozen, everything, gradient


@pytest.mark.parametrize("share", [True, False])
def test_losses_from_the_cache_are_those_with_the_teacher_to_float16(share, cached, pairs, teacher):
    student = small_model(small_unet((4,), mid=None, channels=8))
    params = lively(student, 3)
    if share:
        params["adapters"] = latent.init_adapters(student, TEACHER, jax.random.key(2), 32, 48)
    results = []
    for folder in ("", cached):
        config = training(pairs, teacher, folder)
        config.model.encoder = "teacher" if share else "own"
        config.loss.beta.update(enc=0.0, feat=0.1) if share else config.loss.beta.update(feat=0.0)
        results.append(batch_and_loss(config, student, params, share))
    (online, _, expected, slope), (batch, frozen, got, other) = results
    assert set(frozen["teacher"]) == ({"unet", "prompt"} if share else set())
    assert set(batch) == set(KEYS) | (set() if share else {"image"})
    if not share:
        np.testing.assert_array_equal(batch["image"], online["image"])
    losses, weights, metrics = got
    for ours, theirs, relative in (
        (losses, expected[0], 1e-3),
        (weights, expected[1], 0),
        (metrics, expected[2], 1e-3),
    ):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=relative, err_msg=key)
    assert set(losses) == {"gt", "out", "feat" if share else "enc"}
    exact, near = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (slope, other))
    size, off = np.linalg.norm(exact), np.linalg.norm(near - exact)
    assert 0 < off < 8 * 2**-11 * size  # float16 rounds to 2**-11


def test_training_from_the_cache_needs_no_pictures(cached, pairs, teacher, tmp_path, monkeypatch):
    student = small_model(small_unet((4,), mid=None, channels=8))
    monkeypatch.setitem(presets.PRESETS, "d3_nano", (student.unet, student.autoencoder))
    config = training(pairs, teacher, cached)
    config.data.source.path = "not there any more"
    assert (train.run(config, tmp_path) / "unet").is_dir()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert (
        len(rows) == 2 and {"train/loss/gt", "train/loss/out", "train/loss/feat"} < rows[0].keys()
    )


def test_cached_latents_travel_to_workers_without_their_content(cached):
    source = CachedLatents(cached / "main", latent.LESSON)
    sample = source[0]
    assert len(pickle.dumps(source)) < 10_000
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[0]["rgb_latent"], sample["rgb_latent"])


MARIGOLD = dataclasses.replace(TEACHER, denoising_steps=3)


def test_noise_belongs_to_the_picture():
    params = lively(MARIGOLD, 1)
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 24, 3)).astype(np.uint8)

    @jax.jit
    def teach(batch, member=0):
        rgb = jnp.zeros((len(batch), 2, 3, 4))
        return latent.predict(MARIGOLD, params, rgb, batch, steps=3, member=member)[0]

    whole = teach(images)
    np.testing.assert_allclose(teach(images[::-1])[1], whole[1], atol=1e-5)
    assert np.abs(whole[1] - whole[2]).max() > 0.1
    assert np.abs(teach(images, member=1) - whole).max() > 0.1


def test_an_ensemble_is_merged_in_pixels_and_encoded_again(pairs, tmp_path):
    params = lively(MARIGOLD, 1)
    hub.save_model(tmp_path / "marigold", MARIGOLD, params)
    config = caching(pairs, tmp_path / "marigold", flip=0.0)
    config.cache.ensemble = 3
    cache.run(config, tmp_path / "cache")
    sample = CachedLatents(tmp_path / "cache/main", latent.LESSON)[1]
    pictures = training_data.data.make_source(**config.data.source)
    image = training_data.loader.fit_to(pictures[1], None, size=(32, 48), crop="center")["image"]

    @jax.jit
    def depth(params, number):
        rgb = inference.encode_image(MARIGOLD, params, inference.to_float(image[None]))
        z0, _ = latent.predict(MARIGOLD, params, rgb, image[None], steps=3, member=number)
        return inference.decode_depth(MARIGOLD, params, z0)

    merged, _ = ensemble.ensemble_depth(np.concatenate([depth(params, i) for i in range(3)]))
    picture = np.repeat(2 * merged[None] - 1, 3, -1)
    expected = jax.jit(lambda p: inference.encode_image(MARIGOLD, p, picture)[0])(params)
    np.testing.assert_allclose(sample["teacher_latent"][0], expected, rtol=2e-3, atol=2e-3)


def test_teachers_of_several_steps_give_latents_and_no_features(pairs, teacher, tmp_path):
    hub.save_model(tmp_path / "marigold", MARIGOLD, lively(MARIGOLD, 1))
    config = training(pairs, tmp_path / "marigold")
    read = model_setup.read_teacher(config)
    assert model_setup.teacher_steps(config, read.model) == 3
    with pytest.raises(ValueError, match=r"features of a teacher's single step.*beta.feat=0"):
        latent.make_loss(TEACHER, read.model, terms=("feat",), teacher_steps=3)
    loss_fn = latent.make_loss(TEACHER, read.model, terms=("out",), teacher_steps=3)
    batch = {"image": np.zeros((1, 16, 24, 3), np.uint8)}
    losses, *_ = jax.jit(loss_fn)(lively(TEACHER, 4), {"teacher": read.params}, batch)
    assert np.isfinite(losses["out"]).all()
    config.stage, config.loss.beta = "pixel", {"latent": 0.0, "teacher": 1.0}
    with pytest.raises(
        ValueError, match=r"takes 3 denoising step\(s\) from noise: the pixel stage"
    ):
        model_setup.read_teacher(config)
    config = caching(pairs, teacher)
    config.cache.ensemble = 2
    with pytest.raises(ValueError, match="would be equal"):
        cache.run(config, tmp_path / "equal")


def test_what_float16_cannot_hold_is_an_error_that_names_the_sample(pairs, tmp_path):
    params = lively(TEACHER, 1)
    params["unet"]["conv_out"]["kernel"] *= 1e7
    hub.save_model(tmp_path / "teacher", TEACHER, params)
    with pytest.raises(ValueError, match=r"float16.*\n  000: teacher_latent reaches \d"):
        cache.run(caching(pairs, tmp_path / "teacher"), tmp_path / "cache")
    assert not list((tmp_path / "cache/main").glob("*.safetensors"))


def test_wrong_settings_of_the_job_are_told_together(pairs, teacher):
    config = caching(pairs, teacher, crop="random")
    config.cache.update(ensemble=0, shard_size=3)
    config.teacher.cache = "somewhere"
    with pytest.raises(ValueError) as error:
        cache.check(config)
    for words in ("data.crop=center", "not 0", "shard_size=3 is not a multiple", "is for training"):
        assert words in str(error.value)


@pytest.mark.slow
def test_training_from_the_cache_is_faster():
    ratios = cache_speed.in_its_own_process(rounds=3)
    slow = {name: ratio for name, ratio in ratios.items() if ratio < cache_speed.RATIOS[name][2]}
    assert not slow, ratios
