"""The UNet of Stable Diffusion (diffusers' UNet2DConditionModel) in Linen, NHWC.

Covers SD 1.x and 2.x, BK-SDM's pruned shapes, and plain ones without attention. Submodule names are
torch's with `.N` written `_N`, so weights convert by rule (weights/keys.py).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from d3epth_jax.models import convolution, layers
from d3epth_jax.models.config import UNetConfig
from d3epth_jax.models.folding import NOT_FOLDED, Folding


class UNet(nn.Module):
    """Denoiser: sample [B, h, w, Cin], timestep (int scalar or [B]), prompt [1 or B, N, D].

    Returns the output [B, h, w, Cout] and the features, a dict of arrays in `dtype`:
    `down_blocks_{i}` (after its downsampler), `down_blocks_{i}.attentions_{j}.proj_out` (before the
    residual is added), `mid_block`, `up_blocks_{i}` (after its upsampler).
    Any h and w of at least 1. `remat` recomputes resnets and transformers in the backward pass.
    Raises ValueError if the sample's channels or the prompt do not fit the config.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    remat: bool = False
    attention: str = "auto"
    folding: Folding = NOT_FOLDED

    @nn.compact
    def __call__(
        self, sample: jax.Array, timestep: jax.Array | int, prompt: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        _check_inputs(c, sample, prompt, self.folding)
        width = c.block_out_channels[0]
        temb = None if self.folding.time else self._embed(timestep)

        features = {}
        x = convolution.conv("conv_in", width, self.dtype)(sample)
        skips = [x]
        last = len(c.block_out_channels) - 1
        for i, kind in enumerate(c.down_block_types):
            name = f"down_blocks_{i}"
            block = DownBlock(
                **self._shared(level=i, attend="CrossAttn" in kind), downsample=i < last, name=name
            )
            x, outputs, projections = block(x, temb, prompt)
            skips += outputs
            features |= {f"{name}.attentions_{j}.proj_out": p for j, p in enumerate(projections)}
            features[name] = x
        if c.mid_block_type is not None:
            attend = "CrossAttn" in c.mid_block_type
            block = MidBlock(**self._shared(level=last, attend=attend), name="mid_block")
            x = features["mid_block"] = block(x, temb, prompt)
        for i, kind in enumerate(c.up_block_types):
            name = f"up_blocks_{i}"
            block = UpBlock(**self._shared(level=last - i, attend="CrossAttn" in kind), name=name)
            used = [skips.pop() for _ in range(c.layers_per_block + 1)]
            x = features[name] = block(
                x, used, temb, prompt, skips[-1].shape[1:3] if skips else None
            )

        x = layers.group_norm(
            "conv_norm_out", c.norm_num_groups, c.norm_eps, self.dtype, silu=True
        )(x)
        return convolution.conv("conv_out", c.out_channels, self.dtype)(x), features

    def _embed(self, timestep):
        c, width = self.config, self.config.block_out_channels[0]
        temb = layers.timestep_embedding(
            jnp.atleast_1d(jnp.asarray(timestep)),
            width,
            flip_sin_to_cos=c.flip_sin_to_cos,
            freq_shift=c.freq_shift,
        ).astype(self.dtype)
        temb = layers.TimeEmbedding(4 * width, self.dtype, name="time_embedding")(temb)
        return nn.silu(temb)  # every resnet begins with it

    def _shared(self, level: int, attend: bool) -> dict[str, Any]:
        names = ("config", "dtype", "remat", "attention", "folding")
        return {name: getattr(self, name) for name in names} | {"level": level, "attend": attend}


class _Block(nn.Module):
    """What the blocks of one level have in common."""

    config: UNetConfig
    level: int
    attend: bool
    dtype: Any
    remat: bool
    attention: str
    folding: Folding

    @property
    def channels(self) -> int:
        return self.config.block_out_channels[self.level]

    def resnet(self, i: int) -> nn.Module:
        c = self.config
        module = nn.remat(layers.ResnetBlock) if self.remat else layers.ResnetBlock
        return module(self.channels, c.norm_num_groups, c.norm_eps, self.dtype, name=f"resnets_{i}")

    def transformer(self, i: int) -> nn.Module:
        c = self.config
        module = nn.remat(layers.SpatialTransformer) if self.remat else layers.SpatialTransformer
        return module(
            c.heads[self.level],
            c.norm_num_groups,
            c.use_linear_projection,
            self.dtype,
            self.attention,
            self.folding.prompt_tokens,
            name=f"attentions_{i}",
        )


class DownBlock(_Block):
    """CrossAttnDownBlock2D or DownBlock2D: returns x, the skips, and the proj_out features."""

    downsample: bool = True

    @nn.compact
    def __call__(self, x, temb, prompt):
        skips, projections = [], []
        for i in range(self.config.layers_per_block):
            x = self.resnet(i)(x, temb)
            if self.attend:
                x, projection = self.transformer(i)(x, prompt)
                projections.append(projection)
            skips.append(x)
        if self.downsample:
            x = convolution.Downsample(self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips, projections


class MidBlock(_Block):
    """UNetMidBlock2DCrossAttn; or, without attention, the one resnet of UNetMidBlock2D."""

    @nn.compact
    def __call__(self, x, temb, prompt):
        x = self.resnet(0)(x, temb)
        if self.attend:
            x, _ = self.transformer(0)(x, prompt)
            x = self.resnet(1)(x, temb)
        return x


class UpBlock(_Block):
    """CrossAttnUpBlock2D or UpBlock2D: one skip per layer; upsamples to `size` unless None."""

    @nn.compact
    def __call__(self, x, skips, temb, prompt, size):
        for i, skip in enumerate(skips):
            x = self.resnet(i)(jnp.concatenate([x, skip], axis=-1), temb)
            if self.attend:
                x, _ = self.transformer(i)(x, prompt)
        if size is not None:
            phases = "unet" in self.folding.upsampling
            x = convolution.Upsample(self.dtype, phases, name="upsamplers_0")(x, size)
        return x


def needs_prompt(config: UNetConfig, folding: Folding) -> bool:
    """Whether any block still reads the prompt."""
    tokens = folding.prompt_tokens
    return any(
        not (tokens and layers.collapses(config.block_out_channels[i], config.heads[i], tokens))
        for i in config.attending
    )


def _check_inputs(config: UNetConfig, sample, prompt, folding: Folding) -> None:
    problems = []
    if sample.ndim != 4 or sample.shape[-1] != config.in_channels:
        problems.append(
            f"sample has shape {sample.shape}, expected [B, h, w, {config.in_channels}]"
        )
    if needs_prompt(config, folding):
        dim = config.cross_attention_dim
        if prompt is None:
            problems.append(f"prompt is None, expected [1 or B, N, {dim}]")
        elif prompt.ndim != 3 or prompt.shape[-1] != dim or prompt.shape[0] not in (1, len(sample)):
            problems.append(f"prompt has shape {prompt.shape}, expected [1 or B, N, {dim}]")
    if problems:
        raise ValueError("UNet: " + "; ".join(problems))
