"""The settings that every config starts from, in groups."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

PROCEDURAL_TRAIN, PROCEDURAL_TEST = 1, 2  # seeds of the rendered scenes: no scene is in both


def procedural(seed: int, length: int, **settings) -> ConfigDict:
    """Rendered scenes (data/procedural), nothing to download; training gives them its own size."""
    return ConfigDict(
        {
            "name": "procedural",
            "version": 5,  # of what is rendered: told apart in what is saved
            "seed": seed,
            "length": length,
            # Width over height of pixels, from to: as other shapes, stretched to this one.
            "pixel_aspects": (1.0, 1.0),
            **settings,
        }
    )


def folder(path: str, split: str = "") -> ConfigDict:
    """RGB-D pairs on disk (data/sources/folder.py says which layouts)."""
    return ConfigDict(
        {
            "name": "folder",
            "path": path,
            "index": "",  # JSON or CSV; "" finds index.json, index.csv, or rgb/ beside depth/
            "filename_list": "",  # a text file of names: only these pairs
            "split": split,  # "train" | "validation" | "" for all
            "holdout_every": 5,  # every fifth pair is held out for validation
            "holdout_sources": (),  # or whole sources, by name
            "depth_scale": 1000.0,  # counts of a 16-bit PNG per metre, where no index says so
            "min_valid": 16,  # fewer known pixels are an error
            "on_error": "raise",  # "skip" drops and logs bad pairs instead
        },
        convert_dict=False,
    )


def hypersim(path: str, split: str) -> ConfigDict:
    """Hypersim's release, or Marigold's PNGs of it (data/sources/hypersim.py)."""
    return ConfigDict(
        {
            "name": "hypersim",
            "path": path,
            "split": split,  # "train" | "validation" | "test" | "" for all
            "colour": "tone_mapped",  # | preview
            "filename_list": "",  # a text file of names: only these frames
            "on_error": "raise",  # "skip" drops and logs frames with missing files instead
        }
    )


def vkitti2(path: str, split: str) -> ConfigDict:
    """Virtual KITTI 2, Marigold's frames of it (data/sources/vkitti2.py)."""
    return ConfigDict(
        {
            "name": "vkitti2",
            "path": path,
            "split": split,  # "train" | "validation" | "" for all
            "scenes": (),  # of the split's, only these
            # Marigold's; there are also fog, rain, 30-deg-left and 30-deg-right.
            "variations": (
                "clone",
                "morning",
                "overcast",
                "sunset",
                "15-deg-left",
                "15-deg-right",
            ),
            "cameras": ("Camera_0", "Camera_1"),
            "filename_list": "",
            "on_error": "raise",
        },
        convert_dict=False,
    )


def tfds(path: str, split: str, dataset: str = "") -> ConfigDict:
    """Any TFDS data set with picture and depth, or what `d3epth data build` wrote."""
    return ConfigDict(
        {
            "name": "tfds",
            "path": path,  # the folder of data sets, TFDS' data_dir
            "dataset": dataset,  # its name there
            "split": split,
            "image": "image",  # the features' names
            "depth": "depth",
            "depth_scale": 1.0,  # counts per metre
            "filename_list": "",
        }
    )


def evaluation(source: ConfigDict, *, protocol: str = "default") -> ConfigDict:
    """How models are evaluated (evaluation/protocols.py); the default is 0.001 to 80 m, no crop."""
    return ConfigDict(
        {
            "source": source,
            "num_images": 0,  # so many, evenly spread; 0 all
            "protocol": protocol,  # | nyu | kitti | eth3d | scannet | diode | ibims | hypersim
            # What is set here replaces the protocol's own value; depths in metres.
            "min_depth": placeholder(float),  # valid: min < d < max
            "max_depth": placeholder(float),
            "clip": placeholder(tuple),  # of aligned predictions; without, the valid range
            "crop": placeholder(str),  # "" | nyu_eigen | kitti_eigen | kitti_garg
            # Longest side; 0 the picture's own, -1 the model's default.
            "processing_resolution": placeholder(int),
            "fit_resolution": placeholder(int),  # align on a subsampling; 0 on all pixels
            # "" as the model predicts | depth | disparity | sqrt_disparity | none
            "alignment": placeholder(str),
            "batch_size": 16,
            "num_pictures": 8,  # rows of each gallery
        }
    )


def evaluation_job(evaluation: ConfigDict, models: dict[str, str]) -> ConfigDict:
    """An evaluation of these {name: directory or hub id} and of no baseline."""
    job = {"job": "eval", "eval": evaluation, "models": models, "baselines": ()}
    # The rows' order, those with pictures (() for all), and the one that is also shown others'.
    job |= {"order": (), "pictured": (), "shuffled": ""}
    return ConfigDict(job)


