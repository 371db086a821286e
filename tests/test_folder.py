import csv
import json
import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.data.sources.folder import folder, read_depth

SHAPE = (12, 16)


def write_pair(root, source, name, *, depth=2.0, shape=SHAPE, depth_shape=SHAPE, suffix=".png"):
    """A grey picture and a plane of `depth` metres, in millimetres where it is a PNG."""
    for kind in ("rgb", "depth"):
        (root / source / kind).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", shape[::-1], (90, 90, 90)).save(root / source / "rgb" / f"{name}.png")
    path = root / source / "depth" / f"{name}{suffix}"
    if suffix == ".npy":
        np.save(path, np.full(depth_shape, depth, np.float32))
    else:
        Image.fromarray(np.full(depth_shape, depth * 1000, np.uint16)).save(path)


def write_index(root, entries, name="index.json"):
    if name.endswith(".json"):
        (root / name).write_text(json.dumps(entries))
    else:
        with open(root / name, "w", newline="") as file:
            writer = csv.DictWriter(file, sorted({key for entry in entries for key in entry}))
            writer.writeheader()
            writer.writerows(entries)


def entry(source, stem, **fields):
    pair = {"source": source, "rgb": f"rgb/{stem}.png", "depth": f"depth/{stem}.png"}
    return {**pair, "depth_scale": 1000, **fields}


def test_real_pairs_as_they_are(shared):
    source = folder(shared / "rgbd")
    index = json.loads((shared / "rgbd" / "index.json").read_text())
    assert len(source) == len(index) == 65
    assert len({source.group(i) for i in range(65)}) == 7
    for i, expected in enumerate(index):
        sample = source[i]
        size = expected["h"], expected["w"]
        assert source.shape(i) == size
        assert source.name(i) == f"{expected['source']}/{expected['name']}"
        assert sample["image"].shape == (*size, 3) and sample["image"].dtype == np.uint8
        assert sample["depth"].shape == (*size, 1) and sample["depth"].dtype == np.float32
        assert sample["mask"].shape == (*size, 1) and sample["mask"].dtype == bool
        known = sample["depth"][sample["mask"]]
        figures = known.min(), np.median(known), known.max(), sample["mask"].mean()
        wanted = [expected[key] for key in ("min_m", "median_m", "max_m", "valid")]
        # The index is rounded to three (metres) and four decimals.
        np.testing.assert_allclose(figures[:3], wanted[:3], atol=6e-4)
        np.testing.assert_allclose(figures[3], wanted[3], atol=6e-5)


def test_all_problems_at_once_before_training(tmp_path):
    for name in ("good", "lonely", "sizes", "empty", "scale", "eight", "torn"):
        write_pair(tmp_path, "a", name)
    (tmp_path / "a/depth/lonely.png").unlink()
    write_pair(tmp_path, "a", "sizes", depth_shape=(12, 15))
    write_pair(tmp_path, "a", "empty", depth=0)
    Image.new("L", SHAPE[::-1], 9).save(tmp_path / "a/depth/eight.png")
    torn = (tmp_path / "a/rgb/torn.png").read_bytes()
    (tmp_path / "a/rgb/torn.png").write_bytes(torn[:50])
    names = ("good", "lonely", "sizes", "empty", "eight", "torn", "absent")
    entries = [entry("a", name) for name in names]
    entries.append(entry("a", "scale", depth_scale=0.001))
    write_index(tmp_path, entries)

    with pytest.raises(SourceError) as caught:
        folder(tmp_path)
    text = str(caught.value)
    assert len(caught.value.problems) == 8
    for expected in (
        "lonely.png: missing depth",
        "absent.png: missing image",
        "absent.png: missing depth",
        "sizes.png: picture is 16x12 but its depth",
        "15x12",
        "empty.png: no valid pixel(s), 16 are needed",
        "scale.png: median depth 2e+06 m is implausible; depth_scale 0.001 is probably wrong",
        "eight.png: Pillow mode 'L', not 16-bit",
        "torn.png: damaged or truncated",
    ):
        assert expected in text
    assert "good" not in text


def test_skipping_is_counted_and_logged_by_name(tmp_path, caplog):
    for name in ("0", "1", "2"):
        write_pair(tmp_path, "a", name)
    write_pair(tmp_path, "a", "1", depth=0)
    with caplog.at_level(logging.WARNING):
        source = folder(tmp_path, depth_scale=1000, on_error="skip")
    assert [source.name(i) for i in range(len(source))] == ["a/0", "a/2"]
    assert "1 of 3 samples skipped" in caplog.text and "depth/1.png: no valid pixel" in caplog.text

    for name in ("0", "2"):
        write_pair(tmp_path, "a", name, depth=0)
    with pytest.raises(SourceError, match="3 problem"):
        folder(tmp_path, depth_scale=1000, on_error="skip")


