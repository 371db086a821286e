import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d3epth_jax.models import attention as module
from d3epth_jax.models.attention import attention

QUERIES, KEYS = 13, 7


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (QUERIES, KEYS, KEYS)
    return [jnp.asarray(rng.normal(size=(2, n, 3, 4)), dtype) for n in shapes]


def reference(q, k, v, mask=None):
    """In float64, word by word."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    logits = logits if mask is None else np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture(params=[2 * 3 * KEYS, 200, 2**20], ids=["one query", "uneven", "all at once"])
def limit(request, monkeypatch):
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", request.param)
    return request.param


def test_any_number_of_chunks_gives_the_same(limit):
    np.testing.assert_allclose(attention(*arrays()), reference(*arrays()), atol=1e-6)


def test_masked_keys_are_not_seen(limit):
    mask = np.random.default_rng(1).random((QUERIES, KEYS)) < 0.5
    mask[:, 0] = True
    np.testing.assert_allclose(attention(*arrays(), mask), reference(*arrays(), mask), atol=1e-6)


def test_gradients_do_not_depend_on_the_chunks(limit, monkeypatch):
    def loss(*inputs):
        return (attention(*inputs) ** 2).sum()

    chunked = jax.grad(loss, (0, 1, 2))(*arrays())
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", 2**20)
    whole = jax.grad(loss, (0, 1, 2))(*arrays())
    for ours, theirs in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_large_logits_and_16_bits(limit):
    q, k, v = arrays(jnp.bfloat16)
    out = attention(q * 300, k * 300, v)  # exp of such logits is infinite
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float64), reference(q * 300, k * 300, v), atol=0.05
    )


def largest(jaxpr):
    """Elements of the largest array that is computed anywhere in a program."""
    sizes = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
    inner = [getattr(x, "jaxpr", x) for e in jaxpr.eqns for x in e.params.values()]
    return max([*sizes, *(largest(x) for x in inner if hasattr(x, "eqns"))])


def test_no_more_logits_than_the_limit_are_formed(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    assert largest(jax.make_jaxpr(attention)(q, q, q).jaxpr) <= 2**20
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", 2**30)
    assert largest(jax.make_jaxpr(lambda *x: attention(*x))(q, q, q).jaxpr) == 2 * 4096**2


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="choose chunked or cudnn"):
        attention(*arrays(), implementation="flash")
