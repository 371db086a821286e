"""The models that a config names: the teacher, and the student as it is before training."""

import dataclasses
import logging
import operator
import pathlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from d3epth_jax import checkpoint
from d3epth_jax.models import presets
from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.depth_model import DepthModel, count_params, init_params
from d3epth_jax.training import runs, training_data
from d3epth_jax.training.stages import latent
from d3epth_jax.training.train_state import merge, split_trainable
from d3epth_jax.typing import Params
from d3epth_jax.weights import files, hub, surgery
from d3epth_jax.weights.download import may_be_read
from d3epth_jax.weights.prompt import PromptEncoder

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """A model at the start of training, or a teacher; all empty where there is none."""

    model: DepthModel | None = None
    params: Params | None = None
    text: PromptEncoder | None = None  # saved beside what is trained


def make_models(config) -> tuple[Start, Start, Params, Params]:
    """(teacher, student, the student's trainable parameters, the rest of them)."""
    teacher = read_teacher(config)
    student = make_student(config, teacher)
    patterns = list(config.trainable)
    if config.stage == "latent" and config.loss.beta.feat and teacher.model is not None:
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        size = (config.data.height, config.data.width)
        adapters = latent.init_adapters(student.model, teacher.model, key, *size)
        student = student._replace(params={**student.params, "adapters": adapters})
        patterns += ["adapters/"] if adapters else []
    log.info("student: %s", describe(student.model, student.params))
    return teacher, student, *split_trainable(student.params, tuple(patterns))


def read_teacher(config) -> Start:
    """The teacher of `config.teacher`; of any number of steps where only its latent is learnt."""
    if not config.teacher.path:
        return Start()
    model, params, text, _ = hub.load_model(
        config.teacher.path,
        dtype=config.model.dtype,
        attention=config.model.get("attention", "auto"),  # a config of one's own may lack it
        **_version(config.teacher),
    )
    steps = teacher_steps(config, model)
    compared = config.get("stage") == "pixel" and compares_in_pixels(config)
    if compared and not model.one_step_from_zero(steps):
        raise ValueError(
            f"the teacher {config.teacher.path} takes {steps} denoising step(s) from noise: the"
            " pixel stage compares with a teacher of one step, such as a D^2epth or E2E-FT"
        )
    log.info("teacher: %s, %d step(s), %s", config.teacher.path, steps, describe(model, params))
    if doubt := model.schedule.doubt(steps):
        log.warning("teacher: %s", doubt)
    return Start(model, params, text)


def require_models(config) -> None:
    """Raises FileNotFoundError with all models to start from that are not there.

    Before data is read for them; one that the config trains first is not asked for.
    """
    asked = {
        "teacher.path": config.teacher.path,
        "init": config.init if config.get("init_config") is None else "",
        "autoencoder.path": config.autoencoder.path,
    }
    missing = [f"{key}={path}" for key, path in asked.items() if path and not may_be_read(path)]
    if missing:
        raise FileNotFoundError(
            f"no model there: {', '.join(missing)}. Train it first (configs/stage2.py starts from"
            " what configs/stage1.py trains, and that from what configs/d2.py does), or name"
            " another directory or hub id"
        )


def check_sizes(config, model: DepthModel) -> None:
    """Raises ValueError for sizes to train on that the autoencoder does not divide."""
    problems = [
        f"{training_data.key_of(name)}: {part.height}x{part.width}"
        for name, part in training_data.parts(config).items()
        if part.height % model.downsample or part.width % model.downsample
    ]
    if problems:
        raise ValueError(
            f"pictures are trained on in multiples of {model.downsample}, which is what the"
            f" autoencoder takes together; set height and width of {'; '.join(problems)}"
        )


def teacher_steps(config, model: DepthModel) -> int:
    """How many denoising steps the teacher takes."""
    steps = config.teacher.steps or model.denoising_steps
    if steps is None:
        raise ValueError(f"{config.teacher.path} names no default: set teacher.steps")
    return steps


def compares_in_pixels(config) -> bool:
    """Whether the pixel stage compares with its teacher, instead of taking parts of it alone."""
    return bool(config.loss.beta.latent or config.loss.beta.teacher)


