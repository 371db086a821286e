"""`d3epth data build`: exact, resumable to the bit, and never silently short."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets

from d3epth_jax import cli, data, data_cli
from d3epth_jax.data import build as building
from d3epth_jax.data import manifest
from d3epth_jax.data.sources.files import FileSource, Item, SourceError
from d3epth_jax.data.transforms import fit_to
from d3epth_jax.image import save_png
from tests.conftest import write_pairs


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs", 7)


def make(pairs, out, **settings):
    """A build of the pairs in three shards, in this process."""
    source = data.make_source("folder", path=pairs, depth_scale=1000.0)
    settings = {"dataset": "small", "origin": {"name": "folder"}, "shards": 3} | settings
    return building.build(source, out, **settings)


def checksums(folder) -> dict[str, str]:
    """Of all files below, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_read_is_what_the_source_gave(pairs, tmp_path):
    made = make(pairs, tmp_path / "out")
    source = data.make_source("folder", path=pairs, depth_scale=1000.0)
    built = data.make_source("tfds:small/train", path=tmp_path / "out")
    assert made["samples"] == len(built) == len(source) == 7
    for i in range(7):
        assert (built.name(i), built.group(i)) == (source.name(i), source.group(i))
        assert built.shape(i) == source.shape(i) and built.check(i) == []
        for key, value in source[i].items():
            np.testing.assert_array_equal(built[i][key], value)
            assert built[i][key].dtype == value.dtype


def test_tfds_reads_it_without_tensorflow(pairs, tmp_path):
    make(pairs, tmp_path)
    source = data.make_source("folder", path=pairs, depth_scale=1000.0)
    builder = tensorflow_datasets.builder_from_directory(tmp_path / "small" / "1.0.0")
    for records in (
        builder.as_data_source()["train"],
        tensorflow_datasets.data_source("small", split="train", data_dir=tmp_path),
    ):
        assert len(records) == 7
        for i, record in enumerate(records):
            np.testing.assert_array_equal(record["image"], source[i]["image"])
            np.testing.assert_array_equal(record["depth"], source[i]["depth"])
            assert record["depth"].dtype == np.float32
            assert record["name"].decode() == source.name(i)
            assert record["group"].decode() == source.group(i)
    assert "tensorflow" not in sys.modules


def test_samples_are_cropped_as_in_training_and_sizes_may_differ(tmp_path):
    pairs = tmp_path / "pairs"
    for size in ((32, 48), (40, 30)):
        write_pairs(pairs / "x".join(map(str, size)), 2, height=size[0], width=size[1])
    source = data.make_source("folder", path=pairs, depth_scale=1000.0)
    make(pairs, tmp_path / "native")
    native = data.make_source("tfds:small", path=tmp_path / "native")
    assert [native.shape(i) for i in range(4)] == [(32, 48)] * 2 + [(40, 30)] * 2
    make(pairs, tmp_path / "cropped", size=(16, 20))
    cropped = data.make_source("tfds:small", path=tmp_path / "cropped")
    for i in range(4):
        expected = fit_to(source[i], None, size=(16, 20), crop="center")
        assert cropped.shape(i) == (16, 20)
        for key, value in expected.items():
            np.testing.assert_array_equal(cropped[i][key], value)


def test_float_metres_keep_every_bit(tmp_path):
    depth = np.random.default_rng(0).random((6, 8, 1), np.float32) + np.float32(1e-3)
    sample = {"image": np.zeros((6, 8, 3), np.uint8), "depth": depth, "mask": depth > 0.1}
    file = tmp_path / "x.npy"
    file.touch()
    item = Item("a/b", "a", {"image": file, "depth": file})
    source = FileSource(tmp_path, [item], lambda item: sample)
    building.build(source, tmp_path, dataset="bits", origin={})
    read = data.make_source("tfds:bits", path=tmp_path)[0]
    assert read["depth"].tobytes() == np.where(depth > 0.1, depth, 0).astype("<f4").tobytes()
    np.testing.assert_array_equal(read["mask"], sample["mask"])


def test_any_number_of_workers_gives_the_same_bytes(pairs, tmp_path):
    make(pairs, tmp_path / "one")
    make(pairs, tmp_path / "two", workers=2)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")
    assert sorted(os.listdir(tmp_path / "one" / "small" / "1.0.0")) == [
        "dataset_info.json",
        "features.json",
        "manifest-train.json",
        *(f"small-train.array_record-{i:05d}-of-00003" for i in range(3)),
    ]


