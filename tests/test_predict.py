"""d3epth predict with models and pictures as people have them; the rest is in test_cli."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from d3epth_jax import DepthPipeline, image
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.weights import hub
from tests.conftest import small_model
from tests.test_cli import FakePipeline, bad_pictures, greens, names, predict, write
from tests.test_image import damaged_exif


@pytest.mark.parametrize(
    "settings, options, reason",
    [
        ({}, ["--ensemble-size", "2"], "all members of an ensemble would be equal"),
        ({"denoising_steps": None}, [], "give num_inference_steps (--steps)"),
        ({"processing_resolution": None}, [], "give processing_resolution"),
        ({"schedule": {"prediction_type": "epsilon"}}, [], "an epsilon model has no z0"),
    ],
    ids=["ensemble", "steps", "resolution", "epsilon"],
)
def test_what_no_picture_can_be_predicted_with_is_one_message(
    tmp_path, capsys, settings, options, reason
):
    model = small_model(**{k: v for k, v in settings.items() if k != "schedule"})
    schedule = dataclasses.replace(model.schedule, **settings.get("schedule", {}))
    model = dataclasses.replace(model, schedule=schedule)
    hub.save_model(tmp_path / "model", model, init_params(model, 0))
    for name in "ab":
        write(tmp_path / "in" / f"{name}.png")
    code = predict(tmp_path / "in", *options, out=tmp_path / "out", model=str(tmp_path / "model"))
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"d3epth: the model {tmp_path / 'model'} cannot be used:\n")
    assert message.count(reason) == 1 and message.count("\n") == 2 and "a.png" not in message
    assert not (tmp_path / "out").exists()


@pytest.fixture
def photographs(tmp_path):
    """A folder of usable pictures that are all square at the model's resolution."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "in"
    write(folder / "single.png", (1, 1))
    for side in (20, 64):
        grey = rng.integers(0, 65536, (side, side)).astype(np.uint16)
        Image.fromarray(grey).save(folder / f"16_bit_{side}.png")
        Image.fromarray((grey // 257).astype(np.uint8)).save(folder / f"8_bit_{side}.png")
    return folder


def test_a_real_model_predicts_all_that_are_good(saved, photographs, tmp_path, capsys):
    directory, _ = saved
    model = str(directory)
    assert predict(photographs, "--batch-size", 4, out=tmp_path / "out", model=model) == 0
    captured = capsys.readouterr()
    assert "5 of 5 pictures" in captured.out and "skipped" not in captured.err
    pipe = DepthPipeline.from_pretrained(directory)
    for path in photographs.iterdir():
        depth = np.load(tmp_path / "out" / f"{path.stem}.npy")
        expected = pipe(path, batch_size=4).prediction[0, ..., 0]
        assert depth.shape == image.load(path).shape[:2]
        np.testing.assert_allclose(depth, expected, atol=1e-5)
        with Image.open(tmp_path / "out" / f"{path.stem}_depth.png") as picture:
            np.testing.assert_allclose(np.asarray(picture), expected * 65535, atol=1.5)


def test_a_real_model_leaves_out_what_is_bad(saved, photographs, tmp_path, capsys):
    bad = bad_pictures(photographs) | {"thin.png": "shrinks to 64x0"}
    Image.fromarray(np.arange(6, dtype=np.int32)[None]).save(photographs / "counts.tif")
    Image.fromarray(np.arange(6, dtype=np.uint16)[None]).save(photographs / "12_bit.png")
    bad |= {"counts.tif": "range is unknown", "12_bit.png": "nearly black"}
    write(photographs / "damaged_exif.jpg", exif=damaged_exif())  # good, and of another size
    good = {path.stem for path in photographs.iterdir() if path.name not in bad}
    code = predict(photographs, "--batch-size", 4, out=tmp_path / "out", model=str(saved[0]))
    assert code == 1
    assert {path.stem for path in (tmp_path / "out").glob("*.npy")} == good
    captured = capsys.readouterr()
    assert f"{len(good)} of {len(good) + len(bad)} pictures" in captured.out
    end = captured.err.partition(f"{len(bad)} failed:")[2]
    for name, reason in bad.items():
        (line,) = [line for line in end.splitlines() if f"/{name}: " in line]
        assert reason in line


def test_a_seed_gives_a_picture_the_same_depth_alone_and_among_others(tmp_path):
    model = small_model(denoising_steps=None)
    hub.save_model(tmp_path / "model", model, init_params(model, 0))
    rng = np.random.default_rng(0)
    for name in "abc":
        noise = rng.integers(0, 256, (16, 24, 3), np.uint8)
        image.save_png(tmp_path / "in" / f"{name}.png", noise)
    call = {"model": str(tmp_path / "model")}
    options = ("--steps", 2, "--batch-size", 2)  # at zero SNR one step ignores its latents
    for out, seed, wanted in (("all", 7, ""), ("alone", 7, "b.png"), ("other", 8, "b.png")):
        arguments = tmp_path / "in" / wanted, *options, "--seed", seed
        assert predict(*arguments, out=tmp_path / out, **call) == 0
    depth = {out: np.load(tmp_path / out / "b.npy") for out in ("all", "alone", "other")}
    np.testing.assert_allclose(depth["all"], depth["alone"], atol=1e-5)
    assert np.abs(depth["alone"] - depth["other"]).max() > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_not_written(tmp_path, capsys, monkeypatch, value):
    class Broken(FakePipeline):
        def __call__(self, images, **settings):
            out = super().__call__(images, **settings)
            out.prediction[[picture[0, 0, 1] == 2 for picture in images], -1, -1] = value
            return out

    monkeypatch.setattr("d3epth_jax.pipeline.DepthPipeline", Broken)
    for green in range(4):
        write(tmp_path / "in" / f"{green}.png", green=green)
    assert predict(tmp_path / "in", "--batch-size", 4, out=tmp_path / "out") == 1
    assert greens(tmp_path / "out") == {"0": 0, "1": 1, "3": 3}
    assert not [name for name in names(tmp_path / "out") if name.startswith("2")]
    captured = capsys.readouterr()
    assert "3 of 4 pictures predicted" in captured.out
    assert "2.png: the model predicts NaN or infinity" in captured.err


def test_weights_beyond_float16_are_no_success(tmp_path, capsys):
    model = small_model()
    params = init_params(model, 0)
    kernel = params["unet"]["conv_in"]["kernel"]
    params["unet"]["conv_in"]["kernel"] = np.full_like(kernel, np.inf, np.float16)
    hub.save_model(tmp_path / "model", model, params)
    picture = write(tmp_path / "a.png", (24, 16))
    code = predict(picture, out=tmp_path / "out", model=str(tmp_path / "model"))
    assert code == 1 and not (tmp_path / "out").exists()
    assert "a.png: the model predicts NaN or infinity" in capsys.readouterr().err


def test_a_file_in_the_way_of_the_results_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("d3epth_jax.pipeline.DepthPipeline", FakePipeline)
    write(tmp_path / "in/a/x.png")
    write(tmp_path / "in/b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").touch()
    assert predict(tmp_path / "in", out=tmp_path / "out") == 1
    told = f"a/x.png: cannot write {tmp_path / 'out/a/x_color.png'}: File exists"
    assert told in capsys.readouterr().err
    assert list(greens(tmp_path / "out")) == ["b"]


def test_the_uncertainty_of_a_former_map_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("d3epth_jax.pipeline.DepthPipeline", FakePipeline)
    out, more = tmp_path / "out", ("--ensemble-size", 3, "--uncertainty")
    for name in "ab":
        predict(write(tmp_path / f"{name}.png"), *more, out=out)
    predict(tmp_path / "a.png", out=out)
    kept = [name for name in names(out) if "uncertainty" in name]
    assert kept == ["b_uncertainty.npy"] and "a.npy" in names(out)
    # A picture may be called so.
    predict(write(tmp_path / "a_uncertainty.png"), out=out)
    predict(tmp_path / "a.png", out=out)
    assert "a_uncertainty.npy" in names(out)


def test_a_real_missing_model(tmp_path, capsys):
    code = predict(write(tmp_path / "a.png"), out=tmp_path / "out", model=str(tmp_path / "none"))
    assert code == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "none") in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from d3epth_jax import cli\n"
        "try: cli.main(['predict', '--help'])\n"
        "except SystemExit: assert not {'jax', 'numpy', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--processing-resolution" in done.stdout
    told = "near is red, far is blue; gray: near is black, far is white"
    assert told in " ".join(done.stdout.split())
