"""Losses of models that generate text."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import require_arrays, require_range
from repkit.losses._tokens import counting_tokens, mask_vectors, mean_over_tokens
from repkit.numerics import AxisName, Reduction, Scalar, at_least_float32, masked_logsumexp, reduce_loss


def caption_cross_entropy(
    logits: Float[Array, "b l v"],
    token_ids: Int[Array, "b l"],
    *,
    token_mask: Bool[Array, "b l"] | None = None,
    label_smoothing: Scalar = 0.0,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Cross-entropy of the next token, averaged over the tokens of an example.

        loss = mean over tokens of - sum_k q_k log softmax(z)_k,      q = (1 - epsilon) [k = token] + epsilon / v

    The mean is taken over the tokens of each example first, so that short and long texts count alike; with the numbers
    of tokens as `weights` it is the mean over all tokens. Value and gradient keep their digits as the model becomes
    certain: the token's own logit is kept out of the softmax's sum.

    Args:
        logits: predictions before the softmax [b l v]; `logits[:, i]` predicts `token_ids[:, i]`, so that whoever
            calls has shifted them.
        token_ids: the tokens to be generated, 0 ... v - 1 [b l]. An id out of range at a token that counts makes the
            loss NaN.
        token_mask: [b l]; False leaves a token (padding) out, whatever it and its logits hold.
        label_smoothing: epsilon in [0, 1]; 0 is the plain cross-entropy, and takes no time.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss in nats, at least float32; 0 with zero gradient for an example without a token that counts. With label
        smoothing its smallest value is the entropy of q, not 0.

    Raises:
        InputError: shapes that do not fit together, a smoothing out of range, or an unknown reduction.

    Example:
        >>> logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]]))
        >>> mask = jnp.array([[True, False]])
        >>> print(f"{caption_cross_entropy(logits, jnp.array([[0, 1]]), token_mask=mask):.4f}")  # log 2
        0.6931

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, section 7, for
        label smoothing. The mean over the tokens of an example before that over examples is our choice.
    """
    caller = "caption_cross_entropy"
    require_arrays(
        caller,
        {
            "logits": (logits, "float b l v"),
            "token_ids": (token_ids, "int b l"),
            "token_mask": (token_mask, "bool b l"),
            "label_smoothing": (label_smoothing, "number"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    require_range(caller, "label_smoothing", label_smoothing, at_least=0, at_most=1)
    counting = counting_tokens(token_ids.shape, token_mask, where)
    z = mask_vectors(at_least_float32(logits), counting)
    is_token = token_ids[..., None] == jnp.arange(z.shape[-1], dtype=token_ids.dtype)[None, None, :]
    own = jnp.sum(jnp.where(is_token, z, jnp.zeros_like(z)), axis=-1)
    values = jax.nn.softplus(masked_logsumexp(z, ~is_token & (z != -jnp.inf)) - own)
    if not (isinstance(label_smoothing, int | float) and label_smoothing == 0):
        values += jnp.asarray(label_smoothing, z.dtype) * (own - jnp.mean(z, axis=-1))
    values = jnp.where(jnp.any(is_token, axis=-1), values, jnp.nan)
    losses = mean_over_tokens(values, counting)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)
