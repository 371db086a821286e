"""How fast this package predicts: `python -m d3epth_jax.bench.predict` answers requests.

`measure` asks, one process for each line of the table (worker.py). Weights of presets
are random: they cost the same as any others.
"""

import contextlib
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax import macs, memory, sharding
from d3epth_jax.bench.worker import random_picture, serve
from d3epth_jax.models import presets
from d3epth_jax.models.depth_model import DepthModel, count_params, init_params
from d3epth_jax.pipeline import DepthPipeline
from d3epth_jax.typing import Params
from d3epth_jax.weights import hub

MATMUL_SIDE = {"cpu": 2048}  # others: 8192


def read(
    name: str, dtype: str, *, attention: str = "auto", remat: bool = False
) -> tuple[DepthModel, Params]:
    """A preset with random weights, or a directory's model."""
    how = {"dtype": dtype, "attention": attention, "remat": remat}
    if name in presets.PRESETS and not os.path.isfile(os.path.join(name, "model_index.json")):
        model = DepthModel(*presets.get(name), presets.SINGLE_STEP, **how)
        return model, random_params(model)
    loaded = hub.load_model(name, param_dtype=None, **how)
    return loaded.model, loaded.params


def random_params(model: DepthModel) -> Params:
    """`init_params`, but also where branches end: else a fault in a branch would not be seen."""
    params = init_params(model, 0)

    def fill(tree):
        for name, value in tree.items():
            if isinstance(value, dict):
                fill(value)
            elif name == "kernel" and not value.any():
                rng = np.random.default_rng(value.size)
                value[...] = rng.standard_normal(value.shape, np.float32)
                value *= 0.3 * np.prod(value.shape[:-1]) ** -0.5

    fill(params)
    if "prompt" in params:
        shape = params["prompt"].shape
        params["prompt"] = np.random.default_rng(0).standard_normal(shape, np.float32)
    return params


class Ours:
    """One model, measured; the methods are the requests."""

    def open(
        self,
        model: str,
        size,
        batch: int,
        dtype: str,
        folded: bool,
        attention: str = "auto",
        save: str = "",
    ) -> dict:
        """Reads the model, and saves it for others to read."""
        sharding.require_devices()
        self.size, self.batch, self._programs = tuple(size), batch, {}
        described, params = read(model, dtype, attention=attention)
        if save:
            hub.save_model(save, described, params)
        self.steps = described.denoising_steps or 1
        self.pipe = DepthPipeline(described, params, dtype=dtype, fold=folded)
        jax.block_until_ready(self.pipe.params)
        del params
        gc.collect()
        memory.forget_peak()
        return {"steps": self.steps, **device()}

    def count(self) -> dict:
        """Parameters and MACs by part."""
        model, params = self.pipe.networks(self.steps, self._zeros())
        found = macs.of_model(model, _shapes(params), self.size, self.batch, self.steps)
        return {
            "params": {part: count_params(params[part]) for part in macs.PARTS},
            "macs": {part: each.dense for part, each in found.items()},
        }

    def run(self, save: str = "") -> dict:
        """The whole pipeline: pictures to depth maps. The first time it compiles."""
        pictures = [random_picture(self.size)] * self.batch
        began = time.perf_counter()
        with compiling() as compile_seconds:
            out = self.pipe(
                pictures,
                processing_resolution=0,
                batch_size=self.batch,
                num_inference_steps=self.steps,
                latents=self._zeros(),
            )
        seconds = time.perf_counter() - began
        if save:
            np.save(save, out.prediction)
        return {"seconds": seconds, "compile_s": sum(compile_seconds)}

    def _zeros(self) -> np.ndarray | None:
        """Zero latents, which a model that starts from them needs not be told of."""
        model = self.pipe.model
        if model.from_zeros:
            return None
        cells = [-(-side // model.downsample) for side in self.size]
        return np.zeros((self.batch, *cells, model.autoencoder.latent_channels), np.float32)

    def part(self, part: str) -> dict:
        """One network, its inputs on the device. The first time it compiles."""
        if part not in self._programs:
            model, params = self.pipe.networks(self.steps, self._zeros())
            function, inputs = macs.part_programs(model, self.size, self.batch, self.steps)[part]
            arrays = [jax.random.normal(jax.random.key(0), x.shape, x.dtype) for x in inputs]
            self._programs[part] = functools.partial(jax.jit(function), params, *arrays)
            jax.block_until_ready(self._programs[part]())
        return {"seconds": timed(self._programs[part])}

    def memory(self) -> dict:
        """The most memory in use since the model was read; a GPU's, since the process began."""
        return most_memory()

    def matmul(self, dtype: str) -> dict:
        """Operations per second of a large matrix product: the device's peak, as it is reached."""
        return {"flops": matmul_peak(dtype)}

    def pieces(self, model: str, size) -> dict:
        """MACs saved by each piece of folding."""
        described = DepthModel(*presets.get(model), presets.SINGLE_STEP)
        return macs.saved_by_piece(described, tuple(size))


def device() -> dict:
    sharding.require_devices()
    found = jax.devices()[0]
    return {"device": found.device_kind, "platform": found.platform, "jax": jax.__version__}


def most_memory() -> dict:
    """{bytes, kind}: of an accelerator's allocator, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "kind": "the device's allocator"}
    return {"bytes": memory.peak(), "kind": "resident set of the process"}


@contextlib.contextmanager
def compiling() -> Iterator[list[float]]:
    """Fills a list with the seconds of everything that XLA compiles."""
    seconds = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def timed(function: Callable) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def matmul_peak(dtype: str) -> float:
    """2 n^3 / seconds of a square product, the fastest of five, large enough to reach the peak."""
    platform = jax.default_backend()
    n, chain = MATMUL_SIDE.get(platform, 8192), 1 if platform == "cpu" else 8
    x, y = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in (0, 1))
    y = y * jnp.asarray(n**-0.5, dtype)  # products of products stay of order 1

    @jax.jit
    def multiply(x, y):
        for _ in range(chain):
            x = x @ y
        return x

    jax.block_until_ready(multiply(x, y))
    return 2 * n**3 * chain / min(timed(lambda: multiply(x, y)) for _ in range(5))


def _shapes(params: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


if __name__ == "__main__":
    ours = Ours()
    names = ("open", "count", "run", "part", "memory", "matmul", "pieces")
    serve({"device": device, **{name: getattr(ours, name) for name in names}})
