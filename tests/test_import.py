"""What an import costs: the loss functions are there for people who want nothing else from us."""

import json
import subprocess
import sys

import pytest

# Ours to keep out; what jax itself imports (parts of SciPy) is not our doing.
HEAVY = [
    "PIL",
    "absl",
    "diffusers",
    "flax",
    "grain",
    "ml_collections",
    "optax",
    "orbax",
    "safetensors",
    "scipy.ndimage",
    "skimage",
    "tensorboardX",
    "torch",
    "transformers",
]


def in_fresh_python(code: str):
    """The JSON value that the code prints, in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_takes_under_0_3_seconds_and_no_jax():
    code = """
import json, sys, time
start = time.perf_counter()
import d3epth_jax
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    runs = [in_fresh_python(code) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.3
    assert not {"jax", "numpy", "jaxtyping", *HEAVY} & set(runs[0][1])


@pytest.mark.parametrize("names", ["losses", "losses alignment weighting metrics schedule targets"])
def test_losses_need_only_jax_numpy_and_jaxtyping(names):
    code = f"""
import importlib, json, sys
import jax, jaxtyping, numpy
before = set(sys.modules)
import d3epth_jax
d3epth_jax.losses.scale_shift_invariant
for name in {names.split()!r}:
    importlib.import_module("d3epth_jax." + name)
from jax._src import xla_bridge
print(json.dumps([sorted(sys.modules), sorted(set(sys.modules) - before),
                  xla_bridge.backends_are_initialized()]))
"""
    loaded, added, ran_jax = in_fresh_python(code)
    assert not set(HEAVY) & set(loaded)
    # Beyond the three, nothing but our own modules and the standard library.
    foreign = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert foreign <= {"d3epth_jax", "jax", "jaxlib", "numpy", "jaxtyping"}
    assert not ran_jax, "importing a module ran JAX"


def test_public_names_are_listed_and_unknown_ones_are_refused():
    import d3epth_jax

    assert {"losses", "metrics", "weighting", "alignment", "DepthPipeline"} <= set(dir(d3epth_jax))
    assert d3epth_jax.metrics.compute
    with pytest.raises(AttributeError, match="no attribute 'loses'"):
        _ = d3epth_jax.loses
