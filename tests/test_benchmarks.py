"""What the sources of all six evaluation sets do alike, on trees of two samples."""

import pickle

import numpy as np
import pytest
from PIL import Image

from d3epth_jax.data import make_source
from d3epth_jax.data.sources import benchmarks, eth3d
from d3epth_jax.data.sources.files import SourceError
from tests.benchmark_trees import FAR, NAMES, SHAPE, WRITERS, gradient, ibims_masks, plane

LOSSY = ("eth3d", "scannet")  # JPEG
GROUPS = {
    "nyu": ("kitchen_0004", "office_0005"),
    "kitti": ("2011_09_26_drive_0002_sync", "2011_09_28_drive_0001_sync"),
    "eth3d": ("courtyard", "office"),
    "scannet": ("scene0011_00", "scene0406_02"),
    "diode": ("indoors", "outdoor"),
    "ibims": ("corridor", "office"),
}
# The lines of Marigold's lists for the second sample of each set.
LINES = {
    "nyu": "test/office_0005/rgb_0009.png test/office_0005/depth_0009.png test/office_0005/f.png",
    "kitti": "2011_09_28/2011_09_28_drive_0001_sync/image_03/data/0000000005.png x/y.png 721.5377",
    "eth3d": "rgb/office/images/dslr_images/DSC_0219.JPG depth/office_dslr_depth/office/x.JPG",
    "scannet": "scene0406_02/color/001100.jpg scene0406_02/depth/001100.png",
    "diode": f"{NAMES['diode'][1]}.png {NAMES['diode'][1]}_depth.npy x_depth_mask.npy",
    "ibims": "office_02",
}
# What an error about an empty folder says it looked for.
EXPECTED = {
    "nyu": "test/SCENE/rgb_NNNN.png",
    "kitti": "eigen.txt",
    "eth3d": "images/dslr_images/NAME.JPG",
    "scannet": "sceneXXXX_XX/color/NUMBER.jpg",
    "diode": "{indoors,outdoor}/scene_*/scan_*/NAME.png",
    "ibims": "rgb/NAME.png",
}
every_set = pytest.mark.parametrize("name", NAMES)


def write_both(name, root, first=None, image=None):
    """Both samples of a set; the first with another depth or picture."""
    pictures = [gradient() if image is None else image, gradient()]
    depths = [plane() if first is None else first, plane(5.0)]
    samples = zip(NAMES[name], depths, pictures, strict=True)
    return [WRITERS[name](root, *sample) for sample in samples]


def open_set(name, root, **settings):
    if name == "kitti":
        settings = {"eigen_list": str(root / "eigen.txt"), "benchmark_crop": False} | settings
    return make_source(name, path=str(root), **settings)


@every_set
def test_metres_and_masks_of_known_values(name, tmp_path):
    write_both(name, tmp_path)
    source = open_set(name, tmp_path)
    assert [source.name(i) for i in range(len(source))] == list(NAMES[name])
    assert tuple(source.group(i) for i in range(2)) == GROUPS[name]
    sample = source[0]
    assert {key: value.dtype for key, value in sample.items() if key != "edges"} == {
        "image": np.uint8,
        "depth": np.float32,
        "mask": bool,
    }
    assert sample["depth"].shape == sample["mask"].shape == (*SHAPE, 1)
    assert source.shape(0) == SHAPE
    np.testing.assert_allclose(sample["image"], gradient(), atol=25 if name in LOSSY else 0)

    unknown = [(0, 0)] + [(2, 3), (4, 5)] * (name == "ibims")
    assert {(int(y), int(x)) for y, x, _ in np.argwhere(~sample["mask"])} == set(unknown)
    assert all(sample["depth"][at] == 0 for at in unknown)
    # iBims has 50 m in 65535 steps: the wall is step 3277, the pixel behind it 9503.
    near, far = (3277 * 50 / 65535, 9503 * 50 / 65535) if name == "ibims" else (2.5, FAR)
    np.testing.assert_allclose(sample["depth"][1, 2], far, rtol=1e-6)
    np.testing.assert_allclose(sample["depth"][9, 9], near, rtol=1e-6)
    if name == "ibims":
        np.testing.assert_array_equal(sample["edges"][..., 0], ibims_masks()["edges"] == 1)
        assert sample["edges"].dtype == bool
    assert source.check(0) == source.check(1) == []


