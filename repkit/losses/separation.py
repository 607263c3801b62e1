"""Deep feature separation: room for what one modality knows and the other does not."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import require_arrays
from repkit.losses._pairs import row_products
from repkit.losses._partitions import pair_partitions, softmax_cross_entropy
from repkit.losses.form import Blocks, Form
from repkit.losses.uniformity import uniformity
from repkit.numerics import AxisName, Reduction, Scalar, reduce_loss, same_precision


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
    form: Form = Blocks(),
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
        orthogonality_weight: factor of L_Ortho. A part whose factor is the number 0 takes no time.
        contrastive_weight: factor of L_Con.
        uniformity_weight: factor of L_Uni.
        labels: [b]; rows with equal labels have the same text, and are positives of one another in T' -> T'^a. In
            V' -> V'^a only the row's own view is a positive: equal texts do not make equal images.
        form: in blocks, with memory of the inputs' size, or "plain"; see `repkit.losses.Blocks`.
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
    # Several parts add to one gradient: in the inputs' precision each would be rounded before it is added.
    images, texts, own_images, own_texts, own_images_augmented, own_texts_augmented = same_precision(
        image_embeds,
        text_embeds,
        image_independent,
        text_independent,
        augmented_image_independent,
        augmented_text_independent,
        where=where,
    )
    orthogonality = jnp.square(row_products(images, own_images)) + jnp.square(row_products(texts, own_texts))

    def cross_entropy(
        anchors: Float[Array, "b d"], candidates: Float[Array, "b d"], labels: Int[Array, " b"] | None
    ) -> Float[Array, " b"]:
        of_anchors, _ = pair_partitions(
            anchors, candidates, logit_scale=logit_scale, labels=labels, where=where, form=form, axis_name=axis_name
        )
        return softmax_cross_entropy(of_anchors)

    contrast = cross_entropy(own_images, own_images_augmented, None) + cross_entropy(
        own_texts, own_texts_augmented, labels
    )
    uniform = uniformity(
        own_images, own_texts, form=form, where=where, weights=weights, axis_name=axis_name, reduction="none"
    )
    losses = jnp.zeros_like(orthogonality)
    for weight, part in (
        (orthogonality_weight, orthogonality),
        (contrastive_weight, contrast),
        (uniformity_weight, uniform),
    ):
        if not (isinstance(weight, int | float) and weight == 0):
            losses += jnp.asarray(weight, losses.dtype) * part
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)
