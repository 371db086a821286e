"""d3epth bench: what it measures, what it writes, and that nothing measured is lost."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from PIL import Image

from d3epth_jax import bench, bench_cli, bench_report, cli
from d3epth_jax.bench_worker import Worker, WorkerError
from d3epth_jax.models import presets
from tests.conftest import small_model, small_unet

MODELS = {
    "d2_base": small_unet((8, 16, 16)),  # the teacher of stage 1, one level more
    "light": dataclasses.replace(small_unet((8, 16)), in_channels=8),
}


@pytest.fixture
def small_presets(monkeypatch):
    autoencoder = small_model().autoencoder
    for name, unet in MODELS.items():
        monkeypatch.setitem(presets.PRESETS, name, (unet, autoencoder))
    monkeypatch.setitem(bench.MATMUL_SIDE, "cpu", 64)


def opened(folded: bool, tmp_path) -> tuple[bench.Ours, dict, np.ndarray]:
    ours = bench.Ours()
    answer = ours.open("light", [44, 64], 2, "float32", folded)
    assert ours.run(save=str(tmp_path / "depth.npy"))["seconds"] > 0
    return ours, answer, np.load(tmp_path / "depth.npy")


def test_prediction_is_measured_as_a_whole_and_by_part(small_presets, tmp_path):
    ours, answer, depth = opened(True, tmp_path)
    _, unfolded, same = opened(False, tmp_path)
    assert depth.shape == (2, 44, 64, 1) and depth.std() > 0.01
    np.testing.assert_allclose(depth, same, atol=1e-5)
    for kind in ("macs", "params"):
        assert set(answer[kind]) == {"encoder", "unet", "decoder"}
        assert answer[kind]["unet"] < unfolded[kind]["unet"]
    assert all(ours.part(part)["seconds"] > 0 for part in answer["macs"])
    assert ours.memory()["bytes"] > 2**20
    assert ours.matmul("float32")["flops"] > 1e6


@pytest.mark.parametrize(
    ("stage", "batch"),
    [("stage2", 2), ("stage1", 2), pytest.param("stage2", 4, marks=pytest.mark.slow)],
)
def test_training_steps_are_measured_alone_and_accumulated(small_presets, stage, batch):
    found = bench.train(stage, "light", [32, 48], batch, "float32", False, 1, first=2, limit=2)
    done = [(each["micro"], each["accumulate"]) for each in found["results"]]
    assert done == [(2, 1), (2, 2)][: batch // 2]
    for each in found["results"]:
        assert np.isfinite(each["loss"]) and len(each["seconds"]) == 1
        assert each["macs"] == each["accumulate"] * found["results"][0]["macs"] > 0
    # Stage 2 also trains a light decoder.
    trained = {"stage2": ("unet", "decoder"), "stage1": ("unet",)}[stage]
    params = bench.read("light", "float32")[1]
    count = sum(x.size for part in trained for x in jax.tree.leaves(params[part]))
    assert count <= found["trained"] < count + 1000  # and adapters of features


@pytest.mark.parametrize(
    ("first", "limit", "room", "tried", "best"),
    [
        (8, 32, 100, [8, 16, 32], 32),
        (8, 32, 20, [8, 16, 32], 16),
        (8, 32, 3, [8, 4, 2], 2),
        (1, 1, 100, [1], 1),
    ],
)
def test_the_largest_batch_is_found_by_doubling_and_halving(first, limit, room, tried, best):
    seen = []

    def attempt(size):
        seen.append(size)
        if size > room:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return {"micro": size}

    assert bench.largest_that_fits(attempt, first, limit) == {"micro": best}
    assert seen == tried


def test_other_errors_and_no_room_at_all_are_told():
    def fails(size):
        raise RuntimeError("INVALID_ARGUMENT")

    def full(size):
        raise MemoryError

    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"):
        bench.largest_that_fits(fails, 8, 32)
    with pytest.raises(MemoryError, match="not even a batch of 1"):
        bench.largest_that_fits(full, 8, 32)


def test_a_worker_tells_what_went_wrong():
    with Worker("d3epth_jax.bench") as worker:
        with pytest.raises(WorkerError, match="nowhere"):
            worker.ask("open", model="nowhere", size=[8, 8], batch=1, dtype="float32", folded=True)
        assert worker.ask("matmul", dtype="float32")["platform"] == "cpu"  # it is still there
    with Worker("d3epth_jax.no_such") as worker, pytest.raises(WorkerError, match=r"no_such ended"):
        worker.ask("memory")


@pytest.fixture
def measured(monkeypatch):
    """Measurements that take no time: of `monkeypatch`ed results by model."""
    results = {}

    def measure(job, args):
        result = results.get(job["model"], ROW if job["what"] == "predict" else {})
        if isinstance(result, BaseException):
            raise result
        return job | result

    monkeypatch.setattr(bench_cli, "_measured", measure)
    return results


ROW = {
    "params": {"encoder": 10**6, "unet": 2 * 10**6, "decoder": 3 * 10**6},
    "macs": {"encoder": 10**9, "unet": 2 * 10**9, "decoder": 5 * 10**9},
    "seconds": [0.1, 0.2, 0.3],
    "first_s": 5.0,
    "parts": {"encoder": [0.05], "unet": [0.06], "decoder": [0.07]},
    "memory": {"bytes": 2**30, "kind": "resident set of the process"},
    "matmul": 160e9,
    "device": "cpu",
}


def test_what_was_measured_is_written_and_shown(measured, tmp_path, capsys):
    out = tmp_path / "results"
    measured["d3_tiny"] = {"error": "it was killed"}
    args = ["bench", "d3_fast", "d3_tiny", "--fold", "both", "--batch", "2", "--out", str(out)]
    assert cli.main(args) == 1
    shown = capsys.readouterr().out
    assert shown.count("| d3_fast ") == 2 and "d3_tiny 576x768 batch 2 float32 folded: it" in shown
    text = (out / "bench.md").read_text()
    cells = next(x for x in text.splitlines() if "| d3_fast" in x).replace(" ", "").split("|")[1:-1]
    expected = "d3_fast,576x768,2,float32,no,6.00,0.5,1,2.5,4,5.0,200.0,50.0,60.0,70.0,10,50.0,1.00"
    assert ",".join(cells) == expected
    content = json.loads((out / "bench.json").read_text())
    assert [row["model"] for row in content["rows"]] == ["d3_fast", "d3_tiny"] * 2
    assert content["rows"][0]["seconds"] == [0.1, 0.2, 0.3] and content["machine"]["cores"] >= 1
    chart = np.asarray(Image.open(out / "macs.png"))
    colors = [(chart == color).all(-1).sum() for color in bench_report.PARTS.values()]
    legend = 19 * 19
    bars = [count - legend for count in colors]
    assert bars[0] < bars[1] < bars[2] and bars[2] > 2 * 31 * 900 * 0.5


def test_what_was_done_before_an_interrupt_stays(measured, tmp_path, capsys):
    measured["d3_tiny"] = KeyboardInterrupt()
    args = ["bench", "d3_fast", "d3_tiny", "d3_base", "--out", str(tmp_path)]
    assert cli.main(args) == 130
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["d3_fast"]
    assert "| d3_fast" in capsys.readouterr().out
    # And a second call goes on from there.
    measured["d3_fast"], measured["d3_tiny"] = {"error": "measured again"}, ROW
    assert cli.main([*args, "--resume"]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["d3_fast", "d3_tiny", "d3_base"]
    measured["d3_fast"] = {"error": "measured again"}
    assert cli.main(args) == 1


def test_all_problems_are_told_at_once(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "torch" else found(n, *a)
    )
    with pytest.raises(SystemExit) as error:
        cli.main(
            [
                *("bench", "d3_fsat", "d3_nano", "--size", "576", "--train-size", "60x60"),
                *("--runs", "0", "--compare", "diffusers", "--batch", "0"),
                *("--out", str(tmp_path / "file")),
            ]
        )
    assert error.value.code == 2
    told = capsys.readouterr().err
    for problem in (
        "did you mean d3_fast?",
        "d3_nano: its UNet takes the RGB latent alone",
        "--size 576:",
        "--train-size 60x60: training takes multiples of 8",
        "--runs must be at least 1",
        "--batch must be at least 1",
        "needs torch: pip install torch diffusers transformers",
        "file cannot be made",
    ):
        assert problem in told


def test_all_is_everything_an_accelerator_is_to_show(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--all"]) == 0
    jobs = json.loads((tmp_path / "bench/bench.json").read_text())["rows"]
    assert jobs[0]["fold"] and not jobs[-1]["fold"]
    predicted = [job for job in jobs if job["what"] == "predict"]
    assert len(predicted) == len(presets.PRESETS) * 2 * 2
    assert {job["dtype"] for job in jobs if "dtype" in job} == {"bfloat16"}
    compared = [(job["model"], job["batch"]) for job in predicted if job["compared"]]
    assert compared == [("d2_base", 1), ("d2_base", 8)]
    rest = [(job["what"], job["model"], job["size"]) for job in jobs if job["what"] != "predict"]
    assert rest == [
        ("stage2", "d2_base", [480, 640]),
        ("stage1", "d3_light_small", [480, 640]),
        ("pieces", "d2_base", [576, 768]),
    ]


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
