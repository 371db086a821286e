"""Evaluation of saved models, saved predictions and trivial predictors over one source (METHOD 10).

    python -m d3epth_jax.main --config=configs/eval.py \\
        --config.models.student=DIR --config.eval.source.path=DIR
    python -m d3epth_jax.main --config=configs/eval.py:nyu \\
        --config.models.student=DIR --config.eval.source.path=DIR
    python -m d3epth_jax.main --config=configs/eval.py:scenes   # nano and nano-teacher, 512 scenes
    python -m d3epth_jax.main --config=configs/eval.py:tiny     # trivial ones, rendered scenes

A model is a directory, a hub id, or nano or nano-teacher; --config.models.second takes one more.
The word after the colon is a benchmark: nyu, kitti, eth3d, scannet, diode, ibims or hypersim. It
sets the source and the protocol (evaluation/protocols.py: range, crop, inference size, alignment);
single values can be changed, and then stand in the result's header:

    --config.eval.crop=kitti_garg --config.eval.max_depth=50 --config.eval.alignment=disparity

Another model's predictions are scored from files named after the samples, NAME.npy or a 16-bit
NAME.png, from the folder that `d3epth predict` wrote, or from the one that Marigold's inference
wrote, as test/kitchen_0004/pred_0001.npy for rgb_0001.png (baselines.SavedPredictions); names are
relative to eval.source.path, so that has to be the folder that its lists are relative to:

    --config.models.student='' --config.predictions.other.path=DIR \\
        --config.predictions.other.space=disparity

Writes to the workdir evaluation.md (protocol and table), .csv (every image and metric), .json,
.png (the gallery) and evaluation_worst.png (the images that the first model does worst on).
"""

from ml_collections import ConfigDict

from configs import common, quickstart
from configs.nano import train as nano

# The settings of each benchmark's source besides path, filename_list and on_error. The modules
# data/sources/NAME.py say what folder is expected and where it comes from.
BENCHMARKS = {
    "nyu": {"split": "test"},
    # Eigen's list is the user's to give; the annotated depth may be in a folder of its own.
    "kitti": {"split": "eigen", "eigen_list": "", "depth_path": ""},
    "eth3d": {},
    "scannet": {},
    "diode": {"split": "val"},
    "ibims": {},
    "hypersim": {"split": "validation"},
}


def get_config(argument: str | None = None) -> ConfigDict:
    word = common.word(argument, "scenes", "tiny", *BENCHMARKS)
    tiny = word == "tiny"
    config = quickstart.evaluation(tiny=tiny)
    config.workdir = f"runs/eval_{word}" if word else "runs/eval"
    config.cpu_devices = 1
    config.order = config.pictured = ()
    config.shuffled = ""
    # {name: files of its predictions}; without a path it is left out.
    config.predictions = ConfigDict(
        {
            "other": {
                "path": "",
                "space": "depth",  # | disparity | sqrt_disparity
                "scale": 1.0,  # counts per metre; matters only with eval.alignment=none
            }
        }
    )
    if tiny:
        config.models = ConfigDict()
        return config
    config.models = ConfigDict({"student": "runs/stage2/model", "second": ""})  # "" leaves it out
    config.order = ("student", "second")
    config.baselines = ("constant", "ramp")
    if word == "scenes":
        config.models = {"student": "nano", "second": nano.SHIPPED_TEACHER}
        config.eval = nano.compare(config.models.to_dict(), size=nano.LARGER).eval
        config.shuffled = "student"
        return config
    if word in BENCHMARKS:
        config.eval = common.evaluation(benchmark(word), protocol=word)
        return config
    config.eval.source = common.folder("DIR")
    return config


def benchmark(name: str) -> ConfigDict:
    """A benchmark's images and depth maps on disk."""
    return ConfigDict(
        {
            "name": name,
            "path": "DIR",
            "filename_list": "",  # a text file of names: only these, such as a published split
            "on_error": "raise",  # "skip" drops and logs bad samples instead
            **BENCHMARKS[name],
        }
    )
