"""Model shapes as frozen dataclasses, read from and written to the JSON that diffusers publishes.

A published JSON has three kinds of keys: those that are fields here; those that would change the
computation in a way these models do not have, which must keep the one supported value; and those
that do not touch the computation, which are ignored. Anything else is refused by name.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self

_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_CROSS_MID, _MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

# Key -> the values that mean "what is computed here".
_UNET_FIXED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}
# The last seven are what diffusers' EMAModel leaves in the config of weights it saves.
_UNET_IGNORED = {
    "addition_embed_type_num_heads",
    "sample_size",
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power"),
    *("update_after_step", "use_ema_warmup"),
}

_TINY_FIXED = {
    "act_fn": ("relu",),
    "shift_factor": (0,),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
_TINY_IGNORED = {"block_out_channels", "force_upcast"}

_KL_FIXED = {
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0),
    "up_block_types": ("UpDecoderBlock2D",),
}
_KL_IGNORED = {"force_upcast", "sample_size"}

_TEXT_FIXED = {
    "model_type": ("clip_text_model", "clip"),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet2DConditionModel (Stable Diffusion 1.x, 2.x, BK-SDM, or plain blocks).

    Field names and defaults are diffusers'. `attention_head_dim` is the NUMBER of heads, one for
    all levels or one each (a misnomer that diffusers keeps for its published files).
    `upcast_attention` is kept for diffusers' sake: softmax is always float32 here.
    Raises ValueError, listing every inconsistency.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN)
    mid_block_type: str | None = _CROSS_MID
    up_block_types: tuple[str, ...] = (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self):
        _lists_to_tuples(self)
        _raise_if("UNetConfig is inconsistent", _unet_problems(self))

    @classmethod
    def from_dict(cls, json_dict: Mapping[str, Any]) -> Self:
        """Reads a published config.json; absent keys mean diffusers' defaults.

        Raises ValueError listing all settings that would change the computation and that this
        UNet does not have, and all unknown keys whose value is neither None nor False.
        """
        return _from_dict(cls, json_dict, "UNet2DConditionModel", _UNET_FIXED, _UNET_IGNORED)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON that diffusers' UNet2DConditionModel.from_config accepts."""
        return _to_dict(self, "UNet2DConditionModel")

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each level."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)

    @property
    def attending(self) -> list[int]:
        """The level of each block that attends to the prompt."""
        blocks = [*enumerate(self.down_block_types), *enumerate(self.up_block_types[::-1])]
        blocks.append((len(self.block_out_channels) - 1, self.mid_block_type))
        return [level for level, kind in blocks if kind in (_CROSS_DOWN, _CROSS_MID, _CROSS_UP)]


@dataclasses.dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Shape of an AutoencoderTiny; the defaults are TAESD's (github.com/madebyollin/taesd).

    Entry i of `num_*_blocks` counts the residual blocks of stage i and may be 0. Widths are uniform
    within the encoder and within the decoder. `latent_magnitude` and `latent_shift` only matter to
    diffusers' packing of latents into bytes and are carried along.
    Raises ValueError, listing every inconsistency.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0

    def __post_init__(self):
        _lists_to_tuples(self)
        _raise_if("TinyAutoencoderConfig is inconsistent", _tiny_problems(self))

    @classmethod
    def from_dict(cls, json_dict: Mapping[str, Any]) -> Self:
        """Reads a published config.json; absent keys mean diffusers' defaults.

        Raises ValueError listing all unsupported settings and all unknown keys, as UNetConfig.
        """
        return _from_dict(cls, json_dict, "AutoencoderTiny", _TINY_FIXED, _TINY_IGNORED)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON that diffusers' AutoencoderTiny.from_config accepts."""
        return _to_dict(self, "AutoencoderTiny")

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.num_encoder_blocks) - 1)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Shape of an AutoencoderKL, Stable Diffusion's autoencoder; the defaults are diffusers'.

    The mid blocks attend if `mid_block_add_attention`. Raises ValueError, listing every
    inconsistency.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        _lists_to_tuples(self)
        _raise_if("AutoencoderKLConfig is inconsistent", _kl_problems(self))

    @classmethod
    def from_dict(cls, json_dict: Mapping[str, Any]) -> Self:
        """Reads a published config.json; absent keys mean diffusers' defaults.

        Raises ValueError listing all unsupported settings and all unknown keys, as UNetConfig.
        """
        config = _from_dict(cls, json_dict, "AutoencoderKL", _KL_FIXED, _KL_IGNORED)
        levels = len(config.block_out_channels)
        _raise_if(
            "cannot build this AutoencoderKL",
            (
                f"{key} has {len(json_dict[key])} entries for {levels} block_out_channels"
                for key in ("down_block_types", "up_block_types")
                if key in json_dict and len(json_dict[key]) != levels
            ),
        )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON that diffusers' AutoencoderKL.from_config accepts."""
        levels = len(self.block_out_channels)
        return _to_dict(self, "AutoencoderKL") | {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of a CLIPTextModel; field names and defaults are transformers'."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        problems = []
        if self.hidden_act not in ("quick_gelu", "gelu"):
            problems.append(f"hidden_act = {self.hidden_act!r}; supported: quick_gelu, gelu")
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size = {self.hidden_size} does not divide into"
                f" {self.num_attention_heads} heads"
            )
        _raise_if("TextEncoderConfig is inconsistent", problems)

    @classmethod
    def from_dict(cls, json_dict: Mapping[str, Any]) -> Self:
        """Reads a published text_encoder/config.json; absent keys mean transformers' defaults.

        Keys that are no shape (token ids, dropout, versions) are left to whoever wrote them.
        Raises ValueError for another kind of model.
        """
        telling = {field.name for field in dataclasses.fields(cls)} | _TEXT_FIXED.keys()
        known = {key: value for key, value in json_dict.items() if key in telling}
        return _from_dict(cls, known, "CLIPTextModel", _TEXT_FIXED, set())


