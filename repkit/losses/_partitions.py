"""Log-partitions of a pair matrix, from which every softmax-like loss over pairs is a few operations per row.

Positives are kept apart from negatives, and each row's own pair apart from the other positives, so that no loss has to
take the difference of two nearly equal numbers when it tends to 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.losses._pairs import (
    Side,
    Tile,
    TileFunction,
    Walk,
    column_sums,
    foreseen_factor,
    is_one_tile,
    pair_products,
    row_products,
    row_sums,
    unless,
    walk_pairs,
)
from repkit.losses.form import Blocks, Form
from repkit.numerics import (
    AxisName,
    Scalar,
    all_over,
    at_least_float32,
    largest_over,
    masked_logsumexp,
    row_indices,
    row_mask,
    rows_over,
    sum_over,
    varying,
)


class Positives(NamedTuple):
    """An anchor's positives other than its own pair.

    Attributes:
        number: how many there are [b].
        logsumexp: log of the sum of the exponentials of their scores; 0 where there is none [b].
        total: sum of their scores [b].
    """

    number: Float[Array, " b"]
    logsumexp: Float[Array, " b"]
    total: Float[Array, " b"]


class Partition(NamedTuple):
    """What the scores `s_ij = logit_scale <anchor_i, candidate_j>` add up to for each anchor.

    Attributes:
        own: the score of the anchor's own pair, s_ii [b].
        negatives: log of the sum of the negatives' exponentials; 0 where there is none [b].
        negative_count: how many negatives there are; 0 for masked anchors [b].
        positives: the other positives; None without labels.
    """

    own: Float[Array, " b"]
    negatives: Float[Array, " b"]
    negative_count: Float[Array, " b"]
    positives: Positives | None


class Foreseen(NamedTuple):
    """Says in advance what a loss will make of the negatives: `share_i exp(log_rate_i) sum_j exp(s_ij)` per anchor.

    If it is so, up to a factor, one walk gives the partitions and their gradient; if not, nothing is lost but time.

    Attributes:
        log_rates: of the images and of the texts as anchors, each [b].
        shares: the rows' weights, 0 where masked [b].
        is_known: whether the rates are of any use; the same on all devices.
    """

    log_rates: tuple[Float[Array, " b"], Float[Array, " b"]]
    shares: Float[Array, " b"]
    is_known: Bool[Array, ""]


def pair_partitions(
    images: Float[Array, "b d"],
    texts: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    labels: Int[Array, " b"] | None,
    where: Bool[Array, " b"] | None,
    form: Form,
    axis_name: AxisName | None,
    foreseen: Foreseen | None = None,
) -> tuple[Partition, Partition]:
    """The partitions of the images over the texts, and of the texts over the images.

    Rows with equal labels are positives of one another; without labels, every row is its own only positive, and what is
    `foreseen` may save a walk. Masked rows
    must hold 0, as `embeddings` gives them; they are in nobody's sums, and their own entries are 0.
    """
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    valid = varying(row_mask(where, images.shape[0]), axis_name)
    scale = varying(jnp.asarray(logit_scale, dtype), axis_name)
    ids = varying(row_indices(images.shape[0], axis_name), axis_name)
    identity = ids, None if labels is None else varying(labels, axis_name)
    if isinstance(form, Blocks):
        sides = (Side(varying(embeds, axis_name), valid.astype(dtype), identity) for embeds in (images, texts))
        foreseen = None if foreseen is None or labels is not None else jax.lax.stop_gradient(foreseen)
        foreseen = jax.tree.map(lambda x: varying(x, axis_name), foreseen)
        scores: _Scores = _blocked_scores((form, axis_name), *sides, scale, foreseen)
    else:
        scores = _plain_scores(at_least_float32(images), at_least_float32(texts), scale, valid, identity, axis_name)
    everyone = sum_over(jnp.sum(valid, dtype=dtype), axis_name)

    def finite(log_sum: Float[Array, " b"]) -> Float[Array, " b"]:
        return jnp.where(log_sum > -jnp.inf, log_sum, 0.0)

    def partition(sums: _Sums) -> Partition:
        positives = sums.positives
        others = 0.0 if positives is None else positives.number
        count = jnp.where(valid, everyone - 1.0 - others, 0.0)
        if positives is not None:
            positives = positives._replace(logsumexp=finite(positives.logsumexp))
        return Partition(scores.own, finite(sums.negatives), count, positives)

    return partition(scores.of_images), partition(scores.of_texts)


def softmax_cross_entropy(partition: Partition) -> Float[Array, " b"]:
    """`log sum_j exp(s_ij) - mean_p s_ip` with p over all positives, the own pair among them, and j over both kinds.

    As `softplus(log sum_neg - log sum_pos) + (log sum_pos - mean)`, of which the second term is left out, not
    subtracted, for a single positive: neither value nor gradient cancels when the loss tends to 0. 0 for masked rows.
    """
    has_negative = partition.negative_count > 0
    losses = jnp.where(has_negative, jax.nn.softplus(partition.negatives - log_positives(partition)), 0.0)
    if partition.positives is None:
        return losses
    apart = (partition.own - mean_positive(partition)) + _others_share(partition.own, partition.positives)
    return losses + jnp.where(partition.positives.number > 0, apart, 0.0)


def log_positives(partition: Partition) -> Float[Array, " b"]:
    """log of the sum of the exponentials of all positives' scores, the own pair among them."""
    if partition.positives is None:
        return partition.own
    return partition.own + _others_share(partition.own, partition.positives)


