"""Metrics of generated texts: answers, captions and translations against what people wrote.

They work on strings on the host. Those that have a value for each text return all of them, in order; the mean is the
metric, and parts of it, such as by type of question, are means of parts.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from repkit.checks import InputError

Text: TypeAlias = str | Sequence[str]
"""A text, or its tokens."""


# ---------------------------------------------------------------------------------------------------------------------
# Answers

VQA_ANSWERS = 10
"""How many people answered each question."""

_VQA_MATCHES = 3
"""An answer that as many of nine people gave is right."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're "
    "why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
# What is left of a contraction without one of its apostrophes.
_MISSPELT = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
}


def normalize_answer(answer: str) -> str:
    """An answer as VQA compares it: lower case, digits for number words, no articles and no punctuation.

    A mark beside a space is left out, one between letters becomes a space; periods go unless a digit follows, and
    contractions get their apostrophes back. White space is collapsed.

    Args:
        answer: as a person or a model wrote it.

    Returns:
        The answer to be compared; it may be empty.

    Example:
        >>> normalize_answer(" The two cats, dont know. ")
        "2 cats don't know"

    References:
        The evaluation code of VQA 2.0 (Agrawal et al., "VQA: Visual Question Answering", arXiv 1505.00468). Left out
        are the entries of its table of contractions that never match a word in lower case or change nothing, and one
        that takes an apostrophe away ("somebody'd").
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_grouped_digits = _GROUPED_DIGITS.search(text) is not None
    kept = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if is_beside_space or has_grouped_digits else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", kept).lower().split())
    return " ".join(_MISSPELT.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Float[np.ndarray, " n"]:
    """How many people gave the predicted answer, by the rule of VQA: it is right if three of nine others did.

        accuracy_i = mean over the ten ways to leave one person out of min(1, matches among the other nine / 3)

    Both sides are compared as `normalize_answer` has them.

    Args:
        predictions: one answer per question.
        answers: the ten answers that people gave to each question.

    Returns:
        The accuracy of each question in [0, 1]; its mean is the metric.

    Raises:
        InputError: questions without a prediction or the reverse, or other than ten answers.

    Example:
        >>> answers = ["seven"] * 2 + ["8"] * 8
        >>> vqa_accuracy(["The 7", "eight"], [answers, answers]).round(3).tolist()
        [0.6, 1.0]

    References:
        Agrawal et al., "VQA: Visual Question Answering", arXiv 1505.00468, and the evaluation code of VQA 2.0, which
        leaves answers as they are where all ten are the same; here they are always normalised.
    """
    _require_references("vqa_accuracy", predictions, answers)
    for place, given in enumerate(answers):
        if len(given) != VQA_ANSWERS:
            raise InputError(
                f"vqa_accuracy: expected {VQA_ANSWERS} answers to each question, question {place} has {len(given)}; "
                "exact_match takes any number"
            )
    normalized = _normalized_answers(predictions, answers)
    accuracies = []
    for prediction, given in zip(predictions, answers, strict=True):
        matches = sum(normalized[answer] == normalized[prediction] for answer in given)
        # The people who gave the answer find one match less among the others than the rest do.
        of_others = ((matches, matches - 1), (VQA_ANSWERS - matches, matches))
        accuracies.append(
            sum(people * min(1.0, found / _VQA_MATCHES) for people, found in of_others if people) / VQA_ANSWERS
        )
    return np.array(accuracies)


def most_common_answers(answers: Sequence[str]) -> list[str]:
    """What most people answered, normalised; several answers where as many people gave each.

    >>> most_common_answers(["Two", "2", "three", "a cat"])
    ['2']
    """
    counts = Counter(map(normalize_answer, answers))
    most = max(counts.values(), default=0)
    return [answer for answer, count in counts.items() if count == most]


def _normalized_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, str]:
    """Every different string once: there are few of them in a data set."""
    different = set(predictions).union(*answers)
    return {answer: normalize_answer(answer) for answer in different}


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Bool[np.ndarray, " n"]:
    """Whether each text is one of its references, up to white space.

    Args:
        predictions: one text per example.
        references: the right texts of each example, at least one.

    Returns:
        A boolean per example; their mean is the metric.

    Raises:
        InputError: examples without a prediction or the reverse, or an example without references.

    Example:
        >>> exact_match(["ein  rotes Haus", "ein Haus"], [["ein rotes Haus", "das rote Haus"], ["Ein Haus"]]).tolist()
        [True, False]
    """
    _require_references("exact_match", predictions, references)
    return np.array(
        [
            " ".join(prediction.split()) in {" ".join(reference.split()) for reference in given}
            for prediction, given in zip(predictions, references, strict=True)
        ]
    )


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU with n-grams of up to four words, of the whole corpus, by sacrebleu.

        BLEU = min(1, exp(1 - r / c)) (prod_{n=1..4} p_n)^(1/4)

    with the share p_n of the predictions' n-grams that a reference has too, the length c of all predictions and that r
    of the closest references. Signature: case:mixed, eff:no, tok:13a, smooth:exp.

    Args:
        predictions: one text per example; not tokenized.
        references: the right texts of each example, at least one; their number may differ.

    Returns:
        BLEU in [0, 1] (sacrebleu's score / 100), one number for the corpus: it is no mean over examples.

    Raises:
        InputError: sacrebleu is not installed; examples without a prediction or the reverse, or without references.

    Example:
        >>> round(bleu4(["a red seven on yellow"], [["a red seven on a yellow ground", "a red seven on blue"]]), 4)
        0.7071

    References:
        Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002; Post, "A Call for
        Clarity in Reporting BLEU Scores", WMT 2018, arXiv 1804.08771.
    """
    _require_references("bleu4", predictions, references)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise InputError('bleu4 needs sacrebleu: pip install "repkit[language]"') from error
    # sacrebleu takes as many references of each example; one that comes twice changes nothing.
    streams = [[given[min(i, len(given) - 1)] for given in references] for i in range(max(map(len, references)))]
    bleu = BLEU(max_ngram_order=4, tokenize="13a", smooth_method="exp", effective_order=False)
    # sacrebleu's geometric mean of shares that are all 1 may round to a little more.
    return min(1.0, bleu.corpus_score(list(predictions), streams).score / 100)


