"""Stage 2: pixel refinement of the distilled student by the Hybrid Depth Loss (METHOD 8).

    python -m d3epth_jax.main --config=configs/stage2.py \\
        --config.data.source.path=DIR --config.eval.source.path=DIR
    python -m d3epth_jax.main --config=configs/stage2.py:tiny --config.data.source.path=DIR \\
        --config.eval.source.path=DIR                                  # a minute or two on 2 cores

Starts from what configs/stage1.py trained (`init`). `tiny` refines a student of the quickstart's
shape with the teacher's depth as an additional term, on RGB-D pairs of your own. `marigold` is
configs/d2.py's data.
"""

from ml_collections import ConfigDict

from configs import common, quickstart, stage1


def get_config(argument: str | None = None) -> ConfigDict:
    word = common.word(argument, "tiny", *common.DATA_WORDS)
    if word == "tiny":
        config = stage1.on_pairs(quickstart.stage2())
        config.workdir = "runs/stage2_tiny"
        config.init = "runs/stage1_tiny/model"
        config.init_config = stage1.get_config("tiny")  # trained first where it is absent
        config.loss.beta.teacher = 0.1
        config.train.steps = config.eval.every = config.train.checkpoint_every = 200
        return config
    config = common.training("pixel")
    config.workdir = "runs/stage2"
    config.init = "runs/stage1/model"
    config.trainable = ("unet/", "decoder/")
    config.data = common.training_data(common.folder("DIR", split="train"), 480, 640)
    config.eval.source = common.folder("DIR", split="validation")
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.train.accumulate = 4
    return common.on_data(config, word)
