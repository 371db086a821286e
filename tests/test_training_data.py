"""What a config says of training data: one source or a mix, kept apart from the evaluation."""

import inspect
import json

import numpy as np
import pytest

from configs import cache, common, d2, quickstart, stage1, stage2
from configs.nano import train as nano
from d3epth_jax import cli, data, sharding
from d3epth_jax.data import apart
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.data.sources.latents import CachedLatents
from d3epth_jax.training import ablation, check_config, train, training_data
from tests.conftest import write_pairs
from tests.test_train import on_pairs


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return [
        write_pairs(root / name, 10, height=height, width=width, seed=height)
        for name, height, width in (("rooms", 32, 48), ("streets", 24, 64))
    ]


def mixture(roots):
    config = common.training("latent")
    rooms, streets = (common.folder(str(root), split="train") for root in roots)
    config.data = common.training_data(rooms, 32, 48)
    config.data.also.streets = common.other(0.25, streets, 16, 64, crop="kitti", max_depth=4.0)
    config.data.batch_size = 4
    config.eval.source = common.folder(str(roots[1]), split="validation")
    return config


def test_a_mix_trains_on_each_source_in_its_own_way(roots):
    config = mixture(roots)
    check_config.check(config)
    sources, validation = training_data.make_sources(config)
    assert list(sources) == ["main", "streets"] and len(validation) == 2
    batches = training_data.make_batches(config, sharding.make_mesh(), sources)
    widths = []
    for _ in range(8):
        batch = next(batches)
        assert batch["image"].shape == (
            4,
            *((16, 64) if batch["image"].shape[2] == 64 else (32, 48)),
            3,
        )
        widths.append(batch["image"].shape[2])
        if widths[-1] == 64:
            assert 0 < batch["depth"].max() <= 4
    assert widths.count(64) == 2


def test_every_source_of_a_mix_is_kept_apart_from_the_evaluation(roots):
    config = mixture(roots)
    config.eval.source.split = ""
    with pytest.raises(ValueError, match="8 samples are both trained and evaluated on"):
        training_data.make_sources(config)
    config = mixture(roots)
    config.eval.source.depth_scale = 256.0
    with pytest.raises(ValueError, match="two ways: depth_scale"):
        training_data.make_sources(config)


def test_problems_of_all_sources_are_told_at_once(roots):
    config = mixture(roots)
    config.data.source.path = "/nowhere"
    config.data.also.streets.source.path = "/nor/here"
    with pytest.raises(SourceError) as error:
        training_data.make_sources(config)
    assert "/nowhere" in str(error.value) and "/nor/here" in str(error.value)


def test_settings_that_make_no_sense_are_told_at_once(roots):
    config = mixture(roots)
    config.data.crop = "left"
    config.data.flip = 2.0
    config.model.attention = "flash"
    config.data.batch_size = config.train.log_every = config.eval.every = 0
    config.eval.num_images = -3
    config.schedule.learning_rate = -1e-3
    config.data.also.streets.share = 1.0
    config.data.also["a/b"] = common.other(0.1, common.procedural(1, 10), 16, 16)
    config.data.also.main = common.other(0.1, common.folder("DIR"), 16, 16)
    with pytest.raises(ValueError) as error:
        check_config.check(config)
    for words in (
        "unknown data.crop 'left'",
        "unknown model.attention 'flash': choose one of ['auto', 'chunked']",
        "data.flip is a probability, not 2.0",
        "data.batch_size is at least 1, not 0",
        "train.log_every is at least 1, not 0",
        "eval.every is at least 1, not 0",
        "eval.num_images is at least 0, not -3",
        "schedule.learning_rate is at least 0, not -0.001",
        "data.also.a/b: a name of letters",
        "rendered scenes are made in whole batches",
        "'main' is what `data` itself is called",
        "sum to less than 1",
    ):
        assert words in str(error.value), words