@every_set
def test_workers_can_unpickle_it(name, tmp_path):
    write_both(name, tmp_path)
    source = open_set(name, tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    for key, value in source[1].items():
        np.testing.assert_array_equal(copy[1][key], value)


@every_set
def test_all_missing_files_at_once(name, tmp_path):
    first, second = write_both(name, tmp_path)
    gone = [first["depth"], second["image"]]
    for path in gone:
        path.unlink()
    with pytest.raises(SourceError) as caught:
        open_set(name, tmp_path)
    assert len(caught.value.problems) == 2
    assert all(any(str(path) in p for p in caught.value.problems) for path in gone)


@every_set
def test_skips_what_is_damaged_if_told_so(name, tmp_path):
    write_both(name, tmp_path)[0]["depth"].unlink()
    source = open_set(name, tmp_path, on_error="skip")
    assert [source.name(i) for i in range(len(source))] == [NAMES[name][1]]


@every_set
@pytest.mark.parametrize("form", ["name", "line"])
def test_a_list_narrows_it(name, form, tmp_path):
    write_both(name, tmp_path)
    path = tmp_path / "list.txt"
    path.write_text({"name": NAMES[name][1], "line": LINES[name]}[form] + "\n\n")
    source = open_set(name, tmp_path, filename_list=str(path))
    assert [source.name(i) for i in range(len(source))] == [NAMES[name][1]]


@every_set
def test_a_list_that_names_nothing_says_where(name, tmp_path):
    write_both(name, tmp_path)
    path = tmp_path / "list.txt"
    path.write_text(f"{NAMES[name][0]}\nnowhere/3.png nowhere/3_depth.png\n../../etc/passwd\n")
    with pytest.raises(SourceError) as caught:
        open_set(name, tmp_path, filename_list=str(path))
    assert caught.value.problems == [
        f"{path}, line 2: no sample is called 'nowhere/3.png'",
        f"{path}, line 3: no sample is called '../../etc/passwd'",
    ]
    with pytest.raises(SourceError, match="no readable list of names"):
        open_set(name, tmp_path, filename_list=str(tmp_path / "absent.txt"))
    path.write_text("\n")
    with pytest.raises(SourceError, match=r"list\.txt: it names no sample"):
        open_set(name, tmp_path, filename_list=str(path))


@every_set
def test_lines_of_a_list_without_depth_are_passed_over(name, tmp_path):
    write_both(name, tmp_path)
    path = tmp_path / "list.txt"
    path.write_text(f"nowhere/3.png None 721.5377\n{LINES[name]}\n", encoding="utf-8-sig")
    source = open_set(name, tmp_path, filename_list=str(path))
    assert [source.name(i) for i in range(len(source))] == [NAMES[name][1]]


def test_a_list_sets_the_order_and_names_once(tmp_path):
    write_both("eth3d", tmp_path)
    path = tmp_path / "list.txt"
    path.write_text("\n".join([NAMES["eth3d"][1], LINES["eth3d"], NAMES["eth3d"][0]]))
    source = open_set("eth3d", tmp_path, filename_list=str(path))
    assert [source.name(i) for i in range(len(source))] == list(NAMES["eth3d"][::-1])


@every_set
def test_every_truncated_file_is_named(name, tmp_path):
    paths = write_both(name, tmp_path)[0]
    source = open_set(name, tmp_path)
    for path in paths.values():
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        problems = source.check(0)
        assert len(problems) == 1 and str(path) in problems[0], problems
        with pytest.raises(ValueError, match=path.name):
            source[0]
        path.write_bytes(whole)
    assert source.check(0) == []


@every_set
def test_check_finds_a_wrong_unit(name, tmp_path):
    # Metres for millimetres in PNG, millimetres for metres in floating point.
    factor = 1000 if name in ("eth3d", "diode") else 1 / 1000
    paths = write_both(name, tmp_path, first=plane(2.5 * factor))[0]
    source = open_set(name, tmp_path)
    (problem,) = source.check(0)
    assert str(paths["depth"]) in problem and "implausible" in problem
    assert source.check(1) == []


@every_set
def test_check_finds_swapped_pairs(name, tmp_path):
    other = gradient((12, 20))
    paths = write_both(name, tmp_path, image=other)[0]
    source = open_set(name, tmp_path)
    (problem,) = source.check(0)
    assert str(paths["image"]) in problem and "20x12" in problem
    with pytest.raises(ValueError, match="20x12"):
        source[0]


@every_set
def test_an_empty_depth_map_is_found(name, tmp_path):
    paths = write_both(name, tmp_path, first=np.zeros(SHAPE))[0]
    (problem,) = open_set(name, tmp_path).check(0)
    assert str(paths["depth"]) in problem and "no valid pixel" in problem


@every_set
def test_a_folder_without_the_set_says_what_is_expected(name, tmp_path):
    (tmp_path / "eigen.txt").write_text("")
    with pytest.raises(SourceError) as caught:
        open_set(name, tmp_path)
    (problem,) = caught.value.problems
    assert EXPECTED[name] in problem and str(tmp_path) in str(caught.value)
    with pytest.raises(SourceError, match="no such folder"):
        open_set(name, tmp_path / "absent", **({"eigen_list": "x"} if name == "kitti" else {}))


@every_set
def test_hidden_files_are_no_samples(name, tmp_path):
    for sample in write_both(name, tmp_path):
        for path in sample.values():
            path.with_name(f"._{path.name}").write_bytes(b"Finder's")
    assert len(open_set(name, tmp_path)) == 2


def test_all_files_that_ail_are_told_at_once(tmp_path):
    first, _ = write_both("diode", tmp_path)
    for path in first.values():
        path.write_bytes(path.read_bytes()[:60])
    assert len(open_set("diode", tmp_path).check(0)) == 3


def test_eth3d_counts_bytes(tmp_path):
    paths = write_both("eth3d", tmp_path)[0]
    with open(paths["depth"], "ab") as file:
        file.write(b"1234")
    with pytest.raises(ValueError, match=f"{4 * 12 * 16 + 4} bytes.*16x12.*is {4 * 12 * 16} bytes"):
        open_set("eth3d", tmp_path)[0]


def test_eth3d_holes_of_every_kind(tmp_path):
    depth = plane()
    depth[3, :4] = [np.inf, -np.inf, np.nan, -1]
    write_both("eth3d", tmp_path, first=depth)
    sample = open_set("eth3d", tmp_path)[0]
    assert not sample["mask"][3, :4].any() and (sample["depth"][3, :4] == 0).all()
    assert sample["mask"].sum() == 12 * 16 - 5


def test_eth3d_pictures_stay_as_stored(tmp_path):
    """A camera held upright: EXIF would turn the picture, but nothing turns the depth."""
    path = write_both("eth3d", tmp_path)[0]["image"]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient()).save(path, exif=exif)
    source = open_set("eth3d", tmp_path)
    assert source.shape(0) == source[0]["image"].shape[:2] == source[0]["depth"].shape[:2] == SHAPE