CIDER_SCALE = 10.0
_CIDER_ORDERS = (1, 2, 3, 4)
_CIDER_SIGMA = 6.0
_WORD = re.compile(r"\w+(?:['’-]\w+)*")

_Gram: TypeAlias = tuple[str, ...]


def cider_d(predictions: Sequence[Text], references: Sequence[Sequence[Text]]) -> Float[np.ndarray, " n"]:
    """Consensus of a caption with those that people wrote, by n-grams that are rare in the data set (CIDEr-D).

        CIDEr-D_i = 10 mean_{n=1..4} mean_{references r of i}
                    exp(-(l_c - l_r)^2 / (2 sigma^2)) sum_w min(g_cw, g_rw) g_rw / (|g_c| |g_r|)

    with the caption c = prediction i, lengths l in words, sigma = 6, and for each n-gram w

        g_w = (number of w in the caption) log(N / max(1, number of the N examples with w in a reference))

    Args:
        predictions: one caption per example, as text or as tokens. Text is put into lower case and divided into words,
            without punctuation.
        references: the captions that people wrote for each example, at least one.

    Returns:
        CIDEr-D of each example in [0, 10]; its mean is the metric. It depends on all references, because they say which
        n-grams are rare: compare it on the same examples only. A caption of less than four words, even one that is its
        only reference, does not reach 10.

    Raises:
        InputError: examples without a prediction or the reverse, an example without references, or fewer than two
            examples: no n-gram is rare in one.

    Example:
        >>> references = [["a red seven", "a seven in red"], ["a blue three on yellow", "a three"]]
        >>> cider_d(["a red seven", "a seven on yellow"], references).round(3).tolist()
        [4.757, 1.068]

    References:
        Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, arXiv 1411.5726, section 3
        and equations 5 and 6. As in the authors' code, n-grams are counted, where the paper divides the counts by their
        sum. The division into words is ours; the authors use a tokenizer that also splits contractions.
    """
    _require_references("cider_d", predictions, references)
    if len(references) < 2:
        raise InputError(
            f"cider_d: expected at least 2 examples, because it is their references that say which words are rare, "
            f"got {len(references)}"
        )
    written = [[_words(reference) for reference in given] for given in references]
    frequencies = Counter(gram for given in written for gram in {gram for words in given for gram in _grams(words)})
    scores = [
        _consensus(_words(prediction), given, frequencies, len(references))
        for prediction, given in zip(predictions, written, strict=True)
    ]
    return np.array(scores)


def _words(text: Text) -> list[str]:
    return _WORD.findall(text.lower()) if isinstance(text, str) else list(text)


def _grams(words: Sequence[str]) -> list[_Gram]:
    """The n-grams of all orders."""
    return [tuple(words[i : i + n]) for n in _CIDER_ORDERS for i in range(len(words) - n + 1)]


def _consensus(caption: list[str], references: list[list[str]], frequencies: Counter[_Gram], examples: int) -> float:
    of_caption = _weighted_grams(caption, frequencies, examples)
    scores = []
    for reference in references:
        of_reference = _weighted_grams(reference, frequencies, examples)
        similarity = np.mean([_similarity(*pair) for pair in zip(of_caption, of_reference, strict=True)])
        difference = len(caption) - len(reference)
        scores.append(similarity * math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2)))
    return CIDER_SCALE * float(np.mean(scores))


def _weighted_grams(words: list[str], frequencies: Counter[_Gram], examples: int) -> list[dict[_Gram, float]]:
    """g of each order."""
    weighted: list[dict[_Gram, float]] = [{} for _ in _CIDER_ORDERS]
    for gram, number in Counter(_grams(words)).items():
        weighted[len(gram) - 1][gram] = number * math.log(examples / max(1, frequencies[gram]))
    return weighted


def _similarity(caption: dict[_Gram, float], reference: dict[_Gram, float]) -> float:
    """The cosine, in which no n-gram of the caption counts for more than in the reference."""
    norms = math.hypot(*caption.values()) * math.hypot(*reference.values())
    product = sum(
        min(weight, reference[gram]) * reference[gram] for gram, weight in caption.items() if gram in reference
    )
    return product / norms if norms > 0 else 0.0


def _require_references(caller: str, predictions: Sequence[Text], references: Sequence[Sequence[Text]]) -> None:
    if len(predictions) != len(references) or not len(references):
        raise InputError(
            f"{caller}: expected a list of references for each prediction, and at least one, "
            f"got {len(predictions)} predictions and {len(references)} lists of references"
        )
    for place, given in enumerate(references):
        # A string is a sequence too, of one-letter references.
        if isinstance(given, str) or not given:
            raise InputError(
                f"{caller}: expected a list of references, at least one, for prediction {place}, got {given!r}"
            )