def make_student(config, teacher: Start) -> Start:
    """The model to train: read from `config.init`, or of a preset with parts of the teacher.

    It has the one form in which models are trained here (`surgery.to_single_step`).
    """
    start = _read_student(config, teacher) if config.init else _student_of_preset(config, teacher)
    if not config.autoencoder.path:
        return start
    autoencoder, parts = hub.load_autoencoder(
        config.autoencoder.path, **_version(config.autoencoder)
    )
    shape = start.model.autoencoder
    if not config.init and {type(shape), type(autoencoder)} == {TinyAutoencoderConfig}:
        autoencoder, parts = surgery.prune_tiny_autoencoder(autoencoder, parts, like=shape)
    log.info("autoencoder: %s as %s", config.autoencoder.path, autoencoder)
    model = dataclasses.replace(start.model, autoencoder=autoencoder)
    return start._replace(model=model, params={**start.params, **parts})


def _read_student(config, teacher: Start) -> Start:
    shape = {key: config.model[key] for key in ("processing_resolution", "processing_aspect")}
    # What is trained at one shape has that one from then on.
    reshaped = shape if config.model.processing_aspect is not None else {}
    if (pathlib.Path(config.init) / "checkpoints").is_dir():
        start = read_run(pathlib.Path(config.init))
        settings = {**_computation(config), **_space(config, start.model), **reshaped}
        return start._replace(model=dataclasses.replace(start.model, **settings))
    model, params, text, predicts_depth = hub.load_model(
        config.init,
        **_computation(config),
        any_pipeline=True,
        **_version(config.init_version),
    )
    plain = not predicts_depth and model.unet.in_channels == model.autoencoder.latent_channels
    if doubt := model.schedule.doubt(model.denoising_steps or 0):
        log.warning("%s: %s; it is trained as one at the last timestep", config.init, doubt)
    model, params = surgery.to_single_step(
        model, params, widen=config.conv_in_bias if plain else ""
    )
    if predicts_depth:
        reshaped |= _space(config, model)
        before = model.processing_resolution
        after = reshaped.get("processing_resolution", before)
        if before and before != after:
            log.warning(
                "%s sees %d px by default; what is trained from it will see %d, as this config's"
                " pictures: model.processing_resolution, data.height and data.width set another",
                *(config.init, before, after),
            )
    else:
        reshaped = {"prediction_type": _fresh_space(config, teacher), **shape}
    return Start(dataclasses.replace(model, **reshaped), params, text)


def _computation(config) -> dict:
    """The settings of a DepthModel that no weights have."""
    return {name: config.model[name] for name in ("dtype", "remat", "attention")}


def _fresh_space(config, teacher: Start) -> str:
    """What a model that predicts nothing yet is to predict."""
    taught = teacher.model and teacher.model.prediction_type
    return config.model.prediction_type or taught or "depth"


def _space(config, model: DepthModel) -> dict:
    """What a model that predicts depth, in whatever space, is to predict from now on."""
    before, now = model.prediction_type, config.model.prediction_type
    if now in (None, before):
        return {}
    turns = config.stage == "pixel" and "depth" in (before, now)
    if turns and not (config.loss.options.upright and config.loss.beta.range):
        raise ValueError(
            f"the model to start from predicts {before}, and what is large there is small in {now},"
            " which a loss with a free scale does not see: set loss.options.upright=True and"
            f" loss.beta.range=0.5, or leave out model.prediction_type={now}"
        )
    log.info("the model to start from predicts %s; it learns %s instead", before, now)
    return {"prediction_type": now}


