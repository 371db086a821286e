"""The walls of the house: imports go down only, and each library stays in its rooms.

The tables below are the design. A new file gets a line in LAYERS, beside its peers.
"""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "d3epth_jax"
NAME = PACKAGE.name

# Bottom first. A name is a module, or a folder with all that is in it but what a lower layer names.
# A module may import its own layer and those below; within a layer no circle.
LAYERS = [
    "typing atomic output tables memory user_cache schedule alignment targets losses weighting"
    " metrics evaluation.protocols image ensemble",
    "models",
    "weights data sharding hosts compilation_cache checkpoint metric_writer"
    " training.optim training.train_state",
    "inference training.stages training.steps",
    "training evaluation pipeline picture_arrays gallery progress macs bench.predict bench.train"
    " bench.worker bench.report bench.compare_diffusers",
    "main config_arguments cli argument_types bench data_cli pictures __main__",
]

# Library -> the only modules that may import it; () means none.
ROOMS = {
    "flax.linen": ("models",),
    "ml_collections": ("main", "training.model_setup"),
    "grain": ("data", "checkpoint"),
    "orbax": ("checkpoint",),
    "tensorflow_datasets": ("data",),
    "array_record": ("data",),
    "torch": ("bench.compare_diffusers",),  # which nothing imports: it runs as a process
    "diffusers": ("bench.compare_diffusers",),
    "transformers": (),
    "tensorflow": (),
    "clu": (),
}

# Run in data workers or without JAX: nothing they import, at any distance, may import these.
WITHOUT_JAX = ("data.sources", "data.transforms", "image")
JAX = ("jax", "flax", "optax", "orbax")


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def layer_of(module: str) -> int | None:
    for level, names in enumerate(LAYERS):
        if any(within(module, name) for name in names.split()):
            return level
    return None


def read_package(root: pathlib.Path = PACKAGE) -> dict[str, str]:
    """{module: source}; names are without the package's, a folder's is that of its __init__."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(p for p in parts if p != "__init__")] = path.read_text()
    return modules


def imports_of(module: str, source: str, modules) -> tuple[set[str], set[str]]:
    """(own modules, libraries) that the source imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write absolute imports (line {node.lineno})"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names |= {"flax.linen"} if (node.value.id, node.attr) == ("flax", "linen") else set()
    own, libraries = set(), set()
    for name in names:
        if not within(name, NAME):
            libraries.add(name)
            continue
        # `from package.module import name`: the longest part of it that is a module.
        target = name.removeprefix(NAME).lstrip(".")
        while target and target not in modules:
            target = target.rpartition(".")[0]
        own.add(target)
    return own, libraries


def violations(modules: dict[str, str]) -> list[str]:
    """Everything wrong with the package, in words."""
    problems = []
    graph, libraries = {}, {}
    for module, source in modules.items():
        graph[module], libraries[module] = imports_of(module, source, modules)
        level = layer_of(module)
        if module and level is None:
            problems.append(f"{module}: unknown to LAYERS in {pathlib.Path(__file__).name}: add it")
        for target in sorted(graph[module] - {"", module}):
            below = layer_of(target)
            if module == "":
                problems.append(f"__init__ imports {target}: public names are loaded on first use")
            elif level is not None and below is not None and below > level:
                problems.append(
                    f"{module} (layer {level}) imports {target} (layer {below}): upward"
                )
        for library, rooms in ROOMS.items():
            if any(within(name, library) for name in libraries[module]) and not any(
                within(module, room) for room in rooms
            ):
                allowed = ", ".join(rooms) or "no module"
                problems.append(f"{module} imports {library}, which is for {allowed}")
    problems += [f"circle of imports: {' -> '.join(circle)}" for circle in circles(graph)]
    for module in modules:
        if any(within(module, name) for name in WITHOUT_JAX):
            for reached in sorted(reachable(module, graph)):
                for name in sorted(libraries[reached]):
                    if any(within(name, library) for library in JAX):
                        problems.append(f"{module} must not need JAX: {reached} imports {name}")
    return problems


def reachable(module: str, graph) -> set[str]:
    """The modules that importing this one runs: what it imports, and every parent's __init__."""
    seen, todo = set(), [module]
    while todo:
        here = todo.pop()
        if here in seen or here not in graph:
            continue
        seen.add(here)
        todo += graph[here]
        todo += [here.rpartition(".")[0]]
    return seen


def circles(graph) -> list[list[str]]:
    found, done = [], set()

    def visit(module, path):
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ()) - {"", module}):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


@pytest.mark.parametrize("module", sorted(read_package()), ids=lambda name: name or "__init__")
def test_module_keeps_to_its_layer(module):
    prefix = module or "__init__"
    mine = [p for p in violations(read_package()) if p.split(" ")[0].rstrip(":") == prefix]
    assert not mine, "\n".join(mine)


def test_no_circles():
    assert not [p for p in violations(read_package()) if p.startswith("circle")]


GOOD = {
    "": "import importlib",
    "losses": "import jax\nfrom d3epth_jax.typing import Depth",
    "typing": "import jax",
    "models": "",
    "models.unet": "from flax import linen as nn\nfrom d3epth_jax.models import layers",
    "models.layers": "import flax.linen as nn",
    "data": "",
    "data.transforms": "import numpy\nfrom d3epth_jax import image",
    "image": "import numpy",
    "main": "from ml_collections import config_flags\nfrom d3epth_jax import losses",
}


def test_the_checker_passes_a_sound_package():
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("novelty", "", "novelty: unknown to LAYERS"),
        (
            "losses",
            "from d3epth_jax import main",
            "losses (layer 0) imports main (layer 5): upward",
        ),
        ("losses", "def f():\n  from d3epth_jax.models.unet import U", "imports models.unet"),
        ("losses", "import d3epth_jax.models.unet", "imports models.unet"),
        ("", "from d3epth_jax import losses", "__init__ imports losses"),
        ("losses", "from flax import linen", "losses imports flax.linen"),
        ("losses", "import flax\nx = flax.linen.Dense", "losses imports flax.linen"),
        ("losses", "import torch.nn", "torch, which is for bench.compare_diffusers"),
        ("models.unet", "from diffusers import UNet2DModel", "diffusers"),
        ("losses", "import ml_collections", "which is for main, training.model_setup"),
        ("models.unet", "import grain.python", "grain, which is for data, checkpoint"),
        ("typing", "from d3epth_jax.losses import ssi", "circle of imports"),
        ("data.transforms", "import jax.numpy", "data.transforms must not need JAX"),
        ("data.transforms", "from d3epth_jax import losses", "must not need JAX: losses imports"),
        ("data", "import jax", "data.transforms must not need JAX: data imports jax"),
        ("image", "from d3epth_jax.typing import Depth", "image must not need JAX: typing"),
    ],
)
def test_the_checker_sees_a_planted_violation(module, source, word):
    found = violations(GOOD | {module: source})
    assert any(word in problem for problem in found), found
