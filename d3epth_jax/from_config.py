"""Everything that a config names, made: sources, batches, teacher, student, loss, weighting."""

import dataclasses
import functools
import logging
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from d3epth_jax import data, losses, optim, sharding, weighting
from d3epth_jax.data import loader
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import DepthModel, count_params, init_params
from d3epth_jax.stages import latent, pixel
from d3epth_jax.train_state import split_trainable
from d3epth_jax.typing import Params
from d3epth_jax.weights import hub, surgery
from d3epth_jax.weights.prompt import PromptEncoder

log = logging.getLogger(__name__)


STAGES = ("pixel", "latent")


def check(config) -> None:
    """Raises ValueError with every setting that can be seen to be wrong without a model or data.

    Also in the configs of what would be trained first: nothing trains for minutes to fail then.
    """
    problems = []

    def ask(function, *args):
        try:
            function(*args)
        except ValueError as error:
            problems.append(str(error))

    ask(_check_choices, config)
    ask(make_schedule, config)
    ask(make_weighting, config, 2)
    for first in (config.teacher.get("config"), config.get("init_config")):
        if first is not None:
            ask(check, first)
    if problems:
        raise ValueError("\n".join(problems))


def _check_choices(config) -> None:
    choices = {"stage": (config.stage, STAGES)}
    if config.stage == "pixel":
        choices["loss.preset"] = (config.loss.preset, sorted(losses.PRESETS))
    if not config.init:
        parts = {f"model.{p}": config.model[p] for p in ("unet", "encoder", "decoder")}
        choices |= {name: (value, ("own", "teacher")) for name, value in parts.items()}
        choices["model preset"] = (config.model.preset, sorted(presets.PRESETS))
    problems = [
        f"unknown {name} {value!r}: choose one of {list(known)}"
        for name, (value, known) in choices.items()
        if value not in known
    ]
    if problems:
        raise ValueError("\n".join(problems))


def make_sources(config):
    """The (training, validation) sources, every problem of both in one error; kept apart."""
    training = dict(config.data.source)
    if training["name"] == "procedural":
        training |= {"height": config.data.height, "width": config.data.width}
    sources, errors = [], []
    for settings in (training, config.eval.source):
        try:
            sources.append(data.make_source(**settings))
        except SourceError as error:
            errors.append(error)
    if errors:
        roots = " and ".join(dict.fromkeys(str(error.root) for error in errors))
        # Both splits of one folder meet some problems, such as a missing file.
        problems = dict.fromkeys(problem for error in errors for problem in error.problems)
        raise SourceError(roots, list(problems)) from errors[0]
    paths = [s.get("path") for s in (training, config.eval.source)]
    if None not in paths and len({pathlib.Path(path).resolve() for path in paths}) == 1:
        require_apart(*sources)
        require_one_reading(config.data.source, config.eval.source)
    return sources


def require_one_reading(training, validation) -> None:
    """Raises ValueError if one folder is read in two ways, with another scale for instance."""
    apart = {
        key: (training[key], validation[key])
        for key in training
        if key not in ("path", "split", "filename_list") and training[key] != validation[key]
    }
    if apart:
        told = "; ".join(f"{key} {one!r} and {other!r}" for key, (one, other) in apart.items())
        raise ValueError(
            f"data.source and eval.source read one folder in two ways: {told}. Set both alike, as"
            " --config.data.source.KEY=... --config.eval.source.KEY=..."
        )


