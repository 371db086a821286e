"""Stable Diffusion's autoencoder beside diffusers': values, published configs, old files."""

import dataclasses
import functools
import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from d3epth_jax.models import convolution, layers
from d3epth_jax.models.config import AutoencoderKLConfig
from d3epth_jax.models.depth_model import abstract_autoencoder
from d3epth_jax.models.vae import KLDecoder, KLEncoder
from d3epth_jax.weights import convert, files, keys
from tests import unet_oracle as oracle

SMALL = AutoencoderKLConfig(block_out_channels=(8, 16), norm_num_groups=4)
ONE_LEVEL = dataclasses.replace(SMALL, block_out_channels=(8,))
CONFIGS = {
    # Stable Diffusion's structure at a sixteenth of its width.
    "sd": AutoencoderKLConfig(
        block_out_channels=(8, 16, 32, 32), layers_per_block=2, norm_num_groups=4
    ),
    "small": SMALL,
    "bare": dataclasses.replace(
        SMALL,
        latent_channels=3,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ),
}


def torch_vae(config, seed: int = 0) -> diffusers.AutoencoderKL:
    torch.manual_seed(seed)
    return oracle.perturb(diffusers.AutoencoderKL.from_config(config.to_dict()))


def run(module, params, x) -> np.ndarray:
    return oracle.run(lambda params, x: module.apply({"params": params}, x), params, x)


def latent_of(vae, image) -> np.ndarray:
    with torch.no_grad():
        return oracle.nhwc(vae.encode(oracle.nchw(image)).latent_dist.mode())


def image_of(vae, latent) -> np.ndarray:
    with torch.no_grad():
        return oracle.nhwc(vae.decode(oracle.nchw(latent)).sample)


@functools.cache
def pair(name):
    config = CONFIGS[name]
    vae = torch_vae(config)
    return config, vae, convert.from_torch(oracle.tensors_of(vae), abstract_autoencoder(config))


# Values


@pytest.mark.parametrize(
    ("name", "size"), [("sd", (5, 3)), ("small", (7, 10)), ("bare", (3, 6))], ids=str
)
def test_latent_is_the_posterior_mean_of_diffusers(name, size):
    config, vae, params = pair(name)
    image = oracle.normal(1, 2, *(config.downsampling * side for side in size), 3)
    ours = run(KLEncoder(config), params["encoder"], image)
    assert ours.shape == (2, *size, config.latent_channels)
    assert oracle.relative_error(ours, latent_of(vae, image)) <= oracle.TOLERANCE


@pytest.mark.parametrize(
    ("name", "size"),
    [("sd", (5, 3)), ("sd", (11, 38)), ("small", (11, 38)), ("bare", (3, 6))],
    ids=str,
)
def test_decoded_image_equals_diffusers(name, size):
    config, vae, params = pair(name)
    latent = oracle.normal(2, 1, *size, config.latent_channels)
    ours = run(KLDecoder(config), params["decoder"], latent)
    # Four levels at that size: torch in float32 is 1.4e-5 from float64, we are 2.9e-5, since XLA on
    # CPU adds up the norms' means over 27,000 cells one by one.
    limit = 2.5 * oracle.TOLERANCE if (name, size) == ("sd", (11, 38)) else oracle.TOLERANCE
    assert oracle.relative_error(ours, image_of(vae, latent)) <= limit


@pytest.fixture(scope="module")
def parity_error():
    """Returns error(part): that of the encoder or decoder as the layers then are."""
    vae = torch_vae(SMALL)
    # Small variances before the norms, so that their eps shows; loud attention; ends as they are.
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 2:
                parameter *= 2
            elif not any(word in name for word in ("norm", "quant_conv", "conv_out")):
                parameter *= 0.1
    params = convert.from_torch(oracle.tensors_of(vae), abstract_autoencoder(SMALL))
    image, latent = oracle.normal(1, 1, 6, 8, 3), oracle.normal(2, 1, 3, 5, 4)
    expected = {"encoder": latent_of(vae, image), "decoder": image_of(vae, latent)}

    def error(part: str) -> float:
        module, x = {"encoder": (KLEncoder, image), "decoder": (KLDecoder, latent)}[part]
        return oracle.relative_error(run(module(SMALL), params[part], x), expected[part])

    return error


