"""The empty prompt: CLIP's text encoder with its tokenizer, and the embedding made of them."""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax import atomic
from d3epth_jax.models.config import TextEncoderConfig
from d3epth_jax.models.text_encoder import TextEncoder
from d3epth_jax.typing import Params
from d3epth_jax.user_cache import user_cache
from d3epth_jax.weights import convert, files, keys, tokenizer

log = logging.getLogger(__name__)

STEM = "model"
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """A text encoder and its tokenizer, carried along so that saved models have them.

    Attributes:
      config: the published JSON, whole.
      params: NumPy arrays; those read from a file stay in it until somebody looks.
      tokenizer: the contents of its files, by name.
      origin: what its files were when read; the cache's key.
      dtype: the type it is saved in; None: as it was read.
    """

    config: Mapping
    params: Params
    tokenizer: Mapping[str, bytes]
    origin: str
    dtype: str | None = None

    def save(self, directory: pathlib.Path, *, dtype=None, variant: str | None = None) -> None:
        """Writes text_encoder/ and tokenizer/ below the directory."""
        atomic.write_json(directory / "text_encoder/config.json", self.config)
        tensors = convert.to_torch(self.params, dtype=dtype or self.dtype)
        files.write(directory / "text_encoder" / files.single_name(STEM, variant), tensors)
        (directory / "tokenizer").mkdir()
        for name, content in self.tokenizer.items():
            (directory / "tokenizer" / name).write_bytes(content)


def read(
    directory: pathlib.Path, variant: str | None = None, dtype: str | None = None
) -> PromptEncoder:
    """Reads text_encoder/ and tokenizer/; parameters keep the file's type until they are saved.

    Raises FileNotFoundError or ValueError: what is missing, what does not fit (keys, shapes).
    """
    folder = directory / "text_encoder"
    content = files.read_json(folder / "config.json")
    tensors = files.read_folder(folder, STEM, variant=variant)
    tensors = keys.modern_names(tensors, keys.TEXT_ENCODER_AGES)
    params = convert.from_torch(tensors, abstract_params(TextEncoderConfig.from_dict(content)))
    return PromptEncoder(
        config=content,
        params=params,
        tokenizer={
            name: (directory / "tokenizer" / name).read_bytes()
            for name in _TOKENIZER_FILES
            if (directory / "tokenizer" / name).is_file()
        },
        # The variant too: files of several lie in one folder.
        origin=json.dumps(
            [
                variant,
                *(
                    (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
                    for path in sorted(folder.glob("*.safetensors"))
                ),
            ]
        ),
        dtype=dtype,
    )


def empty_prompt(encoder: PromptEncoder, directory: pathlib.Path, padding: str) -> np.ndarray:
    """The embedding of the empty prompt, float32 [1,N,D]; computed once and cached on disk.

    padding: "do_not_pad" (BOS, EOS: Marigold) or "max_length" (77 tokens: E2E-FT's training).
    """
    ids = tokenizer.empty_prompt_ids(directory / "tokenizer", padding=padding)
    if max(ids) >= encoder.config.get("vocab_size", TextEncoderConfig.vocab_size):
        raise ValueError(
            f"{directory}: the tokenizer's ids {ids} exceed the text encoder's vocabulary"
        )
    name = hashlib.sha256(json.dumps([encoder.config, ids, encoder.origin]).encode()).hexdigest()
    name += ".safetensors"
    try:
        return files.read(user_cache("prompts") / name)["prompt"].copy()
    except (OSError, ValueError, KeyError):
        pass  # not there, or not whole: computed again
    module = TextEncoder(TextEncoderConfig.from_dict(encoder.config))
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), encoder.params)
    with jax.default_matmul_precision("highest"):  # it is kept, also for other devices
        prompt = np.asarray(jax.jit(module.apply)({"params": params}, jnp.asarray([ids])))
    try:
        folder = user_cache("prompts")
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / name, {"prompt": prompt})
    except OSError as error:
        log.info("the empty prompt's embedding is not cached: %s", error)
    return prompt


def abstract_params(config: TextEncoderConfig) -> Params:
    """Shapes of the text encoder's parameters."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(TextEncoder(config).init, jax.random.key(0), ids)["params"]
