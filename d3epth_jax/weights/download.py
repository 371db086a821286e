"""Where a model lies: a directory, or a model of the Hugging Face hub in its cache."""

import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from d3epth_jax.weights import files, prompt

STEM = "diffusion_pytorch_model"
# Folder -> the weights' name in it; "" is the repository itself, as of a published autoencoder.
COMPONENTS = {"unet": STEM, "vae": STEM, "text_encoder": prompt.STEM, "": STEM}
_TEXTS = ("model_index.json", "config.json", "arguments.txt", "*/*.json", "tokenizer/merges.txt")
_OURS = ("empty_prompt.safetensors", "taesd_*.safetensors", f"{STEM}.safetensors.index*.json")
_ENDS = (".safetensors", "-?????-of-?????.safetensors")
# Models that come with the package (configs/nano/train.py): name -> folder.
_PACKAGE = pathlib.Path(__file__).parents[1]
BUNDLED = {"nano": _PACKAGE / "nano/student", "nano-teacher": _PACKAGE / "nano/teacher"}


def bundled(name: str | os.PathLike) -> pathlib.Path | None:
    """The folder of a model that comes with the package; None if a directory is called so."""
    return None if pathlib.Path(name).is_dir() else BUNDLED.get(str(name))


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
    """The directory of a model: a local one, a bundled one, or one of the hub in its cache.

    Only JSON, tokenizer files and the safetensors that will be read are downloaded. Raises
    FileNotFoundError that says what was looked for, OSError if a download fails, and ValueError for
    a subfolder outside, and for a revision of what is not on the hub.
    """
    if subfolder and (os.path.isabs(subfolder) or ".." in pathlib.PurePath(subfolder).parts):
        raise ValueError(f"subfolder {subfolder!r} must stay inside the model")
    name = str(path_or_hub_id)
    if not may_be_read(name):
        raise FileNotFoundError(no_model(name))
    directory = bundled(name) or pathlib.Path(name)
    if directory.is_dir():
        if revision:
            raise ValueError(f"{name} is no model of the hub, and has no revision {revision}")
    else:
        options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        directory = _download(name, revision, subfolder or "", variant, options)
    return directory / (subfolder or "")


def is_hub_id(name: str) -> bool:
    part = r"\w([\w.-]*\w)?"
    return re.fullmatch(f"{part}/{part}", name) is not None and not re.search(r"\.\.|--", name)


def may_be_read(name: str | os.PathLike) -> bool:
    """Whether `locate` could find it: a directory, a bundled model, or a name for the hub."""
    if os.path.isdir(name) or bundled(name) is not None:
        return True
    return is_hub_id(str(name)) and not os.path.exists(name)


def no_model(name: str) -> str:
    """What a name is not that cannot be read."""
    if os.path.isfile(name):
        return (
            f"{name} is a file, and a model is a directory: of a checkpoint in one file diffusers"
            " makes one, StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)"
        )
    return (
        f"{name} is no directory, no hub id OWNER/NAME, and none of {sorted(BUNDLED)}, which come"
        " with the package"
    )


def commit(directory: pathlib.Path) -> str:
    """The commit of a directory in the hub's cache, "" for any other."""
    parts = directory.resolve().parts
    for folder, name in itertools.pairwise(parts):
        if folder == "snapshots" and re.fullmatch("[0-9a-f]{40}", name):
            return name
    return ""


def _download(
    name: str, revision: str | None, subfolder: str, variant: str | None, options: Mapping[str, Any]
) -> pathlib.Path:
    import huggingface_hub  # half a second, and only needed here

    root = f"{subfolder}/" if subfolder else ""

    def fetch(patterns, revision) -> pathlib.Path:
        patterns = [root + pattern for pattern in patterns]
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, **options
            )
        )

    def weights(folders: Mapping[str, str], part: str) -> list[str]:
        return [
            f"{folder}/{stem}{part}{end}".lstrip("/")
            for folder, stem in folders.items()
            for end in _ENDS
        ]

    def all_of_it() -> pathlib.Path:
        patterns = [*_TEXTS, *_OURS, *weights(COMPONENTS, f".{variant}" if variant else "")]
        directory = fetch(patterns, revision)
        if variant:
            # A component without that variant comes in its plain form, of the same commit.
            plain = {
                folder: stem
                for folder, stem in COMPONENTS.items()
                if not files.has_weights(directory / root / folder, stem, variant)
            }
            if not (directory / root / "config.json").is_file():
                plain.pop("", None)  # it is no autoencoder alone
            if plain:
                directory = fetch(weights(plain, ""), commit(directory) or revision)
        return directory

    return _with_reasons(all_of_it, name, revision, options)


def _with_reasons(download: Callable, name: str, revision: str | None, options: Mapping):
    """The download, or the reason why not in words: each is an OSError, most FileNotFoundError."""
    from huggingface_hub import errors

    # What its HTTP library raises for a lost connection is not always an OSError, and the library
    # is another in each of its versions.
    transport = tuple(
        kind
        for kind in errors.HfHubHTTPError.__mro__
        if issubclass(kind, Exception) and kind is not Exception
    )
    try:
        return download()
    except errors.GatedRepoError as error:
        why = "its licence must be accepted on its page first, by the owner of your token"
        cause = error
    except errors.RevisionNotFoundError as error:
        why, cause = f"it has no revision {revision}", error
    except errors.RepositoryNotFoundError as error:
        why = "there is no such model, or it is private and your token does not open it"
        cause = error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        where = options["cache_dir"] or "the hub's cache"
        why = f"it is not in {where} and cannot be fetched: no network, or offline mode"
        cause = error
    except transport as error:
        raise OSError(f"hub model {name} could not be downloaded: {error}") from error
    raise FileNotFoundError(f"no directory {name}, and as a hub model: {why}") from cause
