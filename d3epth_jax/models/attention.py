"""Softmax attention in bounded memory, in the form that each kind of device computes fast."""

import functools

import jax
import jax.numpy as jnp

# What a whole model may be told: no fused kernel takes every attention that there is.
OF_A_MODEL = ("auto", "chunked")

# Logits that are held at a time: on a CPU about as many as its caches hold.
MAX_LOGITS = {"cpu": 2**20, "accelerator": 2**27}
MIN_QUERIES = 32  # but those of so many: all keys and values are read for each chunk
FUSED_MIN_KEYS = 16  # a fused kernel's tile of 64 or 128 keys would be almost empty


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str = "auto",
    shared: bool = False,
) -> jax.Array:
    """Attention, its softmax in float32: q [B, N, heads, D], k and v [B, M, heads, D] -> as q.

    mask: bool [N, M], False where a query must not look; every query sees something.
    implementation: "chunked" holds at most `MAX_LOGITS` logits at a time, or those of `MIN_QUERIES`
      queries, "cudnn" is the fused kernel of an NVIDIA GPU, for 16-bit types and without a mask;
      "auto": cudnn where it can be and there are keys enough, else chunked. That is also a TPU's:
      the fused kernels that JAX has for one have not been tried here.
    shared: all of the batch have the same k and v, such as a prompt's.

    ValueError for another implementation, and for cudnn with a mask.
    """
    if implementation == "auto":
        fused = _device_has_cudnn_attention() and q.dtype.itemsize == 2 and mask is None
        fits = q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and k.shape[1] >= FUSED_MIN_KEYS
        # What is shared, on one device alone: of several each has all of it but only its part of
        # q, and the kernel is not compiled for them unless q, k and v are split alike.
        fits &= not shared or jax.device_count() == 1
        implementation = "cudnn" if fused and fits else "chunked"
    if implementation == "cudnn":
        if mask is not None:
            raise ValueError("attention by cudnn takes no mask here: choose chunked")
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if implementation != "chunked":
        raise ValueError(f"unknown attention {implementation!r}: choose auto, chunked or cudnn")
    return _chunked(q, k, v, mask)


def _device_has_cudnn_attention() -> bool:
    """Whether it is an NVIDIA GPU of Ampere's generation or later: a T4 has no such kernel."""
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "7.5"; AMD: "gfx90a"
    return capability[:1].isdigit() and float(capability) >= 8


def _chunked(q, k, v, mask):
    batch, queries, heads, depth = q.shape
    limit = MAX_LOGITS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    at_once = max(MIN_QUERIES, limit // max(1, batch * heads * k.shape[1]))
    chunks = -(-queries // at_once)
    # Arranged once, for all chunks: [B, heads, N, D], [B, heads, D, M], [B, heads, M, D].
    q, scale = jnp.swapaxes(q, 1, 2), depth**-0.5
    if q.dtype.itemsize > 2:  # there are fewer of them than logits; but in 16 bits they would round
        q, scale = q * scale, 1.0
    k, v = jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2)
    if chunks <= 1:
        return jnp.swapaxes(_attend(scale, q, k, v, mask), 1, 2)
    size = -(-queries // chunks)

    def split(x):
        """[..., N, C] -> [chunks, ..., size, C]."""
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, chunks * size - queries), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], chunks, size, x.shape[-1]), -3, 0)

    parts = (split(q),) if mask is None else (split(q), split(mask))
    # The map's gradient adds up what k and v get from every chunk, in the type that it is given:
    # sums of a hundred in bfloat16 would be off by several percent.
    wide, dtype = [x.astype(jnp.float32) for x in (k, v)], k.dtype

    def attend(part):
        return _attend(scale, part[0], *(x.astype(dtype) for x in wide), *part[1:])

    out = jax.lax.map(attend, parts)
    # [chunks, B, heads, size, D] -> [B, N, heads, D]
    out = jnp.transpose(out, (1, 0, 3, 2, 4)).reshape(batch, chunks * size, heads, depth)
    return out[:, :queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, mask=None):
    """q [B, heads, N, D], k [B, heads, D, M], v [B, heads, M, D], mask [N, M] -> as q."""
    return _attend_forward(scale, q, k, v, mask)[0]


def _attend_forward(scale, q, k, v, mask=None):
    logits = _logits(scale, q, k, mask)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    # Divided by their sum at the end, where there are fewer numbers.
    out = (_product("bhnm,bhmd->bhnd", weights, v) / total).astype(v.dtype)
    return out, (q, k, v, mask, out, top + jnp.log(total))


def _attend_backward(scale, kept, d_out):
    """Computes the weights again, from the logarithm of their sum: nothing [N, M] was kept."""
    q, k, v, mask, out, log_total = kept
    weights = jnp.exp(_logits(scale, q, k, mask) - log_total)
    d_v = _product("bhnm,bhnd->bhmd", weights, d_out)
    d_weights = _product("bhnd,bhmd->bhnm", d_out, v)
    shared = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    d_logits = scale * weights * (d_weights - shared)
    d_q = _product("bhnm,bhdm->bhnd", d_logits, k)
    d_k = _product("bhnd,bhnm->bhdm", q, d_logits)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _logits(scale, q, k, mask):
    logits = scale * _product("bhnd,bhdm->bhnm", q, k)
    return logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min)


def _product(axes, a, b):
    """einsum in the narrower type of the two, summed in float32."""
    dtype = min(a.dtype, b.dtype, key=lambda d: d.itemsize)
    return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
