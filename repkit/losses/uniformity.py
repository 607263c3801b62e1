"""Uniformity: how evenly features spread over the sphere, without a pair matrix in memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
    varying,
)

_BLOCK_ROWS = 512
"""Rows of a block by default: a tile of the pair matrix stays in a processor's cache."""


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
    shares = mask_rows(jnp.ones_like(images[:, 0]) if weights is None else weights.astype(images.dtype), where)
    if isinstance(form, Blocks):
        inputs = (varying(each, axis_name) for each in (shares, valid))
        anchors, candidates = inputs
        totals = [_kernel_sum(form, axis_name, varying(x, axis_name), anchors, candidates) for x in (images, texts)]
    else:
        totals = [jnp.sum(shares * _kernel_sums(x, valid, axis_name)) for x in (images, texts)]
    kernel = WeightedMean(totals[0] + totals[1], jnp.sum(shares)).sum_over(axis_name)
    value = jnp.log(jnp.where(kernel.weight == 0, 1.0, kernel.value()))
    rows = jnp.broadcast_to(value, valid.shape)
    return reduce_loss(rows, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def _kernel_sums(x: Float[Array, "b d"], valid: Bool[Array, " b"], axis_name: AxisName | None) -> Float[Array, " b"]:
    """`sum_k exp(-2 |x_j - x_k|^2)` over all valid rows k of all devices."""
    distances = _distances(x, rows_over(x, axis_name))
    places = row_indices(len(x), axis_name)
    kernel = _kernel(distances, places[:, None] == rows_over(places, axis_name)[None, :])
    return jnp.sum(jnp.where(rows_over(valid, axis_name)[None, :], kernel, 0.0), axis=-1)


def _kernel(distances: Float[Array, "r s"], is_same: Bool[Array, "r s"]) -> Float[Array, "r s"]:
    """`exp(-2 distance)` of squared distances; rounding may leave one below 0, and far below it for long vectors."""
    return jnp.where(is_same, 1.0, jnp.exp(-2 * jnp.maximum(distances, 0.0)))


# ---------------------------------------------------------------------------------------------------------------------
# In blocks. The only consumer of the sum is a logarithm after a sum over devices, so that all that the cotangent can do
# to the gradient is scale it: the gradient is made in the forward walk, and every pair of this device's rows met once.


class _Rows(NamedTuple):
    """Rows, their shares as anchors, 0 where masked, and whether they are candidates."""

    x: Float[Array, "b d"]
    share: Float[Array, " b"]
    valid: Bool[Array, " b"]


class _Walked(NamedTuple):
    """Sums over the candidates k met so far, for each anchor j, with E_jk = (share_j valid_k + valid_j share_k) / 2 G_jk.

    Attributes:
        attraction: sum_k E_jk x_k [b d].
        weight: sum_k E_jk [b].
        kernel: sum_k valid_k G_jk [b].
    """

    attraction: Float[Array, "b d"]
    weight: Float[Array, " b"]
    kernel: Float[Array, " b"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel_sum(
    form: Blocks,
    axis_name: AxisName | None,
    x: Float[Array, "b d"],
    share: Float[Array, " b"],
    valid: Bool[Array, " b"],
) -> Float[Array, ""]:
    """`sum_jk share_j valid_k G_jk` over this device's rows j and all rows k."""
    return _kernel_sum_forward(form, axis_name, x, share, valid)[0]


def _kernel_sum_forward(
    form: Blocks,
    axis_name: AxisName | None,
    x: Float[Array, "b d"],
    share: Float[Array, " b"],
    valid: Bool[Array, " b"],
) -> tuple[Float[Array, ""], tuple[Float[Array, "b d"], Float[Array, " b"]]]:
    rows = _Rows(x, share, valid)
    blocks = RowBlocks.of(len(x), form.size or _BLOCK_ROWS)
    walked = _walk_own(blocks, rows)
    if axis_name is not None:
        walked = _walk_others(blocks, rows, walked, form, axis_name)
    gradient = 8 * (walked.attraction - walked.weight[:, None] * x)
    return jnp.sum(share * walked.kernel), (gradient, walked.kernel)


def _kernel_sum_backward(
    form: Blocks, axis_name: AxisName | None, residuals: tuple[Array, Array], slope: Float[Array, ""]
) -> tuple[Array, Array, None]:
    gradient, kernel = residuals
    return slope * gradient, slope * kernel, None


_kernel_sum.defvjp(_kernel_sum_forward, _kernel_sum_backward)


def _walk_own(blocks: RowBlocks, rows: _Rows) -> _Walked:
    """The pairs of this device's rows with each other: a pair of blocks serves its mirror image as well."""
    pairs = np.stack(np.triu_indices(blocks.blocks)).astype(np.int32)

    def add_pair(n: Int[Array, ""], walked: _Walked) -> _Walked:
        i, j = jnp.asarray(pairs)[:, n]
        first, second = _block(blocks, rows, i), _block(blocks, rows, j)
        places = blocks.places(i)[:, None] == blocks.places(j)[None, :]
        # A block met with itself is its own mirror image: each of the two then counts half.
        kernel = _kernel(_distances(first.x, second.x), places) * jnp.where(i == j, 0.5, 1.0).astype(rows.x.dtype)
        walked = _add(blocks, walked, i, first, second, kernel)
        return _add(blocks, walked, j, second, first, kernel.T)

    empty = _Walked(*(jnp.zeros_like(each) for each in (rows.x, rows.share, rows.share)))
    return jax.lax.fori_loop(0, pairs.shape[1], add_pair, empty)


def _walk_others(blocks: RowBlocks, rows: _Rows, walked: _Walked, form: Blocks, axis_name: AxisName) -> _Walked:
    """The pairs of this device's rows with those of all other devices."""
    devices = jax.lax.axis_size(axis_name)
    shift = [(device, (device + 1) % devices) for device in range(devices)]
    gathered = jax.tree.map(lambda x: rows_over(x, axis_name), rows) if form.exchange == "gather" else rows

    def add_device(step: Int[Array, ""], state: tuple[_Rows, _Walked]) -> tuple[_Rows, _Walked]:
        others, walked = state
        if form.exchange == "gather":
            first = (jax.lax.axis_index(axis_name) + step) % devices * len(rows.x)
            others = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, len(rows.x)), gathered)
        else:
            others = jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, shift), others)

        def add_pair(n: Int[Array, ""], walked: _Walked) -> _Walked:
            i, j = n // blocks.blocks, n % blocks.blocks
            first, second = _block(blocks, rows, i), _block(blocks, others, j)
            kernel = _kernel(_distances(first.x, second.x), jnp.zeros((), bool))
            return _add(blocks, walked, i, first, second, kernel)

        return others, jax.lax.fori_loop(0, blocks.blocks**2, add_pair, walked)

    return jax.lax.fori_loop(1, devices, add_device, (rows, walked))[1]


