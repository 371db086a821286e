"""What is peculiar to each evaluation set: other layouts, splits, crops, masks."""

import logging
import pickle

import h5py
import numpy as np
import pytest
from PIL import Image

from d3epth_jax.data.sources.diode import diode
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.data.sources.ibims import ibims
from d3epth_jax.data.sources.kitti import kitti
from d3epth_jax.data.sources.nyu import SPLITS_URL, nyu
from d3epth_jax.data.sources.scannet import scannet
from tests import benchmark_trees as trees
from tests.benchmark_trees import FAR, NAMES, SHAPE, gradient, plane

DRIVE, FRAME = NAMES["kitti"][0].split("/image_02/")


def names(source):
    return [source.name(i) for i in range(len(source))]


# NYU

SCENES = ["kitchen_0004", "kitchen_0004", "office_0005", "office_0006"]


def write_mat(root, scenes=SCENES, **changes):
    """Four frames, of which 3 is special; 2 and 3 are the test split."""
    raw = np.stack([plane()] * 4)
    raw[2] = plane(5.0)
    images = np.stack([np.full_like(gradient(), 10 * i) for i in range(4)])
    images[2] = gradient()
    arrays = {"raw": raw, "filled": np.maximum(raw, 1.25), "images": images} | changes
    return trees.write_nyu_mat(root, scenes, **arrays, test=(2, 3), train=(1, 4))


@pytest.mark.parametrize("whole_path", [False, True])
def test_nyu_from_the_mat(tmp_path, whole_path):
    mat = write_mat(tmp_path)
    source = nyu(mat if whole_path else tmp_path)
    assert names(source) == ["kitchen_0004/0002", "office_0005/0003"]
    assert [source.group(i) for i in range(2)] == ["kitchen_0004", "office_0005"]
    assert source.shape(0) == SHAPE
    sample = source[1]
    np.testing.assert_array_equal(sample["image"], gradient())
    assert sample["image"].flags.c_contiguous and sample["depth"].dtype == np.float32
    assert sample["depth"][1, 2] == 2 * FAR and sample["depth"][2, 1] == 5
    assert np.argwhere(~sample["mask"]).tolist() == [[0, 0, 0]] and sample["depth"][0, 0] == 0
    assert (source[0]["image"] == 10).all()
    assert source.check(0) == source.check(1) == []


def test_nyu_mat_can_be_unpickled_by_workers(tmp_path):
    write_mat(tmp_path)
    source = nyu(tmp_path)
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[1]["depth"], source[1]["depth"])


def test_nyu_splits_and_filled_depth(tmp_path):
    mat = write_mat(tmp_path)
    assert names(nyu(tmp_path, split="train")) == ["kitchen_0004/0001", "office_0006/0004"]
    filled = nyu(tmp_path, split="", depth="filled")
    assert len(filled) == 4 and filled[2]["mask"].all() and filled[2]["depth"][0, 0] == 1.25
    (mat.parent / "splits.mat").unlink()
    assert len(nyu(tmp_path, split="")) == 4
    with pytest.raises(SourceError, match=rf"splits\.mat: missing.*{SPLITS_URL}"):
        nyu(tmp_path)


def test_nyu_both_layouts_have_the_same_names(tmp_path):
    for name in NAMES["nyu"]:
        trees.write_nyu(tmp_path / "png", name, plane(), gradient())
    scenes = ["kitchen_0004"] + ["x"] * 7 + ["office_0005"]
    stacks = [np.stack([array] * 9) for array in (plane(), plane(), gradient())]
    trees.write_nyu_mat(tmp_path / "mat", scenes, *stacks, test=(1, 9))
    png, mat = nyu(tmp_path / "png"), nyu(tmp_path / "mat")
    assert names(png) == names(mat) == list(NAMES["nyu"])
    for key in ("image", "depth", "mask"):
        np.testing.assert_array_equal(png[1][key], mat[1][key])
    assert nyu(tmp_path / "png", depth="filled")[0]["mask"].all()


