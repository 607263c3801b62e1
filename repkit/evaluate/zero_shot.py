"""Zero-shot classification: an image gets the class whose prompts it is closest to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from repkit.checks import InputError, unknown_name
from repkit.metrics.classification import mean_per_class_accuracy, top_k_accuracy
from repkit.numerics import normalize

Ensemble: TypeAlias = Literal["embeddings", "probabilities"]


def prompt_embeddings(
    encode_texts: Callable[[list[str]], Float[Array, "n d"] | Float[np.ndarray, "n d"]],
    prompts: Mapping[Any, Sequence[str]],
) -> list[Float[np.ndarray, "p d"]]:
    """Embeds every class's prompts, in one call.

    Args:
        encode_texts: texts to embeddings, one row each.
        prompts: class -> its prompts ("a photo of a seven", "the digit seven", ...).

    Returns:
        For each class, in the order of `prompts`, one row of length 1 per prompt.

    Raises:
        InputError: no classes, or a class without prompts.

    Example:
        >>> import numpy as np
        >>> encode_texts = lambda texts: np.array([[float("1" in text), float("2" in text)] for text in texts])
        >>> [rows.tolist() for rows in prompt_embeddings(encode_texts, {1: ["a 1", "the digit 1"], 2: ["a 2"]})]
        [[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0]]]
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
    return np.split(np.asarray(embeds), ends[:-1])


def class_scores(
    image_embeds: Float[np.ndarray, "n d"],
    prompt_embeds: Sequence[Float[np.ndarray, "p d"]],
    *,
    ensemble: Ensemble,
    logit_scale: float | None = None,
) -> Float[np.ndarray, "n c"]:
    """How well each image fits each class, from the ensemble of the class's prompts.

        embeddings:     score_nc = < image_n, normalise( mean_p prompt_cp ) >
        probabilities:  score_nc = log( mean_p exp( logit_scale < image_n, prompt_cp > ) )

    The mean embedding is CLIP's choice, cheap and good where prompts say the same thing in other words. Prompts that
    describe different contexts ("a red seven on white", "a blue seven on black") may pull it to where no image is; the
    model's own probabilities, added over the contexts, are then the better ensemble.

    Args:
        image_embeds: one row of length 1 per image.
        prompt_embeds: from `prompt_embeddings`.
        ensemble: "embeddings" or "probabilities".
        logit_scale: the model's; required for "probabilities".

    Raises:
        InputError: an unknown ensemble, or probabilities without a logit scale.

    Example:
        >>> import numpy as np
        >>> prompts = [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.6, 0.8]])]
        >>> image = np.array([[0.0, 1.0]])
        >>> class_scores(image, prompts, ensemble="probabilities", logit_scale=20.0).argmax()
        np.int64(0)
        >>> class_scores(image, prompts, ensemble="embeddings").argmax()
        np.int64(1)

    References:
        Radford et al., CLIP, ICML 2021, arXiv 2103.00020, section 3.1.4, which ensembles over embeddings and names
        ensembling over probabilities as the alternative.
    """
    if ensemble not in get_args(Ensemble):
        raise unknown_name("prompt ensemble", ensemble, get_args(Ensemble))
    if ensemble == "embeddings":
        means = np.stack([rows.mean(axis=0) for rows in prompt_embeds])
        return image_embeds @ np.asarray(normalize(jnp.asarray(means))).T
    if logit_scale is None:
        raise InputError("zero-shot: an ensemble over probabilities needs the model's logit_scale, got none")
    logits = [logit_scale * image_embeds @ rows.T for rows in prompt_embeds]
    return np.stack([np.logaddexp.reduce(rows, axis=1) - np.log(rows.shape[1]) for rows in logits], axis=1)


def evaluate_zero_shot(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy of the class with the highest score.

    Args:
        scores: from `class_scores`.
        labels: the class of each image, a column of `scores`.

    Returns:
        `top_1`, `top_5` and `mean_per_class` in [0, 1].

    Raises:
        InputError: a label that is not a column of `scores`.

    Example:
        >>> import numpy as np
        >>> evaluate_zero_shot(np.eye(3, dtype=np.float32), np.array([0, 1, 1]))["mean_per_class"]
        0.75
    """
    classes = scores.shape[1]
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise InputError(
            f"zero-shot: expected labels 0 ... {classes - 1}, as many as classes with prompts, got {outside[0]}"
        )
    found, expected = jnp.asarray(scores), jnp.asarray(labels)
    return {
        "top_1": float(top_k_accuracy(found, expected, k=1)),
        "top_5": float(top_k_accuracy(found, expected, k=5)),
        "mean_per_class": float(mean_per_class_accuracy(found.argmax(axis=1), expected, classes=classes)),
    }
