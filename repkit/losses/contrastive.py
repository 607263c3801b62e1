"""Contrastive losses over the pairs of a batch."""

from typing import Literal, TypeAlias, get_args

from jaxtyping import Array, Bool, Float, Int

from repkit.checks import require_arrays, require_choice
from repkit.losses._pairs import embeddings
from repkit.losses._partitions import pair_partitions, softmax_cross_entropy
from repkit.losses.form import Blocks, Form, require_form
from repkit.numerics import AxisName, Reduction, Scalar, reduce_loss

Direction: TypeAlias = Literal["symmetric", "image_to_text", "text_to_image"]


def info_nce(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    labels: Int[Array, " b"] | None = None,
    direction: Direction = "symmetric",
    form: Form = Blocks(),
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Softmax cross-entropy of each row against all rows of the other modality (InfoNCE; CLIP's loss).

    With `s_ij = logit_scale <image_i, text_j>`, `P_i` the rows with the label of row i (without labels: i alone) and j
    over all rows that `where` allows:

        image_to_text_i = - 1/|P_i| sum_{p in P_i} log( exp(s_ip) / sum_j exp(s_ij) )

    text_to_image is the same on the transposed matrix, symmetric the mean of both. The relative precision stays when
    the loss tends to 0.

    Args:
        image_embeds: [b d], normally of unit length; used as given.
        text_embeds: [b d], row i belongs to row i of the images.
        logit_scale: scalar > 0 that multiplies the inner products (1 / temperature); may be learned.
        labels: [b]; rows with equal labels are positives of one another, such as equal captions.
        direction: "symmetric", "image_to_text" (images are anchors) or "text_to_image".
        form: in blocks, with memory of the inputs' size, or "plain"; see `repkit.losses.Blocks`.
        where: [b]; False removes the row as anchor and as candidate.
        weights: [b], >= 0; the row's share of the mean. A row of weight 0 is still a candidate.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss in nats, at least float32; 0 with zero gradient for rows that are masked.

    Raises:
        InputError: shapes that do not fit together, or an unknown direction or reduction.

    Example:
        >>> import jax.numpy as jnp
        >>> embeds = jnp.eye(4)
        >>> print(f"{info_nce(embeds, embeds, logit_scale=2.0):.4f}")  # log(1 + 3 exp(-2))
        0.3408

    References:
        van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748, eq. 4;
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020,
        figure 3. Several positives: the mean outside the logarithm, as in Khosla et al., "Supervised Contrastive
        Learning", arXiv 2004.11362, eq. 2.
    """
    require_arrays(
        "info_nce",
        {
            "image_embeds": (image_embeds, "float b d"),
            "text_embeds": (text_embeds, "float b d"),
            "logit_scale": (logit_scale, "number"),
            "labels": (labels, "int b"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    require_choice("direction", direction, get_args(Direction))
    require_form("info_nce", form)
    images, texts = embeddings(image_embeds, text_embeds, where=where)
    of_images, of_texts = pair_partitions(
        images, texts, logit_scale=logit_scale, labels=labels, where=where, form=form, axis_name=axis_name
    )
    match direction:
        case "symmetric":
            losses = (softmax_cross_entropy(of_images) + softmax_cross_entropy(of_texts)) / 2
        case "image_to_text":
            losses = softmax_cross_entropy(of_images)
        case "text_to_image":
            losses = softmax_cross_entropy(of_texts)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)
