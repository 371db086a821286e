"""The models that come with the package: their size, their cost, and that they see depth."""

import collections
import pathlib
import socket

import numpy as np
import pytest
from PIL import Image

from configs import common
from configs.nano import train as nano
from d3epth_jax import cli, data, macs, pipeline
from d3epth_jax.evaluation import baselines
from d3epth_jax.evaluation.evaluate import model_predictor
from d3epth_jax.evaluation.protocols import make_protocol
from d3epth_jax.evaluation.scores import Predictor, evaluate
from d3epth_jax.models import presets
from d3epth_jax.pipeline import DepthPipeline
from d3epth_jax.weights import hub
from d3epth_jax.weights.download import BUNDLED, locate

MEGABYTES = {"nano": 8, "nano-teacher": 16}


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_models_are_small(name):
    size = sum(path.stat().st_size for path in locate(name).rglob("*") if path.is_file())
    assert 0 < size <= MEGABYTES[name] * 2**20


def test_the_student_costs_a_third_of_its_teacher():
    def cost(name):
        model, params, *_ = hub.load_model(name)
        parts = macs.of_model(model, params, (nano.HEIGHT, nano.WIDTH))
        return sum(part.dense for part in parts.values())

    assert 3 * cost("nano") <= cost("nano-teacher")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("nano") == BUNDLED["nano"]
    assert locate("nano", subfolder="unet") == BUNDLED["nano"] / "unet"
    pathlib.Path("nano").mkdir()
    assert locate("nano") == pathlib.Path("nano")
    with pytest.raises(FileNotFoundError, match="hides the model of the package"):
        hub.load_model("nano")


def test_predict_needs_no_more_than_a_photo_and_no_network(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    (tmp_path / "nano").mkdir()  # of the user's, and no model
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("network"))
    assert cli.main(["predict", "photo.png"]) == 0
    depth = np.load(tmp_path / "depth_maps/photo.npy")
    assert depth.shape == (48, 64) and 0 <= depth.min() < depth.max() <= 1


def test_a_run_knows_the_bundled_model_that_it_starts_from():
    assert hub.digest("nano-teacher") == hub.digest(BUNDLED["nano-teacher"]) != ""
    assert hub.load_model("nano").model.base == "nano"


@pytest.mark.parametrize(("name", "preset"), [("nano", "d3_nano"), ("nano-teacher", "d2_nano")])
def test_bundled_models_have_the_presets_shapes(name, preset):
    model = hub.load_model(name).model
    assert (model.unet, model.autoencoder) == presets.get(preset)


def test_native_size_is_warned_of(caplog):
    pipeline._tell.cache_clear()  # it tells everything once
    picture = np.zeros((64, 64, 3), np.uint8)
    DepthPipeline.from_pretrained("nano")(picture, processing_resolution=0)
    assert "trained on pictures squeezed to 1.33:1, 192 long" in caplog.text


def scores(source, protocol, *models, num_images=0):
    """Results of the ramp, in both spaces, and of the models."""
    pipes = {name: DepthPipeline.from_pretrained(name) for name in models}
    space = pipes["nano"].model.prediction_type
    predictors = {
        "ramp": Predictor(baselines.ramp),
        "ramp in its space": Predictor(baselines.falling(baselines.ramp), space),
        **{name: model_predictor(pipe, protocol, 8) for name, pipe in pipes.items()},
    }
    return evaluate(
        predictors, source, protocol, title="", num_images=num_images, batch_size=8, num_pictures=0
    )


# At the size of both, which is the teacher's, and at the student's own.
@pytest.mark.parametrize(("resolution", "f1"), [(max(nano.HEIGHT, nano.WIDTH), 0.03), (-1, 0.06)])
def test_the_student_sees_more_than_the_ramp_and_nearly_what_its_teacher_sees(resolution, f1):
    source = nano.scenes(common.PROCEDURAL_TEST, 128, nano.LARGER)
    protocol = make_protocol("default", processing_resolution=resolution)
    results = scores(data.make_source(**source), protocol, "nano", "nano-teacher", num_images=128)
    of = results.mean
    assert of("nano") < min(0.18, 0.5 * of("ramp")), of("nano")
    assert of("nano") < 0.65 * of("ramp in its space")
    assert of("nano") <= 1.1 * of("nano-teacher")
    assert of("nano", "boundary_f1") > f1


def test_the_student_beats_the_ramp_on_every_source_of_several_real_pictures(shared):
    protocol = make_protocol("default", processing_resolution=-1)
    results = scores(data.make_source(**common.folder(str(shared / "rgbd"))), protocol, "nano")
    of = results.mean_over_groups
    assert of("nano") < 0.6 * of("ramp"), of("nano")
    assert of("nano") < 0.7 * of("ramp in its space")
    counts = collections.Counter(row["group"] for row in results.rows if row["predictor"] == "nano")
    for group, count in counts.items():
        # RELLIS-3D is one picture, on which it is level with the ramp.
        bound = 1.0 if count > 2 else 1.01
        assert results.mean("nano", group=group) < bound * results.mean("ramp", group=group), group
