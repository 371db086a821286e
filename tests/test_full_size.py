"""Full-size networks against diffusers, and the cost of loading them: `pytest -m full -n 0 -s`.

Random weights in the published shapes (../shared/hf_configs), written by diffusers itself. Needs
about 14 GB of memory, 10 GB of disk and half an hour on 2 cores. Every test prints its figures.
"""

import gc
import json
import subprocess
import sys
import textwrap

import diffusers
import jax
import numpy as np
import pytest
import torch

from d3epth_jax.bench import predict as bench
from d3epth_jax.bench.worker import random_picture
from d3epth_jax.models.config import AutoencoderKLConfig, UNetConfig
from d3epth_jax.models.depth_model import abstract_autoencoder
from d3epth_jax.models.unet import UNet
from d3epth_jax.models.vae import KLDecoder, KLEncoder
from d3epth_jax.pipeline import DepthPipeline
from d3epth_jax.weights import convert, files, hub
from tests import unet_oracle as oracle

pytestmark = pytest.mark.full

LIMIT = 5e-5  # max |difference| / std(reference), float32
SIDE = 384
UNETS = {  # folder below hf_configs -> millions of parameters with 8 input channels, if METHOD 6
    "sd21/unet": 865.92,
    "bk_sdm/sd21/bk_base": 583.49,
    "bk_sdm/sd21/bk_small": 485.80,
    "bk_sdm/sd21/bk_tiny": 326.84,
    "sd15/unet": None,
}


def published(shared, name: str) -> dict:
    return json.loads((shared / "hf_configs" / name / "config.json").read_text())


@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_diffusers(name, shared, tmp_path):
    config = UNetConfig.from_dict(published(shared, name) | {"in_channels": 8})
    net = oracle.torch_unet(config)
    sample = oracle.normal(0, 1, SIDE // 8, SIDE // 8, 8)
    prompt = oracle.normal(1, 1, 2, config.cross_attention_dim)
    with torch.no_grad():
        reference = oracle.nhwc(
            net(oracle.nchw(sample), torch.tensor(999), torch.from_numpy(prompt)).sample
        )
    net.save_pretrained(tmp_path)
    del net
    gc.collect()
    tensors = files.read_folder(tmp_path, hub.STEM)
    params = jax.device_put(convert.from_torch(tensors, oracle.abstract_unet(config)))
    count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    ours, _ = jax.jit(UNet(config).apply)({"params": params}, sample, 999, prompt)
    error = oracle.relative_error(ours, reference)
    print(f"\n{name}: {count:.2f}M parameters, max |difference| / std {error:.1e}")
    assert error < LIMIT
    assert UNETS[name] is None or round(count, 2) == UNETS[name]


def test_autoencoder_equals_diffusers(shared, tmp_path):
    config = AutoencoderKLConfig.from_dict(published(shared, "sd21/vae"))
    torch.manual_seed(0)
    net = oracle.perturb(diffusers.AutoencoderKL.from_config(config.to_dict()))
    image = np.tanh(oracle.normal(0, 1, SIDE, SIDE, 3))
    with torch.no_grad():
        latent = net.encode(oracle.nchw(image)).latent_dist.mode()
        decoded = oracle.nhwc(net.decode(latent).sample)
    net.save_pretrained(tmp_path)
    tensors = files.read_folder(tmp_path, hub.STEM)
    params = convert.from_torch(tensors, abstract_autoencoder(config))
    count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    ours = jax.jit(KLEncoder(config).apply)({"params": params["encoder"]}, image)
    again = jax.jit(KLDecoder(config).apply)({"params": params["decoder"]}, oracle.nhwc(latent))
    errors = [
        oracle.relative_error(ours, oracle.nhwc(latent)),
        oracle.relative_error(again, decoded),
    ]
    print(
        f"\nVAE: {count:.2f}M parameters, encoder {errors[0]:.1e}, decoder {errors[1]:.1e} of std"
    )
    assert max(errors) < LIMIT
    assert round(count, 2) == 83.65


OURS = """
    import jax
    from d3epth_jax import DepthPipeline
    jax.block_until_ready(jax.numpy.zeros(3))
    def load():
        pipe = DepthPipeline.from_pretrained(directory)
        jax.block_until_ready(pipe.params)
        return pipe
"""
THEIRS = """
    import diffusers, torch
    def load():
        parts = [diffusers.UNet2DConditionModel.from_pretrained(directory, subfolder="unet"),
                 diffusers.AutoencoderKL.from_pretrained(directory, subfolder="vae")]
        for part in parts:  # mapped files are read when they are used
            for parameter in part.parameters():
                parameter.abs().max()
        return parts
"""
MEASURE = """
    import threading, time, sys
    directory = sys.argv[1]
    def anonymous():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    {load}
    before = peak = anonymous()
    done = threading.Event()
    def watch():
        global peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    kept = load()
    seconds = time.perf_counter() - began
    done.set(); watcher.join()
    print(seconds, max(peak, anonymous()) - before)
"""


def test_loading_takes_little_memory_and_time(shared, tmp_path):
    """RssAnon at most 1.3 times the files' bytes; at most 1.5 times diffusers' seconds."""
    unet = UNetConfig.from_dict(published(shared, "sd21/unet") | {"in_channels": 8})
    vae = AutoencoderKLConfig.from_dict(published(shared, "sd21/vae"))
    for config, cls, folder in (
        (unet, diffusers.UNet2DConditionModel, "unet"),
        (vae, diffusers.AutoencoderKL, "vae"),
    ):
        cls.from_config(config.to_dict()).save_pretrained(tmp_path / folder)
    gc.collect()
    (tmp_path / "scheduler").mkdir()
    schedule = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))
    index = {"_class_name": "MarigoldDepthPipeline", "default_denoising_steps": 1}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    embedding = np.load(shared / "weights/text_embed/empty_text_embed_sd21.npy")
    files.write(tmp_path / hub.PROMPT, {"prompt": embedding[:2]})
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))

    figures = {"ours": [], "diffusers": []}
    for _ in range(3):  # alternating; the first reading also warms the disk's cache
        for name, load in (("ours", OURS), ("diffusers", THEIRS)):
            script = textwrap.dedent(MEASURE).format(load=textwrap.dedent(load))
            out = subprocess.run(
                [sys.executable, "-c", script, str(tmp_path)],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            figures[name].append([float(x) for x in out.split()])
    seconds, memory = (
        {n: np.median([f[i] for f in v]) for n, v in figures.items()} for i in (0, 1)
    )
    print(
        f"\n{size / 1e9:.2f} GB: ours {seconds['ours']:.1f} s, {memory['ours'] / size:.2f} of the"
        f" files' bytes; diffusers {seconds['diffusers']:.1f} s, {memory['diffusers'] / size:.2f}"
    )
    assert memory["ours"] < 1.3 * size
    assert seconds["ours"] < 1.5 * seconds["diffusers"]


def test_all_foldings_together_change_nothing_but_rounding():
    """At most 3e-5 of the depth map's standard deviation, in float32."""
    model, params = bench.read("d2_base", "float32")
    picture = random_picture((SIDE, SIDE))

    def predicted(fold):
        pipe = DepthPipeline(model, params, fold=fold)
        return pipe([picture], processing_resolution=0, num_inference_steps=1).prediction

    unfolded = predicted(False)
    gc.collect()
    error = oracle.relative_error(predicted(True), unfolded)
    print(f"d2_base folded, {SIDE}x{SIDE}: {error:.1e} of the standard deviation")
    assert unfolded.std() > 0.05 and error < 3e-5
