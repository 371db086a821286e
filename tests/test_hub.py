"""Model directories of diffusers' layout and of the hub: round trips, and what is refused."""

import json
import shutil

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from d3epth_jax import DepthPipeline, cli
from d3epth_jax.weights import convert, files, hub
from tests import pipeline_oracle as oracle


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_identical(dtype, saved, tmp_path):
    theirs = diffusers.MarigoldDepthPipeline.from_pretrained(
        saved[0], torch_dtype=getattr(torch, dtype)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = hub.load_model(tmp_path / "theirs", param_dtype=None)
    hub.save_model(tmp_path / "ours", loaded.model, loaded.params, loaded.text)
    oracle.assert_same_tensors(
        oracle.tensors_below(tmp_path / "ours"), oracle.tensors_below(tmp_path / "theirs")
    )


def test_bfloat16_is_torchs_cast(saved, tmp_path):
    DepthPipeline.from_pretrained(saved[0], dtype="bfloat16").save_pretrained(tmp_path / "ours")
    ours = oracle.tensors_below(tmp_path / "ours")
    for key, tensor in oracle.tensors_below(saved[0]).items():
        if key.startswith("text_encoder/"):
            continue
        cast = torch.from_numpy(tensor).to(torch.bfloat16).view(torch.int16).numpy()
        assert ours[key].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(ours[key].view(np.int16), cast, err_msg=key)


def test_diffusers_loads_what_we_save_without_a_missing_key(saved, tmp_path):
    DepthPipeline.from_pretrained(saved[0]).save_pretrained(tmp_path / "ours")
    for cls, folder in (
        (diffusers.UNet2DConditionModel, "unet"),
        (diffusers.AutoencoderKL, "vae"),
        (transformers.CLIPTextModel, "text_encoder"),
    ):
        _, info = cls.from_pretrained(tmp_path / "ours" / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], folder
    theirs = diffusers.MarigoldDepthPipeline.from_pretrained(tmp_path / "ours")
    theirs.set_progress_bar_config(disable=True)
    photo = oracle.photos()["small"]
    np.testing.assert_array_equal(
        oracle.run(theirs, photo, steps=1), oracle.run(saved[1], photo, steps=1)
    )
    assert "README.md" in {path.name for path in (tmp_path / "ours").iterdir()}


def test_shards_and_variants_are_read(saved, tmp_path):
    directory, theirs = saved
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert list((tmp_path / "shards/unet").glob("*.index.json"))
    whole, sharded = hub.load_model(directory), hub.load_model(tmp_path / "shards")
    jax.tree.map(np.testing.assert_array_equal, whole.params, sharded.params)

    half = diffusers.MarigoldDepthPipeline.from_pretrained(directory, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"unet.*fp16.*variant[\s\S]*vae.*fp16"):
        hub.load_model(tmp_path / "half")
    loaded = hub.load_model(tmp_path / "half", variant="fp16")
    kernel = loaded.params["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(
        kernel, whole.params["unet"]["conv_in"]["kernel"].astype(np.float16).astype(np.float32)
    )


def test_the_prompt_is_computed_once(saved, monkeypatch, tmp_path):
    directory, theirs = saved
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = hub.load_model(directory).params["prompt"]
    np.testing.assert_allclose(first, theirs.empty_text_embedding.numpy(), atol=2e-5)
    (cached,) = (tmp_path / "d3epth_jax/prompts").iterdir()
    files.write(cached, {"prompt": first + 1})
    np.testing.assert_array_equal(hub.load_model(directory).params["prompt"], first + 1)
    cached.write_bytes(b"torn")
    np.testing.assert_array_equal(hub.load_model(directory).params["prompt"], first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convert_writes_the_number_type_that_is_asked_for(dtype, saved, tmp_path):
    arguments = ["convert", str(saved[0]), str(tmp_path / "out"), "--dtype", dtype]
    assert cli.main([*arguments, "--save-variant", "v"]) == 0
    expected = getattr(torch, dtype)
    assert (tmp_path / "out/unet" / f"{hub.STEM}.v.safetensors").is_file()
    theirs = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "out/unet", variant="v", torch_dtype="auto"
    )
    for key, tensor in saved[1].unet.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor.to(expected)), key


