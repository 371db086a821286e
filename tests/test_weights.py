"""Published configs and weights: read, written, converted and changed in shape."""

import dataclasses
import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

from d3epth_jax.models import presets
from d3epth_jax.models.config import TinyAutoencoderConfig, UNetConfig
from d3epth_jax.weights import convert, files, keys, surgery
from tests import unet_oracle as oracle

SMALL_UNET = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4),
    cross_attention_dim=8,
    norm_num_groups=8,
)
SMALL_TINY = TinyAutoencoderConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(4, 4),
    num_encoder_blocks=(1, 2),
    num_decoder_blocks=(0, 1),
)


def read_config(path, cls):
    return cls.from_dict(json.loads(path.read_text()))


# Configs


@pytest.mark.parametrize(("name", "preset"), [("sd15", "SD1_UNET"), ("sd21", "SD2_UNET")])
def test_presets_are_the_published_shapes(shared, name, preset):
    path = shared / "hf_configs" / name / "unet" / "config.json"
    assert read_config(path, UNetConfig) == getattr(presets, preset)


@pytest.mark.parametrize("kind", ["base", "small", "tiny"])
def test_bk_sdm_derives_the_published_shapes(shared, kind):
    def published(base):
        path = shared / "hf_configs" / "bk_sdm" / base / f"bk_{kind}" / "config.json"
        return read_config(path, UNetConfig)

    assert presets.bk_sdm(presets.SD1_UNET, kind) == published("sd1")
    assert presets.bk_sdm(presets.SD2_UNET, kind) == published("sd21")
    # The 512-pixel base model differs in a flag that only concerns diffusers' half precision.
    assert presets.bk_sdm(presets.SD2_UNET, kind) == dataclasses.replace(
        published("sd21_base"), upcast_attention=True
    )


@pytest.mark.parametrize(
    ("kind", "millions"),
    [("full", 865.92), ("base", 583.49), ("small", 485.80), ("tiny", 326.84)],
)
def test_parameter_counts_are_bk_sdms(kind, millions):
    config = presets.SD2_UNET if kind == "full" else presets.bk_sdm(presets.SD2_UNET, kind)
    params = oracle.abstract_unet(dataclasses.replace(config, in_channels=8))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e6, 2) == millions


def test_bk_sdm_refuses_what_it_cannot_prune():
    with pytest.raises(ValueError, match=r"'mini'.*base, small, tiny"):
        presets.bk_sdm(presets.SD1_UNET, "mini")
    with pytest.raises(ValueError, match="this one has 1"):
        presets.bk_sdm(SMALL_UNET, "base")


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (SMALL_UNET, diffusers.UNet2DConditionModel),
        (dataclasses.replace(SMALL_UNET, mid_block_type=None), diffusers.UNet2DConditionModel),
        (SMALL_TINY, diffusers.AutoencoderTiny),
    ],
)
def test_configs_go_through_diffusers_and_json_and_come_back(config, model):
    text = json.dumps(config.to_dict())
    assert type(config).from_dict(json.loads(text)) == config
    # What diffusers writes has every key it knows, at its default.
    theirs = json.loads(model.from_config(json.loads(text)).to_json_string())
    assert type(config).from_dict(theirs) == config
    assert hash(config) == hash(type(config).from_dict(theirs))


def test_absent_keys_mean_diffusers_defaults():
    assert UNetConfig.from_dict({}) == UNetConfig()
    for cls, model in (
        (UNetConfig, diffusers.UNet2DConditionModel),
        (TinyAutoencoderConfig, diffusers.AutoencoderTiny),
    ):
        signature = inspect.signature(model.__init__).parameters
        for field in dataclasses.fields(cls):
            assert field.default == signature[field.name].default, field.name


