"""Multiply-accumulates (MACs) of a program, counted from its trace: no weights, nothing compiled.

Convolutions and matrix products are counted, everything else is not. A loop of known length counts
its body that often.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from d3epth_jax import inference
from d3epth_jax.models import attention, convolve
from d3epth_jax.models.depth_model import DepthModel, abstract_params, count_params
from d3epth_jax.typing import Params
from d3epth_jax.weights import fold

PARTS = ("encoder", "unet", "decoder")


@dataclasses.dataclass(frozen=True)
class Macs:
    """MACs of a program.

    Attributes:
      dense: H W K K Cin Cout of every convolution, taps on the padding included: METHOD 6.
      valid: without those taps, as XLA counts.
    """

    dense: int = 0
    valid: int = 0

    def __add__(self, other: "Macs") -> "Macs":
        return Macs(self.dense + other.dense, self.valid + other.valid)


def count(function: Callable, *args) -> Macs:
    """MACs of `function(*args)`; arrays may be `jax.ShapeDtypeStruct`s.

    Raises ValueError for a loop of unknown length with products in it.
    """
    found = operations(function, *args)
    return sum((Macs(times * dense(op), times * valid(op)) for op, times in found), Macs())


def of_model(
    model: DepthModel,
    params: Params,
    size: tuple[int, int],
    batch: int = 1,
    steps: int = 1,
) -> dict[str, Macs]:
    """MACs of {encoder, unet, decoder} for `batch` pictures of height and width `size`.

    params: `abstract_params` are enough. The numbers do not depend on the device or the type.
    """
    programs = part_programs(countable(model), size, batch, steps)
    with plain_forms():
        return {name: count(f, params, *inputs) for name, (f, inputs) in programs.items()}


def countable(model: DepthModel) -> DepthModel:
    """The model in float32, where no vendor's kernel hides its products."""
    return dataclasses.replace(model, dtype="float32", remat=False)


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Attention all at once, and convolutions as such.

    Chunks are filled up with queries that nobody asked for. Of the forms in which a CPU computes
    some convolutions, a product with patches does not tell which taps are on the padding, and
    minimal filtering takes fewer.
    """
    limits, backends = dict(attention.MAX_LOGITS), set(convolve.REWRITTEN_ON)
    attention.MAX_LOGITS.update(dict.fromkeys(limits, sys.maxsize))
    convolve.REWRITTEN_ON.clear()
    try:
        yield
    finally:
        attention.MAX_LOGITS.update(limits)
        convolve.REWRITTEN_ON.update(backends)


def part_programs(
    model: DepthModel, size: tuple[int, int], batch: int = 1, steps: int = 1
) -> dict[str, tuple[Callable, tuple]]:
    """{part: (function of parameters and inputs, the inputs' shapes)}; both sides are padded."""
    cells = [-(-side // model.downsample) for side in size]
    channels = model.autoencoder.latent_channels
    image = jax.ShapeDtypeStruct((batch, *(c * model.downsample for c in cells), 3), jnp.float32)
    latent = jax.ShapeDtypeStruct((batch, *cells, channels), jnp.float32)

    def unet(params, rgb, depth):
        return inference.denoise(model, params, rgb, depth, steps)

    return {
        "encoder": (functools.partial(inference.encode_image, model), (image,)),
        "unet": (unet, (latent, latent)),
        "decoder": (functools.partial(inference.decode_depth, model), (latent,)),
    }


def folded(
    model: DepthModel, pieces: Iterable[str] | None = None, tokens: int = 2
) -> tuple[DepthModel, Params]:
    """(`fold.fold`'s model, the shapes of its parameters) without parameters to fold."""
    params = dict(abstract_params(model))
    if "prompt" in params:
        params["prompt"] = jax.ShapeDtypeStruct((1, tokens, params["prompt"].shape[-1]), np.float32)
    # Views of one number: as many shapes as it takes, and hardly a byte.
    params = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), params)
    model, params = fold.fold(model, params, pieces)
    return model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def of_training(
    forward: Mapping[str, int], trained: Iterable[str], behind: Iterable[str] = ()
) -> int:
    """MACs of a training step: of what is computed forward, plus as many again for the gradients
    of its inputs and of its parameters.

    Args:
      forward: MACs of each part, forward.
      trained: parts whose parameters have gradients.
      behind: frozen parts that gradients go through. Recomputed activations do not count.
    """
    trained, behind = set(trained), set(behind)
    return sum(
        macs * (3 if part in trained else 2 if part in behind else 1)
        for part, macs in forward.items()
    )


def operations(function: Callable, *args) -> list[tuple[core.JaxprEqn, int]]:
    """(convolution or product, how often it runs) in the trace of `function(*args)`."""
    return list(_walk(jax.make_jaxpr(function)(*args).jaxpr))


def _walk(jaxpr: core.Jaxpr) -> Iterator[tuple[core.JaxprEqn, int]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _OUTPUT_TIMES:
            yield eqn, 1
            continue
        bodies = [list(_walk(body)) for body in _bodies(eqn)]
        if eqn.primitive.name == "while" and any(bodies):
            raise ValueError("a while loop with products in it: how often it runs is not known")
        if eqn.primitive.name == "cond":  # one branch runs: the dearest counts
            bodies = [max(bodies, key=lambda ops: sum(dense(op) * times for op, times in ops))]
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for body in bodies:
            yield from ((op, times * repeats) for op, times in body)


def _bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def dense(op: core.JaxprEqn) -> int:
    """MACs of a convolution or product, taps on the padding included."""
    return op.outvars[0].aval.size * _OUTPUT_TIMES[op.primitive.name](op)


def _contracted(op: core.JaxprEqn) -> int:
    (dims, _), _ = op.params["dimension_numbers"]
    return int(np.prod([op.invars[0].aval.shape[d] for d in dims], dtype=np.int64))


def _taps(op: core.JaxprEqn) -> int:
    """Taps times input channels (of a group)."""
    out_channel = op.params["dimension_numbers"].rhs_spec[0]
    kernel = op.invars[1].aval
    return kernel.size // kernel.shape[out_channel]


# MACs for each number of the output.
_OUTPUT_TIMES = {"dot_general": _contracted, "conv_general_dilated": _taps}


def valid(op: core.JaxprEqn) -> int:
    """MACs of a convolution or product, without taps on the padding or between inputs."""
    if op.primitive.name == "dot_general":
        return dense(op)
    p, numbers = op.params, op.params["dimension_numbers"]
    sizes = [
        [shape[d] for d in spec[2:]]
        for shape, spec in (
            (op.invars[0].aval.shape, numbers.lhs_spec),
            (op.invars[1].aval.shape, numbers.rhs_spec),
            (op.outvars[0].aval.shape, numbers.out_spec),
        )
    ]
    total = dense(op)
    for size, taps, out, stride, (low, _), gap, dilation in zip(
        *sizes, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True
    ):
        seen = np.arange(out)[:, None] * stride + np.arange(taps)[None] * dilation - low
        hits = (seen >= 0) & (seen <= (size - 1) * gap) & (seen % gap == 0)
        total = total * int(hits.sum()) // (out * taps)
    return total


def by_xla(function: Callable, *args) -> float:
    """MACs of `function(*args)` as XLA's cost analysis counts each lowered convolution and product.

    An oracle for `Macs.valid`: the analysis of the whole program also counts additions and the
    like, and a loop's body once.
    """
    return sum(_xla_cost(op) * times for op, times in operations(function, *args))


def _xla_cost(op: core.JaxprEqn) -> float:
    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in op.invars]
    settings = tuple(sorted((name, repr(value)) for name, value in op.params.items()))
    key = op.primitive.name, tuple((x.shape, x.dtype.name) for x in inputs), settings
    if key not in _COSTS:
        lowered = jax.jit(lambda *arrays: op.primitive.bind(*arrays, **op.params)).lower(*inputs)
        _COSTS[key] = lowered.cost_analysis()["flops"] / 2
    return _COSTS[key]


_COSTS: dict[tuple, float] = {}


def saved_by_piece(model: DepthModel, size: tuple[int, int]) -> dict[str, dict]:
    """{piece of folding, or "all": {params, macs, xla}}, each [before, after].

    macs: valid taps only, by formula; xla: by the cost analysis of the lowered program.
    """
    before = _costs(model, abstract_params(model), size)
    pieces = {piece: (piece,) for piece in fold.foldable(model)} | {"all": None}
    table = {}
    for name, chosen in pieces.items():
        after = _costs(*folded(model, chosen), size)
        table[name] = {kind: [before[kind], after[kind]] for kind in before}
    return table


def _costs(model: DepthModel, params: Params, size) -> dict:
    programs = part_programs(countable(model), size).values()
    with plain_forms():
        xla = sum(by_xla(function, params, *inputs) for function, inputs in programs)
    return {
        "params": count_params(params),
        "macs": sum(of_model(model, params, size).values(), Macs()).valid,
        "xla": xla,
    }
