"""Ranks against float64 loops, and the cases where a recall flatters: ties, collapse, masked rows, shared captions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.metrics import NEVER_FOUND, match_ranks, median_rank, recall_at_k


def ranks_by_loop(queries, candidates, query_ids, candidate_ids, candidate_where=None):
    """Float64 loops over lists of ids."""
    ranks = []
    for query, ids in zip(np.asarray(queries, np.float64), query_ids, strict=True):
        right, wrong = [], []
        for j, (candidate, others) in enumerate(zip(np.asarray(candidates, np.float64), candidate_ids, strict=True)):
            if candidate_where is not None and not candidate_where[j]:
                continue
            score = float(sum(a * b for a, b in zip(query, candidate, strict=True)))
            (right if set(ids) & set(others) else wrong).append(score)
        ranks.append(1 + sum(score >= max(right) for score in wrong) if right else NEVER_FOUND)
    return ranks


def unit_rows(rng, rows, features):
    x = rng.normal(size=(rows, features))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


@pytest.mark.parametrize("block", [1, 4, 7, 1000])
def test_ranks_equal_the_loop_for_every_block(block):
    rng = np.random.default_rng(0)
    queries, candidates = unit_rows(rng, 9, 5), unit_rows(rng, 13, 5)
    query_ids, candidate_ids = rng.integers(0, 6, 9), rng.integers(0, 6, 13)
    with jax.numpy_rank_promotion("raise"):
        ranks = match_ranks(queries, candidates, jnp.asarray(query_ids), jnp.asarray(candidate_ids), block=block)
    assert ranks.tolist() == ranks_by_loop(queries, candidates, query_ids[:, None], candidate_ids[:, None])


def test_rows_with_several_ids_equal_the_loop():
    rng = np.random.default_rng(1)
    images, captions = unit_rows(rng, 6, 4), unit_rows(rng, 10, 4)
    ids_of_images = [[0, 3], [1], [2, 4, 3], [5], [6, 7], [8, 9]]
    padded = jnp.asarray([ids + [-1] * (3 - len(ids)) for ids in ids_of_images])
    ids_of_captions = [[i] for i in range(10)]
    forth = match_ranks(images, captions, padded, jnp.arange(10))
    back = match_ranks(captions, images, jnp.arange(10), padded)
    assert forth.tolist() == ranks_by_loop(images, captions, ids_of_images, ids_of_captions)
    assert back.tolist() == ranks_by_loop(captions, images, ids_of_captions, ids_of_images)


def test_negative_ids_match_nothing():
    same = jnp.eye(2)
    assert match_ranks(same, same, jnp.array([-1, 1]), jnp.array([-1, 1])).tolist() == [NEVER_FOUND, 1]


def test_masked_candidates_do_not_exist_even_as_nan():
    rng = np.random.default_rng(2)
    queries, candidates = unit_rows(rng, 6, 4), unit_rows(rng, 8, 4)
    where = np.array([True, True, False, True, True, False, True, True])
    poisoned = jnp.where(where[:, None], candidates, jnp.nan)
    ids = np.arange(8)
    ranks = match_ranks(queries, poisoned, jnp.arange(6), jnp.arange(8), candidate_where=jnp.asarray(where))
    assert ranks.tolist() == ranks_by_loop(queries, candidates, ids[:6, None], ids[:, None], where)
    assert ranks[2] == NEVER_FOUND


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_collapsed_embeddings_find_nothing(noise):
    rng = np.random.default_rng(3)
    collapsed = unit_rows(rng, 1, 64) + noise * jnp.asarray(rng.normal(size=(50, 64)), jnp.float32)
    ranks = match_ranks(collapsed, collapsed, jnp.arange(50), jnp.arange(50))
    assert ranks.tolist() == [50] * 50


def test_close_scores_that_float32_can_tell_apart_are_no_ties():
    query = jnp.array([[1.0, 0.0]])
    candidates = jnp.array([[0.5, 0.0], [0.49999, 0.0]])
    assert match_ranks(query, candidates, jnp.array([0]), jnp.arange(2)).tolist() == [1]


def test_nan_embeddings_find_nothing():
    rng = np.random.default_rng(4)
    good = unit_rows(rng, 5, 4)
    bad = good.at[1].set(jnp.nan)
    assert match_ranks(bad, good, jnp.arange(5), jnp.arange(5)).tolist() == [1, 5, 1, 1, 1]
    assert match_ranks(good, bad, jnp.arange(5), jnp.arange(5)).tolist() == [2, 5, 2, 2, 2]


def test_bfloat16_is_scored_in_float32():
    query = jnp.array([[1.0, 0.0]], jnp.bfloat16)
    candidates = jnp.array([[1.0, 0.0], [0.99609375, 0.0]], jnp.bfloat16)
    assert match_ranks(query, candidates, jnp.array([0]), jnp.arange(2)).tolist() == [1]


def test_no_array_is_larger_than_a_block_of_scores():
    rows, block = 512, 16
    embeds = jax.ShapeDtypeStruct((rows, 4), jnp.float32)
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    compiled = jax.jit(lambda *args: match_ranks(*args, block=block)).lower(embeds, embeds, ids, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * rows * 4 // 2


def test_recall_and_median_rank_of_known_ranks():
    ranks = jnp.array([1, 5, 2, NEVER_FOUND, 1])
    assert [float(recall_at_k(ranks, k=k)) for k in (1, 2, 5)] == pytest.approx([0.4, 0.6, 0.8])
    assert float(median_rank(ranks)) == 2.0
    where = jnp.array([False, True, True, False, False])
    assert float(recall_at_k(ranks, k=2, where=where)) == 0.5
    assert float(median_rank(ranks, where=where)) == 3.5


def test_recall_without_queries_is_zero():
    assert float(recall_at_k(jnp.array([1, 1]), k=1, where=jnp.array([False, False]))) == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidate_embeds": jnp.ones((3, 5))}, r"query_embeds \(2, 4\) and candidate_embeds \(3, 5\)"),
        ({"query_ids": jnp.arange(3)}, r"one row of query_ids for each of 2 query_embeds, got query_ids \(3,\)"),
        ({"candidate_ids": jnp.arange(2)}, r"one row of candidate_ids for each of 3"),
        ({"candidate_where": jnp.ones(2, bool)}, r"candidate_where \(3,\), got candidate_where \(2,\)"),
        ({"block": 0}, "at least 1 query at a time, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, said):
    given = {
        "query_embeds": jnp.ones((2, 4)),
        "candidate_embeds": jnp.ones((3, 4)),
        "query_ids": jnp.arange(2),
        "candidate_ids": jnp.arange(3),
    } | change
    with pytest.raises(InputError, match=said):
        match_ranks(**given)


def test_k_below_one_is_refused():
    with pytest.raises(InputError, match="k of at least 1, got 0"):
        recall_at_k(jnp.array([1]), k=0)
