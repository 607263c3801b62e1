"""From encoded bytes, or an array, to a square RGB image; what cannot be read is a `CorruptExampleError`."""

import io

import numpy as np
from jaxtyping import UInt8

from repkit.checks import InputError

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise InputError('reading images needs Pillow: pip install "repkit[data]"') from error

MOST_PIXELS = 64 * 2**20
"""An image that claims more is refused before it is decoded: a few bytes can claim terabytes."""


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. Pillow knows more, and starts another program for some of it."""


class CorruptExampleError(ValueError):
    """One example of a data set cannot be used; the pipeline counts it and goes on."""


def load_image(source: bytes | np.ndarray, *, image_size: int) -> UInt8[np.ndarray, "s s 3"]:
    """An image as RGB, scaled to `image_size` along its shorter side and cropped at the centre.

    Args:
        source: an encoded image (PNG, JPEG, ...), or uint8 [h w], [h w 1] or [h w 3]. A rotation noted in the file's
            EXIF data is applied.
        image_size: edge length in pixels. An image that already has it is not resampled.

    Returns:
        uint8 [image_size image_size 3].

    Raises:
        CorruptExampleError: `source` is no image, is damaged, or has more than `MOST_PIXELS`.

    Example:
        >>> load_image(np.zeros((20, 30), np.uint8), image_size=16).shape
        (16, 16, 3)
    """
    image = _from_array(source) if isinstance(source, np.ndarray) else _from_bytes(source, image_size)
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or 0 in pixels.shape:
        raise CorruptExampleError(f"expected an image uint8 [h w 3], got {pixels.dtype} {list(pixels.shape)}")
    return Image.fromarray(pixels).convert("RGB")


def _from_bytes(encoded: bytes, image_size: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise CorruptExampleError(f"{width} x {height} pixels are more than {MOST_PIXELS}")
            # Lets the JPEG decoder skip detail that the scaling would throw away.
            image.draft("RGB", (image_size, image_size))
            return ImageOps.exif_transpose(image).convert("RGB")
    except CorruptExampleError:
        raise
    except UnidentifiedImageError as error:
        raise CorruptExampleError(f"not a readable image: its format is none of {', '.join(FORMATS)}") from error
    # Damaged files make decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
    except Exception as error:
        raise CorruptExampleError(f"not a readable image: {type(error).__name__}: {error}") from error
