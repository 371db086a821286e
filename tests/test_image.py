import io
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor
from PIL import Image, ImageOps

from d3epth_jax import image

SIZES = [((7, 11), (7, 11)), ((37, 53), (16, 24)), ((12, 9), (40, 31)), ((30, 20), (13, 45))]


def torch_resize(array, size, **options):
    tensor = torch.from_numpy(np.moveaxis(array, -1, -3))[None]
    return np.moveaxis(F.interpolate(tensor, size=size, **options)[0].numpy(), -3, -1)


@pytest.mark.parametrize("old, new", SIZES)
@pytest.mark.parametrize("antialias", [False, True])
# torch computes its float32 coordinates in float32, 1e-5 off where they are large.
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-13), (np.float32, 3e-5)])
def test_resize_equals_torch(old, new, antialias, dtype, tolerance):
    array = np.random.default_rng(0).normal(size=(*old, 3)).astype(dtype)
    expected = torch_resize(array, new, mode="bilinear", align_corners=False, antialias=antialias)
    result = image.resize(array, new, antialias=antialias)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


def test_resize_takes_a_batch_and_keeps_its_precision():
    array = np.random.default_rng(0).normal(size=(2, 5, 6, 1))
    result = image.resize(array, (9, 4), antialias=True)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result[1], image.resize(array[1], (9, 4), antialias=True))


def test_resize_of_integers_is_not_rounded():
    array = np.array([0, 1], np.uint8).reshape(1, 2, 1)
    result = image.resize(array, (1, 4), antialias=False)
    np.testing.assert_allclose(result.ravel(), [0, 0.25, 0.75, 1])


def test_nearest_exact_equals_torch_at_ties_too():
    for old in (1, 2, 15, 96, 198, 370, 480, 1224):
        array = np.arange(old, dtype=np.float32)[:, None, None]
        for new in (1, 3, 8, 91, 96, 118, 200, 353, 480):
            expected = torch_resize(array, (new, 1), mode="nearest-exact")
            np.testing.assert_array_equal(image.resize_nearest_exact(array, (new, 1)), expected)
    array = np.random.default_rng(0).normal(size=(10, 14, 2)).astype(np.float32)
    expected = torch_resize(array, (7, 23), mode="nearest-exact")
    np.testing.assert_array_equal(image.resize_nearest_exact(array, (7, 23)), expected)
    assert image.resize_nearest_exact(array > 0, (7, 23)).dtype == bool


def test_processing_size():
    assert image.processing_size(480, 640, 768) == (576, 768)
    assert image.processing_size(370, 1224, 768) == (232, 768)  # 232.16: floor
    assert image.processing_size(1000, 999, 768) == (768, 767)
    assert image.processing_size(33, 45, 0) == (33, 45)
    for size in ((480, 640), (370, 1224), (1003, 7), (96, 128)):
        assert image.processing_size(*size, 128, 4 / 3) == (96, 128)
        assert image.processing_size(*size, 128, 0.5) == (128, 64)
        assert image.processing_size(*size, 0, 4 / 3) == size
    with pytest.raises(ValueError, match="4x2000 pixels shrinks to 0x100"):
        image.processing_size(4, 2000, 100)
    with pytest.raises(ValueError, match="negative"):
        image.processing_size(4, 4, -1)


def test_pad_to_multiple_repeats_the_border():
    array = np.random.default_rng(0).normal(size=(2, 5, 9, 3))
    padded, size = image.pad_to_multiple(array, 8)
    assert padded.shape == (2, 8, 16, 3) and size == (5, 9)
    np.testing.assert_array_equal(padded[:, :5, :9], array)
    np.testing.assert_array_equal(padded[:, 7, 15], array[:, 4, 8])
    assert image.pad_to_multiple(padded, 8)[0].shape == padded.shape


def test_to_float():
    result = image.to_float(np.array([0, 255], np.uint8))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, [-1, 1])