class Killed(BaseException):
    pass


def test_killed_at_any_rename_it_ends_identical_and_reads_only_when_done(
    pairs, tmp_path, monkeypatch
):
    """A rename is what makes anything count; between two of them nothing changes."""
    make(pairs, tmp_path / "undisturbed")
    expected, replace, moment = checksums(tmp_path / "undisturbed"), os.replace, 0
    while True:
        out, left = tmp_path / str(moment), moment

        def dying(*names):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            replace(*names)

        monkeypatch.setattr(os, "replace", dying)
        try:
            make(pairs, out)
        except Killed:
            monkeypatch.setattr(os, "replace", replace)
            with pytest.raises(SourceError, match="data build"):
                data.make_source("tfds:small", path=out)
            make(pairs, out)
            assert checksums(out) == expected
            moment += 1
        else:
            break
    assert moment == 1 + 2 * 3 + 3  # plan; each shard's entry and itself; the set's three files


def kill_and_resume(tmp_path, kills: int) -> None:
    """SIGKILL at random moments of one build after another, each then finished."""
    pairs = write_pairs(tmp_path / "pairs", 40, height=240, width=320)

    def start(out):
        command = [sys.executable, "-m", "d3epth_jax", "data", "build", "folder", str(pairs)]
        command += ["--set", "depth_scale=1000", "--out", str(out), "--name", "small"]
        command += ["--split", "train"]
        command += ["--shards", "8", "--workers", "1", "--height", "230", "--width", "300"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait_for_books(out, process):
        while process.poll() is None and not list(out.rglob("plan.json")):
            time.sleep(0.002)

    whole = start(tmp_path / "undisturbed")
    wait_for_books(tmp_path / "undisturbed", whole)
    began = time.monotonic()
    assert whole.wait(100) == 0, whole.stderr.read()
    duration = time.monotonic() - began
    expected = checksums(tmp_path / "undisturbed")
    assert len(expected) == 8 + 3
    chance = random.Random(0)
    for number in range(kills):
        out = tmp_path / str(number)
        process = start(out)
        wait_for_books(out, process)
        time.sleep(chance.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        process.wait(100)
        if not (out / "small" / "1.0.0" / "dataset_info.json").exists():
            with pytest.raises(SourceError, match="data build"):
                data.make_source("tfds:small", path=out)
        again = start(out)
        assert again.wait(100) == 0, again.stderr.read()
        assert checksums(out) == expected


def test_killed_at_random_it_ends_identical(tmp_path):
    kill_and_resume(tmp_path, 2)


@pytest.mark.slow
def test_killed_ten_times_it_ends_identical(tmp_path):
    kill_and_resume(tmp_path, 10)


@pytest.mark.parametrize("harm", ["missing", "short", "changed"])
def test_a_damaged_set_is_refused_and_building_again_mends_it(pairs, tmp_path, harm):
    make(pairs, tmp_path / "out")
    expected = checksums(tmp_path / "out")
    shard = tmp_path / "out/small/1.0.0/small-train.array_record-00001-of-00003"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    {
        "missing": shard.unlink,
        "short": lambda: os.truncate(shard, 70000),
        "changed": lambda: shard.write_bytes(content),
    }[harm]()
    if harm != "changed":  # which only a checksum sees: `data check`
        with pytest.raises(SourceError, match=r"00001-of-00003: .*; run the same `d3epth data"):
            data.make_source("tfds:small", path=tmp_path / "out")
    make(pairs, tmp_path / "out")
    assert checksums(tmp_path / "out") == expected


def test_other_settings_and_another_source_are_refused(pairs, tmp_path):
    make(pairs, tmp_path / "out")
    for settings, said in (
        ({"size": (16, 16)}, r"size is \[16, 16\] now, was None"),
        ({"shards": 2}, "shards is 2 now, was 3"),
        ({"origin": {"name": "x"}}, "source is {'name': 'x'} now"),
        ({"filters": {"min_range": 1.0}}, "filters is"),
    ):
        with pytest.raises(SourceError, match=said):
            make(pairs, tmp_path / "out", **settings)
    (pairs / "rgb" / "006.png").rename(pairs / "rgb" / "007.png")
    (pairs / "depth" / "006.png").rename(pairs / "depth" / "007.png")
    with pytest.raises(SourceError, match="source_names is"):
        make(pairs, tmp_path / "out")


def test_a_started_build_is_held_to_its_settings_too(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "write_shard", lambda job, number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(pairs, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(SourceError, match="size is"):
        make(pairs, tmp_path / "out", size=(16, 16))


def test_two_builds_at_once_are_refused(pairs, tmp_path):
    def meanwhile(done):
        with pytest.raises(SourceError, match="another process is building it now"):
            make(pairs, tmp_path / "out")

    make(pairs, tmp_path / "out", progress=meanwhile)


def test_splits_share_a_folder(pairs, tmp_path):
    for split, shards in (("validation", 1), ("train", 2)):
        source = data.make_source("folder", path=pairs, depth_scale=1000.0, split=split)
        settings = {"split": split, "shards": shards, "origin": {"split": split}}
        building.build(source, tmp_path, dataset="small", **settings)
        if split == "validation":
            manifest.work_folder(tmp_path / "small" / "1.0.0", "later").mkdir()
            with pytest.raises(SourceError, match="the build of later is not finished"):
                data.make_source("tfds:small/later", path=tmp_path)
            with pytest.raises(SourceError, match="no split 'train'; it has validation"):
                data.make_source("tfds:small", path=tmp_path)
    both = data.make_source("tfds:small/train+validation", path=tmp_path)
    names = [both.name(i) for i in range(len(both))]
    assert names == ["000", "001", "002", "003", "005", "006", "004"]
    np.testing.assert_array_equal(
        both[6]["depth"], data.make_source("tfds:small/validation", path=tmp_path)[0]["depth"]
    )


def test_splits_that_end_together_are_both_told(pairs, tmp_path, monkeypatch):
    describe, held = building._dataset_info, {"split": "validation", "shards": 1}
    make(pairs, tmp_path / "apart", **held)

    def meanwhile(folder, dataset):
        told = describe(folder, dataset)
        if held:
            shutil.copy(tmp_path / "apart/small/1.0.0/manifest-validation.json", folder)
            held.clear()
        return told

    monkeypatch.setattr(building, "_dataset_info", meanwhile)
    make(pairs, tmp_path / "out")
    info = json.loads((tmp_path / "out/small/1.0.0/dataset_info.json").read_text())
    assert sorted(split["name"] for split in info["splits"]) == ["train", "validation"]


def test_unreadable_samples_are_all_told_and_nothing_is_finished(pairs, tmp_path):
    source = data.make_source("folder", path=pairs, depth_scale=1000.0)
    kept = {}
    for name in ("001", "005"):  # after the source has looked
        path = pairs / "rgb" / f"{name}.png"
        kept[path] = path.read_bytes()
        path.write_bytes(kept[path][: len(kept[path]) // 2])
    settings = {"dataset": "small", "origin": {"name": "folder"}, "shards": 3}
    with pytest.raises(SourceError) as caught:
        building.build(source, tmp_path / "out", **settings)
    assert [p.split(":")[0] for p in caught.value.problems[:-1]] == ["001", "005"]
    assert str(pairs / "rgb" / "001.png") in str(caught.value)
    with pytest.raises(SourceError, match="unfinished build of train"):
        data.make_source("tfds:small", path=tmp_path / "out")

    made = building.build(source, tmp_path / "out", **settings, on_error="skip")
    left_out = [bad["name"] for shard in made["shards"].values() for bad in shard["unreadable"]]
    assert left_out == ["001", "005"] and made["samples"] == 5 and made["unreadable"] == 2
    built = data.make_source("tfds:small", path=tmp_path / "out")
    assert [built.name(i) for i in range(5)] == ["000", "002", "003", "004", "006"]

    for path, content in kept.items():  # mended, they come in
        path.write_bytes(content)
    assert building.build(source, tmp_path / "out", **settings)["samples"] == 7
    make(pairs, tmp_path / "undisturbed")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "undisturbed")


def test_filters_drop_by_name_and_reason(pairs, tmp_path):
    save_png(pairs / "rgb" / "002.png", np.full((32, 48, 3), 90, np.uint8))
    counts = np.full((32, 48), 2000, np.uint16)
    save_png(pairs / "depth" / "003.png", counts)
    counts[:4], counts[4:] = 0, np.linspace(1000, 4000, 48)
    save_png(pairs / "depth" / "004.png", counts)
    filters = {"min_range": 0.5, "min_contrast": 10, "max_invalid": 0.03}
    made = make(pairs, tmp_path / "out", filters=filters)
    dropped = {d["name"]: d["reason"] for e in made["shards"].values() for d in e["dropped"]}
    assert dropped == {
        "002": "the picture spans 0 of 255 counts (min_contrast 10)",
        "003": "depth spans 0 m (min_range 0.5)",
        "004": "12.5 % of its pixels have no depth (max_invalid 0.03)",
    }
    assert len(data.make_source("tfds:small", path=tmp_path / "out")) == made["samples"] == 4


def test_a_shard_whose_samples_are_all_dropped_is_empty(pairs, tmp_path):
    for name in ("000", "001"):
        save_png(pairs / "rgb" / f"{name}.png", np.full((32, 48, 3), 90, np.uint8))
    make(pairs, tmp_path / "out", filters={"min_contrast": 10})
    built = data.make_source("tfds:small", path=tmp_path / "out")
    assert [built.name(i) for i in range(len(built))] == ["002", "003", "004", "005", "006"]
    assert (
        len(tensorflow_datasets.data_source("small", split="train", data_dir=tmp_path / "out")) == 5
    )
    with pytest.raises(SourceError, match="no sample is left"):
        make(pairs, tmp_path / "none", filters={"min_range": 1e9})


def test_depth_that_is_marked_as_known_must_be_depth(tmp_path):
    sample = {"image": np.zeros((4, 4, 3), np.uint8), "depth": np.zeros((4, 4, 1), np.float32)}
    with pytest.raises(ValueError, match="depth must be float32, finite and positive"):
        building.to_record(sample | {"mask": np.ones((4, 4, 1), bool)}, "a", "b")


@pytest.mark.parametrize(
    "settings", [{"dataset": "A b"}, {"split": "x/y"}, {"shards": 8}, {"crop": "random"}]
)
def test_senseless_arguments_are_refused(pairs, tmp_path, settings):
    with pytest.raises(
        ValueError,
        match=r"lower case|crop must be one|from 1 to the number of samples 7",
    ):
        make(pairs, tmp_path, **settings)


def test_the_command_builds_and_says_what(pairs, tmp_path, capsys):
    (pairs / "depth" / "003.png").unlink()
    command = ["data", "build", "folder", str(pairs), "--out", str(tmp_path / "out")]
    command += ["--set", "depth_scale=1000", "--workers", "0", "--name", "mine"]
    assert cli.main(command) == 2  # "train" would hold what is held out
    assert "give --split NAME, such as train, or --set split=" in capsys.readouterr().err
    command[3:3] = ["--split", "train"]
    assert cli.main(command) == 1
    assert "003.png: missing depth" in capsys.readouterr().err
    assert cli.main([*command, "--on-error", "skip"]) == 0
    assert "6 samples in 1 shards; 0 dropped by filters, 1 problem(s)" in capsys.readouterr().out
    folder = tmp_path / "out" / "mine" / "1.0.0"
    assert "003.png: missing depth" in manifest.read_manifests(folder)["train"]["unlisted"][0]
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["splits"][0]["shardLengths"] == ["6"]
    assert cli.main([*command, "--on-error", "skip", "--height", "20"]) == 2
    assert "--height and --width belong together" in capsys.readouterr().err
    assert cli.main([*command, "--on-error", "skip", "--crop", "kitti"]) == 2
    assert "--crop kitti needs --height and --width" in capsys.readouterr().err
    command[-1] = "another"
    assert cli.main([*command, "--set", "on_error=skip"]) == 0
    assert "1 problem(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source, given, named",
    [
        ("nyu", [], "test"),
        ("nyu", ["--set", "split=train"], "train"),
        ("diode", [], "val"),
        ("hypersim", ["--split", "mine"], "mine"),
        ("tfds:some", [], "train"),
        ("tfds:some/validation", ["--set", "split=train"], "validation"),  # what is read
        ("ibims", [], None),
        ("vkitti2", ["--set", "split="], None),
    ],
)
def test_a_split_is_called_as_in_its_source(source, given, named, tmp_path, monkeypatch, capsys):
    told = {}

    def build(*_, split, **__):
        told["split"] = split
        raise ValueError("far enough")

    monkeypatch.setattr(building, "build", build)
    monkeypatch.setattr(data_cli, "_open", lambda *_, **__: ([], []))
    command = ["data", "build", source, str(tmp_path), "--out", str(tmp_path / "out"), *given]
    assert cli.main(command) == 2
    assert told.get("split") == named
    assert ("far enough" if named else "give --split NAME") in capsys.readouterr().err