def test_all_unsupported_settings_are_named_at_once():
    json_dict = {
        **SMALL_UNET.to_dict(),
        "act_fn": "gelu",
        "dual_cross_attention": True,
        "only_cross_attention": [False, True],
        "encoder_hid_dim": 1024,
        "resnet_time_scale_shift": "scale_shift",
        "transformer_layers_per_block": [1, 2],
        "class_embed_type": "timestep",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "norm_num_grups": 8,
        "some_new_switch": None,
        "another_new_switch": False,
    }
    with pytest.raises(ValueError) as error:
        UNetConfig.from_dict(json_dict)
    message = str(error.value)
    for part in (
        "act_fn = 'gelu' is not supported; only 'silu' or 'swish' is",
        "dual_cross_attention",
        "only_cross_attention",
        "encoder_hid_dim = 1024",
        "resnet_time_scale_shift",
        "transformer_layers_per_block",
        "class_embed_type",
        "mid_block_type",
        "norm_num_grups = 8 is unknown; the nearest known name is 'norm_num_groups'",
    ):
        assert part in message
    assert "new_switch" not in message
    assert "center_input_sample" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 entries for 2"),
        ({"up_block_types": ["AttnUpBlock2D"] * 2}, r"up_block_types\[0\] = 'AttnUpBlock2D'"),
        ({"attention_head_dim": [2]}, "attention_head_dim has 1 entries"),
        ({"attention_head_dim": 3}, "16 does not divide into 3 heads"),
        ({"norm_num_groups": 3}, "16 does not divide into 3 groups"),
        ({"norm_num_groups": None}, "norm_num_groups = None"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block = \(1, 2\)"),
        ({"_class_name": "UNet2DModel"}, "'UNet2DModel'; expected 'UNet2DConditionModel'"),
    ],
)
def test_inconsistent_unets_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({**SMALL_UNET.to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "silu", "upsampling_scaling_factor": 4}, "act_fn(.|\n)*upsampling_scaling"),
        ({"decoder_block_out_channels": [4, 8]}, r"\(4, 8\); all widths must be equal"),
        ({"num_encoder_blocks": [1, 1, 1]}, "has 2 entries, num_encoder_blocks 3"),
    ],
)
def test_inconsistent_tiny_autoencoders_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TinyAutoencoderConfig.from_dict({**SMALL_TINY.to_dict(), **changes})


# Conversion


@pytest.mark.parametrize("kind", ["unet", "autoencoder"])
def test_conversion_and_back_is_the_identity(kind):
    if kind == "unet":
        net, abstract = oracle.torch_unet(SMALL_UNET), oracle.abstract_unet(SMALL_UNET)
    else:
        net, abstract = oracle.torch_tiny(SMALL_TINY), oracle.abstract_tiny(SMALL_TINY)
    tensors = oracle.tensors_of(net)
    params = convert.from_torch(tensors, abstract)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    back = convert.to_torch(params)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
        assert back[key].flags.c_contiguous


def test_keys_follow_one_rule():
    for path, key in (
        ("time_embedding/linear_1/kernel", "time_embedding.linear_1.weight"),
        ("up_blocks_10/resnets_2/norm1/scale", "up_blocks.10.resnets.2.norm1.weight"),
        ("conv_in/bias", "conv_in.bias"),
        ("layers_3/conv_4/kernel", "layers.3.conv.4.weight"),
        ("text_model/embeddings/token_embedding/embedding", None),
    ):
        expected = key or "text_model.embeddings.token_embedding.weight"
        assert keys.torch_key(tuple(path.split("/"))) == expected
    with pytest.raises(ValueError, match=r"conv_in/weight.*kernel, scale, embedding, bias"):
        keys.torch_key(("conv_in", "weight"))


def test_every_mismatch_is_named_at_once():
    abstract = oracle.abstract_tiny(SMALL_TINY)
    tensors = oracle.tensors_of(oracle.torch_tiny(SMALL_TINY))
    kernel = tensors.pop("encoder.layers.0.weight")
    tensors["encoder.layers.0.wieght"] = kernel
    tensors["decoder.layers.0.weight"] = kernel
    tensors["decoder.layers.0.bias"] = np.zeros((4, 1), np.float32)
    with pytest.raises(ValueError) as error:
        convert.from_torch(tensors, abstract)
    assert str(error.value).splitlines()[1:] == [
        "  missing: encoder.layers.0.weight (8, 3, 3, 3)",
        "  unexpected: encoder.layers.0.wieght (8, 3, 3, 3)",
        "  wrong shape: decoder.layers.0.bias is (4, 1), the model has (4,)",
        "  wrong shape: decoder.layers.0.weight is (8, 3, 3, 3), the model has (4, 4, 3, 3)",
    ]


def test_a_linear_layer_does_not_pass_for_a_convolution():
    abstract = {"proj_in": {"kernel": jax.ShapeDtypeStruct((1, 1, 4, 4), jnp.float32)}}
    with pytest.raises(ValueError, match=r"is \(4, 4\), the model has \(4, 4, 1, 1\)"):
        convert.from_torch({"proj_in.weight": np.zeros((4, 4), np.float32)}, abstract)


