"""Models in diffusers' layout, in a directory or on the Hugging Face hub: JSON beside safetensors.

unet/config.json, diffusion_pytorch_model.safetensors      UNet2DConditionModel
vae/config.json, diffusion_pytorch_model.safetensors       AutoencoderKL or AutoencoderTiny
scheduler/scheduler_config.json                            DDIMScheduler
text_encoder/config.json, model.safetensors, tokenizer/    CLIPTextModel: the empty prompt, or else
empty_prompt.safetensors                                   its embedding [N,D]
model_index.json                                           what the output means
"""

import hashlib
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from d3epth_jax.alignment import SPACES
from d3epth_jax.models.config import AutoencoderKLConfig, TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.depth_model import DepthModel, abstract_autoencoder, abstract_params
from d3epth_jax.schedule import NoiseSchedule
from d3epth_jax.typing import Params
from d3epth_jax.weights import convert, files, keys, prompt
from d3epth_jax.weights.prompt import PromptEncoder

log = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"
PROMPT = "empty_prompt.safetensors"
COMPONENTS = {"unet": STEM, "vae": STEM, "text_encoder": prompt.STEM}  # folder -> weights' name
AUTOENCODERS = {"AutoencoderKL": AutoencoderKLConfig, "AutoencoderTiny": TinyAutoencoderConfig}
DEPTH_PIPELINES = ("MarigoldDepthPipeline", "MarigoldPipeline")  # the second: Marigold's v1-0
_NEEDED = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)


class Loaded(NamedTuple):
    model: DepthModel
    params: Params  # {unet, encoder, decoder[, prompt]}, NumPy arrays
    text: PromptEncoder | None  # None: the directory has the prompt's embedding alone, or no prompt
    predicts_depth: bool  # False: a plain Stable Diffusion


def load_model(
    path_or_hub_id: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str | None = "float32",
    remat: bool = False,
    any_pipeline: bool = False,
    variant: str | None = None,
    **where,
) -> Loaded:
    """Reads a model from a directory or from the hub.

    Args:
      dtype, remat: of the computation (DepthModel).
      param_dtype: of the parameters; None keeps each file's own.
      any_pipeline: also read a Stable Diffusion, which predicts no depth yet: a training's start.
      variant: "fp16" reads `*.fp16.safetensors`.
      where: revision, subfolder, cache_dir, token, local_files_only (`locate`).

    Raises:
      FileNotFoundError: no such directory or hub id; files that are missing, all of them.
      ValueError: settings this project does not compute; keys and shapes that do not fit, all of
        them; a pickle instead of safetensors; a model that does not predict depth.
    """
    directory = locate(path_or_hub_id, variant=variant, **where)
    if missing := [name for name in _NEEDED if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory} is not a model directory in diffusers' layout; missing: {missing}"
        )
    index = files.read_json(directory / "model_index.json")
    _check_meaning(path_or_hub_id, index, any_pipeline)
    vae = files.read_json(directory / "vae/config.json")
    autoencoder = vae.get("_class_name", "AutoencoderKL")
    if autoencoder not in AUTOENCODERS:
        raise ValueError(
            f"{directory}/vae is a {autoencoder}: {' and '.join(AUTOENCODERS)} are read"
        )
    schedule = NoiseSchedule.from_dict(
        files.read_json(directory / "scheduler/scheduler_config.json")
    )
    model = DepthModel(
        unet=UNetConfig.from_dict(files.read_json(directory / "unet/config.json")),
        autoencoder=AUTOENCODERS[autoencoder].from_dict(vae),
        schedule=schedule,
        timestep=int(schedule.timesteps(1)[0]),
        prediction_type=index.get("prediction_type") or "depth",
        processing_resolution=index.get("default_processing_resolution") or 0,
        denoising_steps=index.get("default_denoising_steps"),
        starts_at_zero=index.get("initial_latent") == "zeros",
        prompt_padding=index.get("prompt_padding") or "do_not_pad",
        base=index.get("base_model", str(path_or_hub_id)),
        dtype=dtype,
        remat=remat,
    )
    shapes = abstract_params(model)
    autoencoder = {part: shapes[part] for part in ("encoder", "decoder")}
    read = _read_trees(
        directory, {"unet": shapes["unet"], "vae": autoencoder}, variant, param_dtype
    )
    params = {"unet": read["unet"], **read["vae"]}
    text = None
    if (directory / "text_encoder/config.json").is_file():
        text = prompt.read(directory, variant=variant)
    if model.unet.needs_prompt:
        params["prompt"] = _read_prompt(directory, model, text)
    return Loaded(model, params, text, index.get("_class_name") in DEPTH_PIPELINES)