def test_nyu_damaged_mat_is_named(tmp_path):
    mat = write_mat(tmp_path)
    source = nyu(tmp_path)
    whole = mat.read_bytes()
    mat.write_bytes(whole[:-200])
    with pytest.raises(SourceError, match=r"nyu_depth_v2_labeled\.mat: sizes: unreadable"):
        nyu(tmp_path)
    assert "frame 2: unreadable" in source.check(0)[0]
    mat.write_bytes(whole)
    splits = tmp_path / "splits.mat"
    splits.write_bytes(splits.read_bytes()[:150])
    with pytest.raises(SourceError, match=r"splits\.mat: "):
        nyu(tmp_path)
    with pytest.raises(SourceError, match=r"absent\.mat"):
        nyu(tmp_path / "absent.mat")


def test_nyu_damage_inside_names_the_frame(tmp_path):
    mat = write_mat(tmp_path)
    source = nyu(tmp_path)
    with h5py.File(mat) as file:
        _, chunk = file["rawDepths"].id.read_direct_chunk((2, 0, 0))
    whole = mat.read_bytes()
    assert whole.count(chunk) == 1
    mat.write_bytes(whole.replace(chunk, bytes(len(chunk))))
    assert source.check(0) == []
    (problem,) = source.check(1)
    assert problem.startswith(f"{mat}: frame 3: unreadable")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"raw": np.ones((4, 16, 12))}, r"rawDepths \[4, 12, 16\], expected"),
        ({"images": np.ones((4, 12, 16, 1), np.uint8)}, r"images \[4, 1, 16, 12\]"),
        ({"scenes": ["a", "../b", "c", "d"]}, r"frame 2 .*'\.\./b', which is no name"),
        ({"scenes": ["a"]}, "unreadable"),
    ],
)
def test_nyu_mat_with_another_content(tmp_path, changes, words):
    write_mat(tmp_path, **changes)
    with pytest.raises(SourceError, match=words):
        nyu(tmp_path)


def test_nyu_split_beyond_the_frames(tmp_path):
    stacks = [np.stack([array] * 2) for array in (plane(), plane(), gradient())]
    trees.write_nyu_mat(tmp_path, ["a", "b"], *stacks, test=(2, 3))
    with pytest.raises(SourceError, match="testNdxs is not a list of numbers from 1 to 2"):
        nyu(tmp_path)
    with pytest.raises(ValueError, match="split must be one of"):
        nyu(tmp_path, split="val")
    with pytest.raises(ValueError, match="depth must be one of"):
        nyu(tmp_path, depth="rawDepths")


# KITTI


def write_drive(root, shape=SHAPE, name=NAMES["kitti"][0], **settings):
    return trees.write_kitti(root, name, plane(shape=shape), gradient(shape), **settings)


def test_kitti_benchmark_crop_by_hand(tmp_path):
    """375 - 352 = 23 rows from above; (1242 - 1216) // 2 = 13 columns from the left."""
    depth = np.zeros((375, 1242))
    depth[23:, 13:1229] = 4
    depth[23, 13], depth[374, 1228] = 1, 80
    depth[22, 13] = depth[23, 12] = depth[374, 1229] = 9
    image = np.zeros((375, 1242, 3), np.uint8)
    image[23:, 13:1229] = 90
    image[23, 13], image[374, 1228] = 1, 2
    trees.write_kitti(tmp_path, NAMES["kitti"][0], depth, image)
    source = kitti(tmp_path, eigen_list=tmp_path / "eigen.txt")
    sample = source[0]
    assert sample["depth"].shape == (352, 1216, 1) and source.shape(0) == (352, 1216)
    assert (sample["depth"][0, 0], sample["depth"][-1, -1]) == (1, 80)
    assert (sample["depth"] == 4).sum() == 352 * 1216 - 2 and sample["mask"].all()
    assert sample["image"][0, 0, 0] == 1 and sample["image"][-1, -1, 0] == 2
    assert sample["image"].min(axis=2).astype(int).sum() == 90 * (352 * 1216 - 2) + 3

    whole = kitti(tmp_path, eigen_list=tmp_path / "eigen.txt", benchmark_crop=False)
    assert whole.shape(0) == whole[0]["depth"].shape[:2] == (375, 1242)