def _others_share(own: Float[Array, " b"], positives: Positives) -> Float[Array, " b"]:
    """What the other positives add to the own pair's score in the log-sum of both; 0 where there are none."""
    is_several = positives.number > 0
    return jnp.where(is_several, jax.nn.softplus(jnp.where(is_several, positives.logsumexp - own, 0.0)), 0.0)


def mean_positive(partition: Partition) -> Float[Array, " b"]:
    """Mean of all positives' scores, the own pair among them."""
    if partition.positives is None:
        return partition.own
    return (partition.own + partition.positives.total) / (1.0 + partition.positives.number)


class _Sums(NamedTuple):
    """Log-sums are -inf where nothing is summed, here and only here."""

    negatives: Float[Array, " b"]
    positives: Positives | None


class _Scores(NamedTuple):
    """What both forms compute: the own pairs' scores, and the sums of both directions."""

    own: Float[Array, " b"]
    of_images: _Sums
    of_texts: _Sums


Identity: TypeAlias = tuple[Int[Array, " b"], Int[Array, " b"] | None]
"""Each row's place among all rows, and its label."""


# ---------------------------------------------------------------------------------------------------------------------
# In JAX's own operations


def _plain_scores(
    images: Float[Array, "b d"],
    texts: Float[Array, "b d"],
    scale: Float[Array, ""],
    valid: Bool[Array, " b"],
    identity: Identity,
    axis_name: AxisName | None,
) -> _Scores:
    kinds = kinds_of_pairs(identity, jax.tree.map(lambda x: rows_over(x, axis_name), identity))
    allowed = valid[:, None] & rows_over(valid, axis_name)[None, :]

    def sums(logits: Float[Array, "b B"]) -> _Sums:
        negatives = masked_logsumexp(logits, allowed & kinds.negative)
        if kinds.positive is None:
            return _Sums(negatives, None)
        positive = allowed & kinds.positive
        count = jnp.sum(positive, axis=-1, dtype=logits.dtype)
        total = jnp.sum(jnp.where(positive, logits, 0.0), axis=-1)
        return _Sums(negatives, Positives(count, masked_logsumexp(logits, positive), total))

    logits = scale * pair_products(images, rows_over(texts, axis_name))
    # The other direction is the transpose, of which each device has its own rows only where it has all of them.
    is_whole = axis_name is None
    transposed = logits.T if is_whole else scale * pair_products(texts, rows_over(images, axis_name))
    return _Scores(scale * row_products(images, texts), sums(logits), sums(transposed))


