import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.models import beam_search

PAD, BEGIN, END, WORDS = 0, 1, 2, (3, 4)
IDS = {"begin_id": BEGIN, "end_id": END, "pad_id": PAD}
ROWS, LENGTH, VOCABULARY = 4, 4, 5
FULL = 1 + 2 + 4 + 8 + 16  # hypotheses of at most 4 words


def code_of(words):
    """A number for each beginning."""
    code = 0
    for word in words:
        code = 3 * code + word - 2
    return code


@pytest.fixture(scope="module")
def table():
    """Logits of the next token [rows beginnings tokens], of which greedy decoding finds the best in no row."""
    logits = 2 * np.random.default_rng(2).normal(size=(ROWS, 3**LENGTH, VOCABULARY))
    logits[..., [PAD, BEGIN, END]] += 1
    return logits.astype(np.float32)


def search(table, **options):
    """Beam search where what was read so far is known from the cache only."""

    def step(token_ids, position, cache):
        code = jnp.where(position == 0, 0, 3 * cache["code"] + token_ids - 2)
        return jnp.asarray(table)[cache["row"], code], cache | {"code": code}

    rows = jnp.broadcast_to(jnp.arange(len(table))[:, None], (len(table), options["beams"]))
    cache = {"row": rows, "code": jnp.zeros_like(rows)}
    run = jax.jit(lambda: beam_search(step, cache, rows=len(table), max_length=LENGTH, **IDS, **options))
    return jax.tree.map(np.asarray, run())


def log_probs(table, row, words):
    logits = np.float64(table[row, code_of(words)])
    return logits - np.log(np.exp(logits).sum())


def every_sequence():
    for length in range(LENGTH + 1):
        for words in itertools.product(WORDS, repeat=length):
            yield [*words, END] if length < LENGTH else list(words)


def score(table, row, sequence, penalty):
    parts = (log_probs(table, row, sequence[:i])[token] for i, token in enumerate(sequence))
    return sum(parts) / len(sequence) ** penalty


def loops(table, row, beams, penalty):
    """The search of one row with lists."""
    best, alive = (-np.inf, []), [(0.0, [])]
    for length in range(1, LENGTH + 1):
        greatest = max(length - 1, 1) if beams == 1 else LENGTH
        if best[0] >= alive[0][0] / greatest**penalty:
            return best
        continued = [
            (total + log_probs(table, row, words)[token], [*words, token])
            for total, words in alive
            for token in (END, *WORDS)
        ]
        continued.sort(key=lambda one: -one[0])
        for total, sequence in continued[:beams]:
            if sequence[-1] == END:
                best = max(best, (total / length**penalty, sequence))
        alive = [one for one in continued if one[1][-1] != END][:beams]
    return max(best, *((total / LENGTH**penalty, sequence) for total, sequence in alive))


def padded(sequence):
    return sequence + [PAD] * (LENGTH - len(sequence))


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
def test_full_width_finds_the_best_of_all_sequences(table, penalty):
    found = search(table, beams=FULL, length_penalty=penalty)
    for row in range(ROWS):
        best = max(every_sequence(), key=lambda sequence: score(table, row, sequence, penalty))
        assert found.token_ids[row].tolist() == padded(best)
        np.testing.assert_allclose(found.scores[row], score(table, row, best, penalty), rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_narrow_search_agrees_with_lists(table, beams, penalty):
    found = search(table, beams=beams, length_penalty=penalty)
    for row in range(ROWS):
        expected, sequence = loops(table, row, beams, penalty)
        assert found.token_ids[row].tolist() == padded(sequence)
        np.testing.assert_allclose(found.scores[row], expected, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_one_beam_is_greedy(table, penalty):
    found = search(table, beams=1, length_penalty=penalty)
    for row in range(ROWS):
        sequence = []
        while len(sequence) < LENGTH and END not in sequence:
            sequence.append(max((END, *WORDS), key=lambda token: log_probs(table, row, sequence)[token]))
        assert found.token_ids[row].tolist() == padded(sequence)


def test_a_wider_search_finds_no_worse(table):
    scores = [search(table, beams=beams).scores for beams in (1, 4, FULL)]
    assert (scores[1] >= scores[0] - 1e-6).all()
    assert (scores[2] >= scores[1] - 1e-6).all()
    assert (scores[2] > scores[0] + 1e-3).any()


def test_a_row_does_not_depend_on_the_others(table):
    together, alone = search(table, beams=3), search(table[2:3], beams=3)
    np.testing.assert_array_equal(together.token_ids[2:3], alone.token_ids)
    np.testing.assert_allclose(together.scores[2:3], alone.scores, rtol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_loop_ends_when_all_rows_are_done(beams):
    seen = []

    def step(token_ids, position, cache):
        jax.debug.callback(lambda position: seen.append(int(position)), position)
        # The first row ends after one word, the second after two.
        ends = position >= jnp.arange(1, 3)
        logits = jnp.where(ends[:, None, None], jnp.array([-9, -9, 9, -9, -9.0]), jnp.array([-9, -9, -9, 9, -9.0]))
        return jnp.broadcast_to(logits, (2, beams, VOCABULARY)), cache

    found = beam_search(step, (), rows=2, beams=beams, max_length=50, **IDS)
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2]
    assert found.token_ids[:, :4].tolist() == [[3, END, PAD, PAD], [3, 3, END, PAD]]


def test_the_end_token_may_be_the_padding():
    def step(token_ids, position, cache):
        return jnp.broadcast_to(
            jnp.where(position < 1, jnp.array([0, 0, 5.0]), jnp.array([5.0, 0, 0])), (1, 1, 3)
        ), cache

    found = beam_search(step, (), rows=1, beams=1, max_length=4, begin_id=1, end_id=0, pad_id=0)
    assert found.token_ids.tolist() == [[2, 0, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beams": 0}, "beams >= 1, got 0"),
        ({"max_length": 0}, "max_length >= 1, got 0"),
        ({"length_penalty": -1.0}, r"length_penalty >= 0, got -1\.0"),
        ({"end_id": BEGIN}, "begin_id and end_id must differ"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        beam_search(lambda *_: None, (), **{"rows": 1, "beams": 1, "max_length": 4, **IDS} | changes)
