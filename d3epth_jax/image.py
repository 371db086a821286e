"""Pictures in and out: load, resize, pad, colour maps, 16-bit PNG (NumPy and Pillow, no JAX).

Arrays are [..., H, W, C]; leading axes are a batch.
"""

import contextlib
import math
import struct
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from d3epth_jax import atomic

# Anchor colours, spread evenly over [0, 1] and interpolated linearly in sRGB. Source: ColorBrewer
# (Brewer and Harrower), schemes Spectral (11 classes) and OrRd (9 classes).
COLOR_MAPS = {
    "Spectral": "9e0142 d53e4f f46d43 fdae61 fee08b ffffbf e6f598 abdda4 66c2a5 3288bd 5e4fa2",
    "OrRd": "fff7ec fee8c8 fdd49e fdbb84 fc8d59 ef6548 d7301f b30000 7f0000",
    "gray": "000000 ffffff",
}
SOFTWARE = "d3epth_jax"  # what PNG files say of who wrote them
NEUTRAL = (128, 128, 128)  # no depth here; in none of the colour scales
# What Pillow raises for a damaged file. RuntimeError is AVIF's; the second line is what comes of
# tags with values of a wrong type or length.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError),
    *(struct.error, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
)
# What makes a picture upright, by its EXIF orientation. A table, for ImageOps.exif_transpose also
# writes the EXIF anew, which fails where any tag is damaged.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
COUNTS_12_BITS = 4096


class ImageError(ValueError):
    """A file that cannot be read as a picture; the message names it."""


def load(path) -> np.ndarray:
    """Read a picture as uint8 [H, W, 3] sRGB: `from_pil` of a file, the first one if it is a film.

    Raises FileNotFoundError, or ImageError (not a picture, truncated, too large to be honest,
    of an unknown range as `from_pil` says).
    """
    with _named(path), Image.open(path) as picture:
        return from_pil(picture)


def upright_size(path) -> tuple[int, int]:
    """(H, W) that `load` would give, from the file's header alone. Raises as `load` does."""
    with _named(path), Image.open(path) as picture:
        width, height = picture.size
        turned = _orientation(picture) in (5, 6, 7, 8)
        # Pillow swaps the sides by a TIFF's own tag, and tells the orientation none the less.
        swapped = ExifTags.Base.Orientation in getattr(picture, "tag_v2", ())
        return (width, height) if turned and not swapped else (height, width)


def from_pil(picture: Image.Image) -> np.ndarray:
    """A picture of any Pillow mode as uint8 [H, W, 3] sRGB, upright by its EXIF orientation.

    Alpha is dropped, not blended; grey, palette and CMYK are converted. 16-bit grey is divided by
    65535 and rounded to 8 bits; 16-bit RGB is cut to its upper byte by Pillow. Damage in the EXIF
    is passed over. Raises ImageError for damaged or truncated data, and where the range of the
    values is unknown, which would give a black picture: float, 32-bit or signed integers, and
    16 bits of which only 12 are used.
    """
    whole_range = picture.format == "PPM"  # of mode I too: Pillow has scaled it to 16 bits
    has_16_bits = any(";16" in str(tile) for tile in getattr(picture, "tile", ()))
    try:
        picture.load()
        turn = TURNS.get(_orientation(picture))
        picture = picture.copy() if turn is None else picture.transpose(turn)
    except DAMAGE as error:
        raise ImageError(f"damaged or truncated picture: {error}") from error
    if picture.mode == "F":
        raise ImageError("float picture, whose range is unknown; save it with 8 or 16 bits")
    if picture.mode == "I" and not whole_range:
        raise ImageError(
            "picture of 32-bit or signed integers, whose range is unknown; save it with 8 or 16 "
            "unsigned bits"
        )
    if picture.mode.startswith("I"):
        return _grey_of_16_bits(np.asarray(picture))
    if picture.mode == "La":  # grey times its alpha, which Pillow only takes back to LA
        picture = picture.convert("LA")
    picture.info.pop("transparency", None)  # a copy's; Pillow would warn that it is lost
    rgb = np.array(picture.convert("RGB"))
    if has_16_bits:
        require_16_bits(256 * int(rgb.max(initial=0)) + 255)
    return rgb


def require_16_bits(highest: int) -> None:
    """ImageError where the largest of 16-bit values says that they are of 12 bits or fewer."""
    if 0 < highest < COUNTS_12_BITS:
        raise ImageError(
            f"16-bit picture that is nearly black: no value is above {highest} of 65535. "
            "If it holds 12 bits or fewer, scale it to 0..65535 or save it with 8 bits"
        )


