"""Deep feature separation: room for what one modality knows and the other does not."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import require_arrays
from repkit.losses._old_pairs import pair_masks, pair_products, same_precision, softmax_cross_entropy
from repkit.numerics import AxisName, Reduction, Scalar, WeightedMean, reduce_loss, row_mask, rows_over


def feature_separation(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    image_independent: Float[Array, "b d"],
    text_independent: Float[Array, "b d"],
    augmented_image_independent: Float[Array, "b d"],
    augmented_text_independent: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    orthogonality_weight: Scalar = 1.0,
    contrastive_weight: Scalar = 1.0,
    uniformity_weight: Scalar = 1.0,
    labels: Int[Array, " b"] | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Keeps a second, independent projection of each modality orthogonal to the shared one, informative and spread out.

    With shared features V, T, independent features V', T' and those of augmented views V'^a, T'^a of N rows:

        L_Sep   = L_Ortho + L_Con + L_Uni
        L_Ortho = 1/N sum_j ( <V_j, V'_j>^2 + <T_j, T'_j>^2 )
        L_Con   = InfoNCE(V' -> V'^a) + InfoNCE(T' -> T'^a)             anchors -> positives and negatives
        L_Uni   = log 1/N sum_jk ( G(V'_j, V'_k) + G(T'_j, T'_k) )      G(u, v) = exp(-2 |u - v|^2), j = k included

    L_Uni is one number for the batch and no sum over rows: every row carries it, so that the weighted mean over rows is
    L_Sep. `weights` weigh its anchors j.

    Args:
        image_embeds: shared image features V [b d], normally of unit length; used as given.
        text_embeds: shared text features T [b d].
        image_independent: second projection of the image V' [b d].
        text_independent: second projection of the text T' [b d].
        augmented_image_independent: second projection of the image's augmented view V'^a [b d].
        augmented_text_independent: second projection of the text's augmented view T'^a [b d].
        logit_scale: scalar > 0 that multiplies the inner products in L_Con (1 / temperature); may be learned.
        orthogonality_weight: factor of L_Ortho.
        contrastive_weight: factor of L_Con.
        uniformity_weight: factor of L_Uni.
        labels: [b]; rows with equal labels have the same text, and are positives of one another in T' -> T'^a. In
            V' -> V'^a only the row's own view is a positive: equal texts do not make equal images.
        where: [b]; False removes the row as anchor and as candidate.
        weights: [b], >= 0; the row's share of the mean. A row of weight 0 is still a candidate.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient for rows that are masked.

    Raises:
        InputError: shapes that do not fit together, or an unknown reduction.

    Example:
        >>> shared, independent = jnp.eye(4)[:2], jnp.eye(4)[2:]
        >>> loss = feature_separation(
        ...     shared, shared, independent, independent, independent, independent, logit_scale=100.0
        ... )
        >>> print(f"{loss:.4f}")  # orthogonal and told apart; what remains is log 2 + log(1 + exp(-4))
        0.7113

    References:
        Jiang et al., "Understanding and Constructing Latent Modality Structures in Multi-Modal Representation
        Learning", CVPR 2023, arXiv 2303.05952; the unit weights are the paper's. The positive as it is printed there,
        <V'_j, V'_j>, is a constant; the augmented view in its place is our choice, and so are the labels.
    """
    require_arrays(
        "feature_separation",
        {
            "image_embeds": (image_embeds, "float b d"),
            "text_embeds": (text_embeds, "float b d"),
            "image_independent": (image_independent, "float b d"),
            "text_independent": (text_independent, "float b d"),
            "augmented_image_independent": (augmented_image_independent, "float b d"),
            "augmented_text_independent": (augmented_text_independent, "float b d"),
            "logit_scale": (logit_scale, "number"),
            "labels": (labels, "int b"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    images, texts, own_images, own_texts, own_images_augmented, own_texts_augmented = same_precision(
        image_embeds,
        text_embeds,
        image_independent,
        text_independent,
        augmented_image_independent,
        augmented_text_independent,
        where=where,
    )
    rows, dtype = images.shape[0], images.dtype

    orthogonality = jnp.square(jnp.sum(images * own_images, axis=-1)) + jnp.square(jnp.sum(texts * own_texts, axis=-1))

    def cross_entropy(
        anchors: Float[Array, "b d"], candidates: Float[Array, "b d"], labels: Int[Array, " b"] | None
    ) -> Float[Array, " b"]:
        products = pair_products(anchors, candidates, axis_name=axis_name)
        positives, negatives = pair_masks(labels, where, rows=rows, axis_name=axis_name)
        return softmax_cross_entropy(products, logit_scale, positives, negatives)

    contrast = cross_entropy(own_images, own_images_augmented, None) + cross_entropy(
        own_texts, own_texts_augmented, labels
    )

    valid = row_mask(where, rows)
    kernel_sums = _kernel_sums(own_images, valid, axis_name) + _kernel_sums(own_texts, valid, axis_name)
    kernel = WeightedMean.of(kernel_sums, valid, weights).sum_over(axis_name)
    is_empty = kernel.weight == 0
    uniformity = jnp.log(jnp.where(is_empty, 1.0, kernel.value()))

    losses = (
        jnp.asarray(orthogonality_weight, dtype) * orthogonality
        + jnp.asarray(contrastive_weight, dtype) * contrast
        + jnp.asarray(uniformity_weight, dtype) * uniformity
    )
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def _kernel_sums(x: Float[Array, "b d"], valid: Bool[Array, " b"], axis_name: AxisName | None) -> Float[Array, " b"]:
    """`sum_k exp(-2 |x_j - x_k|^2)` over all valid rows k of all devices."""
    squares = jnp.sum(jnp.square(x), axis=-1)
    distances = squares[:, None] + rows_over(squares, axis_name)[None, :] - 2 * pair_products(x, x, axis_name=axis_name)
    # Rounding may leave a distance below 0, and far below it for long vectors.
    kernel = jnp.exp(-2 * jnp.maximum(distances, 0.0))
    return jnp.sum(jnp.where(rows_over(valid, axis_name)[None, :], kernel, 0.0), axis=-1)
