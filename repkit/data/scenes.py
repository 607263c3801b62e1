"""Coloured scenes composed of real handwritten digits, with captions and full ground truth.

The strokes are the 1,797 images of 8 x 8 pixels that scikit-learn ships. They are split by image, class by class,
before any scene is composed, so a model that is tested on the test scenes has seen none of their strokes in training.

The vocabulary, the captions and the prompts need nothing but the standard library; composing needs `pip install
"repkit[data]"`.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from repkit.checks import InputError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (25, 25, 25),
    "white": (235, 235, 235),
    "red": (200, 30, 40),
    "green": (50, 160, 70),
    "blue": (50, 80, 210),
    "yellow": (245, 225, 60),
}
"""Colour name -> mean RGB; a scene's colours vary around it by `COLOUR_JITTER`."""

COLOUR_JITTER = 12
"""Largest deviation of a channel from the mean colour, in 8-bit levels."""

LEAST_COLOUR_DISTANCE = 190.0
"""Euclidean RGB distance below which a digit would be hard to see on its background."""

PLACES: Mapping[tuple[int, int], str] = {
    (0, 0): "top left",
    (0, 1): "top",
    (0, 2): "top right",
    (1, 0): "left",
    (1, 1): "centre",
    (1, 2): "right",
    (2, 0): "bottom left",
    (2, 1): "bottom",
    (2, 2): "bottom right",
}
"""(row, column) of a 3 x 3 grid -> its name."""

SINGLE_PLACES = ((0, 0), (0, 2), (2, 0), (2, 2))
"""The cells used by scenes of one digit: at 16 x 16 pixels the others would overlap with these."""

SPLIT_SHARES: Mapping[str, float] = {"train": 0.85, "validation": 0.05, "test": 0.1}
"""Share of every digit class's strokes that a split may use."""

STROKE_SIZE = 8
"""Edge length of a stroke image in pixels."""

STROKE_SPLIT_SEED = 1797


@dataclasses.dataclass(frozen=True)
class Strokes:
    """Handwritten digits: `images` [n 8 8] ink in [0, 1], `labels` [n] digits, `ids` [n] rows of scikit-learn's set."""

    images: Float[np.ndarray, "n 8 8"]
    labels: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class PlacedDigit:
    """One digit of a scene: what it is, and where. `row`, `column` are grid cells; `top`, `left` are pixels."""

    digit: int
    colour: str
    row: int
    column: int
    stroke_id: int
    top: int
    left: int

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) of the grid."""
        return self.row, self.column

    @property
    def phrase(self) -> str:
        """The digit as a caption names it, without article: "red seven"."""
        return f"{self.colour} {DIGIT_NAMES[self.digit]}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image, its captions and everything that is in it."""

    image: UInt8[np.ndarray, "h w 3"]
    captions: tuple[str, ...]
    background: str
    digits: tuple[PlacedDigit, ...]

    @property
    def ground_truth(self) -> str:
        """The background and every field of every digit, as JSON."""
        return json.dumps({"background": self.background, "digits": [vars(placed) for placed in self.digits]})


def contrasting_colours() -> list[tuple[str, str]]:
    """All (digit colour, background) pairs that are at least `LEAST_COLOUR_DISTANCE` apart.

    >>> ("red", "red") in contrasting_colours(), ("green", "blue") in contrasting_colours()
    (False, False)
    >>> ("red", "yellow") in contrasting_colours()
    True
    """

    def distance(first: str, second: str) -> float:
        return float(np.linalg.norm(np.subtract(COLOURS[first], COLOURS[second])))

    return [(ink, ground) for ink in COLOURS for ground in COLOURS if distance(ink, ground) >= LEAST_COLOUR_DISTANCE]


def colours_on(background: str) -> list[str]:
    """The colours that a digit on the background may have.

    >>> colours_on("green")
    ['white', 'red', 'yellow']
    """
    return [ink for ink, ground in contrasting_colours() if ground == background]


def single_caption(digit: int, colour: str, background: str, place: str) -> str:
    """The caption of a scene of one digit.

    >>> single_caption(7, "red", "yellow", "top left")
    'a red seven on yellow, top left'
    """
    return f"a {colour} {DIGIT_NAMES[digit]} on {background}, {place}"


