"""Retrieval with several captions per image and shared captions, against a float64 loop over texts."""

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.evaluate import evaluate_retrieval


def recalls_by_loop(images, texts, captions_of_images, k):
    """Float64 loops over dictionaries: image -> embedding, caption text -> embedding, image -> its set of captions."""
    scores = {(i, t): float(np.dot(images[i].astype(np.float64), texts[t])) for i in images for t in texts}

    def hit(candidates, right):
        return bool(set(sorted(candidates, key=candidates.get, reverse=True)[:k]) & right)

    forth = [hit({t: scores[i, t] for t in texts}, captions_of_images[i]) for i in images]
    back = [hit({i: scores[i, t] for i in images}, {i for i in images if t in captions_of_images[i]}) for t in texts]
    return np.mean(forth), np.mean(back)


@pytest.mark.parametrize("pair_rows", [True, False])
@pytest.mark.parametrize("block", [3, 100])
def test_recalls_equal_the_loop(pair_rows, block):
    rng = np.random.default_rng(0)
    words = [f"caption {i}" for i in range(9)]
    images = {100 + i: rng.normal(size=5).astype(np.float32) for i in range(12)}
    texts = {word: rng.normal(size=5).astype(np.float32) for word in words}
    # Image 100 + i has one to three captions; images share captions, and one image was given the same caption twice.
    rows = [(100 + i, words[(i * 2 + j) % 9]) for i in range(12) for j in range(1 + i % 3)] + [(100, words[0])]
    used = {text for _, text in rows}
    texts = {word: value for word, value in texts.items() if word in used}
    captions_of_images = {i: {text for image, text in rows if image == i} for i in images}

    row_images = np.array([image for image, _ in rows])
    image_ids = row_images if pair_rows else np.array(list(images))
    metrics = evaluate_retrieval(
        np.stack([images[i] for i in image_ids]),
        np.stack([texts[text] for _, text in rows]),
        image_ids=image_ids,
        text_image_ids=row_images,
        caption_ids=np.array([words.index(text) * 7 for _, text in rows]),
        ks=(1, 3),
        block=block,
    )
    for k in (1, 3):
        forth, back = recalls_by_loop(images, texts, captions_of_images, k)
        assert metrics[f"image_to_text/R@{k}"] == pytest.approx(forth)
        assert metrics[f"text_to_image/R@{k}"] == pytest.approx(back)
        assert 0 < forth < 1 or 0 < back < 1
    assert metrics["image_to_text/median_rank"] >= 1


def test_any_image_with_an_equal_caption_is_right():
    # Both images carry the same caption, and the second lies closer to it.
    images = np.array([[0.6, 0.8], [1.0, 0.0], [-1.0, 0.0]], np.float32)
    texts = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], np.float32)
    ids = np.arange(3)
    metrics = evaluate_retrieval(
        images, texts, image_ids=ids, text_image_ids=ids, caption_ids=np.array([5, 5, 6]), ks=(1,)
    )
    assert metrics["text_to_image/R@1"] == metrics["image_to_text/R@1"] == 1.0


def test_collapsed_embeddings_score_nothing():
    same = np.ones((20, 4), np.float32) / 2
    ids = np.arange(20)
    metrics = evaluate_retrieval(same, same, image_ids=ids, text_image_ids=ids, caption_ids=ids)
    assert {value for name, value in metrics.items() if "R@" in name} == {0.0}
    assert metrics["text_to_image/median_rank"] == 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_ids": np.arange(2)}, r"expected image_ids \(3,\), one for each row, got image_ids \(2,\)"),
        ({"caption_ids": np.arange(4)}, r"caption_ids \(4,\)"),
        (
            {"text_image_ids": np.array([0, 1, 9])},
            "1 captions belong to images that are not there, the first to image 9",
        ),
        ({"text_image_ids": np.array([0, 1, 1])}, "1 images have no caption, the first is image 2"),
    ],
)
def test_ids_that_do_not_fit_are_named(change, said):
    ids = np.arange(3)
    given = {"image_ids": ids, "text_image_ids": ids, "caption_ids": ids} | change
    with pytest.raises(InputError, match=said):
        evaluate_retrieval(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), **given)