def make_batches(config, mesh, source):
    """The iterator over this process's part of the training batches."""
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if config.data.batch_size % mesh.size:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} is not a multiple of the {mesh.size} devices"
        )
    if config.data.batch_size % (mesh.size * config.train.accumulate):
        raise ValueError(
            f"data.batch_size={config.data.batch_size} cannot be cut into train.accumulate="
            f"{config.train.accumulate} micro-batches on {mesh.size} devices"
        )
    if config.data.source.name == "procedural":
        return loader.ProceduralIterator(
            source,
            config.data.batch_size // jax.process_count(),
            place=functools.partial(sharding.put_batch, mesh=mesh),
            **process,
        )
    return loader.make_loader(
        source,
        loader.standard_transforms(
            (config.data.height, config.data.width), flip=config.data.flip, crop=config.data.crop
        ),
        batch_size=config.data.batch_size // jax.process_count(),
        seed=config.seed,
        shuffle=True,
        num_workers=config.data.num_workers,
        **process,
    )


def require_apart(training, validation) -> None:
    """Raises ValueError if samples of one folder are both trained and evaluated on."""
    names = [{source.name(i) for i in range(len(source))} for source in (training, validation)]
    if both := sorted(names[0] & names[1]):
        raise ValueError(
            f"{len(both)} pairs are both trained and evaluated on, {both[0]} the first: give"
            " data.source and eval.source the splits train and validation, and one hold-out"
        )


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
    """The single-step teacher of `config.teacher`."""
    if not config.teacher.path:
        return Start()
    model, params, text, _ = hub.load_model(
        config.teacher.path, dtype=config.model.dtype, **_version(config.teacher)
    )
    if model.denoising_steps != 1:
        raise ValueError(
            f"the teacher {config.teacher.path} takes {model.denoising_steps} denoising steps:"
            " stage 1 distils a teacher of one step, such as a D^2epth or E2E-FT"
        )
    log.info("teacher: %s, %s", config.teacher.path, describe(model, params))
    return Start(model, params, text)


def make_student(config, teacher: Start) -> Start:
    """The model to train: read from `config.init`, or of a preset with parts of the teacher.

    It has the one form in which models are trained here (`surgery.to_single_step`).
    """
    start = _read_student(config) if config.init else _student_of_preset(config, teacher)
    if not config.autoencoder.path:
        return start
    autoencoder, parts = hub.load_autoencoder(
        config.autoencoder.path, **_version(config.autoencoder)
    )
    log.info("autoencoder: %s", config.autoencoder.path)
    model = dataclasses.replace(start.model, autoencoder=autoencoder)
    return start._replace(model=model, params={**start.params, **parts})


def _read_student(config) -> Start:
    model, params, text, predicts_depth = hub.load_model(
        config.init,
        dtype=config.model.dtype,
        remat=config.model.remat,
        any_pipeline=True,
        **_version(config.init_version),
    )
    plain = not predicts_depth and model.unet.in_channels == model.autoencoder.latent_channels
    model, params = surgery.to_single_step(
        model, params, widen=config.conv_in_bias if plain else ""
    )
    if not predicts_depth:
        model = dataclasses.replace(
            model,
            prediction_type=config.model.prediction_type,
            processing_resolution=config.model.processing_resolution,
        )
    return Start(model, params, text)


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
        prediction_type=config.model.prediction_type,
        processing_resolution=config.model.processing_resolution,
        dtype=config.model.dtype,
        remat=config.model.remat,
    )
    params = init_params(model, config.seed)
    params |= {part: teacher.params[part] for part in shared}
    if teacher.model is not None and _reads_prompt_of(model, teacher):
        params["prompt"] = teacher.params["prompt"]
        model = dataclasses.replace(model, prompt_padding=teacher.model.prompt_padding)
    if "unet" in parts:
        # In the form that is trained here, which is the student's.
        other, of_teacher = surgery.to_single_step(teacher.model, teacher.params)
        params["unet"], random = surgery.copy_from_teacher(
            unet, other.unet, params["unet"], of_teacher["unet"]
        )
        if random:
            log.warning("not in the teacher, so random: %s", ", ".join(random))
        model = dataclasses.replace(model, base=teacher.model.base or config.teacher.path)
    text = teacher.text if "prompt" in params and params["prompt"].any() else None
    return Start(model, params, text)


