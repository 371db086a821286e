"""How fast this package predicts and trains: `python -m d3epth_jax.bench` answers requests.

`bench_measure` asks, one process for each line of the table (bench_worker.py). Weights of presets
are random: they cost the same as any others.
"""

import functools
import gc
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from d3epth_jax import macs, memory, optim, steps, weighting
from d3epth_jax.bench_worker import random_picture, serve
from d3epth_jax.models import presets
from d3epth_jax.models.config import TinyAutoencoderConfig
from d3epth_jax.models.depth_model import DepthModel, count_params, init_params
from d3epth_jax.pipeline import DepthPipeline
from d3epth_jax.stages import latent, pixel
from d3epth_jax.train_state import init_train_state, merge, split_trainable
from d3epth_jax.typing import Params
from d3epth_jax.weights import fold, hub

MATMUL_SIDE = {"cpu": 2048}  # others: 8192
FIRST_BATCH = 8  # an accelerator's micro-batch is looked for from here on


def read(name: str, dtype: str, *, remat: bool = False) -> tuple[DepthModel, Params]:
    """A preset with random weights, or a directory's model."""
    if name in presets.PRESETS and not os.path.isfile(os.path.join(name, "model_index.json")):
        model = DepthModel(*presets.get(name), presets.SINGLE_STEP, dtype=dtype, remat=remat)
        return model, random_params(model)
    loaded = hub.load_model(name, dtype=dtype, remat=remat, param_dtype=None)
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

    def open(self, model: str, size, batch: int, dtype: str, folded: bool, save: str = "") -> dict:
        """Reads the model, and saves it for others to read."""
        self.size, self.batch, self._programs = tuple(size), batch, {}
        described, params = read(model, dtype)
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
        return {"seconds": seconds}

    def _zeros(self) -> np.ndarray | None:
        """Zero latents, which a model that starts from them needs not be told of."""
        model = self.pipe.model
        if model.starts_at_zero or model.denoising_steps == 1:
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
        return {"flops": matmul_peak(dtype), **device()}

    def pieces(self, model: str, size) -> dict:
        """MACs saved by each piece of folding."""
        described = DepthModel(*presets.get(model), presets.SINGLE_STEP)
        return macs.saved_by_piece(described, tuple(size))

    def train(self, **settings) -> dict:
        """A step of training: see `train`."""
        return train(**settings)


def device() -> dict:
    found = jax.devices()[0]
    return {"device": found.device_kind, "platform": found.platform, "jax": jax.__version__}


