"""Changes of shape that turn one model's weights into another's."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp


def widen_conv_in(
    unet_params: Mapping[str, Any], *, bias: Literal["keep", "halve"]
) -> dict[str, Any]:
    """Doubles conv_in's input channels: W8 = concat(W4, W4) / 2 (METHOD 1).

    On a doubled input the widened layer gives what the old one gave. The bias is kept (Marigold,
    Ke et al. 2024) or halved (E2E-FT, Garcia et al. 2025). Returns a new tree; other leaves are
    shared.
    """
    if bias not in ("keep", "halve"):
        raise ValueError(f"bias = {bias!r}; choose 'keep' (Marigold) or 'halve' (E2E-FT)")
    conv_in = unet_params["conv_in"]
    kernel = jnp.asarray(conv_in["kernel"])  # [3, 3, in, out]
    widened = {
        "kernel": jnp.concatenate([kernel, kernel], axis=2) / 2,
        "bias": conv_in["bias"] if bias == "keep" else conv_in["bias"] / 2,
    }
    return {**unet_params, "conv_in": widened}