def test_folders_without_an_index(tmp_path):
    write_pair(tmp_path, "b/indoor", "x")
    write_pair(tmp_path, "a", "y", suffix=".npy", depth=3.5)
    (tmp_path / "a/rgb/notes.txt").write_text("no picture")
    source = folder(tmp_path, depth_scale=500)
    assert [source.name(i) for i in range(2)] == ["a/y", "b/indoor/x"]
    assert [source.group(i) for i in range(2)] == ["a", "b/indoor"]
    assert source[0]["depth"][0, 0, 0] == 3.5  # .npy is in metres, whatever the scale
    assert source[1]["depth"][0, 0, 0] == 4.0

    alone = folder(tmp_path / "a")
    assert alone.name(0) == "y" and alone.group(0) == "a"

    (tmp_path / "a/depth/y.npy").rename(tmp_path / "a/depth/z.npy")
    with pytest.raises(SourceError) as caught:
        folder(tmp_path)
    text = str(caught.value)
    assert "rgb/y.png: missing depth" in text and "depth/z.npy: missing image" in text
    assert "x.png: no depth_scale" in text

    (tmp_path / "nothing").mkdir()
    with pytest.raises(SourceError, match="no pairs"):
        folder(tmp_path / "nothing")
    with pytest.raises(SourceError, match="no such folder"):
        folder(tmp_path / "nowhere")


def test_scenes_below_rgb_and_depth(tmp_path):
    write_pair(tmp_path, "all/s2", "x")
    write_pair(tmp_path, "all/s1/cam0", "x")
    write_pair(tmp_path, "all/s1/cam0", "y.left", suffix=".npy")
    for kind in ("rgb", "depth"):
        for scene in ("s2", "s1/cam0"):
            (tmp_path / "set" / kind / scene).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "all" / scene / kind).rename(tmp_path / "set" / kind / scene)
    write_pair(tmp_path / "set", "rgb/s3", "x")  # rgb/ and depth/ of its own
    source = folder(tmp_path / "set", depth_scale=1000)
    names = ["s1/cam0/x", "s1/cam0/y.left", "s2/x", "rgb/s3/x"]
    assert [source.name(i) for i in range(len(source))] == names
    assert [source.group(i) for i in range(3)] == ["s1/cam0", "s1/cam0", "s2"]
    assert {file.parent.name for i in range(2) for file in source.files(i).values()} == {"cam0"}
    above = folder(tmp_path, depth_scale=1000)
    assert [above.name(i) for i in range(len(above))] == [f"set/{name}" for name in names]

    (tmp_path / "set/rgb/night").symlink_to("s2")  # one of the two may be shared
    write_pair(tmp_path, "all", "x")
    (tmp_path / "all/depth").rename(tmp_path / "set/depth/night")
    source = folder(tmp_path / "set", depth_scale=1000)
    assert sorted(source.name(i) for i in range(len(source))) == sorted([*names, "night/x"])

    (tmp_path / "set/depth/s2").rename(tmp_path / "set/depth/s3")
    with pytest.raises(SourceError) as caught:
        folder(tmp_path / "set", depth_scale=1000)
    wanted = tmp_path / "set/depth/s2/x"
    assert f"rgb/s2/x.png: missing depth {wanted}.png or .npy" in str(caught.value)
    assert "depth/s3/x.png: missing image" in str(caught.value)


def test_what_lies_below_pairs_moves_none_of_them(tmp_path, caplog):
    for name in ("a", "z"):
        write_pair(tmp_path, "", name)
    write_pair(tmp_path, "rgb/scene", "inner")
    write_pair(tmp_path, ".Trash-1000/files/old", "deleted")
    previews = [f"{kind}/more/.previews/a.png" for kind in ("rgb", "depth")]
    sizes = [f"{kind}/half/a.png" for kind in ("rgb", "depth")]
    for unrelated in ("depth/previews/a.png", "depth/previews/a.npy", *previews, *sizes):
        (tmp_path / unrelated).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", SHAPE[::-1], 9).save(tmp_path / unrelated, "png")
    source = folder(tmp_path, depth_scale=1000)
    assert [source.name(i) for i in range(len(source))] == ["a", "z", "rgb/scene/inner"]
    # What may be pairs that were meant is told: "half", and neither previews nor hidden folders.
    (told,) = [record.getMessage() for record in caplog.records]
    assert "so those in 1 folder(s) below them are not read: half. If" in told


