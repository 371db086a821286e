"""Stage 2: pixel refinement of the distilled student by the Hybrid Depth Loss (METHOD 8).

    python -m d3epth_jax.main --config=configs/stage2.py \\
        --config.data.source.path=DIR --config.eval.source.path=DIR
    python -m d3epth_jax.main --config=configs/stage2.py:tiny --config.data.source.path=DIR \\
        --config.eval.source.path=DIR                                  # a minute or two on 2 cores

Starts from what configs/stage1.py trained (`init`). `tiny` refines D^3-nano with the teacher's
depth as an additional term, on RGB-D pairs of your own; where runs/stage1_tiny (`init_config`) has
no model yet, it is trained first, on the same pairs. `marigold` is configs/d2.py's data. `fast`
and `turbo` refine the light students of configs/stage1.py's words; words combine, as in
configs/stage2.py:turbo,marigold.

`24gb` is configs/d2.py's D^2epth, the full-size model without a stage 1, on one card of 24 GB:
Adam's moments in bfloat16, the moving average in the host's memory, activations recomputed, 32
micro-batches of one picture. `python -m tests.train_memory` counts the bytes. JAX takes three
quarters of a card by default, so:

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m d3epth_jax.main \\
        --config=configs/stage2.py:24gb,marigold --config.init=stabilityai/stable-diffusion-2 \\
        --config.data.source.path=HYPERSIM --config.data.also.vkitti2.source.path=VKITTI2 \\
        --config.eval.source.path=HYPERSIM
"""

from ml_collections import ConfigDict

from configs import common, d2, quickstart, stage1
from configs.nano import train as nano


def get_config(argument: str | None = None) -> ConfigDict:
    kinds = ("tiny", "24gb", *common.LIGHT_WORDS)
    student, word = common.words_of(argument, kinds, common.DATA_WORDS)
    if student == "24gb":
        return on_24gb(d2.get_config(word))
    if student == "tiny":
        config = stage1.on_pairs(quickstart.stage2())
        config.workdir = "runs/stage2_tiny"
        config.init = "runs/stage1_tiny/model"
        config.init_config = stage1.get_config("tiny")  # trained first where it is absent
        config.teacher.path = nano.SHIPPED_TEACHER
        config.init_config.teacher.path = config.teacher.get_oneway_ref("path")
        config.loss.beta.teacher = 0.1
        config.train.steps = config.eval.every = config.train.checkpoint_every = 200
        config.schedule.warmup_steps = 20
        return config
    config = common.training("pixel")
    config.workdir = "runs/stage2"
    config.init = "runs/stage1/model"
    config.trainable = ("unet/",)  # the decoder is the teacher's, of Stable Diffusion perhaps
    config.model.dtype = "bfloat16"
    config.train.accumulate = 4  # of 8 pictures, activations kept
    if student:
        config.workdir = f"runs/stage2_{student}"
        config.init = f"runs/stage1_{student}/model"
        config.trainable = ("unet/", "decoder/")  # METHOD 8: light decoders train
    if student == "turbo":  # its decoder lacks most of the blocks that it was trained with
        config.schedule.learning_rate = 3e-5
    return common.on_data(config, word)


def on_24gb(config: ConfigDict) -> ConfigDict:
    config.workdir = "runs/d2_24gb"
    config.model.remat = True
    config.optim.moments = "bfloat16"
    config.train.host_ema_every = 10
    config.train.accumulate = config.data.batch_size
    config.eval.batch_size = 1
    return config
