"""Zero-shot classification: an image gets the class whose prompts it is closest to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from repkit.checks import InputError
from repkit.metrics.classification import mean_per_class_accuracy, top_k_accuracy
from repkit.numerics import normalize


def class_embeddings(
    encode_texts: Callable[[list[str]], Float[Array, "n d"] | Float[np.ndarray, "n d"]],
    prompts: Mapping[Any, Sequence[str]],
) -> Float[np.ndarray, "c d"]:
    """One embedding per class from an ensemble of prompts.

        class_c = normalise( mean over prompts p of c of normalise( encode(p) ) )

    All prompts are encoded in one call.

    Args:
        encode_texts: texts to embeddings, one row each.
        prompts: class -> its prompts ("a photo of a seven", "the digit seven", ...).

    Returns:
        One row of length 1 per class, in the order of `prompts`.

    Raises:
        InputError: no classes, or a class without prompts.

    Example:
        >>> import numpy as np
        >>> encode_texts = lambda texts: np.array([[float("1" in text), float("2" in text)] for text in texts])
        >>> class_embeddings(encode_texts, {1: ["a 1", "the digit 1"], 2: ["a 2"]}).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    References:
        Radford et al., CLIP, ICML 2021, arXiv 2103.00020, section 3.1.4.
    """
    if not prompts:
        raise InputError("zero-shot: expected prompts for at least one class, got none")
    for name, texts_of_class in prompts.items():
        # A string is a sequence too, of one-letter prompts.
        if isinstance(texts_of_class, str) or not texts_of_class:
            raise InputError(f"zero-shot: expected a list of prompts for class {name!r}, got {texts_of_class!r}")
    texts = [text for texts_of_class in prompts.values() for text in texts_of_class]
    embeds = normalize(jnp.asarray(encode_texts(texts), jnp.float32))
    ends = np.cumsum([len(texts_of_class) for texts_of_class in prompts.values()])
    means = np.stack([rows.mean(axis=0) for rows in np.split(np.asarray(embeds), ends[:-1])])
    return np.asarray(normalize(jnp.asarray(means)))


def evaluate_zero_shot(
    image_embeds: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    class_embeds: Float[np.ndarray, "c d"],
) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy of the class with the highest cosine.

    Args:
        image_embeds: one row of length 1 per image.
        labels: the class of each image, an index into `class_embeds`.
        class_embeds: from `class_embeddings`.

    Returns:
        `top_1`, `top_5` and `mean_per_class` in [0, 1].

    Raises:
        InputError: a label that is not an index into `class_embeds`.

    Example:
        >>> import numpy as np
        >>> images = np.eye(3, dtype=np.float32)
        >>> evaluate_zero_shot(images, np.array([0, 1, 1]), images)["mean_per_class"]
        0.75
    """
    classes = len(class_embeds)
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise InputError(
            f"zero-shot: expected labels 0 ... {classes - 1}, as many as classes with prompts, got {outside[0]}"
        )
    scores = jnp.asarray(image_embeds @ class_embeds.T)
    classes_of_images = jnp.asarray(labels)
    return {
        "top_1": float(top_k_accuracy(scores, classes_of_images, k=1)),
        "top_5": float(top_k_accuracy(scores, classes_of_images, k=5)),
        "mean_per_class": float(mean_per_class_accuracy(scores.argmax(axis=1), classes_of_images, classes=classes)),
    }
