"""Classes are recomputed from the ground truth by a reader of the texts that shares no code with repkit."""

import collections
import json
import re

import numpy as np
import pytest

from repkit.data.scene_entailment import ENTAILMENT_CLASSES, HYPOTHESIS_FORMS, entailments
from repkit.data.scenes import load_strokes, split_strokes

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = ["black", "white", "red", "green", "blue", "yellow"]
PLACES = ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"]
LINES = {
    "top row": lambda a: a["row"] == 0,
    "middle row": lambda a: a["row"] == 1,
    "bottom row": lambda a: a["row"] == 2,
    "left column": lambda a: a["column"] == 0,
    "middle column": lambda a: a["column"] == 1,
    "right column": lambda a: a["column"] == 2,
}
HOLDS = {
    "left of": lambda a, b: a["row"] == b["row"] and a["column"] < b["column"],
    "right of": lambda a, b: a["row"] == b["row"] and a["column"] > b["column"],
    "above": lambda a, b: a["column"] == b["column"] and a["row"] < b["row"],
    "below": lambda a, b: a["column"] == b["column"] and a["row"] > b["row"],
}


def fits(claim, digit):
    words = [word for word in claim.split() if word not in ("a", "an", "digit")]
    return all(word in (digit["colour"], NUMBERS[digit["digit"]]) for word in words)


def truth(text, digits):
    def ask(pattern):
        return re.fullmatch(pattern, text)

    if found := ask(r"there are at least two (\w+) digits"):
        return len([a for a in digits if a["colour"] == found[1]]) >= 2
    if found := ask(r"there is at most one (\w+) digit"):
        return len([a for a in digits if a["colour"] == found[1]]) <= 1
    if found := ask(r"there is (an? .+) in the (\w+ (?:row|column))"):
        return any(fits(found[1], a) for a in digits if LINES[found[2]](a))
    if found := ask(r"the digit at the ([\w ]+) is (.+)"):
        (there,) = [a for a in digits if PLACES[3 * a["row"] + a["column"]] == found[1]]
        return fits(found[2], there)
    found = ask(rf"the digit ({'|'.join(HOLDS)}) the (\w+ \w+) is (.+)")
    assert found, text
    (anchor,) = [a for a in digits if fits(found[2], a)]
    (there,) = [a for a in digits if HOLDS[found[1]](a, anchor)]
    return fits(found[3], there)


def class_of(text, seen, covered):
    """By trying all that the card may cover."""
    kinds = [(a["digit"], a["colour"]) for a in seen]
    possible = [
        {**covered, "digit": digit, "colour": colour}
        for digit in range(10)
        for colour in COLOURS
        if (digit, colour) not in kinds
    ]
    truths = {truth(text, [*seen, digit]) for digit in possible}
    return "neutral" if len(truths) == 2 else "entailment" if truths == {True} else "contradiction"


@pytest.fixture(scope="module")
def examples():
    return list(entailments(split_strokes(load_strokes())["train"], count=1440, rng=np.random.default_rng(5)))


def ground_truth(example):
    (scene,) = example.scenes
    return json.loads(scene.ground_truth)


def test_every_class_is_what_the_picture_says_of_the_text(examples):
    for example in examples:
        found = ground_truth(example)
        assert class_of(example.text, found["digits"], found["covered"]) == example.class_name, example.text


def test_a_grey_card_covers_the_digit_and_nothing_else(examples):
    for example in examples[:100]:
        found, image = ground_truth(example), example.scenes[0].image
        card = image[found["covered"]["top"] :, found["covered"]["left"] :][:8, :8]
        assert (card == 128).all()
        assert (image == 128).all(axis=-1).sum() == 64
        cells = {(a["row"], a["column"]) for a in [*found["digits"], found["covered"]]}
        assert len(cells) == len(found["digits"]) + 1 in (3, 4)


def test_each_text_comes_with_each_class_once(examples):
    assert collections.Counter(e.form for e in examples) == dict.fromkeys(HYPOTHESIS_FORMS, 360)
    for start in range(0, len(examples), 3):
        three = examples[start : start + 3]
        assert len({example.text for example in three}) == 1
        assert [example.class_name for example in three] == list(ENTAILMENT_CLASSES)


@pytest.mark.parametrize(
    "feature",
    [
        lambda found: len(found["digits"]),
        lambda found: (found["covered"]["row"], found["covered"]["column"]),
        lambda found: found["background"],
        lambda found: len({a["colour"] for a in found["digits"]}) < len(found["digits"]),
        lambda found: len({a["digit"] for a in found["digits"]}) < len(found["digits"]),
    ],
    ids=["number of digits", "place of the card", "background", "equal colours", "equal digits"],
)
def test_what_is_striking_in_a_picture_does_not_give_the_class_away(examples, feature):
    """The most frequent class of the first half's pictures like it, asked of the second half."""
    half = len(examples) // 2
    seen = collections.defaultdict(collections.Counter)
    for example in examples[:half]:
        seen[feature(ground_truth(example))][example.class_name] += 1
    right = [seen[feature(ground_truth(e))].most_common(1)[0][0] == e.class_name for e in examples[half:]]
    assert np.mean(right) < 1 / 3 + 4 * np.sqrt(2 / 9 / half)


def test_a_named_colour_is_one_that_a_digit_can_have_on_the_background(examples):
    """Else a contradiction could be told by the background alone."""
    for example in examples:
        background = ground_truth(example)["background"]
        assert f" {background} " not in f" {example.text} "