class Kinds(NamedTuple):
    """Which pairs are negatives, and which positives other than the own pair (None without labels)."""

    negative: Bool[Array, "r c"]
    positive: Bool[Array, "r c"] | None


def kinds_of_pairs(rows: Identity, columns: Identity) -> Kinds:
    (row_ids, row_labels), (column_ids, column_labels) = rows, columns
    other = row_ids[:, None] != column_ids[None, :]
    if row_labels is None or column_labels is None:
        return Kinds(other, None)
    same = row_labels[:, None] == column_labels[None, :]
    return Kinds(~same, same & other)


# ---------------------------------------------------------------------------------------------------------------------
# In blocks
#
# The fast way takes one exponential per pair, exp(s - shift), for both directions. One shift for all pairs, just under
# their bound, keeps it in range if every anchor has a score within about 90 of the bound; where one does not, sums come
# out too small to trust, and everything is done again with a shift for every anchor.

_HEADROOM = 70.0
"""The largest exponent: exp(70) summed over 10^7 pairs is still a float32."""
_SMALLEST_SUM = 1e-10
"""Sums of at least this size lose nothing that counts to underflow, and leave room for their inverse."""

_Static: TypeAlias = tuple[Blocks, AxisName | None]


class _Shifts(NamedTuple):
    """What is subtracted from the scores of negatives, and of positives, before they are exponentiated."""

    negatives: Float[Array, "*b"]
    positives: Float[Array, "*b"]


class _Slopes(NamedTuple):
    """Factors of exp(s - shift) at negatives and at positives, and what is added at positives, per anchor."""

    negatives: Float[Array, "*b"]
    positives: Float[Array, "*b"] | None
    total: Float[Array, "*b"] | None


class _Ahead(NamedTuple):
    """A gradient that the forward walk has taken already, and the slopes it was taken for."""

    slopes: tuple[Float[Array, " b"], Float[Array, " b"]]
    row_gradient: Float[Array, "b d"]
    column_gradient: Float[Array, "b d"]


class _Residuals(NamedTuple):
    sides: tuple[Side, Side]
    scale: Float[Array, ""]
    shift: Float[Array, ""]
    is_trusted: Bool[Array, ""]
    scores: _Scores
    products: Float[Array, "b b"] | None
    foreseen: Foreseen | None
    ahead: _Ahead | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked_scores(
    static: _Static, images: Side, texts: Side, scale: Float[Array, ""], foreseen: Foreseen | None
) -> _Scores:
    return _forward(static, images, texts, scale, None)[0]


def _forward(
    static: _Static, images: Side, texts: Side, scale: Float[Array, ""], foreseen: Foreseen | None
) -> tuple[_Scores, _Residuals]:
    form, axis_name = static
    valid = images.valid
    is_kept = is_one_tile(len(valid), form, axis_name)
    products = pair_products(images.embeds, texts.embeds) if is_kept else None
    walk = functools.partial(walk_pairs, form=form, axis_name=axis_name, products=products)

    # Squares that overflow make the shift infinite, which is not trusted; those that underflow do not matter.
    squares = [largest_over(jnp.max(row_products(x, x)), axis_name) for x in (images.embeds, texts.embeds)]
    longest = [jnp.sqrt(square) for square in squares]
    # Below the headroom nothing is subtracted: small scores keep their digits.
    shift = jnp.maximum(jnp.abs(scale) * longest[0] * longest[1] - _HEADROOM, 0.0)
    shifts = _Shifts(shift, shift)
    sum_tile = functools.partial(_sum_tile, scale, shifts)
    if foreseen is None:
        fast, ahead = walk(sum_tile, images, texts), None
    else:
        fast, ahead = _walk_ahead(walk, sum_tile, images, texts, scale, shift, foreseen)
    everyone = sum_over(jnp.sum(valid), axis_name)
    is_trusted = _is_trusted(fast.row_sums, valid, everyone) & _is_trusted(fast.column_sums, valid, everyone)
    is_trusted = all_over(is_trusted & jnp.isfinite(shift), axis_name)

    def exact() -> tuple[_Sums, _Sums]:
        largest = walk(functools.partial(_largest_tile, scale), images, texts, combine="max")
        of_images, of_texts = jax.tree.map(
            lambda x: jnp.where(jnp.isfinite(x), x, 0.0), (largest.row_sums, largest.column_sums)
        )
        tile = functools.partial(_sum_tile, scale, None)
        again = walk(tile, _with(images, of_images), _with(texts, of_texts))
        return _logs(again.row_sums, of_images, valid), _logs(again.column_sums, of_texts, valid)

    sums = jax.lax.cond(
        is_trusted,
        lambda: (_logs(fast.row_sums, shifts, valid), _logs(fast.column_sums, shifts, valid)),
        exact,
    )
    scores = _Scores(scale * row_products(images.embeds, texts.embeds), *sums)
    return scores, _Residuals((images, texts), scale, shift, is_trusted, scores, products, foreseen, ahead)


