"""Contrastive losses over the pairs of a batch: softmax (InfoNCE), sigmoid, decoupled and global."""

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import require_choice
from repkit.losses._memory import LogPartitionMemory, bounded_exp, describe, look_up, remember, require_ids_and_rate
from repkit.losses._pairs import require_pairs, row_products
from repkit.losses._partitions import Partition, mean_positive, pair_partitions, softmax_cross_entropy
from repkit.losses._sigmoid import sigmoid_sums
from repkit.losses.form import Blocks, Form
from repkit.numerics import AxisName, Reduction, Scalar, reduce_loss, row_count, row_mask

Direction: TypeAlias = Literal["symmetric", "image_to_text", "text_to_image"]
Candidates: TypeAlias = Literal["augmented", "original"]


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
    images, texts = require_pairs(
        "info_nce",
        {"image_embeds": image_embeds, "text_embeds": text_embeds},
        form=form,
        where=where,
        weights=weights,
        logit_scale=logit_scale,
        labels=labels,
    )
    require_choice("direction", direction, get_args(Direction))
    partitions = pair_partitions(
        images, texts, logit_scale=logit_scale, labels=labels, where=where, form=form, axis_name=axis_name
    )
    losses = _in_direction(direction, softmax_cross_entropy, partitions)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def in_modal_info_nce(
    embeds: Float[Array, "b d"],
    augmented_embeds: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    candidates: Candidates = "augmented",
    labels: Int[Array, " b"] | None = None,
    form: Form = Blocks(),
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """InfoNCE within one modality: each row against the augmented view of itself.

    With rows z, their augmented views z^a, P_j the rows with the label of row j (without labels: j alone) and k over
    all rows that `where` allows:

        candidates = "augmented":  l_j = - 1/|P_j| sum_{p in P_j} log( exp(s <z_j, z_p^a>) / sum_k exp(s <z_j, z_k^a>) )
        candidates = "original":   the same with z_p and z_k in the place of z_p^a and z_k^a for all p, k other than j

    Args:
        embeds: z [b d], normally of unit length; used as given.
        augmented_embeds: z^a [b d].
        logit_scale: scalar s > 0 that multiplies the inner products (1 / temperature); may be learned.
        candidates: which views of the other rows a row is compared with.
        labels: [b]; rows with equal labels are positives of one another.
        form: in blocks, with memory of the inputs' size, or "plain"; see `repkit.losses.Blocks`.
        where: [b]; False removes the row as anchor and as candidate.
        weights: [b], >= 0; the row's share of the mean. A row of weight 0 is still a candidate.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss in nats, at least float32; 0 with zero gradient for rows that are masked.

    Raises:
        InputError: shapes that do not fit together, or an unknown choice of candidates, form or reduction.

    Example:
        >>> import jax.numpy as jnp
        >>> views = jnp.eye(4)
        >>> print(f"{in_modal_info_nce(views, views, logit_scale=2.0):.4f}")  # log(1 + 3 exp(-2))
        0.3408

    References:
        Jiang et al., "Understanding and Constructing Latent Modality Structures in Multi-Modal Representation
        Learning", CVPR 2023, arXiv 2303.05952: the terms V2V and T2T of L_Con. The paper prints the original views as
        candidates; the augmented ones are those of CyCLIP's code, arXiv 2205.14459.
    """
    views, augmented = require_pairs(
        "in_modal_info_nce",
        {"embeds": embeds, "augmented_embeds": augmented_embeds},
        form=form,
        where=where,
        weights=weights,
        logit_scale=logit_scale,
        labels=labels,
    )
    require_choice("candidates", candidates, get_args(Candidates))
    others = augmented if candidates == "augmented" else views
    partition, _ = pair_partitions(
        views, others, logit_scale=logit_scale, labels=labels, where=where, form=form, axis_name=axis_name
    )
    if candidates == "original":
        own = row_products(views, augmented)
        partition = partition._replace(own=jnp.asarray(logit_scale, own.dtype) * own)
    losses = softmax_cross_entropy(partition)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def sigmoid_contrastive(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    labels: Int[Array, " b"] | None = None,
    form: Form = Blocks(),
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Binary cross-entropy of every pair on its own: does this text belong to this image (SigLIP's loss)?

    With `s_ij = logit_scale <image_i, text_j> + logit_bias`, z_ij = 1 where the labels are equal (without labels: for
    i = j) and -1 elsewhere, and j over all rows that `where` allows:

        l_i = sum_j log(1 + exp(-z_ij s_ij))

    There is no softmax, so that no pair's gradient depends on the other pairs.

    Args:
        image_embeds: [b d], normally of unit length; used as given.
        text_embeds: [b d], row i belongs to row i of the images.
        logit_scale: scalar that multiplies the inner products; may be learned. The paper starts at 10.
        logit_bias: scalar that is added; may be learned. The paper starts at -10, because most pairs are negative.
        labels: [b]; rows with equal labels are positives of one another, such as equal captions.
        form: in blocks, with memory of the inputs' size, or "plain"; see `repkit.losses.Blocks`.
        where: [b]; False removes the row as anchor and as candidate.
        weights: [b], >= 0; the share of image i in the mean. A row of weight 0 is still a candidate.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss in nats per image, at least float32; 0 with zero gradient for rows that are masked.

    Raises:
        InputError: shapes that do not fit together, or an unknown form or reduction.

    Example:
        >>> import jax.numpy as jnp
        >>> embeds = jnp.eye(4)
        >>> loss = sigmoid_contrastive(embeds, embeds, logit_scale=10.0, logit_bias=-5.0)
        >>> print(f"{loss:.4f}")  # log(1 + exp(-5)) for the pair and for each of the 3 others
        0.0269

    References:
        Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, eq. 1. The labels are ours.
    """
    images, texts = require_pairs(
        "sigmoid_contrastive",
        {"image_embeds": image_embeds, "text_embeds": text_embeds},
        form=form,
        where=where,
        weights=weights,
        logit_scale=logit_scale,
        labels=labels,
        logit_bias=(logit_bias, "number"),
    )
    losses = sigmoid_sums(
        images,
        texts,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        labels=labels,
        where=where,
        weights=weights,
        form=form,
        axis_name=axis_name,
    )
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def decoupled_contrastive(
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
    """InfoNCE without the positives in the denominator (DCL): well separated pairs keep pushing.

    With `s_ij = logit_scale <image_i, text_j>`, P_i the rows with the label of row i (without labels: i alone) and N_i
    all others that `where` allows:

        image_to_text_i = - 1/|P_i| sum_{p in P_i} s_ip + log sum_{j in N_i} exp(s_ij)

    text_to_image is the same on the transposed matrix, symmetric the mean of both. The loss has no lower bound at 0.

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
        The loss in nats, at least float32; 0 with zero gradient for rows that are masked or have no negative.

    Raises:
        InputError: shapes that do not fit together, or an unknown direction, form or reduction.

    Example:
        >>> import jax.numpy as jnp
        >>> embeds = jnp.eye(4)
        >>> print(f"{decoupled_contrastive(embeds, embeds, logit_scale=2.0):.4f}")  # log 3 - 2
        -0.9014

    References:
        Yeh et al., "Decoupled Contrastive Learning", arXiv 2110.06848, eq. 6. Several positives are our choice.
    """
    images, texts = require_pairs(
        "decoupled_contrastive",
        {"image_embeds": image_embeds, "text_embeds": text_embeds},
        form=form,
        where=where,
        weights=weights,
        logit_scale=logit_scale,
        labels=labels,
    )
    require_choice("direction", direction, get_args(Direction))
    partitions = pair_partitions(
        images, texts, logit_scale=logit_scale, labels=labels, where=where, form=form, axis_name=axis_name
    )

    def contrast(partition: Partition) -> Float[Array, " b"]:
        return jnp.where(partition.negative_count > 0, partition.negatives - mean_positive(partition), 0.0)

    losses = _in_direction(direction, contrast, partitions)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def global_contrastive(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    memory: LogPartitionMemory,
    example_id: Int[Array, " b"] | None = None,
    memory_rate: Scalar | None = None,
    labels: Int[Array, " b"] | None = None,
    max_exponent: float = 60.0,
    memory_axis_name: AxisName | None = None,
    form: Form = Blocks(),
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> tuple[Float[Array, ""] | Float[Array, " b"], LogPartitionMemory]:
    """The contrast with all negatives of the data set, by a moving average per example (SogCLR).

    With `s_ij = logit_scale <anchor_i, candidate_j>`, s_i+ the mean score of its positives and m_i negatives N_i in the
    batch, the objective is the mean of log g_i over the data set, and each step's surrogate is linear in g_i of the
    batch:

        g_i = 1/m_i sum_{j in N_i} exp(s_ij - s_i+)
        u_i <- (1 - memory_rate) u_i + memory_rate g_i,    on the first visit g_i
        l_i = g_i / u_i                                    u_i held fixed

    whose gradient is that of log g_i with u_i in the place of the batch's noisy denominator. Both directions, image to
    text and text to image, are averaged.

    Args:
        image_embeds: [b d], normally of unit length; used as given.
        text_embeds: [b d], row i belongs to row i of the images.
        logit_scale: scalar > 0 that multiplies the inner products (1 / temperature); may be learned.
        memory: from `init_memory(dataset_size)` or the last call; it holds log u_i.
        example_id: [b], the row's place in the memory, in [0, n); required. Rows of other ids use g_i of this batch and
            are not remembered; of equal ids the average is remembered.
        memory_rate: share in (0, 1] of this batch in the new average; required. The paper's gamma.
        labels: [b]; rows with equal labels are positives of one another, such as equal captions.
        max_exponent: g_i / u_i continues linearly in its logarithm beyond exp(max_exponent), which bounds its gradient.
        memory_axis_name: the axis that the memory's examples are split over, each device holding an equal part of them
            in the order of the axis; None when every device holds them all, and under `jit`.
        form: in blocks, with memory of the inputs' size, or "plain"; see `repkit.losses.Blocks`.
        where: [b]; False removes the row as anchor and as candidate, and leaves its memory as it is.
        weights: [b], >= 0; the row's share of the mean. A row of weight 0 is still a candidate and remembered.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The surrogate loss, at least float32, and the new memory. The surrogate's value says nothing: watch
        `memory.diagnostics["info_nce"]`, the mean of log(1 + (n - 1) g_i) for n examples. A row without any negative in
        the batch has loss 0.

    Raises:
        InputError: shapes that do not fit together, an unknown form or reduction, or a missing id or rate.

    Example:
        >>> import jax.numpy as jnp
        >>> from repkit.losses import init_memory
        >>> embeds = jnp.eye(4)
        >>> loss, memory = global_contrastive(
        ...     embeds, embeds, logit_scale=2.0, memory=init_memory(100), example_id=jnp.arange(4), memory_rate=0.1
        ... )
        >>> print(f"{memory.diagnostics['info_nce']:.4f}")  # log(1 + 99 exp(-2))
        2.6671

    References:
        Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm
        Performance", arXiv 2202.12387, algorithm 1. Several positives and the bound are our choice; the memory is
        updated before it divides, as there.
    """
    images, texts = require_pairs(
        "global_contrastive",
        {"image_embeds": image_embeds, "text_embeds": text_embeds},
        form=form,
        where=where,
        weights=weights,
        logit_scale=logit_scale,
        labels=labels,
        example_id=(example_id, "int b"),
    )
    ids, rate = require_ids_and_rate("global_contrastive", example_id, memory_rate)
    valid = row_mask(where, images.shape[0])
    partitions = pair_partitions(
        images, texts, logit_scale=logit_scale, labels=labels, where=where, form=form, axis_name=axis_name
    )
    # From here on the first axis is the direction: images as anchors, texts as anchors.
    partition = jax.tree.map(lambda *each: jnp.stack(each), *partitions)
    usable = partition.negative_count[0] > 0
    contrast = partition.negatives - jnp.log(jnp.maximum(partition.negative_count, 1.0)) - mean_positive(partition)
    fresh = jnp.where(usable, jax.lax.stop_gradient(contrast), 0.0)
    found = look_up(memory, ids, valid, fresh.dtype, axis_name, memory_axis_name)
    recalled = remember(memory, found, fresh, usable, memory_rate=rate, axis_name=axis_name)
    exponents = contrast - recalled.log_values
    losses = jnp.where(usable, jnp.mean(bounded_exp(exponents, max_exponent), axis=0), 0.0)
    loss = reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)
    size = row_count(memory.visited.shape[0], memory_axis_name)
    info_nce = jnp.logaddexp(0.0, fresh + jnp.log(jnp.asarray(max(size - 1, 1), fresh.dtype)))
    diagnostics = describe(recalled, info_nce, exponents > max_exponent, usable, axis_name)
    return loss, recalled.memory._replace(diagnostics=diagnostics)


def _in_direction(
    direction: Direction, loss: Callable[[Partition], Float[Array, " b"]], partitions: tuple[Partition, Partition]
) -> Float[Array, " b"]:
    of_images, of_texts = partitions
    match direction:
        case "symmetric":
            return (loss(of_images) + loss(of_texts)) / 2
        case "image_to_text":
            return loss(of_images)
        case "text_to_image":
            return loss(of_texts)
