"""d3epth bench --compare diffusers: taking turns, and that the same weights give the same depth."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from d3epth_jax import DepthPipeline, cli, macs
from d3epth_jax.bench import measure as bench_measure
from d3epth_jax.bench.worker import WorkerError, random_picture
from d3epth_jax.models.depth_model import abstract_params
from d3epth_jax.weights import hub
from tests.conftest import small_model, small_unet
from tests.test_bench import ROW
from tests.test_bench_training import arguments
from tests.unet_oracle import random_like


def test_each_measured_turn_follows_one_that_is_not_and_memory_the_pipeline(tmp_path):
    asked = []

    class FakeWorker:
        def __init__(self, name):
            self.name = name

        def ask(self, do, save="", **request):
            asked.append((self.name, request.get("part", do)))
            if save:
                np.save(save, np.ones(3))
            return {"seconds": float(len(asked)), "variants": ["eager"], "device": "cpu"}

    np.save(tmp_path / "ours.npy", np.zeros(3))
    ours, theirs = FakeWorker("ours"), FakeWorker("theirs")
    job = {"size": [8, 8], "batch": 1, "dtype": "float32", "model": "m"}
    row = {"steps": 1, "macs": dict.fromkeys(macs.PARTS), "platform": "cpu"}
    bench_measure._compare(job, arguments(), ours, theirs, tmp_path, "", row)
    found = row["compare"]["eager"]

    def turns(name):
        return [("ours", name)] * 2 + [("theirs", name)] * 2

    begin = [("theirs", name) for name in ("open", "prepare", "run")]
    parts = [turn for part in macs.PARTS for turn in 2 * turns(part)]
    assert asked == begin + 2 * turns("run") + [("theirs", "memory")] + parts
    assert found["ours"]["pipeline"] == [5.0, 9.0] and found["theirs"]["pipeline"] == [7.0, 11.0]


def test_a_variant_that_fails_leaves_those_measured_before(tmp_path, monkeypatch):
    class FakeWorker:
        def ask(self, do, save="", **request):
            if request.get("variant") == "compiled":
                raise WorkerError("no compiler")
            if save:
                np.save(save, np.ones(3))
            return {**ROW, "steps": 1, "variants": ["eager", "compiled"], "flops": 1.0} | {
                "seconds": 1.0
            }

    monkeypatch.setattr(bench_measure, "_worker", lambda *_: FakeWorker())
    job = {"what": "predict", "model": "d3_fast", "size": [8, 8], "batch": 1, "dtype": "float32"}
    job |= {"attention": "auto", "fold": True, "compared": True}
    row = bench_measure._predict(job, arguments())
    assert set(row["compare"]) == {"eager"} and row["error"] == "diffusers: no compiler"


@pytest.mark.parametrize("ours, theirs", [("gpu", "cpu"), ("cpu", "NVIDIA H200"), ("tpu", "cpu")])
def test_a_cpu_is_not_compared_with_an_accelerator(tmp_path, ours, theirs):
    worker = types.SimpleNamespace(ask=lambda *_, **__: {"device": theirs, "variants": ["eager"]})
    job = {"size": [8, 8], "batch": 1, "dtype": "float32", "model": "m"}
    row = {"steps": 1, "platform": ours, "device": "ours"}
    with pytest.raises(WorkerError, match=f"JAX computes on ours, torch on {theirs}"):
        bench_measure._compare(job, arguments(), worker, worker, tmp_path, "", row)
    assert "compare" not in row


def test_diffusers_unet_takes_all_steps_and_memory_begins_when_it_is_prepared(
    saved, monkeypatch, tmp_path
):
    from d3epth_jax.bench import compare_diffusers

    theirs, calls = compare_diffusers.Theirs(), []
    theirs.open(str(saved[0]), [32, 48], 1, "float32", steps=3)
    theirs.pipe.unet.register_forward_hook(lambda *_: calls.append("unet"))
    monkeypatch.setattr(compare_diffusers.memory, "forget_peak", lambda: calls.append("forget"))
    theirs.prepare("channels_last")
    np.save(tmp_path / "picture.npy", random_picture((32, 48)))
    for run in (lambda: theirs.run(str(tmp_path / "picture.npy")), lambda: theirs.part("unet")):
        assert run()["seconds"] > 0
    assert calls == ["forget"] + 2 * 3 * ["unet"]


def test_diffusers_is_given_the_prompt_that_ours_takes(saved, tmp_path):
    import torch

    from d3epth_jax.bench import compare_diffusers

    directory = tmp_path / "model"
    shutil.copytree(saved[0], directory)
    for padding, tokens in (("do_not_pad", 2), ("max_length", 77)):
        index = json.loads((directory / "model_index.json").read_text())
        index["prompt_padding"] = padding
        (directory / "model_index.json").write_text(json.dumps(index))
        ours = hub.load_model(directory).params["prompt"]
        pipe = compare_diffusers.read(directory, torch.float32)
        pipe([Image.new("RGB", (16, 16))], processing_resolution=0, num_inference_steps=1)
        theirs = pipe.empty_text_embedding.numpy()
        assert theirs.shape == ours.shape and ours.shape[1] == tokens
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_diffusers_runs_a_model_that_attends_to_no_prompt(tmp_path):
    from d3epth_jax.bench import compare_diffusers

    unet = dataclasses.replace(
        small_unet(channels=8, mid=None),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    model = small_model(unet)
    params = random_like(abstract_params(model))
    hub.save_model(tmp_path / "model", model, params)
    theirs = compare_diffusers.Theirs()
    theirs.open(str(tmp_path / "model"), [32, 48], 1, "float32", steps=1)
    np.save(tmp_path / "picture.npy", picture := random_picture((32, 48)))
    theirs.run(str(tmp_path / "picture.npy"), save=str(tmp_path / "depth.npy"))
    ours = DepthPipeline(model, params)(picture, processing_resolution=0, num_inference_steps=1)
    found = np.load(tmp_path / "depth.npy")
    assert found.std() > 0.01
    np.testing.assert_allclose(found, ours.prediction, atol=2e-4)


def test_pictures_to_compare_with_need_no_jax():
    code = "from d3epth_jax.bench.worker import random_picture as r; r((8, 8)); import sys"
    check = f"{code}; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert out.stdout == "False\n"


def test_beside_diffusers_the_same_weights_give_the_same_depth(saved, tmp_path, capsys):
    directory, _ = saved
    args = ["bench", str(directory), "--size", "44x64", "--runs", "1", "--compare", "diffusers"]
    assert cli.main([*args, "--out", str(tmp_path)]) == 0
    assert "Beside diffusers" in capsys.readouterr().out
    row = json.loads((tmp_path / "bench.json").read_text())["rows"][0]
    assert {"eager", "channels_last"} <= set(row["compare"])
    assert (
        row["theirs"]["threads"]
        == json.loads((tmp_path / "bench.json").read_text())["machine"]["cores"]
    )
    for found in row["compare"].values():
        assert found["difference"] < 2e-4 and found["depth_std"] > 0.05
        for who in ("ours", "theirs"):
            assert set(found[who]) == {"pipeline", "encoder", "unet", "decoder"}
            assert all(len(times) == 1 and times[0] > 0 for times in found[who].values())