def test_eth3d_in_marigolds_layout(tmp_path):
    for name in NAMES["eth3d"]:
        WRITERS["eth3d"](tmp_path, name, plane(), gradient(), packed=True)
    source = open_set("eth3d", tmp_path)
    assert [source.name(i) for i in range(2)] == list(NAMES["eth3d"])
    assert source[1]["depth"][1, 2] == np.float32(FAR)
    source.files(1)["depth"].unlink()
    with pytest.raises(SourceError, match=r"office_dslr_depth/office/ground_truth_depth.*missing"):
        open_set("eth3d", tmp_path)


def test_eth3d_at_full_size(tmp_path):
    """24 megapixels: the largest sample of all sets, at the size its users have."""
    height, width = 4032, 6048
    folder = tmp_path / "pipes"
    for part in (eth3d.PICTURES, eth3d.DEPTHS):
        (folder / part).mkdir(parents=True)
    Image.new("RGB", (width, height), (9, 9, 9)).save(folder / eth3d.PICTURES / "DSC_0634.JPG")
    depth = np.full((height, width), np.inf, "<f4")
    depth[-1] = 3.5
    depth.tofile(folder / eth3d.DEPTHS / "DSC_0634.JPG")
    sample = open_set("eth3d", tmp_path)[0]
    assert sample["mask"].sum() == width and sample["depth"][-1, -1] == 3.5
    assert sample["image"].shape == (height, width, 3)


def test_matlab_damage_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "x.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(30))
    with pytest.raises(ValueError, match=r"x\.mat: unreadable as a MATLAB file"):
        benchmarks.load_mat(path)
    with pytest.raises(FileNotFoundError):
        benchmarks.load_mat(tmp_path / "absent.mat")
