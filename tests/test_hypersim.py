"""Hypersim from generated trees in its two layouts, with the release's names and dtypes."""

import csv
import pickle

import h5py
import numpy as np
import pytest
from PIL import Image

from d3epth_jax.data import make_source
from d3epth_jax.data.sources import hypersim as module
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.data.sources.hypersim import SPLIT_CSV, hypersim, tone_map

SHAPE = (6, 8)
COLUMNS = (
    "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"
)
ROWS = (
    "ai_001_001,cam_00,0,True,,train",
    "ai_001_001,cam_00,36,False,CONTENT FLAGGED FOR REMOVAL,",
    "ai_001_001,cam_01,12,True,,train",
    "ai_003_010,cam_00,7,True,,val",
    "ai_055_010,cam_03,99,True,,test",
)
TRAIN = ["ai_001_001/cam_00/0000", "ai_001_001/cam_01/0012"]


def paths_of(scenes, name):
    scene, camera, frame = name.split("/")
    images = scenes / scene / "images"
    return {
        "colour": images / f"scene_{camera}_final_hdf5" / f"frame.{frame}.color.hdf5",
        "preview": images / f"scene_{camera}_final_preview" / f"frame.{frame}.tonemap.jpg",
        "depth": images / f"scene_{camera}_geometry_hdf5" / f"frame.{frame}.depth_meters.hdf5",
        "ids": images / f"scene_{camera}_geometry_hdf5" / f"frame.{frame}.render_entity_id.hdf5",
    }


def write_hdf5(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=array, compression="gzip", compression_opts=9)


def write_frame(scenes, name, distance=2.0, ids=5, colour=0.5, shape=SHAPE):
    """One frame with the release's names, dtypes and compression."""
    paths = paths_of(scenes, name)
    write_hdf5(paths["colour"], np.broadcast_to(np.float16(colour), (*shape, 3)))
    write_hdf5(paths["depth"], np.broadcast_to(np.float16(distance), shape))
    write_hdf5(paths["ids"], np.broadcast_to(np.int16(ids), shape))
    paths["preview"].parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", shape[::-1], (200, 100, 50)).save(paths["preview"], quality=100)
    return paths


def write_csv(path, rows=ROWS, columns=COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([columns, *rows]) + "\n")


def names(source):
    return [source.name(i) for i in range(len(source))]


def released():
    return [
        "/".join((s, c, f"{int(f):04d}"))
        for s, c, f, kept, *_ in csv.reader(ROWS)
        if kept == "True"
    ]


@pytest.fixture
def raw(tmp_path):
    """The public release, all released frames of the CSV."""
    write_csv(tmp_path / SPLIT_CSV)
    for name in released():
        write_frame(tmp_path, name)
    return tmp_path


@pytest.fixture
def one(tmp_path):
    """A tree of one frame, and its files, to be overwritten."""
    write_csv(tmp_path / SPLIT_CSV, ROWS[:1])
    return tmp_path, write_frame(tmp_path, TRAIN[0])


def test_distance_becomes_depth_at_three_pixels_worked_out_by_hand(tmp_path):
    write_csv(tmp_path / SPLIT_CSV, ROWS[:1])
    distance = np.full((768, 1024), 1, np.float16)
    distance[383, 511], distance[0, 0], distance[383, 1023] = 2, 5, 4
    write_frame(tmp_path, TRAIN[0], distance=distance, shape=(768, 1024))
    source = hypersim(tmp_path)
    sample = source[0]
    assert source.shape(0) == (768, 1024)
    assert sample["image"].shape == (768, 1024, 3) and sample["image"].dtype == np.uint8
    assert sample["depth"].shape == (768, 1024, 1) and sample["depth"].dtype == np.float32
    assert sample["mask"].shape == (768, 1024, 1) and sample["mask"].all()
    # f^2 = 886.81^2 = 786431.9761
    # (383, 511): x = 511.5 - 512 = -0.5, y = 383.5 - 384 = -0.5
    #   |ray| = sqrt(0.25 + 0.25 + 786431.9761) = sqrt(786432.4761) = 886.8102819
    #   z = 2 * 886.81 / 886.8102819 = 1.9999993642
    # (0, 0): x = 0.5 - 512 = -511.5, y = 0.5 - 384 = -383.5
    #   |ray| = sqrt(261632.25 + 147072.25 + 786431.9761) = sqrt(1195136.4761) = 1093.2229764
    #   z = 5 * 886.81 / 1093.2229764 = 4.0559429282
    # (383, 1023): x = 1023.5 - 512 = 511.5, y = -0.5
    #   |ray| = sqrt(261632.25 + 0.25 + 786431.9761) = sqrt(1048064.4761) = 1023.7502020
    #   z = 4 * 886.81 / 1023.7502020 = 3.4649468133
    z = sample["depth"][[383, 0, 383], [511, 0, 1023], 0]
    np.testing.assert_allclose(z, [1.9999993642, 4.0559429282, 3.4649468133], rtol=1.5e-7)