def cell_relation(first: tuple[int, int], second: tuple[int, int]) -> str | None:
    """Where a cell (row, column) is, seen from another one; None if they share neither row nor column.

    >>> cell_relation((0, 0), (0, 2)), cell_relation((2, 1), (0, 1)), cell_relation((0, 0), (1, 1))
    ('left of', 'below', None)
    """
    if first[0] == second[0]:
        return "left of" if first[1] < second[1] else "right of"
    if first[1] == second[1]:
        return "above" if first[0] < second[0] else "below"
    return None


def relation(first: PlacedDigit, second: PlacedDigit) -> str:
    """Where `first` is, seen from `second`, for two digits that share a row or a column of the grid."""
    name = cell_relation(first.cell, second.cell)
    if name is None:
        raise ValueError(f"{first} and {second} share neither row nor column")
    return name


def pairs_caption(digits: Sequence[PlacedDigit], background: str) -> str:
    """The caption of a scene of several digits: every digit is related to the one after it.

    >>> two = [PlacedDigit(7, "red", 0, 0, 5, 0, 0), PlacedDigit(3, "blue", 0, 2, 9, 0, 24)]
    >>> pairs_caption(two, "white")
    'a red seven left of a blue three on white'
    """
    first = f"a {digits[0].phrase} {relation(digits[0], digits[1])} a {digits[1].phrase}"
    others = [f"the {a.phrase} {relation(a, b)} a {b.phrase}" for a, b in itertools.pairwise(digits[1:])]
    return ", ".join([first, *others]) + f" on {background}"


def zero_shot_prompts() -> dict[str, list[str]]:
    """For every digit class its prompts: all (colour, background) pairs, with the places taken in turn.

    The prompts of two classes differ in the digit's name alone, so what is left of their mean embeddings after
    subtraction is the digit.

    Returns:
        Class name ("zero" ... "nine", in the order of the labels) -> at most 64 captions in the wording of `single`.

    Example:
        >>> prompts = zero_shot_prompts()
        >>> list(prompts)[7], prompts["seven"][0], len(prompts["seven"]) <= 64
        ('seven', 'a black seven on white, top left', True)
    """
    places = itertools.cycle(PLACES[cell] for cell in SINGLE_PLACES)
    contexts = [(colour, background, next(places)) for colour, background in contrasting_colours()]
    return {name: [single_caption(digit, *context) for context in contexts] for digit, name in enumerate(DIGIT_NAMES)}


