"""Geometric consistency: both modalities, and their augmented views, arrange the batch alike."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from repkit.checks import InputError, require_arrays
from repkit.losses._old_pairs import pair_products, same_precision
from repkit.numerics import AxisName, Reduction, Scalar, reduce_loss, row_mask, rows_over


def geometric_consistency(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    augmented_image_embeds: Float[Array, "b d"] | None = None,
    augmented_text_embeds: Float[Array, "b d"] | None = None,
    *,
    cross_modal_weight: Scalar = 1.0,
    in_modal_weight: Scalar = 1.0,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Squared differences between inner products that should agree, L_GC, and L_GC^a where augmented views are given.

    With image features V, text features T, weights a (cross-modal) and b (in-modal) and N rows:

        L_GC   = 1/N sum_jk [ a (<V_j, T_k> - <V_k, T_j>)^2 + b (<V_j, V_k> - <T_j, T_k>)^2 ]
        L_GC^a = 1/N sum_jk b [ (<V_j, V_k> - <V_j^a, V_k^a>)^2 + (<T_j, T_k> - <T_j^a, T_k^a>)^2 ]
                 + 1/N sum_j a (<V_j, T_j> - <V_j^a, T_j^a>)^2

    There is no temperature. The sum over k is over all rows that `where` allows, so that the loss grows with the batch.

    Args:
        image_embeds: V [b d], normally of unit length; used as given.
        text_embeds: T [b d].
        augmented_image_embeds: V^a [b d]; None leaves L_GC^a out, and then so must be `augmented_text_embeds`.
        augmented_text_embeds: T^a [b d].
        cross_modal_weight: a, factor of the terms that compare images with texts.
        in_modal_weight: b, factor of the terms that compare within a modality.
        where: [b]; False removes the row as anchor and as candidate.
        weights: [b], >= 0; the share of row j in the mean. A row of weight 0 is still a candidate k.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient for rows that are masked.

    Raises:
        InputError: shapes that do not fit together, one augmented view without the other, or an unknown reduction.

    Example:
        >>> images, texts = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
        >>> print(geometric_consistency(images, texts))
        2.0

    References:
        Jiang et al., "Understanding and Constructing Latent Modality Structures in Multi-Modal Representation
        Learning", CVPR 2023, arXiv 2303.05952, with both weights 1. Weights of 0.25 without augmented views are those
        of Goel et al., "CyCLIP: Cyclic Contrastive Language-Image Pretraining", arXiv 2205.14459. That the weights
        also apply to L_GC^a is our choice.
    """
    require_arrays(
        "geometric_consistency",
        {
            "image_embeds": (image_embeds, "float b d"),
            "text_embeds": (text_embeds, "float b d"),
            "augmented_image_embeds": (augmented_image_embeds, "float b d"),
            "augmented_text_embeds": (augmented_text_embeds, "float b d"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    if (augmented_image_embeds is None) != (augmented_text_embeds is None):
        given, missing = ("image", "text") if augmented_text_embeds is None else ("text", "image")
        raise InputError(
            f"geometric_consistency: got augmented_{given}_embeds without augmented_{missing}_embeds; "
            "pass both or neither"
        )
    augmented = [x for x in (augmented_image_embeds, augmented_text_embeds) if x is not None]
    images, texts, *views = same_precision(image_embeds, text_embeds, *augmented, where=where)
    candidates = rows_over(row_mask(where, images.shape[0]), axis_name)[None, :]
    cross_modal, in_modal = (jnp.asarray(weight, images.dtype) for weight in (cross_modal_weight, in_modal_weight))

    def products(anchors: Float[Array, "b d"], candidates: Float[Array, "b d"]) -> Float[Array, "b B"]:
        return pair_products(anchors, candidates, axis_name=axis_name)

    def discrepancy(first: Float[Array, "b B"], second: Float[Array, "b B"]) -> Float[Array, " b"]:
        return jnp.sum(jnp.where(candidates, jnp.square(first - second), 0.0), axis=-1)

    images_apart, texts_apart = products(images, images), products(texts, texts)
    losses = cross_modal * discrepancy(products(images, texts), products(texts, images))
    losses = losses + in_modal * discrepancy(images_apart, texts_apart)
    if views:
        image_views, text_views = views
        losses = losses + in_modal * discrepancy(images_apart, products(image_views, image_views))
        losses = losses + in_modal * discrepancy(texts_apart, products(text_views, text_views))
        pairs, view_pairs = jnp.sum(images * texts, axis=-1), jnp.sum(image_views * text_views, axis=-1)
        losses = losses + cross_modal * jnp.square(pairs - view_pairs)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)