def test_kitti_crop_rounds_down_where_the_width_is_odd(tmp_path):
    depth = np.full((376, 1241), 3.0)
    depth[24, 12] = 1
    trees.write_kitti(tmp_path, NAMES["kitti"][0], depth, gradient((376, 1241)))
    assert kitti(tmp_path, eigen_list=tmp_path / "eigen.txt")[0]["depth"][0, 0] == 1


def test_kitti_picture_smaller_than_the_crop(tmp_path):
    path = write_drive(tmp_path)["image"]
    (problem,) = kitti(tmp_path, eigen_list=tmp_path / "eigen.txt").check(0)
    assert problem == f"{path}: 16x12 is smaller than the crop 1216x352"


def test_kitti_swapped_pairs_show_before_the_crop(tmp_path):
    depth, image = plane(shape=(375, 1242)), gradient((376, 1241))
    trees.write_kitti(tmp_path, NAMES["kitti"][0], depth, image)
    (problem,) = kitti(tmp_path, eigen_list=tmp_path / "eigen.txt").check(0)
    assert "1241x376" in problem and "1242x375" in problem


def test_kitti_leaves_out_and_counts_lines_without_depth(tmp_path, caplog):
    write_drive(tmp_path)
    picture = trees.kitti_line(NAMES["kitti"][1]).split()[0]
    with open(tmp_path / "eigen.txt", "a") as file:
        file.write(f"{picture} None 721.5377\n\n{picture.replace('05.png', '06.png')} None\n")
    with caplog.at_level(logging.INFO):
        source = kitti(tmp_path, eigen_list=tmp_path / "eigen.txt", benchmark_crop=False)
    assert names(source) == [NAMES["kitti"][0]]
    assert "2 of its frames have no depth" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png",
        "2011_09_26/2011_09_28_drive_0002_sync/image_02/data/0000000069.png a/b.png",
        "../2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png a/b.png",
        "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png ../../b.png",
        "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png /etc/passwd",
    ],
)
def test_kitti_bad_lines_are_named(tmp_path, line):
    write_drive(tmp_path)
    path = tmp_path / "eigen.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(SourceError) as caught:
        kitti(tmp_path, eigen_list=path)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{path}, line 2: {line!r} is not")


@pytest.mark.parametrize("raw", ["", "raw_data/", "raw/"])
@pytest.mark.parametrize("annotated", ["", "train/", "data_depth_annotated/val/"])
def test_kitti_trees(tmp_path, raw, annotated):
    paths = write_drive(tmp_path, raw=raw, annotated=annotated)
    options = {"eigen_list": tmp_path / "eigen.txt", "benchmark_crop": False}
    source = kitti(tmp_path, **options)
    assert source.files(0) == paths and source[0]["depth"][1, 2] == FAR
    # What is missing is looked for where the rest of the drive is.
    for path in paths.values():
        path.unlink()
    with pytest.raises(SourceError) as caught:
        kitti(tmp_path, **options)
    assert [str(paths["image"]), str(paths["depth"])] == [
        problem.partition(": missing")[0] for problem in caught.value.problems
    ]


def test_kitti_depth_elsewhere(tmp_path):
    paths = write_drive(tmp_path)
    (tmp_path / "depth").mkdir()
    (tmp_path / "val").rename(tmp_path / "depth" / "val")
    options = {"eigen_list": tmp_path / "eigen.txt", "benchmark_crop": False}
    source = kitti(tmp_path, depth_path=tmp_path / "depth", **options)
    assert source[0]["depth"][1, 2] == FAR and source.files(0)["image"] == paths["image"]
    with pytest.raises(SourceError, match="missing depth"):
        kitti(tmp_path, **options)


