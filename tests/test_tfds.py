"""Data sets of TFDS as sources, read without TensorFlow; written here by TFDS' own features."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from d3epth_jax import data
from d3epth_jax.data.sources.files import SourceError
from tests.conftest import scenes

F = tfds.features


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def write_set(root, name, features, splits, *, form="array_record", version="1.0.0"):
    """{split: [[example of shard 0, ...], ...]} as TFDS would have prepared it."""
    folder = root / name / version
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    described = []
    for split, shards in splits.items():
        for number, examples in enumerate(shards):
            shard = f"{name}-{split}.{form}-{number:05d}-of-{len(shards):05d}"
            writer = ArrayRecordWriter(str(folder / shard), "group_size:1")
            for example in examples:
                writer.write(features.serialize_example(example))
            writer.close()
        described.append(
            {
                "name": split,
                "shardLengths": [str(len(examples)) for examples in shards],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": version, "fileFormat": form, "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


DATA = scenes(5, height=24, width=32)
NYU = F.FeaturesDict(
    {"image": F.Image(shape=(24, 32, 3)), "depth": F.Tensor(shape=(24, 32), dtype=np.float16)}
)


def nyu_like(i):
    depth = np.where(DATA["mask"][i], DATA["depth"][i], 0)[..., 0].astype(np.float16)
    return {"image": png(DATA["image"][i]), "depth": depth}


@pytest.fixture
def nyu(tmp_path):
    """Like nyu_depth_v2: depth is a plain Tensor of float16 metres, [H, W]."""
    splits = {
        "train": [[nyu_like(0), nyu_like(1)], [], [nyu_like(2)]],
        "validation": [[nyu_like(3)]],
    }
    write_set(tmp_path, "nyu_like", NYU, splits)
    return tmp_path


def test_samples_are_exact_and_named_by_place(nyu):
    source = data.make_source("tfds:nyu_like/train", path=nyu)
    assert len(source) == 3
    assert [source.name(i) for i in range(3)] == ["train/000000", "train/000001", "train/000002"]
    assert source.group(0) == "nyu_like" and source.shape(2) == (24, 32)
    for i in range(3):
        sample = source[i]
        known = DATA["mask"][i]
        np.testing.assert_array_equal(sample["image"], DATA["image"][i])
        np.testing.assert_array_equal(sample["mask"], known)
        metres = np.where(known, DATA["depth"][i], 0).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(sample["depth"], metres)
        assert sample["depth"].dtype == np.float32 and source.check(i) == []
    assert "tensorflow" not in sys.modules


def test_splits_of_splits_keep_their_names(nyu):
    part = data.make_source("tfds", path=nyu, dataset="nyu_like", split="train[1:]+validation")
    assert [part.name(i) for i in range(len(part))] == [
        "train/000001",
        "train/000002",
        "validation/000000",
    ]
    np.testing.assert_array_equal(part[2]["image"], DATA["image"][3])
    np.testing.assert_array_equal(part[0]["image"], DATA["image"][1])


def test_a_filename_list_narrows(nyu, tmp_path):
    (tmp_path / "list.txt").write_text("train/000002\n")
    source = data.make_source("tfds:nyu_like", path=nyu, filename_list=str(tmp_path / "list.txt"))
    np.testing.assert_array_equal(source[0]["image"], DATA["image"][2])


def test_workers_get_it_closed_and_open_it_themselves(nyu):
    source = data.make_source("tfds:nyu_like", path=nyu)
    first = source[1]
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[1]["depth"], first["depth"])


def test_sixteen_bit_pictures_are_counts_and_features_may_be_nested(tmp_path):
    features = F.FeaturesDict(
        {
            "left": {
                "rgb": F.Image(shape=(None, None, 3)),
                "z": F.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
            }
        }
    )
    counts = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 60
    example = {"left": {"rgb": png(DATA["image"][0]), "z": png(counts)}}
    write_set(tmp_path, "pairs", features, {"train": [[example]]})
    settings = {"image": "left/rgb", "depth": "left/z", "depth_scale": 1000.0}
    source = data.make_source("tfds", path=tmp_path, dataset="pairs", **settings)
    np.testing.assert_array_equal(
        source[0]["depth"][..., 0], counts.astype(np.float32) / np.float32(1000)
    )
    assert not source[0]["mask"][0, 0, 0] and source.shape(0) == (24, 32)


def test_float_pictures_and_grey_pictures(tmp_path):
    features = F.FeaturesDict(
        {
            "image": F.Image(shape=(24, 32, 1)),
            "depth": F.Image(shape=(24, 32, 1), dtype=np.float32),
        }
    )
    depth = DATA["depth"][0]
    bits = F.Image(shape=(24, 32, 4))  # what TFDS makes of float32, without TensorFlow
    written = F.FeaturesDict({"image": F.Image(shape=(24, 32, 1)), "depth": bits})
    example = {"image": png(DATA["image"][0][..., 0]), "depth": png(depth.view(np.uint8))}
    folder = write_set(tmp_path, "floats", written, {"train": [[example]]})
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    sample = data.make_source("tfds:floats", path=tmp_path)[0]
    np.testing.assert_array_equal(sample["depth"], depth)
    np.testing.assert_array_equal(sample["image"][..., 2], DATA["image"][0][..., 0])


def test_arrays_that_are_not_encoded_may_have_an_alpha_channel(tmp_path):
    features = F.FeaturesDict(
        {
            "image": F.Tensor(shape=(4, 5, 4), dtype=np.uint8),
            "depth": F.Tensor(shape=(4, 5), dtype=np.float32),
        }
    )
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 4), np.uint8)
    example = {"image": picture, "depth": np.ones((4, 5), np.float32)}
    write_set(tmp_path, "alpha", features, {"train": [[example]]})
    sample = data.make_source("tfds:alpha", path=tmp_path)[0]
    np.testing.assert_array_equal(sample["image"], picture[..., :3])


def test_the_newest_version_unless_another_is_named(tmp_path):
    for version, count in (("1.0.0", 1), ("1.10.0", 3), ("1.9.0", 2)):
        examples = [nyu_like(i) for i in range(count)]
        write_set(tmp_path, "versions", NYU, {"train": [examples]}, version=version)
    assert len(data.make_source("tfds:versions", path=tmp_path)) == 3
    assert len(data.make_source("tfds:versions:1.9.0", path=tmp_path)) == 2
    assert len(data.make_source("tfds", path=tmp_path / "versions" / "1.0.0")) == 1


def test_tfrecord_says_how_to_prepare_it(tmp_path):
    write_set(tmp_path, "old", NYU, {"train": [[nyu_like(0)]]}, form="tfrecord")
    with pytest.raises(SourceError, match=r"tfds build old --file_format=array_record"):
        data.make_source("tfds:old", path=tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "tfds:nyu"}, "'nyu' is not in it; there are nyu_like/1.0.0"),
        ({"name": "tfds"}, "it has no dataset_info.json; there are nyu_like/1.0.0"),
        ({"name": "tfds:../x"}, "is no name of a data set"),
        ({"name": "tfds:nyu_like/test"}, "no split 'test'; it has train, validation"),
        ({"depth": "z"}, "no feature 'z'; set `depth` to one of depth, image"),
        ({"depth": "image"}, r"feature 'image' of shape \[24, 32, 3\] is no depth"),
        ({"image": "depth"}, r"feature 'depth' of shape \[24, 32\] is no image"),
    ],
)
def test_what_is_wrong_is_said(nyu, settings, said):
    with pytest.raises(SourceError, match=said):
        data.make_source(**{"name": "tfds:nyu_like", "path": nyu} | settings)


@pytest.mark.parametrize(
    ("kind", "feature", "said"),
    [
        ("image", F.Tensor(shape=(24, 32, 3), dtype=np.float32), "of float32 is no image: set"),
        ("image", F.Tensor(shape=(24, 32, 3), dtype=np.uint16), "of uint16 is no image: set"),
        ("image", F.Image(shape=(24, 32, 1), dtype=np.float32), "of float32 is no image: set"),
        ("depth", F.Image(shape=(24, 32, 1)), "of uint8 is no depth: 8 bits are a visualisation"),
        ("depth", F.Tensor(shape=(24, 32), dtype=np.uint8), "of uint8 is no depth: 8 bits"),
        ("depth", F.Tensor(shape=(24, 32), dtype=np.bool_), "of bool is no depth: 8 bits"),
        ("depth", F.Tensor(shape=(24, 32), dtype=np.str_), "of object is no depth: set"),
    ],
)
def test_numbers_of_another_kind_are_refused(tmp_path, kind, feature, said):
    folder = write_set(tmp_path, "odd", NYU, {"train": [[nyu_like(0)]]})
    features = F.FeaturesDict({**NYU, kind: feature})
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    with pytest.raises(SourceError, match=f"feature '{kind}' {said}"):
        data.make_source("tfds:odd", path=tmp_path)


def test_pictures_may_be_plain_or_of_16_bits(tmp_path):
    plain = F.Tensor(shape=(24, 32, 3), dtype=np.uint8)
    deep = F.Image(shape=(24, 32, 1), dtype=np.uint16, encoding_format="png")
    counts = np.full((24, 32), 32896, np.uint16)
    for name, feature, value in (("plain", plain, DATA["image"][0]), ("deep", deep, png(counts))):
        features = F.FeaturesDict({**NYU, "image": feature})
        write_set(tmp_path, name, features, {"train": [[nyu_like(0) | {"image": value}]]})
        expected = DATA["image"][0] if name == "plain" else np.full((24, 32, 3), 128)
        picture = data.make_source(f"tfds:{name}", path=tmp_path)[0]["image"]
        np.testing.assert_array_equal(picture, expected)


def test_only_tfds_takes_a_name_behind_a_colon(nyu):
    with pytest.raises(ValueError, match="only tfds:NAME does"):
        data.make_source("folder:x", path=nyu)


def test_missing_shard_and_damaged_record_are_named(nyu):
    folder = nyu / "nyu_like" / "1.0.0"
    shard = folder / "nyu_like-train.array_record-00002-of-00003"
    content = bytearray(shard.read_bytes())
    content[500:600] = bytes(100)
    shard.write_bytes(content)
    source = data.make_source("tfds:nyu_like", path=nyu)
    assert source.check(1) == []
    assert f"{shard}, record 0: unreadable" in source.check(2)[0]
    shard.unlink()
    with pytest.raises(SourceError, match="00002-of-00003: missing"):
        data.make_source("tfds:nyu_like", path=nyu)
