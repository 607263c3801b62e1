"""The truth of statements is recomputed from the ground truth by a reader of them that shares no code with repkit."""

import collections
import json
import re

import numpy as np
import pytest

from repkit.data.scene_statements import STATEMENT_FORMS, statements
from repkit.data.scenes import load_strokes, split_strokes

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HOLDS = {
    "left of": lambda a, b: a["row"] == b["row"] and a["column"] < b["column"],
    "right of": lambda a, b: a["row"] == b["row"] and a["column"] > b["column"],
    "above": lambda a, b: a["column"] == b["column"] and a["row"] < b["row"],
    "below": lambda a, b: a["column"] == b["column"] and a["row"] > b["row"],
}
RELATION = "|".join(HOLDS)


def shows(thing, digits):
    if found := re.fullmatch(r"exactly two (\w+) digits", thing):
        return sum(a["colour"] == found[1] for a in digits) == 2
    if found := re.fullmatch(rf"(a \w+ \w+) ({RELATION}) (a \w+ \w+)", thing):
        return any(HOLDS[found[2]](a, b) for a in named(found[1], digits) for b in named(found[3], digits))
    return bool(named(thing, digits))


def named(phrase, digits):
    colour, number = re.fullmatch(r"a (\w+) (\w+)", phrase).groups()
    return [a for a in digits if (a["colour"], NUMBERS[a["digit"]]) == (colour, number)]


def the(phrase, digits):
    colour = re.fullmatch(r"the (\w+) digit", phrase)
    (only,) = [a for a in digits if (a["colour"] == colour[1] if colour else f"the {NUMBERS[a['digit']]}" == phrase)]
    return only


def side(one, other, digits):
    (relation,) = [name for name, holds in HOLDS.items() if holds(the(one, digits), the(other, digits))]
    return relation


def truth(text, pictures):
    def ask(pattern):
        return re.fullmatch(pattern, text)

    if found := ask(r"exactly one picture shows (.+)"):
        return sum(shows(found[1], digits) for digits in pictures) == 1
    if found := ask(r"both pictures show (.+) or neither does"):
        return sum(shows(found[1], digits) for digits in pictures) != 1
    if found := ask(r"one picture shows (.+) and the other one (.+)"):
        first, second = ([shows(thing, digits) for digits in pictures] for thing in found.groups())
        return (first[0] and second[1]) or (first[1] and second[0])
    if found := ask(r"both pictures show (.+) or both show (.+)"):
        return any(all(shows(thing, digits) for digits in pictures) for thing in found.groups())
    if found := ask(r"(?:both pictures have the same number|the pictures have different numbers) of (?:(\w+) )?digits"):
        counts = {sum(found[1] in (None, a["colour"]) for a in digits) for digits in pictures}
        return (len(counts) == 1) == ("same" in text)
    if found := ask(r"(the .+) has (?:the same colour in both pictures|different colours in the two pictures)"):
        return (len({the(found[1], digits)["colour"] for digits in pictures}) == 1) == ("same" in text)
    if found := ask(r"(the .+) is (?:the same number in both pictures|a different number in each picture)"):
        return (len({the(found[1], digits)["digit"] for digits in pictures}) == 1) == ("same" in text)
    found = ask(r"(the .+) is on (?:the same side|different sides) of (the .+) in (?:both|the two) pictures")
    assert found, text
    return (len({side(found[1], found[2], digits) for digits in pictures}) == 1) == ("same" in text)


@pytest.fixture(scope="module")
def examples():
    return list(statements(split_strokes(load_strokes())["train"], count=1440, rng=np.random.default_rng(5)))


def digits_of(example):
    return [json.loads(scene.ground_truth)["digits"] for scene in example.scenes]


def test_every_label_is_what_the_pictures_show(examples):
    for example in examples:
        assert truth(example.text, digits_of(example)) == (example.class_name == "true"), example.text


def test_the_forms_take_turns_and_come_in_both_wordings(examples):
    counts = collections.Counter(example.form for example in examples)
    assert counts == dict.fromkeys(STATEMENT_FORMS, 240)
    wordings = collections.Counter((e.form, bool(re.search("both|neither|same", e.text))) for e in examples)
    assert len(wordings) == 2 * len(STATEMENT_FORMS)
    assert min(wordings.values()) > 0.25 * 240


def picture(scene):
    return scene.image.tobytes()


@pytest.mark.parametrize(
    "key",
    [
        lambda e: (e.text, e.form),
        lambda e: picture(e.scenes[0]),
        lambda e: picture(e.scenes[1]),
        lambda e: (e.text, picture(e.scenes[0])),
        lambda e: (e.text, picture(e.scenes[1])),
    ],
    ids=["text", "first picture", "second picture", "text and first picture", "text and second picture"],
)
def test_a_part_of_an_example_is_true_as_often_as_false(examples, key):
    """Exactly, so that no guesser who sees no more is right more often than every second time."""
    counts = collections.defaultdict(collections.Counter)
    for example in examples:
        counts[key(example)][example.class_name] += 1
    assert all(count["true"] == count["false"] > 0 for count in counts.values())


def test_without_the_text_the_two_pictures_say_nothing(examples):
    """Whether the pictures are alike in what a statement of their form could be about."""
    alike = collections.Counter((truth(same(e.text), digits_of(e)), e.class_name) for e in examples)
    n = sum(alike.values())
    assert n == len(examples)
    for kind in (True, False):
        share = alike[kind, "true"] / (alike[kind, "true"] + alike[kind, "false"])
        # A statement makes four examples.
        assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(n / 4)


def same(text):
    """The wording of a statement that is true of equal kinds."""
    text = re.sub(r"^exactly one picture shows (.+)", r"both pictures show \1 or neither does", text)
    text = re.sub(r"^one picture shows (.+) and the other one (.+)", r"both pictures show \1 or both show \2", text)
    text = text.replace("the pictures have different numbers", "both pictures have the same number")
    text = text.replace("different colours in the two pictures", "the same colour in both pictures")
    text = text.replace("a different number in each picture", "the same number in both pictures")
    return re.sub(r"different sides of (.+) in the two", r"the same side of \1 in both", text)


def test_a_thing_is_not_there_though_its_parts_are(examples):
    for example in examples:
        if example.form == "existence":
            colour, number = re.search(r"a (\w+) (\w+)", example.text).groups()
            for digits in digits_of(example):
                assert colour in {a["colour"] for a in digits}
                assert number in {NUMBERS[a["digit"]] for a in digits}
