"""German is recomputed from full forms that are written out here."""

import collections
import json
import re

import numpy as np
import pytest

from repkit.data.scene_translation import noun_phrase, place_phrase, translations
from repkit.data.scenes import load_strokes, split_strokes

ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GERMAN = ["Null", "Eins", "Zwei", "Drei", "Vier", "Fünf", "Sechs", "Sieben", "Acht", "Neun"]
# Adjective after "die", "eine" in nominative and accusative; in all other cases that occur; they are feminine.
ROTE = {"black": "schwarze", "white": "weiße", "red": "rote", "green": "grüne", "blue": "blaue", "yellow": "gelbe"}
ROTEN = {
    "black": "schwarzen",
    "white": "weißen",
    "red": "roten",
    "green": "grünen",
    "blue": "blauen",
    "yellow": "gelben",
}
PLACES = {
    ("stands", 0, 0): "in der oberen linken Ecke",
    ("stands", 0, 1): "am oberen Rand",
    ("stands", 0, 2): "in der oberen rechten Ecke",
    ("stands", 1, 0): "am linken Rand",
    ("stands", 1, 1): "im mittleren Feld",
    ("stands", 1, 2): "am rechten Rand",
    ("stands", 2, 0): "in der unteren linken Ecke",
    ("stands", 2, 1): "am unteren Rand",
    ("stands", 2, 2): "in der unteren rechten Ecke",
    ("belongs", 0, 0): "in die obere linke Ecke",
    ("belongs", 0, 1): "an den oberen Rand",
    ("belongs", 0, 2): "in die obere rechte Ecke",
    ("belongs", 1, 0): "an den linken Rand",
    ("belongs", 1, 1): "ins mittlere Feld",
    ("belongs", 1, 2): "an den rechten Rand",
    ("belongs", 2, 0): "in die untere linke Ecke",
    ("belongs", 2, 1): "an den unteren Rand",
    ("belongs", 2, 2): "in die untere rechte Ecke",
}
RELATIONS = {"left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"}


@pytest.fixture(scope="module")
def examples():
    strokes = split_strokes(load_strokes())["train"]
    return list(translations(strokes, count=4000, rng=np.random.default_rng(5)))


def recomputed(english, truth):
    """The German sentence, and the words in it that the English does not say."""

    def only(name):
        (digit,) = [digit for digit in truth["digits"] if digit["digit"] == ENGLISH.index(name)]
        return digit

    def nominative(article, name):
        word = {"the": "die", "a": "eine", "an": "eine"}[article]
        return f"{word} {ROTE[only(name)['colour']]} {GERMAN[ENGLISH.index(name)]}"

    def dative(article, name):
        word = {"the": "der", "a": "einer", "an": "einer"}[article]
        return f"{word} {ROTEN[only(name)['colour']]} {GERMAN[ENGLISH.index(name)]}"

    if found := re.fullmatch(r"(\w+) (\w+) is (left of|right of|above|below) (\w+) (\w+)", english):
        return f"{nominative(found[1], found[2])} steht {RELATIONS[found[3]]} {dative(found[4], found[5])}"
    if found := re.fullmatch(r"(\w+) (\w+) (stands|belongs) (at the top|in the middle|at the bottom)", english):
        digit = only(found[2])
        assert digit["row"] == ["at the top", "in the middle", "at the bottom"].index(found[4])
        verb = {"stands": "steht", "belongs": "gehört"}[found[3]]
        return f"{nominative(found[1], found[2])} {verb} {PLACES[found[3], digit['row'], digit['column']]}"
    found = re.fullmatch(r"the picture shows (\w+) (\w+) on a background", english)
    assert found, english
    # The accusative of feminine nouns is their nominative.
    return f"das Bild zeigt {nominative(found[1], found[2])} auf einem {ROTEN[truth['background']]} Hintergrund"