@pytest.mark.parametrize("word", common.DATA_WORDS)
@pytest.mark.parametrize("config", [d2, stage1, stage2, cache])
def test_data_is_a_word_of_every_config(config, word):
    config = config.get_config(word)
    training_data.check(config)
    shares = {"tfds": (1.0,)}.get(word, (0.9, 0.1))
    np.testing.assert_allclose(training_data.shares(config), shares)
    settings = [part.source for part in training_data.parts(config).values()]
    if config.job == "train":
        settings.append(config.eval.source)
    for source in settings:
        # They fit the source's function: none is left over from the default that was replaced.
        given = {key: value for key, value in source.items() if key != "name"}
        inspect.signature(data.source_function(source.name)).bind(**given)


def test_what_a_student_encodes_itself_is_seen_in_its_settings():
    config = common.training("latent")
    config.model.encoder = "teacher"
    assert not training_data.encodes_itself(config)
    for key, value in (
        ("model.encoder", "own"),
        ("init", "runs/stage1/model"),
        ("autoencoder.path", "taesd"),
        ("trainable", ("unet/", "enc")),
        ("trainable", (".*/layers_0",)),
    ):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({key: value})
        assert training_data.encodes_itself(changed), key


def test_a_picture_is_not_evaluated_on_through_another_folder(tmp_path):
    write_pairs(tmp_path / "all/kitchen", 4)
    write_pairs(tmp_path / "all/office", 4)
    whole = data.make_source("folder", path=tmp_path / "all", depth_scale=1000.0)
    (tmp_path / "link").symlink_to(tmp_path / "all/kitchen")
    part = data.make_source("folder", path=tmp_path / "link", depth_scale=1000.0)
    other = data.make_source("folder", path=tmp_path / "all/office", depth_scale=1000.0)
    with pytest.raises(ValueError, match=r"4 samples are both .*kitchen/rgb/000.png the first"):
        apart.require_apart(whole, part)
    apart.require_apart(part, other)  # names alike, pictures not


def test_a_built_copy_of_what_is_evaluated_on_is_noticed(tmp_path, monkeypatch):
    """`d3epth data build folder` once of all pairs, once of those held out; and the pairs."""
    write_pairs(tmp_path / "pairs", 10)
    build = ["data", "build", "folder", str(tmp_path / "pairs"), "--out", str(tmp_path / "built")]
    build += ["--workers", "0", "--set", "depth_scale=1000"]
    assert cli.main([*build, "--split", "train"]) == 0
    assert cli.main([*build, "--set", "split=validation"]) == 0
    settings = {"path": tmp_path / "built", "dataset": "folder", "min_valid": 1}
    everything, held = (
        data.make_source("tfds", split=s, **settings) for s in ("train", "validation")
    )
    raw = {
        split: data.make_source("folder", path=tmp_path / "pairs", depth_scale=1000.0, split=split)
        for split in ("train", "validation")
    }
    assert len(everything) == 10 and len(held) == 2
    assert apart.origin(everything) == str((tmp_path / "pairs").resolve())
    for training, validation in ((everything, held), (everything, raw["validation"])):
        with pytest.raises(ValueError, match="2 samples are both trained and evaluated on"):
            apart.require_apart(training, validation)
    apart.require_apart(raw["train"], held)


def test_a_copy_of_a_copy_is_noticed(tmp_path):
    write_pairs(tmp_path / "pairs", 3)
    build = ["--out", str(tmp_path / "built"), "--workers", "0"]
    folder = ["folder", str(tmp_path / "pairs"), "--set", "depth_scale=1000", "--split", "train"]
    assert cli.main(["data", "build", *folder, *build, "--name", "one"]) == 0
    again = ["tfds:one/train", str(tmp_path / "built"), "--set", "min_valid=1"]
    assert cli.main(["data", "build", *again, *build, "--name", "two"]) == 0
    one, two = (
        data.make_source(f"tfds:{n}/train", path=tmp_path / "built", min_valid=1)
        for n in ("one", "two")
    )
    pairs = data.make_source("folder", path=tmp_path / "pairs", depth_scale=1000.0)
    for training, validation in ((one, two), (two, one), (two, pairs)):
        with pytest.raises(ValueError, match="3 samples are both trained and evaluated on"):
            apart.require_apart(training, validation)


