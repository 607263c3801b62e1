"""Cross-entropy of whole examples."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import require_arrays
from repkit.losses.generation import caption_cross_entropy
from repkit.numerics import AxisName, Reduction, Scalar


def classification_cross_entropy(
    logits: Float[Array, "b v"],
    labels: Int[Array, " b"],
    *,
    label_smoothing: Scalar = 0.0,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Cross-entropy of each example's class.

        loss_i = - sum_k q_ik log softmax(z_i)_k,      q = (1 - epsilon) [k = label] + epsilon / v

    It is `caption_cross_entropy` of texts of one token: value and gradient keep their digits as the model becomes
    certain.

    Args:
        logits: predictions before the softmax [b v].
        labels: the classes, 0 ... v - 1 [b]. A negative one is unknown: the example's loss is 0. One above v - 1 makes
            the loss NaN.
        label_smoothing: epsilon in [0, 1].
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean. An example of unknown class keeps its share.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss in nats, at least float32.

    Raises:
        InputError: shapes that do not fit together, a smoothing out of range, or an unknown reduction.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]))
        >>> print(f"{classification_cross_entropy(logits, jnp.array([0, -1]), reduction='sum'):.4f}")  # log 2
        0.6931

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, section 7, for
        label smoothing. Unknown classes are ours.
    """
    require_arrays(
        "classification_cross_entropy",
        {
            "logits": (logits, "float b v"),
            "labels": (labels, "int b"),
            "label_smoothing": (label_smoothing, "number"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    return caption_cross_entropy(
        jnp.expand_dims(logits, 1),
        jnp.expand_dims(labels, 1),
        token_mask=jnp.expand_dims(labels >= 0, 1),
        label_smoothing=label_smoothing,
        where=where,
        weights=weights,
        axis_name=axis_name,
        reduction=reduction,
    )
