"""Which scenes a text is true of is recomputed from the ground truth by a reader that shares no code with repkit."""

import collections
import json
import re

import numpy as np
import pytest

from repkit.data.scene_assignment import assignments
from repkit.data.scenes import load_strokes, split_strokes

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLACES = ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"]
HOLDS = {
    "left of": lambda a, b: a["row"] == b["row"] and a["column"] < b["column"],
    "right of": lambda a, b: a["row"] == b["row"] and a["column"] > b["column"],
    "above": lambda a, b: a["column"] == b["column"] and a["row"] < b["row"],
    "below": lambda a, b: a["column"] == b["column"] and a["row"] > b["row"],
}


def fits(example, truth):
    """Whether the text of an example is true of a scene."""
    return (fits_caption if example.form == "caption" else fits_detail)(example.text, truth)


def fits_caption(text, truth):
    """Whether a caption is true of a scene."""
    background = truth["background"]
    of = {f"{a['colour']} {NUMBERS[a['digit']]}": a for a in truth["digits"]}
    if not re.search(rf"\bon {background}\b", text):
        return False
    text = re.sub(r"^on \w+ | on \w+$", "", text)
    phrases = re.findall(r"(?:a|the) (\w+ (?:{}))".format("|".join(NUMBERS)), text)
    if set(phrases) != set(of):
        return False
    if " at the " in text:
        said = re.findall(r"a (\w+ \w+) at the ([\w ]+?)(?=,| and |$)", text)
        assert len(said) == len(of)
        return all(PLACES[3 * of[phrase]["row"] + of[phrase]["column"]] == place for phrase, place in said)
    said = re.findall(r"(?:a|the) (\w+ \w+) (left of|right of|above|below) a (\w+ \w+)", text)
    assert len(said) == len(of) - 1
    return all(HOLDS[relation](of[one], of[other]) for one, relation, other in said)


def fits_detail(text, truth):
    """Whether a detail is true of a scene."""
    digits = truth["digits"]
    if (number := re.fullmatch(r"exactly (\w+) digits", text)) is not None:
        return NUMBERS.index(number[1]) == len(digits)
    if (two := re.fullmatch(r"exactly two (\w+) digits", text)) is not None:
        return sum(a["colour"] == two[1] for a in digits) == 2
    of = {f"a {a['colour']} {NUMBERS[a['digit']]}": a for a in digits}
    if (related := re.fullmatch(r"(a \w+ \w+) (left of|right of|above|below) (a \w+ \w+)", text)) is not None:
        one, relation, other = related.groups()
        return one in of and other in of and HOLDS[relation](of[one], of[other])
    phrase, _, place = text.partition(" at the ")
    return phrase in of and (not place or PLACES[3 * of[phrase]["row"] + of[phrase]["column"]] == place)


@pytest.fixture(scope="module")
def examples():
    return list(assignments(split_strokes(load_strokes())["train"], count=1500, rng=np.random.default_rng(5)))


def test_every_text_belongs_where_the_label_says_and_nowhere_else(examples):
    for example in examples:
        first, second = (fits(example, json.loads(scene.ground_truth)) for scene in example.scenes)
        assert (first, second) == (example.class_name == "first", example.class_name == "second"), example.text


def test_the_scenes_differ_in_one_property_of_one_digit_or_in_the_colours_of_two(examples):
    def kinds(truth):
        return {(a["digit"], a["colour"], a["row"], a["column"]) for a in truth["digits"]}

    for example in examples:
        if example.form == "detail":
            continue
        one, other = (json.loads(scene.ground_truth) for scene in example.scenes)
        assert one["background"] == other["background"]
        # Both may be variations of the third one.
        assert 1 <= len(kinds(one) - kinds(other)) == len(kinds(other) - kinds(one)) <= 4
        assert re.search(rf"\bon {one['background']}\b", example.text)


def test_with_the_same_two_pictures_each_class_comes_once(examples):
    for start in range(0, len(examples), 3):
        three = examples[start : start + 3]
        assert [example.class_name for example in three] == ["first", "second", "neither"]
        assert len({example.form for example in three}) == 1
        assert len({tuple(scene.image.tobytes() for scene in example.scenes) for example in three}) == 1


def test_guessing_by_the_words_is_right_every_third_time(examples):
    """The most frequent class of the first half's texts of that length, or with that word, asked of the second half."""
    half = len(examples) // 6 * 3
    keys = (lambda text: len(text.split()), lambda text: text.split()[-1], lambda text: text.split()[1])
    for key in (*keys, lambda text: re.sub("|".join(NUMBERS), "", text)):
        seen = collections.defaultdict(collections.Counter)
        for example in examples[:half]:
            seen[key(example.text)][example.class_name] += 1
        right = [seen[key(e.text)].most_common(1)[0][0] == e.class_name for e in examples[half:] if key(e.text) in seen]
        assert np.mean(right) < 1 / 3 + 4 * np.sqrt(2 / 9 / len(right))


def test_details_are_of_five_kinds(examples):
    kinds = collections.Counter(
        "number" if re.fullmatch(r"exactly \w+ digits", e.text)
        else "colour" if e.text.startswith("exactly two")
        else "place" if " at the " in e.text
        else "relation" if any(f" {relation} " in e.text for relation in HOLDS)
        else "digit"
        for e in examples
        if e.form == "detail"
    )  # fmt: skip
    assert len(kinds) == 5
    assert min(kinds.values()) > sum(kinds.values()) / 5 / 2
