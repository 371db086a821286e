"""A model goes on in pixel space, by default the shipped student, with scenes it has not seen.

    python -m d3epth_jax.main --config=configs/nano/further.py         # an hour on 2 CPU cores
    python -m d3epth_jax.main --config=configs/nano/further.py:tiny    # minutes: does it run?

It is how scenes of a newer version reach a model without training all anew (train.py), and larger
pictures. `--config.stage2.init` names what to begin with, nano-teacher for instance.
results/TRAININGS.md says what came of it.
"""

from ml_collections import ConfigDict

from configs import common
from configs.nano import train as nano


def stage2(tiny: bool = False) -> ConfigDict:
    config = nano.larger(tiny)
    config.init = "nano"
    config.data.source.seed = 7601  # 7201, 7301 and 7401 the package's models have seen
    if not tiny:
        config.train.steps = 6000
    return config


def evaluation(tiny: bool = False) -> ConfigDict:
    models = {
        nano.TEACHER: nano.SHIPPED_TEACHER,
        "before": "nano",
        "after": "{workdir}/stage2/model",
    }
    return nano.compare(models, tiny, nano.LARGER)


def get_config(argument: str | None = None) -> ConfigDict:
    tiny = common.word(argument, "tiny") == "tiny"
    config = ConfigDict()
    config.workdir = "runs/nano_further_tiny" if tiny else "runs/nano_further"
    config.cpu_devices = 2
    config.jobs = ("stage2", "evaluation")
    config.stage2 = stage2(tiny)
    config.evaluation = evaluation(tiny)
    config.evaluation.models.before = config.stage2.get_oneway_ref("init")
    return config
