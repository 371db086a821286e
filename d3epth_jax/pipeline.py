"""From pictures to depth maps: the model with its pre- and post-processing (METHOD 1).

Argument names and the output's fields are those of diffusers' MarigoldDepthPipeline.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from d3epth_jax import ensemble, inference, sharding
from d3epth_jax import image as image_lib
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.typing import Params
from d3epth_jax.weights import hub
from d3epth_jax.weights.prompt import PromptEncoder

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DepthOutput:
    """Depth maps of N pictures.

    Attributes:
      prediction: float32 [N,H,W,1] in [0,1], up to scale and shift.
      prediction_type: "depth" grows with distance; "disparity" and "sqrt_disparity" fall.
      uncertainty: float32 [N,H,W,1], the ensemble's median absolute deviation; None if not asked.
      latent: float32 [N*E,h,w,C], image-major; None if not asked. It can be passed as `latents`.
    """

    prediction: np.ndarray
    prediction_type: str
    uncertainty: np.ndarray | None = None
    latent: np.ndarray | None = None


class DepthPipeline:
    """Predicts depth: `DepthPipeline.from_pretrained(path_or_hub_id)("photo.jpg").prediction`."""

    def __init__(
        self,
        model: DepthModel,
        params: Params,
        text: PromptEncoder | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """`text`: saved beside the model; `mesh`: spread batches over these devices, else one."""
        self.model, self.text = model, text
        self.mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
        self.params = sharding.put_params(params, self.mesh)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | os.PathLike, *, dtype: str = "float32", **where
    ) -> "DepthPipeline":
        """Reads a directory in diffusers' layout, or a model of the Hugging Face hub.

        Args:
          path_or_hub_id: such as "runs/stage2/model" or "prs-eth/marigold-depth-v1-1".
          dtype: "float32" or "bfloat16", of parameters and computation.
          where: revision, variant ("fp16"), subfolder, cache_dir, token, local_files_only, as in
            diffusers (`weights.hub.load_model`, which also lists the errors).
        """
        loaded = hub.load_model(path_or_hub_id, dtype=dtype, param_dtype=dtype, **where)
        return cls(loaded.model, loaded.params, loaded.text)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes diffusers' layout: MarigoldDepthPipeline.from_pretrained reads it back."""
        hub.save_model(directory, self.model, self.params, self.text)

    def push_to_hub(
        self, repo_id: str, *, token: str | None = None, private: bool | None = None
    ) -> str:
        """Saves to the Hugging Face hub, `repo_id` made where it is absent; returns its address."""
        return hub.push(repo_id, self.save_pretrained, token=token, private=private)

    def __call__(
        self,
        images,
        *,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        num_inference_steps: int | None = None,
        ensemble_size: int = 1,
        batch_size: int = 1,
        key: jax.Array | None = None,
        latents: np.ndarray | None = None,
        output_uncertainty: bool = False,
        output_latent: bool = False,
    ) -> DepthOutput:
        """Depth of one picture or of a list of pictures of one size.

        Args:
          images: a path, a PIL picture, an array [H,W], [H,W,1|3|4], or a list of these, or an
            array [N,H,W,C]; arrays are uint8, uint16, or float in [0,1]. Alpha is dropped.
          processing_resolution: longest side the networks see; 0 the picture's own, None the
            model's default. Smaller pictures are enlarged.
          match_input_resolution: resize the result to the picture's size.
          num_inference_steps: DDIM steps; None the model's default.
          ensemble_size: predictions per picture, from different latents, merged (METHOD 1).
          batch_size: pictures (or members) per call of the networks.
          key: of the initial latents; default `jax.random.key(0)`.
          latents: the initial latents [N*E,h,w,C], image-major. Default: zeros for a model of one
            step, else drawn from `key`.
          output_uncertainty, output_latent: fill those fields of the output.

        Raises:
          ValueError: pictures of different sizes or unusable ones (all are named), an ensemble
            whose members would be equal, latents of another shape.
        """
        steps = num_inference_steps or self.model.denoising_steps
        if steps is None:
            raise ValueError("the model names no default: give num_inference_steps")
        _check_counts(steps, batch_size, ensemble_size, output_uncertainty)
        pictures = _as_list(images)
        if processing_resolution is None:
            processing_resolution = self.model.processing_resolution
        size = pictures[0].shape[:2]
        inner = image_lib.processing_size(*size, processing_resolution)
        cells = tuple(-(-side // self.model.downsample) for side in inner)

        initial = self._initial_latents(
            (len(pictures) * ensemble_size, *cells, self.model.autoencoder.latent_channels),
            latents, key, ensemble_size, steps,
        )  # fmt: skip
        encode, predict = (
            _program(name, self.model, steps, self.mesh, (batch_size, *cells))
            for name in ("encode", "predict")
        )

        def prepared(picture):
            picture = image_lib.resize(_to_signed(picture), inner, antialias=True)
            return image_lib.pad_to_multiple(picture, self.model.downsample)[0]

        rgb = _in_batches(
            lambda part: encode(self.params, self._put(np.stack([prepared(p) for p in part]))),
            batch_size,
            pictures,
        )
        prediction, latent = _in_batches(
            lambda *part: predict(self.params, *map(self._put, part)),
            batch_size,
            np.repeat(rgb, ensemble_size, 0),
            initial,
        )
        prediction = prediction[:, : inner[0], : inner[1]]
        uncertainty = None
        if ensemble_size > 1:
            members = prediction.reshape(len(pictures), ensemble_size, *prediction.shape[1:])
            merged = [ensemble.ensemble_depth(each) for each in members]
            prediction, uncertainty = (np.stack(arrays) for arrays in zip(*merged, strict=True))

        def finished(maps):
            if not match_input_resolution:
                return maps
            return np.stack([image_lib.resize(each, size, antialias=False) for each in maps])

        return DepthOutput(
            finished(prediction),
            self.model.prediction_type,
            finished(uncertainty) if output_uncertainty else None,
            latent if output_latent else None,
        )

    def _initial_latents(self, shape, latents, key, ensemble_size: int, steps: int) -> np.ndarray:
        if latents is not None:
            latents = np.asarray(latents, np.float32)
            if latents.shape != shape:
                raise ValueError(
                    f"latents have shape {list(latents.shape)}, expected {list(shape)}: [pictures *"
                    " ensemble_size, h, w, C] (channels last)"
                )
            return latents
        if self.model.denoising_steps != 1 and not self.model.starts_at_zero:
            key = jax.random.key(0) if key is None else key
            return np.asarray(jax.random.normal(key, shape))
        if ensemble_size > 1:
            raise ValueError(
                "a model of one step starts from zero latents, so all members of an ensemble would"
                " be equal: set ensemble_size to 1, or pass different `latents`"
            )
        if steps > 1:
            log.warning("%d steps from zero latents: the model was made for one", steps)
        return np.zeros(shape, np.float32)

    def _put(self, array: np.ndarray) -> jax.Array:
        if len(array) % self.mesh.size == 0:
            return sharding.put_batch({"": array}, self.mesh)[""]
        return jax.device_put(array, sharding.replicated(self.mesh))


@functools.lru_cache(maxsize=16)
def _program(name: str, model: DepthModel, steps: int, mesh, shape: tuple[int, int, int]):
    """A compiled function of its own per model and shape, so that the oldest ones can be dropped.

    `shape` [B,h,w] and `mesh` are there as the cache's key: jit itself would keep all for ever.
    """
    del mesh, shape
    if name == "encode":
        return jax.jit(lambda params, image: inference.encode_image(model, params, image))
    return jax.jit(
        lambda params, rgb, depth: inference.predict_depth(model, params, rgb, depth, steps)
    )


def _in_batches(function, batch_size: int, *arrays):
    """Calls with slices of `batch_size`, the last one filled up: one compilation per shape."""
    results = []
    for begin in range(0, len(arrays[0]), batch_size):
        parts = [array[begin : begin + batch_size] for array in arrays]
        count = len(parts[0])
        full = [np.stack([*part, *[part[-1]] * (batch_size - count)]) for part in parts]
        results.append(jax.tree.map(lambda x: np.asarray(x)[:count], function(*full)))  # noqa: B023
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _check_counts(steps: int, batch_size: int, ensemble_size: int, uncertainty: bool) -> None:
    counts = {
        "num_inference_steps": steps,
        "batch_size": batch_size,
        "ensemble_size": ensemble_size,
    }
    if bad := [f"{name} = {value}" for name, value in counts.items() if value < 1]:
        raise ValueError(f"must be at least 1: {', '.join(bad)}")
    if uncertainty and ensemble_size == 1:
        raise ValueError("output_uncertainty compares members: set ensemble_size to 2 or more")


def _as_list(images) -> list[np.ndarray]:
    """Pictures as arrays [H,W,3] of one size: uint8, or float32 in [0,1] where that keeps more."""
    if isinstance(images, str | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray | jax.Array) and images.ndim < 4
    ):
        images = [images]
    if not isinstance(images, Sequence | np.ndarray | jax.Array) or not len(images):
        raise ValueError("no picture given: a path, a PIL picture, an array, or a list of these")
    pictures, problems = [], []
    for number, given in enumerate(images):
        try:
            pictures.append(_as_picture(given))
        except (OSError, ValueError) as error:
            problems.append(f"number {number}: {error}")
            continue
        if pictures[-1].shape[:2] != pictures[0].shape[:2]:
            sizes = [f"{p.shape[1]}x{p.shape[0]}" for p in (pictures[-1], pictures[0])]
            problems.append(f"number {number}: {sizes[0]} pixels, but the first has {sizes[1]}")
    if problems:
        raise ValueError("\n  ".join(["pictures that cannot be used:", *problems]))
    return pictures


def _as_picture(given) -> np.ndarray:
    if isinstance(given, str | os.PathLike):
        return image_lib.load(given)
    if isinstance(given, Image.Image):
        return image_lib.from_pil(given)
    array = np.asarray(given)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"an array [H,W] or [H,W,1|3|4] is expected, not {list(array.shape)}")
    array = array[..., :3] if array.shape[-1] == 4 else array
    array = np.broadcast_to(array, (*array.shape[:2], 3))
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return array.astype(np.float32) / 65535
    if array.dtype.kind != "f":
        raise ValueError(f"uint8, uint16, or float in [0,1] is expected, not {array.dtype}")
    array = array.astype(np.float32)
    if not (array >= 0).all() or not (array <= 1).all():  # also false for NaN
        raise ValueError("a float picture must be finite and in [0,1]")
    return array


def _to_signed(picture: np.ndarray) -> np.ndarray:
    """To float32 [-1,1], the range of the encoders."""
    return image_lib.to_float(picture) if picture.dtype == np.uint8 else 2 * picture - 1