def eps_in(name):
    """group_norm with eps 1e-5 in the norms of this name."""
    original = layers.group_norm
    return lambda own, groups, eps, dtype, **options: original(
        own, groups, 1e-5 if own == name else eps, dtype, **options
    )


def two_heads(q, k, v, original=layers.attention, **how):
    q, k, v = (x.reshape(*x.shape[:2], 2, -1) for x in (q, k, v))
    return original(q, k, v, **how)


BREAKS = {
    "eps 1e-5 in the encoder": ("encoder", "VAE_NORM_EPS", 1e-5),
    "eps 1e-5 in the decoder": ("decoder", "VAE_NORM_EPS", 1e-5),
    "resnet norm1 1e-5": ("encoder", "group_norm", eps_in("norm1")),
    "resnet norm2 1e-5": ("encoder", "group_norm", eps_in("norm2")),
    "attention norm 1e-5": ("encoder", "group_norm", eps_in("group_norm")),
    "conv_norm_out 1e-5": ("decoder", "group_norm", eps_in("conv_norm_out")),
    "downsampling pads 1": ("encoder", "VAE_DOWNSAMPLE_PADDING", ((1, 1), (1, 1))),
    "attention with two heads": ("decoder", "attention", two_heads),
}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_unbroken_it_equals_diffusers(parity_error, part):
    assert parity_error(part) <= oracle.TOLERANCE


@pytest.mark.parametrize("name", BREAKS)
def test_broken_it_does_not(parity_error, monkeypatch, name):
    part, attribute, broken = BREAKS[name]
    module = convolution if hasattr(convolution, attribute) else layers
    monkeypatch.setattr(module, attribute, broken)
    assert parity_error(part) > 3 * oracle.TOLERANCE


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_bfloat16_is_close_and_remat_changes_nothing(part):
    config, params = ONE_LEVEL, oracle.random_like(abstract_autoencoder(ONE_LEVEL))
    module, x = {
        "encoder": (KLEncoder, oracle.normal(1, 1, 4, 6, 3)),
        "decoder": (KLDecoder, oracle.normal(1, 1, 4, 6, 4)),
    }[part]
    exact = run(module(config), params[part], x)
    rough = run(module(config, dtype=jnp.bfloat16), params[part], x)
    # The decoder ends in float32: an image of 256 levels would show in depth.
    assert rough.dtype == (jnp.float32 if part == "decoder" else jnp.bfloat16)
    error = jnp.sqrt(jnp.mean((exact - rough) ** 2)) / jnp.std(exact)
    assert 1e-5 < error < 0.03

    def value_and_grad(remat):
        apply = module(config, remat=remat).apply
        loss = jax.value_and_grad(lambda p: (apply({"params": p}, x) ** 2).mean())
        traced = jax.jit(loss).trace(params[part])
        assert ("remat" in str(traced.jaxpr)) is remat
        return traced.lower().compile(oracle.QUICK)(params[part])

    (value, gradients), (same, same_gradients) = value_and_grad(False), value_and_grad(True)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale),
        gradients,
        same_gradients,
    )


