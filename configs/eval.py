"""Evaluation of saved models and trivial predictors over one source (METHOD 10).

    python -m d3epth_jax.main --config=configs/eval.py \\
        --config.models.student=DIR --config.eval.source.path=DIR
    python -m d3epth_jax.main --config=configs/eval.py:tiny     # trivial ones, rendered scenes

Writes evaluation.md (the table), .csv (every image), .json and .png (the gallery) to the workdir.
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config(argument: str | None = None) -> ConfigDict:
    tiny = common.word(argument, "tiny") == "tiny"
    config = quickstart.evaluation(tiny=tiny)
    config.workdir = "runs/eval_tiny" if tiny else "runs/eval"
    config.cpu_devices = 1
    config.order = config.pictured = ()
    config.shuffled = ""
    if tiny:
        config.models = ConfigDict()
        return config
    config.models = ConfigDict({"student": "runs/stage2/model"})
    config.baselines = ("constant", "ramp")
    config.eval.source = common.folder("DIR")
    config.eval.processing_resolution = -1
    return config
