"""One definition of the model's meaning (METHOD 1): image -> latent -> UNet -> z0 -> depth.

Training stages, evaluation and the pipeline all call these functions. They are pure and jittable:
`model` is a static, hashable description, `params` a tree {unet, encoder, decoder[, prompt]}.
"""

import jax
import jax.numpy as jnp

from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.typing import Depth, Image, Latent, Params


def encode_image(model: DepthModel, params: Params, image: Image) -> Latent:
    """The scaled latent [B,h,w,C] of pictures [B,H,W,3] in [-1,1]."""
    latent = model.modules["encoder"].apply({"params": params["encoder"]}, image)
    return latent * model.autoencoder.scaling_factor


def predict_latent(
    model: DepthModel, params: Params, rgb_latent: Latent, depth_latent: Latent | None = None
) -> tuple[Latent, dict]:
    """The clean depth latent z0 [B,h,w,C] in one step, and the UNet's features by name: training.

    Without `depth_latent` it is zero (METHOD 1), which is what a UNet that only takes the RGB
    latent means by itself.
    """
    if depth_latent is None:
        depth_latent = jnp.zeros_like(rgb_latent)
    output, features = _unet(model, params, rgb_latent, depth_latent, model.timestep)
    return model.schedule.z0(output, depth_latent, model.timestep), features


def denoise(
    model: DepthModel,
    params: Params,
    rgb_latent: Latent,
    depth_latent: Latent,
    num_inference_steps: int,
) -> Latent:
    """The depth latent [B,h,w,C] after n DDIM steps from `depth_latent`, as diffusers': inference.

    For what this project trains one step gives z0 exactly, from any `depth_latent`. ValueError for
    several steps of a model that is folded for one.
    """
    if model.folding.of_one_step and num_inference_steps != 1:
        raise ValueError(f"{num_inference_steps} steps, but the model is folded for one alone")

    def step(latent, timestep):
        output, _ = _unet(model, params, rgb_latent, latent, timestep)
        return model.schedule.step(output, latent, timestep, num_inference_steps), None

    timesteps = model.schedule.timesteps(num_inference_steps)
    latent = depth_latent.astype(jnp.float32)
    if num_inference_steps == 1:
        return step(latent, int(timesteps[0]))[0]
    return jax.lax.scan(step, latent, jnp.asarray(timesteps))[0]


def _unet(model: DepthModel, params: Params, rgb_latent: Latent, depth_latent: Latent, timestep):
    sample = jnp.concatenate([rgb_latent, depth_latent], -1) if model.takes_depth else rgb_latent
    return model.modules["unet"].apply(
        {"params": params["unet"]}, sample, timestep, params.get("prompt")
    )


def decode_depth(model: DepthModel, params: Params, latent: Latent) -> Depth:
    """Depth [B,H,W,1] in [-1,1], float32: the decoder's channel mean, clipped."""
    image = model.modules["decoder"].apply(
        {"params": params["decoder"]}, latent / model.autoencoder.scaling_factor
    )
    return jnp.clip(jnp.mean(image.astype(jnp.float32), -1, keepdims=True), -1, 1)


def predict_depth(
    model: DepthModel,
    params: Params,
    rgb_latent: Latent,
    depth_latent: Latent,
    num_inference_steps: int = 1,
) -> tuple[Depth, Latent]:
    """Latents to (depth [B,H,W,1] in [0,1], the depth latent it was decoded from)."""
    latent = denoise(model, params, rgb_latent, depth_latent, num_inference_steps)
    return (decode_depth(model, params, latent) + 1) / 2, latent


def to_float(image: jax.Array) -> Image:
    """Pictures [B,H,W,3] uint8 to float32 in [-1,1]."""
    return image.astype(jnp.float32) / 127.5 - 1
