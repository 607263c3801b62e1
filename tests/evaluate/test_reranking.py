"""Retrieval whose nearest candidates a judge puts into order."""

import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.evaluate.reranking import evaluate_reranked_retrieval, matching_judge
from repkit.evaluate.retrieval import evaluate_retrieval

RANDOM = np.random.default_rng(0)
IMAGES, TEXTS = 20, 40
IDS = {
    "image_ids": np.arange(IMAGES),
    "text_image_ids": np.repeat(np.arange(IMAGES), 2),
    # Captions 0 and 7 are equal, so that each belongs to two images.
    "caption_ids": np.where(np.arange(TEXTS) == 7, 0, np.arange(TEXTS)),
}
IMAGE_EMBEDS = RANDOM.normal(size=(IMAGES, 6)).astype(np.float32)
TEXT_EMBEDS = (np.repeat(IMAGE_EMBEDS, 2, axis=0) + 1.5 * RANDOM.normal(size=(TEXTS, 6))).astype(np.float32)
TEXT_EMBEDS[7] = TEXT_EMBEDS[0]
EMBEDS = IMAGE_EMBEDS, TEXT_EMBEDS


def belong(images, texts):
    return (texts // 2 == images) | ((texts == 0) & (images == 3))


def test_a_judge_that_agrees_with_the_embeddings_changes_nothing():
    def judge(images, texts):
        return np.sum(IMAGE_EMBEDS[images] * TEXT_EMBEDS[texts], axis=1)

    for candidates in (1, 5, TEXTS + 1):
        assert evaluate_reranked_retrieval(*EMBEDS, judge, **IDS, candidates=candidates) == evaluate_retrieval(
            *EMBEDS, **IDS
        )


def test_a_judge_that_knows_finds_what_is_among_the_candidates():
    before = evaluate_retrieval(*EMBEDS, **IDS, ks=(1, 5))
    after = evaluate_reranked_retrieval(*EMBEDS, belong, **IDS, candidates=5, ks=(1, 5))
    for direction in ("image_to_text", "text_to_image"):
        assert before[f"{direction}/R@1"] < before[f"{direction}/R@5"] < 1
        assert after[f"{direction}/R@1"] == after[f"{direction}/R@5"] == before[f"{direction}/R@5"]


def test_a_judge_that_is_always_wrong_or_undecided_finds_nothing():
    for judge in (lambda *rows: -belong(*rows).astype(float), lambda images, texts: np.zeros(len(images))):
        metrics = evaluate_reranked_retrieval(*EMBEDS, judge, **IDS, candidates=10, ks=(1,))
        assert metrics["image_to_text/R@1"] == metrics["text_to_image/R@1"] == 0


def test_the_matching_head_judges_the_pairs_asked_for_in_batches():
    def forward(params, batch, key):
        yes = params * batch["image"][:, 0, 0, 0] + batch["token_ids"][:, 0]
        return {"matching": {"logits": jnp.stack([jnp.ones_like(yes), yes], axis=-1)[:, None]}}

    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    token_ids, token_mask = np.arange(10, 13)[:, None], np.ones((3, 1), bool)
    judge = matching_judge(forward, 100.0, images, token_ids, token_mask, batch_size=2)
    scores = judge(np.array([3, 0, 1]), np.array([0, 2, 1]))
    np.testing.assert_allclose(scores, [309.0, 11.0, 110.0])


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="candidates >= 1"):
        evaluate_reranked_retrieval(*EMBEDS, belong, **IDS, candidates=0)
    with pytest.raises(InputError, match="one for each pair"):
        evaluate_reranked_retrieval(*EMBEDS, lambda images, texts: np.zeros(1), **IDS)