def most_memory() -> dict:
    """{bytes, kind}: of an accelerator's allocator, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "kind": "the device's allocator"}
    return {"bytes": memory.peak(), "kind": "resident set of the process"}


def timed(function: Callable) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def matmul_peak(dtype: str) -> float:
    """2 n^3 / seconds of the fastest of some square products, large enough to reach the peak."""
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


def train(
    stage: str,
    model: str,
    size: tuple[int, int],
    batch: int,
    dtype: str,
    remat: bool,
    runs: int,
    micro: int = 0,
) -> dict:
    """A step of the largest micro-batch that fits, or of `batch` pictures by accumulation.

    Args:
      stage: "stage2" is the hybrid loss in pixels, through the decoder; "stage1" distils from
        cached latents, with the teacher's UNet alone, for its features.
      runs: how often a step is measured.
      micro: pictures at a time, a divisor of `batch`; 0: so many as fit, in a step of their own.
    """
    student, params = read(model, dtype, remat=remat)
    patterns = ["unet/"]
    if stage == "stage2" and isinstance(student.autoencoder, TinyAutoencoderConfig):
        patterns.append("decoder/")  # METHOD 8: light decoders train, the KL decoder does not
    teacher, of_teacher, adapters, own_encoder = None, {}, {}, False
    if stage == "stage1":
        teacher, of_teacher, adapters = _teacher(student, model, size)
        # As configs/stage1.py: an encoder that is not the teacher's learns its RGB latent.
        own_encoder = presets.get(model)[1] != presets.get(teacher_of(model))[1]
        patterns += ["encoder/"] if own_encoder else []
    if adapters:
        params, patterns = {**params, "adapters": adapters}, [*patterns, "adapters/"]
    trainable, rest = split_trainable(params, tuple(patterns))
    # As train.py: what does not train is folded, and cast once.
    student, rest = fold.fold_frozen(student, trainable, rest)
    frozen = jax.device_put({"rest": fold.cast_kernels(student, rest), "teacher": of_teacher})
    forward = _forward(student, merge(trainable, rest), size)
    if stage == "stage2":
        loss_fn, beta, tasks = pixel.make_loss(student), {"ssi": 1.0, "edge": 0.5}, pixel.TASKS
        macs_each = macs.of_training(forward, [p.split("/")[0] for p in patterns], ["decoder"])
        task_weights = weighting.dwa(len(tasks))
    else:
        beta, tasks = {"gt": 1.0, "out": 1.0}, ()
        beta |= ({"feat": 0.1} if of_teacher else {}) | ({"enc": 1.0} if own_encoder else {})
        loss_fn = latent.make_loss(
            student, teacher, terms=tuple(beta), share_encoder=not own_encoder, cached=True
        )
        trains = ["unet", "encoder"] if own_encoder else ["unet"]
        macs_each = macs.of_training({part: forward[part] for part in trains}, trains)
        if of_teacher:
            macs_each += _forward(teacher, of_teacher, size)["unet"]
        task_weights = weighting.static(0)
    make_batch = _pairs
    if stage == "stage1":
        make_batch = functools.partial(_cached, student, pictures=own_encoder)
    tx = optim.make_optimizer(optim.make_schedule(3e-5, total_steps=20_000))

    def attempt(micro: int, accumulate: int = 1) -> dict:
        memory.forget_peak()
        step = jax.jit(
            steps.make_train_step(
                loss_fn, tx, task_weights, beta=beta, tasks=tasks, accumulate=accumulate
            ),
            donate_argnums=0,
        )
        # A copy, since the step overwrites it.
        state = jax.jit(lambda p: init_train_state(p, tx, task_weights))(trainable)
        data = jax.device_put(make_batch(micro * accumulate, size))
        began = time.perf_counter()
        step = step.lower(state, frozen, data).compile()
        compile_s, seconds = time.perf_counter() - began, []
        for _ in range(1 + runs):
            began = time.perf_counter()
            state, metrics = step(state, frozen, data)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
        return {
            "micro": micro,
            "accumulate": accumulate,
            "compile_s": compile_s,
            "seconds": seconds[1:],
            "loss": float(metrics["loss"]),
            "macs": macs_each * micro * accumulate,
            "memory": most_memory(),
        }

    if micro:
        result = attempt(micro, batch // micro)
    elif jax.default_backend() == "cpu":
        # A computer's memory has no limit that could be met without being ended by the system.
        result = attempt(1)
    else:
        result = largest_that_fits(attempt, min(FIRST_BATCH, batch), batch)
    trained = count_params(trainable)
    return {"result": result, "trained": trained, "matmul": matmul_peak(dtype), **device()}


def largest_that_fits(attempt: Callable[[int], dict], first: int, limit: int) -> dict:
    """`attempt(n)` of the largest n = first 2^k <= limit for which memory suffices.

    With "after_failure" where a larger one was tried before: its memory is that one's then. Raises
    MemoryError where not even n = 1 fits.
    """
    size, best, shrinking = first, None, False
    while True:
        try:
            best = attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if best is not None:
                return best
            if size == 1:
                raise MemoryError("not even a batch of 1 fits in memory") from error
            size, shrinking = size // 2, True
            gc.collect()
            continue
        if shrinking:
            return best | {"after_failure": True}
        if 2 * size > limit:
            return best
        size *= 2


def is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )


def _teacher(student: DepthModel, name: str, size) -> tuple[DepthModel, Params, Params]:
    """(teacher, its UNet's parameters, adapters of features) for stage 1 from a cache.

    Without parameters and adapters where the UNets' features cannot be paired.
    """
    teacher, params = read(teacher_of(name), student.dtype)
    teacher, params = fold.fold(teacher, params)
    try:
        adapters = latent.init_adapters(student, teacher, jax.random.key(0), *size)
    except ValueError:
        return teacher, {}, {}
    needed = {part: params[part] for part in ("unet", "prompt") if part in params}
    return teacher, fold.cast_kernels(teacher, needed), adapters


def teacher_of(name: str) -> str:
    """The preset that a preset's student is distilled from: of the same kind, by its name."""
    return next((f"d2_{kind}" for kind in ("light", "nano") if kind in name), "d2_base")


def _pairs(count: int, size) -> dict:
    """A batch of stage 2."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, *size, 3), np.uint8),
        "depth": rng.uniform(1, 10, (count, *size, 1)).astype(np.float32),
        "mask": np.ones((count, *size, 1), bool),
    }


def _cached(model: DepthModel, count: int, size, *, pictures: bool) -> dict:
    """A batch of stage 1 as a teacher cache holds it, with the pictures or without."""
    rng = np.random.default_rng(0)
    cells = count, *(side // model.downsample for side in size)
    names = ("rgb_latent", "gt_latent", "teacher_latent")
    shape = *cells, model.autoencoder.latent_channels
    return {
        **{name: rng.standard_normal(shape, np.float32).astype(np.float16) for name in names},
        "latent_mask": np.ones((*cells, 1), bool),
        "has_target": np.ones(count, bool),
        **({"image": rng.integers(0, 256, (count, *size, 3), np.uint8)} if pictures else {}),
    }


def _forward(model: DepthModel, params: Params, size) -> dict[str, int]:
    """MACs of one picture in each network, as a training step computes it."""
    tokens = params["prompt"].shape[1] if "prompt" in params else 2
    folded = macs.folded(model, fold.TRAINING, tokens)
    return {part: found.dense for part, found in macs.of_model(*folded, size).items()}


def _shapes(params: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


if __name__ == "__main__":
    ours = Ours()
    names = ("open", "count", "run", "part", "memory", "matmul", "pieces", "train")
    serve({"device": device, **{name: getattr(ours, name) for name in names}})
