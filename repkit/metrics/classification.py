"""Classification metrics from scores or predictions."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import InputError
from repkit.numerics import WeightedMean, at_least_float32


def top_k_accuracy(
    scores: Float[Array, "b c"], labels: Int[Array, " b"], *, k: int, where: Bool[Array, " b"] | None = None
) -> Float[Array, ""]:
    """The share of examples whose class is among the k best scored.

        top_k = mean_i [1 + |{j != y_i: score_ij not below score_i,y_i}| <= k]

    Ties are pessimistic: equal scores for all classes are wrong for every k below c, and so are NaN scores.

    Args:
        scores: one score per example and class; any scale.
        labels: the class of each example, 0 ... c - 1. A label outside that range is never right.
        k: how many classes are looked at.
        where: False leaves the example out of the mean.

    Returns:
        A scalar in [0, 1]; 0 without examples.

    Raises:
        InputError: shapes that do not belong together, or k below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = jnp.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
        >>> [float(top_k_accuracy(scores, jnp.array([1, 2]), k=k)) for k in (1, 3)]
        [0.5, 1.0]
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise InputError(
            f"top_k_accuracy: expected scores [b c] and labels [b], got scores {scores.shape} and labels {labels.shape}"
        )
    if k < 1:
        raise InputError(f"top_k_accuracy: expected k of at least 1, got {k}")
    scores = at_least_float32(scores)
    is_label = labels[:, None] == jnp.arange(scores.shape[1])[None, :]
    label_score = jnp.max(jnp.where(is_label, scores, -jnp.inf), axis=1, keepdims=True)
    before = jnp.sum(~is_label & ~(scores < label_score), axis=1)
    right = is_label.any(axis=1) & (before < k)
    return WeightedMean.of(at_least_float32(right), where=where).value()


def confusion_matrix(
    predictions: Int[Array, " b"], labels: Int[Array, " b"], *, classes: int, where: Bool[Array, " b"] | None = None
) -> Int[Array, "c c"]:
    """How often each class was taken for each.

        matrix_yp = |{i: label_i = y, prediction_i = p}|

    Args:
        predictions: the predicted class of each example.
        labels: the class of each example.
        classes: c. Examples whose label or prediction lies outside 0 ... c - 1 are not counted.
        where: False leaves the example out.

    Returns:
        Counts; rows are classes, columns predictions.

    Raises:
        InputError: predictions and labels of different shape.

    Example:
        >>> import jax.numpy as jnp
        >>> confusion_matrix(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]), classes=2).tolist()
        [[1, 1], [0, 1]]
    """
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise InputError(
            "confusion_matrix: expected predictions [b] and labels [b], got "
            f"predictions {predictions.shape} and labels {labels.shape}"
        )
    counted = (labels >= 0) & (labels < classes) & (predictions >= 0) & (predictions < classes)
    if where is not None:
        counted &= where
    cell = jnp.where(counted, labels * classes + predictions, 0)
    return jnp.zeros(classes**2, jnp.int32).at[cell].add(counted.astype(jnp.int32)).reshape(classes, classes)


def mean_per_class_accuracy(
    predictions: Int[Array, " b"], labels: Int[Array, " b"], *, classes: int, where: Bool[Array, " b"] | None = None
) -> Float[Array, ""]:
    """The accuracy of each class, averaged over the classes that occur.

        mean over y with n_y > 0 of |{i: label_i = prediction_i = y}| / n_y,      n_y = |{i: label_i = y}|

    Args:
        predictions: the predicted class of each example; one outside 0 ... c - 1 is wrong.
        labels: the class of each example. Examples with a label outside 0 ... c - 1 are left out.
        classes: c.
        where: False leaves the example out.

    Returns:
        A scalar in [0, 1]; 0 without examples.

    Raises:
        InputError: predictions and labels of different shape.

    Example:
        >>> import jax.numpy as jnp
        >>> float(mean_per_class_accuracy(jnp.array([0, 0, 0, 0]), jnp.array([0, 0, 0, 1]), classes=2))
        0.5
    """
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise InputError(
            "mean_per_class_accuracy: expected predictions [b] and labels [b], got "
            f"predictions {predictions.shape} and labels {labels.shape}"
        )
    is_class = labels[:, None] == jnp.arange(classes)[None, :]
    if where is not None:
        is_class &= where[:, None]
    total = jnp.sum(is_class, axis=0)
    right = jnp.sum(is_class & (predictions == labels)[:, None], axis=0)
    return WeightedMean.of(right / jnp.maximum(total, 1), where=total > 0).value()
