"""Whole pipelines as diffusers writes them: read, run, trained from, written, and run by it."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from configs import common
from d3epth_jax import DepthPipeline
from d3epth_jax import image as image_lib
from d3epth_jax.models import presets
from d3epth_jax.training import model_setup, train
from d3epth_jax.weights import files, hub, surgery
from tests import pipeline_oracle as oracle
from tests.conftest import write_pairs

LIMIT = 2e-5  # of a prediction in [0,1], float32


def assert_speaks(reference):
    """The reference is worth comparing with: it spreads over the range and is hardly clipped."""
    assert np.ptp(reference) > 0.3
    assert ((reference <= 0) | (reference >= 1)).mean() < 0.05


def largest_difference(pipe, theirs, *, photos, steps) -> float:
    worst = 0
    for photo in photos:
        latents = oracle.latents_for(photo)
        for match in (True, False):
            reference = oracle.run(theirs, photo, steps=steps, match_input_resolution=match)
            assert_speaks(reference)
            ours = pipe(
                photo, latents=latents, num_inference_steps=steps, match_input_resolution=match
            ).prediction
            assert ours.shape == reference.shape
            worst = max(worst, np.abs(ours - reference).max())
    return worst


CASES = {  # name -> settings of the oracle
    "sd2": {"sd2": True},
    "sd1": {"sd2": False, "set_alpha_to_one": False},
    "zero-snr": {"rescale_betas_zero_snr": True},
    "sd1, zero-snr": {"sd2": False, "rescale_betas_zero_snr": True},
    "zero-snr, last alpha": {"rescale_betas_zero_snr": True, "set_alpha_to_one": False},
    "four steps": {"steps": 4},
    "four steps, zero-snr, leading": {
        "steps": 4,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "leading",
    },
    "four steps, last alpha": {"sd2": False, "steps": 4, "set_alpha_to_one": False},
    "epsilon": {"sd2": False, "steps": 4, "prediction_type": "epsilon"},
}
QUICK = {"zero-snr": 2, "sd1, zero-snr": 1, "four steps, last alpha": 2}  # how many photographs


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_prediction_equals_diffusers(name, tmp_path):
    settings = {"steps": 1} | CASES[name]
    theirs = oracle.marigold(tmp_path / "model", **settings)
    pipe = DepthPipeline.from_pretrained(tmp_path / "model")
    photos = list(oracle.photos().values())
    photos = photos[-QUICK.get(name, len(photos)) :]
    assert largest_difference(pipe, theirs, photos=photos, steps=settings["steps"]) < LIMIT


def broken_image(name):
    """A detail of pre- or post-processing done wrong."""
    resize, pad = image_lib.resize, np.pad

    def other_filter(array, size, *, antialias):
        return resize(array, size, antialias=not antialias)

    def rounded(array, size, *, antialias):
        return np.round(resize(array, size, antialias=antialias) * 127.5) / 127.5

    def zeros(array, width, mode):
        return pad(array, width)

    return {
        "antialiasing": (image_lib, "resize", other_filter),
        "rounding": (image_lib, "resize", rounded),
        "padding": (np, "pad", zeros),
    }[name]


def broken_model(model, name):
    """A detail of the model done wrong; what is broken in the networks is in their own tests."""
    schedule, autoencoder = model.schedule, model.autoencoder
    changed = {
        "final alpha": {"set_alpha_to_one": not schedule.set_alpha_to_one},
        "zero SNR": {"rescale_betas_zero_snr": not schedule.rescale_betas_zero_snr},
        "spacing": {"timestep_spacing": "leading"},
        "betas": {"beta_schedule": "linear"},
        "clipping": {"clip_sample": True},
    }
    if name in changed:
        return dataclasses.replace(model, schedule=dataclasses.replace(schedule, **changed[name]))
    return dataclasses.replace(
        model, autoencoder=dataclasses.replace(autoencoder, scaling_factor=0.18)
    )


@pytest.mark.parametrize("name", ["antialiasing", "rounding", "padding"])
def test_a_broken_detail_of_processing_shows(name, saved, monkeypatch):
    directory, theirs = saved
    photo = oracle.photos()["landscape"][:91, :127]
    pipe = DepthPipeline.from_pretrained(directory)
    reference = oracle.run(theirs, photo, steps=1)
    latents = oracle.latents_for(photo)
    assert np.abs(pipe(photo, latents=latents).prediction - reference).max() < LIMIT
    monkeypatch.setattr(*broken_image(name))
    assert np.abs(pipe(photo, latents=latents).prediction - reference).max() > 3 * LIMIT


@pytest.mark.parametrize(
    "name", ["final alpha", "zero SNR", "spacing", "betas", "clipping", "scaling factor", "prompt"]
)
def test_a_broken_detail_of_the_model_shows(name, saved):
    directory, theirs = saved
    photo = oracle.photos()["small"]
    call = {"latents": oracle.latents_for(photo), "num_inference_steps": 2}  # betas: not in one
    model, params, *_ = hub.load_model(directory)
    reference = oracle.run(theirs, photo, steps=2)
    ours = DepthPipeline(model, params)(photo, **call).prediction
    assert np.abs(ours - reference).max() < LIMIT
    if name == "prompt":
        text = hub.prompt.read(directory)
        params["prompt"] = hub.prompt.empty_prompt(text, directory, "max_length")
    else:
        model = broken_model(model, name)
    ours = DepthPipeline(model, params)(photo, **call).prediction
    assert np.abs(ours - reference).max() > 3 * LIMIT


def test_an_ensembles_members_are_those_of_diffusers(saved):
    directory, theirs = saved
    photo = oracle.photos()["small"]
    latents = oracle.latents_for(photo, members=3)
    latents = 0.9 * latents[:1] + 0.1 * latents  # members that differ as a trained model's do
    pipe = DepthPipeline.from_pretrained(directory)
    # One by one as three predictions, and together as an ensemble of one picture.
    single = [oracle.run(theirs, photo, steps=1, latents=x[None]) for x in latents]
    out = pipe(photo, latents=latents, ensemble_size=3, batch_size=2,
               output_uncertainty=True, output_latent=True)  # fmt: skip
    assert out.latent.shape == latents.shape
    for member, x in zip(single, latents, strict=True):
        ours = pipe(photo, latents=x[None]).prediction
        np.testing.assert_allclose(ours, member, atol=LIMIT)
    assert out.prediction.shape == out.uncertainty.shape == (1, *photo.shape[:2], 1)
    assert out.prediction.min() < 0.05 and out.prediction.max() > 0.95
    assert (out.uncertainty >= 0).all() and out.uncertainty.max() > 0


def test_pictures_of_every_kind_are_read_alike(saved, tmp_path):
    pipe = DepthPipeline.from_pretrained(saved[0])
    photo = oracle.photos()["small"]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    expected = pipe(photo).prediction
    for same in (
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        Image.fromarray(photo),
        [photo],
        photo[None],
        np.concatenate([photo, photo[..., :1]], -1),  # alpha is dropped
        photo.astype(np.uint16) * 257,
        photo / 255,
        jnp.asarray(photo),
    ):
        np.testing.assert_allclose(pipe(same).prediction, expected, atol=1e-5)
    grey = photo[..., 1]
    np.testing.assert_array_equal(
        pipe(grey).prediction, pipe(np.repeat(grey[..., None], 3, -1)).prediction
    )
    with pytest.raises(ValueError, match=r"(?s)number 0: a float picture.*number 2: 5x4 pixels"):
        pipe([photo * 1.0, photo, photo[:4, :5], photo])


def test_wrong_calls_are_explained(saved):
    pipe = DepthPipeline.from_pretrained(saved[0])
    photo = oracle.photos()["small"]
    with pytest.raises(ValueError, match="all members of an ensemble would be equal"):
        pipe(photo, ensemble_size=2)
    with pytest.raises(ValueError, match=r"latents have shape \[1, 4, 4, 4\], expected \[1, 6, 8"):
        pipe(photo, latents=np.zeros((1, 4, 4, 4)))
    with pytest.raises(ValueError, match="output_uncertainty"):
        pipe(photo, output_uncertainty=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        pipe(photo, batch_size=0)


def test_one_program_per_shape_and_no_more_than_a_bound():
    from d3epth_jax import pipeline

    assert pipeline._program.cache_info().maxsize == 16
    model, params, *_ = small()
    pipe = DepthPipeline(model, params, fold=False)
    before = pipeline._program.cache_info().misses
    for _ in range(2):
        pipe([np.zeros((20, 30, 3), np.uint8)] * 3, batch_size=2)
    assert pipeline._program.cache_info().misses == before + 2  # encode and predict
    pipe([np.zeros((20, 30, 3), np.uint8)] * 3, batch_size=2, num_inference_steps=2)
    assert pipeline._program.cache_info().misses == before + 3  # encode knows nothing of steps


def small():
    from d3epth_jax.models.depth_model import init_params
    from tests.conftest import small_model

    model = small_model()
    return model, init_params(model, 0)


# What is trained here


@pytest.mark.parametrize(
    "schedule",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "epsilon", "set_alpha_to_one": False},
        {"prediction_type": "sample", "timestep_spacing": "leading"},
    ],
    ids=lambda schedule: schedule["prediction_type"],
)
def test_single_step_form_keeps_z0_and_ignores_latents(schedule, tmp_path):
    from d3epth_jax import inference

    oracle.marigold(tmp_path / "model", sd2=False, **schedule)
    model, params, *_ = hub.load_model(tmp_path / "model")
    model = dataclasses.replace(model, timestep=999)
    new, changed = surgery.to_single_step(model, params)
    rgb = np.random.default_rng(0).normal(size=(1, 4, 5, 4)).astype(np.float32)
    before, _ = inference.predict_latent(model, params, rgb)
    after, _ = inference.predict_latent(new, changed, rgb)
    np.testing.assert_allclose(after, before, atol=2e-6 * np.abs(before).max())
    noise = np.random.default_rng(1).normal(size=rgb.shape).astype(np.float32)
    stepped = inference.denoise(new, changed, rgb, noise, 1)
    np.testing.assert_allclose(stepped, before, atol=1e-5 * np.abs(before).max())
    # Twice is once.
    again, unchanged = surgery.to_single_step(new, changed)
    assert again == new
    jax.tree.map(np.testing.assert_array_equal, unchanged, changed)


def test_epsilon_at_zero_snr_is_refused(tmp_path):
    oracle.marigold(tmp_path / "model", sd2=False)
    path = tmp_path / "model/scheduler/scheduler_config.json"
    broken = {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | broken))
    with pytest.raises(ValueError, match="epsilon model has no z0"):
        DepthPipeline.from_pretrained(tmp_path / "model")(oracle.photos()["small"])


def pixel_config(init, pairs, steps: int = 2):
    config = common.training("pixel")
    config.init = str(init)
    config.data.source = common.folder(str(pairs), split="train")
    config.data.height, config.data.width, config.data.batch_size = 32, 48, 4
    config.eval.source = common.folder(str(pairs), split="validation")
    config.eval.update(num_images=1, num_pictures=0, batch_size=2, every=steps)
    config.train.update(steps=steps, log_every=1, checkpoint_every=steps)
    config.schedule.learning_rate = 1e-3
    return config


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 10)


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    """The workdir of a stage 2 that began with a plain Stable Diffusion of 4 input channels."""
    root = tmp_path_factory.mktemp("trained")
    oracle.stable_diffusion(root / "sd")
    config = pixel_config(root / "sd", pairs)
    config.model.processing_resolution = 64
    train.run(config, root / "run")
    return root / "run"


@pytest.mark.xdist_group("trained")
def test_what_we_train_from_stable_diffusion_runs_in_diffusers_whatever_its_latents(trained):
    photo = oracle.photos()["small"]
    ours = DepthPipeline.from_pretrained(trained / "model")(photo).prediction
    assert np.ptp(ours) > 0.01
    theirs = diffusers.MarigoldDepthPipeline.from_pretrained(trained / "model")
    theirs.set_progress_bar_config(disable=True)
    assert theirs.unet.config.in_channels == 8
    for _ in range(3):  # from other random latents each time
        with torch.no_grad():
            np.testing.assert_allclose(theirs(Image.fromarray(photo)).prediction, ours, atol=1e-4)


@pytest.mark.xdist_group("trained")
def test_a_training_step_changes_what_trains_and_nothing_else(trained):
    before = oracle.tensors_below(trained.parent / "sd")
    after = oracle.tensors_below(trained / "model")
    assert before.keys() == after.keys()
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert {key.split("/")[0] for key in changed} == {"unet"}
    assert len(changed) > 0.8 * sum(key.startswith("unet/") for key in before)
    assert hub.load_model(trained / "model").model.base == "sd"


@pytest.mark.xdist_group("trained")
def test_the_newest_checkpoint_of_a_run_is_a_model_too(trained, tmp_path):
    start = model_setup.read_run(trained)
    hub.save_model(tmp_path / "again", start.model, start.params, start.text)
    oracle.assert_same_tensors(
        oracle.tensors_below(tmp_path / "again"), oracle.tensors_below(trained / "model")
    )


@pytest.mark.xdist_group("trained")
def test_training_starts_from_the_workdir_of_a_run(trained, pairs):
    config = pixel_config(trained, pairs)
    config.model.dtype = "bfloat16"
    start = model_setup.make_student(config, model_setup.Start())
    assert start.model.dtype == "bfloat16" and start.model.processing_resolution == 64
    model = hub.load_model(trained / "model")
    jax.tree.map(np.testing.assert_array_equal, start.params, model.params)


@pytest.mark.xdist_group("trained")
def test_a_run_is_not_read_on_top_of_another_model_than_it_started_from(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    origin = tmp_path / "sd"
    shutil.copytree(trained.parent / "sd", origin)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["init"] = str(origin)
    origins = {f"init={origin}": hub.digest(origin)}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    (tmp_path / "run/origins.json").write_text(json.dumps(origins))
    model_setup.read_run(tmp_path / "run")
    path = origin / "vae" / f"{hub.STEM}.safetensors"
    tensors = {key: x.copy() for key, x in files.read(path).items()}
    tensors["decoder.conv_out.bias"] += 1
    files.write(path, tensors)
    with pytest.raises(ValueError, match=r"another model than is there now, of init=.*sd;"):
        model_setup.read_run(tmp_path / "run")


def test_a_student_pruned_from_the_teacher_learns_its_latents(saved, pairs, tmp_path, monkeypatch):
    shape = hub.load_model(saved[0]).model
    pruned = presets.bk_sdm(shape.unet, "small")
    monkeypatch.setitem(presets.PRESETS, "pruned", (pruned, shape.autoencoder))
    config = common.training("latent")
    config.data, config.eval = pixel_config("", pairs).data, pixel_config("", pairs).eval
    config.teacher.path = str(saved[0])
    config.model.update(preset="pruned", unet="teacher", encoder="teacher", decoder="teacher")
    config.train.update(steps=2, log_every=1, checkpoint_every=2, save_start=True)
    train.run(config, tmp_path)
    teacher = hub.load_model(saved[0])
    start = hub.load_model(tmp_path / "model_start")
    kernel = start.params["unet"]["up_blocks_0"]["resnets_1"]["conv1"]["kernel"]
    origin = teacher.params["unet"]["up_blocks_0"]["resnets_2"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, origin)
    np.testing.assert_array_equal(start.params["prompt"], teacher.params["prompt"])
    assert start.text is not None and start.model.base == saved[0].name
