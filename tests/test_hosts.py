"""Training by several processes: the same model as by one, written once."""

import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from d3epth_jax import hosts
from tests.conftest import write_pairs

ROOT = pathlib.Path(__file__).parents[1]
# Parameters of any size are sharded here, so that a process holds no whole one of them.
PROCESS = """
import logging, pathlib, sys
logging.basicConfig(level=logging.INFO)
from d3epth_jax import hosts, sharding, train
devices, where, pairs, workdir, steps = sys.argv[1:]
sharding.use_cpu_cores(int(devices))
sharding.params_sharding.__kwdefaults__["min_size"] = 16
if where:
    hosts.join(where)
from d3epth_jax.models import presets
from tests.conftest import small_model, small_unet
from tests.test_train import teacher_config
model = small_model(small_unet((8, 16)))
presets.PRESETS["d2_nano"] = model.unet, model.autoencoder
config = teacher_config(pairs, steps=4)
config.fsdp = 2
config.train.checkpoint_every = 2
if int(steps) < 4:  # ends early, with a checkpoint of the step before
    train.require_finite = lambda values, step, _: step > int(steps) and sys.exit(3)
train.run(config, pathlib.Path(workdir))
"""


def processes(count: int, pairs, workdir, steps: int = 4) -> list[subprocess.CompletedProcess]:
    """Two devices' training, by as many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", PROCESS, str(2 // count)),
                *(f"{address},{count},{i}" if count > 1 else "", pairs, workdir, str(steps)),
            ],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    return [
        subprocess.CompletedProcess(p.args, p.wait(), stderr=text)
        for p, (_, text) in [(p, p.communicate(timeout=300)) for p in started]
    ]


@pytest.mark.xdist_group("hosts")
def test_two_processes_train_what_one_does_and_go_on_after_an_end(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 10)
    (one,) = processes(1, pairs, tmp_path / "one")
    assert one.returncode == 0, one.stderr
    ended = processes(2, pairs, tmp_path / "two", steps=2)
    assert 0 not in {process.returncode for process in ended}
    for process in processes(2, pairs, tmp_path / "two"):
        assert process.returncode == 0, process.stderr
        assert "resumed from step 2" in process.stderr
    for path in (tmp_path / "one/model").rglob("*.safetensors"):
        there = load_file(tmp_path / "two" / path.relative_to(tmp_path / "one"))
        for key, ours in load_file(path).items():
            np.testing.assert_allclose(there[key], ours, rtol=1e-4, atol=1e-6, err_msg=key)
    lines = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "one/metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("where", ["", "here", "localhost:1", "localhost:1,2", "localhost:1,2,2"])
def test_where_the_others_are_is_told_in_one_way(where):
    with pytest.raises(ValueError, match="--distributed"):
        hosts.join(where)