def load_strokes() -> Strokes:
    """All 1,797 digits of scikit-learn's `load_digits`, which the package carries with it."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError('digit scenes need scikit-learn: pip install "repkit[data]"') from error
    images, labels = load_digits(return_X_y=True)
    return Strokes(images.reshape(-1, 8, 8) / 16.0, labels.astype(np.int32), np.arange(len(labels), dtype=np.int32))


def split_strokes(strokes: Strokes) -> dict[str, Strokes]:
    """Disjoint shares of the strokes by `SPLIT_SHARES`, each with every digit class in the same proportion."""
    rng = np.random.default_rng(STROKE_SPLIT_SEED)
    ends = np.cumsum(list(SPLIT_SHARES.values()))[:-1]
    rows_of_classes = []
    for digit in range(len(DIGIT_NAMES)):
        rows = rng.permutation(np.flatnonzero(strokes.labels == digit))
        rows_of_classes.append(np.split(rows, np.round(ends * len(rows)).astype(int)))
    split_rows = [np.sort(np.concatenate(parts)) for parts in zip(*rows_of_classes, strict=True)]
    return {
        split: Strokes(strokes.images[rows], strokes.labels[rows], strokes.ids[rows])
        for split, rows in zip(SPLIT_SHARES, split_rows, strict=True)
    }


def single_scenes(strokes: Strokes, *, count: int, rng: np.random.Generator, image_size: int = 16) -> Iterator[Scene]:
    """Scenes of one digit; digit, colours and place are uniform and independent."""
    composer = Composer(strokes, image_size, rng)
    pairs = contrasting_colours()
    for _ in range(count):
        colour, background = pairs[rng.integers(len(pairs))]
        cell = SINGLE_PLACES[rng.integers(len(SINGLE_PLACES))]
        placed = composer.place(int(rng.integers(len(DIGIT_NAMES))), colour, cell)
        caption = single_caption(placed.digit, colour, background, PLACES[cell])
        yield Scene(composer.draw([placed], background), (caption,), background, (placed,))


def pairs_scenes(strokes: Strokes, *, count: int, rng: np.random.Generator, image_size: int = 32) -> Iterator[Scene]:
    """Scenes of two to four digits, no two alike in both digit and colour.

    Each digit shares a row or a column with the one before it, so every stated relation is exact. The two captions
    tell the chain from its two ends.
    """
    composer = Composer(strokes, image_size, rng)
    backgrounds = [(background, colours_on(background)) for background in COLOURS]
    for _ in range(count):
        background, colours = backgrounds[rng.integers(len(backgrounds))]
        cells = _connected_cells(int(rng.integers(2, 5)), rng)
        # Drawing without replacement from all (digit, colour) keeps "the red seven" unambiguous.
        kinds = rng.choice(len(DIGIT_NAMES) * len(colours), size=len(cells), replace=False)
        digits = [
            composer.place(int(kind) // len(colours), colours[int(kind) % len(colours)], cell)
            for kind, cell in zip(kinds, cells, strict=True)
        ]
        captions = (pairs_caption(digits, background), pairs_caption(digits[::-1], background))
        yield Scene(composer.draw(digits, background), captions, background, tuple(digits))


SCENES: Mapping[str, Callable[..., Iterator[Scene]]] = {"single": single_scenes, "pairs": pairs_scenes}
IMAGE_SIZES: Mapping[str, int] = {"single": 16, "pairs": 32}


def _connected_cells(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`count` distinct cells, each in the row or column of the one before it."""
    cells = [list(PLACES)[rng.integers(len(PLACES))]]
    while len(cells) < count:
        row, column = cells[-1]
        free = [c for c in PLACES if c not in cells and (c[0] == row or c[1] == column)]
        # Never empty: a cell's row and column hold four others, of which at most two are taken.
        cells.append(free[rng.integers(len(free))])
    return cells


class Composer:
    """Draws strokes of one split onto a square canvas of `image_size` pixels, with the scene's random choices."""

    def __init__(self, strokes: Strokes, image_size: int, rng: np.random.Generator):
        self._ink_of_id = dict(zip(strokes.ids.tolist(), strokes.images[..., None], strict=True))
        self._ids_of_digit = [strokes.ids[strokes.labels == digit] for digit in range(len(DIGIT_NAMES))]
        # The strokes keep their size and the cells their place: at 8 x 8 pixels a stroke has no detail to spare.
        self._cell_edges = (0, (image_size - STROKE_SIZE) // 2, image_size - STROKE_SIZE)
        self._image_size = image_size
        self._rng = rng

    def place(self, digit: int, colour: str, cell: tuple[int, int]) -> PlacedDigit:
        """The digit in a cell (row, column), written with one of its strokes."""
        ids = self._ids_of_digit[digit]
        row, column = cell
        stroke_id = int(ids[self._rng.integers(len(ids))])
        return PlacedDigit(digit, colour, row, column, stroke_id, self._cell_edges[row], self._cell_edges[column])

    def draw(self, digits: Sequence[PlacedDigit], background: str) -> UInt8[np.ndarray, "h w 3"]:
        """The image of the digits; every colour varies around its name's mean."""
        canvas = np.empty((self._image_size, self._image_size, 3))
        canvas[:] = self._colour(background)
        for placed in digits:
            ink = self._ink_of_id[placed.stroke_id]
            box = (slice(placed.top, placed.top + STROKE_SIZE), slice(placed.left, placed.left + STROKE_SIZE))
            canvas[box] += ink * (self._colour(placed.colour) - canvas[box])
        return np.rint(canvas).clip(0, 255).astype(np.uint8)

    def _colour(self, name: str) -> Float[np.ndarray, " 3"]:
        return np.array(COLOURS[name]) + self._rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3).astype(float)
