"""What does not train is folded and cast once: same losses, same gradients, same features."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common, stage2
from d3epth_jax import inference
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.training import from_config, model_setup, train
from d3epth_jax.training.stages import latent, pixel
from d3epth_jax.training.train_state import merge, split_trainable
from d3epth_jax.weights import fold
from tests import test_fold, train_memory
from tests.conftest import scenes, small_model, small_unet
from tests.unet_oracle import relative_error


@pytest.mark.parametrize("autoencoder", [pytest.param("kl", marks=pytest.mark.slow), "tiny"])
def test_gradients_through_a_folded_decoder_are_the_same(autoencoder):
    model, params = test_fold.make(autoencoder)
    trainable, rest = split_trainable(params, ("unet/",))
    computed, folded = fold.fold_frozen(model, trainable, rest)
    assert computed.folding.upsampling == ("decoder",)  # the UNet trains
    batch = scenes(2)

    def gradients(model, rest):
        loss_fn = pixel.make_loss(model)

        def total(trainable):
            losses, _, _ = loss_fn(merge(trainable, rest), {}, batch)
            return losses["ssi"].sum() + losses["edge"].sum()

        return jax.jit(jax.value_and_grad(total))(trainable)

    (loss, ours), (expected, theirs) = gradients(computed, folded), gradients(model, rest)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, gradient in flatten_dict(theirs).items():
        assert relative_error(np.asarray(flatten_dict(ours)[path]), np.asarray(gradient)) < 1e-3


def test_the_prompt_never_trains():
    _, params = test_fold.make("tiny")
    trainable, rest = split_trainable(params, (".*",))
    assert trainable.keys() == {"unet", "encoder", "decoder"} and rest.keys() == {"prompt"}
    with pytest.raises(ValueError, match=r"match no parameter: \['prompt'\]"):
        split_trainable(params, ("prompt", "unet/"))


def test_a_network_that_trains_in_part_is_not_folded():
    model, params = test_fold.make("kl")
    trainable, rest = split_trainable(params, ("unet/", "decoder/conv_out"))
    computed, folded = fold.fold_frozen(model, trainable, rest)
    assert computed == model
    assert test_fold.shapes(folded) == test_fold.shapes(rest)


@pytest.mark.parametrize("pieces", [pytest.param((), marks=pytest.mark.slow), ("upsampling",)])
@pytest.mark.parametrize("autoencoder", ["kl", "tiny"])
def test_kernels_cast_once_give_the_numbers_of_kernels_cast_at_each_call(autoencoder, pieces):
    model, params = fold.fold(*test_fold.make(autoencoder), pieces)
    model = dataclasses.replace(model, dtype="bfloat16")
    cast = fold.cast_kernels(model, params)
    flat = flatten_dict(cast)
    assert flat["unet", "conv_in", "kernel"].dtype == "bfloat16"
    assert flat["unet", "conv_norm_out", "scale"].dtype == "float32"
    assert flat["prompt",].dtype == "float32"  # folding in training computes with it as it is
    for ours, theirs in zip(test_fold.run(model, cast), test_fold.run(model, params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("schedule", [{}, {"prediction_type": "epsilon"}])
def test_a_folded_teacher_teaches_the_same_latent_and_features(schedule):
    """Of training's z0, also where inference's DDIM step ends with some noise left."""
    model, params = test_fold.make("tiny", **schedule)
    assert not model.schedule.set_alpha_to_one
    teacher = model_setup.Start(model, params)
    folded = from_config.fold_teacher(common.training("latent"), teacher)
    assert folded.model.folding.time and folded.model.unet.in_channels == 4
    assert "decoder" not in from_config.frozen_teacher(with_teacher(), folded)
    batch = scenes(2)
    (ours, features), (theirs, expected) = (
        jax.jit(lambda p, m=start.model: latent.teach(m, p, batch))(start.params)
        for start in (folded, teacher)
    )
    for name in ("teacher_latent", "gt_latent", "rgb_latent"):
        assert relative_error(np.asarray(ours[name]), np.asarray(theirs[name])) < 3e-5
    assert features.keys() == expected.keys()
    for name in features:
        assert relative_error(np.asarray(features[name]), np.asarray(expected[name])) < 3e-5


def test_an_evaluation_in_training_folds_nothing_more(monkeypatch):
    class Made(Exception):
        pass

    def pipeline(*_, **settings):
        raise Made(settings["fold"])

    monkeypatch.setattr(train, "DepthPipeline", pipeline)
    with pytest.raises(Made, match="False"):
        train.score(None, None, None, None, None, None, 1)


def with_teacher(**settings):
    config = common.training("latent")
    config.teacher.path = "somewhere"
    config.teacher.update(settings)
    return config


def test_a_teacher_of_many_steps_keeps_what_changes_from_step_to_step():
    model = small_model(small_unet((8, 16), channels=8), denoising_steps=4)
    teacher = model_setup.Start(model, init_params(model, 0))
    folded = from_config.fold_teacher(with_teacher(), teacher)
    assert folded.model.unet == model.unet and not folded.model.folding.time
    assert folded.model.schedule == model.schedule
    assert folded.model.folding.prompt_tokens == 2
    assert folded.model.folding.upsampling == ("decoder", "unet")
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    ours, theirs = (
        inference.denoise(start.model, start.params, latents, latents, 4)
        for start in (folded, teacher)
    )
    assert relative_error(np.asarray(ours), np.asarray(theirs)) < 3e-5
    # From a cache without features nothing of it is needed.
    assert from_config.frozen_teacher(with_teacher(cache="there"), teacher).keys() == {
        "unet",
        "prompt",
    }


@pytest.mark.parametrize(
    ("beta", "needed"),
    [
        ({}, set()),
        ({"latent": 1.0}, {"unet", "encoder", "prompt"}),
        ({"teacher": 1.0}, {"unet", "encoder", "prompt", "decoder"}),
    ],
)
def test_of_a_teacher_in_pixels_only_what_is_compared_with_is_there(beta, needed):
    model = small_model(small_unet((8, 16), channels=8))
    teacher = model_setup.Start(model, init_params(model, 0))
    config = common.training("pixel")
    config.loss.beta.update({"latent": 0.0, "teacher": 0.0} | beta)
    assert from_config.frozen_teacher(config, teacher).keys() == needed


@pytest.mark.slow
def test_24gb_plans_its_step_for_the_state_it_says():
    """The plan of tests/train_memory.py, a quarter as wide: it runs, and memory is reused."""
    counted = train_memory.count(0.25)
    assert counted["alias"] == pytest.approx(counted["state"], rel=0.01)  # donated
    held = counted["state"] + counted["frozen"] + counted["batch"]
    assert counted["argument"] == pytest.approx(held, rel=0.01)
    assert held < counted["peak"]
    # Four times as wide, parameters take 16 times as much, activations four: 15 GiB.
    full = 16 * (counted["state"] + counted["frozen"]) + counted["batch"] + 4 * counted["temp"]
    assert full < train_memory.CARD


def test_24gb_is_the_full_size_model_with_all_that_saves_memory():
    config = stage2.get_config("24gb,marigold")
    assert config.data.source.name == "hypersim" and config.trainable == ("unet/",)
    assert config.train.accumulate == config.data.batch_size == 32
    assert config.model.dtype == "bfloat16" and config.model.remat
    assert config.optim.moments == "bfloat16" and config.train.host_ema_every == 10