def _unet_problems(config: UNetConfig) -> Iterable[str]:
    levels = len(config.block_out_channels)
    for name in ("down_block_types", "up_block_types", "heads"):
        value = getattr(config, name)
        if len(value) != levels:
            label = "attention_head_dim" if name == "heads" else name
            yield f"{label} has {len(value)} entries for {levels} block_out_channels"
    for name, known in (
        ("down_block_types", (_CROSS_DOWN, _DOWN)),
        ("up_block_types", (_CROSS_UP, _UP)),
    ):
        for i, kind in enumerate(getattr(config, name)):
            if kind not in known:
                yield f"{name}[{i}] = {kind!r}; supported: {', '.join(known)}"
    if config.mid_block_type not in (_CROSS_MID, _MID, None):
        yield f"mid_block_type = {config.mid_block_type!r}; supported: {_CROSS_MID}, {_MID}, None"
    for name in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            yield f"{name} = {value!r}; supported: one positive integer for all levels"
            return
    if levels == 0:
        yield "block_out_channels is empty"
    elif config.block_out_channels[0] % 2:
        yield f"block_out_channels[0] = {config.block_out_channels[0]} is odd"
    for i, (channels, heads) in enumerate(zip(config.block_out_channels, config.heads)):  # noqa: B905
        if channels % config.norm_num_groups:
            groups = config.norm_num_groups
            yield f"block_out_channels[{i}] = {channels} does not divide into {groups} groups"
        if config.attending and channels % heads:
            yield f"block_out_channels[{i}] = {channels} does not divide into {heads} heads"


def _kl_problems(config: AutoencoderKLConfig) -> Iterable[str]:
    if not config.block_out_channels:
        yield "block_out_channels is empty"
    for i, channels in enumerate(config.block_out_channels):
        if channels % config.norm_num_groups:
            groups = config.norm_num_groups
            yield f"block_out_channels[{i}] = {channels} does not divide into {groups} groups"


def _tiny_problems(config: TinyAutoencoderConfig) -> Iterable[str]:
    for side in ("encoder", "decoder"):
        widths = getattr(config, f"{side}_block_out_channels")
        blocks = getattr(config, f"num_{side}_blocks")
        if len(widths) != len(blocks) or not widths:
            yield (
                f"{side}_block_out_channels has {len(widths)} entries, num_{side}_blocks "
                f"{len(blocks)}; they must be the same number, at least 1"
            )
        if len(set(widths)) > 1:
            yield f"{side}_block_out_channels = {widths}; all widths must be equal"
        if any(n < 0 for n in blocks):
            yield f"num_{side}_blocks = {blocks} has a negative entry"
    if len(config.num_encoder_blocks) != len(config.num_decoder_blocks):
        yield (
            f"the encoder has {len(config.num_encoder_blocks)} stages and the decoder "
            f"{len(config.num_decoder_blocks)}: the image would change its size"
        )


def _from_dict(cls, json_dict, class_name, fixed, ignored):
    given = json_dict.get("_class_name", class_name)
    if given != class_name:
        raise ValueError(f"this is the config of a {given!r}; expected {class_name!r}")
    fields = {field.name for field in dataclasses.fields(cls)}
    problems = []
    for key, value in json_dict.items():
        if key in fixed:
            if not _is_one_of(value, fixed[key]):
                wanted = " or ".join(repr(v) for v in fixed[key])
                problems.append(f"{key} = {value!r} is not supported; only {wanted} is")
        elif key not in fields and key not in ignored and not key.startswith("_"):
            if value is None or value is False:
                continue
            known = sorted(fields | set(fixed) | ignored)
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            problems.append(f"{key} = {value!r} is unknown; the nearest known name is {near!r}")
    off = {field.name for field in dataclasses.fields(cls) if field.default is False}
    given_fields = {
        key: value
        for key, value in json_dict.items()
        if key in fields and not (value is None and key in off)  # diffusers' converter's no
    }
    problems += [
        f"{field.name} is null"
        for field in dataclasses.fields(cls)
        if given_fields.get(field.name, 0) is None and "None" not in str(field.type)
    ]
    try:
        config = cls(**given_fields)
    except ValueError as error:
        problems.append(str(error))
    except (TypeError, ArithmeticError) as error:
        problems.append(f"a value of the wrong type or size: {error}")
    _raise_if(f"cannot build this {class_name}", problems)
    return config


def _to_dict(config, class_name: str) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    return {"_class_name": class_name, **lists}


def _is_one_of(value: Any, supported: tuple) -> bool:
    """True for a supported value, or a list (one entry per level) of nothing else."""
    if isinstance(value, list | tuple):
        return all(_is_one_of(v, supported) for v in value)
    return any(value == s and isinstance(value, bool) == isinstance(s, bool) for s in supported)


def _lists_to_tuples(config) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, tuple(value))


def _raise_if(headline: str, problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        raise ValueError("\n  ".join([f"{headline}:", *problems]))
