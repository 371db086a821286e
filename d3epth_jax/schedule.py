"""The diffusion noise schedule: z0 from a model's output, and diffusers' deterministic DDIM step.

Denoising Diffusion Implicit Models (Song et al., 2021), read from a `scheduler_config.json`.
The tables are NumPy float64 on the host; only the arithmetic on latents is JAX, in float32.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from d3epth_jax.typing import Latent

Timestep = int | np.integer | Int[Array, ""] | Int[Array, " B"]

_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("v_prediction", "epsilon", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
# Configurations that diffusers itself loads into its DDIM scheduler; LCM steps differently.
_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A DDIM schedule; field names and defaults are those of diffusers' `DDIMScheduler`.

    Raises ValueError, naming every bad field at once.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        problems = [
            f"{name} {getattr(self, name)!r} is not supported; choose one of {', '.join(choices)}"
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]
        if self.num_train_timesteps < 2:
            problems.append(
                f"num_train_timesteps must be at least 2, not {self.num_train_timesteps}"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            problems.append(
                f"betas must satisfy 0 < beta_start <= beta_end < 1, "
                f"not {self.beta_start} and {self.beta_end}"
            )
        if problems:
            raise ValueError("noise schedule: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule of a parsed `scheduler_config.json`; absent keys mean diffusers' defaults.

        Keys that do not change the schedule are ignored; ValueError for what would change it and is
        not supported (another sampler, explicit betas, dynamic thresholding).
        """
        problems = []
        name = config.get("_class_name", "DDIMScheduler")
        if name not in _CLASSES:
            problems.append(f"_class_name {name!r} is not one of {', '.join(_CLASSES)}")
        if config.get("trained_betas") is not None:
            problems.append("trained_betas is not supported; give beta_start and beta_end")
        if config.get("thresholding"):
            problems.append("thresholding is not supported; set it to false")
        if problems:
            raise ValueError("scheduler_config.json: " + "; ".join(problems))
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in fields})

    def to_dict(self) -> dict[str, Any]:
        """The `scheduler_config.json` that diffusers' `DDIMScheduler` reads back."""
        return {"_class_name": "DDIMScheduler", **dataclasses.asdict(self)}

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar [num_train_timesteps], float64; exactly 0 at the end if rescaled to zero SNR.

        Rescaling: Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed (2024).
        """
        root = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        betas = np.linspace(self.beta_start**root, self.beta_end**root, self.num_train_timesteps)
        abar = np.cumprod(1.0 - betas ** (1 / root))
        if self.rescale_betas_zero_snr:
            signal = np.sqrt(abar)
            first, last = signal[0], signal[-1]
            abar = ((signal - last) * (first / (first - last))) ** 2
        abar.flags.writeable = False
        return abar

    def timesteps(self, num_inference_steps: int) -> np.ndarray:
        """The falling timesteps of an n-step sampler, int64 [n]; ValueError for n out of range."""
        n, total = num_inference_steps, self.num_train_timesteps
        if not 1 <= n <= total:
            raise ValueError(f"num_inference_steps must be in 1..{total}, not {n}")
        if self.timestep_spacing == "trailing":
            # Rounding may leave arange an entry more, of timestep -1.
            steps = np.round(np.arange(total, 0, -total / n))[:n] - 1
        elif self.timestep_spacing == "leading":
            steps = np.arange(n)[::-1] * (total // n) + self.steps_offset
        else:
            steps = np.round(np.linspace(0, total - 1, n))[::-1]
        if steps[0] >= total:
            raise ValueError(
                f"{n} steps begin at timestep {steps[0]}, beyond the last, {total - 1}, since"
                f" steps_offset is {self.steps_offset}: take fewer"
            )
        return steps.astype(np.int64)

    def doubt(self, num_inference_steps: int) -> str:
        """What speaks against one step of this schedule, in words; "" where nothing does."""
        last = self.num_train_timesteps - 1
        if num_inference_steps != 1 or (start := self.timesteps(1)[0]) >= last / 2:
            return ""
        return (
            f"the one step is at timestep {start} of 0..{last}, where there is hardly any noise"
            f" (timestep_spacing {self.timestep_spacing!r}): such models are made for 'trailing'"
        )

    def z0(self, model_output: Latent, z_t: Latent, timestep: Timestep) -> Latent:
        """The clean latent that `model_output` stands for, float32, unclipped: what training uses.

        timestep: an integer, or a traced one, scalar or [B]. ValueError for an epsilon model where
        the signal-to-noise ratio is zero: there z_t says nothing about z0.
        """
        return self._denoise(model_output, z_t, timestep)[0]

    def step(
        self, model_output: Latent, z_t: Latent, timestep: Timestep, num_inference_steps: int
    ) -> Latent:
        """One step of diffusers' n-step DDIM sampler with eta = 0: z_t -> z_prev, float32."""
        clean, noise = self._denoise(model_output, z_t, timestep)
        if self.clip_sample:
            clean = jnp.clip(clean, -self.clip_sample_range, self.clip_sample_range)
        # Shifted by one stride: entry t is abar of the timestep before t, which may lie before 0.
        stride = self.num_train_timesteps // num_inference_steps
        abar = self.alphas_cumprod
        final = 1.0 if self.set_alpha_to_one else abar[0]
        abar_prev = np.concatenate([np.full(stride, final), abar])[: len(abar)]
        signal, sigma = _coefficients(abar_prev, timestep)
        return signal * clean + sigma * noise

    def _denoise(
        self, model_output: Latent, z_t: Latent, timestep: Timestep
    ) -> tuple[jax.Array, jax.Array]:
        """(clean latent, noise) of z_t = signal * clean + sigma * noise."""
        output, z_t = jnp.asarray(model_output, jnp.float32), jnp.asarray(z_t, jnp.float32)
        signal, sigma = _coefficients(self.alphas_cumprod, timestep)
        if self.prediction_type == "v_prediction":
            return signal * z_t - sigma * output, signal * output + sigma * z_t
        if self.prediction_type == "sample":
            return output, (z_t - signal * output) / sigma
        if _may_be_zero(self.alphas_cumprod, timestep):
            raise ValueError(
                f"an epsilon model has no z0 at timestep {timestep}, where the schedule's signal "
                "is zero (rescale_betas_zero_snr): use v_prediction or sample, or no rescaling"
            )
        return (z_t - sigma * output) / signal, output


def _is_static(timestep: Timestep) -> bool:
    return isinstance(timestep, int | np.integer)


def _may_be_zero(abar: np.ndarray, timestep: Timestep) -> bool:
    """Whether abar is zero at this timestep; a traced timestep may be any."""
    return bool(abar[timestep] == 0) if _is_static(timestep) else bool((abar == 0).any())


def _coefficients(abar: np.ndarray, timestep: Timestep) -> tuple[Any, Any]:
    """sqrt(abar) and sqrt(1 - abar) at the timestep: floats, or traced, [] or [B,1,1,1]."""
    tables = np.sqrt(abar), np.sqrt(1.0 - abar)
    if _is_static(timestep):
        if not 0 <= timestep < len(abar):
            raise ValueError(f"timestep {timestep} is outside the schedule's 0..{len(abar) - 1}")
        return float(tables[0][timestep]), float(tables[1][timestep])
    shape = (-1, 1, 1, 1) if jnp.ndim(timestep) else ()
    return tuple(jnp.asarray(t, jnp.float32)[timestep].reshape(shape) for t in tables)
