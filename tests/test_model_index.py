"""What a model's name and its model_index.json mean, before any weights are read."""

import huggingface_hub
import pytest

from d3epth_jax.models.config import UNetConfig
from d3epth_jax.weights import download, hub, model_index


@pytest.mark.parametrize("name", ["owner/name", "o/n", "prs-eth/marigold-depth-v1-1", "a_b/c.d-e"])
def test_names_of_the_hub(name):
    assert download.may_be_read(name)


@pytest.mark.parametrize(
    "name", ["./missing", "runs/stage2-", "a--b/c", "a/b..c", "/root/x", "a/b/c", "name", ""]
)
def test_what_is_no_name_of_the_hub_is_not_asked_for_there(name):
    assert not download.may_be_read(name)
    with pytest.raises(FileNotFoundError, match="no hub id"):
        download.locate(name)
    assert not name or hub.digest(name) == ""


def test_a_checkpoint_in_one_file_is_told_how_to_become_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/sd15.safetensors").touch()
    assert not download.may_be_read("models/sd15.safetensors")
    with pytest.raises(FileNotFoundError, match=r"is a file, .*from_single_file"):
        download.locate("models/sd15.safetensors")


def test_e2e_ft_says_in_its_arguments_whether_it_is_of_depth(tmp_path, caplog):
    assert model_index.e2e_ft(tmp_path)[0] == "MarigoldDepthPipeline"
    assert "that it predicts depth, not normals, is assumed" in caplog.text
    caplog.clear()
    arguments = tmp_path / "arguments.txt"
    arguments.write_text("modality: depth\nnoise_type: zeros\nrevision: None")
    with caplog.at_level("INFO"):
        assert model_index.e2e_ft(tmp_path)[1]["starts_at_zero"]
    assert "used as E2E-FT" in caplog.text and "assumed" not in caplog.text
    arguments.write_text("modality: normals\nnoise_type: zeros")
    with pytest.raises(ValueError, match=r"arguments.txt: .* trained for normals, not for depth"):
        model_index.e2e_ft(tmp_path)


def test_a_model_that_is_not_up_to_scale_and_shift_is_refused():
    index = {"_class_name": "MarigoldDepthPipeline", "scale_invariant": True}
    assert model_index.read(index)[0] == "MarigoldDepthPipeline"
    index |= {"scale_invariant": False, "shift_invariant": False}
    with pytest.raises(ValueError, match=r"scale_invariant is false.*shift_invariant is false"):
        model_index.read(index)


def test_null_is_no_where_diffusers_converter_writes_it():
    written = UNetConfig().to_dict() | {"upcast_attention": None}
    assert UNetConfig.from_dict(written) == UNetConfig()
    with pytest.raises(ValueError, match="in_channels is null"):
        UNetConfig.from_dict(written | {"in_channels": None})


@pytest.mark.parametrize(
    ("card", "kept"),
    [(None, None), ("my own words", ["README.md"]), (f"A model {model_index.WRITTEN}.", None)],
)
def test_a_card_of_somebodys_own_on_the_hub_is_kept(card, kept, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            self.token = token

        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def file_exists(self, repo_id, name):
            return card is not None

        def hf_hub_download(self, repo_id, name):
            (tmp_path / name).write_text(card)
            return str(tmp_path / name)

        def upload_folder(self, **given):
            calls.append(given)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push("mine", lambda directory: None, token=None, private=None).endswith("me/mine")
    assert calls[0]["ignore_patterns"] == kept and calls[0]["repo_id"] == "me/mine"
