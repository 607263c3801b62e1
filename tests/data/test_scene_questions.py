"""The answers are recomputed from the ground truth by a parser of the questions that shares no code with repkit."""

import collections
import json
import re

import numpy as np
import pytest

from repkit.data.scene_questions import QUESTION_TYPES, annotated, questions
from repkit.data.scenes import load_strokes, split_strokes

NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
]
COLOURS = ["black", "white", "red", "green", "blue", "yellow"]
PLACES = {
    "top left": (0, 0),
    "top": (0, 8),
    "top right": (0, 16),
    "left": (8, 0),
    "centre": (8, 8),
    "right": (8, 16),
    "bottom left": (16, 0),
    "bottom": (16, 8),
    "bottom right": (16, 16),
}
HOLDS = {
    "left of": lambda a, b: a["top"] == b["top"] and a["left"] < b["left"],
    "right of": lambda a, b: a["top"] == b["top"] and a["left"] > b["left"],
    "above": lambda a, b: a["left"] == b["left"] and a["top"] < b["top"],
    "below": lambda a, b: a["left"] == b["left"] and a["top"] > b["top"],
}
ANSWERS = {
    "digit": NUMBERS[:10],
    "colour": COLOURS,
    "count": NUMBERS[:5],
    "relation": ["left", "right", "above", "below"],
    "yes_no": ["yes", "no"],
    "sum": NUMBERS,
}
GUESSING = {
    "digit": 1 / 10,
    "colour": 1 / 6,
    "count": (1 / 3 + 1 / 4) / 2,
    "relation": 1 / 4,
    "yes_no": 1 / 2,
    "sum": 1 / 19,
}


def meant(phrase, digits):
    """All digits that a description fits."""
    if related := re.fullmatch(r"the digit (left of|right of|above|below) (the .+)", phrase):
        return [a for b in meant(related[2], digits) for a in digits if HOLDS[related[1]](a, b)]
    if place := re.fullmatch(r"the digit at the (.+)", phrase):
        return [a for a in digits if (a["top"], a["left"]) == PLACES[place[1]]]
    if colour := re.fullmatch(r"the (\w+) digit", phrase):
        return [a for a in digits if a["colour"] == colour[1]]
    name = re.fullmatch(r"the (\w+)", phrase)
    assert name, phrase
    return [a for a in digits if a["digit"] == NUMBERS.index(name[1])]


def the(phrase, digits):
    if related := re.fullmatch(r"the digit (?:left of|right of|above|below) (the .+)", phrase):
        the(related[1], digits)  # what it is related to must be clear as well
    (only,) = meant(phrase, digits)
    return only


def recomputed(question, digits):
    def ask(pattern):
        return re.fullmatch(pattern, question)

    if found := ask(r"what is the sum of (the .+) and (the .+)\?") or ask(r"how much is (the .+) plus (the .+)\?"):
        return NUMBERS[the(found[1], digits)["digit"] + the(found[2], digits)["digit"]]
    if found := ask(r"(?:what is|which number is) (the .+)\?"):
        return NUMBERS[the(found[1], digits)["digit"]]
    if found := ask(r"(?:what colour is|which colour has) (the .+)\?"):
        return the(found[1], digits)["colour"]
    if ask(r"how many digits are there\?"):
        return NUMBERS[len(digits)]
    if found := ask(r"how many digits are (\w+)\?") or ask(r"how many (\w+) digits are there\?"):
        return NUMBERS[len([a for a in digits if a["colour"] == found[1]])]
    if found := ask(r"(?:where|on which side) is (the .+), seen from (the .+)\?"):
        a, b = the(found[1], digits), the(found[2], digits)
        (relation,) = [name for name, holds in HOLDS.items() if holds(a, b)]
        return relation.removesuffix(" of")
    if found := ask(r"(?:is there|do you see) a (\w+) (\w+)\?"):
        kind = (found[1], NUMBERS.index(found[2]))
        return "yes" if kind in [(a["colour"], a["digit"]) for a in digits] else "no"
    found = ask(r"is (the .+) (left of|right of|above|below) (the .+)\?")
    assert found, question
    a, b = the(found[1], digits), the(found[3], digits)
    assert sum(holds(a, b) for holds in HOLDS.values()) == 1
    return "yes" if HOLDS[found[2]](a, b) else "no"


