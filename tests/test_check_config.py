"""Settings: what is wrong with them is told at once, and what they say is what is trained."""

import dataclasses
import logging
import math

import pytest

from configs import quickstart, stage1, stage2
from configs.nano import train as nano
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.training import check_config, model_setup, train
from d3epth_jax.weights import hub
from tests.conftest import small_model

NONE = {f"loss.beta.{term}": 0.0 for term in nano.stage2().loss.beta}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stage": "pixels"}, "unknown stage 'pixels'"),
        ({"seed": -1}, "config.seed is at least 0, not -1"),
        ({"train.accumulate": 0}, "train.accumulate is at least 1, not 0"),
        ({"train.keep_checkpoints": 0}, "train.keep_checkpoints is at least 1, not 0"),
        ({"train.profile": (5,)}, r"train.profile=\(5,\): \(first step, number of steps\)"),
        ({"train.profile": (0, 3)}, r"train.profile=\(0, 3\) begins before step 1"),
        ({"teacher.steps": -1}, "teacher.steps is at least 0, not -1"),
        ({"optim.clip": -1.0}, "optim.clip is at least 0, not -1.0"),
        ({"optim.b1": 1.0}, "optim.b1=1.0: a number from 0 on and below 1"),
        ({"train.max_ema_decay": -1.0}, "train.max_ema_decay=-1.0: a number from 0 on"),
        ({"schedule.warmup_steps": -5}, "schedule.warmup_steps is at least 0, not -5"),
        ({"data.num_workers": -4}, "data.num_workers is at least 0, not -4"),
        ({"model.dtype": "bf16"}, "unknown model.dtype 'bf16'.*float32.*bfloat16"),
        ({"model.preset": "d4", "init": ""}, "unknown model preset 'd4'"),
        ({"model.encoder": "techer", "init": ""}, "unknown model.encoder 'techer'"),
        ({"model.prediction_type": "disp"}, "unknown model.prediction_type 'disp'"),
        ({"model.processing_resolution": -1}, "model.processing_resolution is at least 0, not -1"),
        ({"conv_in_bias": "half"}, "unknown conv_in_bias 'half'"),
        ({"weighting.name": "gradnorm"}, "unknown weighting 'gradnorm'"),
        ({"schedule.schedule": "linear"}, "unknown schedule 'linear'"),
        ({"optim.moments": "float8"}, "unknown moments 'float8'|unknown optim.moments 'float8'"),
        ({"eval.protocol": "nyuu"}, "unknown protocol 'nyuu'"),
        ({"eval.alignment": "none"}, "alignment=none is for predictions in metres"),
        ({"eval.crop": "nyu_eign"}, "unknown crop 'nyu_eign'"),
        ({"loss.preset": "e2e"}, "unknown loss.preset 'e2e'"),
        ({"loss.options.penalty": "l2"}, "unknown penalty 'l2'"),
        ({"loss.options.tau": 0.0}, "tau must be positive"),
        ({"loss.beta.edge": -0.5}, "loss.beta.edge is at least 0, not -0.5"),
        ({"loss.beta.edge": math.nan}, "loss.beta.edge is at least 0, not nan"),
        ({"data.height": 0}, "data.height is at least 1, not 0"),
        (NONE, "no loss has a weight"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    config = nano.stage2(tiny=True)
    check_config.check(config)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        check_config.check(config)


def test_all_wrong_settings_are_told_before_anything_is_trained(tmp_path):
    config = stage2.get_config("tiny")
    config.weighting.name = "dwaa"
    config.schedule.schedule = "linear"
    config.init_config.schedule.schedule = "quadratic"
    with pytest.raises(ValueError) as error:
        train.run(config, tmp_path / "run")
    for word in ("unknown weighting 'dwaa'", "schedule 'linear'", "schedule 'quadratic'"):
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_model_that_goes_on_at_one_shape_has_that_one(tmp_path):
    space = "sqrt_disparity"  # nano's
    model = small_model(processing_resolution=48, processing_aspect=1.5, prediction_type=space)
    hub.save_model(tmp_path / "model", model, init_params(model, 0))
    config = nano.stage2(tiny=True)
    config.init = str(tmp_path / "model")
    nano.resize(config, 32, 64)
    went_on = model_setup.make_student(config, model_setup.Start()).model
    assert (went_on.processing_resolution, went_on.processing_aspect) == (64, 2.0)
    config.model.processing_aspect = None  # any shape: as it was
    went_on = model_setup.make_student(config, model_setup.Start()).model
    assert (went_on.processing_resolution, went_on.processing_aspect) == (48, 1.5)


def test_a_model_goes_on_in_its_space_or_learns_the_one_that_is_asked_for(tmp_path, caplog):
    model = small_model(prediction_type="disparity")
    hub.save_model(tmp_path / "model", model, init_params(model, 0))
    config = stage2.get_config()
    config.init = str(tmp_path / "model")

    def becomes(space):
        config.model.prediction_type = space
        caplog.clear()
        return model_setup.make_student(config, model_setup.Start()).model.prediction_type

    with caplog.at_level(logging.INFO):
        assert becomes(None) == becomes("disparity") == "disparity"
        assert "instead" not in caplog.text
        assert becomes("sqrt_disparity") == "sqrt_disparity"
        assert "predicts disparity; it learns sqrt_disparity instead" in caplog.text
        with pytest.raises(ValueError, match=r"set loss\.options\.upright=True and loss"):
            becomes("depth")  # the other way round
        config.loss.options.upright, config.loss.beta.range = True, 0.5
        assert becomes("depth") == "depth"


def test_a_student_of_a_preset_predicts_what_its_teacher_does(tmp_path):
    config = quickstart.stage1(tiny=True)
    teacher = model_setup.Start(small_model(prediction_type="disparity"), {"prompt": None})
    config.model.update(prediction_type=None, unet="own")
    assert model_setup.make_student(config, teacher).model.prediction_type == "disparity"
    nothing = model_setup.Start()
    assert model_setup.make_student(config, nothing).model.prediction_type == "depth"
    hub.save_model(tmp_path / "sd", small_model(), init_params(small_model(), 0))
    index = tmp_path / "sd/model_index.json"
    index.write_text(index.read_text().replace("MarigoldDepthPipeline", "StableDiffusionPipeline"))
    config.init, config.autoencoder.path = str(tmp_path / "sd"), ""  # predicts no depth yet
    assert model_setup.make_student(config, teacher).model.prediction_type == "disparity"


def test_a_teacher_whose_one_step_has_hardly_any_noise_is_told_of(tmp_path, caplog):
    config = quickstart.stage1()
    model = small_model(denoising_steps=1)
    for spacing, told in (("leading", True), ("trailing", False)):
        schedule = dataclasses.replace(model.schedule, timestep_spacing=spacing)
        changed = dataclasses.replace(model, schedule=schedule)
        hub.save_model(tmp_path / spacing, changed, init_params(model, 0))
        config.teacher.path = str(tmp_path / spacing)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model_setup.read_teacher(config)
        assert ("hardly any noise" in caplog.text) is told


def test_short_trainings_are_not_all_warm_up():
    configs = [stage1.get_config("tiny"), stage2.get_config("tiny")]
    configs += [quickstart.stage1(), quickstart.stage2()]
    for config in configs:
        assert 0 < config.schedule.warmup_steps < 0.6 * config.train.steps
