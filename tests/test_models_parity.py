"""The UNet and the tiny autoencoder against diffusers, with random and with real weights."""

import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from d3epth_jax.models import layers, presets
from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.tiny_vae import TinyDecoder, TinyEncoder
from d3epth_jax.models.unet import UNet
from d3epth_jax.weights import convert, files
from tests import unet_oracle as oracle

# Stable Diffusion's structure at a tenth of its width.
SD1_LIKE = dataclasses.replace(
    presets.SD1_UNET, block_out_channels=(32, 64, 64, 64), cross_attention_dim=32
)
SD2_LIKE = dataclasses.replace(
    presets.SD2_UNET,
    block_out_channels=(32, 64, 96, 96),
    attention_head_dim=(2, 4, 6, 6),
    cross_attention_dim=32,
)
PLAIN = UNetConfig(
    in_channels=8,
    out_channels=3,
    block_out_channels=(32, 48, 64),
    down_block_types=("DownBlock2D",) * 3,
    up_block_types=("UpBlock2D",) * 3,
    mid_block_type="UNetMidBlock2D",
    norm_num_groups=16,
    flip_sin_to_cos=False,
    freq_shift=1,
)
# One level with everything in it: remat, bfloat16 and initialisation need no more.
SMALL = UNetConfig(
    block_out_channels=(32,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    mid_block_type=None,
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=16,
)
UNETS = {
    "sd1": SD1_LIKE,
    "sd2": SD2_LIKE,
    "bk_base": presets.bk_sdm(SD1_LIKE, "base"),
    "bk_small": presets.bk_sdm(SD2_LIKE, "small"),
    "bk_tiny": presets.bk_sdm(SD1_LIKE, "tiny"),
    "plain": PLAIN,
}
TINY = TinyAutoencoderConfig(
    encoder_block_out_channels=(16, 16, 16, 16),
    decoder_block_out_channels=(24, 24, 24, 24),
    num_encoder_blocks=(0, 1, 2, 1),
    num_decoder_blocks=(2, 1, 0, 0),
    latent_channels=6,
)


SIZES = ((8, 8), (15, 20), (11, 38))
# Each costs a compilation; the other pairs of a shape and a size are for `pytest -m slow`.
FAST = {
    *(("sd1", (15, 20)), ("sd2", (11, 38)), ("plain", (8, 8))),
    *(("bk_base", (8, 8)), ("bk_small", (15, 20)), ("bk_tiny", (11, 38))),
}
PAIRS = [
    pytest.param(name, size, marks=() if (name, size) in FAST else pytest.mark.slow)
    for name in UNETS
    for size in SIZES
]


@functools.cache
def unet_pair(name):
    config = UNETS[name]
    net = oracle.torch_unet(config)
    return config, net, convert.from_torch(oracle.tensors_of(net), oracle.abstract_unet(config))


@pytest.mark.parametrize(("name", "size"), PAIRS, ids=str)
def test_unet_and_its_features_equal_diffusers(name, size):
    config, net, params = unet_pair(name)
    sample = oracle.normal(1, 2, *size, config.in_channels)
    prompt = oracle.normal(2, 1, 3, config.cross_attention_dim) if config.attending else None
    output, features = oracle.run_unet(UNet(config), params, sample, 999, prompt)
    reference, expected = oracle.run_torch_unet(net, sample, 999, prompt)
    assert oracle.relative_error(output, reference) <= oracle.TOLERANCE
    assert features.keys() == expected.keys()
    for feature, value in expected.items():
        error = oracle.relative_error(np.reshape(features[feature], value.shape), value)
        # At 1x1 cells a group norm has two values, whose rounding it magnifies (1.7e-5 seen).
        assert error <= 2.5 * oracle.TOLERANCE, feature


def test_each_sample_may_have_its_own_timestep_and_prompt():
    config = dataclasses.replace(SMALL, in_channels=8)
    net = oracle.torch_unet(config)
    params = convert.from_torch(oracle.tensors_of(net), oracle.abstract_unet(config))
    sample, prompt = oracle.normal(1, 3, 6, 5, 8), oracle.normal(2, 3, 7, 16)
    timestep = np.array([1, 500, 999])
    output, _ = oracle.run_unet(UNet(config), params, sample, timestep, prompt)
    reference, _ = oracle.run_torch_unet(net, sample, timestep, prompt)
    assert oracle.relative_error(output, reference) <= oracle.TOLERANCE
    shared, _ = oracle.run_unet(UNet(config), params, sample, timestep, prompt[:1])
    assert oracle.relative_error(shared[0], reference[0]) <= oracle.TOLERANCE
    assert oracle.relative_error(shared[1], reference[1]) > 1e-3


def test_unet_names_what_is_wrong_with_its_inputs():
    config = UNETS["bk_tiny"]
    for sample, prompt, message in (
        ((2, 8, 8, 3), None, r"\(2, 8, 8, 3\).*\[B, h, w, 4\].*prompt is None"),
        ((2, 8, 8, 4), (1, 3, 31), r"prompt has shape \(1, 3, 31\)"),
        ((2, 8, 8, 4), (3, 3, 32), r"prompt has shape \(3, 3, 32\)"),
    ):
        inputs = [x and jnp.zeros(x) for x in (sample, prompt)]
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(UNet(config).init, jax.random.key(0), inputs[0], 999, inputs[1])


def small_unet(**options):
    """Returns f(params) -> output, and params of plausible size."""
    sample, prompt = oracle.normal(1, 2, 5, 4, 4), oracle.normal(2, 1, 2, 16)
    module = UNet(SMALL, **options)
    params = oracle.random_like(oracle.abstract_unet(SMALL))
    return (lambda params: module.apply({"params": params}, sample, 999, prompt)[0]), params


def tiny_encoder(**options):
    module, image = TinyEncoder(TINY, **options), oracle.normal(1, 1, 8, 16, 3)
    params = oracle.random_like(oracle.abstract_tiny(TINY)["encoder"])
    return (lambda params: module.apply({"params": params}, image)), params


def tiny_decoder(**options):
    module, latent = TinyDecoder(TINY, **options), oracle.normal(1, 1, 1, 2, 6)
    params = oracle.random_like(oracle.abstract_tiny(TINY)["decoder"])
    return (lambda params: module.apply({"params": params}, latent)), params


@pytest.mark.parametrize("make", [small_unet, tiny_encoder, tiny_decoder])
def test_remat_gives_the_same_values_and_gradients(make):
    def value_and_grad(remat):
        apply, params = make(remat=remat)
        loss = jax.value_and_grad(lambda p: (apply(p) ** 2).mean())
        traced = jax.jit(loss).trace(params)
        assert ("remat" in str(traced.jaxpr)) is remat
        return traced.lower().compile(oracle.QUICK)(params)

    (plain, gradients), (same, same_gradients) = value_and_grad(False), value_and_grad(True)
    np.testing.assert_allclose(plain, same, rtol=1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(same_gradients)
    # Measured against the largest gradient: those of biases before a norm are rounding noise.
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(same_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("make", [small_unet, tiny_encoder, tiny_decoder])
def test_bfloat16_is_close_and_keeps_float32_parameters(make):
    exact, params = make()
    rough, _ = make(dtype=jnp.bfloat16)
    exact, rough = oracle.run(exact, params), oracle.run(rough, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    # The decoder ends in float32: an image of 256 levels would show in depth.
    assert rough.dtype == (jnp.float32 if make is tiny_decoder else jnp.bfloat16)
    error = jnp.sqrt(jnp.mean((exact - rough) ** 2)) / jnp.std(exact)
    assert 1e-5 < error < 0.03  # bfloat16 has 8 bits


def test_norms_and_softmax_are_float32_under_bfloat16():
    x = 100 + oracle.normal(0, 2, 4, 4, 32)
    x = jnp.asarray(x, jnp.bfloat16)
    norm = layers.group_norm(None, 16, 1e-5, jnp.bfloat16)
    normal = norm.apply(norm.init(jax.random.key(0), x), x)
    groups = np.asarray(normal, np.float32).reshape(2, 16, 16, 2)
    np.testing.assert_allclose(groups.mean((1, 3)), 0, atol=2e-3)
    np.testing.assert_allclose(groups.std((1, 3)), 1, atol=5e-3)
    # 4096 equal weights add up to 1 in float32; in bfloat16 such a sum stops at 256 terms.
    values = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    out = layers.attention(values[:, :1], values, values)
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1)


def test_attention_equals_its_formula_in_float64():
    q, k, v = (oracle.normal(i, 2, n, 3, 5) for i, n in enumerate((7, 4, 4)))
    logits = np.einsum("bnhd,bmhd->bhnm", q.astype(float), k) / np.sqrt(5)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhd->bnhd", weights, v)
    np.testing.assert_allclose(layers.attention(q, k, v), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "size"),
    [(presets.TAESD, (5, 3)), (TINY, (2, 4)), (TINY, (3, 1))],
    ids=["taesd", "small", "small-narrow"],
)
def test_tiny_autoencoder_equals_diffusers(config, size):
    vae = oracle.torch_tiny(config)
    params = convert.from_torch(oracle.tensors_of(vae), oracle.abstract_tiny(config))
    image = oracle.normal(1, 2, 8 * size[0], 8 * size[1], 3)
    latent = 3 * oracle.normal(2, 2, *size, config.latent_channels)  # far enough for the tanh
    with torch.no_grad():
        expected_latent = oracle.nhwc(vae.encode(oracle.nchw(image)).latents)
        expected_image = oracle.nhwc(vae.decode(oracle.nchw(latent)).sample)
    ours = oracle.run(TinyEncoder(config).apply, {"params": params["encoder"]}, image)
    assert oracle.relative_error(ours, expected_latent) <= oracle.TOLERANCE
    ours = oracle.run(TinyDecoder(config).apply, {"params": params["decoder"]}, latent)
    assert oracle.relative_error(ours, expected_image) <= oracle.TOLERANCE


def test_tiny_autoencoder_names_what_is_wrong_with_its_inputs():
    for module, shape, message in (
        (TinyEncoder(TINY), (1, 16, 20, 3), "16 x 20.*multiples of 8"),
        (TinyEncoder(TINY), (1, 16, 16, 4), r"\(1, 16, 16, 4\)"),
        (TinyDecoder(TINY), (1, 2, 2, 4), r"\(1, 2, 2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("picture", ["astronaut", "desk"])
def test_real_taesd_equals_diffusers_on_a_photograph(shared, picture):
    if picture == "astronaut":
        pixels = skimage.data.astronaut()[120:216, 160:288]
    else:
        path = sorted((shared / "rgbd" / "tum_fr2_desk_kinect" / "rgb").iterdir())[0]
        pixels = np.asarray(Image.open(path).convert("RGB"))[200:296, 160:288]
    image = pixels[None].astype(np.float32) / 127.5 - 1
    folder = shared / "weights" / "taesd"
    tensors = convert.taesd_to_diffusers(
        *(files.read(folder / f"taesd_{x}.safetensors") for x in ("encoder", "decoder"))
    )
    vae = diffusers.AutoencoderTiny().eval()
    exact = {key: torch.from_numpy(value.astype(np.float32)) for key, value in tensors.items()}
    vae.load_state_dict(exact, strict=True)
    params = convert.from_torch(tensors, oracle.abstract_tiny(presets.TAESD), dtype=np.float32)
    with torch.no_grad():
        expected_latent = vae.encode(oracle.nchw(image)).latents
        expected_image = oracle.nhwc(vae.decode(expected_latent).sample)
    encoder, decoder = TinyEncoder(presets.TAESD), TinyDecoder(presets.TAESD)
    latent = oracle.run(encoder.apply, {"params": params["encoder"]}, image)
    assert np.abs(latent - oracle.nhwc(expected_latent)).max() <= 1e-3
    decoded = oracle.run(decoder.apply, {"params": params["decoder"]}, latent)
    assert np.abs(decoded - expected_image).max() <= 1e-3
    # Not merely the same: the photograph comes back.
    assert np.abs(np.clip(decoded, -1, 1) - image).mean() < 0.1