def _student_of_preset(config, teacher: Start) -> Start:
    parts = [part for part in ("unet", "encoder", "decoder") if config.model[part] == "teacher"]
    if parts and teacher.model is None:
        raise ValueError(f"model.{parts[0]}='teacher', but there is no teacher (teacher.path)")
    unet, autoencoder = presets.get(config.model.preset)
    shared = [part for part in parts if part != "unet"]
    if len(shared) == 2:
        autoencoder = teacher.model.autoencoder
    elif shared:
        autoencoder = _with_part(autoencoder, teacher.model.autoencoder, shared[0])
    model = DepthModel(
        unet,
        autoencoder,
        presets.SINGLE_STEP,
        prediction_type=_fresh_space(config, teacher),
        processing_resolution=config.model.processing_resolution,
        processing_aspect=config.model.processing_aspect,
        base=teacher.model.base if parts else "",
        **_computation(config),
    )
    params = init_params(model, config.seed)
    params |= {part: teacher.params[part] for part in shared}
    if teacher.model is not None and _reads_prompt_of(model, teacher):
        params["prompt"] = teacher.params["prompt"]
        model = dataclasses.replace(model, prompt_padding=teacher.model.prompt_padding)
    if "unet" in parts:
        # In the form that is trained here, which is the student's.
        other, of_teacher = surgery.to_single_step(teacher.model, teacher.params)
        if _is_narrower(unet, other.unet):
            widths = unet.block_out_channels, other.unet.block_out_channels
            log.info("UNet, evenly thinned: %s of the teacher's %s channels", *widths)
            other, of_teacher = surgery.thin(other, of_teacher, widths[0])
        copied = surgery.copy_from_teacher(unet, other.unet, params["unet"], of_teacher["unet"])
        params["unet"] = copied.params
        log.info("UNet, from the teacher: %s", surgery.in_modules(copied.taken))
        log.info("UNet, of the teacher left out: %s", surgery.in_modules(copied.left_out))
        if copied.fresh:
            told = (f"{'/'.join(path)} ({why})" for path, why in copied.fresh.items())
            log.warning("UNet, random: %s", ", ".join(told))
    text = teacher.text if "prompt" in params and params["prompt"].any() else None
    return Start(model, params, text)


def _reads_prompt_of(model: DepthModel, teacher: Start) -> bool:
    dims = [m.unet.cross_attention_dim for m in (model, teacher.model)]
    return model.needs_prompt and teacher.model.needs_prompt and dims[0] == dims[1]


def _is_narrower(student: UNetConfig, teacher: UNetConfig) -> bool:
    """Whether the student has fewer channels at some level, and is else like a thinned teacher."""
    widths, of_teacher = student.block_out_channels, teacher.block_out_channels
    alike = len(widths) == len(of_teacher) and student.norm_num_groups == teacher.norm_num_groups
    return alike and widths != of_teacher and all(map(operator.le, widths, of_teacher))


def _with_part(autoencoder, its, part: str):
    """An autoencoder's shape with the encoder or decoder of another's."""
    if type(autoencoder) is not type(its):
        raise ValueError(
            f"model.{part}='teacher': the teacher has a {type(its).__name__}, the preset a"
            f" {type(autoencoder).__name__}; take both encoder and decoder from the teacher, or"
            " neither"
        )
    if autoencoder == its:
        return autoencoder
    fields = [f.name for f in dataclasses.fields(autoencoder) if part in f.name]
    if not fields:
        raise ValueError(
            f"model.{part}='teacher': the teacher's {type(its).__name__} is of another size than"
            " the preset's, and both halves have one size; take both from the teacher, or neither"
        )
    return dataclasses.replace(autoencoder, **{name: getattr(its, name) for name in fields})


def _version(settings) -> dict:
    """Revision and variant of a hub model; "" in a config means none."""
    return {name: settings[name] or None for name in ("revision", "variant")}


def read_run(workdir: pathlib.Path) -> Start:
    """The model of the newest checkpoint in a run's workdir, with its averaged (EMA) weights.

    Raises FileNotFoundError where there is none; ValueError if what the run itself started from,
    which holds the parameters that it did not train, is another model now, if its settings are of
    another version, or if the checkpoint is damaged or of other parameters; and as
    `hub.load_model`.
    """
    path = workdir / "config.json"
    if not path.is_file() or not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{workdir} is no workdir of a run: no config.json, no checkpoints/"
        )
    config = ConfigDict(files.read_json(path))
    try:
        runs.check_origins(workdir, config)
        _, (model, _, text), trainable, rest = make_models(config)
    except (AttributeError, KeyError) as error:
        if isinstance(error, AttributeError) and not isinstance(error.args[0], KeyError):
            raise  # not a ConfigDict's
        told = f"{path} is of another version, without {error}: name {workdir}/model, if there"
        raise ValueError(told) from error
    newest = checkpoint.newest(workdir / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"{workdir}/checkpoints holds no complete checkpoint")
    average = checkpoint.read_tree(newest / "state", trainable, "ema")
    params = merge(average, rest)
    params.pop("adapters", None)
    return Start(model, params, text)


def describe(model: DepthModel, params: Params) -> str:
    parts = ", ".join(
        f"{name} {count_params(tree) / 1e6:.2f}M"
        for name, tree in params.items()
        if name != "prompt"
    )
    return f"{count_params(params) / 1e6:.2f}M parameters ({parts}), {model.dtype}"
