"""Questions about digit scenes, each with ten answers as VQA collects them.

A question's words are drawn first, then one of the answers that it may have, each as likely, and last a scene in which
that answer is the right one and every digit that the question names is the only one it can mean. So the words say
nothing about the answer: who guesses without the image is right once in as many times as there are answers.

| type | answers | right by guessing |
|---|---|---|
| `digit` | zero ... nine | 1/10 |
| `colour` | six colours | 1/6 |
| `count` | two, three, four; of a colour zero ... three | 1/3, 1/4 |
| `relation` | left, right, above, below | 1/4 |
| `yes_no` | yes, no | 1/2 |
| `sum` | zero ... eighteen | 1/19 |

Ten annotators answer. Most say the plain answer; some write it in another way, which VQA's normalisation makes the same
(a numeral for a number up to ten; capital letter and full stop), and a few are mistaken. Numerals above ten differ from
the words also after normalisation, which knows the words up to ten only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from repkit.data.scene_demands import (
    COUNTS,
    RELATED_CELLS,
    TASK_IMAGE_SIZE,
    Digits,
    Reference,
    TaskExample,
    Wanted,
    by_colour,
    by_digit,
    by_place,
    by_relation,
    draw_scene,
    in_relation,
    pick,
    pick_two,
    relation_between,
    two_colours,
    two_digits,
)
from repkit.data.scenes import COLOURS, DIGIT_NAMES, PLACES, Composer, Strokes

ANSWERS_PER_QUESTION = 10

MISTAKE_RATE = 0.05
"""Probability that an annotator gives another one of a question's possible answers."""

OTHER_NOTATION_RATE = 0.2
"""Probability that an annotator writes the right answer in another way."""

