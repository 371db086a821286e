"""d3epth bench: training steps, the largest batch that fits, and all of it with real workers."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d3epth_jax import cli
from d3epth_jax.bench import measure as bench_measure
from d3epth_jax.bench import report as bench_report
from d3epth_jax.bench import train as bench_train
from d3epth_jax.bench.worker import WorkerError


def arguments(**settings) -> argparse.Namespace:
    return argparse.Namespace(**{"runs": 2, "out": None, **settings})


class FakeWorker:
    """Answers as a device would on which `fits` pictures do; `asked`: (micro, batch) of each."""

    def __init__(
        self,
        asked: list,
        fits: int,
        planned_wrong: bool = False,
        fails: bool = False,
        crowded: bool = False,  # others hold memory
    ):
        self.asked, self.fits, self.planned_wrong = asked, fits, planned_wrong
        self.fails, self.crowded, self.used = fails, crowded, False

    def ask(self, do, micro=0, batch=0, shared=False, **settings):
        if do == "compile":
            assert settings["stage"] == "stage2"
            assert not self.used, "each step has a process of its own"
            self.used = True
            self.asked.append((micro, batch))
            if self.fails and micro:
                raise WorkerError("killed")
            if self.crowded and shared:
                raise WorkerError("RESOURCE_EXHAUSTED")
            self.micro, self.accumulate = (micro, batch // micro) if micro else (self.fits, 1)
            self.found = {"compile_s": 1.0, "seconds": [0.5], "macs": 1}
            self.found["after_failure"] = self.planned_wrong and not micro
            return {"trained": 3, "remat": settings["remat"]}
        if do == "matmul":
            return {"flops": 1e12}
        found = {"micro": self.micro, "accumulate": self.accumulate}
        return found | self.found | {"memory": {"bytes": (9 - len(self.asked)) * 2**30}}


JOB = {"what": "stage2", "model": "d2_base", "size": [8, 8], "remat": True, "dtype": "float32"}
JOB |= {"attention": "auto"}


def trained(monkeypatch, batch: int, micro: int, *fits) -> tuple[dict, list]:
    asked = []
    monkeypatch.setattr(bench_measure, "_worker", lambda *_: FakeWorker(asked, *fits))
    job = JOB | {"batch": batch, "micro": micro}
    return bench_measure._train(job, arguments()), asked


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


def peaks(row: dict) -> list[str]:
    """As the report shows them."""
    lines = bench_report.markdown([JOB | {"batch": 8} | row]).splitlines()
    return [line.split("|")[-3].strip() for line in lines if "| d2_base" in line]


def test_memory_of_a_batch_that_did_not_fit_is_not_shown_as_that_of_one_that_did(monkeypatch):
    row, asked = trained(monkeypatch, 8, 0, 4, True)
    assert asked == [(0, 8), (4, 4), (4, 8)]
    assert peaks(row) == ["7.00", "6.00"]
    row, asked = trained(monkeypatch, 8, 0, 4, True, True)  # and the second measurement fails
    assert asked == [(0, 8), (4, 4)] and row["error"] == "after a step of 4: killed"
    assert row["results"][0]["seconds"] == [0.5] and peaks(row) == ["-"]


def test_what_was_measured_stays_if_the_accumulated_step_fails(monkeypatch):
    row, asked = trained(monkeypatch, 32, 0, 16, False, True)
    assert asked == [(0, 32), (16, 32)]
    assert [found["micro"] for found in row["results"]] == [16]
    assert row["error"] == "after a step of 16: killed" and row["trained"] == 3


@pytest.mark.parametrize(("fits", "crowded"), [(32, False), (8, False), (32, True)])
def test_steps_compiled_together_are_measured_alone_only_if_others_held_the_memory(
    monkeypatch, fits, crowded
):
    """Not where it is by its own plan that a step does not fit."""
    asked, ended = [], []

    class Worker(FakeWorker):
        def __init__(self, stack, *_):
            super().__init__(asked, fits, crowded=crowded)
            stack.callback(lambda: ended.append(1))

    monkeypatch.setattr(bench_measure, "_worker", Worker)
    job = JOB | {"batch": 32, "micro": 0}
    wave = [("one", job), ("two", job | {"remat": False})]
    with bench_measure.ready_together(wave) as models:
        assert asked == [(0, 32)] * 2, "nothing is compiled again beside the other"
        assert len(ended) == 2 * crowded, "those that failed hold memory that others need"
        rows = [
            bench_measure.measured(job, arguments(), *ready)
            for (_, job), ready in zip(wave, models, strict=True)
        ]
    assert [row["remat"] for row in rows] == [True, False]
    if crowded:
        assert all(row["error"] == "RESOURCE_EXHAUSTED" for row in rows)
        return
    assert all(row["ahead"] == 2 and "error" not in row for row in rows)
    assert all("compile_s" not in row["results"][0] for row in rows)
    assert asked[2:] == ([] if fits == 32 else [(8, 32)] * 2)


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
    """The device's limit is between 16 and 32 pictures by the plan, and below 16 in truth."""
    ran, limit = [], {}
    training, run = bench_train.Training(), bench_train.Training._run

    def toy(**_):
        def make_step(accumulate):
            return lambda state, frozen, batch: (state + batch.sum(), {"loss": (2 * batch).max()})

        start = np.zeros(1, np.float32)
        return bench_train.Recipe(
            make_step, jnp.asarray, start, {}, lambda n: np.ones(1000 * n), 1, {}
        )

    def runs_out(runs):
        ran.append(training.micro)
        if training.micro > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return run(training, runs)

    def compile_runs_out(micro):
        if micro > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED")

    class Device:
        platform, device_kind = "gpu", "A"

        def memory_stats(self):
            return limit

    monkeypatch.setattr(bench_train, "recipe", toy)
    monkeypatch.setattr(bench_train, "most_memory", lambda: {})
    training.compile(32, 32)
    limit["bytes_limit"] = bench_train.planned(training.program) - 1
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(training, "_run", runs_out)
    training.compile(32)
    assert training.micro == 16 and not ran
    found = training.step(1)
    assert ran == [16, 8]
    assert (found["micro"], found["after_failure"]) == (8, True)
    # No other is tried where it is as it was asked for, or may fit alone.
    training.compile(32, shared=True)
    assert training.micro == 16, "by its own plan"
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        training.step(1)
    limit["bytes_limit"] = 10**9
    training.compile(32, 16)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        training.step(1)
    monkeypatch.setattr(training, "_compile", compile_runs_out)
    training.compile(16)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        training.compile(16, shared=True)


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
    products = [("bfloat16", "A", 4e12), ("bfloat16", "A", 8e12), ("float32", "A", 2e12)]
    products += [("bfloat16", "B", 20e12)]
    rows = [
        kinds | {"dtype": dtype, "device": device, "matmul": matmul}
        for dtype, device, matmul in products
    ]
    lines = [x.split("|") for x in bench_report.markdown(rows).splitlines() if "| d2_base" in x]
    assert [float(line[-4]) for line in lines] == [25.0, 25.0, 100.0, 10.0]
    assert [line[8].strip() for line in lines] == ["-"] * 4, "compiled beside others"


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [1, 8])
def test_all_of_it_in_small_with_processes_of_its_own(ahead, saved, tmp_path):
    arguments = ["bench", str(saved[0]), "d3_nano", "--all"]
    arguments += ["--size", "32x48", "--train-size", "32x48"]
    arguments += ["--train-batch", "4", "--batch", "1", "--dtype", "float32", "--runs", "1"]
    arguments += ["--ahead", str(ahead)]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert not [row["error"] for row in rows if "error" in row]
    whats = ["predict", *["stage2"] * 3, *["stage1"] * 2, *["predict"] * 3, "pieces"]
    assert [row["what"] for row in rows] == whats
    assert {"eager", "channels_last"} <= set(rows[0]["compare"])
    # On a CPU, whose memory has no limit, one picture at a time; and all four by accumulation.
    steps = [[(x["micro"], x["accumulate"]) for x in row["results"]] for row in rows[1:4]]
    assert steps == [[(1, 1), (1, 4)], [(1, 1), (1, 4)], [(1, 4)]]
    text = (tmp_path / "bench.md").read_text()
    for title in ("### Prediction", "### Training", "### Folding"):
        assert title in text
