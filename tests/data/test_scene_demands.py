import itertools

import numpy as np
import pytest

from repkit.data.scene_demands import (
    COUNTS,
    RELATED_CELLS,
    TASK_IMAGE_SIZE,
    Wanted,
    by_colour,
    by_digit,
    by_place,
    by_relation,
    draw_scene,
    pick_two,
)
from repkit.data.scenes import PLACES, Composer, PlacedDigit, colours_on, load_strokes


def placed(digit: int, colour: str, cell: tuple[int, int]) -> PlacedDigit:
    return PlacedDigit(digit, colour, *cell, stroke_id=0, top=12 * cell[0], left=12 * cell[1])


RED_SEVEN, BLUE_THREE, RED_ONE = placed(7, "red", (0, 0)), placed(3, "blue", (0, 2)), placed(1, "red", (2, 2))
SCENE = (RED_SEVEN, BLUE_THREE, RED_ONE)


def test_a_reference_finds_the_only_digit_that_its_words_fit():
    assert by_digit(7).find(SCENE) == RED_SEVEN
    assert by_colour("blue").find(SCENE) == BLUE_THREE
    assert by_place((2, 2)).find(SCENE) == RED_ONE
    rng = np.random.default_rng(0)
    assert by_relation("left of", by_colour("blue"), rng).find(SCENE) == RED_SEVEN
    assert by_relation("below", by_digit(3), rng).find(SCENE) == RED_ONE


def test_a_reference_finds_nothing_where_none_or_several_fit():
    rng = np.random.default_rng(0)
    assert by_colour("red").find(SCENE) is None
    assert by_colour("green").find(SCENE) is None
    assert by_place((1, 1)).find(SCENE) is None
    assert by_relation("left of", by_colour("red"), rng).find(SCENE) is None
    assert by_relation("above", by_colour("blue"), rng).find(SCENE) is None
    in_a_row = (*SCENE, placed(4, "green", (0, 1)))
    assert by_relation("left of", by_colour("blue"), rng).find(in_a_row) is None


def test_related_cells_are_all_pairs_in_a_row_or_column():
    pairs = [pair for group in RELATED_CELLS.values() for pair in group]
    expected = [(a, b) for a, b in itertools.permutations(PLACES, 2) if a[0] == b[0] or a[1] == b[1]]
    assert sorted(pairs) == sorted(expected)
    assert {len(group) for group in RELATED_CELLS.values()} == {9}


@pytest.mark.parametrize(
    "wanted",
    [
        [],
        [Wanted(7, "red", (1, 1))],
        [Wanted(colour="green"), Wanted(colour="blue")],
        [Wanted(colour="black")] * 3,
        [Wanted(cell=(0, 0)), Wanted(3), Wanted(3), Wanted(3)],
    ],
)
def test_a_scene_holds_what_is_wanted_and_can_be_seen(wanted):
    rng = np.random.default_rng(0)
    composer = Composer(load_strokes(), TASK_IMAGE_SIZE, rng)
    numbers = set()
    for _ in range(60):
        scene = draw_scene(composer, wanted, rng, holds=lambda digits: True)
        numbers.add(len(scene.digits))
        assert scene.image.shape == (TASK_IMAGE_SIZE, TASK_IMAGE_SIZE, 3)
        for digit, (number, colour, cell) in zip(scene.digits, wanted, strict=False):
            assert number in (None, digit.digit)
            assert colour in (None, digit.colour)
            assert cell in (None, digit.cell)
        assert {digit.colour for digit in scene.digits} <= set(colours_on(scene.background))
        assert len({digit.cell for digit in scene.digits}) == len(scene.digits)
        assert len({(digit.digit, digit.colour) for digit in scene.digits}) == len(scene.digits)
    assert numbers == {count for count in COUNTS if count >= len(wanted)}


def test_a_scene_is_drawn_until_it_holds():
    rng = np.random.default_rng(0)
    composer = Composer(load_strokes(), TASK_IMAGE_SIZE, rng)
    for _ in range(20):
        scene = draw_scene(composer, [], rng, holds=lambda digits: digits[0].digit == 5, counts=(3,))
        assert scene.digits[0].digit == 5
        assert len(scene.digits) == 3


def test_two_picked_are_different_and_every_pair_is_as_likely():
    rng = np.random.default_rng(0)
    pairs = [pick_two("abc", rng) for _ in range(6000)]
    counts = [pairs.count(pair) for pair in itertools.permutations("abc", 2)]
    assert sum(counts) == 6000
    assert min(counts) > 880