def test_the_focal_length_scales_with_the_width(one):
    sample = hypersim(one[0])[0]
    # 8x6: f = 886.81 * 8 / 1024 = 6.928203125, f^2 = 47.9999985
    # (0, 0): x = -3.5, y = -2.5: |ray| = sqrt(12.25 + 6.25 + 47.9999985) = 8.1547531
    # (3, 4): x = 0.5, y = 0.5: |ray| = sqrt(0.25 + 0.25 + 47.9999985) = 6.9641940
    z = sample["depth"][[0, 3], [0, 4], 0]
    np.testing.assert_allclose(z, [2 * 0.8495907869, 2 * 0.9948320066], rtol=1.5e-7)


def test_a_wall_before_the_camera_has_one_depth():
    height, width = 768, 1024
    x, y = np.meshgrid(np.arange(width) - 511.5, np.arange(height) - 383.5)
    distance = 3.0 * np.sqrt(1 + (x / 886.81) ** 2 + (y / 886.81) ** 2)
    z = distance * module.depth_per_distance(height, width)
    np.testing.assert_allclose(z, 3.0, rtol=1e-7)


def test_invalid_codes_are_masked_and_zero(one):
    root, paths = one
    distance = np.full(SHAPE, 4, np.float16)
    distance[0, :3] = np.nan, np.inf, 0
    distance[5, 7] = 300
    ids = np.full(SHAPE, 7, np.int16)
    ids[2:4, 5] = -1
    write_hdf5(paths["depth"], distance)
    write_hdf5(paths["ids"], ids)
    sample = hypersim(root)[0]
    expected = np.ones((*SHAPE, 1), bool)
    expected[0, :3] = False
    expected[2:4, 5] = False
    np.testing.assert_array_equal(sample["mask"], expected)
    assert (sample["depth"][~expected] == 0).all()
    assert (sample["depth"][expected] > 3).all()
    assert sample["depth"][5, 7, 0] > 250, "what is too far is not the source's business"


def reference_tone_map(colour, known):
    """The published rule in float64, pixel by pixel."""
    bright = np.percentile(
        [0.3 * r + 0.59 * g + 0.11 * b for (r, g, b), k in zip(colour, known, strict=True) if k], 90
    )
    scale = 0.8**2.2 / bright
    return [[min(max(scale * c, 0) ** (1 / 2.2), 1) * 255 for c in pixel] for pixel in colour]


def test_tone_mapping_agrees_with_the_published_rule():
    rng = np.random.default_rng(0)
    colour = rng.lognormal(0, 1.5, (12, 16, 3)).astype(np.float16)
    known = rng.random((12, 16)) > 0.2
    expected = reference_tone_map(colour.astype(np.float64).reshape(-1, 3), known.reshape(-1))
    expected = np.reshape(expected, colour.shape)
    image = tone_map(colour, known)
    assert image.dtype == np.uint8
    # Cut to 8 bits: at most 1 below, and 1e-3 for float32.
    assert (image <= expected + 1e-3).all() and (image > expected - 1 - 1e-3).all()
    assert image.max() == 255 and (image < 30).any()


def test_only_known_pixels_set_the_brightness(one):
    root, paths = one
    colour = np.full((*SHAPE, 3), 1000, np.float16)  # a sky that outshines the room
    colour[1:] = 1.0
    colour[3, 3] = 0.25
    ids = np.full(SHAPE, 3, np.int16)
    ids[0] = -1
    write_hdf5(paths["colour"], colour)
    write_hdf5(paths["ids"], ids)
    image = hypersim(root)[0]["image"]
    assert (image[0] == 255).all()
    # The 90 % quantile is 1: a quarter of it becomes 255 * 0.8 * 0.25^(1/2.2) = 108.63
    np.testing.assert_array_equal(image[3, 3], [108, 108, 108])