def save_model(
    directory: str | os.PathLike,
    model: DepthModel,
    params: Params,
    text: PromptEncoder | None = None,
    *,
    dtype: Any = None,
    variant: str | None = None,
) -> None:
    """Writes a model directory; an old one is replaced only once the new one is complete.

    Every tensor comes from `params` and `text`, in its own type or in `dtype`. `variant` goes into
    the names of the weights' files ("fp16").
    """
    with files.fresh_directory(directory) as fresh:
        files.write_json(fresh / "model_index.json", _index(model, text))
        files.write_json(fresh / "unet/config.json", model.unet.to_dict())
        files.write_json(fresh / "vae/config.json", model.autoencoder.to_dict())
        files.write_json(fresh / "scheduler/scheduler_config.json", model.schedule.to_dict())
        trees = {
            "unet": params["unet"],
            "vae": {name: params[name] for name in ("encoder", "decoder")},
        }
        for folder, tree in trees.items():
            tensors = convert.to_torch(tree, dtype=dtype)
            files.write(fresh / folder / files.single_name(STEM, variant), tensors)
        if "prompt" in params:
            files.write(fresh / PROMPT, {"prompt": np.asarray(params["prompt"][0], np.float32)})
        if text is not None:
            text.save(fresh, dtype=dtype, variant=variant)
        (fresh / "README.md").write_text(_model_card(model))


def load_autoencoder(path_or_hub_id: str | os.PathLike, **where) -> tuple[Any, Params]:
    """An autoencoder alone: (config, {encoder, decoder} in float32).

    Reads diffusers' layout (config.json beside the weights, or in vae/), and upstream TAESD's two
    files, taesd_encoder.safetensors and taesd_decoder.safetensors. Errors as `load_model`.
    """
    directory = locate(path_or_hub_id, **where)
    names = [f"taesd_{part}.safetensors" for part in ("encoder", "decoder")]
    if all((directory / name).is_file() for name in names):
        config = TinyAutoencoderConfig()
        tensors = convert.taesd_to_diffusers(*(files.read(directory / name) for name in names))
    else:
        if (directory / "vae/config.json").is_file():
            directory = directory / "vae"
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory}: neither config.json nor {' and '.join(names)}")
        content = files.read_json(directory / "config.json")
        kind = content.get("_class_name", "AutoencoderKL")
        if kind not in AUTOENCODERS:
            raise ValueError(f"{directory} is a {kind}: {' and '.join(AUTOENCODERS)} are read")
        config = AUTOENCODERS[kind].from_dict(content)
        tensors = keys.modern_names(files.read_folder(directory, STEM), keys.AUTOENCODER_AGES)
    return config, convert.from_torch(tensors, abstract_autoencoder(config), dtype=np.float32)