def test_links_to_folders_are_followed_once(tmp_path):
    root, far = tmp_path / "set", tmp_path / "far"
    for name in range(4):
        write_pair(root, "real", str(name))
        write_pair(far, "room", str(name))
    write_pair(root, "mixed", "x")
    (root / "mixed/rgb").rename(far / "pictures")
    (root / "mixed/rgb").symlink_to(far / "pictures")
    names = ["mixed/x", *(f"real/{i}" for i in range(4))]

    def found():
        source = folder(root, depth_scale=1000)
        assert all(file.is_file() for i in range(len(source)) for file in source.files(i).values())
        return [source.name(i) for i in range(len(source))]

    assert found() == names
    # One more name of what is there, though the first in order, and ways back to where one came.
    (root / "0").symlink_to(root / "real")
    (root / "real/loop").symlink_to("..")
    (root / "real/depth/loop").symlink_to(".")
    (root / "up").symlink_to(tmp_path)
    (far / "room/home").symlink_to(root)
    assert found() == names
    (root / "linked").symlink_to(far / "room")
    assert found() == [*names, *(f"linked/{i}" for i in range(4))]


def test_csv_index_elsewhere_with_default_scale(tmp_path):
    write_pair(tmp_path, "a", "x")
    entries = [
        {"source": "scene", "rgb": "a/rgb/x.png", "depth": "a/depth/x.png", "depth_scale": ""},
        {"source": "a", "rgb": "rgb/x.png", "depth": "depth/x.png", "depth_scale": "500"},
    ]
    write_index(tmp_path, entries, "pairs.csv")
    source = folder(tmp_path, index="pairs.csv", depth_scale=250)
    assert [source[i]["depth"][0, 0, 0] for i in range(2)] == [8.0, 4.0]
    assert [source.group(i) for i in range(2)] == ["scene", "a"]


def test_an_index_cannot_leave_the_folder(tmp_path):
    write_pair(tmp_path, "a", "x")
    write_pair(tmp_path, "secret", "x")
    evil = [
        entry("a", "x", rgb="../secret/rgb/x.png"),
        entry("a", "x", depth=str(tmp_path / "secret/depth/x.png")),
        entry("../secret", "x"),
        entry("a", "x", name="../../x"),
        entry("a", "x", rgb="C:x.png"),
        entry("a", "x", rgb="..\\secret\\rgb\\x.png"),
    ]
    write_index(tmp_path / "a", [entry("", "x"), *evil])
    with pytest.raises(SourceError) as caught:
        folder(tmp_path / "a")
    assert len(caught.value.problems) == len(evil)
    assert all("may leave the folder" in problem for problem in caught.value.problems)


def test_a_malformed_index(tmp_path):
    write_pair(tmp_path, "a", "x")
    entries = [entry("a", "x"), entry("a", "x"), {"rgb": "x.png"}, entry("a", "x", depth_scale=-1)]
    write_index(tmp_path, entries)
    with pytest.raises(SourceError) as caught:
        folder(tmp_path)
    text = str(caught.value)
    assert "entry 2: no field 'depth'" in text
    assert "entry 3: depth_scale -1 is not a positive number" in text
    assert "'a/x' is already the name of" in text
    for broken, message in (("{", "unreadable index"), ('{"a": 1}', "a list of objects")):
        (tmp_path / "index.json").write_text(broken)
        with pytest.raises(SourceError, match=message):
            folder(tmp_path)


