"""D^2epth: the full-size model refined by the pixel-space loss, without a stage 1 (METHOD 8).

    python -m d3epth_jax.main --config=configs/d2.py --config.init=stabilityai/stable-diffusion-2 \\
        --config.data.source.path=DIR --config.eval.source.path=DIR
    python -m d3epth_jax.main --config=configs/d2.py:tiny       # seconds, from scratch, no data

`init` is a hub id or a directory in diffusers' layout: a plain Stable Diffusion, whose conv_in is
widened, Marigold or E2E-FT. 865.92M UNet parameters: a large accelerator, or FSDP.
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config(argument: str | None = None) -> ConfigDict:
    if common.word(argument, "tiny"):
        config = quickstart.teacher(tiny=True)
        config.workdir = "runs/d2_tiny"
        return config
    config = common.training("pixel")
    config.workdir = "runs/d2"
    config.init = "DIR"
    config.model.processing_resolution = 768  # of what starts from a plain Stable Diffusion
    config.data.source = common.folder("DIR", split="train")
    config.data.height, config.data.width = 480, 640
    config.data.batch_size = 32
    config.eval.source = common.folder("DIR", split="validation")
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.train.accumulate = 4
    config.schedule.learning_rate = 3e-5
    return config
