"""Models in diffusers' layout, in a directory or on the Hugging Face hub: JSON beside safetensors.

unet/config.json, diffusion_pytorch_model.safetensors      UNet2DConditionModel
vae/config.json, diffusion_pytorch_model.safetensors       AutoencoderKL or AutoencoderTiny
scheduler/scheduler_config.json                            DDIMScheduler
text_encoder/config.json, model.safetensors, tokenizer/    CLIPTextModel: the empty prompt, or else
empty_prompt.safetensors                                   its embedding [N,D]
model_index.json                                           what the output means
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from d3epth_jax import atomic, checkpoint
from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.models.depth_model import DepthModel, abstract_autoencoder, abstract_params
from d3epth_jax.models.folding import NOT_FOLDED
from d3epth_jax.schedule import NoiseSchedule
from d3epth_jax.typing import Params
from d3epth_jax.weights import convert, download, files, keys, model_index, prompt
from d3epth_jax.weights.download import STEM, locate
from d3epth_jax.weights.prompt import PromptEncoder

log = logging.getLogger(__name__)

PROMPT = "empty_prompt.safetensors"
ORBAX = "orbax"  # the folder of {unet, encoder, decoder} in a model saved for JAX alone
_OURS = {
    *("model_index.json", "unet", "vae", "scheduler", "text_encoder", "tokenizer", "README.md"),
    *(PROMPT, ORBAX, "feature_extractor", "safety_checker", ".gitattributes"),
}
_KINDS = (".json", ".safetensors", ".bin")  # of the files in its folders
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
    attention: str = "auto",
    any_pipeline: bool = False,
    variant: str | None = None,
    **where,
) -> Loaded:
    """Reads a model from a directory or from the hub.

    Args:
      dtype, remat, attention: of the computation (DepthModel).
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
        bundled = str(path_or_hub_id) in download.BUNDLED
        hides = "; it hides the model of the package that is called so" if bundled else ""
        raise FileNotFoundError(
            f"{directory} is not a model directory in diffusers' layout{hides}; missing: {missing}"
        )
    model, kind = _read_settings(directory)
    predicts_depth = kind in model_index.DEPTH_PIPELINES
    if not (predicts_depth or any_pipeline):
        raise ValueError(
            f"{path_or_hub_id} is a {kind}, which is not read as a model that predicts depth. To"
            " train one from a Stable Diffusion: python -m d3epth_jax.main"
            f" --config=configs/d2.py --config.init={path_or_hub_id}"
        )
    base = model.base or _origin(path_or_hub_id, directory)
    computed = {"dtype": dtype, "remat": remat, "attention": attention}
    model = dataclasses.replace(model, base=base, **computed)
    params, text = _read_weights(directory, model, variant, param_dtype)
    if model.needs_prompt:
        params["prompt"] = _read_prompt(directory, model, text)
    return Loaded(model, params, text, predicts_depth)


def save_model(
    directory: str | os.PathLike,
    model: DepthModel,
    params: Params,
    text: PromptEncoder | None = None,
    *,
    dtype: Any = None,
    variant: str | None = None,
    layout: str = "diffusers",
) -> None:
    """Writes a model directory; an old one is replaced only once the new one is complete.

    A model card (README.md) that somebody else wrote there stays.
    Every tensor comes from `params` and `text`, in its own type or in `dtype`. `variant` goes into
    the names of the weights' files ("fp16"). `layout`: "orbax" writes {unet, encoder, decoder} as
    one Orbax tree beside the same JSON files, which `load_model` reads as well, but diffusers not.
    FileExistsError if the directory holds anything but a model, ValueError if `dtype` cannot hold
    the numbers of some tensors, for a variant that names no file, and for a folded model, which
    nothing reads.
    """
    require_replaceable(directory)
    if variant and layout == "orbax":
        raise ValueError(f"an Orbax tree has no variants such as {variant!r}")
    if variant and not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant {variant!r}: letters, digits, - and _ alone, for a file's name")
    if model.folding != NOT_FOLDED:
        raise ValueError("a folded model cannot be read again: save what it was folded from")
    vae = {name: params[name] for name in ("encoder", "decoder")}
    if dtype is not None:
        prompted = {"text_encoder": text.params} if text else {}
        convert.require_range({"unet": params["unet"], "vae": vae, **prompted}, dtype)
    with files.fresh_directory(directory) as fresh:
        atomic.write_json(fresh / "model_index.json", model_index.write(model, text is not None))
        atomic.write_json(fresh / "unet/config.json", model.unet.to_dict())
        atomic.write_json(fresh / "vae/config.json", model.autoencoder.to_dict())
        atomic.write_json(fresh / "scheduler/scheduler_config.json", model.schedule.to_dict())
        if layout == "orbax":
            trees = {"unet": params["unet"], **vae}
            checkpoint.save_tree(fresh / ORBAX, jax.tree.map(lambda x: np.asarray(x, dtype), trees))
        for folder, tree in {"unet": params["unet"], "vae": vae}.items():
            if layout == "diffusers":
                tensors = convert.to_torch(tree, dtype=dtype)
                files.write(fresh / folder / files.single_name(STEM, variant), tensors)
        if "prompt" in params:
            files.write(fresh / PROMPT, {"prompt": np.asarray(params["prompt"][0], np.float32)})
        if text is not None:
            text.save(fresh, dtype=dtype, variant=variant)
        (fresh / "README.md").write_bytes(_kept_card(directory) or model_index.card(model).encode())


