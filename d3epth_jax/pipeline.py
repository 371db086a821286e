"""From pictures to depth maps: the model with its pre- and post-processing."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import numpy as np

from d3epth_jax import image as image_lib
from d3epth_jax import inference, sharding
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.typing import Params
from d3epth_jax.weights import hub


@dataclasses.dataclass(frozen=True)
class DepthOutput:
    """Depth maps of N pictures.

    Attributes:
      prediction: float32 [N,H,W,1] in [0,1], up to scale and shift.
      prediction_type: "depth" grows with distance; "disparity" and "sqrt_disparity" fall.
    """

    prediction: np.ndarray
    prediction_type: str


class DepthPipeline:
    """Predicts depth: `DepthPipeline.from_pretrained(directory)("photo.jpg").prediction`."""

    def __init__(self, model: DepthModel, params: Params, *, mesh: jax.sharding.Mesh | None = None):
        """`mesh`: spread batches over these devices; else everything runs on the first one."""
        self.model = model
        self.mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
        self.params = sharding.put_params(params, self.mesh)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, *, dtype: str = "float32"):
        """Reads a directory in diffusers' layout (weights/hub.py)."""
        return cls(*hub.load_model(directory, dtype=dtype))

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        hub.save_model(directory, self.model, self.params)

    def __call__(
        self,
        images,
        *,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        batch_size: int = 1,
    ) -> DepthOutput:
        """Depth of one picture or of a list of pictures of one size.

        Args:
          images: a path or an array uint8 [H,W,3], a list of these, or an array [N,H,W,3].
          processing_resolution: longest side the networks see; 0 the picture's own, None the
            model's default. Smaller pictures are enlarged.
          match_input_resolution: resize the result to the picture's size.
          batch_size: pictures per call of the networks.

        Raises:
          ValueError: pictures of different sizes (the error names them), no picture at all.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, it is {batch_size}")
        pictures = _as_list(images)
        if processing_resolution is None:
            processing_resolution = self.model.processing_resolution
        size = pictures[0].shape[:2]
        inner = size
        if processing_resolution:
            inner = image_lib.processing_size(*size, processing_resolution)

        predictions = []
        for begin in range(0, len(pictures), batch_size):
            part = [image_lib.to_float(picture) for picture in pictures[begin : begin + batch_size]]
            if inner != size:
                part = [image_lib.resize(picture, inner, antialias=True) for picture in part]
            part = [image_lib.pad_to_multiple(p, self.model.downsample)[0] for p in part]
            depth = self._run(np.stack(part + [part[-1]] * (batch_size - len(part))))
            predictions.append(depth[: len(part), : inner[0], : inner[1]])
        prediction = np.concatenate(predictions)
        if match_input_resolution and inner != size:
            prediction = np.stack([image_lib.resize(p, size, antialias=False) for p in prediction])
        return DepthOutput(prediction, self.model.prediction_type)

    def _run(self, images: np.ndarray) -> np.ndarray:
        if len(images) % self.mesh.size == 0:
            images = sharding.put_batch({"image": images}, self.mesh)["image"]
        return np.asarray(_predict(self.model, self.params, images))


@functools.partial(jax.jit, static_argnums=0)
def _predict(model: DepthModel, params: Params, images: jax.Array) -> jax.Array:
    return inference.predict_depth(model, params, images)


def _as_list(images) -> list[np.ndarray]:
    if isinstance(images, str | os.PathLike) or (
        isinstance(images, np.ndarray) and images.ndim == 3
    ):
        images = [images]
    if not isinstance(images, Sequence | np.ndarray) or not len(images):
        raise ValueError("no picture given: a path, an array uint8 [H,W,3], or a list of these")
    pictures = [
        image_lib.load(x) if isinstance(x, str | os.PathLike) else np.asarray(x) for x in images
    ]
    wrong = [
        f"number {i}: {p.dtype} {list(p.shape)}"
        for i, p in enumerate(pictures)
        if p.dtype != np.uint8
        or p.ndim != 3
        or p.shape[-1] != 3
        or p.shape[:2] != pictures[0].shape[:2]
    ]
    if wrong:
        raise ValueError(
            f"pictures must be uint8 [H,W,3] of one size, the first's {list(pictures[0].shape)};"
            f" not so: {'; '.join(wrong)}"
        )
    return pictures
