"""Models as directories in diffusers' layout: JSON beside safetensors, one folder a component.

unet/config.json, diffusion_pytorch_model.safetensors      UNet2DConditionModel
vae/config.json, diffusion_pytorch_model.safetensors       AutoencoderTiny
scheduler/scheduler_config.json                            DDIMScheduler
model_index.json                                           what the output means
empty_prompt.safetensors                                   embedding of the empty prompt [N,D]
"""

import json
import logging
import os
import pathlib
import shutil
import tempfile

import numpy as np

from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.depth_model import DepthModel, abstract_params
from d3epth_jax.schedule import NoiseSchedule
from d3epth_jax.typing import Params
from d3epth_jax.weights import convert

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"
_FILES = (
    "model_index.json",
    "unet/config.json",
    f"unet/{WEIGHTS}",
    "vae/config.json",
    f"vae/{WEIGHTS}",
    "scheduler/scheduler_config.json",
)


def save_model(directory: str | os.PathLike, model: DepthModel, params: Params) -> None:
    """Writes a model directory; an old one is replaced only once the new one is complete."""
    directory = pathlib.Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    params = {
        name: params[name] for name in ("unet", "encoder", "decoder", "prompt") if name in params
    }
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_json(fresh / "model_index.json", _index(model))
        _write_json(fresh / "unet/config.json", model.unet.to_dict())
        _write_json(fresh / "vae/config.json", model.autoencoder.to_dict())
        _write_json(fresh / "scheduler/scheduler_config.json", model.schedule.to_dict())
        convert.write_safetensors(fresh / "unet" / WEIGHTS, convert.to_torch(params["unet"]))
        autoencoder = convert.to_torch({part: params[part] for part in ("encoder", "decoder")})
        convert.write_safetensors(fresh / "vae" / WEIGHTS, autoencoder)
        if "prompt" in params:
            prompt = {"prompt": np.asarray(params["prompt"][0])}
            convert.write_safetensors(fresh / "empty_prompt.safetensors", prompt)
        fresh.chmod(0o755)
        if directory.exists():
            old = fresh.with_name(f"{fresh.name}.old")
            directory.rename(old)
            fresh.rename(directory)
            shutil.rmtree(old)
        else:
            fresh.rename(directory)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def load_model(
    directory: str | os.PathLike, *, dtype: str = "float32", remat: bool = False
) -> tuple[DepthModel, Params]:
    """Reads a model directory; parameters are NumPy arrays in float32.

    Raises:
      FileNotFoundError: files that are missing, all of them.
      ValueError: settings this project does not compute, or keys and shapes that do not fit.
    """
    directory = pathlib.Path(directory)
    if missing := [name for name in _FILES if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory} is not a model directory in diffusers' layout; missing: {missing}"
        )
    index = json.loads((directory / "model_index.json").read_text())
    vae = json.loads((directory / "vae/config.json").read_text())
    if vae.get("_class_name") != "AutoencoderTiny":
        raise ValueError(
            f"{directory}/vae is a {vae.get('_class_name')}: so far only AutoencoderTiny is read"
        )
    steps = index.get("default_denoising_steps") or 1
    if steps != 1:
        raise ValueError(
            f"{directory}/model_index.json asks for {steps} denoising steps: so far only models of"
            " one step are run"
        )
    schedule = NoiseSchedule.from_dict(
        json.loads((directory / "scheduler/scheduler_config.json").read_text())
    )
    timestep = int(schedule.timesteps(1)[0])
    if timestep != schedule.num_train_timesteps - 1:
        log.warning(
            "%s: its scheduler's one step is at t = %d, not the last (timestep_spacing %s)",
            directory,
            timestep,
            schedule.timestep_spacing,
        )
    model = DepthModel(
        unet=UNetConfig.from_dict(json.loads((directory / "unet/config.json").read_text())),
        autoencoder=TinyAutoencoderConfig.from_dict(vae),
        schedule=schedule,
        timestep=timestep,
        prediction_type=index.get("prediction_type", "depth"),
        processing_resolution=index.get("default_processing_resolution") or 0,
        dtype=dtype,
        remat=remat,
    )
    shapes = abstract_params(model)
    autoencoder = {part: shapes[part] for part in ("encoder", "decoder")}
    trees = {"unet": shapes["unet"], "vae": autoencoder}
    read = {}
    for folder, tree in trees.items():
        path = directory / folder / WEIGHTS
        try:
            tensors = convert.read_safetensors(path)
            read[folder] = convert.from_torch(tensors, tree, dtype=np.float32)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    params = {"unet": read["unet"], **read["vae"]}
    if "prompt" in shapes:
        path = directory / "empty_prompt.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: this UNet attends to text, so it needs the embedding of the"
                " empty prompt, a tensor `prompt` [N,D]"
            )
        params["prompt"] = convert.read_safetensors(path)["prompt"].astype(np.float32)[None]
    return model, params


def _index(model: DepthModel) -> dict:
    return {
        "_class_name": "MarigoldDepthPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "prediction_type": model.prediction_type,
        "scale_invariant": True,
        "shift_invariant": True,
        "default_denoising_steps": 1,
        "default_processing_resolution": model.processing_resolution,
    }


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
