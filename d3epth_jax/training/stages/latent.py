"""Stage 1, latent distillation (METHOD 7): the student learns the teacher's depth latent.

What the teacher gives (`teach`) is made as it is needed, or once and for all (cache.py).
"""

import jax
import jax.numpy as jnp

from d3epth_jax import inference, losses, targets
from d3epth_jax.models.config import UNetConfig
from d3epth_jax.models.depth_model import DepthModel, abstract_params
from d3epth_jax.typing import Batch, Latent, Params
from d3epth_jax.weights import fold

TASKS = ()  # nothing is weighted dynamically,
WEIGHTS_FROM_DATA = True  # and which images count is known without a prediction (steps.py)
LESSON = ("rgb_latent", "teacher_latent")  # what `teach` gives of every picture,
TARGET = ("gt_latent", "latent_mask", "has_target")  # and of its depth


def feature_pairs(student: UNetConfig, teacher: UNetConfig) -> list[tuple[str, str]]:
    """The (student, teacher) names of compared features, as BK-SDM pairs them.

    Outputs of all down and up blocks where the two have as many levels. A student without the
    innermost level (BK-SDM tiny) has no partner for its last downsampling, so there the last
    attention before it stands in, and its up blocks face the teacher's after the first.
    """
    levels, more = len(student.down_block_types), len(teacher.down_block_types)
    if levels == more:
        return [(name, name) for name in _blocks("down", levels) + _blocks("up", levels)]
    if levels + 1 != more:
        raise ValueError(
            f"feature distillation pairs UNets of as many levels or one fewer: the student has"
            f" {levels}, the teacher {more}; set the weight of the term feat to 0"
        )
    last = levels - 1
    pairs = [(name, name) for name in _blocks("down", last)]
    if (
        "CrossAttn" in student.down_block_types[last]
        and "CrossAttn" in teacher.down_block_types[last]
    ):
        tap = f"down_blocks_{last}.attentions_{{}}.proj_out".format
        pairs.append((tap(student.layers_per_block - 1), tap(teacher.layers_per_block - 1)))
    return pairs + list(zip(_blocks("up", levels), _blocks("up", more)[1:], strict=True))


def _blocks(side: str, count: int) -> list[str]:
    return [f"{side}_blocks_{i}" for i in range(count)]


def init_adapters(
    model: DepthModel, teacher: DepthModel, key: jax.Array, height: int, width: int
) -> dict:
    """Trained 1x1 maps [C_student, C_teacher] for the pairs whose channels differ (METHOD 7).

    They are trained beside the student as `params["adapters"]` and discarded afterwards.
    """

    def feature_shapes(of):
        def run(params, image):
            rgb_latent = inference.encode_image(of, params, image)
            return inference.predict_latent(of, params, rgb_latent)[1]

        image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        features = jax.eval_shape(run, abstract_params(of), image)
        return {name: array.shape for name, array in features.items()}

    ours, theirs = feature_shapes(model), feature_shapes(teacher)
    adapters = {}
    for i, (mine, its) in enumerate(feature_pairs(model.unet, teacher.unet)):
        if ours[mine][1:3] != theirs[its][1:3]:
            raise ValueError(
                f"features {mine} {ours[mine]} of the student and {its} {theirs[its]} of the"
                " teacher differ in height or width: their autoencoders downsample differently"
            )
        if ours[mine] != theirs[its]:
            shape = (ours[mine][-1], theirs[its][-1])
            adapters[f"pair_{i}"] = jax.nn.initializers.lecun_normal()(
                jax.random.fold_in(key, i), shape
            )
    return adapters


def teach(
    teacher: DepthModel,
    params: Params,
    batch: Batch,
    *,
    steps: int = 1,
    with_target: bool = True,
) -> tuple[dict, dict]:
    """What a teacher gives for pictures and their depth, and its UNet's features by name.

    Args:
      batch: image uint8 [B,H,W,3]; for a target also depth float32 metres and mask [B,H,W,1].
      steps: of denoising. One step of a model made for one is that of training (`predict_latent`);
        everything else is inference's, and has no features.
      with_target: also encode the depth map.

    Returns:
      {rgb_latent, teacher_latent [B,h,w,C]}, and of the target {gt_latent [B,h,w,C], latent_mask
      bool [B,h,w,1], has_target bool [B]: whether a cell of the picture may carry a loss}.
    """
    rgb_latent = inference.encode_image(teacher, params, inference.to_float(batch["image"]))
    latent, features = predict(teacher, params, rgb_latent, batch["image"], steps=steps)
    lesson = {"rgb_latent": rgb_latent, "teacher_latent": latent}
    if with_target:
        target, has_target = targets.normalize(
            batch["depth"], batch["mask"], space=teacher.prediction_type
        )
        cells = targets.latent_mask(batch["mask"], factor=teacher.downsample)
        filled = targets.fill_invalid(target, batch["mask"], space=teacher.prediction_type)
        lesson["gt_latent"] = inference.encode_image(teacher, params, jnp.repeat(filled, 3, -1))
        lesson["latent_mask"] = cells
        lesson["has_target"] = has_target & jnp.any(cells, (1, 2, 3))
    return lesson, features