def locate(
    path_or_hub_id: str | os.PathLike,
    *,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> pathlib.Path:
    """The directory of a model: a local one, or a download of the hub's, from its cache if there.

    Only JSON, tokenizer files and the safetensors that will be read are downloaded. Raises
    FileNotFoundError that says what was looked for, and ValueError for a subfolder outside.
    """
    if subfolder and (os.path.isabs(subfolder) or ".." in pathlib.PurePath(subfolder).parts):
        raise ValueError(f"subfolder {subfolder!r} must stay inside the model")
    directory = pathlib.Path(path_or_hub_id)
    if not directory.is_dir():
        name = str(path_or_hub_id)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
            raise FileNotFoundError(f"{name} is no directory, and no hub id OWNER/NAME either")
        options = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        directory = _download(name, subfolder or "", variant, options)
    return directory / (subfolder or "")


def digest(path: str | os.PathLike) -> str:
    """Of a local model's weights, so that a path's model can be recognised; "" for none there."""
    hashes = hashlib.sha256()
    for weights in sorted(pathlib.Path(path).rglob("*.safetensors")):
        with weights.open("rb") as file:
            hashes.update(hashlib.file_digest(file, "sha256").digest())
    return hashes.hexdigest() if pathlib.Path(path).is_dir() else ""


def push(
    repo_id: str, save: Callable[[str], None], *, token: str | None, private: bool | None
) -> str:
    """Uploads what `save(directory)` writes to a repository of the hub, and returns its address."""
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as parent:
        directory = os.path.join(parent, "model")
        save(directory)
        api.upload_folder(repo_id=repo_id, folder_path=directory)
    return str(url)


def _download(name: str, subfolder: str, variant: str | None, options: Mapping) -> pathlib.Path:
    import huggingface_hub  # half a second, and only needed here
    from huggingface_hub import errors

    root = f"{subfolder}/" if subfolder else ""
    texts = ["model_index.json", "config.json", "*/*.json", "tokenizer/merges.txt"]
    texts += ["empty_prompt.safetensors", "taesd_*.safetensors"]

    def fetch(patterns) -> pathlib.Path:
        patterns = [root + pattern for pattern in patterns]
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=patterns, **options)
        )

    def weights(folders: Mapping[str, str], part: str) -> list[str]:
        return [f"{f}/{stem}{part}{end}" for f, stem in folders.items() for end in _ENDS]

    try:
        directory = fetch([*texts, *weights(COMPONENTS, f".{variant}" if variant else "")])
        if variant:
            # A component without that variant comes in its plain form.
            plain = {
                folder: stem
                for folder, stem in COMPONENTS.items()
                if not files.has_weights(directory / root / folder, stem, variant)
            }
            directory = fetch([*texts, *weights(plain, "")]) if plain else directory
        return directory
    except errors.GatedRepoError as error:
        why = "its licence must be accepted on its page first, by the owner of your token"
        raise FileNotFoundError(f"hub model {name}: {why}") from error
    except errors.RevisionNotFoundError as error:
        why = f"it has no revision {options['revision']}"
        raise FileNotFoundError(f"hub model {name}: {why}") from error
    except errors.RepositoryNotFoundError as error:
        why = "there is no such model, or it is private and your token does not open it"
        raise FileNotFoundError(f"hub model {name}: {why}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        where = options["cache_dir"] or "the hub's cache"
        raise FileNotFoundError(
            f"hub model {name} is not in {where} and cannot be fetched: no network, or offline mode"
        ) from error


_ENDS = (".safetensors", "-?????-of-?????.safetensors")


def _check_meaning(path, index: Mapping, any_pipeline: bool) -> None:
    kind = index.get("_class_name")
    if not any_pipeline and kind not in DEPTH_PIPELINES:
        raise ValueError(
            f"{path} is a {kind}, which predicts no depth. To train a depth model from it:"
            f" python -m d3epth_jax.main --config=configs/d2.py --config.init={path}"
        )
    space = index.get("prediction_type") or "depth"
    if kind in DEPTH_PIPELINES and space not in SPACES:
        raise ValueError(f"{path}: prediction_type {space!r} is not one of {', '.join(SPACES)}")


def _read_trees(directory, trees: Mapping, variant, dtype) -> dict[str, Params]:
    """Each folder's tensors as its tree; what is wrong with any of them in one error."""
    read, problems, missing = {}, [], True
    for folder, tree in trees.items():
        try:
            tensors = files.read_folder(directory / folder, STEM, variant=variant)
            if folder == "vae":
                tensors = keys.modern_names(tensors, keys.AUTOENCODER_AGES)
            read[folder] = convert.from_torch(tensors, tree, dtype=dtype)
        except (FileNotFoundError, ValueError) as error:
            missing &= isinstance(error, FileNotFoundError)
            problems.append(f"{directory / folder}: {error}")
    if problems:
        raise (FileNotFoundError if missing else ValueError)("\n".join(problems))
    return read


def _read_prompt(directory: pathlib.Path, model: DepthModel, text) -> np.ndarray:
    path = directory / PROMPT
    if path.is_file():
        embedding = files.read(path).get("prompt")
        if embedding is None or embedding.ndim != 2:
            raise ValueError(f"{path} must hold one tensor `prompt` [N,D]")
        embedding = embedding.astype(np.float32)[None]
    elif text is not None:
        embedding = prompt.empty_prompt(text, directory, model.prompt_padding)
    else:
        raise FileNotFoundError(
            f"{directory} has neither text_encoder/ nor {PROMPT}: this UNet attends to text and"
            " needs the embedding of the empty prompt"
        )
    if embedding.shape[-1] != model.unet.cross_attention_dim:
        raise ValueError(
            f"{directory}: the prompt's embedding has {embedding.shape[-1]} channels, the UNet's"
            f" cross_attention_dim is {model.unet.cross_attention_dim}"
        )
    return embedding


def _index(model: DepthModel, text: PromptEncoder | None) -> dict:
    kind = {cls: name for name, cls in AUTOENCODERS.items()}[type(model.autoencoder)]
    return {
        "_class_name": DEPTH_PIPELINES[0],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", kind],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"] if text else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"] if text else [None, None],
        "prediction_type": model.prediction_type,
        "scale_invariant": True,
        "shift_invariant": True,
        "default_denoising_steps": model.denoising_steps,
        "default_processing_resolution": model.processing_resolution,
        "prompt_padding": model.prompt_padding,
        **({"initial_latent": "zeros"} if model.starts_at_zero else {}),
        "base_model": model.base,
    }


def _model_card(model: DepthModel) -> str:
    """README.md of a saved model: what it is, what it came from, how to use it."""
    base = f"base_model: {model.base}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", model.base) else ""
    origin = (
        f"It was made from `{model.base}`; the licence of those weights applies to these."
        if model.base
        else "It was trained from random weights."
    )
    return f"""---
library_name: d3epth_jax
pipeline_tag: depth-estimation
{base}---
A monocular depth model written by [d3epth_jax](https://pypi.org/project/d3epth-jax). {origin}

```python
import d3epth_jax

pipe = d3epth_jax.DepthPipeline.from_pretrained("THIS DIRECTORY OR HUB ID")
depth = pipe("photo.jpg").prediction  # float32 [1,H,W,1] in [0,1]
```

Its output is {model.prediction_type}, up to scale and shift: not metres. Default processing \
resolution {model.processing_resolution or "of the picture"}, {model.denoising_steps} step(s).
"""