@pytest.mark.parametrize(
    ("colour", "known", "expected"),
    [
        # No known pixel: scale 1, so 255 * 0.25^(1/2.2) = 135.79
        (0.25, False, 135),
        # Darker than 1e-4: black, not a division by almost nothing
        (5e-5, True, 0),
        (0.0, True, 0),
    ],
)
def test_corner_cases_of_tone_mapping(colour, known, expected):
    image = tone_map(np.full((*SHAPE, 3), colour, np.float16), np.full(SHAPE, known))
    assert (image == expected).all()


def test_colours_that_are_not_finite_leave_the_rest_as_it_is():
    colour = np.full((10, 10, 3), 0.5, np.float16)
    clean = tone_map(colour, np.ones((10, 10), bool))
    colour[0, 0], colour[0, 1], colour[0, 2] = np.nan, np.inf, -np.inf
    with np.errstate(all="raise"):
        image = tone_map(colour, np.ones((10, 10), bool))
    np.testing.assert_array_equal(image[0, :3, 0], [0, 255, 0])
    np.testing.assert_array_equal(image[1:], clean[1:])


def test_previews_need_no_colour_hdf5(raw):
    for file in raw.rglob("*.color.hdf5"):
        file.unlink()
    source = hypersim(raw, colour="preview")
    sample = source[0]
    assert source.files(0)["image"].name == "frame.0000.tonemap.jpg"
    assert source.shape(0) == SHAPE and sample["image"].shape == (*SHAPE, 3)
    assert np.abs(sample["image"].astype(int) - [200, 100, 50]).max() <= 3
    with pytest.raises(SourceError, match=r"color\.hdf5: missing image"):
        hypersim(raw)


def test_the_split_names_the_frames_and_excluded_ones_are_not_asked_for(raw):
    assert names(hypersim(raw)) == TRAIN
    assert names(hypersim(raw, split="validation")) == ["ai_003_010/cam_00/0007"]
    assert names(hypersim(raw, split="test")) == ["ai_055_010/cam_03/0099"]
    everything = hypersim(raw, split="")
    assert names(everything) == released()
    assert everything.group(2) == "ai_003_010"
    assert not list(raw.rglob("frame.0036.*"))


@pytest.mark.parametrize("scenes", ["", "scenes", "evermotion_dataset/scenes", "raw_data"])
@pytest.mark.parametrize("table", ["", "analysis", "evermotion_dataset/analysis", "../analysis"])
def test_scenes_and_split_are_found_where_people_have_them(tmp_path, scenes, table):
    root = tmp_path / "root"
    (root / scenes).mkdir(parents=True)
    write_csv(root / table / SPLIT_CSV, ROWS[:1])
    write_frame(root / scenes, TRAIN[0])
    assert names(hypersim(root)) == TRAIN[:1]


def test_a_missing_split_table_says_where_it_was_looked_for_and_where_it_is(raw):
    (raw / SPLIT_CSV).unlink()
    with pytest.raises(SourceError) as error:
        hypersim(raw)
    text = str(error.value)
    assert f"{raw}/evermotion_dataset/analysis" in text and f"{raw}/analysis" in text
    assert "https://github.com/apple/ml-hypersim/blob/main/evermotion_dataset/analysis/" in text


def test_an_empty_folder_is_told_all_that_it_lacks(tmp_path):
    with pytest.raises(SourceError) as error:
        hypersim(tmp_path)
    assert len(error.value.problems) == 2
    assert "no scene" in str(error.value) and f"no {SPLIT_CSV}" in str(error.value)
    with pytest.raises(SourceError, match="no such folder"):
        hypersim(tmp_path / "nowhere")


def test_a_table_with_other_columns_is_refused_by_their_names(raw):
    write_csv(raw / SPLIT_CSV, ["ai_001_001,0"], "scene_name,frame_id")
    with pytest.raises(SourceError) as error:
        hypersim(raw)
    lacking = ["camera_name", "included_in_public_release", "split_partition_name"]
    assert error.value.problems == [f"no column {name!r}" for name in lacking]


