"""Each numeric detail broken on purpose: parity with diffusers must fail, or it proves nothing.

Here the UNet's; the KL autoencoder's and the text encoder's are in the files of their tests.
"""

import dataclasses

import jax
import pytest
import torch

from d3epth_jax.models import convolution, layers
from d3epth_jax.models.config import UNetConfig
from d3epth_jax.models.unet import UNet
from d3epth_jax.weights import convert
from tests import unet_oracle as oracle

CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    mid_block_type=None,  # nothing new in it, and tests mostly compile
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=16,
    use_linear_projection=True,
)
ODD = (5, 7)  # upsampling has to cut
EVEN = (4, 6)  # both ways of padding leave the same size


@pytest.fixture(scope="module")
def parity_error():
    """Returns error(size of the latent, our config): that of the UNet as the layers then are."""
    net = oracle.torch_unet(CONFIG)
    # Quiet convolutions and projections, so that norms meet small variances, where their eps shows;
    # loud linear layers between, so that attention and GELU weigh in the result.
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            quiet = parameter.ndim == 4 or "proj_in" in name or "proj_out" in name
            parameter *= 0.1 if quiet else 2 if parameter.ndim == 2 else 1
    params = convert.from_torch(oracle.tensors_of(net), oracle.abstract_unet(CONFIG))

    def error(size, config=CONFIG) -> float:
        inputs = (oracle.normal(1, 2, *size, 4), 999, oracle.normal(2, 1, 3, 16))
        output, _ = oracle.run_unet(UNet(config), params, *inputs)
        return oracle.relative_error(output, oracle.run_torch_unet(net, *inputs)[0])

    return error


def with_eps(eps, *names):
    """group_norm with another eps in the norms of these names."""
    original = layers.group_norm
    return lambda name, groups, own, dtype, **options: original(
        name, groups, eps if name in names else own, dtype, **options
    )


def half_pixel(x, size):
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "nearest")


def flipped(timestep, dim, *, flip_sin_to_cos, freq_shift, original=layers.timestep_embedding):
    return original(timestep, dim, flip_sin_to_cos=not flip_sin_to_cos, freq_shift=freq_shift)


def unscaled_attention(q, k, v, original=layers.attention, **how):
    return original(q * q.shape[-1] ** 0.5, k, v, **how)


BREAKS = {
    "gelu by tanh": ("gelu", lambda x: jax.nn.gelu(x, approximate=True), ODD),
    "transformer norm 1e-5": ("TRANSFORMER_NORM_EPS", 1e-5, ODD),
    "layer norm 1e-6": ("LAYER_NORM_EPS", 1e-6, ODD),
    "resnet norm1 1e-6": ("group_norm", with_eps(1e-6, "norm1"), ODD),
    "resnet norm2 1e-6": ("group_norm", with_eps(1e-6, "norm2"), ODD),
    "conv_norm_out 1e-6": ("group_norm", with_eps(1e-6, "conv_norm_out"), ODD),
    "half-pixel nearest": ("upsample_nearest", half_pixel, ODD),
    "downsampling pads (0, 1)": ("DOWNSAMPLE_PADDING", ((0, 1), (0, 1)), EVEN),
    "time embedding flipped": ("timestep_embedding", flipped, ODD),
    "attention without its scale": ("attention", unscaled_attention, ODD),
}


@pytest.mark.parametrize("size", [ODD, EVEN], ids=str)
def test_unbroken_it_equals_diffusers(parity_error, size):
    assert parity_error(size) <= oracle.TOLERANCE


@pytest.mark.parametrize("name", BREAKS)
def test_broken_it_does_not(parity_error, monkeypatch, name):
    attribute, broken, size = BREAKS[name]
    module = convolution if hasattr(convolution, attribute) else layers
    monkeypatch.setattr(module, attribute, broken)
    assert parity_error(size) > 3 * oracle.TOLERANCE


def test_heads_taken_as_their_width_show(parity_error):
    width = CONFIG.attention_head_dim
    heads = tuple(channels // width for channels in CONFIG.block_out_channels)
    config = dataclasses.replace(CONFIG, attention_head_dim=heads)
    assert parity_error(ODD, config) > 3 * oracle.TOLERANCE
