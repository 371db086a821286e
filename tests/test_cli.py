"""d3epth predict, with a pipeline that only pretends."""

import inspect
import io
import os
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from d3epth_jax import cli, image
from d3epth_jax.pipeline import DepthOutput, DepthPipeline

DEFAULTS = {
    "processing_resolution": None,
    "num_inference_steps": None,
    "ensemble_size": 1,
    "output_uncertainty": False,
}


class FakePipeline:
    """Depth is the green channel. Keeps the arguments of its loading, check and calls."""

    prediction_type = "depth"
    breaks = staticmethod(lambda pictures, batch_size: None)  # raises what a test wants

    @property
    def model(self):
        return self

    def __init__(self):
        self.calls, self.settings = [], []

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id, *, dtype="float32", attention="auto", fold=True, revision=None,
        variant=None, subfolder=None, cache_dir=None, token=None, local_files_only=False,
    ):  # fmt: skip
        cls.loaded = dict(locals())
        cls.last = cls()
        return cls.last

    def check(
        self, *, processing_resolution=None, num_inference_steps=None, ensemble_size=1,
        batch_size=1, key=None, latents=None, output_uncertainty=False,
    ):  # fmt: skip
        self.checked = {k: v for k, v in locals().items() if k not in ("self", "latents")}

    def __call__(
        self, images, *, processing_resolution=None, match_input_resolution=True,
        num_inference_steps=None, ensemble_size=1, batch_size=1, key=None, latents=None,
        output_uncertainty=False, output_latent=False,
    ):  # fmt: skip
        settings = dict(locals())
        self.calls.append(([picture.shape[:2] for picture in images], batch_size))
        self.settings.append({k: settings[k] for k in (*DEFAULTS, "key")})
        for picture in images:
            assert picture.shape == images[0].shape and picture.dtype == np.uint8
            image.processing_size(*picture.shape[:2], processing_resolution or 768)
        self.breaks(images, batch_size)
        depth = np.stack(images)[..., 1:2].astype(np.float32) / 255
        uncertainty = depth / 2 if output_uncertainty else None
        return DepthOutput(depth, self.prediction_type, uncertainty)


@pytest.fixture
def fake(monkeypatch):
    class Fake(FakePipeline):
        loaded = None

    monkeypatch.setattr("d3epth_jax.pipeline.DepthPipeline", Fake)
    return Fake


def predict(*arguments, out, model="model") -> int:
    return cli.main(["predict", *map(str, arguments), "--model", model, "--out", str(out)])


def write(path, size=(6, 4), green=100, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (0, green, 0)).save(path, **settings)
    return path


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def greens(folder):
    """{name of a result: the green that its picture had}."""
    return {
        str(p.relative_to(folder))[:-4]: round(255 * float(np.load(p)[0, 0]))
        for p in sorted(folder.rglob("*.npy"))
    }


def test_writes_what_it_says(fake, tmp_path, capsys):
    ramp = np.zeros((3, 256, 3), np.uint8)
    ramp[..., 1] = np.arange(256)
    image.save_png(tmp_path / "ramp.v2.png", ramp)
    assert predict(tmp_path / "ramp.v2.png", out=tmp_path / "new" / "out") == 0
    out = tmp_path / "new" / "out"
    assert names(out) == ["ramp.v2.npy", "ramp.v2_color.png", "ramp.v2_depth.png"]
    depth = np.load(out / "ramp.v2.npy")
    assert depth.dtype == np.float32 and depth.shape == (3, 256)
    np.testing.assert_array_equal(depth[0], np.arange(256, dtype=np.float32) / 255)
    with Image.open(out / "ramp.v2_depth.png") as picture:
        assert picture.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(picture)[0], np.arange(256) * 257)
    colors = image.load(out / "ramp.v2_color.png")
    np.testing.assert_array_equal(colors, image.visualize_depth(depth[..., None]))
    told = capsys.readouterr().out
    assert told == f"1 of 1 pictures predicted; results are in {out} (depth, far is large)\n"
    assert fake.last.settings == [DEFAULTS | {"key": None}]


