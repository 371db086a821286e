"""The arrays by name. B batch, H W pixels, h w latent cells, C channels, N tokens."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

Image = Float[Array, "B H W 3"]  # [-1, 1]
Depth = Float[Array, "B H W 1"]  # metres, or the normalised target in [-1, 1]: the name says which
Mask = Bool[Array, "B H W 1"]  # True where the depth is known
Latent = Float[Array, "B h w C"]
Prompt = Float[Array, "1 N D"]  # text embedding of the empty prompt, shared by the batch
PerImage = Float[Array, " B"]
Flags = Bool[Array, " B"]

Params = Mapping[str, Any]  # nested dict of arrays, paths mirror torch's names
Batch = Mapping[str, jax.Array]