def predict(
    teacher: DepthModel, params: Params, rgb_latent: Latent, image, *, steps: int, member=0
) -> tuple[Latent, dict]:
    """The teacher's depth latent, and its features where it takes the one step it was made for.

    Where it starts from noise, that is drawn from the picture itself and the number `member` of an
    ensemble: always the same for one picture, whatever its place in a batch or data set, and
    another for every other, so that a student of many pictures learns the mean over noise.
    """
    if teacher.one_step_from_zero(steps):
        return inference.predict_latent(teacher, params, rgb_latent)
    noise = jnp.zeros(rgb_latent.shape, jnp.float32)
    if not teacher.from_zeros:
        # Mirror images have one sum, and one noise.
        seeds = jnp.sum(image, (1, 2, 3), dtype=jnp.uint32)
        key = jax.random.fold_in(jax.random.key(0), member)
        noise = jax.vmap(
            lambda seed: jax.random.normal(jax.random.fold_in(key, seed), noise.shape[1:])
        )(seeds)
    return inference.denoise(teacher, params, rgb_latent, noise, steps), {}


def make_loss(
    model: DepthModel,
    teacher: DepthModel,
    *,
    terms: tuple[str, ...] = ("gt", "out", "feat"),
    share_encoder: bool = True,
    teacher_steps: int = 1,
    cached: bool = False,
):
    """The loss function of stage 1.

    Args:
      model, teacher: the student, and a teacher of the same latent space.
      terms: `gt` masked MSE to the encoded ground truth (the teacher's encoder must know depth
        maps: a pretrained autoencoder, not one trained from scratch), `out` MSE to the teacher's
        latent, `feat` features, `enc` MSE of the student's own encoder to the teacher's.
      share_encoder: the student reads the teacher's RGB latent instead of encoding by itself.
      teacher_steps: of denoising; features are those of a single step.
      cached: the batch holds what `teach` gives, instead of depth and mask, and the image only
        where the student encodes it. The teacher's parameters are then needed for features alone,
        {unet, prompt}.

    Returns:
      loss_fn(params, frozen, batch) -> (losses, weights, metrics), each {name: [B]}.
    """
    known = ("gt", "out", "feat", "enc")
    if unknown := set(terms) - set(known):
        raise ValueError(f"unknown terms {sorted(unknown)}; stage 1 knows {list(known)}")
    if "enc" in terms and share_encoder:
        raise ValueError("the term enc trains the student's encoder: set share_encoder to False")
    if "feat" in terms and not teacher.one_step_from_zero(teacher_steps):
        raise ValueError(
            "the term feat compares features of a teacher's single step from zero latents; this"
            f" teacher takes {teacher_steps} step(s), from noise or not, and can give its latent"
            " alone: set the weight of feat to 0 (--config.loss.beta.feat=0)"
        )
    if model.prediction_type != teacher.prediction_type:
        raise ValueError(
            f"the student predicts {model.prediction_type}, its teacher {teacher.prediction_type}:"
            " set model.prediction_type to the teacher's"
        )
    if model.autoencoder.latent_channels != teacher.autoencoder.latent_channels:
        raise ValueError(
            f"the student's latents have {model.autoencoder.latent_channels} channels, the"
            f" teacher's {teacher.autoencoder.latent_channels}: they must share one latent space"
        )
    pairs = feature_pairs(model.unet, teacher.unet) if "feat" in terms else []

    def given(of_teacher, batch) -> tuple[dict, dict]:
        """(lesson, the teacher's features), made now or read from the batch."""
        if not cached:
            wanted = "gt" in terms
            return teach(teacher, of_teacher, batch, steps=teacher_steps, with_target=wanted)
        if not pairs:
            return batch, {}
        rgb_latent = batch["rgb_latent"].astype(jnp.float32)
        return batch, inference.predict_latent(teacher, of_teacher, rgb_latent)[1]

    def loss_fn(params, frozen, batch):
        lesson, teacher_features = given(frozen["teacher"], batch)
        rgb = lesson["rgb_latent"].astype(jnp.float32)
        if not share_encoder:
            rgb = inference.encode_image(model, params, inference.to_float(batch["image"]))
        of_student, folded = fold.fold_in_training(model, params)
        latent, features = inference.predict_latent(of_student, folded, rgb)

        everything = {}
        weights = {}
        if "gt" in terms:
            everything["gt"] = losses.latent_distillation(
                latent, lesson["gt_latent"], lesson["latent_mask"]
            )
            weights["gt"] = lesson["has_target"].astype(jnp.float32)
        if "out" in terms:
            everything["out"] = losses.latent_distillation(latent, lesson["teacher_latent"])
        if pairs:
            adapters = params.get("adapters", {})
            mapped = [
                features[mine] @ adapters[f"pair_{i}"].astype(features[mine].dtype)
                if f"pair_{i}" in adapters
                else features[mine]
                for i, (mine, _) in enumerate(pairs)
            ]
            everything["feat"] = losses.feature_distillation(
                mapped, [teacher_features[its] for _, its in pairs]
            )
        if "enc" in terms:
            everything["enc"] = losses.latent_distillation(rgb, lesson["rgb_latent"])
        # How much of the teacher's latent the student explains: 1 is all, 0 no better than zero.
        power = jnp.mean(jnp.square(lesson["teacher_latent"].astype(jnp.float32)), (1, 2, 3))
        error = losses.latent_distillation(latent, lesson["teacher_latent"])
        metrics = {"explained": 1 - error / jnp.maximum(power, 1e-12)}
        if "gt" in terms:
            metrics["without_gt"] = 1 - weights["gt"]
        every_image = jnp.ones(len(power), jnp.float32)
        return everything, dict.fromkeys([*everything, *metrics], every_image) | weights, metrics

    return loss_fn