@pytest.mark.parametrize("space", ["depth", "disparity", "sqrt_disparity"])
@pytest.mark.parametrize(
    "color_map, near, far",
    [("Spectral", (158, 1, 66), (94, 79, 162)), ("gray", (0, 0, 0), (255, 255, 255))],
)
def test_near_and_far_have_the_colours_of_the_help(
    fake, tmp_path, capsys, space, color_map, near, far
):
    fake.prediction_type = space
    large, small = (far, near) if space == "depth" else (near, far)
    for name, green, color in (("large", 255, large), ("small", 0, small)):
        picture = write(tmp_path / f"{name}.png", green=green)
        assert predict(picture, "--color-map", color_map, out=tmp_path / "out") == 0
        result = image.load(tmp_path / "out" / f"{name}_color.png")[0, 0]
        np.testing.assert_array_equal(result, color)
        # The numbers are the model's.
        assert np.load(tmp_path / "out" / f"{name}.npy").min() == green / 255
    side = "far" if space == "depth" else "near"
    assert f"({space}, {side} is large)" in capsys.readouterr().out


def test_passes_every_setting_on(fake, tmp_path):
    picture = write(tmp_path / "a.png")
    options = (
        "--processing-resolution 64 --steps 4 --ensemble-size 3 --batch-size 2 --dtype bfloat16 "
        "--attention chunked --revision main --variant fp16 --subfolder sub --cache-dir cache "
        "--offline --uncertainty --seed 7"
    )
    code = predict(picture, *options.split(), out=tmp_path / "out", model="owner/name")
    assert code == 0
    loaded = {k: v for k, v in fake.loaded.items() if k != "cls"}
    assert loaded == {
        "path_or_hub_id": "owner/name", "dtype": "bfloat16", "attention": "chunked",
        "fold": True, "revision": "main", "variant": "fp16", "subfolder": "sub",
        "cache_dir": "cache", "token": None, "local_files_only": True,
    }  # fmt: skip
    (settings,) = fake.last.settings
    assert fake.last.checked == settings | {"batch_size": 2}
    key = settings.pop("key")
    assert list(settings.values()) == [64, 4, 3, True]
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(7))).all()
    assert fake.last.calls == [([(4, 6)], 2)]
    uncertainty = np.load(tmp_path / "out" / "a_uncertainty.npy")
    assert uncertainty.shape == (4, 6) and uncertainty.dtype == np.float32
    np.testing.assert_allclose(uncertainty, 50 / 255)


def test_the_fake_has_the_pipelines_arguments():
    for name in ("from_pretrained", "check", "__call__"):
        fake, real = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(FakePipeline, name), getattr(DepthPipeline, name))
        )
        assert fake == real


def test_folders_are_searched_and_kept_apart(fake, tmp_path):
    root = tmp_path / "in"
    for number, name in enumerate(["b.JPG", "a.png", "deep/er/c.webp", "deep/a.tif"]):
        write(root / name, green=10 * number + 10)
    for hidden in (".a.png", ".hidden/b.png", "notes.txt"):
        write(root / hidden, format="png")
    single = write(tmp_path / "elsewhere" / "d", format="png", green=99)  # named: any suffix
    assert predict(root, single, single, out=tmp_path / "out") == 0
    found = greens(tmp_path / "out")
    assert list(found) == ["a", "b", "d", "deep/a", "deep/er/c"]
    assert found["d"] == 99 and abs(found["deep/a"] - 40) < 3


def test_no_result_overwrites_another(fake, tmp_path):
    pictures = [
        write(tmp_path / name, green=green)
        for name, green in {
            "a.png": 1, "a.bmp": 2, "x/a.png": 3, "y/a.png": 4, "a_png.png": 5, "A.PNG": 6,
            "a_uncertainty.png": 7,
        }.items()
    ]  # fmt: skip
    assert predict(*pictures, out=tmp_path / "out") == 0
    first = greens(tmp_path / "out")
    # The last one's plain name is that of the uncertainty of the first.
    assert first == {
        "a": 1, "a_bmp": 2, "a_png": 3, "a_png_2": 4, "a_png_png": 5, "A_PNG_3": 6,
        "a_uncertainty_png": 7,
    }  # fmt: skip
    assert predict(*pictures, out=tmp_path / "out") == 0
    assert greens(tmp_path / "out") == first


@pytest.mark.parametrize("out", ["in", "in/results", "in/sub/results", "."])
def test_results_are_not_taken_for_pictures(fake, tmp_path, out):
    write(tmp_path / "in" / "a.png")
    write(tmp_path / "in" / "sub" / "b_depth.png")  # a picture, for it is not ours
    for _ in range(2):
        assert predict(tmp_path / "in", out=tmp_path / out) == 0
        assert sum(len(sizes) for sizes, _ in fake.last.calls) == 2
    # Those of an earlier run with another --out are not either.
    assert predict(tmp_path / "in", out=tmp_path / "in" / "other") == 0
    assert sum(len(sizes) for sizes, _ in fake.last.calls) == 2


