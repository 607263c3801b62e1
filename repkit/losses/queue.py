"""Contrast with what a momentum teacher embeds, in this batch and in a queue of those before it (MoCo, ALBEF)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import InputError, require_arrays, require_range
from repkit.losses._pairs import Side, Tile, pair_products, require_pairs, row_products, row_sums, walk_pairs
from repkit.losses._partitions import (
    Identity,
    Partition,
    Positives,
    kinds_of_pairs,
    log_positives,
    mean_positive,
    softmax_cross_entropy,
)
from repkit.losses.form import Blocks, Form
from repkit.numerics import (
    AxisName,
    Reduction,
    Scalar,
    WeightedMean,
    local_rows,
    mask_rows,
    masked_logsumexp,
    reduce_loss,
    replicated_rows_over,
    row_count,
    row_indices,
    row_mask,
    rows_over,
    sum_over,
    varying,
)

_DIAGNOSTICS = ("filled", "hard_cross_entropy")
_NO_LABEL = -1


class FeatureQueue(NamedTuple):
    """The newest embeddings of the teacher, the oldest of which make room for new ones; made by `init_queue`.

    Attributes:
        image_embeds: of images [q d].
        text_embeds: of their texts [q d].
        labels: of the pairs; -1 where they were enqueued without [q].
        filled: whether the place is taken [q].
        position: the place that is written next.
        diagnostics: scalars that describe the call which returned this queue:
            `filled`: share of the places that are taken;
            `hard_cross_entropy`: the loss against hard targets, whatever `target_share` is.
    """

    image_embeds: Float[Array, "q d"]
    text_embeds: Float[Array, "q d"]
    labels: Int[Array, " q"]
    filled: Bool[Array, " q"]
    position: Int[Array, ""]
    diagnostics: dict[str, Float[Array, ""]]


def init_queue(size: int, dim: int, dtype: jax.typing.DTypeLike = jnp.float32) -> FeatureQueue:
    """An empty queue.

    Args:
        size: places q; 0 for none.
        dim: features d of an embedding.
        dtype: of the embeddings that are kept.

    Raises:
        InputError: if the size is below 0.

    Example:
        >>> init_queue(3, 2).filled
        Array([False, False, False], dtype=bool)
    """
    require_range("init_queue", "size", size, at_least=0)
    # Each field gets a buffer of its own, so that a training step may donate them all.
    return FeatureQueue(
        jnp.zeros((size, dim), dtype),
        jnp.zeros((size, dim), dtype),
        jnp.full(size, _NO_LABEL, jnp.int32),
        jnp.zeros(size, bool),
        jnp.zeros((), jnp.int32),
        {name: jnp.zeros((), jnp.float32) for name in _DIAGNOSTICS},
    )


def queue_contrastive(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    teacher_image_embeds: Float[Array, "b d"],
    teacher_text_embeds: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    memory: FeatureQueue,
    target_share: Scalar,
    labels: Int[Array, " b"] | None = None,
    memory_axis_name: AxisName | None = None,
    form: Form = Blocks(),
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> tuple[Float[Array, ""] | Float[Array, " b"], FeatureQueue]:
    """Softmax cross-entropy against a momentum teacher's embeddings, of this batch and of a queue (ALBEF's L_itc).

    The candidates j of image i are the teacher's texts t'_j of this batch and of the queue. With
    `s_ij = logit_scale <image_i, t'_j>`, the teacher's own scores `s'_ij = logit_scale <image'_i, t'_j>`, and P_i the
    candidates with the label of row i (without labels: i's own text alone):

        y_ij = target_share softmax_j(s'_ij) + (1 - target_share) [j in P_i] / |P_i|
        image_to_text_i = - sum_j y_ij log softmax_j(s_ij)

    text_to_image is the same with the modalities exchanged; the loss is the mean of both. The teacher's embeddings of
    the batch then take the oldest places of the queue.

    Args:
        image_embeds: [b d], normally of unit length; used as given.
        text_embeds: [b d], row i belongs to row i of the images.
        teacher_image_embeds: of the same images by the momentum teacher [b d]; no gradient flows to it.
        teacher_text_embeds: of the same texts [b d]; no gradient flows to it.
        logit_scale: scalar > 0 that multiplies the inner products (1 / temperature); may be learned. The targets y are
            held fixed.
        memory: from `init_queue` or the last call; of any size, 0 included. It should hold unit vectors of one space:
            begin with an empty one when training anew.
        target_share: share in [0, 1] of the teacher's scores in the targets, ALBEF's alpha; 0 for hard targets. The
            paper has 0.4, reached in the first epoch.
        labels: [b]; rows with equal labels are positives of one another, such as equal captions, and of the queue's
            pairs that were enqueued with this label. Pass them always or never.
        memory_axis_name: `axis_name`, if the queue's places are split over it, each device holding an equal part of
            them in the order of the axis; None when every device holds them all, and under `jit`.
        form: in blocks, with memory of the inputs' and the queue's size, or "plain"; see `repkit.losses.Blocks`.
        where: [b]; False removes the row as anchor and as candidate, and keeps it out of the queue.
        weights: [b], >= 0; the row's share of the mean. A row of weight 0 is still a candidate and enqueued.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss in nats, at least float32, and the new queue. The smallest value for `target_share` > 0 is the entropy
        of y, not 0.

    Raises:
        InputError: shapes that do not fit together, a queue of another width, a share out of range, or an unknown form
            or reduction.

    Example:
        >>> embeds = jnp.eye(4)
        >>> loss, memory = queue_contrastive(
        ...     embeds, embeds, embeds, embeds, logit_scale=2.0, memory=init_queue(8, 4), target_share=0.0
        ... )
        >>> print(f"{loss:.4f}")  # log(1 + 3 exp(-2)), as info_nce
        0.3408
        >>> print(memory.filled)
        [ True  True  True  True False False False False]

    References:
        Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", arXiv
        2107.07651, equations 1, 2 and 6; the queue is that of He et al., "Momentum Contrast for Unsupervised Visual
        Representation Learning", arXiv 1911.05722. Candidates and soft targets are as in ALBEF's code, whose retrieval
        training also has positives in the queue. Masked rows, and a queue that need not hold whole batches, are ours.
    """
    caller = "queue_contrastive"
    images, texts, teacher_images, teacher_texts = require_pairs(
        caller,
        {
            "image_embeds": image_embeds,
            "text_embeds": text_embeds,
            "teacher_image_embeds": teacher_image_embeds,
            "teacher_text_embeds": teacher_text_embeds,
        },
        form=form,
        where=where,
        weights=weights,
        logit_scale=logit_scale,
        labels=labels,
        target_share=(target_share, "number"),
    )
    require_arrays(caller, {"image_embeds": (images, "float b d"), "memory.image_embeds": (memory[0], "float q d")})
    require_range(caller, "target_share", target_share, at_least=0, at_most=1)
    if memory_axis_name is not None and memory_axis_name != axis_name:
        raise InputError(
            f"{caller}: expected memory_axis_name to be None or axis_name={axis_name!r}, got {memory_axis_name!r}"
        )
    memory = jax.lax.stop_gradient(memory)
    teacher_images, teacher_texts = jax.lax.stop_gradient((teacher_images, teacher_texts))
    rows = len(images)
    valid = row_mask(where, rows)
    identity = row_indices(rows, axis_name), labels
    queue = _own_part(memory, axis_name, memory_axis_name)
    static = form, axis_name, isinstance(target_share, int | float) and target_share == 0

    dtype = jnp.result_type(images, memory.image_embeds)
    scale = varying(jnp.asarray(logit_scale, jnp.promote_types(dtype, jnp.float32)), axis_name)
    compute = _plain_rows if form == "plain" else _blocked_rows

    def direction(anchors: Array, teacher: Array, own: Array, stored: Array) -> _Rows:
        anchors, teacher, own, stored = (x.astype(dtype) for x in (anchors, teacher, own, stored))
        share = jnp.asarray(target_share, scale.dtype)
        fixed = _Fixed(teacher, own, stored, valid, identity, queue.labels, queue.filled, share)
        anchors, fixed = jax.tree.map(lambda x: varying(x, axis_name), (anchors, fixed))
        return compute(static, anchors, scale, fixed)

    both = (
        direction(images, teacher_images, teacher_texts, queue.text_embeds),
        direction(texts, teacher_texts, teacher_images, queue.image_embeds),
    )
    losses, hard = ((first + second) / 2 for first, second in zip(*both, strict=True))
    loss = reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)
    enqueued = _enqueue(memory, (teacher_images, teacher_texts), labels, valid, axis_name, memory_axis_name)
    size = row_count(len(memory.filled), memory_axis_name)
    taken = sum_over(jnp.sum(enqueued.filled, dtype=jnp.float32), memory_axis_name)
    mean_hard = WeightedMean.of(jax.lax.stop_gradient(hard), valid).sum_over(axis_name).value()
    diagnostics = {"filled": taken / max(size, 1), "hard_cross_entropy": mean_hard.astype(jnp.float32)}
    return loss, enqueued._replace(diagnostics=diagnostics)


# ---------------------------------------------------------------------------------------------------------------------
# The queue


def _own_part(memory: FeatureQueue, axis_name: AxisName | None, memory_axis_name: AxisName | None) -> FeatureQueue:
    """The places that this device contributes as candidates, of a queue that it may hold whole."""
    if axis_name is None or memory_axis_name is not None:
        return memory
    missing = -len(memory.filled) % jax.lax.axis_size(axis_name)

    def part(x: Array) -> Array:
        return local_rows(jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]), axis_name) if x.ndim else x

    return jax.tree.map(part, memory)


def _enqueue(
    memory: FeatureQueue,
    embeds: tuple[Float[Array, "b d"], Float[Array, "b d"]],
    labels: Int[Array, " b"] | None,
    valid: Bool[Array, " b"],
    axis_name: AxisName | None,
    memory_axis_name: AxisName | None,
) -> FeatureQueue:
    """The queue with all devices' valid rows in their order, the last of them if there are more than places."""
    local_size = len(memory.filled)
    size = row_count(local_size, memory_axis_name)
    if not size:
        return memory
    labels = jnp.full(valid.shape, _NO_LABEL, jnp.int32) if labels is None else labels
    is_new = replicated_rows_over(valid.astype(jnp.int32), axis_name)
    number, rank = jnp.sum(is_new), jnp.cumsum(is_new) - 1
    slots = (memory.position + rank) % size - row_indices(local_size, memory_axis_name)[0]
    is_here = (is_new > 0) & (rank >= number - size) & (slots >= 0) & (slots < local_size)
    targets = jnp.where(is_here, slots, local_size)

    def put(kept: Array, new: Array) -> Array:
        return kept.at[targets].set(replicated_rows_over(new.astype(kept.dtype), axis_name), mode="drop")

    images, texts = embeds
    return memory._replace(
        image_embeds=put(memory.image_embeds, images),
        text_embeds=put(memory.text_embeds, texts),
        labels=put(memory.labels, labels),
        filled=memory.filled.at[targets].set(True, mode="drop"),
        position=((memory.position + number) % size).astype(jnp.int32),
    )


# ---------------------------------------------------------------------------------------------------------------------
# One direction


class _Fixed(NamedTuple):
    """What one direction's anchors are held against, without a gradient.

    Attributes:
        teacher: the teacher's embeddings of the anchors [b d].
        own: the teacher's embeddings of what belongs to them, which are candidates [b d].
        stored: the queue's candidates [q d].
        valid: of the rows [b].
        identity: of the rows.
        stored_labels: of the queue's pairs [q].
        filled: of the queue's places [q].
        share: of the teacher in the targets.
    """

    teacher: Float[Array, "b d"]
    own: Float[Array, "b d"]
    stored: Float[Array, "q d"]
    valid: Bool[Array, " b"]
    identity: Identity
    stored_labels: Int[Array, " q"]
    filled: Bool[Array, " q"]
    share: Float[Array, ""]


class _Rows(NamedTuple):
    """Losses of the anchors, against the targets and against hard ones, [b] each."""

    losses: Float[Array, " b"]
    hard: Float[Array, " b"]


_Static = tuple[Form, AxisName | None, bool]
"""The form, the axis, and whether the targets are hard."""


def _candidates(fixed: _Fixed, dtype: jnp.dtype) -> Side:
    """This device's candidates: the rows of the batch, then its part of the queue."""
    places, labels = fixed.identity
    apart = jnp.full(fixed.filled.shape, -1, places.dtype)
    if labels is not None:
        labels = jnp.concatenate([labels, fixed.stored_labels.astype(labels.dtype)])
    return Side(
        jnp.concatenate([fixed.own, mask_rows(fixed.stored, fixed.filled)]),
        jnp.concatenate([fixed.valid, fixed.filled]).astype(dtype),
        (jnp.concatenate([places, apart]), labels),
    )


def _rows(partition: Partition, teacher_excess: Float[Array, " b"], share: Float[Array, ""]) -> _Rows:
    """The losses, from `teacher_excess_i = sum_j softmax_j(s'_ij) (s_ii - s_ij)`.

    As the loss of hard targets, which keeps its digits where it tends to 0, and what soft targets add to it.
    """
    hard = softmax_cross_entropy(partition)
    apart = mean_positive(partition) - partition.own
    return _Rows(hard + share * (apart + teacher_excess), hard)


def _plain_rows(static: _Static, anchors: Float[Array, "b d"], scale: Float[Array, ""], fixed: _Fixed) -> _Rows:
    _, axis_name, is_hard = static
    candidates = jax.tree.map(lambda x: rows_over(x, axis_name), _candidates(fixed, scale.dtype))
    kinds = kinds_of_pairs(fixed.identity, candidates.extra)
    allowed = fixed.valid[:, None] & (candidates.valid > 0)[None, :]
    scores = scale * pair_products(anchors, candidates.embeds)
    own = scale * row_products(anchors, fixed.own)

    def finite(log_sum: Array) -> Array:
        return jnp.where(log_sum > -jnp.inf, log_sum, 0.0)

    positives = None
    if kinds.positive is not None:
        is_positive = allowed & kinds.positive
        positives = Positives(
            jnp.sum(is_positive, axis=1, dtype=scores.dtype),
            finite(masked_logsumexp(scores, is_positive)),
            jnp.sum(jnp.where(is_positive, scores, 0.0), axis=1),
        )
    is_negative = allowed & kinds.negative
    partition = Partition(
        own,
        finite(masked_logsumexp(scores, is_negative)),
        jnp.sum(is_negative, axis=1, dtype=scores.dtype),
        positives,
    )
    if is_hard:
        return _rows(partition, jnp.zeros_like(own), fixed.share)
    teacher = jax.lax.stop_gradient(scale) * pair_products(fixed.teacher, candidates.embeds)
    shares = jnp.where(allowed, jnp.exp(teacher - finite(masked_logsumexp(teacher, allowed))[:, None]), 0.0)
    return _rows(partition, jnp.sum(shares * (own[:, None] - scores), axis=1), fixed.share)


# In blocks: one walk for the largest scores, one for sums of exponentials, and, where a derivative is asked for, one
# for the slopes of each row's loss in its scores. Candidates get no gradient, so that nothing waits for the rows'
# cotangents: the third walk gives the derivative of every row, in either mode.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _blocked_rows(static: _Static, anchors: Float[Array, "b d"], scale: Float[Array, ""], fixed: _Fixed) -> _Rows:
    return _walk_sums(static, anchors, scale, fixed).rows


@_blocked_rows.defjvp
def _blocked_derivative(static: _Static, primals: Any, tangents: Any) -> tuple[_Rows, _Rows]:
    anchors, scale, fixed = primals
    sums = _walk_sums(static, anchors, scale, fixed)
    slopes = _walk_slopes(static, anchors, scale, fixed, sums)
    inner = row_products(tangents[0], slopes), row_products(anchors, slopes)
    change = scale * inner[0] + tangents[1] * inner[1]
    # The hard losses are for looking at.
    return sums.rows, _Rows(change, jnp.zeros_like(change))


class _WalkedSums(NamedTuple):
    """What is known of the rows after the first two walks.

    Attributes:
        rows: the losses.
        log_all: log of the sum of all candidates' exponentials [b].
        log_teacher: the same of the teacher's scores [b].
        positives: number of positives, the own pair included [b].
    """

    rows: _Rows
    log_all: Float[Array, " b"]
    log_teacher: Float[Array, " b"]
    positives: Float[Array, " b"]


class _Largest(NamedTuple):
    """The largest score of each anchor's negatives, its other positives, and of the teacher for it."""

    negatives: Float[Array, " b"]
    positives: Float[Array, " b"]
    teacher: Float[Array, " b"]


def _walk_sums(static: _Static, anchors: Float[Array, "b d"], scale: Float[Array, ""], fixed: _Fixed) -> _WalkedSums:
    form, axis_name, is_hard = static
    assert isinstance(form, Blocks)
    candidates, valid = _candidates(fixed, scale.dtype), fixed.valid.astype(scale.dtype)
    walk = functools.partial(walk_pairs, form=form, axis_name=axis_name)
    own = scale * row_products(anchors, fixed.own)

    def rows(*more: Any) -> Side:
        return Side(anchors, valid, (fixed.identity, fixed.teacher, more))

    largest = walk(functools.partial(_largest_tile, is_hard, scale), rows(), candidates, combine="max").row_sums
    shifts = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), largest)
    sums = walk(functools.partial(_sum_tile, is_hard, scale), rows(shifts, own), candidates).row_sums

    def log(total: Float[Array, " b"], shift: Float[Array, " b"]) -> Float[Array, " b"]:
        is_some = total > 0
        return jnp.where(is_some, jnp.log(jnp.where(is_some, total, 1.0)) + shift, 0.0)

    positives = None
    if sums.positives is not None:
        positives = sums.positives._replace(logsumexp=log(sums.positives.logsumexp, shifts.positives))
    partition = Partition(own, log(sums.negatives, shifts.negatives), sums.negative_count, positives)
    teacher_excess = sums.teacher_excess / jnp.where(sums.teacher > 0, sums.teacher, 1.0)
    of_positives = log_positives(partition)
    log_all = jnp.where(partition.negative_count > 0, jnp.logaddexp(partition.negatives, of_positives), of_positives)
    number = jnp.ones_like(own) if positives is None else 1.0 + positives.number
    return _WalkedSums(
        _rows(partition, teacher_excess, fixed.share), log_all, log(sums.teacher, shifts.teacher), number
    )


