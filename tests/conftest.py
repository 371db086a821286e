import os
import pathlib
import sys

# Before JAX starts: the tests run many small programs a few times, so compiling is what they wait
# for, and most of that is optimising. Numbers that depend on it are compared with a tolerance.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # On Python 3.11 JAX is pinned; a later one that does not know a flag ends at once.
        *["--xla_cpu_use_fusion_emitters=false"] * (sys.version_info < (3, 12)),
    ]
).strip()

import jax
import numpy as np
import pytest

from d3epth_jax import image as image_lib
from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.models.presets import SINGLE_STEP

SHARED = pathlib.Path(__file__).parents[2] / "shared"

# Two devices in every test: what is sharded in training is sharded here.
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(scope="session")
def shared():
    """Real pictures and weights beside the checkout, which are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: real pictures and weights are not part of the repository")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is cached between runs on a user's machine is not here; what these tests compile is.

    Each training makes its step anew, mostly one that another test, maybe of the other worker, has
    compiled before.
    """
    base = tmp_path_factory.getbasetemp()
    programs = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        jax.config.update("jax_compilation_cache_dir", str(programs / "xla"))
        # With an upper limit JAX locks the folder: no worker reads what another is writing.
        jax.config.update("jax_compilation_cache_max_size", 8 * 2**30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        # Said here as well, or our commands keep every small program, each under that lock.
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(directory, diffusers' pipeline) of a one-step SD2-like model of zero SNR."""
    from tests import pipeline_oracle  # torch, diffusers and transformers: seconds

    directory = tmp_path_factory.mktemp("models") / "marigold"
    return directory, pipeline_oracle.marigold(directory, rescale_betas_zero_snr=True)


def with_teachers_autoencoder(config, teacher):
    """The latent stage's config, its student between the teacher's frozen encoder and decoder."""
    config.teacher.path, config.autoencoder.path = str(teacher), ""
    config.model.encoder = config.model.decoder = "teacher"
    config.trainable = ("unet/",)
    return config


def small_unet(widths=(8, 16), layers=1, mid="UNetMidBlock2DCrossAttn", channels=4) -> UNetConfig:
    levels = len(widths)
    return UNetConfig(
        in_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        mid_block_type=mid,
        layers_per_block=layers,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )


def small_model(unet: UNetConfig | None = None, width: int = 8, **settings) -> DepthModel:
    """A depth model of some thousand parameters that compiles in seconds; cells of 8 pixels."""
    autoencoder = TinyAutoencoderConfig(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=(0, 0, 0, 1),
        num_decoder_blocks=(1, 0, 0, 0),
    )
    return DepthModel(unet or small_unet(), autoencoder, SINGLE_STEP, **settings)


def scenes(count: int, height: int = 32, width: int = 48, seed: int = 0) -> dict[str, np.ndarray]:
    """Slanted planes with a bright box before them: depth can be seen in the picture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = np.zeros((count, height, width, 3), np.uint8)
    depth = np.zeros((count, height, width, 1), np.float32)
    for i in range(count):
        slope = rng.uniform(-3, 3, 2)
        d = 4 + slope[0] * y + slope[1] * x
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        box = np.s_[top : top + height // 3, left : left + width // 3]
        d[box] = rng.uniform(0.5, 1.5)
        depth[i, ..., 0] = d
        image[i] = (255 / (1 + d))[..., None] * rng.uniform(0.6, 1, 3)
    mask = np.ones_like(depth, bool)
    mask[:, :2, :5] = False
    return {"image": image, "depth": depth, "mask": mask}


def write_pairs(root: pathlib.Path, count: int, **settings) -> pathlib.Path:
    """RGB-D pairs on disk, in the folder source's plain layout."""
    data = scenes(count, **settings)
    for kind in ("rgb", "depth"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        image_lib.save_png(root / "rgb" / f"{i:03d}.png", data["image"][i])
        depth = np.where(data["mask"][i], data["depth"][i] * 1000, 0)[..., 0]
        image_lib.save_png(root / "depth" / f"{i:03d}.png", depth.round().astype(np.uint16))
    return root
