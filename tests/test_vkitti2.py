"""Virtual KITTI 2 from generated trees; one sequence of Scene02 (233 frames) is the smallest."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from d3epth_jax.data import make_source
from d3epth_jax.data.sources import vkitti2 as module
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.data.sources.vkitti2 import FRAMES, vkitti2

SHAPE = (6, 8)
ONE = {"scenes": ("Scene02",), "variations": ("clone",), "cameras": ("Camera_0",)}


def write_sequence(rgb, depth, scene="Scene02", variation="clone", camera="Camera_0"):
    """A sequence whose depth is (100 + frame) cm, with sky in the first row and a hole."""
    pictures = rgb / scene / variation / "frames" / "rgb" / camera
    depths = depth / scene / variation / "frames" / "depth" / camera
    for folder in (pictures, depths):
        folder.mkdir(parents=True)
    Image.new("RGB", SHAPE[::-1], (200, 100, 50)).save(pictures / "rgb_00000.jpg", quality=100)
    for frame in range(FRAMES[scene]):
        if frame:
            shutil.copy(pictures / "rgb_00000.jpg", pictures / f"rgb_{frame:05d}.jpg")
        counts = np.full(SHAPE, 100 + frame, np.uint16)
        counts[0], counts[5, 7], counts[5, 6] = 65535, 0, 65534
        Image.fromarray(counts).save(depths / f"depth_{frame:05d}.png")
    return pictures, depths


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("vkitti2")
    write_sequence(root, root)
    return root


@pytest.fixture
def tree(written, tmp_path):
    """A copy to be damaged, and its folders of pictures and depths."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    frames = tmp_path / "Scene02" / "clone" / "frames"
    return tmp_path, frames / "rgb" / "Camera_0", frames / "depth" / "Camera_0"


def test_counts_are_centimetres_and_the_sky_is_invalid(written):
    source = vkitti2(written, **ONE)
    assert len(source) == 233
    assert source.name(231) == "Scene02/clone/Camera_0/00231" and source.group(231) == "Scene02"
    assert source.shape(0) == SHAPE
    sample = source[231]
    expected = np.full((*SHAPE, 1), 3.31, np.float32)
    expected[0], expected[5, 7], expected[5, 6] = 0, 0, 655.34
    np.testing.assert_array_equal(sample["depth"], expected)
    np.testing.assert_array_equal(sample["mask"], expected > 0)
    assert sample["depth"].dtype == np.float32 and sample["mask"].dtype == bool
    assert sample["image"].dtype == np.uint8 and sample["image"].shape == (*SHAPE, 3)
    assert np.abs(sample["image"].astype(int) - [200, 100, 50]).max() <= 3


@pytest.mark.parametrize(
    ("rgb", "depth"), [("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth"), ("rgb", "depth")]
)
def test_pictures_and_depth_may_lie_side_by_side(tmp_path, rgb, depth):
    write_sequence(tmp_path / rgb, tmp_path / depth)
    source = vkitti2(tmp_path, **ONE)
    assert len(source) == 233 and source.check(7) == []
    assert source.files(7)["image"].relative_to(tmp_path / rgb)
    assert source.files(7)["depth"].relative_to(tmp_path / depth)
    shutil.rmtree(tmp_path / rgb)
    with pytest.raises(SourceError) as error:
        vkitti2(tmp_path, **ONE)
    assert len(error.value.problems) == 233
    assert f"{tmp_path / rgb / 'Scene02'}" in error.value.problems[0]


# --- which frames ---


@pytest.fixture
def unchecked(tmp_path, monkeypatch):
    """A tree whose files all seem to exist: to count a set too large to write."""
    (tmp_path / "Scene01").mkdir()
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: True)
    return tmp_path


def test_the_default_is_marigolds_20148_training_frames(unchecked):
    source = vkitti2(unchecked)
    assert len(source) == 20148
    parts = [source.name(i).split("/") for i in range(len(source))]
    # 6 variations x 2 cameras x (233 + 270 + 339 + 837) frames
    assert {part[0] for part in parts} == {"Scene02", "Scene06", "Scene18", "Scene20"}
    assert {part[1] for part in parts} == {
        "clone",
        "morning",
        "overcast",
        "sunset",
        "15-deg-left",
        "15-deg-right",
    }
    assert {part[2] for part in parts} == {"Camera_0", "Camera_1"}
    assert parts[0] == ["Scene02", "clone", "Camera_0", "00000"]
    assert parts[-1] == ["Scene20", "15-deg-right", "Camera_1", "00836"]


def test_scene_01_is_for_validation_only(unchecked):
    source = vkitti2(unchecked, split="validation")
    assert len(source) == 12 * 447
    assert {source.group(i) for i in range(len(source))} == {"Scene01"}


