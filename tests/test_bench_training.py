"""d3epth bench: training steps, the largest batch that fits, and all of it with real workers."""

import argparse
import json

import pytest

from d3epth_jax import bench_measure, bench_report, bench_train, cli


def arguments(**settings) -> argparse.Namespace:
    return argparse.Namespace(**{"runs": 2, "out": None, **settings})


class FakeWorker:
    """Answers as a device would on which `fits` pictures do; `asked`: (micro, batch) of each."""

    def __init__(self, asked: list, fits: int, planned_wrong: bool = False):
        self.asked, self.fits, self.planned_wrong = asked, fits, planned_wrong

    def ask(self, do, micro=0, batch=0, **settings):
        if do == "compile":
            assert settings["remat"] and settings["stage"] == "stage2"
            self.asked.append((micro, batch))
            self.micro, self.accumulate = (micro, batch // micro) if micro else (self.fits, 1)
            self.failed = self.planned_wrong and not micro
            return {"trained": 3}
        if do == "matmul":
            return {"flops": 1e12}
        found = {"micro": self.micro, "accumulate": self.accumulate, "compile_s": 1.0}
        failed = {"after_failure": True} if self.failed else {}
        return found | failed | {"memory": 9 - len(self.asked)}


def trained(monkeypatch, batch: int, micro: int, *fits) -> tuple[dict, list]:
    asked = []
    monkeypatch.setattr(bench_measure, "_worker", lambda *_: FakeWorker(asked, *fits))
    job = {"what": "stage2", "model": "d2_base", "size": [8, 8], "batch": batch, "remat": True}
    return bench_measure._train(job | {"dtype": "float32", "micro": micro}, arguments()), asked


@pytest.mark.parametrize(
    ("batch", "micro", "fits", "asked"),
    [
        (32, 0, 8, [(0, 32), (8, 32)]),
        (12, 0, 8, [(0, 12), (6, 12)]),
        (7, 0, 4, [(0, 7), (1, 7)]),
        (8, 0, 8, [(0, 8)]),
        (32, 4, 8, [(4, 32)]),
    ],
)
def test_the_accumulated_step_is_exactly_the_batch_in_a_process_of_its_own(
    monkeypatch, batch, micro, fits, asked
):
    row, seen = trained(monkeypatch, batch, micro, fits)
    assert seen == asked
    last = row["results"][-1]
    assert last["micro"] * last["accumulate"] == batch and row["trained"] == 3


def test_memory_of_a_batch_that_did_not_fit_is_not_shown_as_that_of_one_that_did(monkeypatch):
    row, asked = trained(monkeypatch, 8, 0, 4, True)
    assert asked == [(0, 8), (4, 4), (4, 8)]
    assert [(found["accumulate"], found["memory"]) for found in row["results"]] == [(1, 7), (2, 6)]


@pytest.mark.parametrize(
    ("limit", "room", "tried"), [(32, 100, [32]), (32, 20, [32, 16]), (12, 4, [12, 6, 3])]
)
def test_the_largest_batch_is_found_by_halving(limit, room, tried):
    seen = []

    def attempt(size):
        seen.append(size)
        if size > room:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    bench_train.largest_that_fits(attempt, limit)
    assert seen == tried


def test_other_errors_and_no_room_at_all_are_told():
    def fails(size):
        raise RuntimeError("INVALID_ARGUMENT")

    def full(size):
        raise MemoryError

    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"):
        bench_train.largest_that_fits(fails, 8)
    with pytest.raises(MemoryError, match="not even a batch of 1"):
        bench_train.largest_that_fits(full, 8)


def test_what_is_planned_beyond_the_limit_is_not_run_and_what_runs_out_is_halved(monkeypatch):
    """The device holds 20 pictures by its plan, and 10 in truth."""
    compiled, ran = [], []
    training = bench_train.Training()

    def compile(micro, accumulate=1):
        compiled.append(micro)
        training.micro, training.accumulate = micro, accumulate
        if micro > 20:
            raise MemoryError("planned")

    def run(runs):
        ran.append(training.micro)
        if training.micro > 10:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return {"micro": training.micro}

    monkeypatch.setattr(training, "_compile", compile)
    monkeypatch.setattr(training, "_run", run)
    bench_train.largest_that_fits(compile, 32)
    assert training.step(1) == {"micro": 8, "after_failure": True}
    assert (compiled, ran) == ([32, 16, 8], [16, 8])
    training.micro, training.accumulate = 16, 2  # as it was asked for: no other is tried
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        training.step(1)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("pppp", ["ppp", "p"]),
        ("cttpp", ["c", "tt", "pp"]),
        ("ccp", ["c", "c", "p"]),
        ("tpxp", ["t", "p", "x", "p"]),
    ],
)
def test_predictions_are_made_ready_together_and_so_are_training_steps(kinds, expected):
    words = {"p": "predict", "c": "predict", "t": "stage2", "x": "pieces"}
    todo = [(kind, {"what": words[kind], "compared": kind == "c"}) for kind in kinds]
    waves = bench_measure.waves(todo, 3)
    assert ["".join(label for label, _ in wave) for wave in waves] == expected


@pytest.mark.parametrize("micro", [8, 32])
def test_hours_are_of_a_whole_training_whatever_the_batch(micro):
    found = {"micro": micro, "accumulate": 1, "compile_s": 1.0, "seconds": [micro / 32], "macs": 1}
    row = {
        **{"what": "stage2", "model": "d2_base", "size": [480, 640], "dtype": "bfloat16"},
        **{"remat": True, "trained": 1, "matmul": 1e12},
        "results": [found | {"memory": {"bytes": 2**30}}],
    }
    (line,) = (x for x in bench_report.markdown([row]).splitlines() if "| d2_base" in x)
    assert float(line.split("|")[-2]) == pytest.approx(20_000 / 3600, abs=0.01)


def test_a_matrix_product_that_was_slowed_down_flatters_nothing():
    """The peak is the fastest that the device was at it, in any row of the same type."""
    kinds = {"what": "stage2", "model": "d2_base", "size": [8, 8], "remat": True, "trained": 1}
    found = {"micro": 1, "accumulate": 1, "seconds": [1.0], "macs": 10**12}
    kinds["results"] = [found | {"memory": {"bytes": 2**30}}]
    rows = [
        kinds | {"dtype": dtype, "device": "A", "matmul": matmul}
        for dtype, matmul in (("bfloat16", 4e12), ("bfloat16", 8e12), ("float32", 2e12))
    ]
    lines = [x.split("|") for x in bench_report.markdown(rows).splitlines() if "| d2_base" in x]
    assert [float(line[-4]) for line in lines] == [25.0, 25.0, 100.0]
    assert [line[8].strip() for line in lines] == ["-"] * 3, "compiled beside others"


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [1, 8])
def test_all_of_it_in_small_with_processes_of_its_own(ahead, tmp_path):
    arguments = ["bench", "d3_nano", "--all", "--size", "32x48", "--train-size", "32x48"]
    arguments += ["--train-batch", "2", "--batch", "1", "--dtype", "float32", "--runs", "1"]
    arguments += ["--ahead", str(ahead)]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert not [row["error"] for row in rows if "error" in row]
    assert [row["what"] for row in rows] == [
        "predict",
        *["stage2"] * 2,
        "stage1",
        "predict",
        "pieces",
    ]
    text = (tmp_path / "bench.md").read_text()
    for title in ("### Prediction", "### Training", "### Folding"):
        assert title in text
