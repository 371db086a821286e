"""Whole pipelines written by diffusers and transformers in the public layout, and run by them."""

import pathlib

import diffusers
import numpy as np
import safetensors.numpy
import torch
import transformers
from PIL import Image
from skimage import data as photographs

from tests.unet_oracle import nchw, perturb

VOCABULARY = {"!": 0, "a": 1, "a</w>": 2, "aa</w>": 3, "<|startoftext|>": 4, "<|endoftext|>": 5}
WIDTHS = (8, 16)


def photos() -> dict[str, np.ndarray]:
    """Real photographs of odd sizes: larger than 64 pixels, portrait, and smaller."""
    cat, coffee, astronaut = photographs.chelsea(), photographs.coffee(), photographs.astronaut()
    return {
        "landscape": cat[:299:2, :449:2],  # 150 x 225
        "portrait": astronaut[:511:4, 100:371:4],  # 128 x 68
        "small": coffee[100:340:8, 100:500:8][:29, :43],
    }


def tokenizer(*, sd2: bool) -> transformers.CLIPTokenizer:
    pad = "!" if sd2 else "<|endoftext|>"
    return transformers.CLIPTokenizer(
        VOCABULARY, [("a", "a</w>")], pad_token=pad, model_max_length=77
    )


def components(*, sd2: bool, in_channels: int = 8, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=WIDTHS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(2, 4) if sd2 else 4,
        cross_attention_dim=16,
        use_linear_projection=sd2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act="gelu" if sd2 else "quick_gelu",
            bos_token_id=VOCABULARY["<|startoftext|>"],
            eos_token_id=VOCABULARY["<|endoftext|>"],
        )
    )
    for module in (unet, vae, text):
        perturb(module)
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": text,
        "tokenizer": tokenizer(sd2=sd2),
    }


def ddim(**settings) -> diffusers.DDIMScheduler:
    """Stable Diffusion 2's noise schedule, with other settings where they are given."""
    published = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "steps_offset": 1,
    }
    return diffusers.DDIMScheduler(**published | settings)


def marigold(
    directory: pathlib.Path, *, sd2: bool = True, steps: int = 1, **schedule
) -> diffusers.MarigoldDepthPipeline:
    """A depth pipeline with random weights whose depth spans the range; saved to `directory`."""
    schedule = {"timestep_spacing": "trailing", "set_alpha_to_one": True} | schedule
    pipe = diffusers.MarigoldDepthPipeline(
        **components(sd2=sd2),
        scheduler=ddim(**schedule),
        prediction_type="depth",
        default_denoising_steps=steps,
        default_processing_resolution=64,
    )
    pipe.set_progress_bar_config(disable=True)
    calibrate(pipe, steps)
    pipe.save_pretrained(directory)
    return pipe


def stable_diffusion(directory: pathlib.Path) -> None:
    """A plain Stable Diffusion, as people download it: 4 input channels, no depth."""
    pipe = diffusers.StableDiffusionPipeline(
        **components(sd2=True, in_channels=4),
        scheduler=ddim(set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        for parameter in pipe.vae.decoder.conv_out.parameters():
            parameter *= 0.05  # so that depth is not clipped, where it has no gradient
    pipe.save_pretrained(directory)


def calibrate(pipe: diffusers.MarigoldDepthPipeline, steps: int) -> None:
    """Scales the decoder's last convolution so that depth spreads over most of [0,1]."""
    head = pipe.vae.decoder.conv_out
    with torch.no_grad():
        for parameter in (head.weight, head.bias):
            parameter *= 0.01
        depth = np.concatenate(
            [run(pipe, photo, steps=steps).ravel() for photo in photos().values()]
        )
        low, high = np.quantile(depth, (0.01, 0.99))
        gain = 0.9 / (high - low)
        for parameter in (head.weight, head.bias):
            parameter *= gain
        # In [-1,1]: the centre of what is left goes to 0.
        head.bias -= gain * (low + high - 1)


def latents_for(photo: np.ndarray, resolution: int = 64, members: int = 1) -> np.ndarray:
    """Initial latents NHWC for one photograph."""
    height, width = (side * resolution // max(photo.shape[:2]) for side in photo.shape[:2])
    shape = (members, -(-height // 8), -(-width // 8), 4)
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def run(pipe, photo: np.ndarray, *, steps: int, latents=None, **options) -> np.ndarray:
    """diffusers' prediction [N,H,W,1], by default with the latents of `latents_for`."""
    latents = latents_for(photo) if latents is None else latents
    with torch.no_grad():
        out = pipe(
            Image.fromarray(photo), latents=nchw(latents), num_inference_steps=steps, **options
        )
    return out.prediction


def tensors_below(directory) -> dict[str, np.ndarray]:
    # transformers 5 leaves out the prefix `text_model.` of the published files, and reads both.
    return {
        f"{path.parent.name}/{key.removeprefix('text_model.')}": tensor
        for path in sorted(directory.glob("*/*.safetensors"))
        for key, tensor in safetensors.numpy.load_file(path).items()
    }


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(ours[key].view(np.uint8), tensor.view(np.uint8), err_msg=key)
