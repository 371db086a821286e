"""Model directories and the pipeline around them."""

import dataclasses
import inspect
import json
import logging

import jax
import numpy as np
import pytest
from diffusers import AutoencoderTiny, UNet2DConditionModel
from flax.traverse_util import flatten_dict
from PIL import Image

import d3epth_jax
from d3epth_jax import image as image_lib
from d3epth_jax import inference, pipeline
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
    assert model == small_model(processing_resolution=48, base="model")  # its folder's name
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


def test_a_shape_is_compiled_once_and_the_compilers_memory_is_given_back_before_it_runs(
    monkeypatch, caplog
):
    model = small_model(processing_resolution=40)
    pipe = d3epth_jax.DepthPipeline(model, init_params(model, 0))
    given = []
    monkeypatch.setattr("d3epth_jax.memory.give_back", lambda: given.append(1))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            pipe(scenes(1)["image"])
    compiled = [r for r in caplog.records if "Finished XLA compilation of jit(<lambda>" in r.msg]
    assert len(compiled) == len(given) == 2  # encoder; UNet and decoder


def test_model_of_one_aspect_sees_stretched_pictures(tmp_path):
    model = small_model(processing_resolution=48, processing_aspect=1.5)
    hub.save_model(tmp_path, model, init_params(model, 0))
    pipe = d3epth_jax.DepthPipeline.from_pretrained(tmp_path)
    assert pipe.model.processing_aspect == 1.5
    (picture,) = scenes(1, height=24, width=80)["image"]
    got = pipe(picture).prediction
    stretched = image_lib.resize(picture / np.float32(255), (32, 48), antialias=True)
    expected = pipe(stretched, processing_resolution=0).prediction[0]
    expected = image_lib.resize(expected, (24, 80), antialias=False)
    np.testing.assert_allclose(got[0], expected, atol=1e-5)
    assert pipe(picture, match_input_resolution=False).prediction.shape == (1, 32, 48, 1)


def test_a_model_of_one_shape_says_when_it_sees_another(caplog):
    model = small_model(processing_resolution=48, processing_aspect=1.5)
    pipe = d3epth_jax.DepthPipeline(model, init_params(model, 0))
    with caplog.at_level(logging.WARNING):
        pipe(scenes(1, height=24, width=80)["image"])  # stretched
        pipe(scenes(1, height=80, width=60)["image"])  # squeezed by half
        pipe(scenes(1, height=32, width=48)["image"], processing_resolution=0)  # its own shape
        assert not caplog.records
        for _ in range(2):
            pipe(scenes(1, height=24, width=80)["image"], processing_resolution=0)
            pipe(scenes(1, height=64, width=36)["image"])  # a telephone's
    trained = "the model was trained on pictures squeezed to 1.5:1, 48 long"
    assert [record.message for record in caplog.records] == [
        f"{trained}: it is given others",
        f"{trained}, and others are squeezed to that: expect less of the map where a picture is"
        " very narrow or wide, or cut it",
    ]


def test_pictures_of_several_number_types_in_one_batch(saved):
    pipe = d3epth_jax.DepthPipeline.from_pretrained(saved)
    a, b, c = scenes(3)["image"]
    mixed = [a, b / 255, c.astype(np.uint16) * 257, a / 255]
    out = pipe(mixed, batch_size=4).prediction
    np.testing.assert_allclose(out, pipe([a, b, c, a], batch_size=4).prediction, atol=1e-5)
    with pytest.raises(ValueError, match="number 1: 16-bit picture that is nearly black"):
        pipe([a, c.astype(np.uint16) * 16])


def test_a_picture_is_resized_once_however_short_the_last_batch(saved, monkeypatch):
    pipe = d3epth_jax.DepthPipeline.from_pretrained(saved)
    resize, sizes = image_lib.resize, []

    def counted(array, size, *, antialias):
        sizes.append(size)
        return resize(array, size, antialias=antialias)

    monkeypatch.setattr(image_lib, "resize", counted)
    pictures = list(scenes(5, height=24, width=36)["image"])
    pipe(pictures, batch_size=4, match_input_resolution=False)
    assert sizes == [(32, 48)] * 5


