"""Statements about two digit scenes, true or false, as NLVR2 has them.

A statement says how the two scenes compare in something that a scene has in one of two kinds: with a red seven or
without, with two digits or with three, the seven left of the three or above it. It is about both at once, so its truth
depends on whether the kinds are the same, and on nothing that one scene shows.

Four examples at a time share a statement: two scenes, one of each kind, are the first picture, two others the second
one, and each meets each. So every statement is true twice and false twice, and so it is beside every single picture:
who does not read the text, or looks at one of the pictures only, guesses. Each form comes in two wordings, for equal
kinds and for different ones; so the two pictures say nothing without the text either.

| form | different kinds | equal kinds |
|---|---|---|
| `existence` | exactly one picture shows a red seven | both pictures show a red seven or neither does |
| `contrast` | one picture shows a red seven and the other one exactly two green digits | both ... or both ... |
| `count` | the pictures have different numbers of digits | both pictures have the same number of digits |
| `colour` | the seven has different colours in the two pictures | the seven has the same colour in both pictures |
| `digit` | the red digit is a different number in each picture | the red digit is the same number in both pictures |
| `relation` | the seven is on different sides of the three ... | the seven is on the same side of the three ... |

The kinds of `count` are numbers of digits, or of digits of a colour. `contrast` has two of three things: a digit of a
colour, two such digits in a relation, and two digits of a colour.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from repkit.data.scene_demands import (
    COUNTS,
    RELATED_CELLS,
    TASK_IMAGE_SIZE,
    ClassExample,
    Digits,
    Wanted,
    by_colour,
    by_digit,
    draw_scene,
    in_relation,
    pick,
    pick_two,
    relation_between,
    two_colours,
    two_digits,
)
from repkit.data.scenes import COLOURS, DIGIT_NAMES, Composer, Scene, Strokes, cell_relation

STATEMENT_CLASSES = ("false", "true")


class Kind(NamedTuple):
    """One of the two kinds that a statement tells apart.

    Attributes:
        wanted: draws the digits that a scene of the kind must hold.
        holds: whether a scene is of the kind.
        counts: how many digits such a scene may have.
    """

    wanted: Callable[[], list[Wanted]]
    holds: Callable[[Digits], bool]
    counts: Sequence[int] = COUNTS


class Statement(NamedTuple):
    """The two wordings of a statement, and the kinds of scenes that it compares. No scene is of both kinds."""

    true_if_different: str
    true_if_equal: str
    kinds: tuple[Kind, Kind]


def statements(strokes: Strokes, *, count: int, rng: np.random.Generator) -> Iterator[ClassExample]:
    """Examples of the task, four of each statement, the forms of `STATEMENT_FORMS` by turns."""
    yield from itertools.islice(_statements(Composer(strokes, TASK_IMAGE_SIZE, rng), rng), count)


def _statements(composer: Composer, rng: np.random.Generator) -> Iterator[ClassExample]:
    for form in itertools.cycle(STATEMENT_FORMS):
        statement = STATEMENT_FORMS[form](rng)
        equal = pick((False, True), rng)
        text = statement.true_if_equal if equal else statement.true_if_different
        firsts, seconds = ([_scene(composer, kind, rng) for kind in statement.kinds] for _ in range(2))
        for (i, first), (j, second) in itertools.product(enumerate(firsts), enumerate(seconds)):
            yield ClassExample((first, second), text, STATEMENT_CLASSES[(i == j) == equal], form)


def _scene(composer: Composer, kind: Kind, rng: np.random.Generator) -> Scene:
    return draw_scene(composer, kind.wanted(), rng, holds=kind.holds, counts=kind.counts)


def _existence(rng: np.random.Generator) -> Statement:
    """Where it is not shown, both the digit and the colour are there, apart from each other."""
    digit, other_digit = pick_two(range(len(DIGIT_NAMES)), rng)
    colour, other_colour = pick_two(COLOURS, rng)
    thing = f"a {colour} {DIGIT_NAMES[digit]}"

    def shown(digits: Digits) -> bool:
        return any((placed.digit, placed.colour) == (digit, colour) for placed in digits)

    apart = [Wanted(digit, other_colour), Wanted(other_digit, colour)]
    return Statement(
        f"exactly one picture shows {thing}",
        f"both pictures show {thing} or neither does",
        (Kind(lambda: [Wanted(digit, colour)], shown), Kind(lambda: apart, lambda digits: not shown(digits))),
    )


class _Thing(NamedTuple):
    """What a picture may show: its words, and the kind of a scene that shows it."""

    phrase: str
    kind: Kind


def _contrast(rng: np.random.Generator) -> Statement:
    """Each scene shows one of two things, and not the other."""
    draw_first, draw_second = pick_two((_one_digit, _related_digits, _two_of_a_colour), rng)
    first, second = draw_first(rng), draw_second(rng)
    while first.phrase in second.phrase or second.phrase in first.phrase:
        # A scene cannot show a red seven left of a blue three, and no red seven.
        second = draw_second(rng)
    return Statement(
        f"one picture shows {first.phrase} and the other one {second.phrase}",
        f"both pictures show {first.phrase} or both show {second.phrase}",
        (_alone(first.kind, second.kind), _alone(second.kind, first.kind)),
    )


def _alone(kind: Kind, other: Kind) -> Kind:
    return kind._replace(holds=lambda digits: kind.holds(digits) and not other.holds(digits))


def _one_digit(rng: np.random.Generator) -> _Thing:
    digit, colour = int(rng.integers(len(DIGIT_NAMES))), pick(list(COLOURS), rng)
    phrase = f"{colour} {DIGIT_NAMES[digit]}"
    return _Thing(
        f"a {phrase}",
        Kind(lambda: [Wanted(digit, colour)], lambda digits: phrase in {placed.phrase for placed in digits}),
    )


def _related_digits(rng: np.random.Generator) -> _Thing:
    digit, other_digit = pick_two(range(len(DIGIT_NAMES)), rng)
    colour, other_colour = pick_two(COLOURS, rng)
    relation = pick(list(RELATED_CELLS), rng)
    phrase, other_phrase = f"{colour} {DIGIT_NAMES[digit]}", f"{other_colour} {DIGIT_NAMES[other_digit]}"

    def wanted() -> list[Wanted]:
        cell, other_cell = pick(RELATED_CELLS[relation], rng)
        return [Wanted(digit, colour, cell), Wanted(other_digit, other_colour, other_cell)]

    def shown(digits: Digits) -> bool:
        cells = {placed.phrase: placed.cell for placed in digits}
        if phrase not in cells or other_phrase not in cells:
            return False
        return cell_relation(cells[phrase], cells[other_phrase]) == relation

    return _Thing(f"a {phrase} {relation} a {other_phrase}", Kind(wanted, shown))


def _two_of_a_colour(rng: np.random.Generator) -> _Thing:
    colour = pick(list(COLOURS), rng)
    return _Thing(
        f"exactly two {colour} digits",
        Kind(lambda: [Wanted(colour=colour)] * 2, lambda digits: _number_of(colour, digits) == 2),
    )


def _count(rng: np.random.Generator) -> Statement:
    things, kinds = pick((_all_digits, _digits_of_a_colour), rng)(rng)
    return Statement(
        f"the pictures have different numbers of {things}", f"both pictures have the same number of {things}", kinds
    )


def _all_digits(rng: np.random.Generator) -> tuple[str, tuple[Kind, Kind]]:
    first, second = pick_two(COUNTS, rng)

    def kind(count: int) -> Kind:
        return Kind(list, lambda digits: len(digits) == count, (count,))

    return "digits", (kind(first), kind(second))


def _digits_of_a_colour(rng: np.random.Generator) -> tuple[str, tuple[Kind, Kind]]:
    colour = pick(list(COLOURS), rng)
    first, second = pick_two(range(3), rng)

    def kind(count: int) -> Kind:
        return Kind(lambda: [Wanted(colour=colour)] * count, lambda digits: _number_of(colour, digits) == count)

    return f"{colour} digits", (kind(first), kind(second))


def _number_of(colour: str, digits: Digits) -> int:
    return sum(placed.colour == colour for placed in digits)


def _colour(rng: np.random.Generator) -> Statement:
    reference = by_digit(int(rng.integers(len(DIGIT_NAMES))))
    first, second = pick_two(COLOURS, rng)

    def kind(colour: str) -> Kind:
        def holds(digits: Digits) -> bool:
            placed = reference.find(digits)
            return placed is not None and placed.colour == colour

        return Kind(lambda: reference.wanted(Wanted(colour=colour)), holds)

    return Statement(
        f"{reference.phrase} has different colours in the two pictures",
        f"{reference.phrase} has the same colour in both pictures",
        (kind(first), kind(second)),
    )


def _digit(rng: np.random.Generator) -> Statement:
    reference = by_colour(pick(list(COLOURS), rng))
    first, second = pick_two(range(len(DIGIT_NAMES)), rng)

    def kind(digit: int) -> Kind:
        def holds(digits: Digits) -> bool:
            placed = reference.find(digits)
            return placed is not None and placed.digit == digit

        return Kind(lambda: reference.wanted(Wanted(digit=digit)), holds)

    return Statement(
        f"{reference.phrase} is a different number in each picture",
        f"{reference.phrase} is the same number in both pictures",
        (kind(first), kind(second)),
    )


def _relation(rng: np.random.Generator) -> Statement:
    one, other = pick((two_colours, two_digits), rng)(rng)
    first, second = pick_two(RELATED_CELLS, rng)

    def kind(relation: str) -> Kind:
        return Kind(
            lambda: in_relation(one, other, relation, rng),
            lambda digits: relation_between(one, other, digits) == relation,
        )

    return Statement(
        f"{one.phrase} is on different sides of {other.phrase} in the two pictures",
        f"{one.phrase} is on the same side of {other.phrase} in both pictures",
        (kind(first), kind(second)),
    )


STATEMENT_FORMS: Mapping[str, Callable[[np.random.Generator], Statement]] = {
    "existence": _existence,
    "contrast": _contrast,
    "count": _count,
    "colour": _colour,
    "digit": _digit,
    "relation": _relation,
}
"""Form of a statement -> draws such a statement."""