@pytest.mark.parametrize(
    "row",
    [
        "../outside,cam_00,0,True,,train",
        "ai_001_001,/etc,0,True,,train",
        "ai_001_001,cam_00,-1,True,,train",
        "ai_001_001,cam_00,²,True,,train",
        "ai_001_001,cam_00,,True,,train",
    ],
)
def test_a_name_that_is_none_never_becomes_a_path(raw, row):
    write_csv(raw / SPLIT_CSV, [*ROWS, row])
    with pytest.raises(SourceError, match="line 7: no frame is named") as error:
        hypersim(raw)
    assert len(error.value.problems) == 1
    assert names(hypersim(raw, on_error="skip")) == TRAIN


def test_filename_list_narrows_and_orders(raw, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(reversed(TRAIN)))
    assert names(hypersim(raw, filename_list=str(path))) == TRAIN[::-1]
    path.write_text("ai_003_010/cam_00/0007\n")
    with pytest.raises(SourceError, match="no sample is called 'ai_003_010/cam_00/0007'"):
        hypersim(raw, filename_list=str(path))


def test_arguments_that_make_no_sense(raw):
    with pytest.raises(ValueError, match="split must be"):
        hypersim(raw, split="val")
    with pytest.raises(ValueError, match="colour must be"):
        hypersim(raw, colour="hdr")


def test_every_missing_file_is_in_one_error(raw):
    first, second = (paths_of(raw, name) for name in TRAIN)
    gone = [first["colour"], first["ids"], second["depth"]]
    for path in gone:
        path.unlink()
    with pytest.raises(SourceError) as error:
        hypersim(raw)
    kinds = ["image", "render_entity_id", "depth"]
    wanted = [f"{path}: missing {kind}" for path, kind in zip(gone, kinds, strict=True)]
    assert error.value.problems == wanted


def test_a_missing_camera_is_skipped_when_asked(raw):
    for path in paths_of(raw, TRAIN[0]).values():
        path.unlink()
    assert names(hypersim(raw, on_error="skip")) == TRAIN[1:]
    with pytest.raises(SourceError, match="missing"):
        hypersim(raw, on_error="raise")


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["colour", "depth", "ids"])
def test_a_truncated_hdf5_is_a_value_error_that_names_it(one, kind, kept):
    root, paths = one
    content = paths[kind].read_bytes()
    paths[kind].write_bytes(content[: kept if kept in (0, 100) else int(kept * len(content))])
    source = hypersim(root)
    with pytest.raises(ValueError, match=paths[kind].name):
        source[0]
    assert len(source.check(0)) == 1 and str(paths[kind]) in source.check(0)[0]


def test_a_damaged_body_is_a_value_error_that_names_it(one):
    root, paths = one
    noise = np.random.default_rng(0).normal(5, 1, (64, 64)).astype(np.float16)
    write_hdf5(paths["depth"], noise)
    content = bytearray(paths["depth"].read_bytes())
    content[-2000:-1000] = bytes(1000)  # inside the compressed chunk
    paths["depth"].write_bytes(content)
    with pytest.raises(ValueError, match=r"depth_meters\.hdf5: unreadable"):
        hypersim(root)[0]


def test_all_that_ails_a_frame_is_told_at_once(one):
    root, paths = one
    write_hdf5(paths["colour"], np.ones((*SHAPE, 4), np.float16))
    write_hdf5(paths["depth"], np.ones(8, np.float16))
    with h5py.File(paths["ids"], "w") as file:
        file.create_dataset("other", data=np.ones(SHAPE, np.int16))
    problems = hypersim(root).check(0)
    assert len(problems) == 3
    assert "render_entity_id.hdf5: unreadable" in problems[2] and "dataset" in problems[2]
    assert "color.hdf5: float16 [6, 8, 4], expected [H, W, 3]" in problems[0]
    assert "depth_meters.hdf5: float16 [8], expected [H, W]" in problems[1]


def test_files_of_another_frame_size_are_found(one):
    root, paths = one
    write_hdf5(paths["depth"], np.ones((3, 4), np.float16))
    with pytest.raises(ValueError, match=r"picture is 8x6 but its depth .*depth_meters\.hdf5 4x3"):
        hypersim(root)[0]