def test_every_translation_says_what_the_scene_shows(examples):
    for example in examples:
        truth = json.loads(example.scene.ground_truth)
        assert example.target_texts == (recomputed(example.source_text, truth),)


def test_stated_relations_hold(examples):
    holds = {
        "left of": lambda a, b: a.row == b.row and a.column < b.column,
        "right of": lambda a, b: a.row == b.row and a.column > b.column,
        "above": lambda a, b: a.column == b.column and a.row < b.row,
        "below": lambda a, b: a.column == b.column and a.row > b.row,
    }
    for example in examples:
        found = re.fullmatch(r"\w+ (\w+) is (left of|right of|above|below) \w+ (\w+)", example.source_text)
        if found:
            digits = {ENGLISH[digit.digit]: digit for digit in example.scene.digits}
            assert holds[found[2]](digits[found[1]], digits[found[3]])


def test_all_words_and_forms_occur(examples):
    words = {word for example in examples for word in example.target_texts[0].split()}
    assert words >= {*GERMAN, *ROTE.values(), *ROTEN.values()}
    assert words >= {word for phrase in PLACES.values() for word in phrase.split()}
    assert {"die", "der", "eine", "einer", "einem"} <= words
    assert any(example.source_text.startswith("an eight ") for example in examples)
    assert not any(re.search(r"\ba eight\b|\ban (?!eight)", example.source_text) for example in examples)


@pytest.mark.parametrize(
    ("article", "gender", "forms"),
    [
        ("definite", "masculine", ["der rote Rand", "den roten Rand", "dem roten Rand"]),
        ("definite", "feminine", ["die rote Ecke", "die rote Ecke", "der roten Ecke"]),
        ("definite", "neuter", ["das rote Feld", "das rote Feld", "dem roten Feld"]),
        ("indefinite", "masculine", ["ein roter Rand", "einen roten Rand", "einem roten Rand"]),
        ("indefinite", "feminine", ["eine rote Ecke", "eine rote Ecke", "einer roten Ecke"]),
        ("indefinite", "neuter", ["ein rotes Feld", "ein rotes Feld", "einem roten Feld"]),
    ],
)
def test_noun_phrases_agree_in_gender_and_case(article, gender, forms):
    noun = forms[0].split()[-1]
    cases = ("nominative", "accusative", "dative")
    assert [noun_phrase(article, ["rot"], noun, gender, case) for case in cases] == forms


@pytest.mark.parametrize(("verb", "case"), [("stands", "dative"), ("belongs", "accusative")])
def test_every_place_has_its_phrase(verb, case):
    for row in range(3):
        for column in range(3):
            assert place_phrase((row, column), case) == PLACES[verb, row, column]


def unsaid(example):
    """What the German sentence says and the English one does not: colours, and the place in the row."""
    german = example.target_texts[0]
    colours = re.findall("|".join(stem.removesuffix("e") for stem in ROTE.values()), german)
    place = next((phrase for phrase in PLACES.values() if german.endswith(phrase)), None)
    return tuple(colours), place


def test_the_english_sentence_alone_does_not_give_the_german_one(examples):
    """With the grammar known and everything unsaid guessed as it was most often, for each form and row."""
    half = len(examples) // 2
    rows = [re.sub("|".join(ENGLISH), "", re.sub(r"\b(the|an?) ", "", e.source_text)) for e in examples]
    for keys in (rows, [example.source_text for example in examples]):
        seen = collections.defaultdict(collections.Counter)
        for key, example in zip(keys[:half], examples[:half], strict=True):
            seen[key][unsaid(example)] += 1
        guesses = {key: counts.most_common(1)[0][0] for key, counts in seen.items()}
        right = sum(guesses.get(key) == unsaid(e) for key, e in zip(keys[half:], examples[half:], strict=True))
        # At best one in 36 (two colours), in 18 (a colour and the place in the row), in 18 (colour and background).
        assert right / half < 0.07
