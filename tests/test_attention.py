import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d3epth_jax.models import attention as module
from d3epth_jax.models import layers, presets
from d3epth_jax.models.attention import attention
from d3epth_jax.models.config import AutoencoderKLConfig
from d3epth_jax.models.depth_model import DepthModel, abstract_params
from d3epth_jax.models.unet import UNet
from tests.conftest import small_unet

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
    monkeypatch.setattr(module, "MIN_QUERIES", 1)
    return request.param


def test_any_number_of_chunks_gives_the_same(limit):
    np.testing.assert_allclose(attention(*arrays()), reference(*arrays()), atol=1e-6)


def test_masked_keys_are_not_seen(limit):
    mask = np.random.default_rng(1).random((QUERIES, KEYS)) < 0.5
    mask[:, 0] = True
    np.testing.assert_allclose(attention(*arrays(), mask), reference(*arrays(), mask), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_plain_formula(limit, masked):
    mask = np.random.default_rng(1).random((QUERIES, KEYS)) < 0.5
    mask[:, 0] = True
    mask = mask if masked else None

    def plain(q, k, v):
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
        logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), v)

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: (function(*x) ** 2).sum(), (0, 1, 2)))(*arrays())

    ours = gradients(lambda q, k, v: attention(q, k, v, mask))
    for one, other in zip(ours, gradients(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradients_in_16_bits(limit):
    def gradients(dtype):
        return jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), (0, 1, 2))(
            *(x.astype(dtype) for x in arrays(jnp.bfloat16))
        )

    for one, other in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.05)