def test_convert_refuses_without_a_trace(saved, tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no directory, and no hub id" in capsys.readouterr().err
    shutil.copytree(saved[0], tmp_path / "bad")
    (tmp_path / "bad/vae" / f"{hub.STEM}.safetensors").write_bytes(b"torn")
    assert cli.main(["convert", str(tmp_path / "bad"), str(tmp_path / "out")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_stable_diffusion_itself_is_refused_with_advice(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "sd")
    index = tmp_path / "sd/model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(
        ValueError, match=r"StableDiffusionPipeline.*predicts no depth.*config.init"
    ):
        DepthPipeline.from_pretrained(tmp_path / "sd")


def test_every_wrong_key_of_every_component_is_told_at_once(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "m")
    for folder, missing in (("unet", "conv_in.bias"), ("vae", "quant_conv.weight")):
        path = tmp_path / "m" / folder / f"{hub.STEM}.safetensors"
        tensors = dict(files.read(path))
        tensors.pop(missing)
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["conv_out.bias" if folder == "unet" else "decoder.conv_in.bias"] = np.zeros(7)
        files.write(path, tensors)
    with pytest.raises(ValueError) as error:
        hub.load_model(tmp_path / "m")
    for word in (
        "missing: conv_in.bias",
        "missing: quant_conv.weight",
        "wrong shape: conv_out.bias",
        "wrong shape: decoder.conv_in.bias",
    ):
        assert word in str(error.value)
    assert str(error.value).count("unexpected: extra.weight") == 2


def test_truncated_files_and_pickles_are_refused(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "m")
    path = tmp_path / "m/unet" / f"{hub.STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"unet.*not a complete safetensors file"):
        hub.load_model(tmp_path / "m")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"unet[\s\S]*\.bin is a pickle and is not read"):
        hub.load_model(tmp_path / "m")
    (tmp_path / "m/unet/extra.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a pickle"):
        files.read(tmp_path / "m/unet/extra.ckpt")


def test_broken_indices_are_refused(saved, tmp_path):
    saved[1].save_pretrained(tmp_path / "m", max_shard_size="30KB")
    index = next((tmp_path / "m/unet").glob("*.index.json"))
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    for shard in shards[:2]:
        (tmp_path / "m/unet" / shard).rename(tmp_path / shard)
    with pytest.raises(FileNotFoundError) as error:
        hub.load_model(tmp_path / "m")
    assert all(shard in str(error.value) for shard in shards[:2])
    for shard in shards[:2]:
        (tmp_path / shard).rename(tmp_path / "m/unet" / shard)
    key = next(iter(content["weight_map"]))
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {key: "../x.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        hub.load_model(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"ghost": shards[0]}}))
    with pytest.raises(ValueError, match=r"lacks ghost"):
        hub.load_model(tmp_path / "m")


def test_a_hub_id_that_cannot_be_had_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"owner/model is not in .* and cannot be fetched"):
        hub.load_model("owner/model", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="no directory, and no hub id"):
        hub.load_model("no/such/directory")
    with pytest.raises(ValueError, match="must stay inside"):
        hub.load_model("owner/model", subfolder="../x")


def test_a_model_in_the_hubs_cache_is_found_offline(saved, tmp_path):
    # The cache's layout: snapshots/COMMIT below models--OWNER--NAME, refs/main names the commit.
    repo = tmp_path / "models--owner--model"
    shutil.copytree(saved[0], repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    loaded = hub.load_model("owner/model", cache_dir=tmp_path, local_files_only=True)
    assert loaded.model.base == "owner/model"
    with pytest.raises(FileNotFoundError):
        hub.load_model("owner/model", cache_dir=tmp_path, local_files_only=True, revision="b" * 40)


def test_taesd_is_read_in_both_namings(shared, tmp_path):
    config, params = hub.load_autoencoder(shared / "weights/taesd")
    theirs = diffusers.AutoencoderTiny()
    tensors = {key: torch.from_numpy(x.copy()) for key, x in convert.to_torch(params).items()}
    theirs.load_state_dict(tensors)
    theirs.save_pretrained(tmp_path / "tiny")
    again, same = hub.load_autoencoder(tmp_path / "tiny")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)