NUMBER_NAMES = (
    *DIGIT_NAMES,
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
"""The names of all sums of two digits."""

SIDES: Mapping[str, str] = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
"""Relation -> the answer that names it."""


class Question(NamedTuple):
    """A question without its scene.

    Attributes:
        text: its words.
        answers: the answers that it may have.
        wanted: answer -> digits that make it right.
        answer_in: the right answer in a scene; None where the question is ambiguous or names what is not there.
        counts: how many digits the scene may have, for an answer.
    """

    text: str
    answers: Sequence[str]
    wanted: Callable[[str], list[Wanted]]
    answer_in: Callable[[Digits], str | None]
    counts: Callable[[str], Sequence[int]] = lambda answer: COUNTS


def questions(strokes: Strokes, *, count: int, rng: np.random.Generator) -> Iterator[TaskExample]:
    """Examples of the question task, the types of `QUESTION_TYPES` by turns."""
    composer = Composer(strokes, TASK_IMAGE_SIZE, rng)
    types = list(QUESTION_TYPES)
    for index in range(count):
        question_type = types[index % len(types)]
        question = QUESTION_TYPES[question_type](rng)
        answer = pick(question.answers, rng)
        scene = draw_scene(
            composer,
            question.wanted(answer),
            rng,
            holds=lambda digits, question=question, answer=answer: question.answer_in(digits) == answer,
            counts=question.counts(answer),
        )
        answers = annotated(answer, question.answers, rng)
        yield TaskExample(scene, question.text, answers, question_type, answer)


def annotated(answer: str, answers: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """What ten annotators say when `answer` is right and `answers` are possible.

    >>> annotated("seven", DIGIT_NAMES, np.random.default_rng(3))[:6]
    ('7', '7', 'seven', 'seven', '7', 'seven')
    """
    others = [other for other in answers if other != answer]

    def one(draw: float) -> str:
        if draw < MISTAKE_RATE:
            return pick(others, rng)
        if draw < MISTAKE_RATE + OTHER_NOTATION_RATE:
            return str(NUMBER_NAMES.index(answer)) if answer in NUMBER_NAMES else f"{answer.capitalize()}."
        return answer

    return tuple(one(draw) for draw in rng.random(ANSWERS_PER_QUESTION).tolist())


def _digit_question(rng: np.random.Generator) -> Question:
    reference = _any_reference(by_colour(pick(list(COLOURS), rng)), rng)

    def answer_in(digits: Digits) -> str | None:
        placed = reference.find(digits)
        return None if placed is None else DIGIT_NAMES[placed.digit]

    return Question(
        pick(("what is {}?", "which number is {}?"), rng).format(reference.phrase),
        DIGIT_NAMES,
        lambda answer: reference.wanted(Wanted(digit=DIGIT_NAMES.index(answer))),
        answer_in,
    )


def _colour_question(rng: np.random.Generator) -> Question:
    reference = _any_reference(by_digit(int(rng.integers(len(DIGIT_NAMES)))), rng)

    def answer_in(digits: Digits) -> str | None:
        placed = reference.find(digits)
        return None if placed is None else placed.colour

    return Question(
        pick(("what colour is {}?", "which colour has {}?"), rng).format(reference.phrase),
        tuple(COLOURS),
        lambda answer: reference.wanted(Wanted(colour=answer)),
        answer_in,
    )


def _count_question(rng: np.random.Generator) -> Question:
    return pick((_count_all, _count_colour), rng)(rng)


def _count_all(rng: np.random.Generator) -> Question:
    del rng  # There is one wording, and nothing to choose.
    return Question(
        "how many digits are there?",
        tuple(NUMBER_NAMES[count] for count in COUNTS),
        lambda answer: [],
        lambda digits: NUMBER_NAMES[len(digits)],
        lambda answer: (NUMBER_NAMES.index(answer),),
    )


def _count_colour(rng: np.random.Generator) -> Question:
    colour = pick(list(COLOURS), rng)
    return Question(
        pick(("how many digits are {}?", "how many {} digits are there?"), rng).format(colour),
        NUMBER_NAMES[:4],
        lambda answer: [Wanted(colour=colour)] * NUMBER_NAMES.index(answer),
        lambda digits: NUMBER_NAMES[sum(placed.colour == colour for placed in digits)],
    )


def _relation_question(rng: np.random.Generator) -> Question:
    first, second = pick((two_colours, two_digits), rng)(rng)
    relations = {side: relation for relation, side in SIDES.items()}

    def answer_in(digits: Digits) -> str | None:
        relation = relation_between(first, second, digits)
        return None if relation is None else SIDES[relation]

    return Question(
        pick(("where is {}, seen from {}?", "on which side is {}, seen from {}?"), rng).format(
            first.phrase, second.phrase
        ),
        tuple(relations),
        lambda answer: in_relation(first, second, relations[answer], rng),
        answer_in,
    )


def _yes_no_question(rng: np.random.Generator) -> Question:
    return pick((_existence_question, _statement_question), rng)(rng)


def _existence_question(rng: np.random.Generator) -> Question:
    """Where the answer is no, both the digit and the colour are there, apart from each other."""
    digit, other_digit = pick_two(range(len(DIGIT_NAMES)), rng)
    colour, other_colour = pick_two(COLOURS, rng)

    def wanted(answer: str) -> list[Wanted]:
        if answer == "yes":
            return [Wanted(digit, colour)]
        return [Wanted(digit, other_colour), Wanted(other_digit, colour)]

    return Question(
        pick(("is there a {}?", "do you see a {}?"), rng).format(f"{colour} {DIGIT_NAMES[digit]}"),
        ("yes", "no"),
        wanted,
        lambda digits: "yes" if any((p.digit, p.colour) == (digit, colour) for p in digits) else "no",
    )


def _statement_question(rng: np.random.Generator) -> Question:
    first, second = pick((two_colours, two_digits), rng)(rng)
    asked, other = pick_two(RELATED_CELLS, rng)

    def answer_in(digits: Digits) -> str | None:
        relation = relation_between(first, second, digits)
        return None if relation is None else "yes" if relation == asked else "no"

    return Question(
        f"is {first.phrase} {asked} {second.phrase}?",
        ("yes", "no"),
        lambda answer: in_relation(first, second, asked if answer == "yes" else other, rng),
        answer_in,
    )


def _sum_question(rng: np.random.Generator) -> Question:
    first, second = pick((two_colours, _two_places), rng)(rng)

    def wanted(answer: str) -> list[Wanted]:
        total = NUMBER_NAMES.index(answer)
        addend = int(rng.integers(max(0, total - 9), min(9, total) + 1))
        return first.wanted(Wanted(digit=addend)) + second.wanted(Wanted(digit=total - addend))

    def answer_in(digits: Digits) -> str | None:
        one, other = first.find(digits), second.find(digits)
        return None if one is None or other is None else NUMBER_NAMES[one.digit + other.digit]

    return Question(
        pick(("what is the sum of {} and {}?", "how much is {} plus {}?"), rng).format(first.phrase, second.phrase),
        NUMBER_NAMES,
        wanted,
        answer_in,
    )


QUESTION_TYPES: Mapping[str, Callable[[np.random.Generator], Question]] = {
    "digit": _digit_question,
    "colour": _colour_question,
    "count": _count_question,
    "relation": _relation_question,
    "yes_no": _yes_no_question,
    "sum": _sum_question,
}
"""Question type -> draws the words of such a question."""


def _any_reference(named: Reference, rng: np.random.Generator) -> Reference:
    """The digit that is named, a digit at a place, or one in a relation to the named one."""
    references = (
        lambda: named,
        lambda: by_place(pick(list(PLACES), rng)),
        lambda: by_relation(pick(list(RELATED_CELLS), rng), named, rng),
    )
    return pick(references, rng)()


def _two_places(rng: np.random.Generator) -> tuple[Reference, Reference]:
    first, second = pick_two(PLACES, rng)
    return by_place(first), by_place(second)
