"""How fast diffusers predicts with the same weights: `-m d3epth_jax.bench.compare_diffusers`.

The one module that imports torch and diffusers, in a process of its own (worker.py); nothing
of the package imports it. Its requests are those of predict.py.
"""

import gc
import json
import pathlib
import time

import diffusers
import numpy as np
import safetensors.torch
import torch
from PIL import Image

from d3epth_jax import memory
from d3epth_jax.bench.worker import cores, serve

PROMPT = "empty_prompt.safetensors"  # weights.hub.PROMPT, without JAX in this process
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ("eager", "channels_last", *(["compiled"] if DEVICE == "cuda" else []))


class Theirs:
    """diffusers' MarigoldDepthPipeline, measured; the methods are the requests."""

    def open(self, directory: str, size, batch: int, dtype: str, steps: int) -> dict:
        """Reads a model directory; as many threads as there are cores to use."""
        torch.set_num_threads(cores())
        # As XLA: it tries kernels out too, and multiplies float32 in TF32.
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
        self.size, self.batch, self.steps = tuple(size), batch, steps
        self.type = getattr(torch, dtype)
        self.pipe = read(pathlib.Path(directory), self.type).to(DEVICE)
        self.pipe.set_progress_bar_config(disable=True)
        return {
            "variants": VARIANTS,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        }

    def prepare(self, variant: str) -> dict:
        """eager as read; channels_last in memory; compiled is that and torch.compile."""
        parts = (self.pipe.unet, self.pipe.vae)
        if variant != "eager":
            for part in parts:
                part.to(memory_format=torch.channels_last)  # copies: nothing holds what they are of
        if variant == "compiled":
            self.pipe.unet.compile()
            for part in (self.pipe.vae.encoder, self.pipe.vae.decoder):
                part.compile()
        gc.collect()
        memory.give_back()
        memory.forget_peak()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {}

    @torch.inference_mode()
    def run(self, picture: str, save: str = "") -> dict:
        """The whole pipeline, from the uint8 picture of a file.npy, from zero latents."""
        pictures = [Image.fromarray(np.load(picture))] * self.batch
        cells = [-(-side // self.pipe.vae_scale_factor) for side in self.size]
        channels = self.pipe.vae.config.latent_channels
        latents = torch.zeros((self.batch, channels, *cells), dtype=self.type, device=DEVICE)
        began = time.perf_counter()
        out = self.pipe(
            pictures,
            num_inference_steps=self.steps,
            processing_resolution=0,
            batch_size=self.batch,
            latents=latents,
        )
        seconds = time.perf_counter() - began  # the result is in NumPy: the device has finished
        if save:
            np.save(save, out.prediction)
        return {"seconds": seconds}

    @torch.inference_mode()
    def part(self, part: str) -> dict:
        """One network, its inputs on the device; the UNet as often as there are steps."""
        vae, factor = self.pipe.vae, self.pipe.vae_scale_factor
        cells = [-(-side // factor) for side in self.size]
        channels = self.pipe.vae.config.latent_channels

        def noise(channels, size):
            shape = (self.batch, channels, *size)
            return torch.randn(shape, dtype=self.type, device=DEVICE)

        if part == "encoder":
            image = noise(3, [factor * cell for cell in cells])
            function, arguments = vae.encode, (image,)
        elif part == "decoder":
            function, arguments = vae.decode, (noise(channels, cells),)
        else:
            prompt = self.pipe.empty_text_embedding.to(DEVICE, self.type).repeat(self.batch, 1, 1)
            function, arguments = self._denoise, (*(noise(channels, cells) for _ in "ab"), prompt)
        wait()
        began = time.perf_counter()
        function(*arguments)
        wait()
        return {"seconds": time.perf_counter() - began}

    def _denoise(self, rgb, latent, prompt):
        """As the pipeline does it."""
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(self.steps, device=DEVICE)
        for timestep in scheduler.timesteps:
            sample = torch.cat([rgb, latent], 1)
            output = self.pipe.unet(sample, timestep, prompt, return_dict=False)[0]
            latent = scheduler.step(output, timestep, latent).prev_sample
        return latent

    def memory(self) -> dict:
        """The most memory there has been in use since `prepare`."""
        if DEVICE == "cuda":
            return {"bytes": torch.cuda.max_memory_allocated(), "kind": "the device's allocator"}
        return {"bytes": memory.peak(), "kind": "resident set of the process"}


def read(directory: pathlib.Path, dtype: torch.dtype) -> diffusers.MarigoldDepthPipeline:
    """A model directory, with its own text encoder or the embedding that stands for it.

    Not mapped from the disk: of what is copied afterwards a mapped original stays in memory.
    """
    index = json.loads((directory / "model_index.json").read_text())
    if (directory / "text_encoder").is_dir():
        pipe = diffusers.MarigoldDepthPipeline.from_pretrained(
            directory, torch_dtype=dtype, disable_mmap=True
        )
        if index.get("prompt_padding") == "max_length":  # it would take two tokens
            ids = pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids
            with torch.inference_mode():
                pipe.empty_text_embedding = pipe.text_encoder(ids)[0]
        return pipe
    vae = getattr(diffusers, index["vae"][1])
    networks = {
        "unet": (diffusers.UNet2DConditionModel, "unet"),
        "vae": (vae, "vae"),
    }
    pipe = diffusers.MarigoldDepthPipeline(
        **{
            name: kind.from_pretrained(directory / folder, torch_dtype=dtype, disable_mmap=True)
            for name, (kind, folder) in networks.items()
        },
        scheduler=diffusers.DDIMScheduler.from_pretrained(directory / "scheduler"),
        text_encoder=None,
        tokenizer=None,
        prediction_type=index["prediction_type"],
        default_denoising_steps=index["default_denoising_steps"],
        default_processing_resolution=index["default_processing_resolution"],
    )
    if (directory / PROMPT).is_file():
        pipe.empty_text_embedding = safetensors.torch.load_file(directory / PROMPT)["prompt"][None]
    else:  # no block attends to it
        width = pipe.unet.config.cross_attention_dim
        pipe.empty_text_embedding = torch.zeros((1, 2, width), dtype=dtype)
    return pipe


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    theirs = Theirs()
    names = ("open", "prepare", "run", "part", "memory")
    serve({name: getattr(theirs, name) for name in names})
