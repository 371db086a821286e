"""The command line: configs load, typos fail with the nearest name, jobs chain."""

import importlib
import inspect
import subprocess
import sys

import pytest

from configs import common, quickstart, stage2
from configs import eval as eval_config
from configs.nano import train as nano
from d3epth_jax import data, evaluate, main
from tests.conftest import write_pairs

ROOT = main.pathlib.Path(__file__).parents[1]


def run(*arguments: str, timeout: int = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "d3epth_jax.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    "name", ["quickstart", "nano.train", "nano.further", "d2", "stage1", "stage2", "eval"]
)
def test_every_config_has_a_default_and_a_tiny_form(name):
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    for word in (None, "tiny"):
        config = module.get_config(word)
        assert config.workdir.startswith("runs/")
        assert config.cpu_devices >= 1
        jobs = [config[job] for job in config.jobs] if "jobs" in config else [config]
        for job in jobs:
            assert_fits(job.eval.source)
            if job.job == "train":
                assert_fits(job.data.source)
    with pytest.raises(ValueError, match="unknown word 'tony'"):
        module.get_config("tony")


def assert_fits(settings):
    """The source takes these settings: none is left over from the default that they replace."""
    module, function = data.SOURCES[settings.name]
    make = getattr(importlib.import_module(module), function)
    inspect.signature(make).bind_partial(**{k: v for k, v in settings.items() if k != "name"})


def test_typo_in_a_config_key_names_the_nearest():
    result = run("--config=configs/stage2.py:tiny", "--config.schedule.learning_rat=1")
    assert result.returncode != 0
    assert 'Did you mean "learning_rate"' in result.stderr


def test_missing_data_folder_is_named(tmp_path):
    result = run(
        "--config=configs/eval.py",
        f"--config.eval.source.path={tmp_path / 'nowhere'}",
        f"--config.models.student={tmp_path / 'no_model'}",
        f"--workdir={tmp_path}",
    )
    assert result.returncode != 0
    assert "no_model" in result.stderr


def test_paths_that_are_left_open_are_asked_for():
    with pytest.raises(ValueError) as error:
        main.check_jobs({"": stage2.get_config("marigold")})
    keys = ("data.source", "data.also.vkitti2.source", "eval.source")
    told = str(error.value).splitlines()
    assert sorted(told) == sorted(f"set --config.{key}.path=PATH" for key in keys)
    config = stage2.get_config("tiny")  # its init_config gets this data too
    config.data.source.path = config.eval.source.path = "."
    main.check_jobs({"": config})


def test_workdir_is_filled_in_everywhere(tmp_path):
    config = main.fill_in(quickstart.get_config("tiny"), tmp_path)
    assert config.stage2.init == f"{tmp_path}/stage1/model"
    assert config.evaluation.models["student at start"] == f"{tmp_path}/stage1/model_start"
    assert "{workdir}" in quickstart.get_config("tiny").stage2.init  # a copy


def test_quickstart_runs_from_nothing_to_the_table(tmp_path, monkeypatch, capsys):
    """The README's first command with fewer steps and smaller pictures."""
    monkeypatch.setattr(nano, "HEIGHT", 24)
    monkeypatch.setattr(nano, "WIDTH", 32)
    config = quickstart.get_config("tiny")
    for job in config.jobs:
        main.run_job(main.fill_in(config[job], tmp_path), tmp_path / job)
    table = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "constant",
        "constant in sqrt_disparity",
        "ramp",
        "ramp in sqrt_disparity",
        "mean map",
        "mean map in sqrt_disparity",
        "teacher",
        "student at start",
        "student after stage 1",
        "student after stage 2",
        "student after stage 2, pictures shuffled",
    ]
    assert (tmp_path / "evaluation/evaluation.png").is_file()
    assert list((tmp_path / "stage1/pictures").glob("predictions_*.png"))
    assert list((tmp_path / "stage1/tensorboard").glob("events*"))


def test_eval_job_writes_table_scores_and_gallery(tmp_path, capsys):
    config = eval_config.get_config("tiny")
    config.eval.source = common.folder(str(write_pairs(tmp_path / "pairs", 4)))
    config.mean_map.source = config.eval.source
    config.mean_map.update(height=16, width=24)
    evaluate.run(config, tmp_path / "out")
    assert "| ramp" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(f"evaluation.{kind}" for kind in ("csv", "json", "md", "png")),
        "evaluation_worst.png",
    }
    lines = (tmp_path / "out/evaluation.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 3
    config.shuffled = "nobody"
    with pytest.raises(ValueError, match="nobody"):
        evaluate.run(config, tmp_path / "out")
    config.baselines = ("ramp", "slope")
    with pytest.raises(ValueError, match="slope"):
        evaluate.run(config, tmp_path / "out")
