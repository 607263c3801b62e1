"""Geometric consistency: both modalities, and their augmented views, arrange the batch alike."""

from collections.abc import Callable
from typing import TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from repkit.checks import InputError, require_arrays, require_choice
from repkit.losses._grams import (
    Arrays,
    Comparison,
    Comparisons,
    Terms,
    disagreement,
    products_per_row,
    row_terms,
    total_terms,
)
from repkit.losses._pairs import pair_products
from repkit.losses.form import Blocks, Form, require_form
from repkit.numerics import (
    AxisName,
    Reduction,
    Scalar,
    WeightedMean,
    reduce_loss,
    row_count,
    row_mask,
    rows_over,
    same_precision,
    sum_over,
)


def geometric_consistency(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    augmented_image_embeds: Float[Array, "b d"] | None = None,
    augmented_text_embeds: Float[Array, "b d"] | None = None,
    *,
    cross_modal_weight: Scalar = 1.0,
    in_modal_weight: Scalar = 1.0,
    form: Form = Blocks(),
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

    Cost: 8 N D^2 operations for value and gradient with a = b given as numbers, 14 N D^2 otherwise; half as much again
    with `weights` or rows' losses, and more if the rows' slopes then differ. Weights a and b that are traced count as
    unequal. Temporary memory does not grow with N. Over devices only sums of D x D matrices travel.

    Precision: nothing cancels as T tends to V, nor where one of the two terms vanishes beside the other. One term
    *alone* (a = 0 or b = 0) that vanishes while V and T differ, as the in-modal one for T a rotation of V, is the
    difference of two D x D sums: with r = |difference| / |products| the gradient has a relative error of about 2e-7 / r
    and the value of 1e-8 / r^2 in float32 (r = 0.01: 2e-5 and 7e-5), against 3e-8 / r and 1e-7 of the plain form.

    Args:
        image_embeds: V [b d], normally of unit length; used as given.
        text_embeds: T [b d].
        augmented_image_embeds: V^a [b d]; None leaves L_GC^a out, and then so must be `augmented_text_embeds`.
        augmented_text_embeds: T^a [b d].
        cross_modal_weight: a, factor of the terms that compare images with texts.
        in_modal_weight: b, factor of the terms that compare within a modality.
        form: `Blocks` computes with D x D matrices over blocks of rows, or with B x B matrices where that takes fewer
            operations (B below 4/3 D, or 2 to 7/3 D with rows' losses or unequal weights); "plain" with several B x B
            matrices. See below for the precision.
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
    require_form("geometric_consistency", form)
    require_choice("reduction", reduction, get_args(Reduction))
    arrays = tuple(
        jnp.asarray(x)
        for x in (image_embeds, text_embeds, augmented_image_embeds, augmented_text_embeds)
        if x is not None
    )
    weights_known = all(isinstance(weight, int | float) for weight in (cross_modal_weight, in_modal_weight))
    is_equal = weights_known and cross_modal_weight == in_modal_weight
    has_views = len(arrays) == 4
    pairs = (Comparison(0, 1, not is_equal), *((Comparison(0, 2, True), Comparison(1, 3, True)) if has_views else ()))
    comparisons = Comparisons(pairs, has_views, form.size if isinstance(form, Blocks) else None)
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    cross_modal, in_modal = (jnp.asarray(weight, dtype) for weight in (cross_modal_weight, in_modal_weight))
    # A sum over all rows, without weights, needs no row's own loss.
    is_sum = reduction != "none" and weights is None

    if form == "plain" or _has_cheap_pairs(comparisons, arrays, axis_name, is_sum):
        rows, differences = same_precision(*arrays, where=where), _plain if form == "plain" else _stable
        losses = _losses_from_pairs(rows, differences, cross_modal, in_modal, axis_name)
    elif is_sum:
        total = _losses_from_terms(total_terms(comparisons, arrays, where, axis_name), cross_modal, in_modal)
        count = jnp.sum(row_mask(where, len(arrays[0])), dtype=dtype)
        return total if reduction == "sum" else WeightedMean(total, sum_over(count, axis_name)).value()
    else:
        losses = _losses_from_terms(row_terms(comparisons, arrays, where, axis_name), cross_modal, in_modal)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def _losses_from_terms(terms: Terms, cross_modal: Float[Array, ""], in_modal: Float[Array, ""]) -> Array:
    """The loss of each row, or of their sum."""
    losses = jnp.zeros_like(terms.joint[0])
    for n, (joint, excess) in enumerate(zip(terms.joint, terms.excess, strict=True)):
        if excess is None:
            losses += cross_modal * joint
            continue
        losses += in_modal * _not_negative((joint + excess) / 2)
        if n == 0:
            losses += cross_modal * _not_negative((joint - excess) / 2)
    return losses if terms.agreement is None else losses + cross_modal * terms.agreement


def _not_negative(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x`, or 0 where rounding left it below; the gradient is that of x."""
    return x + jax.lax.stop_gradient(jnp.maximum(-x, 0))


# ---------------------------------------------------------------------------------------------------------------------
# From B x B matrices


Differences: TypeAlias = Callable[[Array, Array, AxisName | None], tuple[Float[Array, "b B"], Float[Array, "b B"]]]
"""Of X and Y: <X_j, Y_k> - <Y_j, X_k> and <X_j, X_k> - <Y_j, Y_k>, for this device's rows j and all rows k."""


def _losses_from_pairs(
    rows: list[Float[Array, "b d"]],
    differences: Differences,
    cross_modal: Float[Array, ""],
    in_modal: Float[Array, ""],
    axis_name: AxisName | None,
) -> Float[Array, " b"]:
    # Masked rows are 0, as anchors and as candidates, and so are their differences.
    crossed, within = differences(rows[0], rows[1], axis_name)
    losses = jnp.sum(cross_modal * jnp.square(crossed) + in_modal * jnp.square(within), axis=-1)
    for x, view in zip(rows[:2], rows[2:], strict=False):
        losses += in_modal * jnp.sum(jnp.square(differences(x, view, axis_name)[1]), axis=-1)
    return losses if len(rows) == 2 else losses + cross_modal * jnp.square(disagreement(rows))


def _plain(x: Float[Array, "b d"], y: Float[Array, "b d"], axis_name: AxisName | None) -> tuple[Array, Array]:
    all_x, all_y = rows_over(x, axis_name), rows_over(y, axis_name)
    return pair_products(x, all_y) - pair_products(y, all_x), pair_products(x, all_x) - pair_products(y, all_y)


def _stable(x: Float[Array, "b d"], y: Float[Array, "b d"], axis_name: AxisName | None) -> tuple[Array, Array]:
    """From one matrix product, and without cancellation where X and Y are close; see `_grams`."""
    u, w = x + y, x - y
    forward = pair_products(w, rows_over(u, axis_name))
    backward = forward.T if axis_name is None else pair_products(u, rows_over(w, axis_name))
    return (forward - backward) / 2, (forward + backward) / 2


def _has_cheap_pairs(comparisons: Comparisons, arrays: Arrays, axis_name: AxisName | None, is_sum: bool) -> bool:
    """Whether value and gradient take fewer operations by B x B than by D x D matrices."""
    rows, dim = arrays[0].shape
    products = 3 if axis_name is None else 6
    by_pairs = products * len(comparisons.pairs) * row_count(rows, axis_name)
    return by_pairs < products_per_row(comparisons, is_sum=is_sum) * dim
