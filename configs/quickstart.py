"""The whole method in small, from nothing: a teacher, a distilled student, a table and a gallery.

    python -m d3epth_jax.main --config=configs/quickstart.py          # minutes on 2 CPU cores
    python -m d3epth_jax.main --config=configs/quickstart.py:tiny     # seconds: does it run at all?

1. teacher: D^2epth in small, encoder, UNet and decoder trained together from scratch by the pixel
   loss on rendered scenes (METHOD 7, "from scratch": this defines the latent space).
2. stage1: a smaller student learns the teacher's latents and features.
3. stage2: the student is refined in pixel space, light decoder included.
4. eval: held-out scenes; student and teacher against predictors that know nothing.
"""

from ml_collections import ConfigDict

from configs import common

HEIGHT, WIDTH = 64, 96


def teacher(tiny: bool = False) -> ConfigDict:
    """The D^2epth teacher from scratch, also of configs/stage1.py:tiny and stage2.py:tiny."""
    config = _training("pixel", steps=650, learning_rate=1e-3, tiny=tiny)
    config.model.preset = "d2_nano"
    config.trainable = ("unet/", "encoder/", "decoder/")
    # No pretrained model says which sign and range depth has.
    config.loss.beta.range = 0.5
    config.loss.options.upright = True
    return config


def stage1(tiny: bool = False) -> ConfigDict:
    config = _training("latent", steps=400, learning_rate=1e-3, tiny=tiny)
    config.teacher.path = "{workdir}/teacher/model"
    config.model.preset = "d3_nano"
    config.model.encoder = config.model.decoder = "teacher"
    config.trainable = ("unet/",)
    # A teacher from scratch never saw a depth map at its encoder's input: no `gt` term.
    config.loss.beta.gt = 0.0
    config.train.save_start = True
    return config


def stage2(tiny: bool = False) -> ConfigDict:
    config = _training("pixel", steps=300, learning_rate=5e-4, tiny=tiny)
    config.init = "{workdir}/stage1/model"
    config.trainable = ("unet/", "encoder/", "decoder/")
    config.loss.beta.range = 0.5
    return config


def evaluation(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.job = "eval"
    config.eval = common.evaluation(
        common.procedural(common.PROCEDURAL_TEST, 16 if tiny else 256, height=HEIGHT, width=WIDTH)
    )
    config.baselines = ("constant", "ramp", "mean map")
    config.mean_map = ConfigDict(
        {
            "source": common.procedural(
                common.PROCEDURAL_TRAIN, 1_000_000, height=HEIGHT, width=WIDTH
            ),
            "num_images": 32 if tiny else 512,
            "height": HEIGHT,
            "width": WIDTH,
        }
    )
    models = {
        "teacher": "{workdir}/teacher/model",
        "student at start": "{workdir}/stage1/model_start",
        "student after stage 1": "{workdir}/stage1/model",
        "student after stage 2": "{workdir}/stage2/model",
    }
    config.models = ConfigDict(models)
    config.order = tuple(models)  # of the table's rows
    config.shuffled = "student after stage 2"
    config.pictured = ("ramp", *models)
    return config


def _training(stage: str, *, steps: int, learning_rate: float, tiny: bool) -> ConfigDict:
    config = common.training(stage)
    config.data.height, config.data.width = HEIGHT, WIDTH
    config.data.batch_size = 16
    config.model.processing_resolution = max(HEIGHT, WIDTH)
    config.eval.source = common.procedural(
        common.PROCEDURAL_TEST + 1, 64, height=HEIGHT, width=WIDTH
    )
    config.train.steps = 4 if tiny else steps
    config.eval.every = config.train.steps
    config.train.checkpoint_every = 200
    config.eval.num_images = 16 if tiny else 64
    config.train.log_every = 2 if tiny else 50
    config.train.max_ema_decay = 0.99  # a run of minutes cannot average over 10,000 steps
    config.schedule.update(learning_rate=learning_rate, schedule="cosine", warmup_steps=50)
    config.weighting.dwa.window = 100
    return config


def get_config(argument: str | None = None) -> ConfigDict:
    tiny = common.word(argument, "tiny") == "tiny"
    config = ConfigDict()
    config.workdir = "runs/quickstart_tiny" if tiny else "runs/quickstart"
    config.cpu_devices = 2
    config.jobs = ("teacher", "stage1", "stage2", "evaluation")
    for job in (teacher, stage1, stage2, evaluation):
        config[job.__name__] = job(tiny)
    return config
