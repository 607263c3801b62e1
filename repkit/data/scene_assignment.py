"""Which of two digit scenes a text belongs to, or neither: the pre-training of statements about two pictures.

Of three scenes two are the pictures, and something true of each of the three is a text, so that first, second and
neither come equally often with the same two pictures. No text is true of two of the scenes. By turns a text is a whole
caption or, in the words of the statements, one detail, of the same kind for all three scenes.

The scenes of captions are on one background and like one another but for one property of one digit: another digit,
another colour, another place, or the colours of two digits exchanged. So are those of half of the details; the other
half are of any three scenes.

| form | text |
|---|---|
| `caption` | a red seven at the top left and a blue three at the top right on white |
| `detail` | a red seven; a red seven at the top; a red seven left of a blue three; exactly two red digits |
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from repkit.data.scene_demands import TASK_IMAGE_SIZE, ClassExample, Digits, draw_scene, pick, pick_two
from repkit.data.scene_tasks import relation_chain, scene_captions
from repkit.data.scenes import DIGIT_NAMES, PLACES, Composer, Scene, Strokes, cell_relation, colours_on

ASSIGNMENT_CLASSES = ("first", "second", "neither")


def assignments(strokes: Strokes, *, count: int, rng: np.random.Generator) -> Iterator[ClassExample]:
    """Examples of the task, three with each two pictures: a text of the first, of the second, and of neither."""
    yield from itertools.islice(_assignments(Composer(strokes, TASK_IMAGE_SIZE, rng), rng), count)


def _assignments(composer: Composer, rng: np.random.Generator) -> Iterator[ClassExample]:
    for form, compose in itertools.cycle({"caption": _captioned, "detail": _detailed}.items()):
        scenes, texts = compose(composer, rng)
        order = rng.permutation(len(scenes)).tolist()
        pictures = scenes[order[0]], scenes[order[1]]
        for i, class_name in zip(order, ASSIGNMENT_CLASSES, strict=True):
            yield ClassExample(pictures, texts[i], class_name, form)


def _captioned(composer: Composer, rng: np.random.Generator) -> tuple[list[Scene], list[str]]:
    """Three scenes, and a caption of each."""
    scenes = _alike_scenes(composer, rng)
    # Places tell any two of them apart; where the same digits are only placed anew, relations may be the same.
    texts = 4 if len({_phrases(scene.digits) for scene in scenes}) == len(scenes) else 2
    return scenes, [scene_captions(scene.digits, scene.background)[int(rng.integers(texts))] for scene in scenes]


def _detailed(composer: Composer, rng: np.random.Generator) -> tuple[list[Scene], list[str]]:
    """Three scenes, and of each a detail that the others do not show."""
    details = pick(DETAILS, rng)
    while True:
        if rng.random() < 0.5:
            scenes = _alike_scenes(composer, rng)
        else:
            scenes = [draw_scene(composer, [], rng, holds=lambda digits: True) for _ in range(3)]
        shown = [details(scene.digits) for scene in scenes]
        own = [sorted(here.difference(*shown[:i], *shown[i + 1 :])) for i, here in enumerate(shown)]
        if all(own):
            return scenes, [pick(texts, rng) for texts in own]


def _phrase_details(digits: Digits) -> frozenset[str]:
    return frozenset(f"a {phrase}" for phrase in _phrases(digits))


def _place_details(digits: Digits) -> frozenset[str]:
    return frozenset(f"a {placed.phrase} at the {PLACES[placed.cell]}" for placed in digits)


def _relation_details(digits: Digits) -> frozenset[str]:
    return frozenset(
        f"a {one.phrase} {relation} a {other.phrase}"
        for one, other in itertools.permutations(digits, 2)
        if (relation := cell_relation(one.cell, other.cell)) is not None
    )


def _colour_details(digits: Digits) -> frozenset[str]:
    colours = [placed.colour for placed in digits]
    return frozenset(f"exactly two {colour} digits" for colour in colours if colours.count(colour) == 2)


def _number_details(digits: Digits) -> frozenset[str]:
    return frozenset({f"exactly {DIGIT_NAMES[len(digits)]} digits"})


DETAILS: Sequence[Callable[[Digits], frozenset[str]]] = (
    _phrase_details,
    _place_details,
    _relation_details,
    _colour_details,
    _number_details,
)
"""Kinds of details: from the digits of a scene to all of that kind that it shows."""


class _Kind(NamedTuple):
    """A digit but for its handwriting."""

    digit: int
    colour: str
    cell: tuple[int, int]


def _alike_scenes(composer: Composer, rng: np.random.Generator) -> list[Scene]:
    """A scene and two variations of it, no two of which hold the same."""
    first = draw_scene(composer, [], rng, holds=lambda digits: relation_chain(digits) is not None)
    held = [[_Kind(placed.digit, placed.colour, placed.cell) for placed in first.digits]]
    scenes = [first]
    while len(scenes) < 3:
        varied = pick(VARIATIONS, rng)(held[0], first.background, rng)
        digits = tuple(composer.place(*kind) for kind in varied)
        is_scene = len(_phrases(digits)) == len(digits) and relation_chain(digits) is not None
        if is_scene and set(varied) not in map(set, held):
            scenes.append(Scene(composer.draw(digits, first.background), (), first.background, digits))
            held.append(varied)
    return scenes


def _phrases(digits: Digits) -> frozenset[str]:
    return frozenset(placed.phrase for placed in digits)


def _other_digit(digits: Sequence[_Kind], background: str, rng: np.random.Generator) -> list[_Kind]:
    del background
    return _with_one_changed(digits, rng, {"digit": int(rng.integers(len(DIGIT_NAMES)))})


def _other_colour(digits: Sequence[_Kind], background: str, rng: np.random.Generator) -> list[_Kind]:
    return _with_one_changed(digits, rng, {"colour": pick(colours_on(background), rng)})


def _other_place(digits: Sequence[_Kind], background: str, rng: np.random.Generator) -> list[_Kind]:
    del background
    taken = {digit.cell for digit in digits}
    return _with_one_changed(digits, rng, {"cell": pick([cell for cell in PLACES if cell not in taken], rng)})


def _with_one_changed(digits: Sequence[_Kind], rng: np.random.Generator, properties: Mapping[str, Any]) -> list[_Kind]:
    changed = int(rng.integers(len(digits)))
    return [digit._replace(**properties) if i == changed else digit for i, digit in enumerate(digits)]


def _exchanged_colours(digits: Sequence[_Kind], background: str, rng: np.random.Generator) -> list[_Kind]:
    del background
    i, j = pick_two(range(len(digits)), rng)
    exchanged = list(digits)
    exchanged[i], exchanged[j] = (
        digits[i]._replace(colour=digits[j].colour),
        digits[j]._replace(colour=digits[i].colour),
    )
    return exchanged


VARIATIONS: Sequence[Callable[[Sequence[_Kind], str, np.random.Generator], list[_Kind]]] = (
    _other_digit,
    _other_colour,
    _other_place,
    _exchanged_colours,
)
"""How a scene is varied, given its digits and its background."""
