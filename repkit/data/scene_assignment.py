"""Which of two digit scenes a text belongs to, or neither: the pre-training of statements about two pictures.

Three scenes on one background are like one another but for one property of one digit: another digit, another colour,
another place, or the colours of two digits exchanged. Two of them are the pictures, and the caption of each of the
three is a text, so that first, second and neither come equally often with the same two pictures. No text is true of two
of the scenes.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from repkit.data.scene_demands import TASK_IMAGE_SIZE, ClassExample, Digits, draw_scene, pick, pick_two
from repkit.data.scene_tasks import relation_chain, scene_captions
from repkit.data.scenes import DIGIT_NAMES, PLACES, Composer, Scene, Strokes, colours_on

ASSIGNMENT_CLASSES = ("first", "second", "neither")


def assignments(strokes: Strokes, *, count: int, rng: np.random.Generator) -> Iterator[ClassExample]:
    """Examples of the task, three with each two pictures: a text of the first, of the second, and of neither."""
    yield from itertools.islice(_assignments(Composer(strokes, TASK_IMAGE_SIZE, rng), rng), count)


def _assignments(composer: Composer, rng: np.random.Generator) -> Iterator[ClassExample]:
    while True:
        scenes = _alike_scenes(composer, rng)
        # Places tell any two of them apart; where the same digits are only placed anew, relations may be the same.
        texts = 4 if len({_phrases(scene.digits) for scene in scenes}) == len(scenes) else 2
        scenes = [scenes[i] for i in rng.permutation(len(scenes))]
        for scene, class_name in zip(scenes, ASSIGNMENT_CLASSES, strict=True):
            text = scene_captions(scene.digits, scene.background)[int(rng.integers(texts))]
            yield ClassExample((scenes[0], scenes[1]), text, class_name, "caption")


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
