"""What the losses over pairs of rows share: inputs in one precision, masks, and logits with all rows of all devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.numerics import AxisName, Scalar, mask_rows, masked_logsumexp, row_indices, row_mask, rows_over


def same_precision(*arrays: Float[Array, "..."], where: Bool[Array, " b"] | None) -> list[Float[Array, "..."]]:
    """The arrays [b ...] in their common precision, at least float32, with the masked rows set to 0."""
    given = [jnp.asarray(array) for array in arrays]
    dtype = jnp.promote_types(jnp.result_type(*given), jnp.float32)
    return [mask_rows(array.astype(dtype), where) for array in given]


def pair_masks(
    labels: Int[Array, " b"] | None, where: Bool[Array, " b"] | None, *, rows: int, axis_name: AxisName | None
) -> tuple[Bool[Array, "b B"], Bool[Array, "b B"]]:
    """Which of all rows are positives of this device's rows, and which are negatives; masked rows are neither.

    Rows with equal labels are positives of one another; without labels every row is its own only positive.
    """
    labels = row_indices(rows, axis_name) if labels is None else labels
    valid = row_mask(where, rows)
    is_pair = valid[:, None] & rows_over(valid, axis_name)[None, :]
    is_same = labels[:, None] == rows_over(labels, axis_name)[None, :]
    return is_pair & is_same, is_pair & ~is_same


def pair_products(
    anchors: Float[Array, "b d"], candidates: Float[Array, "b d"], *, axis_name: AxisName | None
) -> Float[Array, "b B"]:
    """`<anchor_i, candidate_j>` of this device's anchors with the candidates of all devices, in full precision."""
    return jnp.matmul(anchors, rows_over(candidates, axis_name).T, precision=jax.lax.Precision.HIGHEST)


def softmax_cross_entropy(
    products: Float[Array, "b B"],
    logit_scale: Scalar,
    positives: Bool[Array, "b B"],
    negatives: Bool[Array, "b B"],
) -> Float[Array, " b"]:
    """`log sum_j exp(s_ij) - mean_p s_ip` with s = logit_scale products, p over positives, j over both kinds.

    Written as `softplus(log sum_neg - log sum_pos) + log sum_pos` with products counted from the positives' mean, so
    that neither value nor gradient cancels when the loss tends to 0: for a single positive the second term and its
    gradient are exactly 0. A row without positives has loss 0 and a zero gradient.
    """
    scale = jnp.asarray(logit_scale, products.dtype)
    count = jnp.sum(positives, axis=-1, dtype=products.dtype)
    has_positive, has_negative = count > 0, jnp.any(negatives, axis=-1)
    # The second term's gradients meet in this array before anything else is added to them: (1 - 1) + tiny keeps the
    # tiny, (1 + tiny) - 1 would not.
    positive_products = jnp.where(positives, products, 0.0)
    mean = jnp.sum(positive_products, axis=-1) / jnp.maximum(count, 1.0)
    spread = jnp.where(has_positive, masked_logsumexp(scale * (positive_products - mean[:, None]), positives), 0.0)

    logits = scale * (products - jax.lax.stop_gradient(mean)[:, None])
    log_positive = jnp.where(has_positive, masked_logsumexp(logits, positives), 0.0)
    log_negative = jnp.where(has_negative, masked_logsumexp(logits, negatives), 0.0)
    return jnp.where(has_positive & has_negative, jax.nn.softplus(log_negative - log_positive), 0.0) + spread