def test_load_turns_upright_and_drops_alpha(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(image.load(tmp_path / "a.png"), np.rot90(pixels, -1)[..., :3])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16"])
def test_every_orientation_is_turned_as_pillow_turns_it(mode):
    grey = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    grey[0, 0] = 255
    picture = Image.fromarray(grey * np.uint16(257) if mode == "I;16" else grey)
    picture = picture if mode == "I;16" else picture.convert(mode)
    expected = {}
    for orientation in range(1, 9):
        picture.getexif()[0x0112] = orientation
        expected[orientation] = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        if mode == "I;16":  # whose conversion by Pillow cuts
            upright = np.asarray(ImageOps.exif_transpose(picture)) // 257
            expected[orientation] = np.repeat(upright[..., None], 3, axis=-1)
        np.testing.assert_array_equal(image.from_pil(picture), expected[orientation])
    assert len({turned.tobytes() for turned in expected.values()}) == 8


def damaged_exif() -> bytes:
    """Orientation 6, a resolution that is text and a name of software that is a fraction.

    ImageOps.exif_transpose of Pillow 13.0 fails on it.
    """
    rows = (
        struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
        + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")
        + struct.pack("<HHII", 0x0131, 5, 1, 50)
    )
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + rows + struct.pack("<III", 0, 72, 1)


def test_a_picture_with_damaged_exif_is_read_and_turned(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=damaged_exif(), quality=100)
    assert image.upright_size(tmp_path / "a.jpg") == (32, 16)
    np.testing.assert_allclose(image.load(tmp_path / "a.jpg"), np.rot90(pixels, -1), atol=2)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_no_damage_of_the_exif_costs_the_picture(tmp_path, suffix):
    path, exif = tmp_path / f"a.{suffix}", damaged_exif()
    Image.new("RGB", (6, 4), (9, 99, 199)).save(path, exif=exif)
    intact, sizes = path.read_bytes(), set()
    start, rng = intact.index(exif[6:]), np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(intact)
        for place in rng.integers(0, len(exif) - 6, rng.integers(1, 5)):
            data[start + place] = rng.integers(256)
        path.write_bytes(data)
        size = image.load(path).shape[:2]
        assert image.upright_size(path) == size
        sizes.add(size)
    assert sizes == {(6, 4), (4, 6)}  # upright where the orientation was hit


def test_from_pil_leaves_the_picture_that_it_is_given_as_it_is():
    picture = Image.new("P", (3, 2))
    picture.info["transparency"] = 0
    image.from_pil(picture)
    assert picture.info == {"transparency": 0} and picture.mode == "P"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGB", "YCbCr"])
def test_load_converts_modes(tmp_path, mode):
    picture = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    picture.save(tmp_path / "a.tif") if mode != "LA" else picture.save(tmp_path / "a.png")
    result = image.load(next(tmp_path.iterdir()))
    np.testing.assert_array_equal(result, np.full((2, 3, 3), 255, np.uint8))


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "RGBX", "HSV", "I;16", "I;16B"])
def test_from_pil_takes_modes_that_files_hardly_have(mode):
    result = image.from_pil(Image.new(mode, (3, 2)))
    assert result.shape == (2, 3, 3) and result.dtype == np.uint8


