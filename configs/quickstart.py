"""The whole method in small: a student distilled from the teacher that comes with the package.

    python -m d3epth_jax.main --config=configs/quickstart.py          # minutes on 2 CPU cores
    python -m d3epth_jax.main --config=configs/quickstart.py:tiny     # seconds: does it run at all?

1. stage1: a student with a third of the teacher's MACs learns its latents and features from
   rendered scenes. It starts with some of the teacher's channels, and its encoder and decoder are
   the teacher's with fewer blocks.
2. stage2: the student is refined in pixel space, light decoder included.
3. eval: held-out scenes; student and teacher against predictors that know nothing.

The teacher is D^2-nano. configs/nano/train.py:student distils it for three hours instead.
"""

from ml_collections import ConfigDict

from configs import common
from configs.nano import train as nano


def stage1(tiny: bool = False) -> ConfigDict:
    """Also of configs/stage1.py:tiny."""
    config = nano.stage1(tiny)
    config.teacher.path = nano.SHIPPED_TEACHER
    config.model.unet = "teacher"  # its channels, evenly thinned: there is no time for random ones
    config.train.save_start = True
    return shorter(config, 500, tiny)


def stage2(tiny: bool = False) -> ConfigDict:
    """Also of configs/stage2.py:tiny."""
    config = nano.stage2(tiny)
    config.schedule.learning_rate = 2e-4  # a fifth of the long training's: it begins nearer
    return shorter(config, 350, tiny)


def evaluation(tiny: bool = False) -> ConfigDict:
    models = {
        "teacher": nano.SHIPPED_TEACHER,
        "student at start": "{workdir}/stage1/model_start",
        "student after stage 1": "{workdir}/stage1/model",
        "student after stage 2": "{workdir}/stage2/model",
    }
    config = nano.compare(models, tiny)
    config.eval.source.length = 16 if tiny else 256
    config.baselines = ("constant", "ramp", "mean map")
    config.mean_map = ConfigDict(
        {
            "source": nano.scenes(common.PROCEDURAL_TRAIN, 1_000_000),
            "num_images": 32 if tiny else 512,
            "height": nano.HEIGHT,
            "width": nano.WIDTH,
        }
    )
    return config


def shorter(config: ConfigDict, steps: int, tiny: bool) -> ConfigDict:
    if not tiny:
        config.train.steps = config.eval.every = steps
        config.train.checkpoint_every = 200
        config.eval.num_images = 64
    return config


def get_config(argument: str | None = None) -> ConfigDict:
    tiny = common.word(argument, "tiny") == "tiny"
    config = ConfigDict()
    config.workdir = "runs/quickstart_tiny" if tiny else "runs/quickstart"
    config.cpu_devices = 2
    config.jobs = ("stage1", "stage2", "evaluation")
    for job in (stage1, stage2, evaluation):
        config[job.__name__] = job(tiny)
    config.evaluation.models.teacher = config.stage1.teacher.get_oneway_ref("path")
    return config