def test_a_tfds_set_with_a_config_has_its_split_behind_the_last_slash():
    assert data.name_parts("tfds:nyu/labeled/train") == ("tfds", "nyu/labeled", "train")
    assert data.name_parts("tfds:nyu") == ("tfds", "nyu", "")
    assert data.name_parts("kitti") == ("kitti", "", "")


def test_built_scenes_are_told_apart_by_their_seed(tmp_path):
    built = {}
    for folder, seed in (("one", 7), ("again", 7), ("other", 8)):
        scenes = common.procedural(seed, 2, height=16, width=16)
        ablation.write_files(scenes, tmp_path / folder)
        settings = common.tfds(str(tmp_path / folder), "train", "scenes")
        built[folder] = data.make_source(**settings, min_valid=1)
    assert apart.origin(built["one"]) == "scenes of seed 7"
    apart.require_apart(built["one"], built["other"])
    with pytest.raises(ValueError, match="2 samples are both trained and evaluated on"):
        apart.require_apart(built["one"], built["again"])


def test_a_cache_of_what_has_no_folder_shares_none():
    source = object.__new__(CachedLatents)
    source.manifest = {"about": {"source": None}}  # as `apart.origin` says of it
    apart.require_apart(source, source)


def test_two_indexes_below_one_folder_may_share_names(tmp_path):
    for room in ("kitchen", "lab"):
        write_pairs(tmp_path / room, 3)
        entries = [{"rgb": f"rgb/{i:03}.png", "depth": f"depth/{i:03}.png"} for i in range(3)]
        (tmp_path / room / "index.json").write_text(json.dumps(entries))
    kitchen, lab = (
        data.make_source("folder", path=tmp_path, index=f"{r}/index.json", depth_scale=1000.0)
        for r in ("kitchen", "lab")
    )
    assert kitchen.name(0) == lab.name(0)
    apart.require_apart(kitchen, lab)


def test_scenes_of_one_seed_are_not_trained_and_evaluated_on():
    config = quickstart.stage1(tiny=True)
    config.eval.source.seed = config.data.source.seed
    with pytest.raises(ValueError, match="scenes of one seed"):
        training_data.make_sources(config)


def test_what_rendered_scenes_have_no_use_for_is_refused():
    config = quickstart.stage1(tiny=True)
    config.data.update(flip=1.0, crop="kitti", max_depth=1.0)
    config.data.filter.min_range = 99.0
    with pytest.raises(ValueError) as error:
        check_config.check(config)
    for key in ("flip=1.0", "crop=kitti", "max_depth=1.0", "filter.min_range=99.0"):
        assert f"data.{key} does nothing to rendered scenes" in str(error.value), key


def test_a_sources_name_alone_is_no_source():
    settings = dict(common.folder("DIR"))
    with pytest.raises(
        ValueError, match=r"'vkitti2' does not take depth_scale.*its settings are path"
    ):
        data.make_source(**settings | {"name": "vkitti2"})
    with pytest.raises(ValueError, match="'folder' needs path"):
        data.make_source("folder")


@pytest.mark.parametrize("stage", ["pixel", "latent"])
def test_data_without_depth_is_told_once(stage, roots, tmp_path, caplog):
    config = on_pairs(
        nano.teacher(tiny=True) if stage == "pixel" else nano.stage1(tiny=True), roots[0]
    )
    if stage == "latent":
        config.teacher.path, config.autoencoder.path = nano.SHIPPED_TEACHER, nano.SHIPPED_TEACHER
        config.loss.beta.gt = 1.0
    config.data.filter.min_range = 999.0  # metres
    config.train.update(steps=3, log_every=1)
    with caplog.at_level("WARNING", logger="d3epth_jax"):
        train.run(config, tmp_path)
    assert len([m for m in caplog.messages if "has depth to be compared with" in m]) == 1


def test_weights_of_a_variant_are_another_teacher():
    config = common.training("latent")
    config.teacher.path = "nano-teacher"
    plain = training_data.teacher_identity(config)
    assert plain.keys() == {"digest", "steps"}
    config.teacher.variant = "fp16"
    assert training_data.teacher_identity(config) == plain | {"variant": "fp16"}
