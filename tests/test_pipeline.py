"""Model directories and the pipeline around them."""

import json

import numpy as np
import pytest
from diffusers import AutoencoderTiny, UNet2DConditionModel
from flax.traverse_util import flatten_dict
from PIL import Image

import d3epth_jax
from d3epth_jax import inference
from d3epth_jax.models.depth_model import abstract_params, init_params
from d3epth_jax.weights import hub
from tests.conftest import scenes, small_model, small_unet


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "model"
    model = small_model(processing_resolution=48)
    hub.save_model(directory, model, init_params(model, 0))
    return directory


def test_saved_model_loads_bit_identical(saved):
    model, params, *_ = hub.load_model(saved)
    assert model == small_model(processing_resolution=48)
    expected = flatten_dict(init_params(model, 0))
    for path, value in flatten_dict(params).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=str(path))


def test_random_parameters_have_the_modules_shapes():
    for model in (small_model(), small_model(small_unet(mid=None))):
        params, shapes = init_params(model, 0), abstract_params(model)
        flat, flat_shapes = flatten_dict(params), flatten_dict(shapes)
        assert {k: v.shape for k, v in flat.items()} == {k: v.shape for k, v in flat_shapes.items()}
        assert all(np.isfinite(v).all() for v in flat.values())
        other = flatten_dict(init_params(model, 1))
        assert any((flat[k] != other[k]).any() for k in flat)


def test_untrained_model_is_near_the_centre_of_its_range():
    model = small_model()
    params = init_params(model, 0)
    np.testing.assert_array_equal(params["decoder"]["layers_9"]["bias"], 0.5)
    depth = d3epth_jax.DepthPipeline(model, params)(scenes(2)["image"]).prediction
    assert depth.shape == (2, 32, 48, 1)
    assert 0.2 < depth.mean() < 0.8
    assert ((depth > 0) & (depth < 1)).mean() > 0.9


def test_diffusers_loads_the_components_without_a_missing_key(saved):
    for cls, folder in ((UNet2DConditionModel, "unet"), (AutoencoderTiny, "vae")):
        _, info = cls.from_pretrained(saved, subfolder=folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_prediction_has_the_pictures_size_and_ignores_batching(saved):
    pipe = d3epth_jax.DepthPipeline.from_pretrained(saved)
    images = list(scenes(3, height=37, width=53)["image"])
    one = pipe(images, batch_size=1)
    assert one.prediction.shape == (3, 37, 53, 1) and one.prediction.dtype == np.float32
    assert one.prediction_type == "depth"
    assert (one.prediction >= 0).all() and (one.prediction <= 1).all()
    two = pipe(images, batch_size=2)
    np.testing.assert_allclose(one.prediction, two.prediction, atol=1e-5)
    native = pipe(images[0], processing_resolution=0).prediction
    assert native.shape == (1, 37, 53, 1)
    inner = pipe(images[0], match_input_resolution=False).prediction
    assert inner.shape == (1, 33, 48, 1)


def test_path_and_array_give_the_same(saved, tmp_path):
    pipe = d3epth_jax.DepthPipeline.from_pretrained(saved)
    image = scenes(1)["image"][0]
    Image.fromarray(image).save(tmp_path / "photo.png")
    np.testing.assert_array_equal(pipe(tmp_path / "photo.png").prediction, pipe(image).prediction)


def test_odd_one_out_is_named(saved):
    pipe = d3epth_jax.DepthPipeline.from_pretrained(saved)
    images = [*scenes(2)["image"], scenes(1, height=40)["image"][0]]
    with pytest.raises(ValueError, match="number 2"):
        pipe(images)
    with pytest.raises(ValueError, match="no picture"):
        pipe([])
    with pytest.raises(ValueError, match="number 0: a float picture must be"):
        pipe(images[0].astype(np.float32))


def test_incomplete_or_wrong_directories_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index.json.*unet/config.json"):
        hub.load_model(tmp_path)
    model, params, *_ = hub.load_model(saved)
    hub.save_model(tmp_path / "m", model, params)
    config = tmp_path / "m/unet/config.json"
    wider = json.loads(config.read_text()) | {"block_out_channels": [8, 24]}
    config.write_text(json.dumps(wider))
    with pytest.raises(ValueError, match=r"(?s)m/unet: .*wrong shape") as error:
        hub.load_model(tmp_path / "m")
    assert str(error.value).count("wrong shape") > 3  # all of them at once
    (tmp_path / "m/empty_prompt.safetensors").unlink()
    config.write_text((saved / "unet/config.json").read_text())
    with pytest.raises(FileNotFoundError, match="empty_prompt"):
        hub.load_model(tmp_path / "m")


def test_failed_save_leaves_the_old_model_and_no_rubbish(saved, tmp_path, monkeypatch):
    model, params, *_ = hub.load_model(saved)
    hub.save_model(tmp_path / "m", model, params)
    monkeypatch.setattr(hub.convert, "to_torch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.save_model(tmp_path / "m", model, params)
    monkeypatch.undo()
    hub.load_model(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a latent has 4"):
        small_model(small_unet(channels=5))


def test_eight_channel_unet_sees_a_zero_depth_latent():
    model = small_model(small_unet(channels=8))
    params = init_params(model, 0)
    rgb = np.random.default_rng(0).normal(size=(1, 4, 6, 4)).astype(np.float32)
    implicit, _ = inference.predict_latent(model, params, rgb)
    explicit, _ = inference.predict_latent(model, params, rgb, np.zeros_like(rgb))
    np.testing.assert_array_equal(implicit, explicit)
    # Untrained it does not depend on the depth latent, since diffusers would make that random.
    kernel = params["unet"]["conv_in"]["kernel"]
    assert (kernel[:, :, 4:] == 0).all() and (kernel[:, :, :4] != 0).any()
    kernel[:, :, 4:] = kernel[:, :, :4]
    other, _ = inference.predict_latent(model, params, rgb, np.ones_like(rgb))
    assert np.abs(implicit - other).max() > 1e-3