def test_no_result_overwrites_a_picture(fake, tmp_path):
    write(tmp_path / "a.png", green=1)
    write(tmp_path / "a_depth.png", green=2)
    before = (tmp_path / "a_depth.png").read_bytes()
    assert predict(tmp_path, out=tmp_path) == 0
    assert (tmp_path / "a_depth.png").read_bytes() == before
    assert greens(tmp_path) == {"a_depth": 2, "a_png": 1}


def test_no_result_takes_the_place_of_a_measured_depth_map(fake, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "rgb" / f"{name}.png", green=7)
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth/a.npy", np.full((4, 6), 3.5, np.float32))
    for _ in range(2):  # the second time the results are known as such
        assert predict(tmp_path / "rgb", out=tmp_path / "depth") == 0
        assert np.load(tmp_path / "depth/a.npy").min() == 3.5
        assert sorted(p.name for p in (tmp_path / "depth").glob("*.npy")) == [
            *("a.npy", "a_png.npy", "b.npy")
        ]


def test_batches_are_of_one_size_and_count_turned_pictures(fake, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(3):
        write(tmp_path / f"wide{i}.png", (6, 4))
        write(tmp_path / f"tall{i}.png", (4, 6))
        write(tmp_path / f"turned{i}.jpg", (6, 4), exif=exif)
    assert predict(tmp_path, "--batch-size", 2, out=tmp_path / "out") == 0
    shapes = [shapes for shapes, _ in fake.last.calls]
    assert [len(s) for s in shapes] == [2, 1, 2, 2, 2]
    assert [s[0] for s in shapes] == [(4, 6)] * 2 + [(6, 4)] * 3
    assert len(list((tmp_path / "out").glob("*.npy"))) == 9


def bad_pictures(folder):
    """{name: a part of the reason}"""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8))
    large = noise.resize((64, 64))
    buffer = io.BytesIO()
    large.save(buffer, "jpeg")
    (folder / "half.jpg").write_bytes(buffer.getvalue()[:900])
    (folder / "empty.png").touch()
    (folder / "phone.HEIC").write_bytes(b"    ftypheic")
    write(folder / "thin.png", (1, 5000))
    write(folder / "text.png").write_text("this is no picture")
    # A PNG's header: width and height are at bytes 16 to 24, their checksum at 29.
    write(folder / "bomb.png")
    data = bytearray((folder / "bomb.png").read_bytes())
    data[16:24] = (30000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    (folder / "bomb.png").write_bytes(data)
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return {
        "half.jpg": "truncated",
        "empty.png": "not a picture",
        "phone.HEIC": "save it as JPEG",
        "thin.png": "shrinks to 768x0",
        "text.png": "not a picture",
        "bomb.png": "decompression bomb",
        "dangling.png": "No such file",
    }


def test_bad_pictures_are_named_and_the_rest_is_done(fake, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    bad = bad_pictures(folder)
    write(folder / "good.png")
    write(folder / "single.png", (1, 1))
    write(folder / "same_size_as_half.png", (64, 64))
    (tmp_path / "nothing" / "in here").mkdir(parents=True)
    bad |= {"absent.png": "no such file", "nothing": "no picture in this folder"}
    code = predict(
        tmp_path / "absent.png", folder, tmp_path / "nothing", "--batch-size", 4,
        out=tmp_path / "out",
    )  # fmt: skip
    assert code == 1
    assert list(greens(tmp_path / "out")) == ["good", "same_size_as_half", "single"]
    captured = capsys.readouterr()
    assert "3 of 12 pictures" in captured.out
    now, _, end = captured.err.partition("9 failed:")
    assert "Traceback" not in captured.err
    for name, reason in bad.items():
        for text in (now, end):  # when it happens, and once more at the end
            (line,) = [line for line in text.splitlines() if f"/{name}: " in line]
            assert reason in line and line.count(name) == 1
    # Only what came from one picture failed with it.
    assert ([(64, 64)], 4) in fake.last.calls


@pytest.mark.parametrize("reader", ["upright_size", "load"])
def test_whatever_reading_a_picture_raises_costs_that_one_alone(
    fake, tmp_path, capsys, monkeypatch, reader
):
    read = getattr(image, reader)

    def fail(path):
        if path.name == "b.png":
            raise KeyError("tag")
        return read(path)

    monkeypatch.setattr(image, reader, fail)
    for green, name in enumerate("abc"):
        write(tmp_path / f"{name}.png", green=green)
    assert predict(tmp_path, "--batch-size", 3, out=tmp_path / "out") == 1
    assert greens(tmp_path / "out") == {"a": 0, "c": 2}
    assert "b.png: cannot be read (KeyError: 'tag')\n" in capsys.readouterr().err


def test_an_error_in_the_program_is_not_a_pictures(fake, tmp_path):
    def breaks(pictures, batch_size):
        raise TypeError("of the model")

    fake.breaks = staticmethod(breaks)
    with pytest.raises(TypeError, match="of the model"):
        predict(write(tmp_path / "a.png"), out=tmp_path / "out")


def test_nothing_to_predict_loads_no_model(fake, tmp_path, capsys):
    assert predict(tmp_path / "absent.png", out=tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "absent.png: no such file" in captured.err
    assert captured.out == "0 of 1 pictures predicted\n"
    assert fake.loaded is None and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [RuntimeError("OUT: Out of\n memory"), MemoryError()])
def test_a_batch_that_fails_is_done_one_by_one(fake, tmp_path, capsys, error):
    def breaks(pictures, batch_size):
        if batch_size > 1 or pictures[0][0, 0, 1] == 2:
            raise error

    fake.breaks = staticmethod(breaks)
    for green in range(4):
        write(tmp_path / f"{green}.png", green=green)
    assert predict(tmp_path, "--batch-size", 4, out=tmp_path / "out") == 1
    assert greens(tmp_path / "out") == {"0": 0, "1": 1, "3": 3}
    assert [batch_size for _, batch_size in fake.last.calls] == [4, 1, 1, 1, 1]
    reason = capsys.readouterr().err.strip().rpartition("2.png: ")[2]
    assert reason in ("OUT: Out of memory", "MemoryError")


def test_a_result_that_cannot_be_written_is_named(fake, tmp_path, capsys, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if target.name == "b_color.png":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    for name in "abc":
        write(tmp_path / "in" / f"{name}.png")
    assert predict(tmp_path / "in", out=tmp_path / "out") == 1
    told = f"b.png: cannot write {tmp_path / 'out/b_color.png'}: No space left on device"
    assert told in capsys.readouterr().err
    assert {"a_color.png", "c_color.png"} <= set(names(tmp_path / "out"))
    assert not [name for name in names(tmp_path / "out") if "partial" in name]


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("own/x: gone"), ValueError("bad keys:\n  a"), RuntimeError("Out of memory")],
)
def test_a_model_that_cannot_be_loaded_is_one_message(fake, tmp_path, capsys, error):
    def fail(*_, **__):
        raise error

    fake.from_pretrained = fail
    assert predict(write(tmp_path / "a.png"), out=tmp_path / "out", model="own/x") == 2
    message = capsys.readouterr().err
    assert message == f"d3epth: the model own/x cannot be used:\n{error}\n"
    assert not (tmp_path / "out").exists()


def test_interrupted_keeps_what_is_done(fake, tmp_path, capsys):
    def breaks(pictures, batch_size):
        if pictures[0][0, 0, 1] == 2:
            raise KeyboardInterrupt

    fake.breaks = staticmethod(breaks)
    for green in range(4):
        write(tmp_path / f"{green}.png", green=green)
    assert predict(tmp_path, out=tmp_path / "out") == 130
    assert greens(tmp_path / "out") == {"0": 0, "1": 1}
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "0"], "must be at least 1, not 0"),
        (["--processing-resolution", "-1"], "must be at least 0, not -1"),
        (["--steps", "many"], "invalid integer value: 'many'"),
        (["--seed", "9" * 23], "must be in 0..4294967295, not 999"),
        (["--uncertainty"], "set --ensemble-size to 3 or more"),
        (["--color-map", "jet"], "choose from"),
        ([""], "an empty name; for the folder you are in say ."),
        (["--model", ""], "an empty name; for the default leave the option out"),
    ],
)
def test_wrong_arguments(fake, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        predict(write(tmp_path / "a.png"), *arguments, out=tmp_path / "out")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "sub/folder"])
def test_out_that_is_a_file(fake, tmp_path, capsys, below):
    picture = write(tmp_path / "a.png")
    with pytest.raises(SystemExit) as stopped:
        predict(picture, out=picture / below)
    assert stopped.value.code == 2
    assert f"cannot be made: {picture} is no folder" in capsys.readouterr().err
    assert fake.loaded is None  # told before a model is fetched


def test_entry_points():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"d3epth": "d3epth_jax.cli:main"}
    command = [sys.executable, "-m", "d3epth_jax", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and "predict" in done.stdout