def _orientation(picture: Image.Image) -> int:
    """EXIF's 1 to 8; 1, upright, where it is missing or cannot be read."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if value in TURNS else 1
    except DAMAGE:
        return 1


def _grey_of_16_bits(values: np.ndarray) -> np.ndarray:
    """Counts 0..65535 [H, W] as uint8 [H, W, 3]. All black is black whatever the range."""
    require_16_bits(values.max(initial=0))
    grey = np.rint(values * (255 / 65535)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


@contextlib.contextmanager
def _named(path):
    """Turns what Pillow says of a file into an ImageError that names it."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: refused as a decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        apples = str(path).lower().endswith((".heic", ".heif"))
        hint = " (HEIC is not read: save it as JPEG)" if apples else ""
        raise ImageError(f"{path}: not a picture that Pillow can identify{hint}") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except DAMAGE as error:
        raise ImageError(f"{path}: damaged or truncated picture: {error}") from error


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 [-1, 1], the range of the encoders."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def processing_size(
    height: int, width: int, resolution: int, aspect: float | None = None
) -> tuple[int, int]:
    """Size with the longest side at `resolution` (METHOD 1); 0 keeps the native size.

    The other side is floor(side * resolution / longest); ValueError if that is 0. `aspect`: of all
    pictures width over height, whatever theirs.
    """
    if resolution < 0:
        raise ValueError(f"processing resolution must not be negative, got {resolution}")
    if min(height, width) < 1:
        raise ValueError(f"picture of {height}x{width} pixels has no content")
    if resolution == 0:
        return height, width
    if aspect is not None:
        size = round(resolution * min(1, 1 / aspect)), round(resolution * min(1, aspect))
    else:
        longest = max(height, width)
        size = height * resolution // longest, width * resolution // longest
    if 0 in size:
        raise ValueError(
            f"picture of {height}x{width} pixels shrinks to {size[0]}x{size[1]} at processing "
            f"resolution {resolution}; use a larger resolution or 0 (native)"
        )
    return size


