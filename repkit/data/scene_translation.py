"""English to German where the image is needed: the German sentence says what the English one leaves out.

The English names a digit but not its colour, a row but not the place in it, a background but not its colour. German
says all of them, in words that agree in gender and case. The place decides the gender: a corner is feminine ("die
Ecke"), an edge masculine ("der Rand"), the middle neuter ("das Feld").

| English | German | from the image |
|---|---|---|
| a seven is left of the three | eine rote Sieben steht links von der blauen Drei | two colours |
| the seven stands at the top | die rote Sieben steht in der oberen rechten Ecke | colour, place in the row |
| a seven belongs at the top | eine rote Sieben gehört an den oberen Rand | colour, place in the row |
| the picture shows a seven on a background | das Bild zeigt eine rote Sieben auf einem gelben Hintergrund | colours |
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from repkit.data.scene_demands import (
    RELATED_CELLS,
    TASK_IMAGE_SIZE,
    Digits,
    Reference,
    TaskExample,
    Wanted,
    by_digit,
    draw_scene,
    pick,
    pick_two,
)
from repkit.data.scenes import COLOURS, DIGIT_NAMES, Composer, Strokes

Article = Literal["definite", "indefinite"]
Gender = Literal["masculine", "feminine", "neuter"]
Case = Literal["nominative", "accusative", "dative"]

GERMAN_DIGITS = ("Null", "Eins", "Zwei", "Drei", "Vier", "Fünf", "Sechs", "Sieben", "Acht", "Neun")
"""The names of the digits, all of them feminine."""

GERMAN_COLOURS: Mapping[str, str] = {
    "black": "schwarz",
    "white": "weiß",
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
}
"""English colour -> the stem of the German adjective."""

GERMAN_RELATIONS: Mapping[str, str] = {
    "left of": "links von",
    "right of": "rechts von",
    "above": "über",
    "below": "unter",
}
"""English relation -> the German one, which takes the dative."""

ROWS = ("at the top", "in the middle", "at the bottom")
"""Row of the grid -> its English name."""

# (article, gender) -> article and adjective ending in the three cases.
_CASES: Sequence[Case] = ("nominative", "accusative", "dative")
_DECLENSION: Mapping[tuple[Article, Gender], Sequence[tuple[str, str]]] = {
    ("definite", "masculine"): (("der", "e"), ("den", "en"), ("dem", "en")),
    ("definite", "feminine"): (("die", "e"), ("die", "e"), ("der", "en")),
    ("definite", "neuter"): (("das", "e"), ("das", "e"), ("dem", "en")),
    ("indefinite", "masculine"): (("ein", "er"), ("einen", "en"), ("einem", "en")),
    ("indefinite", "feminine"): (("eine", "e"), ("eine", "e"), ("einer", "en")),
    ("indefinite", "neuter"): (("ein", "es"), ("ein", "es"), ("einem", "en")),
}
_CONTRACTIONS = {"an dem": "am", "in dem": "im", "in das": "ins"}


class Sentence(NamedTuple):
    """An English sentence without its scene.

    Attributes:
        english: its words.
        named: the digits that it names.
        wanted: digits that the scene must hold.
        german: digits and background of the scene -> the translation.
    """

    english: str
    named: Sequence[Reference]
    wanted: list[Wanted]
    german: Callable[[Digits, str], str]


def translations(strokes: Strokes, *, count: int, rng: np.random.Generator) -> Iterator[TaskExample]:
    """Examples of the translation task, the sentence forms by turns; each has one German sentence."""
    composer = Composer(strokes, TASK_IMAGE_SIZE, rng)
    forms = (_relation_sentence, _standing_sentence, _belonging_sentence, _picture_sentence)
    for index in range(count):
        sentence = forms[index % len(forms)](rng)
        scene = draw_scene(
            composer,
            sentence.wanted,
            rng,
            holds=lambda digits, named=sentence.named: all(reference.find(digits) for reference in named),
        )
        yield TaskExample(scene, sentence.english, (sentence.german(scene.digits, scene.background),))


def noun_phrase(article: Article, stems: Sequence[str], noun: str, gender: Gender, case: Case) -> str:
    """Article, adjectives and noun in agreement.

    >>> noun_phrase("indefinite", ["rot"], "Sieben", "feminine", "dative")
    'einer roten Sieben'
    >>> noun_phrase("definite", ["ober"], "Rand", "masculine", "accusative")
    'den oberen Rand'
    """
    word, ending = _DECLENSION[article, gender][_CASES.index(case)]
    return " ".join([word, *(stem + ending for stem in stems), noun])


def place_phrase(cell: tuple[int, int], case: Case) -> str:
    """Where a cell is: in the dative for a digit that stands there, in the accusative for one that belongs there.

    >>> place_phrase((0, 2), "dative"), place_phrase((0, 1), "accusative"), place_phrase((1, 1), "accusative")
    ('in der oberen rechten Ecke', 'an den oberen Rand', 'ins mittlere Feld')
    """
    vertical, horizontal = ("ober", None, "unter")[cell[0]], ("link", None, "recht")[cell[1]]
    stems = [stem for stem in (vertical, horizontal) if stem is not None]
    match len(stems):
        case 2:
            phrase = "in " + noun_phrase("definite", stems, "Ecke", "feminine", case)
        case 1:
            phrase = "an " + noun_phrase("definite", stems, "Rand", "masculine", case)
        case _:
            phrase = "in " + noun_phrase("definite", ["mittler"], "Feld", "neuter", case)
    for apart, contracted in _CONTRACTIONS.items():
        phrase = phrase.replace(f"{apart} ", f"{contracted} ")
    return phrase


class _Named(NamedTuple):
    """A digit as both languages name it."""

    digit: int
    article: Article

    @property
    def reference(self) -> Reference:
        return by_digit(self.digit)

    @property
    def english(self) -> str:
        name = DIGIT_NAMES[self.digit]
        if self.article == "definite":
            return f"the {name}"
        return f"an {name}" if name == "eight" else f"a {name}"

    def german(self, digits: Digits, case: Case) -> str:
        placed = self.reference.find(digits)
        assert placed is not None  # The scene was drawn to hold it.
        return noun_phrase(self.article, [GERMAN_COLOURS[placed.colour]], GERMAN_DIGITS[self.digit], "feminine", case)


def _named(digit: int, rng: np.random.Generator) -> _Named:
    return _Named(digit, pick(("definite", "indefinite"), rng))


def _relation_sentence(rng: np.random.Generator) -> Sentence:
    first, second = (_named(digit, rng) for digit in pick_two(range(len(DIGIT_NAMES)), rng))
    relation = pick(list(RELATED_CELLS), rng)
    cells = pick(RELATED_CELLS[relation], rng)
    return Sentence(
        f"{first.english} is {relation} {second.english}",
        (first.reference, second.reference),
        [
            Wanted(named.digit, pick(list(COLOURS), rng), cell)
            for named, cell in zip((first, second), cells, strict=True)
        ],
        lambda digits, background: (
            f"{first.german(digits, 'nominative')} steht {GERMAN_RELATIONS[relation]} {second.german(digits, 'dative')}"
        ),
    )


def _standing_sentence(rng: np.random.Generator) -> Sentence:
    return _place_sentence("stands", "steht", "dative", rng)


def _belonging_sentence(rng: np.random.Generator) -> Sentence:
    return _place_sentence("belongs", "gehört", "accusative", rng)


def _place_sentence(english_verb: str, german_verb: str, case: Case, rng: np.random.Generator) -> Sentence:
    named = _named(int(rng.integers(len(DIGIT_NAMES))), rng)
    cell = (int(rng.integers(3)), int(rng.integers(3)))
    return Sentence(
        f"{named.english} {english_verb} {ROWS[cell[0]]}",
        (named.reference,),
        [Wanted(named.digit, pick(list(COLOURS), rng), cell)],
        lambda digits, background: f"{named.german(digits, 'nominative')} {german_verb} {place_phrase(cell, case)}",
    )


def _picture_sentence(rng: np.random.Generator) -> Sentence:
    named = _named(int(rng.integers(len(DIGIT_NAMES))), rng)

    def german(digits: Digits, background: str) -> str:
        ground = noun_phrase("indefinite", [GERMAN_COLOURS[background]], "Hintergrund", "masculine", "dative")
        return f"das Bild zeigt {named.german(digits, 'accusative')} auf {ground}"

    return Sentence(
        f"the picture shows {named.english} on a background",
        (named.reference,),
        [Wanted(named.digit, pick(list(COLOURS), rng))],
        german,
    )