def _kept_card(directory: str | os.PathLike) -> bytes:
    """The model card there that we did not write, which stays; empty if there is none."""
    card = pathlib.Path(directory) / "README.md"
    text = card.read_bytes() if card.is_file() else b""
    if not text or model_index.WRITTEN.encode() in text:
        return b""
    log.warning("%s stays as it is, being written by others: is it true of this model?", card)
    return text


def require_replaceable(directory: str | os.PathLike) -> None:
    """Raises FileExistsError if writing a model there would take away anything but a model."""
    path = pathlib.Path(directory)
    if not path.exists():
        return
    if path.resolve() == pathlib.Path.cwd():
        raise FileExistsError(
            f"{path} is the folder you are in, and would be replaced: name another"
        )
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file: a model is written as a directory")
    if strangers := sorted(p.relative_to(path).as_posix() for p in _no_model(path)):
        raise FileExistsError(
            f"{path} holds more than a model, and would be replaced: choose another directory, or"
            f" delete it. In it: {', '.join(strangers)}"
        )


def _no_model(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """What lies in a directory, or in a model's own folders there, that is no part of a model."""
    is_model = (directory / "model_index.json").is_file()
    for path in directory.iterdir():
        if not is_model or path.name not in _OURS:
            yield path
        elif path.is_dir() and path.name != ORBAX:
            yield from (p for p in path.iterdir() if not _of_a_component(p))


def _of_a_component(path: pathlib.Path) -> bool:
    return path.suffix in _KINDS or path.name == "merges.txt"


def load_autoencoder(
    path_or_hub_id: str | os.PathLike, *, variant: str | None = None, **where
) -> tuple[Any, Params]:
    """An autoencoder alone: (config, {encoder, decoder} in float32).

    Reads diffusers' layout (config.json beside the weights, or in vae/), and upstream TAESD's two
    files, taesd_encoder.safetensors and taesd_decoder.safetensors. Errors as `load_model`.
    """
    directory = locate(path_or_hub_id, variant=variant, **where)
    names = [f"taesd_{part}.safetensors" for part in ("encoder", "decoder")]
    if all((directory / name).is_file() for name in names):
        config = TinyAutoencoderConfig()
        tensors = convert.taesd_to_diffusers(*(files.read(directory / name) for name in names))
    else:
        if (directory / "vae/config.json").is_file():
            directory = directory / "vae"
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory}: neither config.json nor {' and '.join(names)}")
        try:
            config = _autoencoder(files.read_json(directory / "config.json"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{directory}/config.json: {error}") from error
        tensors = files.read_folder(directory, STEM, variant=variant)
        tensors = keys.modern_names(tensors, keys.AUTOENCODER_AGES)
    return config, convert.from_torch(tensors, abstract_autoencoder(config), dtype=np.float32)


def digest(path_or_hub_id: str | os.PathLike, revision: str | None = None) -> str:
    """By what a model can be recognised: of its weights, or the commit in the hub's cache.

    Of a run's workdir it is the newest checkpoint's step, and when that was saved. "" for what is
    not there.
    """
    path = download.bundled(path_or_hub_id) or pathlib.Path(path_or_hub_id)
    if commit := download.commit(path):
        # Its files may become more; models in folders of it have that in common.
        return commit + path.resolve().as_posix().partition(commit)[2]
    if not path.is_dir():
        try:
            return download.commit(locate(path_or_hub_id, revision=revision, local_files_only=True))
        except FileNotFoundError:
            return ""
    if (path / "checkpoints").is_dir():
        step = checkpoint.newest(path / "checkpoints")
        return f"step {step.name}, saved {checkpoint.saved_at(step)}" if step else ""
    orbax = (file for file in (path / ORBAX).rglob("*") if file.is_file())
    hashes = hashlib.sha256()
    for weights in [*sorted(path.rglob("*.safetensors")), *sorted(orbax)]:
        with weights.open("rb") as file:
            hashes.update(hashlib.file_digest(file, "sha256").digest())
    return hashes.hexdigest()


def push(
    repo_id: str, save: Callable[[str], None], *, token: str | None, private: bool | None
) -> str:
    """Uploads what `save(directory)` writes to a repository of the hub, and returns its address."""
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = url.repo_id  # with its owner, who may be left out
    with tempfile.TemporaryDirectory() as parent:
        directory = os.path.join(parent, "model")
        save(directory)
        kept = None
        if api.file_exists(repo_id, "README.md"):
            card = pathlib.Path(api.hf_hub_download(repo_id, "README.md"))
            if model_index.WRITTEN not in card.read_text(encoding="utf-8"):
                kept = ["README.md"]  # what somebody wrote is worth more than ours
        api.upload_folder(repo_id=repo_id, folder_path=directory, ignore_patterns=kept)
    return str(url)


def _read_settings(directory: pathlib.Path) -> tuple[DepthModel, str]:
    """(the model that the JSON files describe, its pipeline's class); all problems at once."""
    problems = []

    def read(name: str, parse: Callable):
        path = directory / name
        try:
            return parse(files.read_json(path))
        except (ValueError, TypeError) as error:
            # A TypeError is a value of a type that no arithmetic on settings expects.
            problems.append(f"{path}: {error}")

    unet = read("unet/config.json", UNetConfig.from_dict)
    vae = read("vae/config.json", _autoencoder)
    schedule = read("scheduler/scheduler_config.json", NoiseSchedule.from_dict)
    meaning = read("model_index.json", model_index.read)
    if problems:
        raise ValueError("\n".join(problems))
    kind, meaning = meaning
    takes_depth = unet.in_channels == 2 * vae.latent_channels
    if model_index.may_be_e2e_ft(kind, takes_depth, schedule.timestep_spacing):
        kind, used = model_index.e2e_ft(directory)
        meaning |= used
    timestep = int(schedule.timesteps(1)[0])
    return DepthModel(unet, vae, schedule, timestep=timestep, **meaning), kind


def _autoencoder(content: Mapping):
    """The configuration of an autoencoder's JSON, of the class that it names."""
    kind = content.get("_class_name", "AutoencoderKL")
    if kind not in model_index.AUTOENCODERS:
        raise ValueError(f"this is a {kind}: {' and '.join(model_index.AUTOENCODERS)} are read")
    return model_index.AUTOENCODERS[kind].from_dict(content)


def _origin(path_or_hub_id, directory: pathlib.Path) -> str:
    """What a model says it was made from: OWNER/NAME@COMMIT, or a folder's name without its path,
    which is nobody's business."""
    name = str(path_or_hub_id)
    if download.bundled(name):
        return name
    if pathlib.Path(name).is_dir() or not download.is_hub_id(name):
        return directory.resolve().name
    commit = download.commit(directory)
    return f"{name}@{commit}" if commit else name


def _read_weights(
    directory: pathlib.Path, model: DepthModel, variant: str | None, dtype
) -> tuple[Params, PromptEncoder | None]:
    """({unet, encoder, decoder}, text encoder); what is wrong with any of them in one error."""
    problems, missing = [], True

    def read(name: str, function: Callable, *args):
        nonlocal missing
        try:
            return function(*args)
        except (FileNotFoundError, ValueError) as error:
            missing &= isinstance(error, FileNotFoundError)
            problems.append(f"{directory / name}: {error}")

    shapes = abstract_params(model)
    vae = {part: shapes[part] for part in ("encoder", "decoder")}

    def tensors(folder: str, tree, ages=()):
        found = files.read_folder(directory / folder, STEM, variant=variant)
        return convert.from_torch(keys.modern_names(found, dict(ages)), tree, dtype=dtype)

    if (directory / ORBAX).is_dir():
        shapes = {"unet": shapes["unet"], **vae}
        trees = read(ORBAX, checkpoint.read_tree, directory / ORBAX, shapes)
        trees = jax.tree.map(lambda x: np.asarray(x, dtype), trees)
    else:
        unet = read("unet", tensors, "unet", shapes["unet"])
        rest = read("vae", tensors, "vae", vae, keys.AUTOENCODER_AGES)
        trees = {"unet": unet, **(rest or {})}
    text = None
    if (directory / "text_encoder/config.json").is_file():
        text = read("text_encoder", prompt.read, directory, variant, dtype)
    if problems:
        raise (FileNotFoundError if missing else ValueError)("\n".join(problems))
    return trees, text


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
