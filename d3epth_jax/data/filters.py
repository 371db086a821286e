"""Which samples are worth training on (METHOD 9)."""

import numpy as np

NO_FILTER = {"min_range": 0, "min_contrast": 0, "max_invalid": 1}  # `rejection`'s defaults


def rejection(
    sample: dict[str, np.ndarray],
    *,
    min_range: float = 0.0,
    min_contrast: int = 0,
    max_invalid: float = 1.0,
) -> str:
    """Why a sample is left out, "" if it is not. The defaults leave none out.

    Args:
      min_range: metres between its nearest and farthest known pixel, at least.
      min_contrast: counts (of 255) between the picture's darkest and brightest value, at least.
      max_invalid: share of pixels without depth, at most.
    """
    known = sample["depth"][sample["mask"]]
    depth_range = float(known.max()) - float(known.min()) if known.size else 0.0
    contrast = int(sample["image"].max()) - int(sample["image"].min())
    invalid = 1 - known.size / sample["mask"].size
    if invalid > max_invalid:
        return f"{100 * invalid:.3g} % of its pixels have no depth (max_invalid {max_invalid:g})"
    if depth_range < min_range:
        return f"depth spans {depth_range:.3g} m (min_range {min_range:g})"
    if contrast < min_contrast:
        return f"the picture spans {contrast} of 255 counts (min_contrast {min_contrast:g})"
    return ""
