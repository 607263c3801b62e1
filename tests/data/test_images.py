import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from repkit.data.images import MOST_PIXELS, CorruptExampleError, load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, **options) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, **{"format": "png", **options})
    return encoded.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("source", [PIXELS, encode(PIXELS)], ids=["array", "png"])
def test_image_of_the_right_size_is_unchanged(source):
    np.testing.assert_array_equal(load_image(source, image_size=16), PIXELS)


def test_grey_and_transparent_images_become_rgb():
    grey = load_image(PIXELS[..., 0], image_size=16)
    np.testing.assert_array_equal(grey, np.repeat(PIXELS[..., :1], 3, axis=-1))
    np.testing.assert_array_equal(load_image(PIXELS[..., :1], image_size=16), grey)
    with_alpha = np.concatenate([PIXELS, np.full((16, 16, 1), 255, np.uint8)], axis=-1)
    np.testing.assert_array_equal(load_image(encode(with_alpha), image_size=16), PIXELS)


def test_wide_image_is_scaled_and_cropped_at_the_centre():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    np.testing.assert_array_equal(load_image(encode(wide), image_size=10)[:, 1:-1], 255)


def test_rotation_noted_in_the_file_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to show"
    np.testing.assert_array_equal(load_image(encode(PIXELS, exif=exif), image_size=16), np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "not a readable image"),
        (b"hello", "not a readable image"),
        (encode(PIXELS)[:200], "not a readable image"),
        (encode(PIXELS)[:60] + b"\0\0\0\0" + encode(PIXELS)[64:], "not a readable image"),
        (png_that_claims(9000, 9000), f"9000 x 9000 pixels are more than {MOST_PIXELS}"),
        (png_that_claims(100_000, 100_000), "not a readable image"),
        (png_that_claims(0, 16), "not a readable image"),
        (np.zeros((16, 16, 3), np.float32), "got float32"),
        (np.zeros((16, 16, 5), np.uint8), r"got uint8 \[16, 16, 5\]"),
        (np.zeros((0, 16, 3), np.uint8), r"got uint8 \[0, 16, 3\]"),
    ],
    ids=["empty", "text", "truncated", "damaged", "large", "huge", "no height", "floats", "channels", "no pixels"],
)
def test_what_is_no_image_is_a_corrupt_example(source, message):
    with pytest.raises(CorruptExampleError, match=message):
        load_image(source, image_size=16)
