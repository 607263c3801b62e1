"""Squared differences of inner products over all pairs of rows, from sums of D x D matrices.

Two arrays X, Y [b d] are compared through U = X + Y and W = X - Y, which is exact where X and Y are close:

    cross_jk = <X_j, Y_k> - <Y_j, X_k> = (<W_j, U_k> - <U_j, W_k>) / 2
    in_jk    = <X_j, X_k> - <Y_j, Y_k> = (<W_j, U_k> + <U_j, W_k>) / 2

With P = U'U, N = W'W, M = U'W the sums over k of the squares are quadratic forms of row j, and the sums over both j and
k are inner products of the matrices:

    joint_j  = sum_k in_jk^2 + cross_jk^2 = (W_j' P W_j + U_j' N U_j) / 2        sum_j joint_j  = <P, N>
    excess_j = sum_k in_jk^2 - cross_jk^2 = W_j' M U_j                           sum_j excess_j = tr(M M)

No sum but `excess` has terms of both signs, so that nothing cancels as Y tends to X. Rows are walked in blocks, and
only D x D matrices are added over devices.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from repkit.losses._row_blocks import RowBlocks
from repkit.numerics import AxisName, mask_rows, row_mask, sum_over, target_platform, varying


class Comparison(NamedTuple):
    """Which two of the arrays are compared, and whether `excess` is wanted beside `joint`."""

    first: int
    second: int
    has_excess: bool


class Comparisons(NamedTuple):
    """All that is computed in one walk over the rows of some arrays.

    Attributes:
        pairs: the arrays that are compared.
        has_agreement: whether also (<X0_j, X1_j> - <X2_j, X3_j>)^2 of the first four arrays is wanted.
        size: rows of a block; None chooses.
    """

    pairs: tuple[Comparison, ...]
    has_agreement: bool
    size: int | None


class Terms(NamedTuple):
    """`joint` and `excess` of every pair and `agreement`, per row [b] or summed over the rows; None if not wanted."""

    joint: tuple[Array, ...]
    excess: tuple[Array | None, ...]
    agreement: Array | None


class _Matrices(NamedTuple):
    """P, N and M of one pair of arrays, [d d] each."""

    p: Float[Array, "d d"]
    n: Float[Array, "d d"]
    m: Float[Array, "d d"] | None


class _Sums(NamedTuple):
    matrices: tuple[_Matrices, ...]
    agreement: Float[Array, ""] | None


Arrays = tuple[Float[Array, "b d"], ...]
Where = Bool[Array, " b"] | None


def total_terms(comparisons: Comparisons, arrays: Arrays, where: Where, axis_name: AxisName | None) -> Terms:
    """The terms summed over the rows of all devices; masked rows count as zeros."""
    arrays = tuple(varying(x, axis_name) for x in arrays)
    matrices, agreement = _sums_over(_sums(comparisons, arrays, where), axis_name)
    return Terms(
        tuple(jnp.sum(each.p * each.n) for each in matrices),
        tuple(None if each.m is None else jnp.sum(each.m * each.m.T) for each in matrices),
        agreement,
    )


def row_terms(comparisons: Comparisons, arrays: Arrays, where: Where, axis_name: AxisName | None) -> Terms:
    """The terms of this device's rows against the rows of all devices."""
    return _row_terms(comparisons, axis_name, tuple(varying(x, axis_name) for x in arrays), where)