def _walk_slopes(
    static: _Static, anchors: Float[Array, "b d"], scale: Float[Array, ""], fixed: _Fixed, sums: _WalkedSums
) -> Float[Array, "b d"]:
    """`sum_j (softmax_j(s_ij) - y_ij) c_j` of each row: the derivative of its loss in `logit_scale anchor`.

    The slopes of a row add up to 0. That of its own pair is what the others leave, and so has their digits.
    """
    form, axis_name, is_hard = static
    assert isinstance(form, Blocks)
    share = fixed.share
    hard_target = (1.0 - share) / sums.positives
    extra = fixed.identity, fixed.teacher, (sums.log_all, sums.log_teacher, hard_target)
    walk = walk_pairs(
        functools.partial(_slope_tile, is_hard, scale, share),
        Side(anchors, fixed.valid.astype(scale.dtype), extra),
        _candidates(fixed, scale.dtype),
        form=form,
        axis_name=axis_name,
    )
    return walk.row_gradient - walk.row_sums[:, None] * fixed.own.astype(scale.dtype)


class _TileSums(NamedTuple):
    """What a tile adds to the sums of each anchor; exponentials are taken after the shifts."""

    negatives: Float[Array, " b"]
    negative_count: Float[Array, " b"]
    positives: Positives | None
    teacher: Float[Array, " b"]
    teacher_excess: Float[Array, " b"]