def test_wrong_inputs_are_named():
    for module, shape, message in (
        (KLEncoder(CONFIGS["sd"]), (1, 16, 20, 3), "16 x 20.*multiples of 8"),
        (KLEncoder(SMALL), (1, 16, 16, 4), r"\(1, 16, 16, 4\)"),
        (KLDecoder(SMALL), (1, 2, 2, 3), r"\(1, 2, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))


# Configs


@pytest.mark.parametrize("base", ["sd15", "sd21"])
def test_published_autoencoder_has_its_parameters(shared, base):
    path = shared / "hf_configs" / base / "vae" / "config.json"
    config = AutoencoderKLConfig.from_dict(json.loads(path.read_text()))
    assert config == AutoencoderKLConfig(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2
    )
    assert (config.downsampling, config.scaling_factor) == (8, 0.18215)
    leaves = jax.tree.leaves(abstract_autoencoder(config))
    assert sum(leaf.size for leaf in leaves) == 83_653_863


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_go_through_diffusers_and_json_and_come_back(name):
    config = CONFIGS[name]
    text = json.dumps(config.to_dict())
    assert AutoencoderKLConfig.from_dict(json.loads(text)) == config
    theirs = json.loads(diffusers.AutoencoderKL.from_config(json.loads(text)).to_json_string())
    assert AutoencoderKLConfig.from_dict(theirs) == config


def test_absent_keys_mean_diffusers_defaults():
    signature = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    for field in dataclasses.fields(AutoencoderKLConfig):
        assert field.default == signature[field.name].default, field.name


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "relu"},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D"]},
        {"shift_factor": 0.1159},
        {"latents_mean": [0.0, 0.0, 0.0, 0.0]},
        {"latents_std": [1.0, 1.0, 1.0, 1.0]},
        {"norm_num_groups": 5},
        {"block_out_channels": []},
        {"_class_name": "AutoencoderTiny"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_computed_here_is_refused_by_name(change):
    (key,) = change
    named = {"norm_num_groups": "5 groups", "_class_name": "'AutoencoderTiny'"}.get(key, key)
    with pytest.raises(ValueError, match=named):
        AutoencoderKLConfig.from_dict({**SMALL.to_dict(), **change})


# Files of other ages

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def in_old_names(tensors, ndim: int) -> dict[str, np.ndarray]:
    """The autoencoder as diffusers before 0.17 wrote it (2-D), or from the original files (4-D)."""
    old = {}
    for key, tensor in tensors.items():
        for modern, name in OLD_NAMES.items():
            if f"mid_block.attentions.0.{modern}." in key:
                key = key.replace(f".{modern}.", f".{name}.")
                if tensor.ndim == 2:
                    tensor = tensor.reshape(*tensor.shape, *(1,) * (ndim - 2))
        old[key] = tensor
    return old


@pytest.mark.parametrize("ndim", [2, 4])
def test_old_attention_loads_as_the_modern_and_is_written_modern(ndim, tmp_path):
    config, vae, params = pair("small")
    modern = oracle.tensors_of(vae)
    old = in_old_names(modern, ndim)
    assert len(old.keys() - modern.keys()) == 16  # 2 nets, 4 layers of 2
    read = convert.from_torch(
        keys.modern_names(old, keys.AUTOENCODER_AGES), abstract_autoencoder(config)
    )
    jax.tree.map(np.testing.assert_array_equal, read, params)
    back = convert.to_torch(read)
    assert back.keys() == modern.keys()
    for key, tensor in modern.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    if ndim == 2:  # which diffusers too still reads
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        files.write(tmp_path / "diffusion_pytorch_model.safetensors", old)
        theirs = oracle.tensors_of(diffusers.AutoencoderKL.from_pretrained(tmp_path))
        for key, tensor in modern.items():
            np.testing.assert_array_equal(theirs[key], tensor, err_msg=key)


def test_keys_beside_encoder_and_decoder():
    for path, key in (
        ("encoder/quant_conv/kernel", "quant_conv.weight"),
        ("decoder/post_quant_conv/bias", "post_quant_conv.bias"),
        ("encoder/conv_in/bias", "encoder.conv_in.bias"),
        (
            "decoder/mid_block/attentions_0/to_out_0/kernel",
            "decoder.mid_block.attentions.0.to_out.0.weight",
        ),
    ):
        assert keys.torch_key(tuple(path.split("/"))) == key


def test_two_ages_in_one_file_are_refused_by_name():
    attention = "encoder.mid_block.attentions.0"
    names = [f"{attention}.{name}.weight" for name in ("query", "to_q", "key", "to_k", "to_v")]
    with pytest.raises(ValueError) as error:
        keys.modern_names(dict.fromkeys(names), keys.AUTOENCODER_AGES)
    assert all(name in str(error.value) for name in names[:4])
    assert names[4] not in str(error.value)


def test_only_a_1x1_convolution_passes_for_a_linear_layer():
    abstract = {"to_q": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
    with pytest.raises(ValueError, match=r"is \(4, 4, 3, 3\), the model has \(4, 4\)"):
        convert.from_torch({"to_q.weight": np.zeros((4, 4, 3, 3), np.float32)}, abstract)