def _reads_prompt_of(model: DepthModel, teacher: Start) -> bool:
    dims = [m.unet.cross_attention_dim for m in (model, teacher.model)]
    return model.unet.needs_prompt and teacher.model.unet.needs_prompt and dims[0] == dims[1]


def _with_part(autoencoder, its, part: str):
    """An autoencoder's shape with the encoder or decoder of another's."""
    if type(autoencoder) is not type(its):
        raise ValueError(
            f"model.{part}='teacher': the teacher has a {type(its).__name__}, the preset a"
            f" {type(autoencoder).__name__}; take both encoder and decoder from the teacher, or"
            " neither"
        )
    fields = [f.name for f in dataclasses.fields(autoencoder) if part in f.name]
    return dataclasses.replace(autoencoder, **{name: getattr(its, name) for name in fields})


def _version(settings) -> dict:
    """Revision and variant of a hub model; "" in a config means none."""
    return {name: settings[name] or None for name in ("revision", "variant")}


def make_loss(config, model: DepthModel, params: Params, trainable: Params, teacher: Start):
    """The stage's (loss function, dynamically weighted tasks, beta); a beta of 0 drops its term."""
    beta = {name: value for name, value in config.loss.beta.items() if value}
    if "encoder" not in trainable:
        beta.pop("enc", None)
    terms = tuple(beta)
    if config.stage == "pixel":
        options = losses.PRESETS[config.loss.preset] | dict(config.loss.options)
        return (
            pixel.make_loss(model, teacher.model, terms=terms, **options),
            tuple(task for task in pixel.TASKS if task in beta),
            beta,
        )
    if teacher.model is None:
        raise ValueError("the latent stage distils a teacher: set teacher.path")
    if "decoder" in trainable:
        raise ValueError(
            "no loss of the latent stage reaches the decoder, so weight decay alone would change"
            " it: leave it out of `trainable`, and train it in stage 2"
        )
    # The student encodes by itself if its encoder is, or will become, another than the teacher's.
    share = "encoder" not in trainable and _same(params["encoder"], teacher.params["encoder"])
    return latent.make_loss(model, teacher.model, terms=terms, share_encoder=share), (), beta


def _same(params: Params, others: Params) -> bool:
    """Whether two trees are equal, array by array."""
    mine, its = (jax.tree.leaves_with_path(tree) for tree in (params, others))
    return [path for path, _ in mine] == [path for path, _ in its] and all(
        a.shape == b.shape and np.array_equal(a, b)
        for (_, a), (_, b) in zip(mine, its, strict=True)
    )


def make_optimizer(config, num_tasks: int):
    """(optimiser, its learning-rate schedule, dynamic task weighting)."""
    schedule = make_schedule(config)
    optimizer = optim.make_optimizer(schedule, **config.optim)
    return optimizer, schedule, make_weighting(config, num_tasks)


def make_schedule(config):
    return optim.make_schedule(total_steps=config.train.steps, **config.schedule)


def make_weighting(config, num_tasks: int) -> weighting.Weighting:
    if num_tasks == 0:
        return weighting.static(0)  # stage 1 has fixed coefficients only
    dwa = config.weighting.dwa
    choices = {
        "dwa": lambda: weighting.dwa(
            num_tasks, **dict(dwa, ratio_clip=tuple(dwa.ratio_clip) or None)
        ),
        "static": lambda: weighting.static(num_tasks),
        "uncertainty": lambda: weighting.uncertainty(num_tasks),
    }
    if config.weighting.name not in choices:
        raise ValueError(
            f"unknown weighting {config.weighting.name!r}: choose one of {sorted(choices)}"
        )
    return choices[config.weighting.name]()


def describe(model: DepthModel, params: Params) -> str:
    parts = ", ".join(
        f"{name} {count_params(tree) / 1e6:.2f}M"
        for name, tree in params.items()
        if name != "prompt"
    )
    return f"{count_params(params) / 1e6:.2f}M parameters ({parts}), {model.dtype}"
