"""The static description of a depth model: three networks and what their numbers mean."""

import dataclasses
import functools
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax.models.attention import OF_A_MODEL
from d3epth_jax.models.config import AutoencoderKLConfig, TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.folding import NOT_FOLDED, Folding
from d3epth_jax.models.tiny_vae import TinyDecoder, TinyEncoder
from d3epth_jax.models.unet import UNet, needs_prompt
from d3epth_jax.models.vae import KLDecoder, KLEncoder
from d3epth_jax.schedule import NoiseSchedule
from d3epth_jax.typing import Params

COMPUTE_TYPES = ("float32", "bfloat16")  # in float16 activations of Stable Diffusion overflow
AutoencoderConfig = AutoencoderKLConfig | TinyAutoencoderConfig


@dataclasses.dataclass(frozen=True)
class DepthModel:
    """What the parameters of a depth model mean; static, hashable, saved as the directory's JSON.

    Attributes:
      unet: its input is the RGB latent, alone or followed by as many channels of depth latent.
      autoencoder: encoder and decoder between pictures and latents.
      schedule: turns the UNet's output into the clean latent z0.
      prediction_type: what grows in the output: depth | disparity | sqrt_disparity (METHOD 2).
      processing_resolution: the longest side pictures are resized to by default; 0 keeps theirs,
        None: the user must say.
      processing_aspect: width over height that pictures are stretched to, unless they keep their
        size: a network of few pixels knows one shape best. None: they keep theirs.
      timestep: where a single step starts (E2E-FT: the last).
      denoising_steps: of inference by default; None: the user must say.
      starts_at_zero: inference starts from zero latents whatever the number of steps.
      prompt_padding: of the empty prompt, "do_not_pad" or "max_length".
      base: what the weights come from, OWNER/NAME@COMMIT or a folder's name; "" for nothing.
      dtype: compute type of the networks, one of COMPUTE_TYPES; parameters keep their own.
      remat: recompute activations in the backward pass instead of keeping them.
      attention: how it is computed, "auto" or "chunked" (`models.attention`).
      folding: what the parameters have folded into them.
    """

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    schedule: NoiseSchedule
    prediction_type: str = "depth"
    processing_resolution: int | None = 0
    processing_aspect: float | None = None
    timestep: int = 999
    denoising_steps: int | None = 1
    starts_at_zero: bool = False
    prompt_padding: str = "do_not_pad"
    base: str = ""
    dtype: str = "float32"
    remat: bool = False
    attention: str = "auto"
    folding: Folding = NOT_FOLDED

    def __post_init__(self):
        if self.dtype not in COMPUTE_TYPES:
            raise ValueError(f"unknown compute type {self.dtype!r}: choose one of {COMPUTE_TYPES}")
        if self.attention not in OF_A_MODEL:
            raise ValueError(f"unknown attention {self.attention!r}: choose one of {OF_A_MODEL}")
        latent = self.autoencoder.latent_channels
        if self.unet.in_channels not in (latent, 2 * latent) or self.unet.out_channels != latent:
            raise ValueError(
                f"the UNet maps {self.unet.in_channels} to {self.unet.out_channels} channels, but a"
                f" latent has {latent}: it must take {latent} (RGB latent) or {2 * latent} (RGB and"
                f" depth latent) and give {latent}"
            )

    @property
    def from_zeros(self) -> bool:
        """Whether the depth latent that inference starts from is zero: told so, or of one step."""
        return self.starts_at_zero or self.denoising_steps == 1

    @property
    def takes_depth(self) -> bool:
        """Whether the UNet sees a depth latent, beside the picture's."""
        return self.unet.in_channels == 2 * self.autoencoder.latent_channels

    def one_step_from_zero(self, steps: int) -> bool:
        """Whether so many are the one step of training, which has features and folds whole."""
        return steps == 1 and self.from_zeros

    @property
    def downsample(self) -> int:
        """Pixels per latent cell, along one side."""
        return self.autoencoder.downsampling

    @property
    def modules(self) -> dict:
        """The Linen modules, under the names of their parameter trees."""
        options = {
            "dtype": jnp.dtype(self.dtype),
            "remat": self.remat,
            "attention": self.attention,
            "folding": self.folding,
        }
        return {"unet": UNet(self.unet, **options), **_autoencoder(self.autoencoder, **options)}

    @property
    def needs_prompt(self) -> bool:
        """Whether the UNet reads the embedding of the prompt."""
        return needs_prompt(self.unet, self.folding)


