"""Model directories of diffusers' layout and of the hub: round trips, and what is refused."""

import dataclasses
import fnmatch
import json
import pathlib
import shutil
import warnings

import diffusers
import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import errors

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

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", no_home)
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


@pytest.mark.parametrize("layout", ["diffusers", "orbax"])
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_numbers_beyond_float16_are_refused_by_name(source, layout, saved, tmp_path, capsys):
    model, params, text, _ = hub.load_model(saved[0], param_dtype=source)
    unet, encoder = params["unet"], params["encoder"]
    for name in ("conv_in", "conv_out", "conv_norm_out"):
        unet[name]["bias"] = unet[name]["bias"] - 65600  # float16 ends at 65504
    encoder["conv_in"]["kernel"] = encoder["conv_in"]["kernel"] * np.asarray(1e8, source)
    for inner in ("conv_in", "conv_out", "quant_conv"):
        encoder[inner]["bias"] = encoder[inner]["bias"] + np.asarray(1e5, source)
    hub.save_model(tmp_path / "large", model, params, text)
    command = ["convert", str(tmp_path / "large"), str(tmp_path / "out"), "--layout", layout]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert cli.main([*command, "--dtype", "float16"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    _, told, *listed = capsys.readouterr().err.splitlines()
    assert told.startswith("7 tensor(s) have numbers that float16 cannot hold; choose another")
    assert [line.strip() for line in listed] == [
        *(f"unet: conv_{name}.bias" for name in ("in", "norm_out", "out")),
        *("vae: encoder.conv_in.bias", "vae: encoder.conv_in.weight", "and 2 more"),
    ]
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0


def test_convert_refuses_without_a_trace(saved, tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no directory, no hub id" in capsys.readouterr().err
    shutil.copytree(saved[0], tmp_path / "bad")
    (tmp_path / "bad/vae" / f"{hub.STEM}.safetensors").write_bytes(b"torn")
    assert cli.main(["convert", str(tmp_path / "bad"), str(tmp_path / "out")]) == 2
    for said, *options in (
        ("has no revision v1", "--revision", "v1"),
        ("variant '../fp16': letters", "--save-variant", "../fp16"),
        ("an Orbax tree has no variants", "--save-variant", "fp16", "--layout", "orbax"),
    ):
        capsys.readouterr()
        assert cli.main(["convert", str(saved[0]), str(tmp_path / "out"), *options]) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_run_of_another_version_is_not_converted(tmp_path, capsys):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text('{"seed": 0}')
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "config.json is of another version, without" in told and "'teacher'" in told


def test_stable_diffusion_itself_is_refused_with_advice(tmp_path):
    oracle.stable_diffusion(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline.*not read as.*config.init"):
        DepthPipeline.from_pretrained(tmp_path / "sd")


def test_e2e_ft_as_its_training_saves_it_is_one_step_from_zeros(saved, tmp_path, caplog):
    """A StableDiffusionPipeline with 8 channels, a DDPMScheduler, and no word on how it is used."""
    parts = saved[1].components
    schedule = diffusers.DDPMScheduler.from_config(parts["scheduler"].config)
    components = {name: parts[name] for name in ("unet", "vae", "text_encoder", "tokenizer")}
    diffusers.StableDiffusionPipeline(
        **components,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "e2e")
    with caplog.at_level("INFO"):
        pipe = DepthPipeline.from_pretrained(tmp_path / "e2e")
    assert "it is used as E2E-FT" in caplog.text
    photo = oracle.photos()["small"]
    zeros = np.zeros_like(oracle.latents_for(photo))
    np.testing.assert_allclose(
        pipe(photo, processing_resolution=64).prediction,
        oracle.run(saved[1], photo, steps=1, latents=zeros),
        atol=2e-5,
    )
    assert pipe.model.processing_resolution == 768


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


def test_every_wrong_setting_of_every_file_is_told_at_once(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "m")
    for name, wrong in (
        ("unet/config.json", {"block_out_channels": 320}),
        ("vae/config.json", {"scaling_factor": None}),
        ("scheduler/scheduler_config.json", {"beta_start": None}),
        ("model_index.json", {"default_denoising_steps": "4", "prediction_type": "normals"}),
        ("model_index.json", {"processing_aspect": 0}),
    ):
        path = tmp_path / "m" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError) as error:
        hub.load_model(tmp_path / "m")
    lines = str(error.value).splitlines()
    for name, word in (
        ("unet/config.json", "a value of the wrong type"),
        ("vae/config.json", "scaling_factor is null"),
        ("scheduler_config.json", "NoneType"),
        ("model_index.json", "default_denoising_steps '4'"),
        ("model_index.json", "prediction_type 'normals'"),
        ("model_index.json", "processing_aspect 0"),
    ):
        assert any(name in line for line in lines) and word in str(error.value), name


def test_a_broken_text_encoder_is_told_with_the_rest(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "m")
    for folder, name in (("unet", hub.STEM), ("text_encoder", "model")):
        (tmp_path / "m" / folder / f"{name}.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"unet.*not a complete[\s\S]*text_encoder.*not a compl"):
        hub.load_model(tmp_path / "m")


def test_the_prompt_of_another_variant_is_another(saved, tmp_path):
    """Files of both lie in one folder, as on the hub."""
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        pipe = diffusers.MarigoldDepthPipeline.from_pretrained(saved[0], torch_dtype=dtype)
        pipe.save_pretrained(tmp_path / "both", variant=variant)
    half = hub.load_model(tmp_path / "both", variant="fp16").params["prompt"]
    full = hub.load_model(tmp_path / "both").params["prompt"]
    np.testing.assert_array_equal(full, hub.load_model(saved[0]).params["prompt"])
    assert 0 < np.abs(half - full).max() < 0.02


def test_nothing_but_a_model_is_replaced(saved, tmp_path, capsys, monkeypatch):
    pipe = DepthPipeline.from_pretrained(saved[0])
    (tmp_path / "thesis/other").mkdir(parents=True)
    (tmp_path / "thesis/notes.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis holds more than a model.*notes.txt, other$"):
        pipe.save_pretrained(tmp_path / "thesis")
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"picture")
    assert cli.main(["convert", str(saved[0]), str(photo)]) == 2
    assert "photo.jpg is a file" in capsys.readouterr().err
    model = tmp_path / "model"
    pipe.save_pretrained(model)
    assert cli.main(["convert", str(model), f"{model}/../model", "--dtype", "float16"]) == 2
    assert "is the source" in capsys.readouterr().err
    assert photo.read_bytes() == b"picture" and (tmp_path / "thesis/notes.txt").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"In it: README.md"):
        pipe.save_pretrained(tmp_path / "notes")  # whose name a model's file might have
    (model / "unet/training.pt").write_bytes(b"hours of work")
    (model / "vae/plots").mkdir()
    with pytest.raises(FileExistsError, match=r"In it: unet/training.pt, vae/plots$"):
        pipe.save_pretrained(model)
    (tmp_path / "empty").mkdir()
    pipe.save_pretrained(tmp_path / "empty")
    pipe.save_pretrained(tmp_path / "empty")  # its own model it replaces
    assert "written by `d3epth_jax`" in (tmp_path / "empty/README.md").read_text()
    (tmp_path / "empty/README.md").write_text("A card of one's own")
    pipe.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty/README.md").read_text() == "A card of one's own"
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="the folder you are in"):
        pipe.save_pretrained(".")


def test_orbax_and_back_is_bit_identical(saved, tmp_path, capsys):
    assert cli.main(["convert", str(saved[0]), str(tmp_path / "o"), "--layout", "orbax"]) == 0
    assert not list((tmp_path / "o").rglob("diffusion_pytorch_model*"))
    assert cli.main(["convert", str(tmp_path / "o"), str(tmp_path / "again")]) == 0
    oracle.assert_same_tensors(
        oracle.tensors_below(tmp_path / "again"), oracle.tensors_below(saved[0])
    )
    before = hub.digest(tmp_path / "o")
    files = [path for path in (tmp_path / "o/orbax").rglob("d/*") if path.is_file()]
    weights = max(files, key=lambda path: path.stat().st_size)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert cli.main(["convert", str(tmp_path / "o"), str(tmp_path / "torn")]) == 2
    assert f"{tmp_path / 'o/orbax'} is not a complete checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "torn").exists()
    weights.write_bytes(whole + b"x")
    assert hub.digest(tmp_path / "o") != before
    config = json.loads((tmp_path / "o/unet/config.json").read_text())
    config["cross_attention_dim"] = 24
    (tmp_path / "o/unet/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"wrong shape: unet/down_blocks_0.*attn2/to_k/kernel"):
        hub.load_model(tmp_path / "o")
    (tmp_path / "o/orbax/_METADATA").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint of Orbax"):
        hub.load_model(tmp_path / "o")


def test_a_saved_model_names_the_hub_but_no_path_of_this_machine(saved, tmp_path):
    secret = tmp_path / "home/alice/secret"
    shutil.copytree(saved[0], secret)
    DepthPipeline.from_pretrained(secret).save_pretrained(tmp_path / "out")
    texts = [(tmp_path / "out" / name).read_text() for name in ("README.md", "model_index.json")]
    assert not any("alice" in text for text in texts) and "base_model:" not in texts[0]
    loaded = hub.load_model(saved[0])
    model = dataclasses.replace(loaded.model, base="owner/model@abc")
    hub.save_model(tmp_path / "out", model, loaded.params, loaded.text)
    assert "\nbase_model: owner/model\n" in (tmp_path / "out/README.md").read_text()


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
    with pytest.raises(
        FileNotFoundError, match=r"no directory owner/model, .* not in .* and cannot be fetched"
    ):
        hub.load_model("owner/model", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="no directory, no hub id"):
        hub.load_model("no/such/directory")
    with pytest.raises(ValueError, match="must stay inside"):
        hub.load_model("owner/model", subfolder="../x")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (OSError(28, "No space left on device"), "could not be downloaded: .*No space left"),
        ("transport", "could not be downloaded: the server went away"),
    ],
)
def test_why_a_download_failed_is_told(raised, message, monkeypatch):
    if raised == "transport":
        # The HTTP library's own error, which is no OSError.
        kind = next(c for c in errors.HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
        raised = kind("the server went away")

    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match=f"hub model owner/model {message}"):
        hub.load_model("owner/model")


