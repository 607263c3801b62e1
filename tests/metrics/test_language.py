"""Metrics of texts against literal loops, published values and closed forms."""

import importlib.util
import sys

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.metrics import bleu4, cider_d, exact_match, most_common_answers, normalize_answer, vqa_accuracy
from tests.reference import language as reference

# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Yes", "yes"),
        ("  the Red\n seven\t", "red 7"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("a", ""),
        ("an apple and the pear", "apple and pear"),
        ("theory", "theory"),
        # A mark beside a space goes; between letters it parts them.
        ("left, right", "left right"),
        ("left-right", "left right"),
        ("left - right", "left right"),
        ("black/white", "black white"),
        ("what?!", "what"),
        ("(two)", "2"),
        # Grouped digits are put together, and so is all else of that answer.
        ("1,000", "1000"),
        ("1,000 red-ish", "1000 redish"),
        # A period stays before a digit only.
        ("St. Paul", "st paul"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        # Contractions.
        ("dont", "don't"),
        ("Don't", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("ows'at", "ows'at"),
        ("'ows'at", "'ow's'at"),
        ("well", "well"),
    ],
)
def test_answers_are_normalised_as_in_vqa(answer, normalized):
    assert normalize_answer(answer) == normalized


def test_a_normalised_answer_stays_as_it_is():
    words = ["The cat", "dont", "3.5", "black/white", "twelve", "seven", "1,000", "'ows'at"]
    assert [normalize_answer(normalize_answer(word)) for word in words] == [normalize_answer(word) for word in words]


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_accuracy_by_the_number_of_matches(matches, accuracy):
    answers = ["right"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy(["right"], [answers]) == pytest.approx([accuracy])
    assert reference.vqa_accuracy("right", answers) == pytest.approx(accuracy)


def test_accuracy_is_that_of_leaving_out_one_after_the_other():
    rng = np.random.default_rng(0)
    words = ["one", "2", "two", "The two", "red", "Red."]
    predictions = [str(word) for word in rng.choice([*words, "blue"], 50)]
    answers = [[str(word) for word in rng.choice(words, 10, p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1])] for _ in predictions]
    expected = [
        reference.vqa_accuracy(normalize_answer(prediction), [normalize_answer(answer) for answer in given])
        for prediction, given in zip(predictions, answers, strict=True)
    ]
    assert len(set(expected)) > 4
    np.testing.assert_allclose(vqa_accuracy(predictions, answers), expected, rtol=1e-12)


def test_other_than_ten_answers_are_refused():
    with pytest.raises(InputError, match="expected 10 answers to each question, question 1 has 9"):
        vqa_accuracy(["a", "b"], [["a"] * 10, ["b"] * 9])


def test_the_most_common_answers_share_their_place():
    assert most_common_answers(["Red", "red.", "blue", "blue", "two"]) == ["red", "blue"]


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


def test_exact_match_minds_case_and_not_white_space():
    references = [["ein Haus", "das Haus"]] * 4
    assert exact_match(["das  Haus ", "Das Haus", "das", ""], references).tolist() == [True, False, False, False]


def test_bleu_is_one_for_references_and_zero_without_a_common_word():
    references = [["a red seven on blue", "a seven"], ["eine rote Sieben über Grün"]]
    assert bleu4([given[0] for given in references], references) == 1.0
    assert bleu4(["x x x x x", "y y y y y"], references) == 0.0


def test_bleu_with_different_numbers_of_references():
    """One n-gram precision after the other by hand; the closest reference of the first has 6 words, of the second 4."""
    predictions = ["a red seven on blue ground", "a green two here"]
    references = [["a red seven on a blue ground", "the red seven on blue ground"], ["a green two there"]]
    # By order: in the first 6 of 6 words, 5 of 5, 4 of 4 and 3 of 3; in the second 3 of 4, 2 of 3, 1 of 2, 0 of 1.
    # "a red", "a red seven" and "a red seven on" are in the first reference, the rest in the second.
    expected = ((9 / 10) * (7 / 8) * (5 / 6) * (3 / 4)) ** 0.25
    assert bleu4(predictions, references) == pytest.approx(expected, rel=1e-9)


def test_a_missing_sacrebleu_is_said(monkeypatch):
    assert importlib.util.find_spec("sacrebleu")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(InputError, match=r'pip install "repkit\[language\]"'):
        bleu4(["a"], [["a"]])


def _words_of(numbers):
    return [[f"w{number}" for number in sentence] for sentence in numbers]


def test_cider_d_gives_published_values():
    """The example in the README of aac-metrics (github.com/Labbeti/aac-metrics), its words numbered.

    CIDEr-D sees only which words are equal. The README has 0.9614 for the corpus and [1.3641, 0.5587] for its two
    examples, and its package agrees with the COCO caption evaluation.
    """
    candidates = _words_of([[0, 1, 2, 3], [12, 13]])
    references = [
        _words_of([[0, 1, 4], [5, 4], [0, 1, 2, 3, 6, 0, 7, 2, 8, 9, 10, 11]]),
        _words_of([[12, 2, 14, 15, 16, 0, 17]]),
    ]
    scores = cider_d(candidates, references)
    assert scores.round(4).tolist() == [1.3641, 0.5587]
    assert scores.mean().round(4) == 0.9614


@pytest.mark.parametrize("seed", range(4))
def test_cider_d_equals_the_loop(seed):
    rng = np.random.default_rng(seed)

    def sentence():
        # Few words, so that n-grams come several times; also empty sentences and those shorter than an n-gram.
        return [f"w{number}" for number in rng.integers(0, 4, rng.integers(0, 12))]

    references = [[sentence() for _ in range(rng.integers(1, 5))] for _ in range(8)]
    candidates = [given[0] if rng.random() < 0.3 else sentence() for given in references]
    scores = cider_d(candidates, references)
    assert np.ptp(scores) > 0.5
    np.testing.assert_allclose(scores, reference.cider_d(candidates, references), rtol=1e-12, atol=1e-12)


def test_cider_d_is_ten_for_the_only_reference():
    references = [["a red seven on blue ground"], ["two green threes, left and right"], ["one large eight below"]]
    assert cider_d([given[0] for given in references], references) == pytest.approx([10.0] * 3)
    assert cider_d(["x", "y z", ""], references).tolist() == [0.0, 0.0, 0.0]


def test_cider_d_reads_text_as_words():
    references = [["A red Seven, on blue-ish ground!"], ["the mother's two threes"]]
    words = [[["a", "red", "seven", "on", "blue-ish", "ground"]], [["the", "mother's", "two", "threes"]]]
    assert cider_d(["a red seven", "the two threes"], references) == pytest.approx(
        cider_d([["a", "red", "seven"], ["the", "two", "threes"]], words), rel=1e-15
    )


def test_cider_d_of_one_example_is_refused():
    with pytest.raises(InputError, match="expected at least 2 examples"):
        cider_d(["a"], [["a"]])


@pytest.mark.parametrize("metric", [vqa_accuracy, exact_match, bleu4, cider_d])
@pytest.mark.parametrize(
    ("predictions", "references", "said"),
    [
        (["a"], [["a"] * 10] * 2, "got 1 predictions and 2 lists of references"),
        ([], [], "got 0 predictions"),
        (["a", "b"], [["a"] * 10, []], r"at least one, for prediction 1, got \[\]"),
        (["a", "b"], [["a"] * 10, "b"], "at least one, for prediction 1, got 'b'"),
    ],
)
def test_references_that_do_not_fit_are_refused(metric, predictions, references, said):
    with pytest.raises(InputError, match=f"^{metric.__name__}: .*{said}"):
        metric(predictions, references)