def test_pictures_that_need_no_resizing_are_copied_as_bytes(saved, monkeypatch):
    pipe = d3epth_jax.DepthPipeline.from_pretrained(saved)
    put, types = pipe._put, []
    monkeypatch.setattr(pipe, "_put", lambda x: types.append(x.dtype) or put(x))
    a, b = scenes(2)["image"]
    assert a.shape[:2] == (32, 48)
    for pictures, expected in (([a, b], np.uint8), ([a, b / 255], np.float32)):
        types.clear()
        out = pipe(pictures, batch_size=2).prediction
        assert types[0] == expected
        out[:] = 0  # the caller's own


def test_bytes_and_numbers_have_programs_of_their_own(saved):
    pipe = d3epth_jax.DepthPipeline.from_pretrained(saved)
    programs = pipeline._program
    a, b = scenes(1)["image"][0], scenes(1, height=64, width=96)["image"][0]
    for picture, more in ((a, 2), (b, 1), (a, 0)):  # encode and predict, another encode, none
        before = programs.cache_info().misses
        pipe(picture)
        assert programs.cache_info().misses == before + more


def test_what_was_padded_is_cut_off_and_not_kept(saved):
    pipe = d3epth_jax.DepthPipeline.from_pretrained(saved)
    out = pipe(scenes(1, height=37, width=45)["image"], processing_resolution=0).prediction
    assert out.shape == (1, 37, 45, 1) and out.flags.c_contiguous and out.base is None


def test_drawn_latents_do_not_depend_on_the_place_in_a_list():
    pipe = pipeline_of(denoising_steps=None)
    a, b = scenes(2)["image"]
    settings = {"num_inference_steps": 2, "ensemble_size": 2, "output_latent": True}
    alone = pipe(a, **settings)
    among = pipe([b, a, a], batch_size=4, **settings)
    np.testing.assert_allclose(among.prediction[1:], [alone.prediction[0]] * 2, atol=1e-4)
    assert np.abs(among.prediction[0] - alone.prediction[0]).max() > 0.01
    first, second = alone.latent
    assert np.abs(first - second).max() > 0.1  # the members of one picture differ
    seeded = pipe(a, key=jax.random.key(1), **settings)
    assert np.abs(seeded.latent - alone.latent).max() > 0.1
    same = pipe(a, key=jax.random.key(0), **settings)
    np.testing.assert_array_equal(same.latent, alone.latent)


@pytest.mark.parametrize(("batch_size", "encoded"), [(1, 1), (3, 1), (6, 2), (7, 3)])
def test_an_ensembles_picture_is_encoded_once_for_all_its_members(batch_size, encoded, monkeypatch):
    seen, encode = [], inference.encode_image
    monkeypatch.setattr(inference, "encode_image", lambda *a: seen.append(len(a[2])) or encode(*a))
    pipe = pipeline_of(unet=small_unet(channels=8), denoising_steps=None)
    picture = scenes(1)["image"].astype(np.float32) / 255
    pipe(picture, num_inference_steps=1, ensemble_size=3, batch_size=batch_size)
    assert seen == [encoded]


def pipeline_of(**settings):
    model = small_model(**settings)
    return d3epth_jax.DepthPipeline(model, init_params(model, 0))


def schedule_of(**changes):
    return dataclasses.replace(small_model().schedule, **changes)


