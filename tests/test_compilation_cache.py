"""Compiled programs kept between processes."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from d3epth_jax import compilation_cache
from d3epth_jax import image as image_lib
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import DepthModel, init_params
from d3epth_jax.weights import hub

CHILD = """
import logging, sys
logging.basicConfig(level="INFO")
import jax
from d3epth_jax.compilation_cache import use_compilation_cache
use_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
counts = {"cache_hits": 0, "cache_misses": 0}
def count(name, **_):
    name = name.rpartition("/")[2]
    counts[name] = counts.get(name, 0) + 1
jax.monitoring.register_event_listener(count)
print(float(jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((4, 4)))[0, 0]))
print(counts["cache_hits"], counts["cache_misses"])
"""


def python(home, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))
    }
    environment |= {"XDG_CACHE_HOME": str(home), **settings}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, capture_output=True, text=True
    )


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
    runs = [python(tmp_path, "-c", CHILD).stdout.split() for _ in range(2)]
    folder = tmp_path / "d3epth_jax" / "xla"
    assert [run[0] for run in runs] == [str(folder)] * 2
    assert folder.stat().st_mode & 0o077 == 0  # what is in there is run
    (_, value, hits, misses), (_, again, hits_again, misses_again) = runs
    assert (hits, misses_again) == ("0", "0") and hits_again == misses and int(misses) > 0
    assert value == again


def test_only_what_was_used_last_is_kept_where_it_becomes_too_much(tmp_path):
    for name, used in (("b", 20), ("a", 30), ("d", 10), ("c", 40)):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (used, 50))
    compilation_cache.prune(tmp_path, 400)
    assert len(list(tmp_path.iterdir())) == 4
    compilation_cache.prune(tmp_path, 250)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}


def test_the_folder_is_the_users_alone_and_does_not_grow_for_ever(tmp_path):
    folder = tmp_path / "d3epth_jax" / "xla"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    (folder / "old").write_bytes(bytes(100))
    code = "from d3epth_jax import compilation_cache as c; c.MOST = 99; c.use_compilation_cache()"
    python(tmp_path, "-c", code)
    assert folder.stat().st_mode & 0o077 == 0 and not list(folder.iterdir())


def test_jaxs_own_settings_come_first(tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    assert elsewhere in python(tmp_path, "-c", CHILD, JAX_COMPILATION_CACHE_DIR=elsewhere).stdout
    again = python(tmp_path, "-c", CHILD, JAX_COMPILATION_CACHE_DIR=elsewhere).stdout.split()
    assert again[-1] == "0", "what compiles fast is kept there, too"
    slow = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "60"}
    assert [python(tmp_path / "slow", "-c", CHILD, **slow).stdout.split()[-2] for _ in "ab"] == [
        *("0", "0")
    ], "nothing takes that long, so nothing is kept"
    off = python(tmp_path, "-c", CHILD, JAX_ENABLE_COMPILATION_CACHE="false")
    assert off.stdout.startswith("None")
    assert not (tmp_path / "d3epth_jax").exists()


def test_without_a_folder_to_write_all_goes_on_and_a_line_says_so(tmp_path):
    (tmp_path / "d3epth_jax").write_text("a file is in the way")
    out = python(tmp_path, "-c", CHILD)
    assert out.stdout.startswith("None\n")
    assert out.stderr.count("compiled programs are not kept for the next run") == 1


def test_a_user_without_a_home_goes_on_without(tmp_path):
    homeless = """
import pathlib
def home():
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = home
"""
    out = python(tmp_path, "-c", homeless + CHILD, XDG_CACHE_HOME="")
    assert out.stdout.startswith("None\n")
    assert "are not kept for the next run: this user has no home" in out.stderr


@pytest.mark.slow
def test_first_prediction_of_the_smallest_preset(tmp_path):
    """From a cold process: under 15 s, and under 5 s with the cache warm.

    Processor time, of all threads: on an idle machine about what the clock shows.
    """
    model = DepthModel(*presets.get("d3_nano"), presets.SINGLE_STEP, processing_resolution=128)
    hub.save_model(tmp_path / "model", model, init_params(model, 0), None)
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3))
    image_lib.save_png(tmp_path / "photo.png", pixels.astype(np.uint8))
    seconds = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(tmp_path, "-m", "d3epth_jax", "predict", str(tmp_path / "photo.png"),
               "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(sum(after[:2]) - sum(before[:2]))
    print(f"\ncold {seconds[0]:.1f} s, warm {seconds[1]:.1f} s of the processor")
    assert seconds[0] < 15 and seconds[1] < 5
    assert (tmp_path / "out/photo_depth.png").is_file()
