"""d3epth bench: what it measures, what it writes, and that nothing measured is lost."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import d3epth_jax
from d3epth_jax import cli
from d3epth_jax.bench import cli as bench_cli
from d3epth_jax.bench import measure as bench_measure
from d3epth_jax.bench import plan as bench_plan
from d3epth_jax.bench import predict as bench
from d3epth_jax.bench import report as bench_report
from d3epth_jax.bench.worker import Worker, WorkerError
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.weights import hub
from tests.conftest import small_model, small_unet


def test_a_worker_tells_what_went_wrong():
    with Worker("d3epth_jax.bench.predict") as worker:
        with pytest.raises(WorkerError, match="nowhere"):
            worker.ask("open", model="nowhere", size=[8, 8], batch=1, dtype="float32", folded=True)
        assert worker.ask("device")["platform"] == "cpu"  # it is still there
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

    monkeypatch.setattr(bench_measure, "measured", measure)
    monkeypatch.setattr(bench_measure, "device", bench.device)
    return results


ROW = {
    "params": {"encoder": 10**6, "unet": 2 * 10**6, "decoder": 3 * 10**6},
    "macs": {"encoder": 10**9, "unet": 2 * 10**9, "decoder": 5 * 10**9},
    "seconds": [0.1, 0.2, 0.3],
    "first_s": 5.0,
    "compile_s": 3.25,
    "parts": {"encoder": [0.05], "unet": [0.06], "decoder": [0.07]},
    "memory": {"bytes": 2**30, "kind": "resident set of the process"},
    "matmul": 160e9,
    **bench.device(),
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
    expected = "d3_fast,576x768,2,float32,no,6.00,0.5,1,2.5,4,3.2,5.0,200.0,50.0,60.0,70.0,10,50.0"
    assert ",".join(cells) == f"{expected},1.00"
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
    # Never begun anew over what is there.
    with pytest.raises(SystemExit):
        cli.main(args)
    assert "holds measurements already" in capsys.readouterr().err
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows


def test_all_problems_are_told_at_once(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "torch" else found(n, *a)
    )
    with pytest.raises(SystemExit) as error:
        cli.main(
            [
                *("bench", "d3_fsat", "d3_nano", "nano", "--size", "576", "--train-size", "60x60"),
                *("--what", "predict", "pieces"),
                *("--runs", "0", "--compare", "diffusers", "--batch", "0"),
                *("--ahead", "0", "--micro", "5", "--out", str(tmp_path / "file")),
            ]
        )
    assert error.value.code == 2
    told = capsys.readouterr().err
    for problem in (
        "did you mean d3_fast?",
        "nano: training and pieces are measured of presets: did you mean d3_nano?",
        "d3_nano: its UNet takes the RGB latent alone",
        "--size 576:",
        "--train-size 60x60: training takes multiples of 8",
        "--runs must be at least 1",
        "--batch must be at least 1",
        "--ahead must be at least 1",
        "--micro 5 does not divide --train-batch 32",
        "needs torch: pip install torch diffusers transformers",
        "file cannot be made",
    ):
        assert problem in told
    with pytest.raises(SystemExit):
        cli.main(["bench", "d3_fast", "--out", str(tmp_path / ("long" * 99))])
    assert "cannot measure:" in capsys.readouterr().err


def test_a_comparison_that_nothing_asks_for_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "d2_base", "--what", "stage2", "--compare", "diffusers"])
    assert "--compare diffusers is of predictions: add predict" in capsys.readouterr().err


def test_all_is_everything_an_accelerator_is_to_show(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--all"]) == 0
    jobs = json.loads((tmp_path / "bench/bench.json").read_text())["rows"]
    first = [(job["what"], job["model"], job.get("fold")) for job in jobs[:6]]
    assert first == [
        ("predict", "d2_base", True),
        ("predict", "d2_base", True),
        *[("stage2", "d2_base", None)] * 3,
        ("stage1", "d3_light_small", None),
    ]
    assert [job["remat"] for job in jobs if job["what"] == "stage1"] == [True, False]
    ways = [(job["remat"], job["micro"]) for job in jobs if job["what"] == "stage2"]
    assert ways == [(True, 0), (False, 0), (False, 8)]  # the last as configs/d2.py does it
    assert not jobs[-2]["fold"]
    predicted = [job for job in jobs if job["what"] == "predict"]
    assert len(predicted) == len(presets.PRESETS) * 2 * 2
    assert {job["dtype"] for job in jobs if "dtype" in job} == {"bfloat16"}
    compared = [(job["model"], job["batch"]) for job in predicted if job["compared"]]
    assert compared == [("d2_base", 1), ("d2_base", 8)]
    rest = [(job["what"], job["model"], job["size"]) for job in jobs if job["what"] != "predict"]
    assert rest == [
        *[("stage2", "d2_base", [480, 640])] * 3,
        *[("stage1", "d3_light_small", [480, 640])] * 2,
        ("pieces", "d2_base", [576, 768]),
    ]


def test_all_of_named_presets_is_of_each_of_them(measured, tmp_path):
    assert cli.main(["bench", "d3_fast", "d3_turbo", "--all", "--out", str(tmp_path)]) == 0
    for what in bench_plan.WHAT:
        of = [row["model"] for row in saved_rows(tmp_path) if row["what"] == what]
        assert set(of) == {"d3_fast", "d3_turbo"}, what


def saved_rows(out) -> list[dict]:
    return json.loads((out / "bench.json").read_text())["rows"]


def test_resume_keeps_what_is_not_asked_for_now_or_not_reached(measured, tmp_path):
    def models():
        return sorted(row["model"] for row in saved_rows(tmp_path))

    out = ["--out", str(tmp_path)]
    measured["d3_tiny"] = {"error": "it was killed"}
    assert cli.main(["bench", "d3_fast", "d3_tiny", *out]) == 1
    # The failure is not of this call.
    assert cli.main(["bench", "d3_base", *out, "--resume"]) == 0
    assert models() == ["d3_base", "d3_fast", "d3_tiny"]
    measured["d3_small"] = KeyboardInterrupt()
    args = ["bench", "d2_base", "d3_small", "d3_fast", *out]
    assert cli.main([*args, "--resume"]) == 130
    assert models() == ["d2_base", "d3_base", "d3_fast", "d3_tiny"]


def test_resume_measures_again_what_has_fewer_runs_or_was_not_compared(measured, tmp_path):
    def seen(*more) -> list[tuple]:
        args = ["bench", "d3_fast", "--out", str(tmp_path), "--resume", *more]
        assert cli.main(args) == 0
        return [(row["runs"], row["compared"]) for row in saved_rows(tmp_path)]

    assert seen("--runs", "3") == [(3, False)]
    assert seen("--runs", "2") == [(3, False)]
    assert seen("--runs", "4") == [(4, False)]
    times = {"pipeline": [1.0], **ROW["parts"]}
    found = {"ours": times, "theirs": times, "memory": ROW["memory"]}
    found |= {"difference": 0.0, "depth_std": 0.1}
    measured["d3_fast"] = ROW | {"compare": {"eager": found}}
    assert seen("--runs", "4", "--compare", "diffusers") == [(4, True)]
    assert seen("--runs", "4") == [(4, True)]
    measured["d3_fast"] = ROW  # more runs, which tell nothing of diffusers: both stay
    assert seen("--runs", "5") == [(4, True), (5, False)]
    assert seen("--runs", "5") == [(4, True), (5, False)]


def test_an_error_does_not_take_the_place_of_what_was_measured(measured, tmp_path):
    def rows(result, runs) -> list[tuple]:
        measured["d3_fast"] = result
        args = ["bench", "d3_fast", "--out", str(tmp_path), "--resume", "--runs", str(runs)]
        assert cli.main(args) == ("error" in result)
        return [("seconds" in row, "error" in row, row["runs"]) for row in saved_rows(tmp_path)]

    error, partly, whole = {"error": "killed"}, ROW | {"error": "diffusers: killed"}, ROW
    assert rows(error, 1) == [(False, True, 1)]
    assert rows(partly, 2) == [(True, True, 2)]
    for runs in (3, 4):
        assert rows(error, runs) == [(True, True, 2), (False, True, runs)]
    assert rows(partly, 5) == [(True, True, 5)]
    assert rows(whole, 6) == [(True, False, 6)]
    assert rows(partly, 7) == [(True, False, 6), (True, True, 7)]
    assert rows(error, 8) == [(True, False, 6), (True, True, 7), (False, True, 8)]
    assert rows(whole, 7) == [(True, False, 7)]


def test_resume_does_not_mix_machines(measured, tmp_path, capsys):
    args = ["bench", "d3_fast", "--out", str(tmp_path), "--resume"]
    assert cli.main(args) == 0
    path = tmp_path / "bench.json"
    text = path.read_text()
    for key in ('"cores": ', '"device": "', '"jax": "'):
        path.write_text(text.replace(key, f"{key}9"))
        with pytest.raises(SystemExit):
            cli.main(args)
        told = capsys.readouterr().err
        assert "measured on another machine" in told and "cannot be read" not in told


def test_workers_tell_their_device():
    bench_measure.device.cache_clear()
    assert bench_measure.device() == bench.device()


def test_rows_of_several_calls_say_which(measured, tmp_path, monkeypatch):
    for model in ("d3_fast", "d3_tiny"):
        args = ["bench", model, "--out", str(tmp_path), "--resume"]
        monkeypatch.setattr(sys, "argv", ["d3epth", *args])
        assert cli.main(args) == 0
    commands = [row["command"] for row in saved_rows(tmp_path)]
    assert [command.split()[2] for command in commands] == ["d3_fast", "d3_tiny"]
    assert all(f"`{command}`" in (tmp_path / "bench.md").read_text() for command in commands)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_rows_say_which_code_measured_them(measured, tmp_path, monkeypatch):
    outs = (tmp_path / f"out{number}" for number in itertools.count())

    def code() -> str:
        out = next(outs)
        assert cli.main(["bench", "d3_fast", "--out", str(out)]) == 0
        return saved_rows(out)[0]["code"]

    def git(*args):
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *named, *args], check=True, capture_output=True)

    package = tmp_path / "d3epth_jax" / "bench"
    package.mkdir(parents=True)
    (package / "cli.py").write_text("")
    monkeypatch.setattr(bench_cli, "__file__", str(package / "cli.py"))
    version = d3epth_jax.__version__
    assert code() == version
    git("init")
    assert code() == version, "git has nothing to tell yet"
    git("add", "d3epth_jax")
    git("commit", "--message", "first")
    git("tag", "v9", "--annotate", "--message", "tag")
    assert re.fullmatch(re.escape(version) + " [0-9a-f]{7,}", commit := code())
    (package / "cli.py").write_text("changed")
    assert code() == f"{commit} modified"
    monkeypatch.setenv("PATH", "")
    assert code() == version


def test_the_chart_is_of_predictions(measured, tmp_path):
    out = ["--out", str(tmp_path)]
    assert cli.main(["bench", "d3_fast", "--what", "pieces", *out]) == 0
    assert not (tmp_path / "macs.png").exists()
    assert cli.main(["bench", "d3_fast", "--resume", *out]) == 0
    assert (tmp_path / "macs.png").exists()


def test_attention_is_part_of_a_measurement(measured, tmp_path):
    args = ["bench", "d3_fast", "--out", str(tmp_path), "--resume"]
    for more in ([], ["--attention", "chunked"], []):
        assert cli.main([*args, *more]) == 0
    rows = saved_rows(tmp_path)
    assert sorted(row["attention"] for row in rows) == ["auto", "chunked"]
    assert sorted("chunked" in bench_report.name(row) for row in rows) == [False, True]
    # Files of before it was an option have rows of "auto".
    path = tmp_path / "bench.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        if row["attention"] == "auto":
            del row["attention"]
    path.write_text(json.dumps(content))
    measured["d3_fast"] = {"error": "measured again"}
    assert cli.main(args) == 0


def test_resume_measures_a_directory_again_that_holds_other_weights(measured, tmp_path):
    model = small_model(small_unet(channels=8))
    args = ["bench", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--resume"]
    seeds = []
    for seed in (0, 0, 1):
        hub.save_model(tmp_path / "model", model, init_params(model, seed))
        assert cli.main(args) == 0
        seeds += [row["weights"] for row in saved_rows(tmp_path / "out")]
    first, same, other = seeds
    assert first == same != other
    # What cannot be measured does not take the place of what was.
    hub.save_model(tmp_path / "model", model, init_params(model, 2))
    measured[str(tmp_path / "model")] = {"error": "no memory"}
    assert cli.main(args) == 1
    assert other in [row["weights"] for row in saved_rows(tmp_path / "out")]


def test_rematerialisation_and_micro_batches_are_part_of_a_measurement(measured, tmp_path):
    args = ["bench", "d3_fast", "--what", "stage2", "--out", str(tmp_path), "--resume"]
    for more in ([], ["--no-remat"], ["--micro", "4"], []):
        assert cli.main([*args, *more]) == 0
    rows = saved_rows(tmp_path)
    assert [(row["remat"], row["micro"]) for row in rows] == [(False, 0), (True, 4), (True, 0)]
    assert ["4 at a time" in bench_report.name(row) for row in rows] == [False, True, False]
    step = {"micro": 2, "accumulate": 1, "compile_s": 1.0, "seconds": [0.5], "macs": 10**9}
    step["memory"] = {"bytes": 2**30}
    found = {"results": [step], "trained": 10**6, "matmul": 1e9}
    table = bench_report.markdown([row | found for row in rows]).splitlines()
    cells = [line.replace(" ", "").split("|") for line in table if line.startswith("|")]
    column = cells[0].index("remat")
    assert [line[column] for line in cells[-3:]] == ["no", "yes", "yes"]


def test_model_directories_are_predicted_with_and_what_says_what(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_model(small_unet(channels=8))
    hub.save_model("model", model, init_params(model, 0))
    assert cli.main(["bench", "--all", "model"]) == 0
    assert {(row["what"], row["model"]) for row in saved_rows(tmp_path / "bench")} == {
        ("predict", "model")
    }
    more = ["--what", "stage1", "predict", "--batch", "1", "--out", "more"]
    assert cli.main(["bench", "--all", *more]) == 0
    assert {row["what"] for row in saved_rows(tmp_path / "more")} == {"predict", "stage1"}


def test_broken_files_are_told_not_raised(measured, tmp_path, capsys):
    (tmp_path / "bench.json").write_text('{"rows": [')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", str(tmp_path / "model"), "--out", str(tmp_path), "--resume"])
    told = capsys.readouterr().err
    assert error.value.code == 2
    assert "bench.json cannot be read" in told
    assert "model is not a whole model" in told and "unet/config.json" in told


def test_options_that_would_do_nothing_are_refused(capsys):
    training = ["--micro", "4", "--no-remat", "--train-size", "64x64", "--train-batch", "8"]
    for given, named in (
        (training, ["--train-size", "--train-batch", "--micro", "--no-remat"]),
        (["--what", "pieces", "--dtype", "bfloat16", "--batch", "4", "--fold", "no"],
         ["--dtype", "--batch", "--fold"]),
        (["--what", "stage2", "--size", "64x64"], ["--size"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as error:
            cli.main(["bench", "d3_fast", *given])
        told = capsys.readouterr().err
        assert error.value.code == 2
        assert [line.split()[0] for line in told.splitlines() if "does nothing" in line] == named


def test_resuming_from_nowhere_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "d3_fast", "--resume"])
    assert "--out" in capsys.readouterr().err


def test_results_that_cannot_be_saved_are_shown(measured, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench_cli, "_write", full)
    assert cli.main(["bench", "d3_fast", "d3_tiny", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.err.count("cannot be saved: [Errno 28] No space left on device") == 2
    assert "| d3_fast" in told.out and "| d3_tiny" in told.out


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(measured, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "d3_fast", "--out", "/proc/nowhere"])
    assert "--out /proc/nowhere cannot be" in capsys.readouterr().err


def test_asked_to_end_it_ends_as_by_ctrl_c(measured, monkeypatch):
    def ends(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # never so long: the signal comes at once

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(bench_measure, "measured", ends)
    assert cli.main(["bench", "d3_fast"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
