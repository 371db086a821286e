"""The command line: configs load, typos fail with the nearest name, jobs chain."""

import importlib
import inspect
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from configs import common, quickstart, stage2
from configs import eval as eval_config
from configs.nano import train as nano
from d3epth_jax import argument_types, data, main, sharding
from d3epth_jax.config_arguments import in_a_sentence, wrong_keys
from d3epth_jax.evaluation import evaluate
from d3epth_jax.training import train
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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stage2.py:tiny", "schedule.learning_rat=1"], ["did you mean learning_rate?"]),
        (
            ["stage1.py:tiny", "loss.beta.ssi=1", "seed.x=2"],
            ["config.loss.beta has no setting 'ssi'; it has enc, ", "config.seed is 0, without"],
        ),
        (["stage1.py:tony"], ["unknown word 'tony' after the config's colon"]),
        (["stage1.py:tiny", "seed=abc"], ["--config.seed=abc: invalid literal for int()"]),
        (["nowhere.py"], ["there is no file configs/nowhere.py"]),
        (["eval.py"], ["set --config.eval.source.path=PATH"]),
        ([], ["say what to run, such as --config=configs/quickstart.py"]),
    ],
    ids=lambda value: value[0] if value else "nothing",
)
def test_a_mistake_in_the_arguments_is_a_sentence(arguments, told):
    config, settings = arguments[:1], arguments[1:]
    result = run(*(f"--config=configs/{a}" for a in config), *(f"--config.{s}" for s in settings))
    assert result.returncode == 2
    assert all(words in result.stderr for words in told)
    assert len(result.stderr.splitlines()) == len(told)


def test_missing_data_folder_is_named(tmp_path):
    arguments = (
        f"--config.eval.source.path={tmp_path / 'nowhere'}",
        f"--config.models.student={tmp_path / 'no_model'}",
        f"--workdir={tmp_path}",
    )
    result = run("--config=configs/eval.py", *arguments)
    assert result.returncode == 2
    assert "no_model" in result.stderr and "Traceback" not in result.stderr
    assert "Traceback" in run("--verbosity=1", "--config=configs/eval.py", *arguments).stderr


def test_a_mistake_in_the_program_keeps_its_traceback(tmp_path):
    (tmp_path / "config.py").write_text("def get_config():\n    return 'mine'.missing\n")
    result = run(f"--config={tmp_path / 'config.py'}")
    assert result.returncode == 1
    assert "return 'mine'.missing" in result.stderr


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "raises",
    [
        lambda: np.zeros(3).reshape(2),  # a library's ValueError
        lambda: main.fill_in({}, ""),  # no ConfigDict
        lambda: raise_(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")),
    ],
)
def test_errors_that_nobody_expects_pass(raises):
    with pytest.raises((ValueError, AttributeError, RuntimeError)), in_a_sentence():
        raises()


def test_errors_of_this_project_and_of_files_are_sentences(tmp_path, capsys):
    unset, none = stage2.get_config("marigold"), types.SimpleNamespace(latest=None)
    for mistake, told in (
        (lambda: main.check_jobs({"": unset}), "d3epth_jax: set --config.data."),
        (lambda: (tmp_path / "nowhere").read_text(), "d3epth_jax: [Errno 2] No such file"),
        (lambda: sharding.use_cpu_cores(0), "d3epth_jax: cpu_devices must be at least 1, not 0"),
        (lambda: train.require_finite({"loss": np.nan}, 3, none), "d3epth_jax: step 3: not finite"),
    ):
        with pytest.raises(SystemExit) as stopped, in_a_sentence():
            mistake()
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith(told)


def test_keys_in_brackets_are_looked_up_too():
    config = quickstart.get_config("tiny")
    right, wrong = (f'--config.evaluation.models["student{end}"]=x' for end in (" at start", ""))
    assert wrong_keys(config, ["main", right, "--workdir=config.x", "--config.stage1.seed=1"]) == []
    (told,) = wrong_keys(config, ["main", right, wrong])
    assert "config.evaluation.models has no setting 'student'; " in told


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


def test_the_home_folder_is_the_shells(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = quickstart.get_config("tiny")
    config.stage1.teacher.path = "~/teacher"
    filled = main.fill_in(config, tmp_path / "run")
    assert filled.stage1.teacher.path == str(tmp_path / "teacher")
    assert argument_types.a_path("~/maps") == tmp_path / "maps"


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


def test_a_config_is_found_from_any_folder(tmp_path):
    command = [sys.executable, "-m", "d3epth_jax.main", f"--config={ROOT}/configs/eval.py"]
    package = tmp_path / "installed"
    package.mkdir()
    (package / "d3epth_jax").symlink_to(ROOT / "d3epth_jax")
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*command, "--config.no_such_key=1"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
        timeout=120,
    )
    assert "config has no setting 'no_such_key'" in done.stderr and done.returncode == 2
