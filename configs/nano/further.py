"""A model goes on in pixel space, by default the shipped student, with scenes it has not seen.

    python -m d3epth_jax.main --config=configs/nano/further.py         # an hour on 2 CPU cores
    python -m d3epth_jax.main --config=configs/nano/further.py:tiny    # seconds: does it run?

It is how scenes of a newer version reach a model without training all anew (train.py:long), and
larger pictures: small ones are the cheaper way to begin. `--config.stage2.init` names what to begin
with, nano-teacher for instance. RESULTS.md says what came of it.
"""

from ml_collections import ConfigDict

from configs import common
from configs.nano import train as nano


def stage2(tiny: bool = False) -> ConfigDict:
    config = nano.stage2(tiny)
    nano.resize(config, *nano.LARGER)
    config.init = "nano"
    config.data.source.seed = 7601  # 7201, 7301 and 7401 the package's models have seen
    if not tiny:
        config.train.steps = 6000
        config.schedule.update(learning_rate=7e-4, warmup_steps=100)
    return config


def evaluation(tiny: bool = False) -> ConfigDict:
    models = {
        "D2-nano, the teacher": "nano-teacher",
        "before": "nano",
        "after": "{workdir}/stage2/model",
    }
    config = nano.evaluation(tiny, nano.LARGER)
    config.eval.processing_resolution = -1  # each model's own
    return nano.show(config, models)


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
