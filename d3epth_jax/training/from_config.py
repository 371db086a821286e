"""How a config has models trained: stage, losses, optimiser, weighting (models: model_setup.py)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from d3epth_jax import losses, weighting
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.training import optim
from d3epth_jax.training.model_setup import Start, compares_in_pixels, teacher_steps
from d3epth_jax.training.stages import latent, pixel
from d3epth_jax.typing import Params
from d3epth_jax.weights import fold


def fold_teacher(config, teacher: Start) -> Start:
    """The teacher with its constants folded; what it teaches is the same but for rounding."""
    model = teacher.model
    single_step = model.one_step_from_zero(teacher_steps(config, model))
    model, params = fold.fold_teacher(model, teacher.params, single_step=single_step)
    return teacher._replace(model=model, params=params)


def frozen_teacher(config, teacher: Start) -> Params:
    """The teacher's parameters that the training step needs: with a cache, few or none."""
    if teacher.model is None:
        return None
    params = {part: teacher.params[part] for part in _needed_of(config, teacher)}
    return fold.cast_kernels(teacher.model, params)


def _needed_of(config, teacher: Start) -> list[str]:
    """The teacher's networks that the training step runs."""
    beta, needed = config.loss.beta, {"unet", "encoder", "prompt"}
    if config.stage == "pixel":
        needed = needed if compares_in_pixels(config) else set()
        needed |= {"decoder"} if beta.teacher else set()
    elif config.teacher.cache:
        needed = {"unet", "prompt"} if beta.feat else set()
    return [part for part in teacher.params or () if part in needed]


STAGES = {"pixel": pixel, "latent": latent}  # config.stage: its module


class Stage(NamedTuple):
    """What a training step computes: with constants folded, where what they are made of is frozen.

    Attributes:
      model: as it computes; what is saved is made with the parameters as they were.
      frozen: {"rest": the student's, "teacher": the teacher's} parameters that do not train.
      tasks, beta: the dynamically weighted losses, and the coefficients of all.
      weights_from_data: as `steps.make_train_step`.
    """

    model: DepthModel
    frozen: dict
    loss_fn: Callable
    tasks: tuple[str, ...]
    beta: dict[str, float]
    weights_from_data: bool


def make_stage(config, teacher: Start, student: Start, trainable: Params, rest: Params) -> Stage:
    """The stage of `config.stage`, of what `make_models` returns."""
    if _needed_of(config, teacher):
        teacher = fold_teacher(config, teacher)
    model, rest = fold.fold_frozen(student.model, trainable, rest)
    loss_fn, beta = make_loss(config, model, student.params, trainable, teacher)
    of_rest = fold.cast_kernels(model, rest)
    frozen = {"rest": of_rest, "teacher": frozen_teacher(config, teacher)}
    from_data = STAGES[config.stage].WEIGHTS_FROM_DATA
    return Stage(model, frozen, loss_fn, tasks_of(config), beta, from_data)


def make_loss(config, model: DepthModel, params: Params, trainable: Params, teacher: Start):
    """The stage's (loss function, beta); a beta of 0 drops its term."""
    beta = {name: value for name, value in config.loss.beta.items() if value}
    if "encoder" not in trainable:
        beta.pop("enc", None)
    if not (terms := tuple(beta)):
        raise ValueError("no loss has a weight: set one of loss.beta; enc is for a trained encoder")
    if config.stage == "pixel":
        options = losses.PRESETS[config.loss.preset] | dict(config.loss.options)
        return pixel.make_loss(model, teacher.model, terms=terms, **options), beta
    if teacher.model is None:
        raise ValueError("the latent stage distils a teacher: set teacher.path")
    if "decoder" in trainable:
        raise ValueError(
            "no loss of the latent stage reaches the decoder, so weight decay alone would change"
            " it: leave it out of `trainable`, and train it in stage 2"
        )
    # The student encodes by itself if its encoder is, or will become, another than the teacher's.
    share = "encoder" not in trainable and _same(params["encoder"], teacher.params["encoder"])
    loss_fn = latent.make_loss(
        model,
        teacher.model,
        terms=terms,
        share_encoder=share,
        teacher_steps=teacher_steps(config, teacher.model),
        cached=bool(config.teacher.cache),
    )
    return loss_fn, beta


def tasks_of(config) -> tuple[str, ...]:
    """The losses that are weighted dynamically (METHOD 5)."""
    return tuple(task for task in STAGES[config.stage].TASKS if config.loss.beta[task])


def _same(params: Params, others: Params) -> bool:
    """Whether two trees are equal, array by array."""
    mine, its = (jax.tree.leaves_with_path(tree) for tree in (params, others))
    return [path for path, _ in mine] == [path for path, _ in its] and all(
        a.shape == b.shape and np.array_equal(a, b)
        for (_, a), (_, b) in zip(mine, its, strict=True)
    )


def make_optimizer(config):
    """(optimiser, its learning-rate schedule)."""
    schedule = optim.make_schedule(total_steps=config.train.steps, **config.schedule)
    return optim.make_optimizer(schedule, **config.optim), schedule


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
