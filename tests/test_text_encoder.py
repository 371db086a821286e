"""CLIP's text encoder and the ids of the empty prompt beside transformers'."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from d3epth_jax.models import layers, text_encoder
from d3epth_jax.models.config import TextEncoderConfig
from d3epth_jax.models.text_encoder import TextEncoder
from d3epth_jax.weights import convert, files, keys, prompt
from d3epth_jax.weights.tokenizer import empty_prompt_ids
from tests import unet_oracle as oracle

SD1_LIKE = TextEncoderConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=99,
)
CONFIGS = {
    "sd1": SD1_LIKE,
    "sd2": dataclasses.replace(SD1_LIKE, num_hidden_layers=3, hidden_act="gelu"),
    "other eps": dataclasses.replace(SD1_LIKE, num_hidden_layers=1, layer_norm_eps=1e-3),
}


@functools.cache
def pair(name):
    config = CONFIGS[name]
    torch.manual_seed(0)
    shape = dataclasses.asdict(config)
    net = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**shape, bos_token_id=1, eos_token_id=2)
    )
    with torch.no_grad():  # CLIP starts its weights so small that its activations stay linear
        for parameter in net.parameters():
            parameter *= 3 if parameter.ndim == 2 else 1
    return config, oracle.perturb(net), read(oracle.tensors_of(net), config)


def read(tensors, config):
    tensors = keys.modern_names(tensors, keys.TEXT_ENCODER_AGES)
    return convert.from_torch(tensors, prompt.abstract_params(config))


def ids_of(tokens: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 99, (batch, tokens))


def error(name, tokens, batch=1, **changes) -> float:
    config, net, params = pair(name)
    ids = ids_of(tokens, batch)
    module = TextEncoder(dataclasses.replace(config, **changes))
    ours = oracle.run(lambda params, ids: module.apply({"params": params}, ids), params, ids)
    assert ours.dtype == jnp.float32
    with torch.no_grad():
        reference = net(torch.from_numpy(ids)).last_hidden_state.numpy()
    return oracle.relative_error(ours, reference)


# Values


@pytest.mark.parametrize("tokens", [2, 77])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_last_hidden_state_equals_transformers(name, tokens):
    assert error(name, tokens, batch=2) <= oracle.TOLERANCE


def test_the_norms_eps_is_the_configs():
    assert error("other eps", 5) <= oracle.TOLERANCE
    assert error("other eps", 5, layer_norm_eps=1e-5) > 3 * oracle.TOLERANCE


def unscaled(q, k, v, mask=None, original=layers.attention):
    return original(q * q.shape[-1] ** 0.5, k, v, mask)


BREAKS = {
    "sees what follows": ("sd1", text_encoder, "CAUSAL", False),
    "exact gelu in SD1": ("sd1", text_encoder, "quick_gelu", layers.gelu),
    "quick gelu in SD2": ("sd2", layers, "gelu", text_encoder.quick_gelu),
    "gelu by tanh in SD2": ("sd2", layers, "gelu", jax.nn.gelu),
    "attention without its scale": ("sd1", layers, "attention", unscaled),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_it_does_not(monkeypatch, name):
    net, module, attribute, broken = BREAKS[name]
    monkeypatch.setattr(module, attribute, broken)
    assert error(net, 7) > 3 * oracle.TOLERANCE


def test_more_tokens_than_places_are_refused():
    with pytest.raises(ValueError, match="78 tokens, at most 77"):
        jax.eval_shape(TextEncoder(SD1_LIKE).init, jax.random.key(0), jnp.zeros((1, 78), int))


# Configs


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("sd15", TextEncoderConfig(768, 3072, 12, 12)),
        ("sd21", TextEncoderConfig(1024, 4096, 23, 16, hidden_act="gelu")),
    ],
)
def test_published_configs_are_read(shared, base, expected):
    path = shared / "hf_configs" / base / "text_encoder" / "config.json"
    assert TextEncoderConfig.from_dict(json.loads(path.read_text())) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_is_read(name, tmp_path):
    config, net, params = pair(name)
    net.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert TextEncoderConfig.from_dict(content) == config
    again = read(files.read(tmp_path / "model.safetensors"), config)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_absent_keys_mean_transformers_defaults():
    theirs = transformers.CLIPTextConfig().to_dict()
    assert TextEncoderConfig.from_dict(theirs) == TextEncoderConfig.from_dict({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type = 't5' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'; supported: quick_gelu, gelu"),
        ({"num_attention_heads": 5}, "hidden_size = 512 does not divide into 5 heads"),
    ],
)
def test_other_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TextEncoderConfig.from_dict(change)


# Names


def test_names_of_every_age_load_and_the_published_ones_are_written(tmp_path):
    config, net, params = pair("sd1")
    tensors = oracle.tensors_of(net)
    bare = {key.removeprefix("text_model."): x for key, x in tensors.items()}
    published = {f"text_model.{key}": x for key, x in bare.items()}
    positions = np.arange(77)[None]
    for file in (
        bare,
        published,
        published | {"text_model.embeddings.position_ids": positions},
        bare | {"embeddings.position_ids": positions},
    ):
        jax.tree.map(np.testing.assert_array_equal, read(file, config), params)
    back = convert.to_torch(params)
    assert back.keys() == published.keys()
    net.config.save_pretrained(tmp_path)
    files.write(tmp_path / "model.safetensors", back)
    again, info = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, tensor in oracle.tensors_of(again).items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)


def test_two_ages_in_one_file_are_refused_by_name():
    names = [f"{prefix}final_layer_norm.{leaf}" for prefix in ("", "text_model.")
             for leaf in ("weight", "bias")]  # fmt: skip
    with pytest.raises(ValueError) as caught:
        keys.modern_names(dict.fromkeys(names), keys.TEXT_ENCODER_AGES)
    assert all(f"{name} " in str(caught.value) for name in names)


# The tokenizer

VOCABULARY = {"!": 0, "a": 1, "a</w>": 2, "aa</w>": 3, "<|startoftext|>": 4, "<|endoftext|>": 5}
END = "<|endoftext|>"
NAMED = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END}


def added_token(content: str) -> dict:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **flags}


def write_modern(folder, pad: str):
    tokenizer = transformers.CLIPTokenizer(
        VOCABULARY, [("a", "a</w>")], pad_token=pad, model_max_length=77
    )
    tokenizer.save_pretrained(folder)
    assert not (folder / "vocab.json").exists()


def write_old(folder, config=(), special=(), **others):
    """The files of older versions; `others` by their stems."""
    folder.mkdir()
    (folder / "merges.txt").write_text("#version: 0.2\na a</w>\n")
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **dict(config)}
    contents = {"vocab": VOCABULARY, "tokenizer_config": config, **others}
    contents |= {"special_tokens_map": dict(special)} if special else {}
    for stem, content in contents.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))


def write_objects(folder, pad: str):
    """As SD 2.x: special tokens as objects, and a map that knows better than the config."""
    objects = {kind: added_token(token) for kind, token in NAMED.items()}
    write_old(folder, {**objects, "pad_token": END}, {**objects, "pad_token": pad})


LAYOUTS = {
    "transformers 5": write_modern,
    "strings": lambda folder, pad: write_old(folder, NAMED, {**NAMED, "pad_token": pad}),
    "objects": write_objects,
    "no map": lambda folder, pad: write_old(folder, {**NAMED, "pad_token": pad}),
    "nothing named but the pad": lambda folder, pad: write_old(folder, (), {"pad_token": pad}),
    "a stale map": lambda folder, pad: write_old(
        folder,
        {
            **{**NAMED, "pad_token": pad},
            "added_tokens_decoder": {
                str(VOCABULARY[token]): added_token(token) for token in ("!", *NAMED.values())
            },
        },
        {"pad_token": "!" if pad == END else END},
    ),
}


@pytest.mark.parametrize("pad", ["!", END])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_of_the_empty_prompt_equal_transformers(layout, pad, tmp_path):
    LAYOUTS[layout](tmp_path / "tokenizer", pad)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    for padding, length in (("do_not_pad", 77), ("max_length", 77), ("max_length", 5)):
        expected = theirs("", padding=padding, max_length=length, truncation=True).input_ids
        assert empty_prompt_ids(tmp_path / "tokenizer", padding=padding, length=length) == expected
    assert expected == [4, 5] + [VOCABULARY[pad]] * 3


def test_no_pad_named_and_tokens_beside_the_vocabulary(tmp_path):
    write_old(tmp_path / "none", {**NAMED, "eos_token": "aa</w>"})
    write_old(tmp_path / "beside", {**NAMED, "pad_token": "<pad>"}, added_tokens={"<pad>": 6})
    for name, expected in (("none", [4, 3, 5]), ("beside", [4, 5, 6])):
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / name)
        assert theirs("", padding="max_length", max_length=3).input_ids == expected
        assert empty_prompt_ids(tmp_path / name, padding="max_length", length=3) == expected


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.json"):
        empty_prompt_ids(tmp_path)
    with pytest.raises(ValueError, match=r"'longest': choose one of do_not_pad, max_length"):
        empty_prompt_ids(tmp_path, padding="longest")
    write_old(tmp_path / "old", {**NAMED, "bos_token": "<s>", "pad_token": "<pad>"})
    with pytest.raises(ValueError, match=r"vocab\.json lacks the bos_token '<s>'$"):
        empty_prompt_ids(tmp_path / "old")
    with pytest.raises(ValueError, match=r"lacks the bos_token '<s>', the pad_token '<pad>'$"):
        empty_prompt_ids(tmp_path / "old", padding="max_length")
    (tmp_path / "old/vocab.json").write_text("[]")
    with pytest.raises(ValueError, match=r"vocab\.json holds no JSON object"):
        empty_prompt_ids(tmp_path / "old")
