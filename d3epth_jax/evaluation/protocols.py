"""Evaluation protocols of the public benchmarks (METHOD 10): what counts, and how it is aligned.

Ranges, crops and sizes are those of Marigold's evaluation (Ke et al., CVPR 2024), whose numbers
other papers compare with; each row says where another one is from.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from d3epth_jax.metrics import ALIGNMENTS


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How predictions are scored; depths in metres.

    Attributes:
      name: of the protocol, with whatever was changed in it.
      split: the published set of images, in words; "" if any set is meant.
      num_images: of that set; 0 if any number is meant.
      min_depth, max_depth: a pixel is valid if its mask is set and min < depth < max.
      clip: range that aligned predictions are clipped to; None the valid range.
      crop: a key of CROPS; pixels outside do not count. "" for none.
      processing_resolution: longest side that models see; 0 the picture's, -1 the model's default.
      fit_resolution: the alignment is fitted on a nearest subsampling of at most this longest side;
        0 on all pixels.
      alignment: the space of the fit, or "none" for predictions that are metric already; "" the
        predictor's own.

    Raises ValueError with everything that makes no sense.
    """

    name: str = "default"
    split: str = ""
    num_images: int = 0
    min_depth: float = 1e-3
    max_depth: float = 80.0
    clip: tuple[float, float] | None = None
    crop: str = ""
    processing_resolution: int = 0
    fit_resolution: int = 0
    alignment: str = ""

    def __post_init__(self):
        problems = []
        for name in ("crop", "alignment"):
            known = {"crop": ("", *CROPS), "alignment": ("", *ALIGNMENTS)}[name]
            if (value := getattr(self, name)) not in known:
                problems.append(f"unknown {name} {value!r}: choose one of {list(known)}")
        for name, range_ in (("min_depth, max_depth", self.valid_range), ("clip", self.clip_range)):
            numbers = all(isinstance(value, int | float) for value in range_)
            if len(range_) != 2 or not numbers or not 0 <= range_[0] < range_[1]:
                problems.append(f"{name} = {range_} is no range of metres: 0 <= low < high")
        for name, least in (("processing_resolution", -1), ("fit_resolution", 0)):
            if getattr(self, name) < least:
                problems.append(f"{name} = {getattr(self, name)} is below {least}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def valid_range(self) -> tuple[float, float]:
        return self.min_depth, self.max_depth

    @property
    def clip_range(self) -> tuple[float, float]:
        return self.valid_range if self.clip is None else tuple(self.clip)

    def valid(self, depth: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The pixels of a ground truth [H,W,1] that count, bool [H,W,1]."""
        counted = mask & (depth > self.min_depth) & (depth < self.max_depth)
        if self.crop:
            rows, columns = CROPS[self.crop](*depth.shape[:2])
            inside = np.zeros_like(counted)
            inside[rows, columns] = True
            counted &= inside
        return counted

    def describe(self) -> list[str]:
        """The parts that hold for every prediction, a line each."""
        valid = "valid pixels: the set's own mask"
        if self.valid_range != (0, math.inf):
            low, high = (f"{limit:g}" for limit in self.valid_range)
            valid += f" and d > {low} m" if high == "inf" else f" and {low} < d < {high} m"
        if self.crop:
            valid += f", inside the crop {self.crop} ({CROPS[self.crop].__doc__})"
        low, high = self.clip_range
        fit = "no alignment"
        if self.alignment != "none":
            where = "all valid pixels"
            if self.fit_resolution:
                where = f"valid pixels of a nearest subsampling to {self.fit_resolution} px"
            fit = f"alignment: least squares, scale and shift per image, over {where}"
        if math.isinf(high):
            clipped = f"raised to at least {max(low, 1e-6):g} m"
        else:
            clipped = f"clipped to {max(low, 1e-6):g} .. {high:g} m"
        return [valid, f"{fit}; then {clipped}"]


def _nyu_eigen(height: int, width: int) -> tuple[slice, slice]:
    """rows 45:471, columns 41:601 of 480x640"""
    if (height, width) != (480, 640):
        raise ValueError(f"the crop nyu_eigen is of 480x640 pixels, not of {height}x{width}")
    return slice(45, 471), slice(41, 601)


def _kitti_eigen(height: int, width: int) -> tuple[slice, slice]:
    """rows .3324324 to .91351351 of the height, columns .0359477 to .96405229 of the width"""
    return (
        slice(int(0.3324324 * height), int(0.91351351 * height)),
        slice(int(0.0359477 * width), int(0.96405229 * width)),
    )


def _kitti_garg(height: int, width: int) -> tuple[slice, slice]:
    """rows .40810811 to .99189189 of the height, columns .03594771 to .96405229 of the width"""
    return (
        slice(int(0.40810811 * height), int(0.99189189 * height)),
        slice(int(0.03594771 * width), int(0.96405229 * width)),
    )


# (H, W) -> rows and columns that count (Eigen et al., NeurIPS 2014; Garg et al., ECCV 2016).
# KITTI's are applied after the benchmark crop, which the source "kitti" makes.
CROPS: dict[str, Callable[[int, int], tuple[slice, slice]]] = {
    "nyu_eigen": _nyu_eigen,
    "kitti_eigen": _kitti_eigen,
    "kitti_garg": _kitti_garg,
}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("default"),
        Protocol("nyu", "NYU Depth V2 test", 654, 1e-3, 10.0, crop="nyu_eigen"),
        Protocol("kitti", "KITTI Eigen test", 652, 1e-5, 80.0, crop="kitti_eigen"),
        Protocol(
            "eth3d",
            "ETH3D",
            454,
            1e-5,
            math.inf,
            processing_resolution=756,
            fit_resolution=1024,
        ),
        Protocol("scannet", "ScanNet validation", 800, 1e-3, 10.0),
        # The mask files decide alone which pixels count; the range only clips.
        Protocol(
            "diode", "DIODE validation", 771, 0.0, math.inf, (0.6, 350.0), processing_resolution=640
        ),
        # iBims-1's PNGs hold 0 to 50 m (Koch et al., 2018); ZoeDepth evaluates it to 10 m.
        Protocol("ibims", "iBims-1", 100, 1e-3, 50.0),
        # Marigold's range in training and validation.
        Protocol("hypersim", "Hypersim validation", 0, 1e-5, 65.0),
    )
}


def make_protocol(name: str, **changes) -> Protocol:
    """The protocol of a name, with single values replaced; None keeps the protocol's own.

    Raises ValueError for an unknown name or a value that makes no sense.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: choose one of {list(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    changes = {
        key: value
        for key, value in changes.items()
        if value is not None and value != getattr(protocol, key)
    }
    if not changes:
        return protocol
    told = ", ".join(f"{key}={value!r}" for key, value in changes.items())
    return dataclasses.replace(protocol, name=f"{name} with {told}", **changes)
