"""Augmentation of image-caption pairs: a second view of each modality that still shows, and says, the same.

Images are changed a batch at a time, because a numpy call costs more than the pixels of a small image. The number of
random numbers that a row takes is fixed, so a batch drawn in pieces comes out as if it were drawn at once.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from repkit.checks import InputError

IMAGE_DRAWS = 16
"""Random numbers that `augment_images` takes for each image."""

MOST_WORDS = 64
"""Words of a caption that can be replaced or dropped; later ones stay."""

TEXT_DRAWS = 3 * MOST_WORDS + 4
"""Random numbers that `augment_texts` takes for each text."""

SCENE_SYNONYMS: Mapping[str, Sequence[str]] = {
    "zero": ("0",),
    "one": ("1",),
    "two": ("2",),
    "three": ("3",),
    "four": ("4",),
    "five": ("5",),
    "six": ("6",),
    "seven": ("7",),
    "eight": ("8",),
    "nine": ("9",),
    "red": ("scarlet", "crimson"),
    "green": ("jade",),
    "blue": ("cobalt",),
    "yellow": ("golden",),
    "black": ("jet",),
    "white": ("snowy",),
    "top": ("upper",),
    "bottom": ("lower",),
    "centre": ("middle",),
    "above": ("over",),
    "below": ("under",),
}
"""Other words for those of the digit scenes' captions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageAugmentation:
    """How far an image may be changed; every default keeps what a caption says true.

    Attributes:
        crop: largest share of an edge that cropping cuts off before the rest is scaled up again, in [0, 1).
        shift: largest move along each axis, as a share of the edge; the border's pixels are repeated.
        brightness: largest change of all levels, as a share of the full range.
        contrast: largest relative change of the distance from the image's mean.
        colour: largest relative change of one channel against the others.
        erase: probability that a rectangle is replaced by the image's mean colour.
        erase_size: largest edge of that rectangle, as a share of the image's.
    """

    crop: float = 0.1
    shift: float = 0.04
    brightness: float = 0.08
    contrast: float = 0.15
    colour: float = 0.08
    erase: float = 0.25
    erase_size: float = 0.2

    def __post_init__(self) -> None:
        _check_shares(self, ("crop", "shift", "brightness", "contrast", "colour", "erase", "erase_size"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextAugmentation:
    """How far a text may be changed.

    Attributes:
        synonym: probability that a word that has synonyms is replaced by one of them.
        order: probability that the parts between commas are put in another order: rotated by a random number of places.
        drop: probability that a word is dropped; at least half of the words stay.
        synonyms: word (lower case) -> other words for it. A tokenizer should be trained on them as well.
    """

    synonym: float = 0.2
    order: float = 0.3
    drop: float = 0.05
    synonyms: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=lambda: SCENE_SYNONYMS)

    def __post_init__(self) -> None:
        _check_shares(self, ("synonym", "order", "drop"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation of both modalities."""

    image: ImageAugmentation = dataclasses.field(default_factory=ImageAugmentation)
    text: TextAugmentation = dataclasses.field(default_factory=TextAugmentation)


def augment_images(
    images: UInt8[np.ndarray, "b h w 3"], rng: np.random.Generator, config: ImageAugmentation
) -> UInt8[np.ndarray, "b h w 3"]:
    """Another view of each image: crop and shift (bilinear), then colour jitter, then erasing.

    Args:
        images: the images.
        rng: the random state; `IMAGE_DRAWS` numbers are taken for each image, row by row.
        config: how far to go.

    Returns:
        uint8, the same shape.

    Example:
        >>> images = np.full((2, 16, 16, 3), 128, np.uint8)
        >>> views = augment_images(images, np.random.default_rng(0), ImageAugmentation())
        >>> views.shape, views.dtype
        ((2, 16, 16, 3), dtype('uint8'))
    """
    draws = rng.random((len(images), IMAGE_DRAWS)).astype(np.float32)
    pixels = _crop_and_shift(images.astype(np.float32), draws[:, 0:5], config)
    pixels = _jitter_colour(pixels, pixels.mean(axis=(1, 2), keepdims=True), draws[:, 5:10], config)
    pixels = _erase(pixels, pixels.mean(axis=(1, 2), keepdims=True), draws[:, 10:15], config)
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def augment_texts(texts: Sequence[str], rng: np.random.Generator, config: TextAugmentation) -> list[str]:
    """Another wording of each text: order, then synonyms, then dropped words.

    Args:
        texts: the texts.
        rng: the random state; `TEXT_DRAWS` numbers are taken for each text, row by row.
        config: how far to go.

    Returns:
        As many texts, none of them empty unless it was.

    Example:
        >>> config = TextAugmentation(synonym=1.0, order=1.0, drop=0.0)
        >>> augment_texts(["a red seven on yellow, top left"], np.random.default_rng(0), config)
        ['upper left, a crimson 7 on golden']
    """
    draws = rng.random((len(texts), TEXT_DRAWS)).tolist()
    return [_augment_text(text, row, config) for text, row in zip(texts, draws, strict=True)]


def _crop_and_shift(
    pixels: Float[np.ndarray, "b h w 3"], draws: Float[np.ndarray, "b 5"], config: ImageAugmentation
) -> Float[np.ndarray, "b h w 3"]:
    scale = 1 - config.crop * draws[:, 0]
    height, width = pixels.shape[1:3]
    vertical = _source_positions(height, scale, draws[:, 1], draws[:, 3], config.shift)
    horizontal = _source_positions(width, scale, draws[:, 2], draws[:, 4], config.shift)
    return _sample_columns(_sample_rows(pixels, *vertical), *horizontal)


def _source_positions(size: int, scale: np.ndarray, start: np.ndarray, shift: np.ndarray, largest_shift: float):
    """For every output pixel of an axis: the two pixels it lies between, and its share of the second."""
    offset = start * (1 - scale) * size + (2 * shift - 1) * largest_shift * size
    centres = (np.arange(size) + 0.5) * scale[:, None] + offset[:, None] - 0.5
    centres = centres.clip(0, size - 1).astype(np.float32)
    low = np.floor(centres).astype(np.intp)
    return low, np.minimum(low + 1, size - 1), centres - low


def _sample_rows(pixels: np.ndarray, low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Pixels [b n m 3] interpolated along n; `take` on flat rows is several times as fast as indexing with arrays."""
    rows = pixels.reshape(len(pixels) * pixels.shape[1], -1)
    first_row = np.arange(len(pixels))[:, None] * pixels.shape[1]
    sampled = rows.take(first_row + low, axis=0)
    sampled += (rows.take(first_row + high, axis=0) - sampled) * share[:, :, None]
    return sampled.reshape(pixels.shape)


def _sample_columns(pixels: np.ndarray, low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    columns_first = np.ascontiguousarray(pixels.swapaxes(1, 2))
    return np.ascontiguousarray(_sample_rows(columns_first, low, high, share).swapaxes(1, 2))


def _jitter_colour(pixels: np.ndarray, mean: np.ndarray, draws: np.ndarray, config: ImageAugmentation) -> np.ndarray:
    contrast, brightness, colour = np.split((2 * draws - 1)[:, None, None, :], (1, 2), axis=-1)
    colour_gain = 1 + config.colour * colour
    gain = (1 + config.contrast * contrast) * colour_gain
    return pixels * gain + (mean * (colour_gain - gain) + 255 * config.brightness * brightness)


def _erase(pixels: np.ndarray, mean: np.ndarray, draws: np.ndarray, config: ImageAugmentation) -> np.ndarray:
    height, width = pixels.shape[1:3]
    rows = np.flatnonzero(draws[:, 0] < config.erase)
    _, tall, top, wide, left = draws[rows].T
    inside = (
        _interval(height, tall, top, config.erase_size)[:, :, None]
        & _interval(width, wide, left, config.erase_size)[:, None]
    )
    pixels[rows] = np.where(inside[..., None], mean[rows], pixels[rows])
    return pixels


def _interval(size: int, length: np.ndarray, start: np.ndarray, largest: float) -> np.ndarray:
    """Pixels of an axis within a random interval."""
    pixels = np.ceil(length * largest * size)
    first = np.floor(start * (size - pixels + 1))
    index = np.arange(size)
    return (index >= first[:, None]) & (index < (first + pixels)[:, None])


def _augment_text(text: str, draws: Sequence[float], config: TextAugmentation) -> str:
    words = _reorder(text, draws[0], draws[1], config.order).split()
    replace, choose, drop = (draws[4 + kind * MOST_WORDS :][: len(words)] for kind in range(3))
    for i, draw in enumerate(replace):
        if draw < config.synonym:
            words[i] = _synonym(words[i], choose[i], config.synonyms)
    dropped = [i for i, draw in enumerate(drop) if draw < config.drop][: len(words) // 2]
    for i in reversed(dropped):
        del words[i]
    return " ".join(words)


def _reorder(text: str, decide: float, choose: float, probability: float) -> str:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or decide >= probability:
        return text
    turn = 1 + int(choose * (len(parts) - 1))
    return ", ".join(parts[turn:] + parts[:turn])


def _synonym(word: str, choose: float, synonyms: Mapping[str, Sequence[str]]) -> str:
    """Another word for it, with the comma that may follow it."""
    bare = word.rstrip(".,;:!?")
    others = synonyms.get(bare.lower())
    return word if not others else others[int(choose * len(others))] + word[len(bare) :]


def _check_shares(config: ImageAugmentation | TextAugmentation, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise InputError(f"expected {type(config).__name__}.{name} in [0, 1], got {value}")