def _block(blocks: RowBlocks, rows: _Rows, i: Int[Array, ""]) -> _Rows:
    """The rows of block i, of which those of an earlier block count nothing."""
    x, share, valid = (blocks.take(each, i) for each in rows)
    return _Rows(x, jnp.where(blocks.is_new(i), share, 0), valid & blocks.is_new(i))


def _add(
    blocks: RowBlocks,
    walked: _Walked,
    i: Int[Array, ""],
    anchors: _Rows,
    candidates: _Rows,
    kernel: Float[Array, "r s"],
) -> _Walked:
    """What the anchors of block i have met, with these candidates added."""
    valid, other_valid = (each.valid.astype(kernel.dtype) for each in (anchors, candidates))
    shares = (anchors.share[:, None] * other_valid[None, :] + valid[:, None] * candidates.share[None, :]) / 2
    weighted = shares * kernel
    new = _Walked(
        jnp.matmul(weighted, candidates.x, precision=jax.lax.Precision.HIGHEST),
        jnp.sum(weighted, axis=-1),
        jnp.sum(kernel * other_valid[None, :] * valid[:, None], axis=-1),
    )
    return jax.tree.map(lambda x, block: blocks.put(x, blocks.take(x, i) + block, i), walked, new)


def _distances(x: Float[Array, "r d"], y: Float[Array, "s d"]) -> Float[Array, "r s"]:
    squares = jnp.sum(jnp.square(x), axis=-1)[:, None] + jnp.sum(jnp.square(y), axis=-1)[None, :]
    return squares - 2 * pair_products(x, y)
