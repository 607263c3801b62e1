"""Digit scenes made to order: references to digits ("the red digit"), and scenes in which a wanted digit is there.

The words of a task come first and its scene second: a scene is drawn to hold the digits that the words and the right
answer need, and is otherwise left to chance.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from repkit.data.scenes import COLOURS, DIGIT_NAMES, PLACES, Composer, PlacedDigit, Scene, cell_relation, colours_on

T = TypeVar("T")

Digits = Sequence[PlacedDigit]
"""The digits of a scene."""

TASK_IMAGE_SIZE = 24
"""Edge length of a task's scenes in pixels: three digits of 8 pixels, so that patches of 8 are the grid's cells."""

COUNTS = (2, 3, 4)
"""How many digits a scene may have."""

RELATED_CELLS = {
    name: [pair for pair in itertools.permutations(PLACES, 2) if cell_relation(*pair) == name]
    for name in ("left of", "right of", "above", "below")
}
"""Relation -> all (first cell, second cell) between which it holds."""

_INKS = {background: frozenset(colours_on(background)) for background in COLOURS}


@dataclasses.dataclass(frozen=True)
class TaskExample:
    """An image with a source text and the target texts, any of which is right.

    Questions also have their `question_type` and the true `answer`.
    """

    scene: Scene
    source_text: str
    target_texts: tuple[str, ...]
    question_type: str | None = None
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class ClassExample:
    """One scene or two, a text about them, and the name of the class that this makes: a task to be classified.

    `form` is what kind of text it is.
    """

    scenes: tuple[Scene, ...]
    text: str
    class_name: str
    form: str


class Wanted(NamedTuple):
    """What a digit of a scene must be; None leaves it to chance."""

    digit: int | None = None
    colour: str | None = None
    cell: tuple[int, int] | None = None


class Reference(NamedTuple):
    """A description of one digit.

    Attributes:
        phrase: its words.
        find: the only digit of a scene that the words fit, or None if they fit none or several.
        wanted: what a scene must hold so that the digit described has the given further properties.
    """

    phrase: str
    find: Callable[[Digits], PlacedDigit | None]
    wanted: Callable[[Wanted], list[Wanted]]


def by_colour(colour: str) -> Reference:
    """The only digit of a colour.

    >>> by_colour("red").phrase
    'the red digit'
    """
    return Reference(
        f"the {colour} digit",
        lambda digits: _only(placed for placed in digits if placed.colour == colour),
        lambda wanted: [wanted._replace(colour=colour)],
    )


def by_digit(digit: int) -> Reference:
    """The only one of a digit.

    >>> by_digit(7).phrase
    'the seven'
    """
    return Reference(
        f"the {DIGIT_NAMES[digit]}",
        lambda digits: _only(placed for placed in digits if placed.digit == digit),
        lambda wanted: [wanted._replace(digit=digit)],
    )


def by_place(cell: tuple[int, int]) -> Reference:
    """The digit in a cell of the grid.

    >>> by_place((0, 2)).phrase
    'the digit at the top right'
    """
    return Reference(
        f"the digit at the {PLACES[cell]}",
        lambda digits: _only(placed for placed in digits if placed.cell == cell),
        lambda wanted: [wanted._replace(cell=cell)],
    )


def by_relation(relation: str, anchor: Reference, rng: np.random.Generator) -> Reference:
    """The only digit that is in a relation to another one; `rng` says in which two cells they are to be.

    >>> by_relation("left of", by_colour("red"), np.random.default_rng(0)).phrase
    'the digit left of the red digit'
    """
    cell, anchor_cell = pick(RELATED_CELLS[relation], rng)

    def find(digits: Digits) -> PlacedDigit | None:
        other = anchor.find(digits)
        if other is None:
            return None
        return _only(
            placed for placed in digits if placed != other and cell_relation(placed.cell, other.cell) == relation
        )

    return Reference(
        f"the digit {relation} {anchor.phrase}",
        find,
        lambda wanted: [wanted._replace(cell=cell), *anchor.wanted(Wanted(cell=anchor_cell))],
    )


def draw_scene(
    composer: Composer,
    wanted: Sequence[Wanted],
    rng: np.random.Generator,
    *,
    holds: Callable[[Digits], bool],
    counts: Sequence[int] = COUNTS,
    named_colours: Iterable[str] = (),
) -> Scene:
    """A random scene with the wanted digits in which `holds` is true, no two digits alike in both digit and colour.

    Args:
        composer: draws the strokes.
        wanted: digits that must be there; others join them.
        rng: the random state.
        holds: must be true of some scene with these digits on every background, or this never ends.
        counts: how many digits there may be; each number from the wanted ones' on is as likely.
        named_colours: colours beside the wanted ones that a digit could have on the background.

    Returns:
        The scene, without captions, on any background on which the wanted colours can be seen.
    """
    colours = {digit.colour for digit in wanted if digit.colour is not None} | set(named_colours)
    background = pick([ground for ground, inks in _INKS.items() if colours <= inks], rng)
    counts = [count for count in counts if count >= len(wanted)]
    while True:
        digits = _draw_digits(composer, wanted, pick(counts, rng), background, rng)
        if len({placed.phrase for placed in digits}) == len(digits) and holds(digits):
            return Scene(composer.draw(digits, background), (), background, digits)


def two_colours(rng: np.random.Generator) -> tuple[Reference, Reference]:
    """The only digits of two different colours."""
    first, second = pick_two(COLOURS, rng)
    return by_colour(first), by_colour(second)


def two_digits(rng: np.random.Generator) -> tuple[Reference, Reference]:
    """The only ones of two different digits."""
    first, second = pick_two(range(len(DIGIT_NAMES)), rng)
    return by_digit(first), by_digit(second)


def relation_between(first: Reference, second: Reference, digits: Digits) -> str | None:
    """Where the first digit is, seen from the second; None where one is not found, or they share no row or column."""
    one, other = first.find(digits), second.find(digits)
    return None if one is None or other is None else cell_relation(one.cell, other.cell)


def in_relation(first: Reference, second: Reference, relation: str, rng: np.random.Generator) -> list[Wanted]:
    """What a scene must hold so that two digits are in a relation; `rng` says in which two cells they are to be."""
    cell, other = pick(RELATED_CELLS[relation], rng)
    return first.wanted(Wanted(cell=cell)) + second.wanted(Wanted(cell=other))


def pick(options: Sequence[T], rng: np.random.Generator) -> T:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def pick_two(options: Iterable[T], rng: np.random.Generator) -> tuple[T, T]:
    """Two different ones of the options, in random order."""
    options = list(options)
    first = int(rng.integers(len(options)))
    second = (first + 1 + int(rng.integers(len(options) - 1))) % len(options)
    return options[first], options[second]


def _draw_digits(
    composer: Composer, wanted: Sequence[Wanted], count: int, background: str, rng: np.random.Generator
) -> tuple[PlacedDigit, ...]:
    taken = {digit.cell for digit in wanted}
    free = [cell for cell in PLACES if cell not in taken]
    cells = iter(rng.permutation(len(free)).tolist())
    inks = sorted(_INKS[background])
    return tuple(
        composer.place(
            int(rng.integers(len(DIGIT_NAMES))) if digit is None else digit,
            pick(inks, rng) if colour is None else colour,
            free[next(cells)] if cell is None else cell,
        )
        for digit, colour, cell in [*wanted, *[Wanted()] * (count - len(wanted))]
    )


def _only(fitting: Iterable[PlacedDigit]) -> PlacedDigit | None:
    found = list(fitting)
    return found[0] if len(found) == 1 else None
