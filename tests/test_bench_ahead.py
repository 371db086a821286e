"""d3epth bench --ahead: models made ready together, and measured as if alone."""

import collections
import itertools
import json
import threading

from d3epth_jax import cli
from d3epth_jax.bench import measure as bench_measure
from d3epth_jax.bench.worker import WorkerError
from tests.test_bench import ROW


def test_models_made_ready_together_are_measured_one_by_one(monkeypatch, tmp_path, capsys):
    """All of a wave have run before the first is measured; what fails there is tried alone."""
    asked, ended, tries, lock = [], [], collections.Counter(), threading.Lock()

    class FakeWorker:
        def __init__(self, env):
            self.env = env

        def __enter__(self):
            return self

        def __exit__(self, *_):
            ended.append(self.name)

        def ask(self, do, **request):
            if do == "open":
                self.name = f"{request['model']} {request['batch']}"
                tries[self.name] += 1
                shares = self.env.get("XLA_PYTHON_CLIENT_PREALLOCATE") == "false"
                assert shares == (tries[self.name] == 1 and self.name != "d3_base 2")
                if self.name == "d3_tiny 1" or (shares and self.name == "d3_tiny 2"):
                    raise WorkerError("no memory")
            with lock:
                asked.append((self.name, do, request.get("part")))
            known = {key: ROW[key] for key in ROW if key not in ("first_s", "compile_s")}
            known |= {"compile_s": 0.25} if do == "run" else {}
            return {**known, **ROW["memory"], "steps": 1, "seconds": 0.5, "flops": 1e12}

    monkeypatch.setattr(
        bench_measure, "_worker", lambda stack, _, env: stack.enter_context(FakeWorker(env))
    )
    models = ["d3_fast", "d3_tiny", "d3_base"]
    args = ["bench", *models, "--batch", "1", "2", "--ahead", "5", "--runs", "2"]
    assert cli.main([*args, "--out", str(tmp_path)]) == 1
    assert "d3_tiny 576x768 batch 1 float32 folded: no memory" in capsys.readouterr().out
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    found = {(row["model"], row["batch"]): row for row in rows}
    assert list(found) == [(model, batch) for model in models for batch in (1, 2)]
    together = [("d3_fast", 1), ("d3_fast", 2), ("d3_base", 1)]
    assert [name for name, row in found.items() if row.get("ahead") == 5] == together
    assert not [name for name in together if {"first_s", "compile_s"} & set(found[name])]
    alone = found["d3_tiny", 2]
    assert (alone["first_s"], alone["compile_s"]) == (0.5, 0.25)

    first = [("open", None), ("run", None), ("count", None), ("run", None), ("memory", None)]
    first += [("part", part) for part in ROW["macs"]]
    count = len(together) * len(first)
    wave, rest = asked[:count], asked[count:]
    names = ["d3_fast 1", "d3_fast 2", "d3_base 1"]
    for name in names:
        assert [(do, part) for who, do, part in wave if who == name] == first
    # And as it is timed: twice, directly after once that warms up what has waited.
    timed = [("run", None)] * 3 + [("matmul", None)]
    timed += [("part", part) for part in ROW["macs"] for _ in range(3)]
    assert [(do, part) for who, do, part in rest if who == "d3_fast 1"] == timed
    turns = [who for who, _ in itertools.groupby(who for who, _, _ in rest)]
    assert turns == [*names, "d3_base 2", "d3_tiny 2"]
    failed = ["d3_tiny 1", "d3_tiny 2"]
    assert sorted(ended[:2]) == failed, "they hold memory that others need"
    assert ended[2:] == [*names, "d3_base 2", *failed]


def test_without_a_temporary_folder_every_row_says_so(monkeypatch, tmp_path, capsys):
    made, alive, counts = bench_measure.tempfile.TemporaryDirectory, [], []

    def fails(*args, **settings):
        counts.append(len(alive))
        if len(counts) == 1:
            return made(*args, **settings)
        raise OSError("No space left on device")

    class FakeWorker:
        def __enter__(self):
            alive.append(self)
            return self

        def __exit__(self, *_):
            alive.remove(self)

    monkeypatch.setattr(bench_measure.tempfile, "TemporaryDirectory", fails)
    monkeypatch.setattr(
        bench_measure, "_worker", lambda stack, *_: stack.enter_context(FakeWorker())
    )
    args = ["bench", "d3_fast", "d3_tiny", "--ahead", "2", "--out", str(tmp_path)]
    assert cli.main(args) == 1
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["error"] for row in rows] == ["No space left on device"] * 2
    assert counts == [1, 2, 1, 1] and not alive, "those begun first end before others are measured"


def test_workers_are_told_which_attention(monkeypatch):
    told = {}

    class FakeWorker:
        def ask(self, do, **request):
            told.setdefault(do, request)
            raise WorkerError("that is all")

    monkeypatch.setattr(bench_measure, "_worker", lambda *_: FakeWorker())
    args = ["bench", "d3_fast", "--what", "predict", "stage2", "--attention", "chunked"]
    assert cli.main(args) == 1
    assert told["open"]["attention"] == told["compile"]["attention"] == "chunked"