def test_load_takes_the_colours_under_a_transparent_palette(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    colors = [[10, 20, 30], [200, 0, 0], [0, 90, 7]]
    picture.putpalette(np.ravel(colors).tolist())
    picture.save(tmp_path / "a.png", transparency=bytes([0, 128, 255]))
    expected = np.array(colors, np.uint8)[[[0, 1], [2, 1]]]
    np.testing.assert_array_equal(image.load(tmp_path / "a.png"), expected)


def test_load_takes_the_first_of_a_film(tmp_path):
    films = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    films[0].save(tmp_path / "a.gif", save_all=True, append_images=films[1:])
    np.testing.assert_array_equal(image.load(tmp_path / "a.gif")[1, 2], [255, 0, 0])


def test_load_turns_inverted_cmyk_of_jpeg_back(tmp_path):
    Image.new("RGB", (16, 16), (250, 120, 20)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()  # such files hold inverted inks
    result = image.load(tmp_path / "a.jpg")[8, 8].astype(int)
    assert np.abs(result - [250, 120, 20]).max() < 12


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "mpo"])
def test_upright_size_is_that_of_load(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (6, 4)).save(path, exif=exif)
        expected = (6, 4) if orientation > 4 else (4, 6)
        assert image.upright_size(path) == image.load(path).shape[:2] == expected


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_upright_size_of_an_orientation_in_xmp_alone(tmp_path, suffix):
    path, xmp = tmp_path / f"a.{suffix}", b'<x tiff:Orientation="6"/>'
    if suffix == "jpg":
        Image.new("RGB", (6, 4)).save(path, xmp=xmp)
    else:
        Image.new("RGB", (6, 4)).save(path, tiffinfo={700: xmp})
    assert image.upright_size(path) == image.load(path).shape[:2] == (6, 4)


def test_upright_size_names_a_bad_file(tmp_path):
    (tmp_path / "text.png").write_text("this is no picture")
    with pytest.raises(image.ImageError, match=r"text\.png: not a picture"):
        image.upright_size(tmp_path / "text.png")


def test_from_pil_reports_truncation(tmp_path):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "jpeg")
    with pytest.raises(image.ImageError, match=r"^damaged or truncated picture"):
        image.from_pil(Image.open(io.BytesIO(buffer.getvalue()[:1500])))


