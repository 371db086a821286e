"""The token ids of the empty prompt, from a CLIP tokenizer's files.

An empty prompt is its beginning and its end, so no text needs splitting. transformers 5 writes
tokenizer.json and tokenizer_config.json; older versions vocab.json, merges.txt,
special_tokens_map.json and tokenizer_config.json.
"""

import pathlib

from d3epth_jax.weights import files

PADDINGS = ("do_not_pad", "max_length")
DEFAULTS = {  # CLIP's, for what no file names
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


def empty_prompt_ids(
    directory: pathlib.Path, *, padding: str = "do_not_pad", length: int = 77
) -> list[int]:
    """[BOS, EOS], or with padding "max_length" filled up to `length` with the tokenizer's pad.

    SD 1.x pads with its end, SD 2.x with "!". Raises ValueError or FileNotFoundError that names the
    file and the token missing in it.
    """
    if padding not in PADDINGS:
        raise ValueError(f"unknown prompt padding {padding!r}: choose one of {', '.join(PADDINGS)}")
    directory = pathlib.Path(directory)
    config = _read(directory / "tokenizer_config.json")
    named = DEFAULTS | _tokens(config)
    # A config with a vocabulary of its own is newer than the map beside it, which then is stale.
    if "added_tokens_decoder" not in config:
        named |= _tokens(_read(directory / "special_tokens_map.json"))
    path, vocabulary = _vocabulary(directory, config)
    wanted = ["bos_token", "eos_token"] + ["pad_token"] * (padding == "max_length")
    if lost := [f"{kind} {named[kind]!r}" for kind in wanted if named[kind] not in vocabulary]:
        raise ValueError(f"{path} lacks the {', the '.join(lost)}")
    ids = [vocabulary[named[kind]] for kind in wanted]
    return ids[:2] + ids[2:] * (length - 2)


def _vocabulary(directory: pathlib.Path, config: dict) -> tuple[pathlib.Path, dict[str, int]]:
    """(the file of the words, {word: id} of it and of the tokens added to it)."""
    if (path := directory / "tokenizer.json").is_file():
        content = files.read_json(path)
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", ())}
        return path, {**content.get("model", {}).get("vocab", {}), **added}
    if (path := directory / "vocab.json").is_file():
        decoder = config.get("added_tokens_decoder", {})
        added = {token["content"]: int(number) for number, token in decoder.items()}
        return path, files.read_json(path) | _read(directory / "added_tokens.json") | added
    raise FileNotFoundError(f"{directory} has neither tokenizer.json nor vocab.json")


def _tokens(content: dict) -> dict[str, str]:
    """The special tokens of a file; an entry is the token, or an object with its `content`."""
    found = {}
    for kind in DEFAULTS:
        token = content.get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            found[kind] = token
    return found


def _read(path: pathlib.Path) -> dict:
    return files.read_json(path) if path.is_file() else {}
