"""Training by several processes: the same model as by one, written once, and ended together."""

import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.nano import ablation
from d3epth_jax import atomic, hosts, main
from tests.conftest import write_pairs

ROOT = pathlib.Path(__file__).parents[1]
# Parameters of any size are sharded here, so that a process holds no whole one of them.
PROCESS = """
import logging, os, pathlib, signal, sys, time
logging.basicConfig(level=logging.INFO)
logging.getLogger("absl").setLevel(logging.WARNING)
from d3epth_jax import config_arguments, hosts, sharding
from d3epth_jax.training import train
devices, where, pairs, workdir, ending = sys.argv[1:]
sharding.use_cpu_cores(int(devices))
sharding.params_sharding.__kwdefaults__["min_size"] = 16
if where:
    hosts.join(where)
from d3epth_jax.models import presets
from tests.conftest import small_model, small_unet
from tests.test_train import teacher_config
model = small_model(small_unet((8, 16)))
presets.PRESETS["d2_nano"] = model.unet, model.autoencoder
config = teacher_config(pairs, steps=8)
config.fsdp = 2
def signalled(values, step, checkpoint):  # after the first step the second process is
    if step == 1 and not hosts.is_first():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
if ending:
    train.require_finite = signalled
with config_arguments.in_a_sentence():
    train.run(config, pathlib.Path(workdir))
"""


def processes(count: int, folder: pathlib.Path, name: str, ending: str = "") -> list[str]:
    """What as many processes of two devices together say, each with its exit code at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    logs = [folder / f"{name}{i}.log" for i in range(count)]
    where = [f"{address},{count},{i}" if count > 1 else "" for i in range(count)]
    paths = str(folder / "pairs"), str(folder / name)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(2 // count), where[i], *paths, ending],
            cwd=ROOT,
            stderr=logs[i].open("w"),
        )
        for i in range(count)
    ]
    end = time.monotonic() + 300
    while time.monotonic() < end and any(process.poll() is None for process in started):
        time.sleep(0.2)
    for process in started:
        process.kill()
    return [f"{log.read_text()}\n{p.wait()}" for log, p in zip(logs, started, strict=True)]


def test_two_processes_train_what_one_does_and_go_on_after_sigterm(tmp_path):
    write_pairs(tmp_path / "pairs", 10)
    (one,) = processes(1, tmp_path, "one")
    assert one.endswith("\n0"), one
    ended = processes(2, tmp_path, "two", ending="SIGTERM")
    steps = [re.findall(r"ended after step (\d+)", text) for text in ended]
    assert len(steps[0]) == 1 and steps[0] == steps[1], "\n".join(ended)
    for text in processes(2, tmp_path, "two"):
        assert f"resumed from step {steps[0][0]}" in text and text.endswith("\n0"), text
    for path in (tmp_path / "one/model").rglob("*.safetensors"):
        there = load_file(tmp_path / "two" / path.relative_to(tmp_path / "one"))
        for key, ours in load_file(path).items():
            np.testing.assert_allclose(there[key], ours, rtol=1e-4, atol=1e-6, err_msg=key)
    lines = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "one/metrics.jsonl").read_text().splitlines())


def test_what_the_first_process_refuses_all_do(tmp_path):
    (tmp_path / "two").mkdir()
    refusal = RuntimeError()
    with atomic.locked(tmp_path / "two/lock", refusal):
        for text in processes(2, tmp_path, "two"):
            assert "another process is training there now" in text and text.endswith("\n2"), text


@pytest.mark.parametrize("where", ["", "here", "localhost:1", "localhost:1,2", "localhost:1,2,2"])
def test_where_the_others_are_is_told_in_one_way(where):
    with pytest.raises(ValueError, match="--distributed"):
        hosts.join(where)


def test_an_ablation_is_one_process_s(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="'ablation' runs in one process, not in 2"):
        main.check_jobs({"": ablation.get_config("tiny")})
