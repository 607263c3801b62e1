import re

import numpy as np
import pytest

from repkit.data.scene_grounding import COLOURS_PROMPT, DIGITS_PROMPT, EMPTY_CELL, grounding
from repkit.data.scene_tasks import CAPTION_PROMPT, TASKS, captions
from repkit.data.scenes import DIGIT_NAMES, PLACES, load_strokes, pairs_caption, split_strokes


@pytest.fixture(scope="module")
def strokes():
    return split_strokes(load_strokes())


@pytest.mark.parametrize("task", TASKS)
def test_examples_depend_on_the_seed_alone(strokes, task):
    def made(seed):
        return list(TASKS[task](strokes["test"], count=24, rng=np.random.default_rng(seed)))

    def told(examples):
        return [(e.source_text, e.target_texts, e.scene.ground_truth, e.scene.image.tobytes()) for e in examples]

    assert told(made(1)) == told(made(1))
    assert told(made(1)) != told(made(2))


@pytest.mark.parametrize("task", TASKS)
def test_scenes_are_written_with_the_strokes_of_the_split(strokes, task):
    for split in strokes.values():
        examples = TASKS[task](split, count=100, rng=np.random.default_rng(0))
        assert {digit.stroke_id for e in examples for digit in e.scene.digits} <= set(split.ids.tolist())


def test_captions_name_every_digit_with_its_place_or_its_relations(strokes):
    cells = {name: cell for cell, name in PLACES.items()}
    for example in captions(strokes["train"], count=300, rng=np.random.default_rng(0)):
        assert example.source_text == CAPTION_PROMPT
        scene = example.scene
        places_last, places_first, chain, reversed_chain = example.target_texts
        listed = places_first.removeprefix(f"on {scene.background} ")
        assert places_last == f"{listed} on {scene.background}"
        named = [
            (cells[place], colour, DIGIT_NAMES.index(name))
            for colour, name, place in (
                re.fullmatch(r"a (\w+) (\w+) at the ([\w ]+)", part).groups() for part in re.split(", | and ", listed)
            )
        ]
        assert named == sorted((digit.cell, digit.colour, digit.digit) for digit in scene.digits)
        kinds = {f"{digit.colour} {DIGIT_NAMES[digit.digit]}": digit for digit in scene.digits}
        order = list(dict.fromkeys(re.findall("|".join(kinds), chain)))
        assert sorted(order) == sorted(kinds)
        assert chain == pairs_caption([kinds[kind] for kind in order], scene.background)
        assert reversed_chain == pairs_caption([kinds[kind] for kind in order[::-1]], scene.background)


def test_grounding_tells_what_is_at_a_place_and_where_it_is(strokes):
    cells = {name: cell for cell, name in PLACES.items()}
    empty = 0
    for index, example in enumerate(grounding(strokes["train"], count=300, rng=np.random.default_rng(0))):
        (target,) = example.target_texts
        digits = example.scene.digits
        match index % 4:
            case 0:
                assert example.source_text == DIGITS_PROMPT
                names = {digit.cell: DIGIT_NAMES[digit.digit] for digit in digits}
                assert target.split() == [names.get(cell, EMPTY_CELL) for cell in PLACES]
            case 1:
                assert example.source_text == COLOURS_PROMPT
                colours = {digit.cell: digit.colour for digit in digits}
                assert target.split() == [colours.get(cell, EMPTY_CELL) for cell in PLACES]
            case 2:
                (place,) = re.fullmatch(r"what is at the ([\w ]+)\?", example.source_text).groups()
                named = {digit.cell: f"a {digit.phrase}" for digit in digits}.get(cells[place])
                assert target == (EMPTY_CELL if named is None else named)
                empty += named is None
            case _:
                (phrase,) = re.fullmatch(r"where is the ([\w ]+)\?", example.source_text).groups()
                assert {digit.cell: digit.phrase for digit in digits}[cells[target.removeprefix("at the ")]] == phrase
    assert 8 <= empty <= 32