@pytest.mark.parametrize("depth", [40, 512])
def test_in_16_bits_only_the_weights_and_the_result_are_rounded(depth):
    """Not the queries' scale, which no type of 16 bits holds for these depths."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(2 * rng.normal(size=(1, 64, 2, depth)), jnp.bfloat16) for _ in "qkv")
    exact = reference(q, k, v)
    plain = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    ours, theirs = (np.std(np.asarray(x, np.float64) - exact) for x in (attention(q, k, v), plain))
    assert ours < 1.05 * theirs


def test_gradients_in_16_bits_do_not_get_worse_with_the_number_of_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 512, 1, 8)), jnp.bfloat16) for _ in range(3))

    def errors(logits):
        monkeypatch.setitem(module.MAX_LOGITS, "cpu", logits)
        monkeypatch.setattr(module, "MIN_QUERIES", 1)
        exact, rounded = (
            jax.grad(lambda *x: (attention(*x).astype(jnp.float32) ** 2).sum(), (0, 1, 2))(
                *(x.astype(dtype) for x in (q, k, v))
            )
            for dtype in (jnp.float32, jnp.bfloat16)
        )
        return [
            float(jnp.linalg.norm(one - other) / jnp.linalg.norm(one))
            for one, other in zip(exact, rounded, strict=True)
        ]

    whole, chunks = errors(2**20), errors(4 * 512)  # 128 chunks
    assert all(many < 1.2 * one for one, many in zip(whole, chunks, strict=True)), (whole, chunks)


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
    # Nor where the queries do not divide evenly.
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", 40 * 300)
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 1), jnp.float32) for n in (100, 300))
    assert largest(jax.make_jaxpr(lambda *x: attention(*x))(q, k, k).jaxpr) <= 40 * 300
    # However many keys there are, they are not read for a few queries at a time.
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", 1000)
    assert largest(jax.make_jaxpr(lambda *x: attention(*x))(q, k, k).jaxpr) == 25 * 300


def test_a_batch_of_none_is_none():
    q = jnp.zeros((0, 5, 2, 8))
    assert attention(q, q, q).shape == q.shape


def test_no_more_logits_are_kept_for_the_backward_pass():
    def gradient(q):
        return jax.grad(lambda x: attention(x, x, x).sum())(q)

    q = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    assert largest(jax.make_jaxpr(gradient)(q).jaxpr) <= 2**20


def pretend(monkeypatch, capability):
    """One GPU of this capability, or None; the list gets what its fused kernel is called with."""
    seen = []

    def kernel(q, k, v, *, implementation):
        seen.append(implementation)
        return q

    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if capability else "cpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return seen


@pytest.mark.parametrize(
    ("capability", "dtype", "depth", "tokens", "masked", "fused"),
    [
        ("8.0", jnp.bfloat16, 64, 16, False, True),
        ("12.0", jnp.bfloat16, 128, 20, False, True),
        ("9.0", jnp.bfloat16, 136, 20, False, False),
        ("9.0", jnp.bfloat16, 60, 20, False, False),  # cudnn takes multiples of 8
        ("9.0", jnp.bfloat16, 64, 15, False, False),
        ("9.0", jnp.float32, 64, 20, False, False),
        ("9.0", jnp.bfloat16, 64, 20, True, False),
        ("7.5", jnp.bfloat16, 64, 20, False, False),  # as Colab's T4
        ("gfx90a", jnp.bfloat16, 64, 20, False, False),  # AMD's
        (None, jnp.bfloat16, 64, 20, False, False),  # no GPU
    ],
)
def test_the_fused_kernel_is_chosen_where_it_can_be(
    monkeypatch, capability, dtype, depth, tokens, masked, fused
):
    seen = pretend(monkeypatch, capability)
    x = jax.ShapeDtypeStruct((1, tokens, 2, depth), dtype)
    mask = np.ones((tokens, tokens), bool) if masked else None
    jax.eval_shape(lambda x: attention(x, x, x, mask), x)
    assert seen == (["cudnn"] if fused else [])
    # The second prompt has as many tokens as there are cells.
    prompts = [jax.ShapeDtypeStruct((1, count, 2, depth), dtype) for count in (77, tokens)]

    def to_a_prompt(prompt):
        jax.eval_shape(lambda x, prompt: attention(x, prompt, prompt, shared=True), x, prompt)

    to_a_prompt(prompts[0])
    possible = len(seen)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    for prompt in prompts:
        to_a_prompt(prompt)
    assert len(seen) == possible, "a prompt is not split over devices as the pictures are"
    jax.eval_shape(lambda x: attention(x, x, x, mask), x)
    assert len(seen) == possible + fused


def test_of_a_prompt_it_is_known_that_all_pictures_share_it(monkeypatch):
    told = {}

    def spy(q, k, v, *, implementation, shared):
        told[k.shape[1]] = shared
        return q

    monkeypatch.setattr(layers, "attention", spy)
    unet, sample = UNet(small_unet()), jnp.zeros((2, 8, 8, 4))
    for count, tokens in ((1, 3), (2, 5)):
        jax.eval_shape(unet.init, jax.random.key(0), sample, 1, jnp.zeros((count, tokens, 8)))
    assert told == {16: False, 3: True, 5: False}


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
def test_the_fused_kernel_gives_the_same_numbers_and_gradients():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 200, 5, 64)), jnp.bfloat16) for _ in range(3))

    def both(implementation):
        def total(q, k, v):
            out = attention(q, k, v, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) ** 2), out

        slopes, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *slopes)]

    for ours, fused in zip(both("chunked"), both("cudnn"), strict=True):
        assert np.abs(fused - ours).max() < 0.02 * np.abs(ours).max()  # bfloat16 has 8 bits


def test_a_mask_is_not_dropped_by_the_fused_kernel():
    with pytest.raises(ValueError, match="takes no mask"):
        attention(*arrays(), np.ones((QUERIES, KEYS), bool), implementation="cudnn")


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="choose auto, chunked or cudnn"):
        attention(*arrays(), implementation="flash")
    with pytest.raises(ValueError, match="unknown attention 'cudnn': choose one of"):
        described("cudnn")  # its autoencoder's head is too wide for that


def described(how):
    vae = AutoencoderKLConfig(
        block_out_channels=(32, 64), latent_channels=4, norm_num_groups=8, layers_per_block=1
    )
    unet, _ = presets.get("d3_turbo")
    return DepthModel(unet, vae, presets.SINGLE_STEP, dtype="bfloat16", attention=how)


@pytest.mark.parametrize("part", ["unet", "encoder", "decoder"])
def test_a_model_may_be_told_to_do_without_the_fused_kernel(monkeypatch, part):
    seen = pretend(monkeypatch, "9.0")

    def fused(how):
        del seen[:]
        model = described(how)
        inputs = {
            "unet": ((1, 32, 32, 8), (), (1, 77, 1024)),
            "encoder": ((1, 16, 16, 3),),
            "decoder": ((1, 8, 8, 4),),
        }[part]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
        jax.eval_shape(
            lambda params, *x: model.modules[part].apply({"params": params}, *x),
            *(abstract_params(model)[part], *inputs),
        )
        return len(seen)

    assert fused("auto") > 0
    assert fused("chunked") == 0
