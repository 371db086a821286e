"""The arrays by name, and checks that some are what the name says.

B batch, H W pixels, h w latent cells, C channels.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

Image = Float[Array, "B H W 3"]  # [-1, 1]
Depth = Float[Array, "B H W 1"]  # metres, or the normalised target in [-1, 1]: the name says which
Mask = Bool[Array, "B H W 1"]  # True where the depth is known
Latent = Float[Array, "B h w C"]
PerImage = Float[Array, " B"]
Flags = Bool[Array, " B"]

Params = Mapping[str, Any]  # nested dict of arrays, paths mirror torch's names
Batch = Mapping[str, jax.Array]


def check_maps(pred, target, mask) -> None:
    """Raises ValueError unless all are of one shape [B,H,W,1], and the mask is boolean.

    Arrays of other shapes would broadcast, and a mask of numbers would weigh: wrong in silence.
    """
    shapes = [tuple(array.shape) for array in (pred, target, mask)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4 or shapes[0][-1] != 1:
        told = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"prediction, depth and mask must be of one shape [B,H,W,1], not {told}")
    check_mask(mask)


def check_mask(mask) -> None:
    """Raises ValueError unless the mask is boolean."""
    if mask.dtype != bool:
        raise ValueError(f"a mask is boolean, True where depth is known, not {mask.dtype}")