def template(question):
    places = sorted(PLACES, key=len, reverse=True)
    for kind, words in (("RELATION", HOLDS), ("PLACE", places), ("COLOUR", COLOURS), ("NUMBER", NUMBERS)):
        question = re.sub(rf"\b({'|'.join(words)})\b", kind, question)
    return question


@pytest.fixture(scope="module")
def examples():
    strokes = split_strokes(load_strokes())["train"]
    return list(questions(strokes, count=6000, rng=np.random.default_rng(5)))


def test_every_answer_is_what_the_scene_shows(examples):
    for example in examples:
        digits = json.loads(example.scene.ground_truth)["digits"]
        assert recomputed(example.source_text, digits) == example.answer, example.source_text


def test_all_types_and_all_their_answers_occur_alike(examples):
    assert list(QUESTION_TYPES) == list(ANSWERS)
    for question_type, possible in ANSWERS.items():
        counts = collections.Counter(e.answer for e in examples if e.question_type == question_type)
        assert counts.total() == 1000
        assert set(counts) == set(possible)
        if question_type != "count":
            assert min(counts.values()) > 0.6 * 1000 / len(possible)


def test_there_are_few_wordings(examples):
    words = {word for e in examples for word in re.findall(r"\w+", e.source_text)}
    assert len(words) < 60
    assert len({template(e.source_text) for e in examples}) < 40


@pytest.mark.parametrize("key", [lambda text: "", template, lambda text: text], ids=["type", "wording", "text"])
def test_guessing_without_the_image_is_as_poor_as_the_number_of_answers_says(examples, key):
    """The most frequent answer of the first part's questions of that key, asked of the second part."""
    half = len(examples) // 2
    seen = collections.defaultdict(collections.Counter)
    for example in examples[:half]:
        for level in ("", key(example.source_text)):
            seen[example.question_type, level][example.answer] += 1
    right = collections.Counter()
    for example in examples[half:]:
        question_type = example.question_type
        counts = seen.get((question_type, key(example.source_text))) or seen[question_type, ""]
        right[question_type] += counts.most_common(1)[0][0] == example.answer
    for question_type, share in GUESSING.items():
        n = half / len(GUESSING)
        assert right[question_type] / n < share + 4 * np.sqrt(share * (1 - share) / n), question_type


def test_ten_annotators_mostly_say_the_truth_in_one_way_or_another(examples):
    said = collections.Counter()
    for example in examples:
        mistakes = 0
        assert len(example.target_texts) == 10
        for answer in example.target_texts:
            number = NUMBERS.index(example.answer) if example.answer in NUMBERS else None
            plain = answer.lower().rstrip(".")
            truth = plain == example.answer or plain == str(number)
            assert truth or answer in ANSWERS[example.question_type]
            said["plain" if answer == example.answer else "notation" if truth else "mistake"] += 1
            mistakes += not truth
        assert mistakes < 5
    shares = {kind: count / said.total() for kind, count in said.items()}
    assert shares == pytest.approx({"plain": 0.75, "notation": 0.2, "mistake": 0.05}, abs=0.01)


def test_other_notations_are_a_numeral_or_a_capital_and_a_full_stop():
    rng = np.random.default_rng(0)
    assert {a for _ in range(40) for a in annotated("seven", ["seven", "six"], rng)} == {"seven", "7", "six"}
    assert {a for _ in range(40) for a in annotated("left", ["left", "right"], rng)} == {"left", "Left.", "right"}
