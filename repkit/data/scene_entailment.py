"""What a digit scene says about a text, as in SNLI-VE: the text is entailed, contradicted, or neither.

On every picture a grey card covers one digit. A text that is true whatever the card covers is entailed, one that is
false whatever it covers is contradicted, and one whose truth depends on it is neutral. So a neutral text cannot be
decided from the picture, and yet speaks of what such pictures show. (What the viewer knows of the covered digit: it is
one of ten digits in one of six colours, and no visible digit has both.)

Three examples at a time share a text, one of each class. So the words say nothing about the class; and as a card is on
every picture and the forms mirror one another, neither does the picture alone.

| form | text |
|---|---|
| `place` | the digit at the top left is red / a seven / a red seven |
| `line` | there is a seven / a red digit / a red seven in the left column |
| `relation` | the digit left of the blue three is red / a seven / a red seven |
| `count` | there are at least two red digits; there is at most one red digit |
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from repkit.data.scene_demands import (
    RELATED_CELLS,
    TASK_IMAGE_SIZE,
    ClassExample,
    Digits,
    Wanted,
    draw_scene,
    pick,
    pick_two,
)
from repkit.data.scenes import (
    COLOURS,
    DIGIT_NAMES,
    PLACES,
    STROKE_SIZE,
    Composer,
    PlacedDigit,
    Scene,
    Strokes,
    cell_relation,
)

ENTAILMENT_CLASSES = ("entailment", "neutral", "contradiction")

CARD_COLOUR = (128, 128, 128)

DIGIT_COUNTS = (3, 4)
"""How many digits there may be, the covered one included."""

LINES: Mapping[str, frozenset[tuple[int, int]]] = {
    "top row": frozenset((0, i) for i in range(3)),
    "middle row": frozenset((1, i) for i in range(3)),
    "bottom row": frozenset((2, i) for i in range(3)),
    "left column": frozenset((i, 0) for i in range(3)),
    "middle column": frozenset((i, 1) for i in range(3)),
    "right column": frozenset((i, 2) for i in range(3)),
}
"""Name of a row or column -> its cells."""


@dataclasses.dataclass(frozen=True)
class CoveredScene(Scene):
    """A scene whose image shows a card in the place of one more digit; `digits` are those that can be seen."""

    covered: PlacedDigit

    @property
    def ground_truth(self) -> str:
        """The background, every field of every visible digit, and those of the covered one, as JSON."""
        return json.dumps({**json.loads(super().ground_truth), "covered": vars(self.covered)})


class Hypothesis(NamedTuple):
    """A text without its scene.

    Attributes:
        text: its words.
        holds: whether it is true of digits, all of which are seen; None where it names what is not there, or not clear.
        wanted: class -> what the covered digit must be, and what some of the others.
        colour: a colour that it names, which a digit must be able to have on the background.
    """

    text: str
    holds: Callable[[Digits], bool | None]
    wanted: Callable[[str], tuple[Wanted, list[Wanted]]]
    colour: str | None


def entailments(strokes: Strokes, *, count: int, rng: np.random.Generator) -> Iterator[ClassExample]:
    """Examples of the task, three with each text, the forms of `HYPOTHESIS_FORMS` by turns."""
    yield from itertools.islice(_entailments(Composer(strokes, TASK_IMAGE_SIZE, rng), rng), count)


def _entailments(composer: Composer, rng: np.random.Generator) -> Iterator[ClassExample]:
    for form in itertools.cycle(HYPOTHESIS_FORMS):
        hypothesis = HYPOTHESIS_FORMS[form](rng)
        for class_name in ENTAILMENT_CLASSES:
            scene = _premise(composer, hypothesis, class_name, rng)
            yield ClassExample((scene,), hypothesis.text, class_name, form)


def _premise(composer: Composer, hypothesis: Hypothesis, class_name: str, rng: np.random.Generator) -> CoveredScene:
    covered, others = hypothesis.wanted(class_name)
    scene = draw_scene(
        composer,
        [covered, *others],
        rng,
        holds=lambda digits: _class_of(hypothesis.holds, digits[1:], digits[0]) == class_name,
        counts=DIGIT_COUNTS,
        named_colours=[] if hypothesis.colour is None else [hypothesis.colour],
    )
    hidden, *visible = scene.digits
    image = scene.image.copy()
    image[hidden.top : hidden.top + STROKE_SIZE, hidden.left : hidden.left + STROKE_SIZE] = CARD_COLOUR
    return CoveredScene(image, (), scene.background, tuple(visible), hidden)


def _class_of(holds: Callable[[Digits], bool | None], visible: Digits, covered: PlacedDigit) -> str | None:
    """The class of a text, by trying all that the card may cover; None where the text cannot be understood."""
    seen = {(placed.digit, placed.colour) for placed in visible}
    truths = set()
    for kind, placed in _possible_digits(covered.cell):
        if kind not in seen:
            truth = holds([*visible, placed])
            if truth is None:
                return None
            truths.add(truth)
            if len(truths) == 2:
                return "neutral"
    return "entailment" if True in truths else "contradiction"


@functools.cache
def _possible_digits(cell: tuple[int, int]) -> list[tuple[tuple[int, str], PlacedDigit]]:
    """All digits in all colours, as they might be in a cell."""
    kinds = itertools.product(range(len(DIGIT_NAMES)), COLOURS)
    return [((digit, colour), PlacedDigit(digit, colour, *cell, -1, -1, -1)) for digit, colour in kinds]


class _Claim(NamedTuple):
    """What a text says of a digit: the number, the colour, or both; the other one is None."""

    digit: int | None
    colour: str | None

    @property
    def adjective(self) -> str:
        """As in "the digit is ..."."""
        if self.digit is None:
            return str(self.colour)
        name = DIGIT_NAMES[self.digit]
        if self.colour is not None:
            return f"a {self.colour} {name}"
        return f"an {name}" if name == "eight" else f"a {name}"

    @property
    def noun(self) -> str:
        """As in "there is ..."."""
        return f"a {self.colour} digit" if self.digit is None else self.adjective

    def fits(self, placed: PlacedDigit) -> bool:
        return self.digit in (None, placed.digit) and self.colour in (None, placed.colour)

    def wanted(self, cell: tuple[int, int]) -> Wanted:
        return Wanted(self.digit, self.colour, cell)

    def half_wanted(self, cell: tuple[int, int], rng: np.random.Generator) -> Wanted:
        """A digit of which one of two claims is true, so that it must be looked at; of one claim, any digit."""
        if self.digit is None or self.colour is None:
            return Wanted(cell=cell)
        return pick((Wanted(digit=self.digit, cell=cell), Wanted(colour=self.colour, cell=cell)), rng)


def _draw_claim(rng: np.random.Generator) -> _Claim:
    digit, colour = int(rng.integers(len(DIGIT_NAMES))), pick(list(COLOURS), rng)
    return pick((_Claim(digit, None), _Claim(None, colour), _Claim(digit, colour)), rng)


def _place(rng: np.random.Generator) -> Hypothesis:
    claim, cell = _draw_claim(rng), pick(list(PLACES), rng)

    def holds(digits: Digits) -> bool | None:
        return next((claim.fits(placed) for placed in digits if placed.cell == cell), None)

    def wanted(class_name: str) -> tuple[Wanted, list[Wanted]]:
        if class_name == "neutral":
            return Wanted(cell=cell), []
        return Wanted(), [claim.wanted(cell) if class_name == "entailment" else claim.half_wanted(cell, rng)]

    return Hypothesis(f"the digit at the {PLACES[cell]} is {claim.adjective}", holds, wanted, claim.colour)


def _line(rng: np.random.Generator) -> Hypothesis:
    claim, line = _draw_claim(rng), pick(list(LINES), rng)
    cells = sorted(LINES[line])

    def holds(digits: Digits) -> bool:
        return any(claim.fits(placed) for placed in digits if placed.cell in LINES[line])

    def wanted(class_name: str) -> tuple[Wanted, list[Wanted]]:
        cell, other = pick_two(cells, rng)
        if class_name == "entailment":
            return Wanted(), [claim.wanted(cell)]
        outside = [cell for cell in PLACES if cell not in cells]
        covered = Wanted(cell=other if class_name == "neutral" else pick(outside, rng))
        return covered, [claim.half_wanted(cell, rng)]

    return Hypothesis(f"there is {claim.noun} in the {line}", holds, wanted, claim.colour)


def _relation(rng: np.random.Generator) -> Hypothesis:
    claim, relation = _draw_claim(rng), pick(list(RELATED_CELLS), rng)
    # Never of one kind, because no two digits are; any two colours can be seen on some background.
    digit = pick([digit for digit in range(len(DIGIT_NAMES)) if digit != claim.digit], rng)
    colour = pick(list(COLOURS), rng)
    anchor = (digit, colour)

    def holds(digits: Digits) -> bool | None:
        cell = next((placed.cell for placed in digits if (placed.digit, placed.colour) == anchor), None)
        if cell is None:
            return None
        others = [placed for placed in digits if placed.cell != cell]
        related = [placed for placed in others if cell_relation(placed.cell, cell) == relation]
        return claim.fits(related[0]) if len(related) == 1 else None

    def wanted(class_name: str) -> tuple[Wanted, list[Wanted]]:
        cell, anchor_cell = pick(RELATED_CELLS[relation], rng)
        there = Wanted(digit, colour, anchor_cell)
        if class_name == "neutral":
            return Wanted(cell=cell), [there]
        return Wanted(), [claim.wanted(cell) if class_name == "entailment" else claim.half_wanted(cell, rng), there]

    return Hypothesis(
        f"the digit {relation} the {colour} {DIGIT_NAMES[digit]} is {claim.adjective}", holds, wanted, claim.colour
    )


def _count(rng: np.random.Generator) -> Hypothesis:
    """The two wordings contradict each other, so that many and few digits of a colour are as often right as wrong."""
    colour, at_least = pick(list(COLOURS), rng), pick((True, False), rng)
    visible = {"entailment": 2 if at_least else 0, "neutral": 1, "contradiction": 0 if at_least else 2}

    def holds(digits: Digits) -> bool:
        return (sum(placed.colour == colour for placed in digits) >= 2) == at_least

    text = f"there are at least two {colour} digits" if at_least else f"there is at most one {colour} digit"
    return Hypothesis(text, holds, lambda class_name: (Wanted(), [Wanted(colour=colour)] * visible[class_name]), colour)


HYPOTHESIS_FORMS: Mapping[str, Callable[[np.random.Generator], Hypothesis]] = {
    "place": _place,
    "line": _line,
    "relation": _relation,
    "count": _count,
}
"""Form of a text -> draws such a text."""