def test_the_whole_set_has_42520_frames(unchecked):
    every = (
        "clone fog morning overcast rain sunset 15-deg-left 15-deg-right 30-deg-left 30-deg-right"
    )
    assert len(vkitti2(unchecked, split="", variations=every.split())) == 42520


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "val"}, "split must be"),
        ({"scenes": ("Scene03",), "split": ""}, r"scenes names \['Scene03'\]; those are"),
        ({"scenes": ("Scene01",)}, r"scenes names \['Scene01'\]; those of split 'train' are"),
        ({"variations": ("clone", "../fog")}, r"variations names \['../fog'\].*'fog'"),
        ({"cameras": ("Camera_2",)}, r"cameras names \['Camera_2'\].*'Camera_1'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(written, settings, words):
    with pytest.raises(ValueError, match=words):
        vkitti2(written, **settings)


@pytest.mark.parametrize("start", ["rgb/", ""])
@pytest.mark.parametrize("folders", [("", ""), ("rgb", "depth")])
def test_marigolds_lists_name_frames_of_any_layout(written, tmp_path, start, folders):
    root = written
    if any(folders):
        root = tmp_path / "parted"
        root.mkdir()
        for folder in folders:
            (root / folder).symlink_to(written, target_is_directory=True)
    line = "{}Scene02/clone/frames/rgb/Camera_0/rgb_00009.jpg depth/Scene02/depth_00009.png\n"
    path = tmp_path / "vkitti_train.txt"
    path.write_text(line.format(start))
    source = vkitti2(root, filename_list=str(path))
    assert [source.name(i) for i in range(len(source))] == ["Scene02/clone/Camera_0/00009"]


def test_the_config_has_the_sources_frames():
    from configs import common

    settings = common.vkitti2("DIR", "train")
    assert settings.variations == module.VARIATIONS and settings.cameras == module.CAMERAS


def test_filename_list_narrows_and_orders(tree, tmp_path):
    root, pictures, _ = tree
    wanted = ["Scene02/clone/Camera_0/00009", "Scene02/clone/Camera_0/00003"]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(wanted))
    (pictures / "rgb_00100.jpg").unlink()  # not asked for
    source = vkitti2(root, filename_list=str(path))
    assert [source.name(i) for i in range(len(source))] == wanted
    path.write_text("Scene01/clone/Camera_0/00000")
    with pytest.raises(SourceError, match="no sample is called 'Scene01/clone/Camera_0/00000'"):
        vkitti2(root, filename_list=str(path))


# --- damage ---


def test_a_folder_without_scenes_is_told_where_they_were_looked_for(tmp_path):
    with pytest.raises(SourceError, match=r"none of Scene01, .*vkitti_2\.0\.3_rgb"):
        vkitti2(tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        vkitti2(tmp_path / "nowhere")


def test_every_missing_file_is_in_one_error(tree):
    root, pictures, depths = tree
    (pictures / "rgb_00003.jpg").unlink()
    (depths / "depth_00003.png").unlink()
    (depths / "depth_00232.png").unlink()
    with pytest.raises(SourceError) as error:
        vkitti2(root, **ONE)
    assert error.value.problems == [
        f"{pictures / 'rgb_00003.jpg'}: missing image",
        f"{depths / 'depth_00003.png'}: missing depth",
        f"{depths / 'depth_00232.png'}: missing depth",
    ]
    source = vkitti2(root, **ONE, on_error="skip")
    assert len(source) == 231 and source.name(3) == "Scene02/clone/Camera_0/00004"


def test_a_missing_camera_is_missing_in_every_frame(written):
    cameras = ("Camera_0", "Camera_1")
    with pytest.raises(SourceError) as error:
        vkitti2(written, **{**ONE, "cameras": cameras})
    assert len(error.value.problems) == 2 * 233
    assert all("Camera_1" in problem for problem in error.value.problems)
    assert len(vkitti2(written, **{**ONE, "cameras": cameras}, on_error="skip")) == 233


def test_damaged_files_are_named(tree):
    root, pictures, depths = tree
    for path in (pictures / "rgb_00001.jpg", depths / "depth_00002.png"):
        path.write_bytes(path.read_bytes()[:-30])
    Image.fromarray(np.full(SHAPE, 100, np.uint8)).save(depths / "depth_00003.png")
    Image.fromarray(np.full((3, 4), 100, np.uint16)).save(depths / "depth_00004.png")
    Image.fromarray(np.full(SHAPE, 65535, np.uint16)).save(depths / "depth_00005.png")
    source = vkitti2(root, **ONE)
    words = ["rgb_00001.jpg", "depth_00002.png", "not 16-bit", "picture is 8x6", "no valid pixel"]
    for i, word in enumerate(words, start=1):
        problems = source.check(i)
        assert len(problems) == 1 and word in problems[0], problems
    assert source.check(0) == []
    with pytest.raises(ValueError, match=r"picture is 8x6 but its depth .*depth_00004\.png 4x3"):
        source[4]


def test_workers_can_unpickle_the_source(written):
    source = make_source("vkitti2", path=str(written), split="train", **ONE)
    copy = pickle.loads(pickle.dumps(source))
    for key, value in source[5].items():
        np.testing.assert_array_equal(copy[5][key], value)
