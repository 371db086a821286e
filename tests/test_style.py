"""One style everywhere: `ruff format` and `ruff check`, as pyproject configures them."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def python_files() -> list[pathlib.Path]:
    return [
        p for folder in ("d3epth_jax", "configs", "tests") for p in ROOT.glob(f"{folder}/**/*.py")
    ]


@pytest.mark.parametrize("command", [("format", "--check", "--diff"), ("check",)], ids=" ".join)
def test_ruff_is_content(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_stay_readable():
    """Over 450 lines something wants to be two."""
    long = {
        str(p.relative_to(ROOT)): n
        for p in python_files()
        if (n := len(p.read_text().splitlines())) > 450
    }
    assert not long
