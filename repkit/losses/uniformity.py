"""Uniformity: how evenly features spread over the sphere, without a pair matrix in memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from repkit.checks import require_arrays
from repkit.losses._pairs import pair_products
from repkit.losses._row_blocks import RowBlocks
from repkit.losses.form import Blocks, Form, require_form
from repkit.numerics import (
    AxisName,
    Reduction,
    WeightedMean,
    mask_rows,
    reduce_loss,
    row_indices,
    row_mask,
    rows_over,
    same_precision,
    target_platform,
    varying,
)


def uniformity(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    *,
    form: Form = Blocks(),
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Log of the mean similarity of all pairs within each modality, least when the features cover the sphere evenly.

        loss = log 1/N sum_jk ( G(V_j, V_k) + G(T_j, T_k) )        G(u, v) = exp(-2 |u - v|^2), j = k included

    It is one number for the batch and no sum over rows: every row carries it. `weights` weigh the anchors j, and
    replace 1/N by one over their sum.

    Args:
        image_embeds: V [b d], normally of unit length; used as given.
        text_embeds: T [b d].
        form: `Blocks` walks one half of the pairs once, for value and gradient together; "plain" holds B x B matrices.
        where: [b]; False removes the row as anchor and as candidate.
        weights: [b], >= 0; the share of row j in the mean. A row of weight 0 is still a candidate k.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient for rows that are masked.

    Raises:
        InputError: shapes that do not fit together, an unknown form, or an unknown reduction.

    Example:
        >>> same, spread = jnp.ones((4, 1)), jnp.eye(4)
        >>> print(f"{uniformity(same, same):.4f} {uniformity(spread, spread):.4f}")  # log 8, log(2 + 6 exp(-4))
        2.0794 0.7466

    References:
        Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020, arXiv 2005.10242. Two modalities in one logarithm, and the sum over k not divided by
        N: Jiang et al., CVPR 2023, arXiv 2303.05952.
    """
    require_arrays(
        "uniformity",
        {
            "image_embeds": (image_embeds, "float b d"),
            "text_embeds": (text_embeds, "float b d"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    require_form("uniformity", form)
    images, texts = same_precision(image_embeds, text_embeds, where=where)
    valid = row_mask(where, images.shape[0])
    shares = None if weights is None else mask_rows(weights.astype(images.dtype), where)
    sides = [_side(x, valid, shares, axis_name) for x in (images, texts)]
    if isinstance(form, Blocks):
        totals = jnp.stack([_blocked_sum(form, axis_name, side) for side in sides])
    else:
        totals = jnp.stack([_plain_sum(side, axis_name) for side in sides])
    weight = jnp.sum(valid, dtype=images.dtype) if shares is None else jnp.sum(shares)
    kernel = WeightedMean(jnp.sum(totals), weight).sum_over(axis_name)
    value = jnp.log(jnp.where(kernel.weight == 0, 1.0, kernel.value()))
    rows = jnp.broadcast_to(value, valid.shape)
    return reduce_loss(rows, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


class _Side(NamedTuple):
    """Rows of one modality.

    Attributes:
        embeds: [b d].
        place: where the row stands among the rows of all devices [b].
        penalty: 0, or infinity for rows that take no part [b].
        share: the row's weight as an anchor, 0 for rows that take no part [b]; None if all others have 1.
    """

    embeds: Float[Array, "b d"]
    place: Int[Array, " b"]
    penalty: Float[Array, " b"]
    share: Float[Array, " b"] | None


def _side(
    x: Float[Array, "b d"], valid: Bool[Array, " b"], share: Float[Array, " b"] | None, axis_name: AxisName | None
) -> _Side:
    penalty = jnp.where(valid, 0.0, jnp.inf).astype(x.dtype)
    side = _Side(x, row_indices(len(x), axis_name), penalty, share)
    return jax.tree.map(lambda x: varying(x, axis_name), side)


def _kernel(rows: _Side, columns: _Side) -> Float[Array, "r c"]:
    """`G = exp(-2 |x_j - x_k|^2)`; 0 where one of the two takes no part."""
    squares = (2 * jnp.sum(jnp.square(side.embeds), axis=-1) for side in (rows, columns))
    exponent = 4 * pair_products(rows.embeds, columns.embeds) - _outer(jnp.add, *squares)
    # Rounding may leave a distance below 0, and far below it for long vectors; that of a row to itself is 0.
    exponent = jnp.where(_outer(jnp.equal, rows.place, columns.place), 0.0, jnp.minimum(exponent, 0.0))
    return jnp.exp(exponent - _outer(jnp.add, rows.penalty, columns.penalty))


def _outer(operation: Callable[[Array, Array], Array], x: Shaped[Array, " r"], y: Shaped[Array, " c"]) -> Array:
    return operation(x[:, None], y[None, :])


def _plain_sum(side: _Side, axis_name: AxisName | None) -> Float[Array, ""]:
    """`sum_jk share_j G_jk` over this device's rows j and all rows k."""
    sums = jnp.sum(_kernel(side, jax.tree.map(lambda x: rows_over(x, axis_name), side)), axis=-1)
    return jnp.sum(sums if side.share is None else side.share * sums)


# ---------------------------------------------------------------------------------------------------------------------
# In blocks. The only consumer of the sum is a logarithm after a sum over devices, so that all that the cotangent does
# to the gradient is scale it: the gradient is made in the forward walk, which meets every pair once.


class _Walked(NamedTuple):
    """Sums over the rows k met so far, for each row j, with E_jk = (share_j + share_k) / 2 G_jk.

    Attributes:
        attraction: sum_k E_jk x_k [b d].
        weight: sum_k E_jk [b].
        kernel: sum_k G_jk [b]; None without shares: it is the weight.
    """

    attraction: Float[Array, "b d"]
    weight: Float[Array, " b"]
    kernel: Float[Array, " b"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked_sum(form: Blocks, axis_name: AxisName | None, side: _Side) -> Array:
    """As `_plain_sum`."""
    return _blocked_sum_forward(form, axis_name, side)[0]


def _blocked_sum_forward(
    form: Blocks, axis_name: AxisName | None, side: _Side
) -> tuple[Float[Array, ""], tuple[Float[Array, "b d"], Float[Array, " b"] | None]]:
    # A tile of the pair matrix stays in a processor's cache; an accelerator wants fewer and larger steps.
    size = form.size or (512 if target_platform() == "cpu" else 4096)
    blocks = RowBlocks.contiguous(len(side.embeds), size)
    walked = _walk_own(blocks, side)
    if axis_name is not None:
        walked = _walk_others(blocks, side, walked, form, axis_name)
    gradient = 8 * (walked.attraction - walked.weight[:, None] * side.embeds)
    if side.share is None or walked.kernel is None:
        return jnp.sum(walked.weight), (gradient, None)
    return jnp.sum(side.share * walked.kernel), (gradient, walked.kernel)


def _blocked_sum_backward(
    form: Blocks, axis_name: AxisName | None, residuals: tuple[Array, Array | None], slope: Float[Array, ""]
) -> tuple[_Side]:
    gradient, kernel = residuals
    of_place: Any = None
    share = None if kernel is None else slope * kernel
    return (_Side(slope * gradient, of_place, jnp.zeros_like(gradient[:, 0]), share),)


_blocked_sum.defvjp(_blocked_sum_forward, _blocked_sum_backward)


def _walk_own(blocks: RowBlocks, side: _Side) -> _Walked:
    """The pairs of this device's rows with each other: a pair of blocks serves its mirror image as well."""

    def add_rows(i: Int[Array, ""], walked: _Walked) -> _Walked:
        rows = _block(blocks, side, i)

        def add_columns(j: Int[Array, ""], state: tuple[_Walked, _Walked]) -> tuple[_Walked, _Walked]:
            walked, of_rows = state
            columns = _block(blocks, side, j)
            kernel = _kernel(rows, columns)
            walked = _add(blocks, walked, j, _meet(kernel.T, columns, rows))
            return walked, jax.tree.map(jnp.add, of_rows, _meet(kernel, rows, columns))

        of_rows = _meet(_kernel(rows, rows), rows, rows)
        walked, of_rows = jax.lax.fori_loop(i + 1, blocks.blocks, add_columns, (walked, of_rows))
        return _add(blocks, walked, i, of_rows)

    return jax.lax.fori_loop(0, blocks.blocks, add_rows, _empty(side))


def _empty(side: _Side) -> _Walked:
    nothing = jnp.zeros_like(side.penalty)
    return _Walked(jnp.zeros_like(side.embeds), nothing, None if side.share is None else nothing)


def _walk_others(blocks: RowBlocks, side: _Side, walked: _Walked, form: Blocks, axis_name: AxisName) -> _Walked:
    """The pairs of this device's rows with those of all other devices."""
    size, devices = len(side.embeds), jax.lax.axis_size(axis_name)
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    everyone = jax.tree.map(lambda x: rows_over(x, axis_name), side) if form.exchange == "gather" else None

    def add_device(step: Int[Array, ""], state: tuple[_Side, _Walked]) -> tuple[_Side, _Walked]:
        others, walked = state
        if everyone is None:
            others = jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, ring), others)
        else:
            first = (jax.lax.axis_index(axis_name) + step) % devices * size
            others = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), everyone)

        def add_rows(i: Int[Array, ""], walked: _Walked) -> _Walked:
            rows = _block(blocks, side, i)

            def add_columns(j: Int[Array, ""], of_rows: _Walked) -> _Walked:
                columns = _block(blocks, others, j)
                return jax.tree.map(jnp.add, of_rows, _meet(_kernel(rows, columns), rows, columns))

            of_rows = jax.tree.map(lambda x: blocks.take(x, i), _empty(side))
            return _add(blocks, walked, i, jax.lax.fori_loop(0, blocks.blocks, add_columns, of_rows))

        return others, jax.lax.fori_loop(0, blocks.blocks, add_rows, walked)

    return jax.lax.fori_loop(1, devices, add_device, (side, walked))[1]


def _block(blocks: RowBlocks, side: _Side, i: Int[Array, ""]) -> _Side:
    """The rows of block i, of which those of an earlier block take no part."""
    block = jax.tree.map(lambda x: blocks.take(x, i), side)
    if not blocks.repeats:
        return block
    return block._replace(penalty=jnp.where(blocks.is_new(i), block.penalty, jnp.inf))


def _meet(kernel: Float[Array, "r c"], rows: _Side, columns: _Side) -> _Walked:
    """What the rows of one block meet in the columns."""
    if rows.share is None or columns.share is None:
        return _Walked(_product(kernel, columns.embeds), jnp.sum(kernel, axis=-1), None)
    weighted = _outer(jnp.add, rows.share, columns.share) / 2 * kernel
    return _Walked(_product(weighted, columns.embeds), jnp.sum(weighted, axis=-1), jnp.sum(kernel, axis=-1))


def _add(blocks: RowBlocks, walked: _Walked, i: Int[Array, ""], part: _Walked) -> _Walked:
    return jax.tree.map(lambda x, block: blocks.put(x, blocks.take(x, i) + block, i), walked, part)


_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
