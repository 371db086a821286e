"""What is wrong with a training's config, told before anything is read or trained."""

import jax

from d3epth_jax import losses
from d3epth_jax.alignment import SPACES
from d3epth_jax.evaluation.evaluate import too_small, wrong_settings
from d3epth_jax.models import presets
from d3epth_jax.models.attention import OF_A_MODEL
from d3epth_jax.models.depth_model import COMPUTE_TYPES
from d3epth_jax.training import from_config, training_data
from d3epth_jax.weights import surgery


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
    if config.stage == "pixel" and config.loss.preset in losses.PRESETS:
        options = losses.PRESETS[config.loss.preset] | dict(config.loss.options)
        names = ("penalty", "delta", "alpha", "tau", "num_scales")
        ask(losses.check_options, *(options[name] for name in names))
        ask(from_config.make_weighting, config, 2)
    ask(training_data.check, config)
    ask(from_config.make_optimizer, config)
    if config.get("init_config") is not None:
        ask(check, config.init_config)
    if problems:
        raise ValueError("\n".join(problems))


def _check_choices(config) -> None:
    choices = {"stage": (config.stage, from_config.STAGES)}
    if config.stage == "pixel":
        choices["loss.preset"] = (config.loss.preset, sorted(losses.PRESETS))
    if not config.init:
        parts = {f"model.{p}": config.model[p] for p in ("unet", "encoder", "decoder")}
        choices |= {name: (value, ("own", "teacher")) for name, value in parts.items()}
        choices["model preset"] = (config.model.preset, sorted(presets.PRESETS))
    choices["model.dtype"] = (config.model.dtype, COMPUTE_TYPES)
    choices["model.attention"] = (config.model.attention, OF_A_MODEL)
    choices["conv_in_bias"] = (config.conv_in_bias, surgery.BIASES)
    choices["model.prediction_type"] = (config.model.prediction_type, (None, *SPACES))
    problems = [
        f"unknown {name} {value!r}: choose one of {list(known)}"
        for name, (value, known) in choices.items()
        if value not in known
    ]
    counts = ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints")
    problems += too_small(config, "config", seed=0)
    problems += too_small(config.data, "data", batch_size=1, num_workers=0)
    problems += too_small(config.train, "train", host_ema_every=0, **dict.fromkeys(counts, 1))
    problems += too_small(config.optim, "optim", clip=0, weight_decay=0)
    problems += [
        f"{name}={value}: a number from 0 on and below 1 is expected"
        for name, value in (
            *((f"optim.{name}", config.optim[name]) for name in ("b1", "b2")),
            ("train.max_ema_decay", config.train.max_ema_decay),
        )
        if not 0 <= value < 1
    ]
    problems += too_small(config.teacher, "teacher", steps=0)
    problems += too_small(config.model, "model", processing_resolution=0)
    problems += too_small(config.loss.beta, "loss.beta", **dict.fromkeys(config.loss.beta, 0))
    if not any(config.loss.beta.values()):
        problems.append("no loss has a weight: set one of loss.beta")
    if len(config.train.profile) != 2:
        problems.append(f"train.profile={config.train.profile}: (first step, number of steps)")
    elif config.train.profile[1] > 0 and config.train.profile[0] < 1:
        problems.append(f"train.profile={config.train.profile} begins before step 1, the first")
    problems += wrong_settings(config.eval, ["what is trained"])
    problems += too_small(config.eval, "eval", every=1)
    problems += too_small(config.schedule, "schedule", learning_rate=0, warmup_steps=0)
    resolution, aspect = config.model.processing_resolution, config.model.processing_aspect
    if aspect is not None and not (aspect > 0 and resolution):
        problems.append(
            f"model.processing_aspect {aspect} with processing_resolution {resolution}: a positive"
            " width / height is expected, and a resolution, since native sizes are not stretched"
        )
    if config.train.host_ema_every and jax.process_count() > 1:
        problems.append("train.host_ema_every needs a single process: set it to 0")
    if problems:
        raise ValueError("\n".join(problems))