def test_kitti_all_annotated_frames_of_a_split(tmp_path):
    write_drive(tmp_path, annotated="train/")
    for name in (NAMES["kitti"][1], f"{DRIVE}/image_03/{FRAME}"):
        write_drive(tmp_path, name=name)
    assert names(kitti(tmp_path, split="train", benchmark_crop=False)) == [NAMES["kitti"][0]]
    found = kitti(tmp_path, split="val", benchmark_crop=False)
    assert names(found) == [f"{DRIVE}/image_03/{FRAME}", NAMES["kitti"][1]]
    found.files(0)["image"].unlink()
    with pytest.raises(SourceError, match="missing image"):
        kitti(tmp_path, split="val")


@pytest.mark.parametrize(
    "settings", [{}, {"split": "val", "eigen_list": "x"}, {"split": "test", "eigen_list": "x"}]
)
def test_kitti_arguments_that_make_no_sense(tmp_path, settings):
    with pytest.raises(ValueError, match=r"eigen_list|split must be"):
        kitti(tmp_path, **settings)


def test_kitti_unreadable_list(tmp_path):
    with pytest.raises(SourceError, match=r"absent\.txt: no readable list of names"):
        kitti(tmp_path, eigen_list=tmp_path / "absent.txt")


# ScanNet


def test_scannet_pictures_are_brought_to_the_depths_size(tmp_path):
    """1296x968 and 640x480 at an eighth: 162x121 and 80x60; left half red, right half blue."""
    image = np.zeros((121, 162, 3), np.uint8)
    image[:, :81], image[:, 81:] = (200, 0, 0), (0, 0, 200)
    trees.write_scannet(tmp_path, NAMES["scannet"][0], plane(shape=(60, 80)), image)
    source = scannet(tmp_path)
    sample = source[0]
    assert sample["image"].shape == (60, 80, 3) and source.shape(0) == (60, 80)
    assert sample["image"].dtype == np.uint8
    for part, colour in (
        (sample["image"][:, :38], (200, 0, 0)),
        (sample["image"][:, 42:], (0, 0, 200)),
    ):
        np.testing.assert_allclose(part, np.broadcast_to(colour, part.shape), atol=12)
    assert sample["depth"][1, 2] == FAR and source.check(0) == []


@pytest.mark.parametrize("folder", ["scans", "scannet_frames_25k", "tasks/scannet_frames_25k"])
@pytest.mark.parametrize("digits", [1, 6])
def test_scannet_layouts_have_the_same_names(tmp_path, folder, digits):
    for name in NAMES["scannet"]:
        trees.write_scannet(tmp_path, name, plane(), gradient(), folder, digits)
    (tmp_path / folder / "scene0011_00" / "color" / "thumbnail.jpg").write_bytes(b"")
    source = scannet(tmp_path)
    assert names(source) == list(NAMES["scannet"])
    stem = f"{300:0{digits}d}"
    assert source.files(0)["image"].name == f"{stem}.jpg"


def test_scannet_frames_follow_their_number(tmp_path):
    for number in (1000, 200, 30):
        trees.write_scannet(tmp_path, f"scene0011_00/{number}", plane(), gradient())
    assert names(scannet(tmp_path)) == [f"scene0011_00/{n:06d}" for n in (30, 200, 1000)]


# DIODE


def test_diode_counts_what_its_mask_says(tmp_path):
    """The mask alone decides on far and near depth, but NaN never gets out."""
    depth = plane()
    depth[2, :6] = [700, 0.2, np.nan, np.inf, -1, 3]
    mask = np.ones(SHAPE)
    mask[2, 5] = mask[8, 8] = 0
    trees.write_diode(tmp_path, NAMES["diode"][0], depth, gradient(), mask=mask)
    sample = diode(tmp_path)[0]
    assert sample["mask"][2, :6, 0].tolist() == [True, True, False, False, False, False]
    assert sample["depth"][2, 0] == 700 and sample["depth"][2, 1] == np.float32(0.2)
    assert not sample["mask"][0, 0] and not sample["mask"][8, 8]
    assert np.isfinite(sample["depth"]).all() and (sample["depth"][~sample["mask"]] == 0).all()