def test_dtypes_stay_unless_asked_for():
    abstract = {"norm": {"scale": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    tensors = {"norm.weight": np.ones(3, ml_dtypes.bfloat16)}
    assert convert.from_torch(tensors, abstract)["norm"]["scale"].dtype == ml_dtypes.bfloat16
    cast = convert.from_torch(tensors, abstract, dtype=np.float32)
    assert cast["norm"]["scale"].dtype == np.float32
    assert convert.to_torch({"norm": {"scale": jnp.ones(3, jnp.bfloat16)}})[
        "norm.weight"
    ].dtype == np.dtype(ml_dtypes.bfloat16)


def test_taesd_keys(shared):
    folder = shared / "weights" / "taesd"
    encoder, decoder = (
        files.read(folder / f"taesd_{name}.safetensors") for name in ("encoder", "decoder")
    )
    assert all(t.dtype == ml_dtypes.bfloat16 for t in (*encoder.values(), *decoder.values()))
    tensors = convert.taesd_to_diffusers(encoder, decoder)
    assert tensors.keys() == diffusers.AutoencoderTiny().state_dict().keys()
    with pytest.raises(ValueError, match=r"decoder: 0\.weight\n  decoder: layers\.1\.weight"):
        convert.taesd_to_diffusers({}, {"0.weight": 0, "1.weight": 0, "layers.1.weight": 0})


# Files


def test_safetensors_files_keep_names_types_and_values(tmp_path):
    tensors = {
        "float32": oracle.normal(0, 2, 3).T,  # not contiguous
        "bfloat16": oracle.normal(1, 5).astype(ml_dtypes.bfloat16),
        "float16": oracle.normal(2, 4).astype(np.float16),
        "int64": np.arange(3),
        "scalar": np.float32(2.5),
    }
    path = tmp_path / "model.safetensors"
    files.write(path, tensors, {"base": "nobody"})
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "base": "nobody"}
    read = files.read(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == np.asarray(tensor).dtype
        assert read[name].shape == np.shape(tensor)
        np.testing.assert_array_equal(read[name], tensor)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write(path, {"x": np.zeros(3)})
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"(?i)dtype|type"):
        files.write(path, {"x": np.array([object()])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_and_broken_files_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=str(path)):
        files.read(path)
    files.write(path, {"x": np.zeros(300)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{path} is not a complete safetensors file"):
        files.read(path)


@pytest.mark.parametrize("kind", ["unet", "autoencoder"])
def test_diffusers_loads_what_we_write(tmp_path, kind):
    if kind == "unet":
        config, abstract = SMALL_UNET, oracle.abstract_unet(SMALL_UNET)
        model = diffusers.UNet2DConditionModel
    else:
        config, abstract = SMALL_TINY, oracle.abstract_tiny(SMALL_TINY)
        model = diffusers.AutoencoderTiny
    params = oracle.random_like(abstract)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    files.write(path, convert.to_torch(params))
    loaded, info = model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    again = convert.from_torch(oracle.tensors_of(loaded), abstract)
    jax.tree.map(np.testing.assert_array_equal, again, params)


# Surgery


@pytest.mark.parametrize("bias", ["keep", "halve"])
def test_widened_conv_in_gives_the_same_on_a_doubled_input(bias):
    params = {
        "conv_in": {"kernel": oracle.normal(0, 3, 3, 4, 5), "bias": oracle.normal(1, 5)},
        "conv_out": {"bias": oracle.normal(2, 4)},
    }
    wide = surgery.widen_conv_in(params, bias=bias)
    assert wide["conv_in"]["kernel"].shape == (3, 3, 8, 5)
    assert wide["conv_out"] is params["conv_out"]
    patch = oracle.normal(3, 3, 3, 4)
    doubled = np.concatenate([patch, patch], -1)
    np.testing.assert_allclose(
        np.einsum("hwi,hwio->o", doubled, wide["conv_in"]["kernel"]),
        np.einsum("hwi,hwio->o", patch, params["conv_in"]["kernel"]),
        rtol=1e-5,
        atol=1e-5,
    )
    factor = {"keep": 1, "halve": 0.5}[bias]
    np.testing.assert_array_equal(wide["conv_in"]["bias"], factor * params["conv_in"]["bias"])


def test_widening_wants_to_know_about_the_bias():
    with pytest.raises(ValueError, match=r"'drop'; choose 'keep' .* or 'halve'"):
        surgery.widen_conv_in({}, bias="drop")