def _autoencoder(config: AutoencoderConfig, *, attention: str = "auto", **options) -> dict:
    if isinstance(config, AutoencoderKLConfig):
        encoder, decoder = KLEncoder, KLDecoder
        options["attention"] = attention
    else:
        encoder, decoder = TinyEncoder, TinyDecoder  # without any
    return {"encoder": encoder(config, **options), "decoder": decoder(config, **options)}


def abstract_params(model: DepthModel) -> Params:
    """Shapes and types of the parameters {unet, encoder, decoder[, prompt]}, without arrays."""
    sample = _array(1, 8, 8, model.unet.in_channels)
    prompt = _array(1, 2, model.unet.cross_attention_dim)
    params = {
        "unet": _abstract(UNet(model.unet, folding=model.folding), sample, _array(), prompt),
        **abstract_autoencoder(model.autoencoder, folding=model.folding),
    }
    if model.needs_prompt:
        params["prompt"] = prompt
    return params


def abstract_autoencoder(config: AutoencoderConfig, folding: Folding = NOT_FOLDED) -> Params:
    """The part {encoder, decoder} of `abstract_params`."""
    modules, side = _autoencoder(config, folding=folding), 8 * config.downsampling
    return {
        "encoder": _abstract(modules["encoder"], _array(1, side, side, 3)),
        "decoder": _abstract(modules["decoder"], _array(1, 8, 8, config.latent_channels)),
    }


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _abstract(module, *inputs) -> Params:
    return jax.tree.map(lambda x: x, _traced(module, *inputs))  # a copy, for the caller to change


@functools.lru_cache(maxsize=64)  # tracing the UNet of Stable Diffusion takes seconds
def _traced(module, *inputs) -> Params:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def init_params(model: DepthModel, seed: int) -> Params:
    """Random parameters as NumPy arrays, float32; every array depends on the seed and its path.

    Kernels are normal with variance 1/fan_in (LeCun; 2/fan_in before a ReLU, He), but zero where a
    residual branch ends, so that every block starts as the identity. The prompt is two zero tokens:
    nothing depends on its value, and a text encoder can reproduce it. Drawn by NumPy, since XLA
    would compile a random number generator per shape, half a minute for a small UNet.
    """

    def initial(path, abstract):
        names = [entry.key for entry in path]
        if names[-1] == "kernel" and not set(names) & _BRANCH_ENDS:
            rng = np.random.default_rng([seed, zlib.crc32("/".join(names).encode())])
            variance = (2 if names[-2] in _BEFORE_RELU else 1) / np.prod(abstract.shape[:-1])
            return rng.standard_normal(abstract.shape, np.float32) * np.float32(variance**0.5)
        value = 1 if names[-1] == "scale" else 0
        return np.full(abstract.shape, value, np.float32)

    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_params(model))
    with ThreadPoolExecutor() as pool:  # NumPy draws outside of Python's lock
        params = structure.unflatten(pool.map(lambda leaf: initial(*leaf), leaves))
    # What the depth latent, always zero here, would do in diffusers, where it is random: nothing.
    latent = model.autoencoder.latent_channels
    params["unet"]["conv_in"]["kernel"][:, :, latent:] = 0
    if isinstance(model.autoencoder, TinyAutoencoderConfig):
        # Inside it pictures are in [0,1]: let mid-grey be 0 to an untrained encoder, and the centre
        # of the range what an untrained decoder gives, not an end, where depth is clipped.
        first = params["encoder"]["layers_0"]
        first["bias"] -= 0.5 * first["kernel"].sum((0, 1, 2))
        last = max(params["decoder"], key=lambda name: int(name.removeprefix("layers_")))
        params["decoder"][last]["bias"] += 0.5
    return params


_BEFORE_RELU = {"conv_0", "conv_2"}  # of TinyBlock
_BRANCH_ENDS = {"conv2", "proj_out", "conv_4"}  # of ResnetBlock, SpatialTransformer and TinyBlock


def count_params(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
