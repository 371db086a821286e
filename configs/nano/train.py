"""nano: models like those that the package ships, from scratch on rendered scenes alone.

    python -m d3epth_jax.main --config=configs/nano/train.py          # an hour on 2 CPU cores
    python -m d3epth_jax.main --config=configs/nano/train.py:student  # 3.5 hours: of nano-teacher
    python -m d3epth_jax.main --config=configs/nano/train.py:long     # all of it, longer: on a GPU
    python -m d3epth_jax.main --config=configs/nano/train.py:tiny     # two minutes: does it run?

1. teacher: D^2-nano, encoder, UNet and decoder trained together by the pixel loss (METHOD 7, "from
   scratch": this defines the latent space).
2. stage1: D^3-nano, a third of the teacher's MACs, learns its latents and features; its encoder and
   decoder are the teacher's with fewer blocks.
3. stage2: the student is refined in pixel space, decoder included.
4. larger: stage 2 goes on with larger pictures; small ones are the cheaper way to begin.
5. eval: held-out scenes. configs/eval.py evaluates on real pictures: none is trained on.
"""

from ml_collections import ConfigDict

from configs import common

HEIGHT, WIDTH = 96, 128
LARGER = 144, 192  # finer maps, at 2.3 times the cost of a step
# Steps and batch size.
STUDENT = {"stage1": (6000, 16), "stage2": (6000, 16), "larger": (14_000, 16)}
LONG = {"teacher": (9600, 64), **STUDENT}
SHIPPED_TEACHER = "nano-teacher"
TEACHER = "D2-nano, the teacher"  # its row in tables
PIXEL_ASPECTS = (0.4, 2.5)  # so that pictures from 9:16 to 10:3 may be stretched to that shape


def teacher(tiny: bool = False) -> ConfigDict:
    """Also of configs/d2.py:tiny."""
    config = training("pixel", steps=3000, learning_rate=8e-4, tiny=tiny)
    config.model.preset = "d2_nano"
    config.trainable = ("unet/", "encoder/", "decoder/")
    # No pretrained model says which sign and range depth has.
    config.loss.beta.range = 0.5
    config.loss.options.upright = True
    return config


def stage1(tiny: bool = False) -> ConfigDict:
    config = training("latent", steps=1300, learning_rate=1e-3, tiny=tiny)
    config.data.source.seed += 1000  # every stage sees scenes of its own
    config.teacher.path = "{workdir}/teacher/model"
    config.model.preset = "d3_nano"
    config.autoencoder.path = config.teacher.get_oneway_ref("path")
    config.trainable = ("unet/", "encoder/")
    # A teacher from scratch never saw a depth map at its encoder's input: no `gt` term.
    config.loss.beta.gt = 0.0
    return config


def stage2(tiny: bool = False) -> ConfigDict:
    config = training("pixel", steps=600, learning_rate=1e-3, tiny=tiny)
    config.data.source.seed += 2000
    config.init = "{workdir}/stage1/model"
    config.trainable = ("unet/", "encoder/", "decoder/")
    config.loss.beta.range = 0.5
    return config


def larger(tiny: bool = False) -> ConfigDict:
    """Also of further.py."""
    config = stage2(tiny)
    config.data.source.seed += 1000
    config.init = "{workdir}/stage2/model"
    resize(config, *LARGER)
    config.train.steps = 4 if tiny else 500
    config.schedule.update(learning_rate=7e-4, warmup_steps=100)
    return config


def evaluation(tiny: bool = False) -> ConfigDict:
    models = {
        TEACHER: "{workdir}/teacher/model",
        "D3-nano after stage 1": "{workdir}/stage1/model",
        "D3-nano after stage 2": "{workdir}/stage2/model",
        "D3-nano, larger pictures": "{workdir}/larger/model",
    }
    return compare(models, tiny, LARGER)


def compare(
    models: dict[str, str], tiny: bool = False, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> ConfigDict:
    """An evaluation of these {name: directory} on held-out scenes, each model at its own size.

    The last is also evaluated with its pictures shuffled.
    """
    held_out = scenes(common.PROCEDURAL_TEST, 16 if tiny else 512, size)
    config = common.evaluation_job(common.evaluation(held_out), models)
    config.eval.processing_resolution = -1
    config.baselines = ("constant", "ramp")
    config.order = tuple(models)
    config.shuffled = list(models)[-1]
    config.pictured = ("ramp", *models)
    return config


def scenes(seed: int, length: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> ConfigDict:
    height, width = size
    return common.procedural(seed, length, pixel_aspects=PIXEL_ASPECTS, height=height, width=width)


def training(stage: str, *, steps: int, learning_rate: float, tiny: bool) -> ConfigDict:
    config = common.training(stage)
    config.data.batch_size = 16
    config.data.source.pixel_aspects = PIXEL_ASPECTS
    # In depth, what is near is squeezed together by what is far (DepthMaster).
    config.model.prediction_type = "sqrt_disparity"
    config.eval.source = scenes(common.PROCEDURAL_TEST + 1, 128)
    resize(config, HEIGHT, WIDTH)
    config.eval.num_images = 16 if tiny else 128
    config.train.steps = 4 if tiny else steps
    config.eval.every = 4 if tiny else 500
    config.train.checkpoint_every = 4 if tiny else 500
    config.train.log_every = 2 if tiny else 50
    config.schedule.update(learning_rate=learning_rate, schedule="cosine", warmup_steps=200)
    if stage == "pixel":
        config.weighting.dwa.window = 200
    return config


def resize(config: ConfigDict, height: int, width: int) -> None:
    """Trains and validates at this size, which becomes the model's own."""
    config.data.height, config.data.width = height, width
    config.model.processing_resolution = max(height, width)
    config.model.processing_aspect = width / height  # the one shape that it was trained on
    config.eval.source.height, config.eval.source.width = height, width


def get_config(argument: str | None = None) -> ConfigDict:
    word = common.word(argument, "student", "long", "tiny")
    tiny = word == "tiny"
    config = ConfigDict()
    config.workdir = f"runs/nano_{word}" if word else "runs/nano"
    config.cpu_devices = 2
    for job in (teacher, stage1, stage2, larger, evaluation):
        config[job.__name__] = job(tiny)
    config.jobs = ("teacher", "stage1", "stage2", "larger", "evaluation")
    if word == "student":
        config.jobs = config.jobs[1:]
        del config.teacher
        config.stage1.teacher.path = SHIPPED_TEACHER
        config.evaluation.models[TEACHER] = config.stage1.teacher.get_oneway_ref("path")
    for name, (steps, batch_size) in {"student": STUDENT, "long": LONG}.get(word, {}).items():
        longer(config[name], steps, batch_size)
    return config


def longer(config: ConfigDict, steps: int, batch_size: int) -> None:
    config.train.steps, config.data.batch_size = steps, batch_size
    config.eval.every = config.train.checkpoint_every = steps // 8
    config.train.log_every = 100
