"""Softmax attention in bounded memory, in the form that each kind of device computes fast."""

import jax
import jax.numpy as jnp

# Logits that are held at a time: on a CPU about as many as its caches hold.
MAX_LOGITS = {"cpu": 2**20, "accelerator": 2**27}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention, float32 inside: q [B, N, heads, D], k and v [B, M, heads, D] -> as q.

    mask: bool [N, M], False where a query must not look; every query sees something.
    implementation: "chunked" never holds more than `MAX_LOGITS` logits at a time, "cudnn" is the
      fused kernel of an NVIDIA GPU, for 16-bit types; None: cudnn where it can be, else chunked.
    """
    if implementation is None:
        fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and mask is None
        implementation = "cudnn" if fused and q.shape[-1] <= 128 else "chunked"
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if implementation != "chunked":
        raise ValueError(f"unknown attention {implementation!r}: choose chunked or cudnn")
    return _chunked(q, k, v, mask)


def _chunked(q, k, v, mask):
    batch, queries, heads, depth = q.shape
    limit = MAX_LOGITS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    chunks = min(queries, -(-batch * heads * queries * k.shape[1] // limit))
    # Arranged once, for all chunks: [B, heads, N, D], [B, heads, D, M], [B, heads, M, D].
    q = jnp.swapaxes(q, 1, 2) * depth**-0.5
    k, v = jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2)
    if chunks <= 1:
        return jnp.swapaxes(_attend(q, k, v, mask), 1, 2)
    size = -(-queries // chunks)

    def split(x):
        """[..., N, C] -> [chunks, ..., size, C]."""
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, chunks * size - queries), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], chunks, size, x.shape[-1]), -3, 0)

    # Recomputed in the backward pass, which would keep all logits otherwise.
    attend = jax.checkpoint(lambda part: _attend(part[0], k, v, *part[1:]))
    out = jax.lax.map(attend, (split(q),) if mask is None else (split(q), split(mask)))
    # [chunks, B, heads, size, D] -> [B, N, heads, D]
    out = jnp.transpose(out, (1, 0, 3, 2, 4)).reshape(batch, chunks * size, heads, depth)
    return out[:, :queries]


def _attend(q, k, v, mask=None):
    """q [B, heads, N, D], k [B, heads, D, M], v [B, heads, M, D] -> as q."""
    logits = jnp.einsum("bhnd,bhdm->bhnm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum(
        "bhnm,bhmd->bhnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    # Divided by their sum at the end, where there are fewer numbers.
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)