def products_per_row(comparisons: Comparisons, *, is_sum: bool) -> int:
    """How many products of a row with a D x D matrix value and gradient take."""
    joint, excess = (4, 3) if is_sum else (6, 4)
    return sum(joint + excess * pair.has_excess for pair in comparisons.pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Sums over rows. The rule for the gradient ends at this device's sums: how it passes the sum over devices is JAX's.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(comparisons: Comparisons, arrays: Arrays, where: Where) -> _Sums:
    return _walk_sums(comparisons, arrays, where)


def _sums_forward(comparisons: Comparisons, arrays: Arrays, where: Where) -> tuple[_Sums, tuple[Arrays, Where]]:
    return _sums(comparisons, arrays, where), (arrays, where)


def _sums_backward(comparisons: Comparisons, residuals: tuple[Arrays, Where], slopes: _Sums) -> tuple[Arrays, None]:
    arrays, where = residuals
    # U meets the slope of P from both sides, and that of M from one.
    candidates = [_Matrices(s.n + s.n.T, s.p + s.p.T, None if s.m is None else s.m.T) for s in slopes.matrices]
    return _walk_gradient(comparisons, arrays, where, candidates, slopes.agreement), None


_sums.defvjp(_sums_forward, _sums_backward)


def _sums_over(sums: _Sums, axis_name: AxisName | None) -> _Sums:
    """The sums over all devices, in one exchange."""
    return jax.tree.map(lambda x: sum_over(x, axis_name), sums)


# ---------------------------------------------------------------------------------------------------------------------
# Terms of single rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row_terms(comparisons: Comparisons, axis_name: AxisName | None, arrays: Arrays, where: Where) -> Terms:
    return _row_terms_forward(comparisons, axis_name, arrays, where)[0]


def _row_terms_forward(comparisons: Comparisons, axis_name: AxisName | None, arrays: Arrays, where: Where) -> tuple:
    matrices = _sums_over(_walk_sums(comparisons, arrays, where), axis_name).matrices
    return _walk_terms(comparisons, arrays, where, matrices), (arrays, where, matrices)


def _row_terms_backward(
    comparisons: Comparisons, axis_name: AxisName | None, residuals: tuple, slopes: Terms
) -> tuple[Arrays, None]:
    arrays, where, matrices = residuals
    leaves = jnp.stack([each for each in (*slopes.joint, *slopes.excess) if each is not None])
    highest, lowest = _largest(leaves, where, axis_name), -_largest(-leaves, where, axis_name)

    def of_equal_rows() -> Arrays:
        """Where all rows have one slope, a row's gradient as an anchor is that as a candidate."""
        joint = highest[: len(slopes.joint)]
        excess = iter(highest[len(slopes.joint) :])
        candidates = [
            _Matrices(2 * j * each.p, 2 * j * each.n, None if each.m is None else 2 * next(excess) * each.m)
            for j, each in zip(joint, matrices, strict=True)
        ]
        return _walk_gradient(comparisons, arrays, where, candidates, slopes.agreement)

    def of_any_rows() -> Arrays:
        weighted = _sums_over(_walk_sums(comparisons, arrays, where, slopes), axis_name).matrices
        return _walk_gradient(comparisons, arrays, where, weighted, slopes.agreement, (matrices, slopes))

    # The mean over rows without weights, which is what is nearly always differentiated, costs half of the general case.
    return jax.lax.cond(jnp.all(highest == lowest), of_equal_rows, of_any_rows), None


def _largest(x: Float[Array, "n b"], where: Where, axis_name: AxisName | None) -> Float[Array, " n"]:
    """The largest of each line over the valid rows of all devices; -inf if there are none."""
    largest = jnp.max(jnp.where(row_mask(where, x.shape[1]), x, -jnp.inf), axis=1, initial=-jnp.inf)
    return largest if axis_name is None else jax.lax.pmax(largest, axis_name)


_row_terms.defvjp(_row_terms_forward, _row_terms_backward)


# ---------------------------------------------------------------------------------------------------------------------
# The walks


def _blocks(comparisons: Comparisons, arrays: Arrays) -> RowBlocks:
    rows, dim = arrays[0].shape
    # U, W and their products with a D x D matrix stay in a processor's cache; an accelerator wants larger steps.
    elements = 2**20 if target_platform() == "cpu" else 2**23
    return RowBlocks.interleaved(rows, comparisons.size or max(elements // dim, 256))


def _walk_sums(comparisons: Comparisons, arrays: Arrays, where: Where, row_weights: Terms | None = None) -> _Sums:
    """P, N, M of every pair, each row counted with its weight, and the sum of the agreement."""
    blocks, dtype = _blocks(comparisons, arrays), _dtype(arrays)
    dim = arrays[0].shape[1]

    def weighted(x: Array, weights: Array | None, i: Array) -> Array:
        return x.T if weights is None else (blocks.take(weights, i)[:, None] * x).T

    def add_block(i: Array, sums: _Sums) -> _Sums:
        rows = _rows(blocks, arrays, where, i)
        if blocks.repeats:
            rows = [mask_rows(x, blocks.is_new(i)) for x in rows]
        matrices = []
        for n, (pair, total) in enumerate(zip(comparisons.pairs, sums.matrices, strict=True)):
            u, w = rows[pair.first] + rows[pair.second], rows[pair.first] - rows[pair.second]
            weights = None if row_weights is None else row_weights.joint[n]
            p, n_ = total.p + _product(weighted(u, weights, i), u), total.n + _product(weighted(w, weights, i), w)
            m = total.m
            if m is not None:
                m = m + _product(weighted(u, None if row_weights is None else row_weights.excess[n], i), w)
            matrices.append(_Matrices(p, n_, m))
        agreement = sums.agreement
        if agreement is not None:
            agreement = agreement + jnp.sum(jnp.square(disagreement(rows)))
        return _Sums(tuple(matrices), agreement)

    def zero(*shape: int) -> Array:
        return jnp.zeros_like(arrays[0], dtype, shape=shape)

    empty = _Sums(
        tuple(
            _Matrices(zero(dim, dim), zero(dim, dim), zero(dim, dim) if pair.has_excess else None)
            for pair in comparisons.pairs
        ),
        zero() if comparisons.has_agreement else None,
    )
    return jax.lax.fori_loop(0, blocks.blocks, add_block, empty)


def _walk_terms(comparisons: Comparisons, arrays: Arrays, where: Where, matrices: tuple[_Matrices, ...]) -> Terms:
    """The terms of every row, given the sums over all rows."""
    blocks = _blocks(comparisons, arrays)

    def set_block(i: Array, terms: Terms) -> Terms:
        rows = _rows(blocks, arrays, where, i)
        joint, excess = [], []
        for pair, each in zip(comparisons.pairs, matrices, strict=True):
            u, w = rows[pair.first] + rows[pair.second], rows[pair.first] - rows[pair.second]
            joint.append((jnp.sum(_product(w, each.p) * w, axis=-1) + jnp.sum(_product(u, each.n) * u, axis=-1)) / 2)
            excess.append(None if each.m is None else jnp.sum(_product(w, each.m) * u, axis=-1))
        agreement = jnp.square(disagreement(rows)) if comparisons.has_agreement else None
        new = Terms(tuple(joint), tuple(excess), agreement)
        return jax.tree.map(lambda x, block: blocks.put(x, block, i), terms, new)

    empty = jnp.zeros_like(arrays[0], _dtype(arrays), shape=arrays[0].shape[:1])
    terms = Terms(
        tuple(empty for _ in comparisons.pairs),
        tuple(empty if pair.has_excess else None for pair in comparisons.pairs),
        empty if comparisons.has_agreement else None,
    )
    return jax.lax.fori_loop(0, blocks.blocks, set_block, terms)


def _walk_gradient(
    comparisons: Comparisons,
    arrays: Arrays,
    where: Where,
    candidates: Sequence[_Matrices],
    agreement: Array | None,
    anchors: tuple[tuple[_Matrices, ...], Terms] | None = None,
) -> Arrays:
    """Gradient by the arrays, of every pair `u n + w m` by u and `w p + u m'` by w.

    Args:
        candidates: the matrices of what a row means to all rows.
        agreement: the slope of the agreement, of each row or of its sum.
        anchors: the matrices of what all rows mean to a row, and each row's own slopes to multiply the result with.
    """
    blocks = _blocks(comparisons, arrays)

    def set_block(i: Array, gradients: Arrays) -> Arrays:
        rows = _rows(blocks, arrays, where, i)
        slopes = [jnp.zeros_like(x) for x in rows]
        for n, (pair, shared) in enumerate(zip(comparisons.pairs, candidates, strict=True)):
            u, w = rows[pair.first] + rows[pair.second], rows[pair.first] - rows[pair.second]
            by_u, by_w = _product(u, shared.n), _product(w, shared.p)
            if shared.m is not None:
                by_u, by_w = by_u + _product(w, shared.m), by_w + _product(u, shared.m.T)
            if anchors is not None:
                own, weight = anchors[0][n], blocks.take(anchors[1].joint[n], i)[:, None]
                by_u, by_w = by_u + weight * _product(u, own.n), by_w + weight * _product(w, own.p)
                excess = anchors[1].excess[n]
                if own.m is not None and excess is not None:
                    weight = blocks.take(excess, i)[:, None]
                    by_u, by_w = by_u + weight * _product(w, own.m), by_w + weight * _product(u, own.m.T)
            slopes[pair.first] += by_u + by_w
            slopes[pair.second] += by_u - by_w
        if agreement is not None:
            slope = 2 * disagreement(rows) * (blocks.take(agreement, i) if agreement.ndim else agreement)
            for n, sign in enumerate((1, 1, -1, -1)):
                slopes[n] += sign * slope[:, None] * rows[n ^ 1]
        return tuple(blocks.put(x, slope.astype(x.dtype), i) for x, slope in zip(gradients, slopes, strict=True))

    return jax.lax.fori_loop(0, blocks.blocks, set_block, tuple(jnp.zeros_like(x) for x in arrays))


def _rows(blocks: RowBlocks, arrays: Arrays, where: Where, i: Array) -> list[Float[Array, "r d"]]:
    """The block's rows in the precision of the computation, 0 where masked."""
    rows = [blocks.take(x, i).astype(_dtype(arrays)) for x in arrays]
    return rows if where is None else [mask_rows(x, blocks.take(where, i)) for x in rows]


def disagreement(rows: Sequence[Float[Array, "r d"]]) -> Float[Array, " r"]:
    return jnp.sum(rows[0] * rows[1], axis=-1) - jnp.sum(rows[2] * rows[3], axis=-1)


def _dtype(arrays: Arrays) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