def _teacher_scores(scale: Float[Array, ""], rows: Side, columns: Side) -> Float[Array, "r c"]:
    return scale * pair_products(rows.extra[1], columns.embeds)


def _largest_tile(
    is_hard: bool, scale: Float[Array, ""], products: Float[Array, "r c"], rows: Side, columns: Side
) -> Tile:
    kinds = kinds_of_pairs(rows.extra[0], columns.extra)
    valid = (columns.valid > 0)[None, :]

    def largest(scores: Float[Array, "r c"], kind: Bool[Array, "r c"]) -> Float[Array, " r"]:
        return jnp.max(jnp.where(kind & valid, scores, -jnp.inf), axis=1)

    scores = scale * products
    nothing = jnp.full_like(scores[:, 0], -jnp.inf)
    of_positives = nothing if kinds.positive is None else largest(scores, kinds.positive)
    of_teacher = nothing if is_hard else largest(_teacher_scores(scale, rows, columns), jnp.ones_like(kinds.negative))
    return Tile(_Largest(largest(scores, kinds.negative), of_positives, of_teacher), (), None)


def _sum_tile(is_hard: bool, scale: Float[Array, ""], products: Float[Array, "r c"], rows: Side, columns: Side) -> Tile:
    shifts, own = rows.extra[2]
    kinds = kinds_of_pairs(rows.extra[0], columns.extra)
    scores = scale * products

    def add(values: Array) -> Float[Array, " r"]:
        return row_sums(values, columns)

    def exponentials(scores: Float[Array, "r c"], shift: Float[Array, " r"]) -> Float[Array, "r c"]:
        # The bound leaves alone what is summed, and keeps in range what is not.
        return jnp.exp(jnp.minimum(scores - shift[:, None], 0.0))

    positives = None
    if kinds.positive is not None:
        positives = Positives(
            add(kinds.positive.astype(scores.dtype)),
            add(jnp.where(kinds.positive, exponentials(scores, shifts.positives), 0.0)),
            add(jnp.where(kinds.positive, scores, 0.0)),
        )
    teacher = teacher_excess = jnp.zeros_like(scores[:, 0])
    if not is_hard:
        shares = exponentials(_teacher_scores(scale, rows, columns), shifts.teacher)
        teacher, teacher_excess = add(shares), add(shares * (own[:, None] - scores))
    return Tile(
        _TileSums(
            add(jnp.where(kinds.negative, exponentials(scores, shifts.negatives), 0.0)),
            add(kinds.negative.astype(scores.dtype)),
            positives,
            teacher,
            teacher_excess,
        ),
        (),
        None,
    )


def _slope_tile(
    is_hard: bool,
    scale: Float[Array, ""],
    share: Float[Array, ""],
    products: Float[Array, "r c"],
    rows: Side,
    columns: Side,
) -> Tile:
    log_all, log_teacher, hard_target = rows.extra[2]
    kinds = kinds_of_pairs(rows.extra[0], columns.extra)

    def shares(scores: Float[Array, "r c"], log_sum: Float[Array, " r"]) -> Float[Array, "r c"]:
        # At a pair of which a side is masked the score says nothing; it must not overflow.
        return jnp.exp(jnp.minimum(scores - log_sum[:, None], 0.0))

    slope = shares(scale * products, log_all)
    if not is_hard:
        slope -= share * shares(_teacher_scores(scale, rows, columns), log_teacher)
    is_other = kinds.negative
    if kinds.positive is not None:
        slope -= jnp.where(kinds.positive, hard_target[:, None], 0.0)
        is_other = is_other | kinds.positive
    slope = jnp.where(is_other, slope, 0.0)
    return Tile(row_sums(slope, columns), (), slope)
