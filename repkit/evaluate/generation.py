"""Generated answers, captions and translations against the texts that people wrote.

`generate_texts` runs the model over a data set once; the evaluations read its texts, which can be looked at as well.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Int

from repkit.checks import InputError
from repkit.evaluate.embed import Batch, to_host
from repkit.metrics.language import bleu4, cider_d, exact_match, most_common_answers, normalize_answer, vqa_accuracy

TARGETS = ("target_ids", "target_mask")
"""What a batch holds of the right texts, which the model is not shown."""


class Records(Protocol):
    """Random access to records by `example_id`, such as a source of `repkit.data`.

    A record's `target_texts` are the right texts. Answers are also evaluated by `question_type`, where it has one.
    """

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def generate_texts(
    generate: Callable[[Any, Batch], Int[Array, "b t"]],
    params: Any,
    batches: Iterable[Batch],
    *,
    decode: Callable[[Int[np.ndarray, "n t"]], list[str]],
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> dict[int, str]:
    """The text that a model generates for every valid row of the batches.

    While a batch is on the device the next one is fetched and placed.

    Args:
        generate: `generate(params, batch) -> token_ids`, one row for each of the batch; compiled by whoever made it. It
            gets the batch without `TARGETS`.
        params: the model's parameters, wherever they are placed.
        batches: host batches with `example_id`. Rows with `where` False (padding, corrupt input) are dropped.
        decode: rows of token ids to texts, one each; it ends a text where the end token stands.
        place: puts a host batch on the devices, for instance sharded over a mesh. With several processes it must make
            global arrays; every process then gets the texts of all.

    Returns:
        example_id -> text, in the order of the batches. An example that comes twice is there once.

    Raises:
        InputError: no batches, no valid row in them, a batch without `example_id`, or other than one row of tokens or
            one text for each row.

    Example:
        >>> import numpy as np
        >>> def generate(params, batch):
        ...     return batch["source_ids"] + params
        >>> def decode(token_ids):
        ...     return [" ".join(map(str, row)) for row in token_ids]
        >>> batch = {
        ...     "source_ids": np.array([[1, 2], [3, 4], [0, 0]]),
        ...     "example_id": np.array([7, 5, 0]),
        ...     "where": np.array([True, True, False]),
        ... }
        >>> generate_texts(generate, 10, [batch], decode=decode)
        {7: '11 12', 5: '13 14'}
    """
    texts: dict[int, str] = {}
    running = None
    for batch in batches:
        started = _start(generate, params, place(batch))
        if running is not None:
            texts |= _finish(running, decode)
        running = started
    if running is None:
        raise InputError("generate_texts: expected at least one batch, got none; is the data set empty?")
    texts |= _finish(running, decode)
    if not texts:
        raise InputError(
            "generate_texts: every row is masked out (where is False throughout); is all of the data corrupt?"
        )
    return texts


def evaluate_answers(texts: Mapping[int, str], records: Records) -> dict[str, float]:
    """How right generated answers are, of all questions and by type of question.

    Args:
        texts: example_id -> answer, from `generate_texts`.
        records: where `records[example_id]["target_texts"]` are the ten answers that people gave, and `question_type`,
            if there is one, is a name.

    Returns:
        `vqa_accuracy`, see `repkit.metrics.vqa_accuracy`; `exact_match`, the share of answers that are the one most
        people gave, after normalisation; and `<type>/vqa_accuracy` and `<type>/exact_match` of the questions of each
        type. All in [0, 1].

    Raises:
        InputError: no texts, an example without a record or without `target_texts`, or other than ten answers.

    Example:
        >>> records = [{"target_texts": ["two"] * 9 + ["three"]}, {"target_texts": ["red"] * 10}]
        >>> evaluate_answers({0: "2", 1: "blue"}, records)
        {'vqa_accuracy': 0.5, 'exact_match': 0.5}
    """
    given = _records("evaluate_answers", texts, records)
    answers = [record["target_texts"] for record in given]
    predictions = list(texts.values())
    values = {
        "vqa_accuracy": vqa_accuracy(predictions, answers),
        "exact_match": exact_match(list(map(normalize_answer, predictions)), list(map(most_common_answers, answers))),
    }
    metrics = {name: float(np.mean(of_rows)) for name, of_rows in values.items()}
    types = np.array([record.get("question_type") or "" for record in given])
    for kind in sorted(set(types) - {""}):
        metrics |= {f"{kind}/{name}": float(np.mean(of_rows[types == kind])) for name, of_rows in values.items()}
    return metrics


def evaluate_captions(texts: Mapping[int, str], records: Records) -> dict[str, float]:
    """How close generated captions are to those that people wrote.

    Args:
        texts: example_id -> caption, from `generate_texts`; at least two.
        records: where `records[example_id]["target_texts"]` are the captions that people wrote.

    Returns:
        `bleu4` in [0, 1], of the corpus, and `cider_d` in [0, 10], with the n-grams' rarity among these examples.

    Raises:
        InputError: fewer than two texts, an example without a record or without `target_texts`, or sacrebleu is not
            installed.

    Example:
        >>> records = [{"target_texts": ["a red seven on blue", "a seven"]}, {"target_texts": ["a green two on grey"]}]
        >>> evaluate_captions({0: "a red seven on blue", 1: "a green two on grey"}, records)["bleu4"]
        1.0
    """
    predictions = list(texts.values())
    references = [record["target_texts"] for record in _records("evaluate_captions", texts, records)]
    return {"bleu4": bleu4(predictions, references), "cider_d": float(np.mean(cider_d(predictions, references)))}


def evaluate_translations(texts: Mapping[int, str], records: Records) -> dict[str, float]:
    """How close generated translations are to the right ones.

    Args:
        texts: example_id -> translation, from `generate_texts`.
        records: where `records[example_id]["target_texts"]` are the right translations.

    Returns:
        `bleu4`, of the corpus, and `exact_match`, the share of translations that are one of the right ones; in [0, 1].

    Raises:
        InputError: no texts, an example without a record or without `target_texts`, or sacrebleu is not installed.

    Example:
        >>> records = {4: {"target_texts": ["eine rote Sieben auf blauem Grund"]}}
        >>> evaluate_translations({4: "eine rote Sieben auf blauem Grund"}, records)
        {'bleu4': 1.0, 'exact_match': 1.0}
    """
    predictions = list(texts.values())
    references = [record["target_texts"] for record in _records("evaluate_translations", texts, records)]
    return {
        "bleu4": bleu4(predictions, references),
        "exact_match": float(np.mean(exact_match(predictions, references))),
    }


def _start(generate: Callable[[Any, Batch], Any], params: Any, batch: Batch) -> Batch:
    if "example_id" not in batch:
        raise InputError(f"generate_texts: expected batches with example_id, got one of {', '.join(batch)}")
    token_ids = generate(params, {name: value for name, value in batch.items() if name not in TARGETS})
    rows = len(batch["example_id"])
    if getattr(token_ids, "ndim", None) != 2 or len(token_ids) != rows:
        got = list(token_ids.shape) if hasattr(token_ids, "shape") else type(token_ids).__name__
        raise InputError(f"generate_texts: expected generate to return an array of token ids [{rows}, t], got {got}")
    return {"token_ids": token_ids} | {name: batch[name] for name in ("example_id", "where") if name in batch}


def _finish(running: Batch, decode: Callable[[Int[np.ndarray, "n t"]], list[str]]) -> dict[int, str]:
    rows = {name: to_host(value) for name, value in running.items()}
    token_ids, example_ids = rows["token_ids"], rows["example_id"]
    where = rows.get("where", np.ones(len(example_ids), bool))
    texts = decode(token_ids[where]) if where.any() else []
    if len(texts) != where.sum():
        raise InputError(
            f"generate_texts: expected decode to return {where.sum()} texts, one for each row, got {len(texts)}"
        )
    return dict(zip(example_ids[where].tolist(), texts, strict=True))


def _records(caller: str, texts: Mapping[int, str], records: Records) -> list[Mapping[str, Any]]:
    if not texts:
        raise InputError(f"{caller}: expected at least one text, got none")
    given = []
    for example_id in texts:
        try:
            given.append(records[example_id])
        except (IndexError, KeyError) as error:
            raise InputError(
                f"{caller}: expected a record for every text, there is none for example {example_id}; are the records "
                "those that the batches were made of?"
            ) from error
        if "target_texts" not in given[-1]:
            raise InputError(
                f"{caller}: the record of example {example_id} has no target_texts: {', '.join(given[-1])}"
            )
    return given