def test_diode_splits(tmp_path):
    trees.write_diode(tmp_path, NAMES["diode"][0], plane(), gradient())
    trees.write_diode(tmp_path, NAMES["diode"][1], plane(), gradient(), folder="train")
    assert names(diode(tmp_path)) == names(diode(tmp_path / "val")) == [NAMES["diode"][0]]
    assert names(diode(tmp_path, split="train")) == [NAMES["diode"][1]]
    with pytest.raises(ValueError, match="split must be 'val' or 'train'"):
        diode(tmp_path, split="test")


def test_diode_never_unpickles_and_knows_shapes(tmp_path):
    paths = trees.write_diode(tmp_path, NAMES["diode"][0], plane(), gradient())
    source = diode(tmp_path)
    np.save(paths["depth"], np.array([{"a": 1}], object), allow_pickle=True)
    assert "unreadable .npy" in source.check(0)[0]
    np.save(paths["depth"], np.ones((*SHAPE, 3), np.float32))
    assert source.check(0) == [f"{paths['depth']}: float32 [12, 16, 3], expected numbers [H,W,1]"]
    np.save(paths["depth"], np.ones((*SHAPE, 1), np.float32))
    np.save(paths["mask"], np.ones((12, 15)))
    assert f"but its mask {paths['mask']} 15x12" in source.check(0)[0]


# iBims-1


def test_ibims_layouts_give_the_same_sample(tmp_path):
    depth = np.rint(plane() * 65535 / 50) * 50 / 65535
    trees.write_ibims(tmp_path / "png", "office_02", depth, gradient(), folder="")
    trees.write_ibims_mat(tmp_path / "mat/ibims1_core_mat/office_02.mat", depth, gradient())
    png, mat = ibims(tmp_path / "png"), ibims(tmp_path / "mat")
    assert names(png) == names(mat) == ["office_02"] and mat.group(0) == "office"
    assert png.shape(0) == mat.shape(0) == SHAPE
    assert png[0].keys() == mat[0].keys() == {"image", "depth", "mask", "edges"}
    for key, value in png[0].items():
        assert value.dtype == mat[0][key].dtype
        np.testing.assert_allclose(value, mat[0][key], rtol=1e-6)
    assert mat.check(0) == []
    assert pickle.loads(pickle.dumps(mat))[0]["mask"].sum() == 12 * 16 - 3


def test_ibims_mat_that_is_not_what_it_should_be(tmp_path):
    path = tmp_path / "office_02.mat"
    trees.write_ibims_mat(path, plane(), gradient())
    source = ibims(tmp_path)
    trees.write_ibims_mat(path, plane(), gradient(), without=("edges", "mask_transp"))
    assert source.check(0) == [f"{path}: no mask_transp, edges in a struct called data"]
    trees.write_ibims_mat(path, plane(), gradient((12, 20)))
    (problem,) = source.check(0)
    assert problem.startswith(f"{path}: picture is 20x12 but its depth {path} 16x12, its mask_")
    trees.write_ibims_mat(path, plane(), gradient()[..., 0])
    assert "rgb is uint8 [12, 16], not uint8 [H,W,3]" in source.check(0)[0]
    whole = trees.write_ibims_mat(path, plane(), gradient()).read_bytes()
    path.write_bytes(whole[:-40])
    assert f"{path}: unreadable as a MATLAB file" in source.check(0)[0]


def test_ibims_edges_of_another_size(tmp_path):
    paths = trees.write_ibims(tmp_path, "office_02", plane(), gradient())
    Image.new("1", (15, 12)).save(paths["edges"])
    (problem,) = ibims(tmp_path).check(0)
    assert f"edges {paths['edges']} 15x12" in problem and str(paths["image"]) in problem


def test_a_folder_of_diode_is_of_its_own_split(tmp_path):
    trees.write_diode(tmp_path, NAMES["diode"][0], plane(), gradient(), folder="train")
    assert len(diode(tmp_path / "train", split="train")) == 1
    with pytest.raises(ValueError, match="folder of the other split: set split=train"):
        diode(tmp_path / "train")