@pytest.mark.parametrize(
    "settings, arguments, message",
    [
        ({"processing_resolution": None}, {}, r"give processing_resolution \(0: the picture's own"),
        ({"denoising_steps": None}, {}, "no default number of steps: give num_inference_steps"),
        ({}, {"num_inference_steps": 0}, r"num_inference_steps must be in 1\.\.1000, not 0"),
        ({}, {"num_inference_steps": 1001}, "not 1001"),
        ({}, {"processing_resolution": -1}, "processing_resolution must be at least 0, not -1"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({}, {"ensemble_size": 0}, "ensemble_size must be at least 1, not 0"),
        ({}, {"ensemble_size": 2}, "all members of an ensemble would be equal"),
        ({"denoising_steps": 4, "starts_at_zero": True}, {"ensemble_size": 2}, "would be equal"),
        ({"denoising_steps": 4}, {"output_uncertainty": True}, "set ensemble_size to 3 or more"),
        ({"schedule": {"prediction_type": "epsilon"}}, {}, "epsilon model has no z0 at timestep"),
        (
            {"schedule": {"prediction_type": "epsilon", "timestep_spacing": "leading"}},
            {"num_inference_steps": 4},
            "epsilon model has no z0 at timestep 999",
        ),
        (
            {"denoising_steps": None, "processing_resolution": None},
            {"batch_size": 0, "ensemble_size": -1},
            r"(?s)num_inference_steps.*processing_resolution.*batch_size.*ensemble_size",
        ),
    ],
    ids=str,
)
def test_what_no_picture_can_be_predicted_with_is_refused_before_one(settings, arguments, message):
    changes = settings.get("schedule")
    model = small_model(**{k: v for k, v in settings.items() if k != "schedule"})
    if changes:
        model = dataclasses.replace(model, schedule=schedule_of(**changes))
    pipe = d3epth_jax.DepthPipeline(model, {})  # not even a parameter
    with pytest.raises(ValueError, match=message):
        pipe.check(**arguments)
    with pytest.raises(ValueError, match=message):
        pipe("no such picture", **arguments)


def test_a_model_without_defaults_predicts_when_it_is_told():
    pipe = pipeline_of(denoising_steps=None, processing_resolution=None)
    out = pipe(scenes(1)["image"][0], num_inference_steps=1, processing_resolution=0)
    assert out.prediction.shape == (1, 32, 48, 1)


def told(caplog, pipe, **arguments) -> list[tuple[str, str]]:
    """(level, message) of what two checks log."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="d3epth_jax"):
        pipe.check(**arguments)
        pipe.check(**arguments)
    return [(record.levelname, record.message) for record in caplog.records]


def test_what_is_unusual_is_told_once(caplog):
    def pipe_of(name, schedule=None, **settings):
        """A model that nobody has been told of."""
        model = small_model(base=f"told once, {name}", **settings)
        model = dataclasses.replace(model, schedule=schedule or model.schedule)
        return d3epth_jax.DepthPipeline(model, {})

    zeros = ("INFO", "the model starts from zero latents")
    one = pipe_of("one step")
    assert told(caplog, one) == [zeros]
    assert told(caplog, one, key=jax.random.key(0)) == [
        ("WARNING", "the seed (`key`) has no effect: nothing is drawn")
    ]
    assert told(caplog, one, num_inference_steps=4) == [
        ("WARNING", "4 steps from zero latents: the model was made for one")
    ]
    four = pipe_of("four steps", denoising_steps=4)
    assert told(caplog, four) == told(caplog, four, key=jax.random.key(0)) == []
    ((level, message),) = told(caplog, four, ensemble_size=2)
    assert level == "WARNING" and "hardly better than 1" in message
    latents = np.zeros((1, 4, 4, 4))
    blind = pipe_of("sees none")
    assert told(caplog, blind, latents=latents) == [
        ("WARNING", "`latents` have no effect: the model sees none")
    ]
    with pytest.raises(ValueError, match="does not see latents, so all members"):
        blind.check(latents=latents, ensemble_size=3)
    assert told(caplog, four, latents=latents) == []
    ((level, message),) = told(caplog, four, latents=latents, key=jax.random.key(0))
    assert level == "WARNING" and "has no effect" in message
    assert told(caplog, pipe_of("zeros", denoising_steps=4, starts_at_zero=True)) == [zeros]
    leading = pipe_of("leading", schedule_of(timestep_spacing="leading", steps_offset=1))
    first, (level, message) = told(caplog, leading)
    assert first == zeros and level == "WARNING"
    assert "at timestep 1 of 0..999" in message and "'leading'" in message


def test_public_signature_of_loading():
    parameters = inspect.signature(d3epth_jax.DepthPipeline.from_pretrained).parameters
    assert {name: p.default for name, p in list(parameters.items())[1:]} == {
        "dtype": "float32", "attention": "auto", "fold": True, "revision": None, "variant": None,
        "subfolder": None, "cache_dir": None, "token": None, "local_files_only": False,
    }  # fmt: skip
    with pytest.raises(TypeError, match="any_pipeline"):
        d3epth_jax.DepthPipeline.from_pretrained("somewhere", any_pipeline=True)


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
    for nothing in ([], b"bytes of a file"):
        with pytest.raises(ValueError, match="no picture"):
            pipe(nothing)
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
