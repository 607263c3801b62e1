"""Retrieval between images and captions, with several captions per image and captions that several images share."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from repkit.checks import InputError
from repkit.metrics.retrieval import match_ranks, median_rank, recall_at_k


def evaluate_retrieval(
    image_embeds: Float[np.ndarray, "i d"],
    text_embeds: Float[np.ndarray, "t d"],
    *,
    image_ids: Int[np.ndarray, " i"],
    text_image_ids: Int[np.ndarray, " t"],
    caption_ids: Int[np.ndarray, " t"],
    ks: tuple[int, ...] = (1, 5, 10),
    block: int = 1024,
) -> dict[str, float]:
    """Recall and median rank, image to text and text to image, each image and each caption counted once.

    Equal captions are one caption: the queries of text to image, and the candidates of image to text, are the unique
    captions, and an image belongs to every caption that was written for it. So 'a red seven on yellow' is answered
    rightly by any image that carries this caption. Image rows with equal ids are one image: rows of (image, caption)
    pairs, where an image comes back with each of its captions, can be handed over as they are, with `image_ids` and
    `text_image_ids` the same.

    Args:
        image_embeds: one row per image, of length 1 for the cosine.
        text_embeds: one row per caption.
        image_ids: which image each image row is, >= 0.
        text_image_ids: which image each caption was written for.
        caption_ids: equal for equal captions, >= 0.
        ks: the cut-offs of recall.
        block: queries scored at a time.

    Returns:
        `image_to_text/R@k` and `text_to_image/R@k` in [0, 1] for every k, `image_to_text/median_rank` and
        `text_to_image/median_rank`.

    Raises:
        InputError: ids that do not belong to the rows, a caption of an image that is not there, an image without a
            caption.

    Example:
        >>> import numpy as np
        >>> pairs = np.eye(3, dtype=np.float32)
        >>> ids = np.arange(3)
        >>> metrics = evaluate_retrieval(
        ...     pairs, pairs[[1, 0, 2]], image_ids=ids, text_image_ids=ids, caption_ids=ids, ks=(1,)
        ... )
        >>> round(metrics["text_to_image/R@1"], 3)
        0.333
    """
    unique = unique_rows(
        image_embeds, text_embeds, image_ids=image_ids, text_image_ids=text_image_ids, caption_ids=caption_ids
    )
    image, text = jnp.asarray(image_embeds[unique.image_rows]), jnp.asarray(text_embeds[unique.text_rows])
    ids_of_image, ids_of_text = jnp.asarray(unique.ids_of_image), jnp.arange(len(text))

    metrics = {}
    for direction, ranks in (
        ("image_to_text", match_ranks(image, text, ids_of_image, ids_of_text, block=block)),
        ("text_to_image", match_ranks(text, image, ids_of_text, ids_of_image, block=block)),
    ):
        metrics |= {f"{direction}/R@{k}": float(recall_at_k(ranks, k=k)) for k in ks}
        metrics[f"{direction}/median_rank"] = float(median_rank(ranks))
    return metrics


class UniqueRows(NamedTuple):
    """Each image and each caption once.

    Attributes:
        image_rows: a row of each image.
        text_rows: a row of each caption; the caption's id is its place here.
        ids_of_image: the captions of each image, filled up with -1.
    """

    image_rows: Int[np.ndarray, " i"]
    text_rows: Int[np.ndarray, " c"]
    ids_of_image: Int[np.ndarray, "i m"]


def unique_rows(
    image_embeds: Float[np.ndarray, "i d"],
    text_embeds: Float[np.ndarray, "t d"],
    *,
    image_ids: Int[np.ndarray, " i"],
    text_image_ids: Int[np.ndarray, " t"],
    caption_ids: Int[np.ndarray, " t"],
) -> UniqueRows:
    """What is counted once, of the arguments of `evaluate_retrieval`, which raises its errors here."""
    for name, ids, rows in (
        ("image_ids", image_ids, image_embeds),
        ("text_image_ids", text_image_ids, text_embeds),
        ("caption_ids", caption_ids, text_embeds),
    ):
        if ids.shape != rows.shape[:1]:
            raise InputError(f"retrieval: expected {name} ({len(rows)},), one for each row, got {name} {ids.shape}")
    images, image_rows = np.unique(image_ids, return_index=True)
    _, text_rows, caption_of_row = np.unique(caption_ids, return_index=True, return_inverse=True)
    return UniqueRows(image_rows, text_rows, _ids_by_image(images, text_image_ids, caption_of_row))


def _ids_by_image(
    images: Int[np.ndarray, " i"], text_image_ids: Int[np.ndarray, " t"], captions: Int[np.ndarray, " t"]
) -> Int[np.ndarray, "i m"]:
    """The captions of each image, filled up with -1 to the largest number of captions of any image."""
    image_of_row = np.searchsorted(images, text_image_ids)
    known = images[np.minimum(image_of_row, len(images) - 1)] == text_image_ids
    if not known.all():
        raise InputError(
            f"retrieval: {np.sum(~known)} captions belong to images that are not there, the first to image "
            f"{text_image_ids[~known][0]}"
        )
    pairs = np.unique(np.stack([image_of_row, captions]), axis=1)
    number = np.bincount(pairs[0], minlength=len(images))
    if not number.all():
        raise InputError(
            f"retrieval: {np.sum(number == 0)} images have no caption, the first is image {images[number == 0][0]}"
        )
    table = np.full((len(images), number.max()), -1, np.int32)
    table[pairs[0], np.arange(pairs.shape[1]) - np.repeat(np.cumsum(number) - number, number)] = pairs[1]
    return table
