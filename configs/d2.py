"""D^2epth: the full-size model refined by the pixel-space loss, without a stage 1 (METHOD 8).

    python -m d3epth_jax.main --config=configs/d2.py --config.init=stabilityai/stable-diffusion-2 \\
        --config.data.source.path=DIR --config.eval.source.path=DIR
    python -m d3epth_jax.main --config=configs/d2.py:marigold --config.init=DIR \\
        --config.data.source.path=HYPERSIM --config.data.also.vkitti2.source.path=VKITTI2 \\
        --config.eval.source.path=HYPERSIM      # METHOD 9: nine batches to one, each of one set
    python -m d3epth_jax.main --config=configs/d2.py:tiny       # seconds, from scratch, no data

`marigold` after the colon trains on Hypersim and Virtual KITTI 2, nine batches to one (METHOD 9),
`tfds` on a data set of TFDS or of `d3epth data build`; so do configs/stage1.py and stage2.py.

`init` is a hub id or a directory in diffusers' layout: a plain Stable Diffusion, whose conv_in is
widened, Marigold or E2E-FT. 865.92M UNet parameters: a large accelerator, or FSDP.
"""

from ml_collections import ConfigDict

from configs import common
from configs.nano import train as nano


def get_config(argument: str | None = None) -> ConfigDict:
    word = common.word(argument, "tiny", *common.DATA_WORDS)
    if word == "tiny":
        config = nano.teacher(tiny=True)
        config.workdir = "runs/d2_tiny"
        return config
    config = common.training("pixel")
    config.workdir = "runs/d2"
    config.init = "DIR"
    config.model.processing_resolution = 768  # of what starts from a plain Stable Diffusion
    config.model.dtype = "bfloat16"
    config.train.accumulate = 4  # of 8 pictures, activations kept: 35 GiB at 480x640
    config.schedule.learning_rate = 3e-5
    return common.on_data(config, word)
