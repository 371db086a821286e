"""Published model shapes, and BK-SDM's way of pruning them."""

import dataclasses

from d3epth_jax.models.config import AutoencoderKLConfig, TinyAutoencoderConfig, UNetConfig
from d3epth_jax.schedule import NoiseSchedule

SD1_UNET = UNetConfig(cross_attention_dim=768)
SD2_UNET = UNetConfig(
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    upcast_attention=True,
)
SD_VAE = AutoencoderKLConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
TAESD = TinyAutoencoderConfig()
# A block costs 49 GMACs at 576x768, four times what it costs at the next level: none there.
TAESD_TURBO = TinyAutoencoderConfig(
    num_encoder_blocks=(0, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 0)
)


def bk_sdm(config: UNetConfig, kind: str) -> UNetConfig:
    """Prunes a UNet's shape as BK-SDM does (Kim et al., ECCV 2024, section 3).

    `base` keeps one resnet per down block and two per up block; `small` also drops the mid block;
    `tiny` also drops the innermost level. Raises ValueError for another kind, or for a `config`
    that is not a full one (two layers per block and, for `tiny`, two levels).
    """
    kinds = ("base", "small", "tiny")
    if kind not in kinds:
        raise ValueError(f"kind = {kind!r}; BK-SDM has {', '.join(kinds)}")
    if config.layers_per_block != 2:
        raise ValueError(
            f"BK-SDM prunes UNets with layers_per_block = 2, this one has {config.layers_per_block}"
        )
    config = dataclasses.replace(config, layers_per_block=1)
    if kind in ("small", "tiny"):
        config = dataclasses.replace(config, mid_block_type=None)
    if kind == "tiny":
        if len(config.block_out_channels) < 2:
            raise ValueError("BK-SDM tiny drops the innermost level; this UNet has only one")
        heads = config.attention_head_dim
        config = dataclasses.replace(
            config,
            block_out_channels=config.block_out_channels[:-1],
            down_block_types=config.down_block_types[:-1],
            up_block_types=config.up_block_types[1:],
            attention_head_dim=heads[:-1] if isinstance(heads, tuple) else heads,
        )
    return config


def turbo(config: UNetConfig) -> UNetConfig:
    """Ours: BK-SDM's tiny with plain blocks at the highest level, where attention costs most.

    All that is left has its place in the full UNet. Errors as `bk_sdm`.
    """
    config = bk_sdm(config, "tiny")
    return dataclasses.replace(
        config,
        down_block_types=("DownBlock2D", *config.down_block_types[1:]),
        up_block_types=(*config.up_block_types[:-1], "UpBlock2D"),
    )


# How a model that this project trains turns its output into z0: one step from the last timestep,
# zero SNR, so that diffusers' DDIM step gives the same (METHOD 1).
SINGLE_STEP = NoiseSchedule(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    clip_sample=False,
)


NANO_LATENT = 16  # channels: a space of our own, and 4 leave little of an 8x8 cell


def _nano_unet(widths: tuple[int, ...], mid: bool) -> UNetConfig:
    """Plain blocks, and attention at the innermost level alone; RGB latent in, depth latent out."""
    plain = len(widths) - 1
    return UNetConfig(
        in_channels=NANO_LATENT,
        out_channels=NANO_LATENT,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        mid_block_type="UNetMidBlock2DCrossAttn" if mid else None,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        use_linear_projection=True,
        norm_num_groups=8,
    )


def _nano_autoencoder(
    encoder_blocks: tuple[int, ...], decoder_blocks: tuple[int, ...]
) -> TinyAutoencoderConfig:
    """Of one width, so that a student's is a teacher's with fewer blocks."""
    return TinyAutoencoderConfig(
        latent_channels=NANO_LATENT,
        encoder_block_out_channels=(24,) * len(encoder_blocks),
        decoder_block_out_channels=(16,) * len(decoder_blocks),
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
    )


DEPTH_UNET = dataclasses.replace(SD2_UNET, in_channels=8)  # of an RGB and a depth latent

# Name -> (UNet, autoencoder). `d2_base`, `d3_base|small|tiny`: Stable Diffusion's UNet and pruned
# ones, with its autoencoder. `*_light*`, `d3_fast`: with the tiny autoencoder of that latent space.
# `d3_turbo`: ours, with the least of both. `*_nano`: from scratch, on CPU.
#
# GMACs at 576x768 with 77 prompt tokens, padding counted, nothing folded (macs.py), and parameters:
#             encoder   UNet  decoder   all              all folded, 2 tokens
#   d2_base     962     748     2142    3852   949.58M   3467
#   d3_base     962     484     2142    3587   667.15M
#   d3_small    962     473     2142    3577   569.45M
#   d3_tiny     962     452     2142    3556   410.49M
#   d3_fast     103     452      119     675   329.28M    618
#   d3_turbo     22     317       38     377   319.60M    326
PRESETS = {
    "d2_base": (DEPTH_UNET, SD_VAE),
    "d3_base": (bk_sdm(DEPTH_UNET, "base"), SD_VAE),
    "d3_small": (bk_sdm(DEPTH_UNET, "small"), SD_VAE),
    "d3_tiny": (bk_sdm(DEPTH_UNET, "tiny"), SD_VAE),
    "d2_light": (DEPTH_UNET, TAESD),
    "d3_light_base": (bk_sdm(DEPTH_UNET, "base"), TAESD),
    "d3_light_small": (bk_sdm(DEPTH_UNET, "small"), TAESD),
    "d3_fast": (bk_sdm(DEPTH_UNET, "tiny"), TAESD),
    "d3_turbo": (turbo(DEPTH_UNET), TAESD_TURBO),
    "d2_nano": (
        _nano_unet((40, 80, 128, 160), mid=True),
        _nano_autoencoder((0, 0, 1), (1, 0, 0)),
    ),
    "d3_nano": (
        _nano_unet((24, 32, 56, 64), mid=False),
        _nano_autoencoder((0, 0, 0), (0, 0, 0)),
    ),
}


def get(name: str) -> tuple[UNetConfig, AutoencoderKLConfig | TinyAutoencoderConfig]:
    """A preset's UNet and autoencoder shapes; ValueError names the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}: choose one of {sorted(PRESETS)}")
    return PRESETS[name]