def _linear_taps(length: int, new_length: int, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the weight matrix of linear interpolation: pixels and their weights [new_length, K].

    A triangle around each output's centre (half-pixel centres), widened by the scale when shrinking
    with antialias. Rows are normalised, which at the border equals repeating the last pixel.
    """
    scale = length / new_length
    radius = max(scale, 1.0) if antialias else 1.0
    centers = (np.arange(new_length)[:, None] + 0.5) * scale
    first = np.floor(centers - radius + 0.5).astype(np.int64)
    pixels = first + np.arange(math.ceil(2 * radius) + 1)
    weights = np.maximum(1 - np.abs(pixels + 0.5 - centers) / radius, 0)
    weights *= (pixels >= 0) & (pixels < length)
    used = weights.any(axis=0)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return pixels[:, used].clip(0, length - 1), weights[:, used]


def resize(array: np.ndarray, size: tuple[int, int], *, antialias: bool) -> np.ndarray:
    """Bilinear resize of finite [..., H, W, C] to [..., h, w, C] in floating point.

    Equals torch.nn.functional.interpolate(mode="bilinear", align_corners=False, antialias=...).
    Integers become float32; nothing is rounded.
    """
    array = np.asarray(array, dtype=np.result_type(array, np.float32))
    for axis, new_length in ((-3, size[0]), (-2, size[1])):
        if array.shape[axis] != new_length:
            pixels, weights = _linear_taps(array.shape[axis], new_length, antialias)
            weights = weights.astype(array.dtype).reshape(new_length, -1, *[1] * (-axis - 1))
            # A sum over few taps: the dense matrix product costs 50 times more, and its threads
            # get in the way of the loader's.
            array = sum(
                array.take(pixels[:, tap], axis) * weights[:, tap] for tap in range(pixels.shape[1])
            )
    return array


def resize_nearest_exact(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest resize of [..., H, W, C] with half-pixel centres, for depth and masks; any dtype.

    Equals torch.nn.functional.interpolate(mode="nearest-exact").
    """
    rows, columns = (
        # In float32 throughout, as torch: exact ties would fall on the other side in float64.
        np.floor((np.arange(new, dtype=np.float32) + 0.5) * (np.float32(old) / np.float32(new)))
        .astype(np.int64)
        .clip(max=old - 1)
        for old, new in zip(array.shape[-3:-1], size, strict=True)
    )
    return array[..., rows[:, None], columns, :]


def pad_to_multiple(array: np.ndarray, multiple: int = 8) -> tuple[np.ndarray, tuple[int, int]]:
    """Repeat last row and column of [..., H, W, C] to a multiple; also returns the old (H, W).

    What needs no padding is returned itself.
    """
    height, width = array.shape[-3:-1]
    padding = [(0, 0)] * (array.ndim - 3) + [
        (0, -height % multiple),
        (0, -width % multiple),
        (0, 0),
    ]
    padded = np.pad(array, padding, mode="edge") if np.any(padding) else array
    return padded, (height, width)


def _depth_values(prediction: np.ndarray, val_min: float, val_max: float) -> np.ndarray:
    """All values of depth maps [..., H, W, 1] in a row; ValueError for other arrays or ranges."""
    prediction = np.asarray(prediction)
    if prediction.ndim < 3 or prediction.shape[-1] != 1:
        raise ValueError(f"expected a depth map [..., H, W, 1], got shape {prediction.shape}")
    if not val_max > val_min:
        raise ValueError(f"val_max must exceed val_min, got {val_min} and {val_max}")
    return prediction.reshape(-1)


def _blocks(size: int, length: int = 2**20) -> Iterator[slice]:
    """Of a picture of 48 megapixels float64 and its copies would take gigabytes at once."""
    return (slice(first, first + length) for first in range(0, size, length))


def _unit_range(values: np.ndarray, val_min: float, val_max: float) -> np.ndarray:
    """val_min..val_max mapped to 0..1 and clipped, in float64; NaN stays."""
    return np.clip((values.astype(np.float64) - val_min) / (val_max - val_min), 0, 1)


def visualize_depth(
    prediction: np.ndarray,
    *,
    color_map: str = "Spectral",
    val_min: float = 0.0,
    val_max: float = 1.0,
) -> np.ndarray:
    """Depth [..., H, W, 1] as colours, uint8 [..., H, W, 3]: val_min to val_max, NaN in grey.

    Argument names are those of diffusers' MarigoldImageProcessor.visualize_depth.
    """
    if color_map not in COLOR_MAPS:
        raise ValueError(f"no colour map {color_map!r}; there are {', '.join(COLOR_MAPS)}")
    values = _depth_values(prediction, val_min, val_max)
    anchors = np.array([list(bytes.fromhex(color)) for color in COLOR_MAPS[color_map].split()])
    positions = np.linspace(0, 1, len(anchors))
    colors = np.empty((values.size, 3), np.uint8)
    for block in _blocks(values.size):
        part = _unit_range(values[block], val_min, val_max)
        for channel, neutral in enumerate(np.broadcast_to(NEUTRAL, 3)):
            color = np.interp(part, positions, anchors[:, channel])
            colors[block, channel] = np.where(np.isnan(part), neutral, np.rint(color))
    return colors.reshape(*np.shape(prediction)[:-1], 3)


def export_depth_to_16bit_png(
    prediction: np.ndarray, *, val_min: float = 0.0, val_max: float = 1.0
) -> np.ndarray:
    """Depth [..., H, W, 1] as uint16 [..., H, W] for `save_png`: val_min..val_max to 0..65535.

    diffusers' convention, but rounded and clipped (it truncates, and wraps outside). NaN becomes 0.
    """
    values = _depth_values(prediction, val_min, val_max)
    depth = np.empty(values.size, np.uint16)
    for block in _blocks(values.size):
        part = np.nan_to_num(_unit_range(values[block], val_min, val_max), nan=0.0)
        depth[block] = np.rint(part * 65535)
    return depth.reshape(np.shape(prediction)[:-1])


def save_png(path, array: np.ndarray, about: str = "") -> None:
    """Write uint8 [H, W, 3], uint8 [H, W] or uint16 [H, W] as PNG; folders are made as needed.

    Atomic (`atomic.replacing`): never half a file. It says that it is ours (`is_ours`), and what it
    is `about`.
    """
    array = np.asarray(array)
    color = array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3
    if not color and not (array.dtype in (np.uint8, np.uint16) and array.ndim == 2):
        raise ValueError(
            f"{path}: a PNG takes uint8 [H, W, 3], uint8 [H, W] or uint16 [H, W]; "
            f"got {array.dtype} {list(array.shape)}"
        )
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Software", SOFTWARE)
    if about:
        texts.add_itxt("Description", about.encode("utf-8", "replace").decode())
    with atomic.replacing(path) as partial:
        # Pillow 13: a mode with uint16 fails.
        Image.fromarray(array).save(partial, format="PNG", pnginfo=texts)


def is_ours(path) -> bool:
    """Whether a file is a PNG that `save_png` wrote."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
