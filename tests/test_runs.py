"""What a workdir says of its run, and that one process at a time is at work there."""

import contextlib
import json
import pathlib
import shutil

import pytest

from configs import quickstart
from configs.nano import train as nano
from d3epth_jax import atomic, data
from d3epth_jax.models.depth_model import init_params
from d3epth_jax.training import model_setup, runs, train
from d3epth_jax.weights import hub
from tests.conftest import small_model, small_unet, write_pairs
from tests.test_train import on_pairs


def test_a_run_notices_that_its_teacher_is_another_one(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 10)
    config = on_pairs(quickstart.stage1(tiny=True), pairs)
    config.teacher.path = str(tmp_path / "teacher")
    for seed, in_use, message in ((0, False, ""), (0, True, ""), (1, True, "another model than")):
        model = small_model(small_unet((8, 16)))
        hub.save_model(tmp_path / "teacher", model, init_params(model, seed))
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            runs.claim_origins(tmp_path, config, in_use=in_use)


def test_a_chain_goes_on_under_another_spelling_of_its_folder(tmp_path, monkeypatch):
    def claim(workdir, in_use, of=None):
        config = quickstart.get_config("tiny").stage2
        config.init = str(of or workdir / "stage1/model")
        runs.claim(workdir / "stage2", config, in_use=in_use)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "qs/stage1/model").mkdir(parents=True)
    claim(pathlib.Path("qs"), in_use=False)
    claim(tmp_path / "qs", in_use=True)
    claim(pathlib.Path("qs"), in_use=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    claim(pathlib.Path("../qs"), in_use=True)
    claim(pathlib.Path("../qs"), in_use=True)
    for other in (tmp_path / "other/stage1/model", tmp_path / "qs/stage0/model"):
        with pytest.raises(ValueError, match=r"other settings.*Changed: init"):
            claim(tmp_path / "qs", in_use=True, of=other)


@pytest.mark.parametrize("key", ["attention", "processing_aspect"])
def test_a_run_that_lacks_a_setting_of_today_is_of_another_version(key, tmp_path):
    config = json.loads(quickstart.get_config("tiny").stage1.to_json_best_effort())
    del config["model"][key]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json is of another version, without.*'{key}'"):
        model_setup.read_run(tmp_path)


def test_a_run_goes_on_only_with_the_samples_that_it_began_with(tmp_path):
    root = write_pairs(tmp_path / "pairs", 4)

    def claim(in_use):
        source = data.make_source("folder", path=root, depth_scale=1000.0)
        runs.claim_samples(tmp_path, {"main": source}, in_use=in_use)

    claim(in_use=False)
    claim(in_use=True)
    for kind in ("rgb", "depth"):
        shutil.copy(root / kind / "003.png", root / kind / "004.png")
    with pytest.raises(ValueError, match=r"main: 4 samples, now 5.*another --workdir"):
        claim(in_use=True)
    (root / "rgb/000.png").unlink()
    (root / "depth/000.png").unlink()
    with pytest.raises(ValueError, match="now 4 of other names"):  # as many, others
        claim(in_use=True)
    claim(in_use=False)  # nothing was trained yet
    scenes = data.make_source(**nano.scenes(1, 8))
    runs.claim_samples(tmp_path, {"main": scenes}, in_use=True)


def test_a_workdir_is_one_process_s_at_a_time(tmp_path):
    config = nano.teacher(tiny=True)
    told = pytest.raises(ValueError, match=r"another process is training there now.*--workdir")
    with atomic.locked(tmp_path / "lock", RuntimeError()), told:  # as the other process holds it
        train.run(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_settings_that_cannot_be_read_are_named(tmp_path):
    """What a full disk or a killed process may have left of a run by an older version."""
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        runs.claim(tmp_path, nano.teacher(tiny=True), in_use=True)


def test_a_run_goes_on_on_other_hardware(tmp_path):
    config = nano.teacher(tiny=True)
    runs.claim(tmp_path, config, in_use=False)
    config.update(fsdp=4, cpu_devices=1)
    config.model.remat, config.train.accumulate = True, 8
    runs.claim(tmp_path, config, in_use=True)


def test_a_run_goes_on_in_no_other_space(tmp_path):
    config = nano.stage2(tiny=True)
    for before, now in ((None, "depth"), ("depth", None), ("depth", "disparity")):
        config.model.prediction_type = before
        runs.claim(tmp_path, config, in_use=False)
        runs.claim(tmp_path, config, in_use=True)
        config.model.prediction_type = now
        with pytest.raises(ValueError, match=f"prediction_type: {before} -> {now}"):
            runs.claim(tmp_path, config, in_use=True)


def test_another_runs_workdir_is_known_by_when_its_newest_checkpoint_was_saved(tmp_path):
    def save(step, nanoseconds):
        folder = tmp_path / f"checkpoints/{step}"
        folder.mkdir(parents=True, exist_ok=True)
        content = {"commit_timestamp_nsecs": nanoseconds}
        (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(content))
        return hub.digest(tmp_path)

    (tmp_path / "checkpoints").mkdir()
    assert hub.digest(tmp_path) == ""
    first = save(900, 1)
    assert save(1000, 2) not in (first, save(1000, 3))
    assert save(100, 4) == hub.digest(tmp_path) != first
