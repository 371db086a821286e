"""From pictures to depth maps: the model with its pre- and post-processing (METHOD 1).

Argument names and the output's fields are those of diffusers' MarigoldDepthPipeline.
"""

import dataclasses
import functools
import logging
import os

import jax
import numpy as np

from d3epth_jax import ensemble, inference, memory, picture_arrays, sharding
from d3epth_jax import image as image_lib
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.typing import Params
from d3epth_jax.weights import fold, hub
from d3epth_jax.weights.prompt import PromptEncoder

log = logging.getLogger(__name__)

SQUEEZED = (0.39, 2.55)  # as the shipped nano models in training, and a bit more


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

    @property
    def far(self) -> np.ndarray:
        """The prediction turned so that it grows with distance: float32 [N,H,W,1], to look at."""
        return self.prediction if self.prediction_type == "depth" else 1 - self.prediction


class DepthPipeline:
    """Predicts depth: `DepthPipeline.from_pretrained(path_or_hub_id)("photo.jpg").prediction`."""

    def __init__(
        self,
        model: DepthModel,
        params: Params,
        text: PromptEncoder | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        dtype: str | None = None,
        fold: bool = True,
    ):
        """A pipeline of parameters that are there.

        Args:
          text: saved beside the model.
          mesh: spread batches over these devices, else one.
          dtype: of the parameters; None: as they are.
          fold: compute with constants folded (`weights.fold`): fewer operations, the same numbers
            but for rounding. What is saved is not folded.
        """
        self.model, self.text = model, text
        self.mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
        self.fold = fold
        self.params = sharding.put_params(params, self.mesh, dtype)

    @property
    def params(self) -> Params:
        """The parameters, not folded. Others may be set: the next call computes with those."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._params, self._variants = params, {}

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike,
        *,
        dtype: str = "float32",
        attention: str = "auto",
        fold: bool = True,
        revision: str | None = None,
        variant: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> "DepthPipeline":
        """Reads a directory in diffusers' layout, or a model of the Hugging Face hub.

        Args:
          path_or_hub_id: such as "runs/stage2/model" or "prs-eth/marigold-depth-v1-1".
          dtype: "float32" or "bfloat16", of parameters and computation.
          attention: "auto", or "chunked": without a GPU's fused kernel (`models.attention`).
          fold: compute with constants folded (`weights.fold`): fewer operations, the same numbers
            but for rounding.
          revision: branch, tag or commit of a hub model.
          variant: "fp16" reads `*.fp16.safetensors`.
          subfolder: of the directory or the hub's repository.
          cache_dir, token, local_files_only: of downloads, as in diffusers.

        Raises FileNotFoundError or ValueError as `weights.hub.load_model` lists them.
        """
        loaded = hub.load_model(
            path_or_hub_id,
            dtype=dtype,
            attention=attention,
            param_dtype=None,  # cast one by one as they are placed
            revision=revision,
            variant=variant,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        text = loaded.text and dataclasses.replace(loaded.text, dtype=dtype)
        return cls(loaded.model, loaded.params, text, dtype=dtype, fold=fold)

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
          key: of the initial latents, E per picture and the same for each, so that a picture's
            depth does not depend on its place in a list; default `jax.random.key(0)`.
          latents: the initial latents [N*E,h,w,C], image-major. Default: zeros for a model of one
            step, else drawn from `key`.
          output_uncertainty, output_latent: fill those fields of the output.

        Raises:
          ValueError: what `check` refuses, pictures of different sizes or unusable ones (all are
            named), latents of another shape.
        """
        self.check(
            processing_resolution=processing_resolution,
            num_inference_steps=num_inference_steps,
            ensemble_size=ensemble_size,
            batch_size=batch_size,
            key=key,
            latents=latents,
            output_uncertainty=output_uncertainty,
        )
        steps = _given(num_inference_steps, self.model.denoising_steps)
        resolution = _given(processing_resolution, self.model.processing_resolution)
        pictures = picture_arrays.as_arrays(images)
        size = pictures[0].shape[:2]
        inner = image_lib.processing_size(*size, resolution, self.model.processing_aspect)
        self._tell_of_other_shapes(size, inner)
        cells = tuple(-(-side // self.model.downsample) for side in inner)
        shape = len(pictures), ensemble_size, *cells, self.model.autoencoder.latent_channels
        initial = self._initial_latents(shape, latents, key)
        encoded = -(-batch_size // ensemble_size)  # pictures whose members fill a call
        model, params = self.networks(steps, latents)
        # Bytes are a quarter of what is to be copied, and the device makes numbers of them faster.
        as_bytes = inner == size and all(each.dtype == np.uint8 for each in pictures)
        program = functools.partial(_program, model, self.mesh)
        encode = program((encoded, *cells), _encode_bytes if as_bytes else inference.encode_image)
        predict = program((batch_size, *cells), inference.predict_depth, steps)

        def prepared(picture):
            if not as_bytes:
                picture = image_lib.resize(_to_signed(picture), inner, antialias=True)
            return image_lib.pad_to_multiple(picture, self.model.downsample)[0]

        def put(part, count=batch_size):
            return self._put(part[np.arange(count).clip(max=len(part) - 1)])

        rgb = _in_batches(
            lambda part: encode(params, put(np.stack([prepared(p) for p in part]), encoded)),
            encoded,
            pictures,
        )
        prediction, latent = _in_batches(
            lambda *part: predict(params, *map(put, part)),
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
            if not match_input_resolution or inner == size:
                return np.ascontiguousarray(maps)  # what was padded is cut off
            return np.stack([image_lib.resize(each, size, antialias=False) for each in maps])

        return DepthOutput(
            finished(prediction),
            self.model.prediction_type,
            finished(uncertainty) if output_uncertainty else None,
            latent if output_latent else None,
        )

    def check(
        self,
        *,
        processing_resolution: int | None = None,
        num_inference_steps: int | None = None,
        ensemble_size: int = 1,
        batch_size: int = 1,
        key: jax.Array | None = None,
        latents: np.ndarray | None = None,
        output_uncertainty: bool = False,
    ) -> None:
        """Holds the arguments of a call against the model, before there is any picture.

        What is unusual about them is logged, once per model. Raises ValueError with everything
        that no picture could be predicted with: no default of the model's to fall back on, counts
        out of range, an ensemble whose members would be equal, a schedule that has no z0.
        """
        schedule = self.model.schedule
        steps = _given(num_inference_steps, self.model.denoising_steps)
        resolution = _given(processing_resolution, self.model.processing_resolution)
        zeros = latents is None and self.model.from_zeros
        problems, last = [], schedule.num_train_timesteps - 1
        latents_enter = True
        if steps is None:
            problems.append(
                "the model names no default number of steps: give num_inference_steps (--steps)"
            )
        elif not 1 <= steps <= last + 1:
            problems.append(f"num_inference_steps must be in 1..{last + 1}, not {steps}")
        else:
            try:
                first = schedule.timesteps(steps)[0]
                # The timestep of several steps is an array's, which may have any value.
                start = first if steps == 1 else last
                alone = float(schedule.z0(0.0, 1.0, start))  # what a latent adds by itself
                latents_enter = self.model.takes_depth or steps != 1 or abs(alone) > 1e-6
            except ValueError as error:
                problems.append(str(error))
        if resolution is None:
            problems.append(
                "the model names no default resolution: give processing_resolution (0: the"
                " picture's own)"
            )
        elif resolution < 0:
            problems.append(f"processing_resolution must be at least 0, not {resolution}")
        for name, count in {"batch_size": batch_size, "ensemble_size": ensemble_size}.items():
            if count < 1:
                problems.append(f"{name} must be at least 1, not {count}")
        folded_for = latents is None and self.model.one_step_from_zero(steps)
        if self.model.folding.of_one_step and not folded_for:
            problems.append(
                "the model is folded for one step from zero latents: for others make the pipeline"
                " of what it was folded from"
            )
        if output_uncertainty and ensemble_size < 3:  # of two the median deviation is 0
            problems.append("output_uncertainty compares members: set ensemble_size to 3 or more")
        if ensemble_size > 1 and (zeros or not latents_enter):
            why = "starts from zero latents" if latents_enter else "does not see latents"
            or_else = ", or pass different `latents`" if latents_enter else ""
            problems.append(
                f"the model {why}, so all members of an ensemble would be equal: set ensemble_size"
                f" to 1{or_else}"
            )
        if problems:
            raise ValueError("\n".join(problems))

        if zeros:
            _tell(self.model, logging.INFO, "the model starts from zero latents")
        if latents is not None and not latents_enter:
            _tell(self.model, logging.WARNING, "`latents` have no effect: the model sees none")
        if key is not None and (zeros or latents is not None):
            _tell(self.model, logging.WARNING, "the seed (`key`) has no effect: nothing is drawn")
        if zeros and steps > 1 and self.model.denoising_steps == 1:
            notice = f"{steps} steps from zero latents: the model was made for one"
            _tell(self.model, logging.WARNING, notice)
        if doubt := schedule.doubt(steps):
            _tell(self.model, logging.WARNING, doubt)
        if ensemble_size == 2:
            notice = "an ensemble of 2 is hardly better than 1, its median is the smaller: take 3"
            _tell(self.model, logging.WARNING, notice)

    def _tell_of_other_shapes(self, size: tuple[int, int], inner: tuple[int, int]) -> None:
        """Logs it, once per model, where a model of one shape is to see another, or hardly its own.

        size: of the pictures (height, width); inner: of what the networks see.
        """
        aspect, longest = self.model.processing_aspect, self.model.processing_resolution
        if None in (aspect, longest):
            return
        height, width = size
        notice = f"the model was trained on pictures squeezed to {aspect:.3g}:1, {longest} long"
        if inner != image_lib.processing_size(*inner, longest, aspect):
            _tell(self.model, logging.WARNING, f"{notice}: it is given others")
        elif not SQUEEZED[0] <= width / height / aspect <= SQUEEZED[1]:
            notice += ", and others are squeezed to that: expect less of the map where a picture is"
            _tell(self.model, logging.WARNING, f"{notice} very narrow or wide, or cut it")

    def networks(self, num_inference_steps: int, latents=None) -> tuple[DepthModel, Params]:
        """What a call with these arguments computes with: the model, and parameters on the devices.

        Folded, unless `fold` is off: for one step from zero latents, or for any steps and latents.
        Unchanged arrays are shared.
        """
        if not self.fold:
            return self.model, self.params
        single_step = latents is None and self.model.one_step_from_zero(num_inference_steps)
        if single_step not in self._variants:
            pieces = fold.foldable(self.model, single_step=single_step)
            model, params = fold.fold(self.model, self.params, pieces)
            self._variants[single_step] = model, sharding.put_params(params, self.mesh)
        return self._variants[single_step]

    def _initial_latents(self, shape: tuple[int, ...], latents, key) -> np.ndarray:
        """[N*E,h,w,C] for `shape` (N,E,h,w,C)."""
        flat = shape[0] * shape[1], *shape[2:]
        if latents is not None:
            latents = np.asarray(latents, np.float32)
            if latents.shape != flat:
                raise ValueError(
                    f"latents have shape {list(latents.shape)}, expected {list(flat)}: [pictures *"
                    " ensemble_size, h, w, C] (channels last)"
                )
            return latents
        if self.model.from_zeros:
            return np.zeros(flat, np.float32)
        members = jax.random.normal(jax.random.key(0) if key is None else key, shape[1:])
        return np.broadcast_to(members, shape).reshape(flat)

    def _put(self, array: np.ndarray) -> jax.Array:
        if len(array) % self.mesh.size == 0:
            return sharding.put_batch(array, self.mesh)
        return jax.device_put(array, sharding.replicated(self.mesh))


@functools.lru_cache(maxsize=16)
def _program(model: DepthModel, mesh, shape: tuple[int, int, int], function, *static):
    """A compiled function of its own per model and shape, so that the oldest ones can be dropped.

    `shape` [B,h,w] and `mesh` are there as the cache's key: jit itself would keep all for ever.
    """
    del mesh, shape
    program = jax.jit(lambda params, *arrays: function(model, params, *arrays, *static))

    def run(*arguments):
        if not program._cache_size():
            # Compiling leaves much memory behind: not to be held beside what running needs.
            program.lower(*arguments).compile()
            memory.give_back()
        return program(*arguments)

    return run


def _encode_bytes(model: DepthModel, params: Params, picture: jax.Array) -> jax.Array:
    """The latent of pictures uint8 [B,H,W,3]."""
    return inference.encode_image(model, params, inference.to_float(picture))


def _in_batches(function, batch_size: int, *arrays):
    """What the function gives for slices of at most `batch_size`, less what it filled them with."""
    results = []
    for begin in range(0, len(arrays[0]), batch_size):
        parts = [array[begin : begin + batch_size] for array in arrays]
        count = len(parts[0])
        results.append(jax.tree.map(lambda x: np.asarray(x)[:count], function(*parts)))  # noqa: B023
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


@functools.lru_cache(maxsize=64)
def _tell(model: DepthModel, level: int, message: str) -> None:
    """Logs what holds for every call only once: the cache remembers."""
    del model
    log.log(level, message)


def _given(value: int | None, default: int | None) -> int | None:
    return default if value is None else value


def _to_signed(picture: np.ndarray) -> np.ndarray:
    """To float32 [-1,1], the range of the encoders."""
    return image_lib.to_float(picture) if picture.dtype == np.uint8 else 2 * picture - 1
