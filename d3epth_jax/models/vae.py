"""Stable Diffusion's autoencoder (diffusers' AutoencoderKL) in Linen, NHWC.

Two modules, because their parameters live in separate trees: quant_conv belongs to the encoder,
post_quant_conv to the decoder. Submodule names are torch's with `.N` written `_N`.

Pictures are not cut into tiles: GroupNorm's statistics are over the whole picture. Tiles with their
own would not give its numbers; exact ones would have to meet at each of the 20 to 30 norms, and
either keep what they have by then, which is what takes the memory, or compute it again each time.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from d3epth_jax.models import convolution, layers
from d3epth_jax.models.config import AutoencoderKLConfig
from d3epth_jax.models.folding import NOT_FOLDED, Folding


class _Part(nn.Module):
    """What encoder and decoder have in common."""

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32
    remat: bool = False
    attention: str = "auto"
    folding: Folding = NOT_FOLDED

    def _shared(self) -> dict[str, Any]:
        names = ("config", "dtype", "remat", "attention", "folding")
        return {name: getattr(self, name) for name in names}

    def norm_out(self, x):
        """What is before the last convolution."""
        return layers.group_norm(
            "conv_norm_out",
            self.config.norm_num_groups,
            layers.VAE_NORM_EPS,
            self.dtype,
            silu=True,
        )(x)


class KLEncoder(_Part):
    """Image [B, H, W, 3] in [-1, 1] -> the mean of the latent's distribution [B, H/8, W/8, C].

    Not scaled: the caller multiplies by `config.scaling_factor`. Raises ValueError if H or W is
    not a multiple of `config.downsampling`.
    """

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        c = self.config
        layers.check_image("KLEncoder", image, c.in_channels, c.downsampling)
        shared = self._shared()
        x = convolution.conv("conv_in", c.block_out_channels[0], self.dtype)(image)
        last = len(c.block_out_channels) - 1
        for i, channels in enumerate(c.block_out_channels):
            x = _DownBlock(
                channels=channels, downsample=i < last, name=f"down_blocks_{i}", **shared
            )(x)
        x = _MidBlock(name="mid_block", **shared)(x)
        x = self.norm_out(x)
        moments = convolution.conv("conv_out", 2 * c.latent_channels, self.dtype)(x)
        if c.use_quant_conv:
            moments = convolution.conv(
                "quant_conv", 2 * c.latent_channels, self.dtype, kernel_size=1
            )(moments)
        return moments[..., : c.latent_channels]


class KLDecoder(_Part):
    """Latent [B, h, w, C], not scaled -> image [B, 8h, 8w, 3] in about [-1, 1], float32.

    The last convolution is float32 in any `dtype`: bfloat16 would leave depth in steps of 1/128.
    Raises ValueError for another latent shape.
    """

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        c = self.config
        layers.check_latent("KLDecoder: latent", latent, c.latent_channels)
        shared = self._shared()
        x = latent
        if c.use_post_quant_conv:
            x = convolution.conv("post_quant_conv", c.latent_channels, self.dtype, kernel_size=1)(x)
        x = convolution.conv("conv_in", c.block_out_channels[-1], self.dtype)(x)
        x = _MidBlock(name="mid_block", **shared)(x)
        last = len(c.block_out_channels) - 1
        for i, channels in enumerate(reversed(c.block_out_channels)):
            x = _UpBlock(channels=channels, upsample=i < last, name=f"up_blocks_{i}", **shared)(x)
        x = self.norm_out(x)
        return convolution.conv("conv_out", c.out_channels, jnp.float32)(x)


class _Block(_Part):
    def resnet(self, i: int, channels: int) -> nn.Module:
        module = nn.remat(layers.ResnetBlock) if self.remat else layers.ResnetBlock
        groups = self.config.norm_num_groups
        return module(channels, groups, layers.VAE_NORM_EPS, self.dtype, name=f"resnets_{i}")


class _DownBlock(_Block):
    channels: int = 0
    downsample: bool = True

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.layers_per_block):
            x = self.resnet(i, self.channels)(x)
        if self.downsample:
            padding = convolution.VAE_DOWNSAMPLE_PADDING
            x = convolution.Downsample(self.dtype, padding, name="downsamplers_0")(x)
        return x


class _MidBlock(_Block):
    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        x = self.resnet(0, channels)(x)
        if self.config.mid_block_add_attention:
            module = nn.remat(SpatialAttention) if self.remat else SpatialAttention
            groups = self.config.norm_num_groups
            x = module(groups, self.dtype, self.attention, name="attentions_0")(x)
        return self.resnet(1, channels)(x)


class _UpBlock(_Block):
    channels: int = 0
    upsample: bool = True

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.layers_per_block + 1):
            x = self.resnet(i, self.channels)(x)
        if self.upsample:
            double = (2 * x.shape[1], 2 * x.shape[2])
            phases = "decoder" in self.folding.upsampling
            x = convolution.Upsample(self.dtype, phases, name="upsamplers_0")(x, double)
        return x


class SpatialAttention(nn.Module):
    """One head of self-attention over the cells of x [B, h, w, C], with a skip."""

    groups: int
    dtype: Any
    attention: str = "auto"

    @nn.compact
    def __call__(self, x):
        h = layers.group_norm("group_norm", self.groups, layers.VAE_NORM_EPS, self.dtype)(x)
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        settings = {"heads": 1, "dtype": self.dtype, "implementation": self.attention}
        h = layers.project_and_attend(h, h, use_bias=True, **settings)
        return x + h.reshape(x.shape)
