"""The tiny autoencoder (TAESD, github.com/madebyollin/taesd; diffusers' AutoencoderTiny), NHWC.

Two modules, because their parameters live in separate trees. Images are in [-1, 1] outside and in
[0, 1] inside, as in diffusers. Layers are numbered as in diffusers' `encoder.layers` and
`decoder.layers`; numbers that are missing here belong to activations and upsamplings.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from d3epth_jax.models import convolution, layers
from d3epth_jax.models.config import TinyAutoencoderConfig
from d3epth_jax.models.folding import NOT_FOLDED, Folding


class TinyEncoder(nn.Module):
    """Image [B, H, W, 3] in [-1, 1] -> latent [B, H/f, W/f, C], already scaled; TAESD has f = 8.

    Raises ValueError if H or W is not a multiple of `config.downsampling`.
    """

    config: TinyAutoencoderConfig
    dtype: Any = jnp.float32
    remat: bool = False
    folding: Folding = NOT_FOLDED

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        c = self.config
        layers.check_image("TinyEncoder", image, c.in_channels, c.downsampling)
        width = c.encoder_block_out_channels[0]
        numbered = _Layers(self.dtype, self.remat)
        x = (image + 1) / 2
        for stage, blocks in enumerate(c.num_encoder_blocks):
            if stage == 0:
                x = numbered.conv(width)(x)
            else:
                x = numbered.conv(width, strides=2, use_bias=False)(x)
            for _ in range(blocks):
                x = numbered.block()(x)
        return numbered.conv(c.latent_channels)(x)


class TinyDecoder(nn.Module):
    """Latent [B, h, w, C] -> image [B, fh, fw, 3] in about [-1, 1], float32; TAESD has f = 8.

    The last convolution is float32 in any `dtype`: bfloat16 would leave depth in steps of 1/128.
    Raises ValueError for another latent shape.
    """

    config: TinyAutoencoderConfig
    dtype: Any = jnp.float32
    remat: bool = False
    folding: Folding = NOT_FOLDED

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        c = self.config
        layers.check_latent("TinyDecoder: latent", latent, c.latent_channels)
        width = c.decoder_block_out_channels[0]
        numbered = _Layers(self.dtype, self.remat)
        phases = "decoder" in self.folding.upsampling
        x = 3 * jnp.tanh(latent / 3)
        x = nn.relu(numbered.conv(width)(x))
        numbered.skip()
        for blocks in c.num_decoder_blocks[:-1]:
            for _ in range(blocks):
                x = numbered.block()(x)
            numbered.skip()
            x = numbered.upsample(x, width, phases=phases)
        for _ in range(c.num_decoder_blocks[-1]):
            x = numbered.block()(x)
        x = numbered.conv(c.out_channels, dtype=jnp.float32)(x)
        return 2 * x - 1


class _Layers:
    """Hands out `layers_0`, `layers_1`, ... as torch's nn.Sequential numbers them."""

    def __init__(self, dtype: Any, remat: bool):
        self.dtype, self.remat, self.index = dtype, remat, 0

    def skip(self) -> str:
        name = f"layers_{self.index}"
        self.index += 1
        return name

    def conv(self, features: int, **options) -> nn.Conv:
        options = {"dtype": self.dtype, **options}
        return convolution.conv(self.skip(), features, **options)

    def upsample(self, x, features: int, *, phases: bool):
        size = (2 * x.shape[1], 2 * x.shape[2])
        return convolution.upsample_conv(
            x, size, self.skip(), features, self.dtype, phases=phases, use_bias=False
        )

    def block(self) -> nn.Module:
        module = nn.remat(TinyBlock) if self.remat else TinyBlock
        return module(self.dtype, name=self.skip())


class TinyBlock(nn.Module):
    """Three convolutions with ReLU and a skip."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        def conv(name):
            return convolution.conv(name, x.shape[-1], self.dtype)

        h = nn.relu(conv("conv_0")(x))
        h = nn.relu(conv("conv_2")(h))
        return nn.relu(conv("conv_4")(h) + x)
