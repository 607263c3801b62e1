"""Evaluation of a small model that really generates: a table of transitions between words, decoded greedily."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repkit.checks import InputError
from repkit.evaluate import evaluate_answers, evaluate_captions, evaluate_translations, generate_texts
from repkit.metrics import bleu4, cider_d

WORDS = ["<pad>", "<end>", "eine", "rote", "blaue", "Sieben", "Drei", "auf", "Grün"]
PAD, END = 0, 1
ROWS = 8


@pytest.fixture
def params():
    """Logits of the next word: that which comes after a word in the list, and the end after the last."""
    following = np.roll(np.eye(len(WORDS), dtype=np.float32), 1, axis=1)
    following[-1] = np.eye(len(WORDS))[END]
    return jnp.asarray(5 * following)


@functools.partial(jax.jit, static_argnames="max_length")
def generate(params, batch, *, max_length=6):
    """Goes on from the last token of the source."""
    assert "target_ids" not in batch and "target_mask" not in batch  # noqa: PT018
    last = jnp.sum(batch["source_mask"], axis=1) - 1
    first = jnp.take_along_axis(batch["source_ids"], last[:, None], axis=1)[:, 0]

    def step(state, _):
        previous, has_ended = state
        token = jnp.where(has_ended, PAD, jnp.argmax(params[previous], axis=-1))
        return (token, has_ended | (token == END)), token

    _, tokens = jax.lax.scan(step, (first, first < 0), length=max_length)
    return tokens.T


def decode(token_ids):
    assert isinstance(token_ids, np.ndarray)
    return [" ".join(WORDS[token] for token in row if token not in (PAD, END)) for row in token_ids.tolist()]


def host_batches(starts, *, first_id=100, rows=ROWS):
    """Batches of `rows` questions of one word, the last one filled up with rows that do not count."""
    for begin in range(0, len(starts), rows):
        words = [WORDS.index(word) for word in starts[begin : begin + rows]]
        padding = rows - len(words)
        yield {
            "source_ids": np.array([[word, PAD] for word in words] + [[2, PAD]] * padding, np.int32),
            "source_mask": np.array([[True, False]] * rows),
            "target_ids": np.full((rows, 3), 2, np.int32),
            "target_mask": np.ones((rows, 3), bool),
            "example_id": np.array([first_id + begin + i for i in range(len(words))] + [0] * padding, np.int32),
            "where": np.arange(rows) < len(words),
        }


STARTS = ["rote", "Drei", "auf", "Grün", "blaue"] * 2 + ["Sieben"]
CONTINUED = {
    "rote": "blaue Sieben Drei auf Grün",
    "blaue": "Sieben Drei auf Grün",
    "Sieben": "Drei auf Grün",
    "Drei": "auf Grün",
    "auf": "Grün",
    "Grün": "",
}


def test_every_valid_row_has_its_text(params):
    texts = generate_texts(generate, params, host_batches(STARTS), decode=decode)
    assert list(texts.items()) == [(100 + i, CONTINUED[word]) for i, word in enumerate(STARTS)]


def test_batches_may_be_sharded_and_lack_where(params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def place(batch):
        del batch["where"]
        return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    texts = generate_texts(generate, params, host_batches(STARTS[:8]), decode=decode, place=place)
    assert texts == generate_texts(generate, params, host_batches(STARTS[:8]), decode=decode)


def test_a_batch_of_padding_leaves_nothing(params):
    padding = next(host_batches(STARTS[:2])) | {"where": np.zeros(ROWS, bool)}
    batches = [padding, *host_batches(STARTS), padding]
    texts = generate_texts(generate, params, batches, decode=decode)
    assert texts == generate_texts(generate, params, host_batches(STARTS), decode=decode)
    with pytest.raises(InputError, match="every row is masked out"):
        generate_texts(generate, params, [padding], decode=decode)


def test_generate_is_traced_once(params):
    traces = []

    @jax.jit
    def counting(params, batch):
        traces.append(1)
        return generate(params, batch)

    generate_texts(counting, params, host_batches(STARTS), decode=decode)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batches": []}, "at least one batch, got none"),
        ({"batches": [{"source_ids": np.zeros((2, 1))}]}, "with example_id, got one of source_ids"),
        ({"generate": lambda params, batch: batch["source_ids"][:3]}, r"token ids \[8, t\], got \[3, 2\]"),
        ({"generate": lambda params, batch: (batch["source_ids"], 0)}, r"token ids \[8, t\], got tuple"),
        ({"decode": lambda token_ids: ["one"]}, "return 8 texts, one for each row, got 1"),
    ],
)
def test_what_does_not_fit_is_said(params, change, said):
    given = {"generate": generate, "batches": host_batches(STARTS[:8]), "decode": decode} | change
    with pytest.raises(InputError, match=said):
        generate_texts(given["generate"], params, given["batches"], decode=given["decode"])


def test_answers_by_type_of_question(params):
    # The model answers "auf Grün", "Grün" and "".
    texts = generate_texts(generate, params, host_batches(["Drei", "auf", "Grün"], first_id=0), decode=decode)
    records = [
        {"target_texts": ["Auf Grün."] * 2 + ["auf"] * 8, "question_type": "place"},
        {"target_texts": ["grün"] * 5 + ["Grün"] * 5, "question_type": "colour"},
        {"target_texts": ["grün"] * 10, "question_type": "colour"},
    ]
    metrics = evaluate_answers(texts, records)
    assert metrics == pytest.approx(
        {
            "vqa_accuracy": (0.6 + 1 + 0) / 3,
            "exact_match": 1 / 3,
            "place/vqa_accuracy": 0.6,
            "place/exact_match": 0.0,
            "colour/vqa_accuracy": 0.5,
            "colour/exact_match": 0.5,
        }
    )
    without_types = [{"target_texts": record["target_texts"]} for record in records]
    assert evaluate_answers(texts, without_types).keys() == {"vqa_accuracy", "exact_match"}


def test_captions_and_translations_are_compared_with_their_own_references(params):
    texts = generate_texts(generate, params, host_batches(["rote", "blaue", "Sieben"], first_id=0), decode=decode)
    records = [
        {"target_texts": ["eine blaue Sieben", "blaue Sieben Drei auf Grün"]},
        {"target_texts": ["rote Sieben auf Grün"]},
        {"target_texts": ["Drei auf Grün", "Sieben auf Grün", "auf Grün"]},
    ]
    references = [record["target_texts"] for record in records]
    captions = evaluate_captions(texts, records)
    assert captions == {
        "bleu4": bleu4(list(texts.values()), references),
        "cider_d": float(cider_d(list(texts.values()), references).mean()),
    }
    assert 0 < captions["bleu4"] < 1
    assert 0 < captions["cider_d"] < 10
    translations = evaluate_translations(texts, records)
    assert translations == {"bleu4": captions["bleu4"], "exact_match": pytest.approx(2 / 3)}

    reordered = dict(reversed(texts.items()))
    assert evaluate_captions(reordered, records) == pytest.approx(captions)


@pytest.mark.parametrize("evaluate", [evaluate_answers, evaluate_captions, evaluate_translations])
@pytest.mark.parametrize(
    ("texts", "records", "said"),
    [
        ({}, [], "at least one text, got none"),
        ({0: "a", 7: "b"}, [{"target_texts": ["a"] * 10}], "there is none for example 7"),
        ({0: "a"}, {0: {"captions": ["a"]}}, "example 0 has no target_texts: captions"),
    ],
)
def test_records_that_do_not_fit_are_refused(evaluate, texts, records, said):
    with pytest.raises(InputError, match=f"^{evaluate.__name__}: .*{said}"):
        evaluate(texts, records)