def training(stage: str) -> ConfigDict:
    """A training job; `stage` is "latent" (stage 1) or "pixel" (stage 2, and D^2epth)."""
    config = ConfigDict()
    config.job = "train"
    config.stage = stage
    config.workdir = f"runs/{stage}"
    config.seed = 0  # of random weights, and of the order of files; scenes: data.source.seed
    config.cpu_devices = 2  # CPU cores shown to JAX as devices; no effect with an accelerator
    config.fsdp = 1  # devices that share one copy of the parameters

    # The student: read from `init` (a directory in diffusers' layout or a hub id, also of a plain
    # Stable Diffusion) with its settings, else made of a preset. dtype, remat and attention below
    # hold for it as well, prediction_type and processing_aspect where they are given.
    config.init = ""
    config.init_version = version()
    config.conv_in_bias = "keep"  # | "halve", where Stable Diffusion's conv_in is widened
    # One to use instead, as TAESD; where the preset has fewer blocks, with so many of its own.
    config.autoencoder = ConfigDict({"path": "", **version()})
    config.model = ConfigDict(
        {
            "preset": "d3_nano",
            "unet": "own",  # "teacher": pruned from the teacher's as BK-SDM, thinned if narrower
            "encoder": "own",  # "teacher": the teacher's, shape and weights
            "decoder": "own",
            # depth | disparity | sqrt_disparity; unset: what the model to start from predicts, else
            # the teacher, else depth.
            "prediction_type": placeholder(str),
            "processing_resolution": 0,
            # Width / height that pictures are stretched to; given, also of a model that goes on.
            "processing_aspect": placeholder(float),
            "dtype": "float32",  # compute type: | bfloat16
            "remat": False,
            "attention": "auto",  # | chunked: without a GPU's fused kernel
        }
    )
    config.teacher = teacher("")
    config.trainable = ("unet/",)  # regular expressions on parameter paths

    config.data = training_data(procedural(PROCEDURAL_TRAIN, 1_000_000), 96, 128)
    config.eval = evaluation(procedural(PROCEDURAL_TEST, 64, height=96, width=128))
    config.eval.every = 1000

    if stage == "pixel":
        beta = {"ssi": 1.0, "edge": 0.5, "range": 0.0, "latent": 0.0, "teacher": 0.0}
        options = {
            "upright": False,
            "penalty": "l1",
            "stop_gradient_alignment": False,
            "delta": 0.05,
            "alpha": 5.0,
            "tau": 0.1,
            "num_scales": 4,
            "min_valid": 16,
        }
        config.loss = ConfigDict({"beta": beta, "preset": "default", "options": options})
        config.weighting = ConfigDict(
            {
                "name": "dwa",  # | static | uncertainty
                "dwa": {
                    "temperature": 2.0,
                    "window": 500,
                    "ratio_clip": (0.5, 2.0),  # () for none, as Liu et al.
                    "normalize": True,
                },
            }
        )
    else:
        # `enc` counts where the student's own encoder trains, and only there.
        config.loss = ConfigDict({"beta": {"gt": 1.0, "out": 1.0, "feat": 0.1, "enc": 1.0}})
    config.schedule = ConfigDict(
        {
            "learning_rate": 5e-5 if stage == "latent" else 3e-6,
            "warmup_steps": 100,
            "schedule": "exponential",  # | cosine | constant
        }
    )
    config.optim = ConfigDict(
        {
            "weight_decay": 1e-2,
            "clip": 1.0,  # of the gradients' global norm; 0: none
            "b1": 0.9,
            "b2": 0.999,
            "moments": "float32",  # | bfloat16, rounded at random: half the optimiser's memory
        }
    )
    config.train = ConfigDict(
        {
            "steps": 30_000 if stage == "latent" else 20_000,
            "accumulate": 1,  # micro-batches per step
            "max_ema_decay": 0.9999,
            "host_ema_every": 0,  # steps from one update to the next of an average that the
            # host keeps, to spare an accelerator's memory; 0: on the device, with every step
            "log_every": 50,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "save_start": False,  # keep the untrained student as model_start/
            "profile": (0, 0),  # (first step, number of steps) of a JAX profile
        }
    )
    return config


def teacher(path: str) -> ConfigDict:
    """The model that is distilled."""
    return ConfigDict(
        {
            "path": path,
            **version(),
            "steps": 0,  # of denoising; 0 the model's default
            "cache": "",  # workdir of configs/cache.py: read the teacher's latents from there
        }
    )


