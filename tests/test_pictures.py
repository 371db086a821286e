"""Which pictures are read, and that no file of others is taken for a result."""

import os

import numpy as np
from PIL import Image

from d3epth_jax import image
from d3epth_jax.pictures import find_pictures, name_outputs

GREY = np.full((4, 6, 3), 90, np.uint8)


def foreign(path):
    """A PNG that another program wrote."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(GREY).save(path)
    return path


def found(folder) -> list[str]:
    failed = {}
    paths = sorted(below.name for _, below in find_pictures([folder], failed))
    assert not failed
    return paths


def test_photographs_that_are_called_as_results_are_predicted(tmp_path):
    for name in ("0_color.png", "0_depth.png", "other.png"):
        foreign(tmp_path / name)
    np.save(tmp_path / "0.npy", np.eye(4))  # a camera's pose
    assert found(tmp_path) == ["0_color.png", "0_depth.png", "other.png"]
    image.save_png(tmp_path / "other_color.png", GREY)  # ours
    np.save(tmp_path / "other.npy", GREY)
    assert "other_color.png" not in found(tmp_path)


def test_no_measured_depth_map_or_photograph_is_replaced(tmp_path, capsys):
    picture = foreign(tmp_path / "1.jpg")
    foreign(tmp_path / "1_color.png")
    image.save_png(tmp_path / "1_depth.png", GREY)

    def name() -> str:
        (named,) = name_outputs([(picture, picture.relative_to(tmp_path))], tmp_path)
        return named.output.name

    assert name() == "1_jpg"
    assert "1.npy or the like is no result of" in capsys.readouterr().err
    image.save_png(tmp_path / "1_color.png", GREY)
    assert name() == "1", "all of it is an earlier result"
    foreign(tmp_path / "1_depth.png")
    assert name() == "1_jpg"


def test_a_link_does_not_take_the_name_of_its_picture(tmp_path):
    foreign(tmp_path / "photo.png")
    os.symlink("photo.png", tmp_path / "cover.png")
    os.symlink("photo.png", tmp_path / "zebra.png")
    assert found(tmp_path) == ["photo.png"]
    (tmp_path / "photo.png").rename(tmp_path / ".photo.png")  # hidden, so not found itself
    for name in ("cover.png", "zebra.png"):
        (tmp_path / name).unlink()
        os.symlink(".photo.png", tmp_path / name)
    assert found(tmp_path) == ["cover.png"]


def test_what_does_not_get_its_own_name_is_told(tmp_path, capsys):
    for folder in ("a", "b"):
        foreign(tmp_path / folder / "x.png")
    failed = {}
    pictures = find_pictures([tmp_path / "a", tmp_path / "b"], failed)
    names = [picture.file(".npy").name for picture in name_outputs(pictures, tmp_path / "out")]
    assert names == ["x.npy", "x_png.npy"]
    told = capsys.readouterr().err
    assert told == f"d3epth: the results of {tmp_path}/b/x.png are {tmp_path}/out/x_png*\n"


def test_what_is_no_png_of_ours_is_told_apart(tmp_path):
    image.save_png(tmp_path / "ours.png", GREY, about="disparity, near is large")
    with Image.open(tmp_path / "ours.png") as picture:
        assert picture.info["Description"] == "disparity, near is large"
    (tmp_path / "text.png").write_text("no picture")
    assert image.is_ours(tmp_path / "ours.png")
    for other in (foreign(tmp_path / "theirs.png"), tmp_path / "text.png", tmp_path / "absent.png"):
        assert not image.is_ours(other)


def test_photographs_in_the_folder_of_results_are_predicted(tmp_path):
    foreign(tmp_path / "day1.png")
    foreign(tmp_path / "day2/a.png")
    for end in ("_depth.png", "_color.png"):  # with no .npy beside them any more
        image.save_png(tmp_path / f"day2/day1{end}", GREY)
    assert found(tmp_path) == ["a.png", "day1.png"]


def test_a_link_that_leads_to_itself_costs_no_other_picture(tmp_path):
    foreign(tmp_path / "good.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    paths = find_pictures([tmp_path], {})
    assert [picture.output.name for picture in name_outputs(paths, tmp_path)] == ["good", "loop"]
