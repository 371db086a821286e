"""Teacher cache: what stage 1 needs of a teacher, computed once for every picture (METHOD 7).

    python -m d3epth_jax.main --config=configs/cache.py --config.teacher.path=DIR \\
        --config.data.source.path=DIR --workdir=CACHE
    python -m d3epth_jax.main --config=configs/stage1.py --config.teacher.path=DIR \\
        --config.teacher.cache=CACHE --config.data.crop=center --config.data.source.path=DIR \\
        --config.eval.source.path=DIR

Of every picture and its mirror image: the RGB latent, the encoded ground truth and the teacher's
latent, float16, 38 KB each at 480x640. The second command reads them instead of running encoder and
teacher; only feature distillation still runs the teacher's UNet. `data` and `teacher` say the same
in both, and what differs is refused. Interrupted, it goes on where it was.

`marigold` is the training data of METHOD 9, `tfds` a data set of TFDS or of `d3epth data build`,
`tiny` RGB-D pairs of your own with the package's teacher, D^2-nano, for configs/stage1.py:tiny
with --config.teacher.cache=runs/cache_tiny.
"""

from ml_collections import ConfigDict

from configs import common, stage1


def get_config(argument: str | None = None) -> ConfigDict:
    word = common.word(argument, "tiny", *common.DATA_WORDS)
    config = ConfigDict()
    config.job = "cache"
    config.workdir = "runs/cache"
    config.cpu_devices = 2
    config.teacher = common.teacher("runs/d2/model")
    config.model = ConfigDict(
        {
            "dtype": "float32",  # compute type: | bfloat16
            "attention": "auto",  # | chunked: without a GPU's fused kernel
        }
    )
    config.cache = ConfigDict(
        {
            "ensemble": 1,  # members from different noise, merged in pixel space and encoded again
            "target": True,  # encode depth maps; needs a pretrained autoencoder, not one of ours
            "shard_size": 256,  # samples per file: what an interruption costs at most
        }
    )
    config.data = common.data_of(word, crop="center")
    config.data.batch_size = 16
    if word == "tiny":
        config.workdir = "runs/cache_tiny"
        tiny = stage1.get_config("tiny")
        config.teacher = tiny.teacher
        config.data = tiny.data
        config.cache.target = False
    return config