def _walk_ahead(
    walk: Callable[..., Walk],
    sum_tile: TileFunction,
    images: Side,
    texts: Side,
    scale: Float[Array, ""],
    shift: Float[Array, ""],
    foreseen: Foreseen,
) -> tuple[Walk, _Ahead]:
    """The sums, and with them the gradient if the slopes are known."""
    # A rate that is absurd must not overflow; its slope will not be met.
    slopes = [foreseen.shares * jnp.exp(jnp.minimum(rates + shift, _HEADROOM)) for rates in foreseen.log_rates]
    rows, columns = (
        _with(side, _Slopes(slope, None, None)) for side, slope in zip((images, texts), slopes, strict=True)
    )

    def both(products: Float[Array, "r c"], rows: Side, columns: Side) -> Tile:
        sums = sum_tile(products, *(side._replace(extra=side.extra[0]) for side in (rows, columns)))
        return sums._replace(slope=_fast_slope_tile(scale, shift, products, rows, columns).slope)

    def sums_only() -> Walk:
        fast = walk(sum_tile, images, texts)
        nothing = (jnp.zeros(side.embeds.shape, scale.dtype) + 0.0 * side.valid[:, None] for side in (images, texts))
        return Walk(fast.row_sums, fast.column_sums, *nothing)

    fast = jax.lax.cond(foreseen.is_known, lambda: walk(both, rows, columns), sums_only)
    return fast, _Ahead((slopes[0], slopes[1]), fast.row_gradient, fast.column_gradient)


def _backward(static: _Static, residuals: _Residuals, cotangents: _Scores) -> tuple[Side, Side, Float[Array, ""], None]:
    form, axis_name = static
    (images, texts), scale, shift, is_trusted, scores, products, foreseen, ahead = residuals
    walk = functools.partial(walk_pairs, form=form, axis_name=axis_name, products=products)
    of_images, of_texts = (scores.of_images, cotangents.of_images), (scores.of_texts, cotangents.of_texts)
    slopes = [_fast_slopes(*of, shift) for of in (of_images, of_texts)]

    def walk_now(one: Float[Array, ""]) -> Walk:
        def fast() -> Walk:
            tile = functools.partial(_fast_slope_tile, scale, shift)
            rows, columns = jax.tree.map(lambda x: one * x, slopes)
            return walk(tile, _with(images, rows), _with(texts, columns))

        def exact() -> Walk:
            tile = functools.partial(_exact_slope_tile, scale)
            (image_sums, image_cotangents), (text_sums, text_cotangents) = of_images, of_texts
            rows, columns = jax.tree.map(lambda x: one * x, (image_cotangents, text_cotangents))
            return walk(tile, _with(images, (image_sums, rows)), _with(texts, (text_sums, columns)))

        return jax.lax.cond(is_trusted, fast, exact)

    factor = one = jnp.ones_like(scale)
    if ahead is None or foreseen is None:
        gradients = walk_now(one)
    else:
        met, taken = (jnp.stack(each) for each in ([each.negatives for each in slopes], ahead.slopes))
        factor, is_met = foreseen_factor(met, taken, axis_name)
        is_met &= foreseen.is_known & is_trusted
        factor = jnp.where(is_met, factor, one)
        gradients = unless(is_met, walk_now, Walk(None, None, ahead.row_gradient, ahead.column_gradient))
    # Of the embeddings times the scale; each own pair's share is added while all is in float32.
    own = cotangents.own[:, None]
    image_gradient = factor * gradients.row_gradient + own * texts.embeds.astype(scale.dtype)
    text_gradient = factor * gradients.column_gradient + own * images.embeds.astype(scale.dtype)

    def side(given: Side, gradient: Float[Array, "b d"]) -> Side:
        return Side((scale * gradient).astype(given.embeds.dtype), jnp.zeros_like(given.valid), None)

    of_scale = jnp.sum(row_products(images.embeds, image_gradient))
    return side(images, image_gradient), side(texts, text_gradient), of_scale, None


