"""d3epth_jax: efficient monocular depth from diffusion models, in JAX.

Public names are loaded on first use, so that `import d3epth_jax` costs next to nothing and the
loss functions can be used without Flax, Grain or Orbax.
"""

import importlib

__version__ = "0.1.0"

_MODULES = ("alignment", "image", "losses", "metrics", "schedule", "weighting")
_NAMES = {"DepthPipeline": "pipeline", "DepthOutput": "pipeline"}

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
