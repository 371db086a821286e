"""model_index.json of a model directory: what a pipeline's class and settings mean here."""

import logging
import math
import pathlib
from collections.abc import Mapping

from d3epth_jax.alignment import SPACES
from d3epth_jax.models.config import AutoencoderKLConfig, TinyAutoencoderConfig
from d3epth_jax.models.depth_model import DepthModel
from d3epth_jax.weights import download

log = logging.getLogger(__name__)

AUTOENCODERS = {"AutoencoderKL": AutoencoderKLConfig, "AutoencoderTiny": TinyAutoencoderConfig}
WRITTEN = "written by `d3epth_jax`"  # in our model cards alone
DEPTH_PIPELINES = ("MarigoldDepthPipeline", "MarigoldPipeline")  # the second: Marigold's v1-0


def read(index: Mapping) -> tuple[str, dict]:
    """(pipeline class, fields of DepthModel) of a model_index.json."""
    kind = index.get("_class_name")
    kind = kind[-1] if isinstance(kind, list) and kind else kind  # of a pipeline with its own code
    meaning = {
        "prediction_type": index.get("prediction_type") or "depth",
        "processing_resolution": index.get("default_processing_resolution"),
        "processing_aspect": index.get("processing_aspect"),
        "denoising_steps": index.get("default_denoising_steps"),
        "starts_at_zero": index.get("initial_latent") == "zeros",
        "prompt_padding": index.get("prompt_padding") or "do_not_pad",
        "base": index.get("base_model") or "",
    }
    problems = [
        f"{name} is false: predictions here are up to a scale and a shift"
        for name in ("scale_invariant", "shift_invariant")
        if kind in DEPTH_PIPELINES and index.get(name) is False
    ]
    for name, least in (("processing_resolution", 0), ("denoising_steps", 1)):
        value = meaning[name]
        if value is not None and (type(value) is not int or value < least):
            problems.append(f"default_{name} {value!r} is no integer of at least {least}")
    aspect = meaning["processing_aspect"]
    if aspect is not None and (type(aspect) not in (int, float) or not 0 < aspect < math.inf):
        problems.append(f"processing_aspect {aspect!r} is no width over height")
    if kind in DEPTH_PIPELINES and meaning["prediction_type"] not in SPACES:
        space = meaning["prediction_type"]
        problems.append(f"prediction_type {space!r} is not one of {', '.join(SPACES)}")
    if problems:
        raise ValueError("; ".join(problems))
    return str(kind), meaning


def may_be_e2e_ft(kind: str, takes_depth: bool, timestep_spacing: str) -> bool:
    """Whether it is as E2E-FT's training saves: the class that it started from, and no word of use.

    takes_depth: the UNet has the channels of two latents.
    """
    return kind == "StableDiffusionPipeline" and takes_depth and timestep_spacing == "trailing"


def e2e_ft(directory: pathlib.Path) -> tuple[str, dict]:
    """(pipeline class, fields of DepthModel) of such a directory; ValueError if it is of normals.

    The same code trains models of normals, with the same JSON: only its arguments.txt, if it is
    there, tells which.
    """
    path = directory / "arguments.txt"
    given = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    modality = dict(line.split(": ", 1) for line in given.splitlines() if ": " in line).get(
        "modality"
    )
    if modality not in (None, "depth"):
        raise ValueError(f"{path}: this model was trained for {modality}, not for depth")
    log.log(
        logging.INFO if modality else logging.WARNING,
        "%s says nothing of its use; it is used as E2E-FT: one step from zero latents, at 768"
        " pixels%s",
        directory,
        "" if modality else "; that it predicts depth, not normals, is assumed",
    )
    use = {"denoising_steps": 1, "starts_at_zero": True, "processing_resolution": 768}
    return DEPTH_PIPELINES[0], use


def write(model: DepthModel, with_text: bool) -> dict:
    kind = {cls: name for name, cls in AUTOENCODERS.items()}[type(model.autoencoder)]
    return {
        "_class_name": DEPTH_PIPELINES[0],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", kind],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"] if with_text else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"] if with_text else [None, None],
        "prediction_type": model.prediction_type,
        "scale_invariant": True,
        "shift_invariant": True,
        "default_denoising_steps": model.denoising_steps,
        "default_processing_resolution": model.processing_resolution,
        "prompt_padding": model.prompt_padding,
        **({"processing_aspect": model.processing_aspect} if model.processing_aspect else {}),
        **({"initial_latent": "zeros"} if model.starts_at_zero else {}),
        "base_model": model.base,
    }


def card(model: DepthModel) -> str:
    """README.md of a saved model: what it is, what it came from, how to use it."""
    name = model.base.split("@")[0]
    base = f"base_model: {name}\n" if download.is_hub_id(name) else ""
    origin = (
        f"It was made from `{model.base}`; the licence of those weights applies to these."
        if model.base
        else "It was trained from random weights."
    )
    return f"""---
library_name: d3epth_jax
pipeline_tag: depth-estimation
{base}---
A monocular depth model {WRITTEN}. {origin}

```python
import d3epth_jax

pipe = d3epth_jax.DepthPipeline.from_pretrained("THIS DIRECTORY OR HUB ID")
depth = pipe("photo.jpg").prediction  # float32 [1,H,W,1] in [0,1]
```

Its output is {model.prediction_type}, up to scale and shift: not metres. Default processing \
resolution {model.processing_resolution or "of the picture"}, {model.denoising_steps} step(s).
"""