def test_split_and_list(tmp_path):
    for source in ("a", "b"):
        for name in range(5):
            write_pair(tmp_path, source, str(name))

    def names(**options):
        source = folder(tmp_path, depth_scale=1000, **options)
        return [source.name(i) for i in range(len(source))]

    assert names(split="validation") == ["a/4", "b/4"]
    assert sorted(names(split="validation") + names(split="train")) == names()
    assert names(split="validation", holdout_every=4) == ["a/3", "b/2"]
    assert names(split="validation", holdout_sources=("b",)) == [f"b/{i}" for i in range(5)]
    assert names(split="train", holdout_sources=("b",)) == [f"a/{i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"holdout_sources names \['c'\]; the sources are"):
        names(split="train", holdout_sources=("c",))
    with pytest.raises(ValueError, match="split must be"):
        names(split="test")

    (tmp_path / "list.txt").write_text("b/3\na/1\n\n")
    assert names(filename_list=tmp_path / "list.txt") == ["b/3", "a/1"]
    (tmp_path / "list.txt").write_text("b/3\nb/9\n")
    with pytest.raises(SourceError, match="no sample is called 'b/9'"):
        names(filename_list=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_bytes("b/3\nK\u00fcche\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"list\.txt: no readable list of names in UTF-8"):
        names(filename_list=tmp_path / "list.txt")

    # A damaged pair moves no other from one side of the split to the other.
    write_pair(tmp_path, "a", "1", depth=0)
    assert names(split="validation", on_error="skip") == ["a/4", "b/4"]


def test_what_is_wrong_with_files_outside_the_list_does_not_matter(tmp_path):
    for name in ("1", "2", "3"):
        write_pair(tmp_path, "a", name)
    (tmp_path / "a/depth/2.png").unlink()
    shutil.copy(tmp_path / "a/rgb/3.png", tmp_path / "a/rgb/3.jpg")
    path = tmp_path / "list.txt"
    path.write_text("a/1\n")
    assert len(folder(tmp_path, depth_scale=1000, filename_list=path)) == 1
    path.write_text("a/1\na/2\na/3\n")
    with pytest.raises(SourceError) as error:
        folder(tmp_path, depth_scale=1000, filename_list=path)
    assert "missing depth" in str(error.value) and "same name as 3.jpg" in str(error.value)


def test_a_name_of_two_files_is_no_pair(tmp_path):
    for name in ("1", "2"):
        write_pair(tmp_path, "a", name)
    shutil.copy(tmp_path / "a/rgb/2.png", tmp_path / "a/rgb/2.jpg")
    with pytest.raises(SourceError, match=r"same name as 2\.jpg; keep one"):
        folder(tmp_path, depth_scale=1000)
    source = folder(tmp_path, depth_scale=1000, on_error="skip")  # which of them is not known
    assert [source.name(i) for i in range(len(source))] == ["a/1"]


def test_a_list_of_one_side_or_both_moves_no_pair(tmp_path):
    for name in range(10):
        write_pair(tmp_path, "a", str(name))
    path = tmp_path / "list.txt"

    def names(split, lines=None):
        if lines is not None:
            path.write_text("\n".join(lines))
        source = folder(
            tmp_path, depth_scale=1000, split=split, filename_list="" if lines is None else path
        )
        return [source.name(i) for i in range(len(source))]

    train, held_out = names("train"), names("validation")
    assert names("train", train) == train and names("validation", held_out) == held_out
    listed = ["a/9", "a/2", "a/3", "a/5"]
    assert names("train", listed) == listed[1:] and names("validation", listed) == ["a/9"]
    assert names("", listed) == listed
    with pytest.raises(SourceError, match="names no pair of split 'validation'"):
        names("validation", train)
    with pytest.raises(SourceError, match=r"1 problem.*\n.*line 2: no sample is called 'a/10'"):
        names("validation", ["a/9", "a/10", "a/2"])


def test_a_scale_of_metres_is_refused(tmp_path):
    for name in ("x", "y"):
        write_pair(tmp_path, "a", name, suffix=".npy", depth=200)
    entries = [
        entry("a", name, depth=f"depth/{name}.npy", depth_scale=scale)
        for name, scale in (("x", 100), ("y", 1))
    ]
    write_index(tmp_path, entries)
    with pytest.raises(SourceError) as caught:
        folder(tmp_path, depth_scale=1000)
    (problem,) = caught.value.problems
    assert "entry 0: depth_scale 100 is of no use to depth/x.npy: a .npy holds metres" in problem
    entries[0]["depth_scale"] = None
    write_index(tmp_path, entries)
    assert folder(tmp_path, depth_scale=1000)[0]["depth"][0, 0, 0] == 200


def test_what_is_no_depth(tmp_path):
    depth = np.array([[1.5, 0, -2], [np.nan, np.inf, 3]], np.float64)
    np.save(tmp_path / "a.npy", depth[..., None])
    expected = np.array([[1.5, 0, 0], [0, 0, 3]], np.float32)[..., None]
    np.testing.assert_array_equal(read_depth(tmp_path / "a.npy"), expected)
    np.save(tmp_path / "b.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="unreadable"):
        read_depth(tmp_path / "b.npy")
    np.savez(tmp_path / "b.npz", depth=depth)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"it is an \.npz"):
        read_depth(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"float64 \[2, 3, 4\], expected \[H, W\]"):
        read_depth(tmp_path / "c.npy")


@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"caf\xe9")])
def test_names_that_no_list_can_hold_are_told_at_once(tmp_path, name):
    write_pair(tmp_path, "a", "fine")
    write_pair(tmp_path, "a", name)
    with pytest.raises(SourceError, match="cannot be written to a list: rename it") as error:
        folder(tmp_path, depth_scale=1000)
    str(error.value).encode()  # so that it can be printed
    assert len(folder(tmp_path, depth_scale=1000, on_error="skip")) == 1
