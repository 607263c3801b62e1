"""What the losses over pairs of rows share: inputs in one precision, masks, and logits with all rows of all devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.numerics import Scalar, mask_rows, masked_logsumexp, row_indices, row_mask, rows_over


def same_precision(*arrays: Float[Array, "..."], where: Bool[Array, " b"] | None) -> list[Float[Array, "..."]]:
    """The arrays [b ...] in their common precision, at least float32, with the masked rows set to 0."""
    dtype = jnp.promote_types(jnp.result_type(*(array.dtype for array in arrays)), jnp.float32)
    return [mask_rows(array.astype(dtype), where) for array in arrays]


def pair_masks(
    labels: Int[Array, " b"] | None, where: Bool[Array, " b"] | None, *, rows: int, axis_name: str | None
) -> tuple[Bool[Array, "b B"], Bool[Array, "b B"]]:
    """Which of all rows are positives of this device's rows, and which are negatives; masked rows are neither.

    Rows with equal labels are positives of one another; without labels every row is its own only positive.
    """
    labels = row_indices(rows, axis_name) if labels is None else labels
    valid = row_mask(where, rows)
    is_pair = valid[:, None] & rows_over(valid, axis_name)[None, :]
    is_same = labels[:, None] == rows_over(labels, axis_name)[None, :]
    return is_pair & is_same, is_pair & ~is_same


def pair_products(anchors: Float[Array, "b d"], candidates: Float[Array, "B d"]) -> Float[Array, "b B"]:
    """Inner products of all anchors with all candidates, in full precision also where a device's default is lower."""
    return jnp.matmul(anchors, candidates.T, precision=jax.lax.Precision.HIGHEST)


def pair_logits(
    anchors: Float[Array, "b d"], candidates: Float[Array, "b d"], logit_scale: Scalar, *, axis_name: str | None
) -> Float[Array, "b B"]:
    """`logit_scale <anchor_i, candidate_j>` of this device's anchors with the candidates of all devices."""
    products = pair_products(anchors, rows_over(candidates, axis_name))
    return jnp.asarray(logit_scale, products.dtype) * products


def softmax_cross_entropy(
    logits: Float[Array, "b B"], positives: Bool[Array, "b B"], negatives: Bool[Array, "b B"]
) -> Float[Array, " b"]:
    """`log sum_j exp(s_ij) - mean_p s_ip` over a row's positives p and all its positives and negatives j.

    Written as `softplus(log sum_neg - log sum_pos) + log sum_pos` with logits counted from the positives' mean, so
    that nothing cancels when the loss tends to 0: for a single positive the second term is exactly 0. A row without
    positives has loss 0 and a zero gradient.
    """
    count = jnp.sum(positives, axis=-1, dtype=logits.dtype)
    mean = jnp.sum(jnp.where(positives, logits, 0.0), axis=-1) / jnp.maximum(count, 1.0)
    logits = logits - mean[:, None]
    has_positive, has_negative = count > 0, jnp.any(negatives, axis=-1)
    log_positive = jnp.where(has_positive, masked_logsumexp(logits, positives), 0.0)
    log_negative = jnp.where(has_negative, masked_logsumexp(logits, negatives), 0.0)
    against_negatives = jnp.where(has_positive & has_negative, jax.nn.softplus(log_negative - log_positive), 0.0)
    return against_negatives + log_positive
