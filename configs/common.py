"""The settings every config starts from. A group has the name of the module it feeds."""

from ml_collections import ConfigDict

PROCEDURAL_TRAIN, PROCEDURAL_TEST = 1, 2  # seeds of the rendered scenes: no scene is in both


def procedural(seed: int, length: int, **size: int) -> ConfigDict:
    """Rendered scenes (data/procedural), nothing to download; training gives them its own size."""
    return ConfigDict({"name": "procedural", "seed": seed, "length": length, **size})


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


def evaluation(
    source: ConfigDict, *, min_depth: float = 1e-3, max_depth: float = 80.0
) -> ConfigDict:
    """How models are evaluated; depths in metres, by default the range of outdoor sets."""
    return ConfigDict(
        {
            "source": source,
            "num_images": 0,  # the first so many; 0 all
            "min_depth": min_depth,
            "max_depth": max_depth,
            "batch_size": 16,
            "processing_resolution": 0,  # longest side; 0 the picture's own, -1 the model's default
            "num_pictures": 8,  # rows of the gallery
        }
    )


def training(stage: str) -> ConfigDict:
    """A training job; `stage` is "latent" (stage 1) or "pixel" (stage 2, and D^2epth)."""
    config = ConfigDict()
    config.job = "train"
    config.stage = stage
    config.workdir = f"runs/{stage}"
    config.seed = 0
    config.cpu_devices = 2  # CPU cores shown to JAX as devices; no effect with an accelerator
    config.fsdp = 1  # devices that share one copy of the parameters

    # The student: read from `init` (a directory in diffusers' layout or a hub id, also of a plain
    # Stable Diffusion) with all its settings but dtype and remat, else made from a preset.
    config.init = ""
    config.init_version = version()
    config.conv_in_bias = "keep"  # | "halve", where Stable Diffusion's conv_in is widened
    config.autoencoder = ConfigDict({"path": "", **version()})  # one to use instead, as TAESD
    config.model = ConfigDict(
        {
            "preset": "d3_nano",
            "unet": "own",  # "teacher": pruned from the teacher's as BK-SDM (needs no `init`)
            "encoder": "own",  # "teacher": the teacher's, shape and weights
            "decoder": "own",
            "prediction_type": "depth",  # | disparity | sqrt_disparity
            "processing_resolution": 0,
            "dtype": "float32",  # compute type: | bfloat16
            "remat": False,
        }
    )
    config.teacher = ConfigDict({"path": "", **version()})
    config.trainable = ("unet/",)  # regular expressions on parameter paths

    config.data = ConfigDict(
        {
            "source": procedural(PROCEDURAL_TRAIN, 1_000_000),
            "height": 96,
            "width": 128,
            "batch_size": 32,
            # Of pictures on disk; rendered scenes are always fresh.
            "flip": 0.5,  # probability of a horizontal flip
            "crop": "random",  # | center
            "num_workers": 0,  # processes that read
        }
    )
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
    else:
        # `enc` counts where the student's own encoder trains, and only there.
        config.loss = ConfigDict({"beta": {"gt": 1.0, "out": 1.0, "feat": 0.1, "enc": 1.0}})
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
    config.schedule = ConfigDict(
        {
            "learning_rate": 5e-5 if stage == "latent" else 3e-6,
            "warmup_steps": 100,
            "schedule": "exponential",  # | cosine | constant
        }
    )
    config.optim = ConfigDict({"weight_decay": 1e-2, "clip": 1.0, "b1": 0.9, "b2": 0.999})
    config.train = ConfigDict(
        {
            "steps": 30_000 if stage == "latent" else 20_000,
            "accumulate": 1,  # micro-batches per step
            "max_ema_decay": 0.9999,
            "log_every": 50,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "save_start": False,  # keep the untrained student as model_start/
            "profile": (0, 0),  # (first step, number of steps) of a JAX profile
        }
    )
    return config


def version() -> ConfigDict:
    """Which version of a hub model: "" is the main branch, and float32 files."""
    return ConfigDict({"revision": "", "variant": ""})


def word(argument: str | None, *words: str) -> str:
    """The one word after the config's colon ("configs/stage2.py:tiny"), "" without."""
    if argument not in (None, "", *words):
        raise ValueError(
            f"unknown word {argument!r} after the config's colon: choose {list(words)}"
        )
    return argument or ""