def test_load_divides_16_bits(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(image.load(tmp_path / "a.png")[0, :, 1], [0, 1, 128, 255])
    big_endian = Image.frombytes("I;16B", (4, 1), np.array([0, 257, 32896, 65535], ">u2").tobytes())
    np.testing.assert_array_equal(image.from_pil(big_endian)[0, :, 1], [0, 1, 128, 255])
    big_endian.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as picture:
        assert picture.mode == "I;16B"
    np.testing.assert_array_equal(image.load(tmp_path / "a.tif")[0, :, 1], [0, 1, 128, 255])


@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint32])
def test_integers_of_unknown_range_are_refused(tmp_path, dtype):
    values = np.arange(256, dtype=dtype).reshape(16, 16)
    tags = [
        *((256, 16), (257, 16), (258, 8 * values.itemsize), (262, 1), (273, 118), (277, 1)),
        *((278, 16), (279, values.nbytes), (339, 1 if dtype == np.uint32 else 2)),
    ]
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    header += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(header + bytes(118 - len(header)) + values.tobytes())
    with Image.open(tmp_path / "a.tif") as picture:
        assert picture.mode == "I"
        np.testing.assert_array_equal(np.asarray(picture), values)
    with pytest.raises(image.ImageError, match=r"a\.tif: picture of 32-bit or signed integers, wh"):
        image.load(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_12_bits_in_16_are_refused_and_not_read_as_black(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    for highest in (1, 255, 4095):
        Image.fromarray(np.array([[0, highest]], np.uint16)).save(path)
        message = rf"a\.{suffix}: 16-bit picture that is nearly black: .* {highest} of 65535"
        with pytest.raises(image.ImageError, match=message):
            image.load(path)
    for highest in (0, 4096):  # all black is so by any range
        Image.fromarray(np.array([[0, highest]], np.uint16)).save(path)
        np.testing.assert_array_equal(image.load(path)[0, :, 0], [0, round(highest / 257)])


def write_16_bits(path, pixels):
    """Colours as 16-bit PNG or TIFF, which Pillow does not write."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, photometric="rgb")
        return
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_12_bits_of_colours_in_16_are_refused_too(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    for highest in (255, 1023, 4095):
        write_16_bits(path, np.array([[[0, 0, 0], [5, highest, 7]]], np.uint16))
        with pytest.raises(
            image.ImageError, match=rf"a\.{suffix}: 16-bit picture that is nearly bl"
        ):
            image.load(path)
    write_16_bits(path, np.array([[[0, 0, 0], [257, 65535, 514]]], np.uint16))
    np.testing.assert_array_equal(image.load(path), [[[0, 0, 0], [1, 255, 2]]])


def test_a_dark_picture_of_8_bits_is_taken(tmp_path):
    Image.fromarray(np.full((2, 2, 3), 3, np.uint8)).save(tmp_path / "a.png")
    assert (image.load(tmp_path / "a.png") == 3).all()


def test_the_range_that_a_pgm_tells_is_used(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 1023 " + np.array([0, 512, 1023], ">u2").tobytes())
    np.testing.assert_array_equal(image.load(tmp_path / "a.pgm")[0, :, 0], [0, 128, 255])


def test_load_names_a_bad_file(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("png", "jpg"):
        buffer.seek(0)
        Image.fromarray(noise).save(buffer, "png" if suffix == "png" else "jpeg")
        path = tmp_path / f"half.{suffix}"
        path.write_bytes(buffer.getvalue()[:1500])
        with pytest.raises(image.ImageError, match=rf"half\.{suffix}: damaged or truncated"):
            image.load(path)
    (tmp_path / "text.png").write_text("this is no picture")
    with pytest.raises(image.ImageError, match=r"text\.png: not a picture"):
        image.load(tmp_path / "text.png")
    Image.fromarray(noise[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(image.ImageError, match=r"float\.tif: float picture"):
        image.load(tmp_path / "float.tif")
    with pytest.raises(FileNotFoundError, match="absent"):
        image.load(tmp_path / "absent.png")
    Image.fromarray(noise).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(image.ImageError, match=r"bomb\.png: refused as a decompression bomb"):
        image.load(tmp_path / "bomb.png")


def test_visualize_depth_looks_like_diffusers():
    prediction = np.linspace(0, 1, 256, dtype=np.float32).reshape(1, 16, 16, 1)
    expected = np.stack(MarigoldImageProcessor.visualize_depth(prediction, color_map="Spectral"))
    result = image.visualize_depth(prediction)
    assert result.shape == (1, 16, 16, 3) and result.dtype == np.uint8
    # diffusers samples a table; 2 of 255 levels cannot be seen.
    assert np.abs(result.astype(int) - expected.astype(int)).max() <= 2


def test_visualize_depth_range_and_unknown():
    values = np.array([-5.0, 2.0, 3.0, 4.0, 99.0, np.nan]).reshape(1, 6, 1)
    colors = image.visualize_depth(values, color_map="gray", val_min=2, val_max=4)
    np.testing.assert_array_equal(colors[0, :, 0], [0, 0, 128, 255, 255, 128])
    with pytest.raises(ValueError, match="no colour map 'jet'"):
        image.visualize_depth(values, color_map="jet")
    with pytest.raises(ValueError, match="val_max must exceed"):
        image.visualize_depth(values, val_min=1, val_max=1)
    with pytest.raises(ValueError, match=r"\[\.\.\., H, W, 1\]"):
        image.visualize_depth(np.zeros((4, 4)))


def test_16_bit_png_there_and_back(tmp_path):
    prediction = np.array([0, 0.25, 1, 1.5, np.nan], np.float32).reshape(1, 5, 1)
    exported = image.export_depth_to_16bit_png(prediction)
    np.testing.assert_array_equal(exported, np.array([[0, 16384, 65535, 65535, 0]], np.uint16))
    image.save_png(tmp_path / "new" / "depth.png", exported)
    with Image.open(tmp_path / "new" / "depth.png") as picture:
        assert picture.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(picture), exported)


def test_save_png_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    old = np.zeros((2, 2, 3), np.uint8)
    image.save_png(path, old)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        image.save_png(path, old + 1)
    np.testing.assert_array_equal(image.load(path), old)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match=r"float32 \[2, 2\]"):
        image.save_png(path, np.zeros((2, 2), np.float32))