def write_marigold(folder, split, rows):
    """What Marigold's preprocess_hypersim.py leaves behind; depth counts up from 1 m."""
    header = ",scene_name,camera_name,frame_id,included_in_public_release,exclude_reason"
    header += ",split_partition_name,rgb_path,rgb_mean,depth_path,depth_mean,invalid_ratio"
    lines = []
    for i, row in enumerate(rows):
        scene, camera, frame, *_ = row.split(",")
        end = f"{camera}_fr{int(frame):04d}.png"
        pair = f"{scene}/rgb_{end}", f"{scene}/depth_plane_{end}"
        lines.append(f"{i},{row},{pair[0]},90.0,{pair[1]},1.0,0.02")
        (folder / scene).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SHAPE[::-1], (10, 20, 30)).save(folder / pair[0])
        counts = 1000 + np.arange(48, dtype=np.uint16).reshape(SHAPE)
        counts[0, 0], counts[5, 7] = 0, 65535
        Image.fromarray(counts).save(folder / pair[1])
    write_csv(folder / f"filename_meta_{split}.csv", lines, header)


@pytest.fixture
def processed(tmp_path):
    root = tmp_path / "processed"
    write_marigold(root / "train", "train", [ROWS[0], ROWS[2]])
    write_marigold(root / "val", "val", [ROWS[3]])
    return root


def test_marigolds_pngs_are_millimetres_of_depth(processed):
    source = hypersim(processed)
    assert names(source) == TRAIN and source.group(0) == "ai_001_001"
    sample = source[0]
    assert source.shape(0) == SHAPE
    np.testing.assert_array_equal(sample["image"], np.broadcast_to([10, 20, 30], (*SHAPE, 3)))
    expected = (1000 + np.arange(48, dtype=np.float32).reshape(*SHAPE, 1)) / np.float32(1000)
    expected[0, 0], expected[5, 7] = 0, np.float32(65.535)
    np.testing.assert_array_equal(sample["depth"], expected)
    np.testing.assert_array_equal(sample["mask"], expected > 0)


def test_marigolds_splits_lie_below_the_root_or_are_it(processed):
    assert names(hypersim(processed / "train")) == TRAIN
    assert names(hypersim(processed, split="validation")) == ["ai_003_010/cam_00/0007"]
    assert names(hypersim(processed, split="")) == [*TRAIN, "ai_003_010/cam_00/0007"]
    with pytest.raises(SourceError, match=r"no filename_meta_test.csv .*found .*train.csv"):
        hypersim(processed, split="test")


def test_marigolds_layout_has_no_previews(processed):
    with pytest.raises(ValueError, match="no 'preview'"):
        hypersim(processed, colour="preview")


def test_marigolds_missing_files_are_in_one_error(processed):
    (processed / "train/ai_001_001/rgb_cam_00_fr0000.png").unlink()
    (processed / "train/ai_001_001/depth_plane_cam_01_fr0012.png").unlink()
    with pytest.raises(SourceError) as error:
        hypersim(processed)
    assert [problem.rsplit("/", 1)[1] for problem in error.value.problems] == [
        "rgb_cam_00_fr0000.png: missing image",
        "depth_plane_cam_01_fr0012.png: missing depth",
    ]
    with pytest.raises(SourceError):
        hypersim(processed, on_error="skip")  # nothing is left


@pytest.mark.parametrize("layout", ["raw", "processed"])
@pytest.mark.parametrize("start", ["", "val/"])
def test_marigolds_lists_name_frames_of_both_layouts(layout, start, request, tmp_path):
    root, path = request.getfixturevalue(layout), tmp_path / "list.txt"
    line = "{0}ai_003_010/rgb_cam_00_fr0007.png {0}ai_003_010/depth_plane_cam_00_fr0007.png"
    path.write_text(line.format(start))
    source = hypersim(root, split="validation", filename_list=path)
    assert names(source) == ["ai_003_010/cam_00/0007"]


@pytest.mark.parametrize("layout", ["raw", "processed"])
def test_workers_can_unpickle_the_source(layout, request):
    source = make_source("hypersim", path=str(request.getfixturevalue(layout)), split="train")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_equal(copy[1], source[1])
    assert [copy.check(i) for i in range(len(copy))] == [[], []]
