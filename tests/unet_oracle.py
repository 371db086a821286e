"""diffusers' models in NCHW torch, with random weights, beside ours: what parity tests share."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.tiny_vae import TinyDecoder, TinyEncoder
from d3epth_jax.models.unet import UNet

TOLERANCE = 2e-5  # max |difference| / std(reference) of a whole net; rounding noise is near 6e-6
QUICK = {"xla_backend_optimization_level": 0}  # these tests mostly compile


def relative_error(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / reference.std())


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().float().numpy().transpose(0, 2, 3, 1))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def perturb(module: torch.nn.Module) -> torch.nn.Module:
    """Adds noise to every bias and norm scale: at 0 and 1 a forgotten one would not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return module.eval()


def torch_unet(config: UNetConfig, seed: int = 0) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(seed)
    return perturb(diffusers.UNet2DConditionModel.from_config(config.to_dict()))


def torch_tiny(config: TinyAutoencoderConfig, seed: int = 0) -> diffusers.AutoencoderTiny:
    torch.manual_seed(seed)
    return perturb(diffusers.AutoencoderTiny.from_config(config.to_dict()))


def tensors_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in module.state_dict().items()}


def abstract_unet(config: UNetConfig) -> dict:
    def init(key):
        sample = jnp.zeros((1, 8, 8, config.in_channels))
        prompt = jnp.zeros((1, 2, config.cross_attention_dim)) if config.attending else None
        return UNet(config).init(key, sample, 999, prompt)["params"]

    return jax.eval_shape(init, jax.random.key(0))


def abstract_tiny(config: TinyAutoencoderConfig) -> dict:
    def init(key):
        image = jnp.zeros((1, 2 * config.downsampling, config.downsampling, config.in_channels))
        latent = jnp.zeros((1, 2, 1, config.latent_channels))
        return {
            "encoder": TinyEncoder(config).init(key, image)["params"],
            "decoder": TinyDecoder(config).init(key, latent)["params"],
        }

    return jax.eval_shape(init, jax.random.key(0))


def random_like(abstract: dict) -> dict:
    """Kernels of unit gain, norm scales near 1, biases near 0: no default hides a mistake."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return 0.2 * noise + np.float32(path[-1].key == "scale")

    return jax.tree.map_with_path(draw, abstract)


def run(f, *args):
    return jax.jit(f).lower(*args).compile(QUICK)(*args)


def run_unet(module, params, *inputs):
    return run(lambda params, *inputs: module.apply({"params": params}, *inputs), params, *inputs)


def run_torch_unet(net, sample, timestep, prompt):
    """Returns the output and diffusers' features under our names, all NHWC."""
    features, handles = {}, []

    def keep(name, module):
        def hook(_, __, output):
            features[name] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(hook))

    for i, block in enumerate(net.down_blocks):
        keep(f"down_blocks_{i}", block)
        for j, transformer in enumerate(getattr(block, "attentions", [])):
            keep(f"down_blocks_{i}.attentions_{j}.proj_out", transformer.proj_out)
    if net.mid_block is not None:
        keep("mid_block", net.mid_block)
    for i, block in enumerate(net.up_blocks):
        keep(f"up_blocks_{i}", block)
    if prompt is not None:
        prompt = torch.from_numpy(np.broadcast_to(prompt, (len(sample), *prompt.shape[1:])).copy())
    with torch.no_grad():
        output = net(nchw(sample), torch.as_tensor(timestep), prompt).sample
    for handle in handles:
        handle.remove()
    # A linear proj_out leaves [B, N, C]; its cells are those of our [B, h, w, C] in order.
    arrays = {k: v.numpy() if v.ndim == 3 else nhwc(v) for k, v in features.items()}
    return nhwc(output), arrays
