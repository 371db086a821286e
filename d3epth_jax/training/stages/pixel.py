"""Stage 2, pixel refinement (METHOD 8): the Hybrid Depth Loss on decoded depth.

D^2epth is this stage on the full-size model, without a stage 1 before it.
"""

import jax.numpy as jnp

from d3epth_jax import alignment, inference, losses, targets
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.weights import fold

TASKS = ("ssi", "edge")  # what dynamic task weighting balances; every other term keeps its weight
WEIGHTS_FROM_DATA = False  # a prediction that does not vary has no fit, so its image does not count


def make_loss(
    model: DepthModel,
    teacher: DepthModel | None = None,
    *,
    terms: tuple[str, ...] = TASKS,
    upright: bool = False,
    normalize_target: bool = True,
    image_weights: str = "valid",
    penalty: str = "l1",
    stop_gradient_alignment: bool = False,
    delta: float = 0.05,
    alpha: float = 5.0,
    tau: float = 0.1,
    num_scales: int = 4,
    min_valid: int = 16,
):
    """The loss function of stage 2.

    Args:
      model: the student.
      teacher: needed by the terms `latent` and `teacher` alone.
      terms: which losses are formed. Beside the two tasks:
        `range`: L1 to the normalised target without alignment, which fixes the output's range
          where no pretrained model does (training from scratch; our reading);
        `latent`: MSE to the teacher's latent, an anchor for the latent space;
        `teacher`: L1 to the teacher's depth in pixels.
      upright: the tasks leave out images whose prediction is inverted (s < 0), so that only `range`
        acts on them. From scratch the sign is open, the tasks cannot see it, and their gradient,
        inversely proportional to the prediction's spread, would freeze that of the first steps.
      normalize_target, image_weights: whether SSI sees each target normalised or metric, and how
        images count; losses.PRESETS names the pairs.
      The rest: METHOD 3 and 4.

    Returns:
      loss_fn(params, frozen, batch) -> (losses, weights, metrics), each {name: [B]};
      batch holds image uint8 [B,H,W,3], depth float32 metres [B,H,W,1] and mask bool [B,H,W,1].
    """
    known = (*TASKS, "range", "latent", "teacher")
    if unknown := set(terms) - set(known):
        raise ValueError(f"unknown terms {sorted(unknown)}; stage 2 knows {list(known)}")
    compared = {"latent", "teacher"} & set(terms)
    if compared and teacher is None:
        raise ValueError("the terms latent and teacher compare with a teacher: none was given")
    if compared and model.prediction_type != teacher.prediction_type:
        raise ValueError(
            f"the student predicts {model.prediction_type}, its teacher {teacher.prediction_type}:"
            " they cannot be compared"
        )

    def loss_fn(params, frozen, batch):
        image = inference.to_float(batch["image"])
        space = model.prediction_type
        target, has_target = targets.normalize(
            batch["depth"], batch["mask"], space=space, min_valid=min_valid
        )
        mask = batch["mask"] & has_target[:, None, None, None]

        rgb_latent = inference.encode_image(model, params, image)
        of_student, folded = fold.fold_in_training(model, params)
        latent, _ = inference.predict_latent(of_student, folded, rgb_latent)
        depth = inference.decode_depth(of_student, folded, latent)

        of_fit = {"penalty": penalty, "stop_gradient_alignment": stop_gradient_alignment}
        hybrid = losses.hybrid_depth(
            depth,
            target,
            mask,
            **of_fit,
            delta=delta,
            alpha=alpha,
            tau=tau,
            num_scales=num_scales,
            min_valid=min_valid,
        )
        if not normalize_target:  # the edges stay in normalised units (METHOD 4)
            metric = alignment.to_space(jnp.where(mask, batch["depth"], 1), space)
            hybrid["ssi"] = losses.scale_shift_invariant(
                depth, metric, mask, **of_fit, min_valid=min_valid
            )
        counted = hybrid["valid"] & ~hybrid["negative_scale"] if upright else hybrid["valid"]
        of_tasks = losses.image_weights(mask, counted, kind=image_weights)
        of_others = losses.image_weights(mask, has_target, kind=image_weights)
        everything = {name: hybrid[name] for name in TASKS if name in terms}
        weights = dict.fromkeys(everything, of_tasks)
        if "range" in terms:
            everything["range"] = alignment.masked_mean(jnp.abs(depth - target), mask)
        if compared:
            of_teacher = frozen["teacher"]
            rgb_latent = inference.encode_image(teacher, of_teacher, image)
            teacher_latent, _ = inference.predict_latent(teacher, of_teacher, rgb_latent)
            if "latent" in terms:
                everything["latent"] = losses.latent_distillation(latent, teacher_latent)
            if "teacher" in terms:
                teacher_depth = inference.decode_depth(teacher, of_teacher, teacher_latent)
                everything["teacher"] = jnp.mean(jnp.abs(depth - teacher_depth), (1, 2, 3))
        metrics = {
            "negative_scale": hybrid["negative_scale"].astype(jnp.float32),
            "without_loss": 1 - counted.astype(jnp.float32),
        }
        weights["negative_scale"] = hybrid["valid"].astype(jnp.float32)
        return everything, dict.fromkeys(everything, of_others) | weights, metrics

    return loss_fn