_blocked_scores.defvjp(_forward, _backward)


def _with(side: Side, more: Any) -> Side:
    return side._replace(extra=(side.extra, more))


def _is_trusted(sums: _Sums, valid: Float[Array, " b"], everyone: Float[Array, ""]) -> Bool[Array, ""]:
    others = jnp.zeros_like(valid) if sums.positives is None else sums.positives.number
    is_fine = (valid * (everyone - 1.0 - others) <= 0) | (sums.negatives >= _SMALLEST_SUM)
    if sums.positives is not None:
        is_fine &= (valid * others <= 0) | (sums.positives.logsumexp >= _SMALLEST_SUM)
    return jnp.all(is_fine)


def _logs(sums: _Sums, shifts: _Shifts, valid: Float[Array, " b"]) -> _Sums:
    """From sums of exponentials to logarithms, of valid anchors."""

    def log(total: Float[Array, " b"], shift: Float[Array, "*b"]) -> Float[Array, " b"]:
        is_some = (total > 0) & (valid > 0)
        return jnp.where(is_some, jnp.log(jnp.where(is_some, total, 1.0)) + shift, -jnp.inf)

    negatives = log(sums.negatives, shifts.negatives)
    if sums.positives is None:
        return _Sums(negatives, None)
    count, exponentials, total = sums.positives
    exponentials = log(exponentials, shifts.positives)
    return _Sums(negatives, Positives(valid * count, exponentials, jnp.where(valid > 0, total, 0.0)))


# Functions of a tile, which `walk_pairs` calls for every one.


def _across(rows: Any, columns: Any) -> tuple[Any, Any]:
    """Per-row and per-column values, ready to be combined with a tile."""
    return jax.tree.map(lambda x: x[:, None], rows), jax.tree.map(lambda x: x[None, :], columns)


def _sum_tile(
    scale: Float[Array, ""], shifts: _Shifts | None, products: Float[Array, "r c"], rows: Side, columns: Side
) -> Tile:
    """Sums of exponentials, with one shift for all pairs or (None) with each anchor's own, which `extra` then holds."""
    if shifts is None:
        (row_kind, row_shifts), (column_kind, column_shifts) = rows.extra, columns.extra
        row_shifts, column_shifts = _across(row_shifts, column_shifts)
    else:
        row_kind, column_kind = rows.extra, columns.extra
        row_shifts = column_shifts = shifts
    kinds = kinds_of_pairs(row_kind, column_kind)
    logits = scale * products

    def sums(shifts: _Shifts, add: Callable[[Float[Array, "r c"]], Array]) -> _Sums:
        def exponentials(kind: Bool[Array, "r c"], shift: Array) -> Array:
            # The bound leaves alone what is summed, and keeps in range what is not.
            return add(jnp.where(kind, jnp.exp(jnp.minimum(logits - shift, _HEADROOM + 1.0)), 0.0))

        negatives = exponentials(kinds.negative, shifts.negatives)
        if kinds.positive is None:
            return _Sums(negatives, None)
        count = add(kinds.positive.astype(logits.dtype))
        total = add(jnp.where(kinds.positive, logits, 0.0))
        return _Sums(negatives, Positives(count, exponentials(kinds.positive, shifts.positives), total))

    return Tile(
        sums(row_shifts, lambda values: row_sums(values, columns)),
        sums(column_shifts, lambda values: column_sums(values, rows)),
        None,
    )


