"""CLIP's text encoder (transformers' CLIPTextModel) in Linen, for the embedding of the prompt.

Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021).
Submodule names are torch's, with the prefix `text_model.` of the published files.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from d3epth_jax.models import layers
from d3epth_jax.models.config import TextEncoderConfig

CAUSAL = True  # a token attends to itself and to those before it


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU, SD 1.x's; SD 2.x has the exact one."""
    return x * nn.sigmoid(1.702 * x)


class TextEncoder(nn.Module):
    """Token ids int [B, N] -> last hidden state after the final norm, float32 [B, N, D]."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        return _TextModel(self.config, name="text_model")(ids)


class _TextModel(nn.Module):
    config: TextEncoderConfig

    @nn.compact
    def __call__(self, ids):
        x = _Embeddings(self.config, name="embeddings")(ids)
        x = _Encoder(self.config, name="encoder")(x)
        return _norm(self.config, "final_layer_norm")(x)


class _Embeddings(nn.Module):
    config: TextEncoderConfig

    @nn.compact
    def __call__(self, ids):
        c = self.config
        if ids.shape[1] > c.max_position_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens, at most {c.max_position_embeddings} fit")
        tokens = nn.Embed(c.vocab_size, c.hidden_size, name="token_embedding")(ids)
        places = nn.Embed(c.max_position_embeddings, c.hidden_size, name="position_embedding")
        return tokens + places(jnp.arange(ids.shape[1]))[None]


class _Encoder(nn.Module):
    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, name=f"layers_{i}")(x)
        return x


class _Layer(nn.Module):
    """Pre-norm self-attention and perceptron."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x):
        x += _SelfAttention(self.config, name="self_attn")(_norm(self.config, "layer_norm1")(x))
        return x + _Perceptron(self.config, name="mlp")(_norm(self.config, "layer_norm2")(x))


class _SelfAttention(nn.Module):
    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x):
        batch, tokens, channels = x.shape
        heads = self.config.num_attention_heads
        q, k, v = (
            layers.dense(f"{name}_proj", channels, None)(x).reshape(batch, tokens, heads, -1)
            for name in "qkv"
        )
        mask = jnp.tril(jnp.ones((tokens, tokens), bool)) if CAUSAL else None
        h = layers.attention(q, k, v, mask=mask).reshape(batch, tokens, channels)
        return layers.dense("out_proj", channels, None)(h)


class _Perceptron(nn.Module):
    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x):
        activation = quick_gelu if self.config.hidden_act == "quick_gelu" else layers.gelu
        h = activation(layers.dense("fc1", self.config.intermediate_size, None)(x))
        return layers.dense("fc2", x.shape[-1], None)(h)


def _norm(config: TextEncoderConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name=name)
