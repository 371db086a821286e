"""Stage 1: latent distillation of a teacher into an efficient student (METHOD 7).

    python -m d3epth_jax.main --config=configs/stage1.py --config.teacher.path=DIR \\
        --config.data.source.path=DIR --config.eval.source.path=DIR
    python -m d3epth_jax.main --config=configs/stage1.py:tiny --config.data.source.path=DIR \\
        --config.eval.source.path=DIR                                  # a minute or two on 2 cores

The default distils D^2epth into BK-SDM's small UNet, both with the same frozen autoencoder, the
teacher's. `tiny` distils the package's own teacher, D^2-nano, on RGB-D pairs of your own
(data/sources/folder.py says in which layouts). `marigold` is configs/d2.py's. With
--config.teacher.cache=CACHE the teacher's latents are read (configs/cache.py).

`fast` and `turbo` are the students d3_fast and d3_turbo, with a fifth and a tenth of D^2epth's
multiplications. The encoder too is light, begins as TAESD's and learns the teacher's RGB latent;
the teacher may have Stable Diffusion's autoencoder, whose latent space is the same. The decoder
learns in configs/stage2.py; until then d3_turbo's is a torso of TAESD's: watch `explained`, not
AbsRel. Words combine: configs/stage1.py:turbo,marigold.
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def on_pairs(config: ConfigDict) -> ConfigDict:
    """Trains and evaluates a nano student on RGB-D pairs."""
    config.data.source = common.folder("DIR", split="train")
    config.eval.source = common.folder("DIR", split="validation")
    config.eval.num_images = 0
    config.eval.processing_resolution = -1  # the model's own
    config.data.crop = "stretch"  # as pictures of any shape are predicted by these models
    config.train.save_start = False
    return config


def with_light_student(config: ConfigDict, name: str) -> ConfigDict:
    """Makes d3_fast or d3_turbo, which have a light autoencoder of the teacher's latent space."""
    config.workdir = f"runs/stage1_{name}"
    config.model.preset = f"d3_{name}"
    config.model.encoder = config.model.decoder = "own"
    config.autoencoder.path = "madebyollin/taesd"  # of which d3_turbo takes some of the blocks
    config.trainable = ("unet/", "encoder/")  # no loss of this stage reaches the decoder
    return config


def get_config(argument: str | None = None) -> ConfigDict:
    student, word = common.words_of(argument, ("tiny", *common.LIGHT_WORDS), common.DATA_WORDS)
    if student == "tiny":
        config = on_pairs(quickstart.stage1())
        config.workdir = "runs/stage1_tiny"
        config.train.steps = config.eval.every = config.train.checkpoint_every = 200
        config.schedule.warmup_steps = 20
        return config
    config = common.training("latent")
    config.workdir = "runs/stage1"
    config.teacher.path = "runs/d2/model"
    config.model.preset = "d3_light_small"
    # Everything begins as the teacher's: pruned as BK-SDM, and the frozen autoencoder.
    config.model.unet = config.model.encoder = config.model.decoder = "teacher"
    config.model.processing_resolution = 768  # as configs/d2.py
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.train.accumulate = 4
    if student:
        config = with_light_student(config, student)
    return common.on_data(config, word)