def _largest_tile(scale: Float[Array, ""], products: Float[Array, "r c"], rows: Side, columns: Side) -> Tile:
    """The largest score of each anchor's negatives and positives."""
    kinds = kinds_of_pairs(rows.extra, columns.extra)
    logits = scale * products
    row_valid, column_valid = _across(rows.valid > 0, columns.valid > 0)

    def largest(valid: Bool[Array, "..."], axis: int) -> _Shifts:
        def of(kind: Bool[Array, "r c"] | None) -> Array:
            allowed = jnp.zeros_like(kinds.negative) if kind is None else kind & valid
            return jnp.max(jnp.where(allowed, logits, -jnp.inf), axis=axis)

        return _Shifts(of(kinds.negative), of(kinds.positive))

    return Tile(largest(column_valid, 1), largest(row_valid, 0), None)


def _fast_slopes(sums: _Sums, cotangents: _Sums, shift: Float[Array, ""]) -> _Slopes:
    def factor(log_sum: Float[Array, " b"], cotangent: Float[Array, " b"]) -> Float[Array, " b"]:
        is_some = log_sum > -jnp.inf
        return jnp.where(is_some, cotangent * jnp.exp(shift - jnp.where(is_some, log_sum, shift)), 0.0)

    negatives = factor(sums.negatives, cotangents.negatives)
    if sums.positives is None or cotangents.positives is None:
        return _Slopes(negatives, None, None)
    positives = factor(sums.positives.logsumexp, cotangents.positives.logsumexp)
    return _Slopes(negatives, positives, cotangents.positives.total)


def _fast_slope_tile(
    scale: Float[Array, ""], shift: Float[Array, ""], products: Float[Array, "r c"], rows: Side, columns: Side
) -> Tile:
    (row_kind, row_slopes), (column_kind, column_slopes) = rows.extra, columns.extra
    kinds = kinds_of_pairs(row_kind, column_kind)
    slopes = jax.tree.map(jnp.add, *_across(row_slopes, column_slopes))
    exponentials = jnp.exp(scale * products - shift)
    slope = jnp.where(kinds.negative, exponentials * slopes.negatives, 0.0)
    if kinds.positive is not None:
        slope += jnp.where(kinds.positive, exponentials * slopes.positives + slopes.total, 0.0)
    return Tile(None, None, slope)


def _exact_slope_tile(scale: Float[Array, ""], products: Float[Array, "r c"], rows: Side, columns: Side) -> Tile:
    (row_kind, of_rows), (column_kind, of_columns) = rows.extra, columns.extra
    kinds = kinds_of_pairs(row_kind, column_kind)
    logits = scale * products

    def share(log_sum: Array) -> Array:
        # At a pair of which a side is masked the score says nothing; it must not overflow.
        return jnp.exp(jnp.minimum(logits - log_sum, 0.0))

    slope = jnp.zeros_like(logits)
    for sums, cotangents in _across(of_rows, of_columns):
        slope += jnp.where(kinds.negative, share(sums.negatives) * cotangents.negatives, 0.0)
        if kinds.positive is not None and sums.positives is not None and cotangents.positives is not None:
            pull = share(sums.positives.logsumexp) * cotangents.positives.logsumexp + cotangents.positives.total
            slope += jnp.where(kinds.positive, pull, 0.0)
    return Tile(None, None, slope)
