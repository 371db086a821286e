"""d3epth bench: training steps, the largest batch that fits, and all of it with real workers."""

import argparse
import json

import pytest

from d3epth_jax import bench, bench_measure, bench_report, cli


def arguments(**settings) -> argparse.Namespace:
    return argparse.Namespace(**{"runs": 2, "out": None, **settings})


@pytest.mark.parametrize(
    ("batch", "micro", "fits", "asked"),
    [(32, 0, 8, [0, 8]), (12, 0, 8, [0, 6]), (7, 0, 4, [0, 1]), (8, 0, 8, [0]), (32, 4, 8, [4])],
)
def test_the_accumulated_step_is_exactly_the_batch_in_a_process_of_its_own(
    monkeypatch, batch, micro, fits, asked
):
    seen = []

    class FakeWorker:
        def ask(self, do, *, micro, **settings):
            seen.append((self, micro))
            assert settings["remat"] and settings["batch"] == batch
            micro, accumulate = (micro, batch // micro) if micro else (fits, 1)
            return {"result": {"micro": micro, "accumulate": accumulate}, "trained": 3}

    monkeypatch.setattr(bench_measure, "_worker", lambda *_: FakeWorker())
    job = {"what": "stage2", "model": "d2_base", "size": [8, 8], "batch": batch, "remat": True}
    row = bench_measure._train(job | {"dtype": "float32", "micro": micro}, arguments())
    assert [micro for _, micro in seen] == asked and len({id(w) for w, _ in seen}) == len(asked)
    last = row["results"][-1]
    assert last["micro"] * last["accumulate"] == batch and row["trained"] == 3


def test_memory_of_a_batch_that_did_not_fit_is_not_shown_as_that_of_one_that_did(monkeypatch):
    seen = []

    class FakeWorker:
        def ask(self, do, *, micro, batch, **settings):
            seen.append((micro, batch))
            result = {"micro": 4, "accumulate": batch // 4, "memory": 9 - len(seen)}
            return {
                "result": result if micro else result | {"accumulate": 1, "after_failure": True}
            }

    monkeypatch.setattr(bench_measure, "_worker", lambda *_: FakeWorker())
    job = {"what": "stage2", "model": "d2_base", "size": [8, 8], "batch": 8, "remat": True}
    row = bench_measure._train(job | {"dtype": "float32", "micro": 0}, arguments())
    assert seen == [(0, 8), (4, 4), (4, 8)]
    assert [(found["accumulate"], found["memory"]) for found in row["results"]] == [(1, 7), (2, 6)]


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

    found = bench.largest_that_fits(attempt, first, limit)
    assert found == {"micro": best} | ({"after_failure": True} if best < first else {})
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


@pytest.mark.slow
def test_all_of_it_in_small_with_processes_of_its_own(tmp_path):
    arguments = ["bench", "d3_nano", "--all", "--size", "32x48", "--train-size", "32x48"]
    arguments += ["--train-batch", "2", "--batch", "1", "--dtype", "float32", "--runs", "1"]
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