def training_data(source: ConfigDict, height: int, width: int, **settings) -> ConfigDict:
    """One source, or that and what `also` adds."""
    return ConfigDict(
        {
            **part(source, height, width, **settings),
            # {name: other(...)}: more sources of files, each batch of one of them.
            "also": ConfigDict(),
            "batch_size": 32,
            "num_workers": 0,  # processes that read
        }
    )


def part(
    source: ConfigDict,
    height: int,
    width: int,
    *,
    crop: str = "random",
    flip: float = 0.5,
    max_depth: float = 0.0,
    filters: dict | None = None,
) -> ConfigDict:
    """A source and how its pictures are used; rendered scenes, always fresh, take their size only.

    filters: METHOD 9's for Hypersim are {"min_range": 0.5, "min_contrast": 10, "max_invalid":
    0.03}. In the latent stage a sample left out still shows its picture to the teacher.
    """
    none = {"min_range": 0.0, "min_contrast": 0, "max_invalid": 1.0}
    return ConfigDict(
        {
            "source": source,
            "height": height,
            "width": width,
            "crop": crop,  # | center | kitti, the bottom and middle of the picture as it is
            # | stretch, all of it in that shape: for models with a processing_aspect
            "flip": flip,  # probability of a horizontal flip
            "max_depth": max_depth,  # metres; farther is unknown; 0 no limit
            # A sample with less depth range (metres) or contrast (of 255), or a larger share of
            # invalid pixels, carries no loss against its depth.
            "filter": none | (filters or {}),
        }
    )


def other(share: float, *source, **settings) -> ConfigDict:
    """An entry of `also`: a part with its share of the batches; `data` itself gets the rest."""
    return ConfigDict({"share": share, **part(*source, **settings)})


def marigold_data() -> ConfigDict:
    """Training data of METHOD 9: Hypersim and Virtual KITTI 2, nine batches to one."""
    data = training_data(
        hypersim("DIR", "train"),
        480,
        640,
        crop="center",  # nothing: 1024x768 has that shape
        max_depth=65.0,
        filters={"min_range": 0.5, "min_contrast": 10, "max_invalid": 0.03},
    )
    data.num_workers = 8
    data.also.vkitti2 = other(0.1, vkitti2("DIR", "train"), 352, 1216, crop="kitti", max_depth=80.0)
    return data


def data_of(word: str, crop: str = "random") -> ConfigDict:
    """The training data of one of DATA_WORDS, or of "": pairs in a folder.

    crop: of what has no shape of its own, which Marigold's have.
    """
    if word.startswith("marigold"):
        data = marigold_data()
        if word == "marigold_built":  # the same, as `d3epth data build` wrote it, filters applied
            data.source = tfds("DIR", "train", "hypersim")
            data.also.vkitti2.source = tfds("DIR", "train", "vkitti2")
        return data
    source = tfds("DIR", "train") if word == "tfds" else folder("DIR", split="train")
    return training_data(source, 480, 640, crop=crop)


def on_data(config: ConfigDict, word: str) -> ConfigDict:
    """The config, a training, with the data of `word` (data_of), and validation on its kind."""
    config.data = data_of(word)
    validation = {
        "": folder("DIR", split="validation"),
        "tfds": tfds("DIR", "validation"),
        "marigold": hypersim("DIR", "validation"),
        "marigold_built": tfds("DIR", "validation", "hypersim"),
    }[word]
    if word.startswith("marigold"):
        every = config.eval.every
        config.eval = evaluation(validation, protocol="hypersim")
        config.eval.update(every=every, num_images=256)
    else:
        config.eval.source = validation
        config.eval.processing_resolution = -1  # the model's own, as where it is used
    return config


DATA_WORDS = ("marigold", "marigold_built", "tfds")
LIGHT_WORDS = ("fast", "turbo")


def version() -> ConfigDict:
    """Which version of a hub model: "" is the main branch, and float32 files."""
    return ConfigDict({"revision": "", "variant": ""})


def word(argument: str | None, *words: str) -> str:
    """The one word after the config's colon ("configs/stage2.py:tiny"), "" without."""
    return words_of(argument, words)[0]


def words_of(argument: str | None, *groups: tuple[str, ...]) -> tuple[str, ...]:
    """Of each group the word after the config's colon ("stage2.py:turbo,tfds"), "" without.

    `tiny` has data of its own and stands alone.
    """
    given = [each for each in (argument or "").split(",") if each]
    for each in given:
        if not any(each in group for group in groups):
            raise ValueError(
                f"unknown word {each!r} after the config's colon: choose {list(sum(groups, ()))}"
            )
    chosen = [[each for each in given if each in group] for group in groups]
    if any(len(each) > 1 for each in chosen) or ("tiny" in given and len(given) > 1):
        raise ValueError(f"{argument!r} after the config's colon: these words exclude each other")
    return tuple(each[0] if each else "" for each in chosen)