def test_an_autoencoder_of_the_hub_lies_at_its_root(saved, tmp_path, monkeypatch):
    """As stabilityai/sd-vae-ft-mse; the files that are asked for are those that are read."""
    half = diffusers.AutoencoderKL.from_pretrained(
        saved[0], subfolder="vae", torch_dtype=torch.float16
    )
    half.save_pretrained(tmp_path / "vae16", variant="fp16")

    def fetch(name, allow_patterns, **options):
        for path in (tmp_path / "vae16").iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                (tmp_path / "cache").mkdir(exist_ok=True)
                shutil.copy(path, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    _, params = hub.load_autoencoder("owner/vae", variant="fp16")
    theirs = half.state_dict()["decoder.conv_out.bias"].float().numpy()
    np.testing.assert_array_equal(params["decoder"]["conv_out"]["bias"], theirs)


def test_a_model_in_the_hubs_cache_is_found_offline(saved, tmp_path):
    # The cache's layout: snapshots/COMMIT below models--OWNER--NAME, refs/main names the commit.
    repo = tmp_path / "models--owner--model"
    shutil.copytree(saved[0], repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    loaded = hub.load_model("owner/model", cache_dir=tmp_path, local_files_only=True)
    assert loaded.model.base == f"owner/model@{'a' * 40}"
    # Whichever of its files lie there.
    snapshot = repo / "snapshots" / ("a" * 40)
    assert hub.digest(snapshot) == "a" * 40 and hub.digest(snapshot / "unet").endswith("aaa/unet")
    with pytest.raises(FileNotFoundError):
        hub.load_model("owner/model", cache_dir=tmp_path, local_files_only=True, revision="b" * 40)
    with pytest.raises(ValueError, match="nano is no model of the hub, and has no revision main"):
        hub.load_model("nano", revision="main")


def test_taesd_is_read_in_both_namings(shared, tmp_path):
    config, params = hub.load_autoencoder(shared / "weights/taesd")
    theirs = diffusers.AutoencoderTiny()
    tensors = {key: torch.from_numpy(x.copy()) for key, x in convert.to_torch(params).items()}
    theirs.load_state_dict(tensors)
    theirs.save_pretrained(tmp_path / "tiny")
    again, same = hub.load_autoencoder(tmp_path / "tiny")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)
