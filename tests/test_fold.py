"""Folded models against unfolded ones: max |difference| / std, float32, on random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from d3epth_jax import DepthPipeline, inference
from d3epth_jax.models import convolution, layers
from d3epth_jax.models.config import AutoencoderKLConfig, TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.depth_model import DepthModel, abstract_params
from d3epth_jax.schedule import NoiseSchedule
from d3epth_jax.weights import fold, hub
from tests import pipeline_oracle
from tests.unet_oracle import random_like, relative_error

PER_PIECE, TOGETHER = 1e-5, 3e-5
# 13 cells high: a skip that is not exactly double (13, 7).
IMAGE = np.random.default_rng(1).uniform(-1, 1, (1, 104, 32, 3)).astype(np.float32)

UNET = UNetConfig(
    in_channels=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    layers_per_block=1,
    attention_head_dim=(2, 4),
    cross_attention_dim=16,
    norm_num_groups=4,
)
AUTOENCODERS = {
    "kl": AutoencoderKLConfig(block_out_channels=(8, 8, 8, 16), norm_num_groups=4),
    "tiny": TinyAutoencoderConfig(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0, 0, 0, 1),
        num_decoder_blocks=(1, 0, 0, 0),
    ),
}
SCHEDULE = NoiseSchedule(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    set_alpha_to_one=False,
)


@functools.cache
def make(autoencoder="tiny", tokens=2, **schedule):
    schedule = dataclasses.replace(SCHEDULE, **schedule)
    timestep = int(schedule.timesteps(1)[0])
    model = DepthModel(UNET, AUTOENCODERS[autoencoder], schedule, timestep=timestep)
    params = random_like(abstract_params(model))
    rng = np.random.default_rng(2)
    params["prompt"] = rng.normal(size=(1, tokens, UNET.cross_attention_dim)).astype(np.float32)
    return model, params


def run(model, params):
    """(latent, what the decoder gives before it is clipped) of one step from zero."""

    def predict(params):
        rgb = inference.encode_image(model, params, IMAGE)
        latent = inference.denoise(model, params, rgb, jnp.zeros_like(rgb), 1)
        decoded = model.modules["decoder"].apply(
            {"params": params["decoder"]}, latent / model.autoencoder.scaling_factor
        )
        return latent, decoded.mean(-1)

    return jax.jit(predict)(params)


def shapes(params):
    return {path: x.shape for path, x in flatten_dict(params).items() if path[0] != "prompt"}


@functools.cache
def unfolded(*which, **schedule):
    return run(*make(*which, **schedule))


def compare(pieces, *which, **schedule):
    model, params = make(*which, **schedule)
    folded, its = fold.fold(model, params, pieces)
    assert shapes(abstract_params(folded)) == shapes(its)
    assert ("prompt" in its) == folded.needs_prompt
    ours, theirs = run(folded, its), unfolded(*which, **schedule)
    return [relative_error(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs)]  # noqa: B905


@pytest.mark.parametrize(
    ("piece", "autoencoder"),
    [
        *((piece, "tiny") for piece in fold.PIECES if piece != "head"),
        *((piece, "kl") for piece in ("upsampling", "mean")),
    ],
)
def test_each_piece_alone_changes_nothing(piece, autoencoder):
    model, params = make(autoencoder)
    assert max(compare((piece,), autoencoder)) < PER_PIECE
    # It does do something: the parameters are others.
    assert shapes(fold.fold(model, params, (piece,))[1]) != shapes(params)


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"set_alpha_to_one": True, "rescale_betas_zero_snr": True},
        {"prediction_type": "epsilon"},
        {"prediction_type": "sample"},
        {"timestep_spacing": "leading", "steps_offset": 1},
    ],
)
def test_the_head_gives_the_latent_of_any_parametrisation(schedule):
    assert max(compare(("latent", "head"), **schedule)) < PER_PIECE


@pytest.mark.parametrize(
    ("autoencoder", "tokens"), [("kl", 2), ("kl", 77), ("tiny", 2), ("tiny", 5)]
)
def test_all_pieces_together(autoencoder, tokens):
    assert max(compare(None, autoencoder, tokens)) < TOGETHER


def test_attention_to_many_tokens_stays_where_it_is_cheaper():
    model, params = make(tokens=77)
    folded, its = fold.fold(model, params, ("prompt",))
    assert folded.needs_prompt and shapes(its) == shapes(params)
    assert not layers.collapses(320, 8, 77) and layers.collapses(320, 5, 77)  # SD 1.5, SD 2.1


def test_what_does_not_change_is_shared():
    model, params = make()
    _, its = fold.fold(model, params)
    path = ("unet", "mid_block", "resnets_0", "conv2", "kernel")
    assert flatten_dict(its)[path] is flatten_dict(params)[path]


def test_phases_of_kernels_in_16_bits_are_in_32():
    # Where a size is odd they are subtracted from each other, which rounded sums do not bear.
    model, params = make()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    kinds = {
        x.ndim == fold.PHASES: x.dtype
        for x in jax.tree.leaves(fold.fold(model, rounded, ("upsampling",))[1])
    }
    assert kinds == {True: jnp.float32, False: jnp.bfloat16}


def test_phase_kernels_are_undone_exactly_enough():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
    phases = convolution.phase_kernel(kernel)
    assert phases.shape == (2, 2, 2, 2, 4, 5)
    np.testing.assert_allclose(convolution.whole_kernel(phases), kernel, atol=1e-6)
    # By hand: an even row and an odd column see rows -1, 0 and columns 0, 1.
    np.testing.assert_allclose(phases[0, 1, 0, 1], kernel[0, 2], atol=1e-6)
    np.testing.assert_allclose(phases[0, 1, 1, 0], kernel[1:, :2].sum((0, 1)), atol=1e-6)


def test_unknown_pieces_and_a_clipped_latent_are_refused():
    model, params = make()
    with pytest.raises(ValueError, match=r"unknown pieces \['heads'\]"):
        fold.fold(model, params, ("heads",))
    clipped = dataclasses.replace(model, schedule=dataclasses.replace(SCHEDULE, clip_sample=True))
    with pytest.raises(ValueError, match="clip_sample"):
        fold.fold(clipped, params, ("head",))
    assert "head" not in fold.foldable(clipped)


@pytest.mark.parametrize("latents", ["zeros", "given"])
def test_a_folded_pipeline_predicts_and_saves_as_the_other(latents, saved, tmp_path):
    pipes = [DepthPipeline.from_pretrained(saved[0], fold=fold) for fold in (True, False)]
    photo = pipeline_oracle.photos()["small"]
    given = None if latents == "zeros" else pipeline_oracle.latents_for(photo)
    folded, plain = (pipe(photo, latents=given, output_latent=True) for pipe in pipes)
    np.testing.assert_allclose(folded.prediction, plain.prediction, atol=1e-5)
    np.testing.assert_allclose(folded.latent, plain.latent, atol=1e-4 * plain.latent.std())
    pipes[0].save_pretrained(tmp_path / "out")
    again = DepthPipeline(*fold.fold(pipes[1].model, pipes[1].params))
    with pytest.raises(ValueError, match="a folded model cannot be read again"):
        again.save_pretrained(tmp_path / "out")
    pipeline_oracle.assert_same_tensors(
        pipeline_oracle.tensors_below(tmp_path / "out"), pipeline_oracle.tensors_below(saved[0])
    )


@pytest.mark.parametrize("autoencoder", [pytest.param("kl", marks=pytest.mark.slow), "tiny"])
def test_gradients_flow_through_what_training_folds(autoencoder):
    model, params = make(autoencoder)

    seen = []

    def total(params, folding):
        of_student, params = folding(model, params)
        seen.append(of_student.folding)
        latent, _ = inference.predict_latent(of_student, params, jnp.ones((1, 13, 4, 4)))
        decoded = of_student.modules["decoder"].apply({"params": params["decoder"]}, latent)
        return jnp.mean(jnp.square(decoded))

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    ours = flatten_dict(gradient(params, fold.fold_in_training))
    theirs = flatten_dict(gradient(params, lambda *same: same))
    assert seen[0].upsampling == ("decoder", "unet") and seen[0].prompt_tokens == 2
    assert ours.keys() == theirs.keys()
    # Some are zero but for rounding, such as that of attention's key bias.
    largest = max(float(jnp.abs(expected).max()) for expected in theirs.values())
    for path, expected in theirs.items():
        scale = max(float(jnp.abs(expected).max()), 1e-3 * largest)
        np.testing.assert_allclose(ours[path] / scale, expected / scale, atol=2e-4, err_msg=path)


@pytest.mark.parametrize("pieces", [None, *((piece,) for piece in fold.PIECES)], ids=str)
@pytest.mark.parametrize("tokens", [2, 77])
def test_what_is_folded_already_is_not_folded_again(pieces, tokens):
    model, params = make(tokens=tokens)
    once = fold.fold(model, params, pieces)
    assert not {"time", "latent"} & set(pieces or fold.PIECES) & set(fold.foldable(once[0]))
    again = fold.fold(*once, pieces)
    assert again[0] == once[0]
    for ours, theirs in zip(*(jax.tree.leaves(p) for _, p in (again, once)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_timestep_that_inference_does_not_use_is_not_folded():
    model, params = make()
    model = dataclasses.replace(model, timestep=500)
    with pytest.raises(ValueError, match=r"timestep is 500.* a single step at 999"):
        fold.fold(model, params)
    assert fold.fold(model, params, fold.TRAINING)[0].folding.prompt_tokens == 2


def test_a_pipeline_folds_unless_it_is_told_not_to():
    model, params = make()
    assert DepthPipeline(model, params).networks(1)[0].folding.time
    assert not DepthPipeline(model, params).networks(2)[0].folding.time
    latents = np.zeros((1, 4, 4, 4), np.float32)
    assert not DepthPipeline(model, params).networks(1, latents)[0].folding.time
    assert DepthPipeline(model, params, fold=False).networks(1)[0] == model


@pytest.mark.parametrize("piece", fold.PIECES)
def test_a_folded_model_is_not_used_for_what_it_does_not_hold_for(piece, tmp_path):
    model, params = make()
    model = dataclasses.replace(model, denoising_steps=1, processing_resolution=0)
    folded = fold.fold(model, params, (piece,))
    with pytest.raises(ValueError, match="a folded model cannot be read again"):
        hub.save_model(tmp_path / "out", *folded)
    rng = np.random.default_rng(3)
    photo, latents = rng.integers(0, 256, (24, 32, 3), np.uint8), rng.normal(size=(1, 3, 4, 4))
    for how in ({"num_inference_steps": 2}, {"latents": latents}):
        if piece in fold.SINGLE_STEP:
            with pytest.raises(ValueError, match="folded for one step from zero latents"):
                DepthPipeline(*folded)(photo, **how)
        else:
            ours, whole = (DepthPipeline(*each)(photo, **how) for each in (folded, (model, params)))
            np.testing.assert_allclose(ours.prediction, whole.prediction, atol=1e-5)
    if piece in fold.SINGLE_STEP:
        with pytest.raises(ValueError, match="2 steps, but the model is folded for one"):
            inference.denoise(*folded, latents, latents, 2)


def test_other_parameters_of_a_pipeline_are_folded_anew():
    model, params = make()
    model = dataclasses.replace(model, denoising_steps=1, processing_resolution=0)
    photo = np.random.default_rng(4).integers(0, 256, (24, 32, 3), np.uint8)
    pipe = DepthPipeline(model, params)
    before = pipe(photo).prediction
    pipe.params = others = jax.tree.map(lambda x: x / 2, params)
    after = pipe(photo).prediction
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(after, DepthPipeline(model, others)(photo).prediction)
