"""Retrieval in two stages: the nearest embeddings, put into order by a head that looks at each pair."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from repkit.checks import InputError, require_range
from repkit.evaluate.retrieval import unique_rows
from repkit.metrics.retrieval import match_ranks, median_rank, recall_at_k

Judge = Callable[[Int[np.ndarray, " p"], Int[np.ndarray, " p"]], Float[np.ndarray, " p"]]
"""From rows of images and rows of texts to how well each pair matches."""


def evaluate_reranked_retrieval(
    image_embeds: Float[np.ndarray, "i d"],
    text_embeds: Float[np.ndarray, "t d"],
    judge: Judge,
    *,
    image_ids: Int[np.ndarray, " i"],
    text_image_ids: Int[np.ndarray, " t"],
    caption_ids: Int[np.ndarray, " t"],
    candidates: int = 16,
    ks: tuple[int, ...] = (1, 5, 10),
    block: int = 1024,
) -> dict[str, float]:
    """The metrics of `evaluate_retrieval` when a judge orders the nearest candidates of each query.

    The candidates behind them stay in the order of the embeddings. Equal scores count as wrong.

    Args:
        image_embeds: one row per image.
        text_embeds: one row per caption.
        judge: scores pairs, by their rows in the two arrays.
        image_ids: as for `evaluate_retrieval`.
        text_image_ids: as for `evaluate_retrieval`.
        caption_ids: as for `evaluate_retrieval`.
        candidates: how many of the nearest are judged for each query, at least 1.
        ks: the cut-offs of recall.
        block: queries compared at a time.

    Raises:
        InputError: as `evaluate_retrieval` does; no candidates; another number of scores than pairs.

    Example:
        >>> rows, ids = np.eye(3, dtype=np.float32), np.arange(3)
        >>> arguments = dict(image_ids=ids, text_image_ids=ids, caption_ids=ids, ks=(1,))
        >>> def judge(images, texts):
        ...     return (images == texts).astype(float)
        >>> metrics = evaluate_reranked_retrieval(rows, rows[[1, 0, 2]], judge, **arguments, candidates=3)
        >>> metrics["text_to_image/R@1"]
        1.0

    References:
        Li et al., "Align before Fuse", arXiv 2107.07651, section 5: retrieval by the contrastive scores, ranking by the
        matching scores; k = 16 for COCO, 128 or 256 for Flickr30k.
    """
    require_range("evaluate_reranked_retrieval", "candidates", candidates, at_least=1)
    unique = unique_rows(
        image_embeds, text_embeds, image_ids=image_ids, text_image_ids=text_image_ids, caption_ids=caption_ids
    )
    image, text = image_embeds[unique.image_rows], text_embeds[unique.text_rows]
    ids_of_text = np.arange(len(text))[:, None]

    def judge_texts(queries: np.ndarray, found: np.ndarray) -> np.ndarray:
        return judge(unique.image_rows[queries], unique.text_rows[found])

    def judge_images(queries: np.ndarray, found: np.ndarray) -> np.ndarray:
        return judge(unique.image_rows[found], unique.text_rows[queries])

    metrics = {}
    for direction, queries, others, query_ids, other_ids, judge_rows in (
        ("image_to_text", image, text, unique.ids_of_image, ids_of_text, judge_texts),
        ("text_to_image", text, image, ids_of_text, unique.ids_of_image, judge_images),
    ):
        nearest = _nearest(queries, others, min(candidates, len(others)), block)
        pairs = np.repeat(np.arange(len(queries)), nearest.shape[1]), nearest.reshape(-1)
        scores = np.asarray(judge_rows(*pairs))
        if scores.shape != pairs[0].shape:
            raise InputError(
                f"expected the judge to give {len(pairs[0])} scores, one for each pair, got {scores.shape}"
            )
        same = query_ids[:, None, :, None] == other_ids[nearest][:, :, None, :]
        is_right = (same & (query_ids >= 0)[:, None, :, None]).any(axis=(2, 3))
        behind = match_ranks(*map(jnp.asarray, (queries, others, query_ids, other_ids)), block=block)
        ranks = jnp.asarray(_ranks(scores.reshape(nearest.shape), is_right, np.asarray(behind)))
        metrics |= {f"{direction}/R@{k}": float(recall_at_k(ranks, k=k)) for k in ks}
        metrics[f"{direction}/median_rank"] = float(median_rank(ranks))
    return metrics


def matching_judge(
    forward: Callable[[Any, dict[str, Any], None], dict[str, Any]],
    params: Any,
    images: UInt8[np.ndarray, "i h w 3"],
    token_ids: Int[np.ndarray, "t l"],
    token_mask: Bool[np.ndarray, "t l"],
    *,
    batch_size: int = 256,
) -> Judge:
    """A judge by the matching head of a model: the logit of yes minus that of no.

    Args:
        forward: `forward(params, batch, None) -> outputs` with `outputs["matching"]["logits"]` [b m 2], of which the
            first is that of the own pair.
        params: the model's parameters.
        images: what the first rows of the judge are of.
        token_ids: what the second rows are of.
        token_mask: True for real tokens.
        batch_size: pairs judged at a time.
    """

    def judge(image_rows: np.ndarray, text_rows: np.ndarray) -> np.ndarray:
        scores = []
        for start in range(0, len(image_rows), batch_size):
            # The last batch is filled up with its last pair, so that all have one shape.
            places = np.minimum(np.arange(start, start + batch_size), len(image_rows) - 1)
            seen, read = image_rows[places], text_rows[places]
            scores.append(_match(forward, params, images[seen], token_ids[read], token_mask[read]))
        return np.concatenate([np.asarray(each) for each in scores])[: len(image_rows)]

    return judge


@partial(jax.jit, static_argnames="forward")
def _match(forward, params, image, token_ids, token_mask):
    outputs = forward(params, {"image": image, "token_ids": token_ids, "token_mask": token_mask}, None)
    logits = outputs["matching"]["logits"][:, 0].astype(jnp.float32)
    return logits[:, 1] - logits[:, 0]


def _nearest(queries: np.ndarray, others: np.ndarray, number: int, block: int) -> Int[np.ndarray, "q k"]:
    found = [
        jax.lax.top_k(jnp.asarray(queries[start : start + block]) @ jnp.asarray(others).T, number)[1]
        for start in range(0, len(queries), block)
    ]
    return np.concatenate([np.asarray(each) for each in found])


def _ranks(
    scores: Float[np.ndarray, "q k"], is_right: Bool[np.ndarray, "q k"], behind: Int[np.ndarray, " q"]
) -> Int[np.ndarray, " q"]:
    """Of the best right candidate among those judged, or by the embeddings where none of them is right."""
    best = np.where(is_right, scores, -np.inf).max(axis=1, keepdims=True)
    before = (~is_right & ~(scores < best)).sum(axis=1)
    return np.where(is_right.any(axis=1), 1 + before, np.maximum(behind, scores.shape[1] + 1))
