"""Retrieval metrics from embeddings, computed in blocks of queries.

`match_ranks` does the work once; `recall_at_k` and `median_rank` read its answer.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import InputError
from repkit.numerics import WeightedMean, at_least_float32, mask_rows, row_mask

NEVER_FOUND = int(jnp.iinfo(jnp.int32).max)
"""The rank of a query that has no right candidate."""


def match_ranks(
    query_embeds: Float[Array, "q d"],
    candidate_embeds: Float[Array, "c d"],
    query_ids: Int[Array, " q"] | Int[Array, "q m"],
    candidate_ids: Int[Array, " c"] | Int[Array, "c n"],
    *,
    candidate_where: Bool[Array, " c"] | None = None,
    block: int = 1024,
) -> Int[Array, " q"]:
    """The rank of every query's best right candidate, 1 for the top.

        score_ij = <query_i, candidate_j>        right_ij = (ids of i and ids of j share an id >= 0)
        rank_i   = 1 + |{j wrong: score_ij not below max over right j' of score_ij'}|

    Ids decide what is right, not positions, so several candidates may be right for one query; only the best of them
    counts. A row that belongs to several things (an image with five captions) has a row of ids, filled up with -1.

    Ties are pessimistic: a wrong candidate that scores the same stands before the right one, so collapsed embeddings
    find nothing. 'The same' means closer than the rounding of the score, `sqrt(d) eps |query| |candidate|` [ours].
    A score that is NaN stands before everything when it is wrong and behind everything when it is right.

    Args:
        query_embeds: one row per query. Used as given: normalise rows for the cosine.
        candidate_embeds: one row per candidate.
        query_ids: the id, or ids, of each query; negative ids match nothing.
        candidate_ids: the id, or ids, of each candidate.
        candidate_where: False takes the candidate out.
        block: queries scored at a time. Memory is `block x c`; the whole `q x c` matrix never exists.

    Returns:
        Ranks in 1 ... c; `NEVER_FOUND` (the largest int32) where no candidate is right.

    Raises:
        InputError: shapes that do not belong together, or a block below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> images = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> captions = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> match_ranks(captions, images, jnp.array([0, 1, 2]), jnp.array([0, 1, 2])).tolist()
        [1, 2, 2]
    """
    _check_shapes(query_embeds, candidate_embeds, query_ids, candidate_ids, candidate_where)
    if block < 1:
        raise InputError(f"block: expected at least 1 query at a time, got {block}")
    return _match_ranks(
        query_embeds, candidate_embeds, query_ids, candidate_ids, candidate_where, min(block, max(len(query_embeds), 1))
    )


@partial(jax.jit, static_argnames="block")
def _match_ranks(query_embeds, candidate_embeds, query_ids, candidate_ids, candidate_where, block):
    queries = at_least_float32(query_embeds)
    candidates = at_least_float32(candidate_embeds)
    valid = row_mask(candidate_where, len(candidates))
    candidates = mask_rows(candidates, valid)
    query_ids, candidate_ids = (ids.reshape(len(ids), -1) for ids in (query_ids, candidate_ids))
    relative_rounding = math.sqrt(queries.shape[1]) * jnp.finfo(candidates.dtype).eps
    candidate_norms = jnp.linalg.norm(candidates, axis=1)[None, :]
    valid = valid[None, :]

    def ranks_of_block(rows):
        query, ids = rows
        # Accelerators multiply float32 in fewer bits by default, which would turn close scores into ties or swap them.
        scores = jnp.matmul(query, candidates.T, precision=jax.lax.Precision.HIGHEST)
        right = _share_an_id(ids, candidate_ids) & valid
        best = jnp.max(jnp.where(right, scores, -jnp.inf), axis=1, keepdims=True)
        rounding = relative_rounding * jnp.linalg.norm(query, axis=1, keepdims=True) * candidate_norms
        clearly_below = scores < best - rounding
        before = jnp.sum(valid & ~right & ~clearly_below, axis=1, dtype=jnp.int32)
        return jnp.where(right.any(axis=1), 1 + before, NEVER_FOUND)

    count = len(queries)
    blocks = -(-count // block)

    def in_blocks(rows):
        padded = jnp.pad(rows, ((0, blocks * block - count), (0, 0)))
        return padded.reshape(blocks, block, rows.shape[1])

    ranks = jax.lax.map(ranks_of_block, (in_blocks(queries), in_blocks(query_ids)))
    return ranks.reshape(-1)[:count]


def recall_at_k(ranks: Int[Array, " q"], *, k: int, where: Bool[Array, " q"] | None = None) -> Float[Array, ""]:
    """The share of queries with a right candidate among their k best.

        R@k = mean_i [rank_i <= k]

    Args:
        ranks: from `match_ranks`; 1 is the top.
        k: how many candidates are looked at.
        where: False leaves the query out of the mean.

    Returns:
        A scalar in [0, 1]; 0 without queries.

    Raises:
        InputError: k below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> float(recall_at_k(jnp.array([1, 3, 2, 7]), k=2))
        0.5
    """
    if k < 1:
        raise InputError(f"recall_at_k: expected k of at least 1, got {k}")
    return WeightedMean.of(at_least_float32(ranks <= k), where=where).value()


def median_rank(ranks: Int[Array, " q"], *, where: Bool[Array, " q"] | None = None) -> Float[Array, ""]:
    """The median rank of the best right candidate; 1 is the best possible.

    Args:
        ranks: from `match_ranks`; 1 is the top.
        where: False leaves the query out.

    Returns:
        A scalar of at least 1, the mean of the two middle ranks when their number is even; NaN without queries.

    Example:
        >>> import jax.numpy as jnp
        >>> float(median_rank(jnp.array([1, 3, 2, 7])))
        2.5
    """
    ranks = at_least_float32(ranks)
    return jnp.nanmedian(ranks if where is None else jnp.where(where, ranks, jnp.nan))


def _share_an_id(first: Int[Array, "a m"], second: Int[Array, "b n"]) -> Bool[Array, "a b"]:
    """Column by column, so that nothing larger than [a b] is made."""
    shared = jnp.zeros((len(first), len(second)), bool)
    for i in range(first.shape[1]):
        for j in range(second.shape[1]):
            shared |= (first[:, i, None] == second[None, :, j]) & (first[:, i, None] >= 0)
    return shared


def _check_shapes(query_embeds, candidate_embeds, query_ids, candidate_ids, candidate_where) -> None:
    if query_embeds.ndim != 2 or candidate_embeds.ndim != 2 or query_embeds.shape[1] != candidate_embeds.shape[1]:
        raise InputError(
            "match_ranks: expected query_embeds [q d] and candidate_embeds [c d], got "
            f"query_embeds {query_embeds.shape} and candidate_embeds {candidate_embeds.shape}"
        )
    for side, embeds, ids in (("query", query_embeds, query_ids), ("candidate", candidate_embeds, candidate_ids)):
        if ids.ndim not in (1, 2) or len(ids) != len(embeds):
            raise InputError(
                f"match_ranks: expected one row of {side}_ids for each of {len(embeds)} {side}_embeds, "
                f"got {side}_ids {ids.shape}"
            )
    if candidate_where is not None and candidate_where.shape != candidate_embeds.shape[:1]:
        raise InputError(
            f"match_ranks: expected candidate_where ({len(candidate_embeds)},), "
            f"got candidate_where {candidate_where.shape}"
        )
