"""The engine of all losses over pairs of rows: it walks the blocks of a pair matrix that is never held whole.

A loss over pairs is a small function of one tile of the matrix, `Tile = tile(products, rows, columns)`: what the tile
adds to sums over each row and each column, and the slope of the loss in the tile's products. `walk_pairs` calls it for
every tile and adds up the sums and, from the slopes, the gradients of both sides' embeddings. Inside `pmap` and
`shard_map` the columns of the other devices come by a ring or are gathered; the tile function never knows.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import require_arrays
from repkit.losses._row_blocks import RowBlocks
from repkit.losses.form import Blocks, Form, require_form
from repkit.numerics import AxisName, Scalar, all_over, mask_rows, sum_over, target_platform, varying

Combine: TypeAlias = Literal["sum", "max"]


class Side(NamedTuple):
    """The rows, or the columns, of a pair matrix.

    Attributes:
        embeds: one vector each [b d]; 0 where not valid.
        valid: 1, or 0 for those that take no part [b].
        extra: arrays [b ...] that the tile function reads.
    """

    embeds: Float[Array, "b d"]
    valid: Float[Array, " b"]
    extra: Any


class Best(NamedTuple):
    """With `combine="max"`, a score and what belongs to it: that of the largest score is kept."""

    score: Float[Array, " b"]
    place: Int[Array, " b"]


class Tile(NamedTuple):
    """What a tile contributes.

    Attributes:
        row_sums: arrays [r], to be combined with those of the other tiles of these rows.
        column_sums: arrays [c], to be combined with those of the other tiles of these columns.
        slope: derivative of the loss in the products [r c]; None where no gradient is asked for. It may hold anything
            finite at pairs of which one side is not valid.
    """

    row_sums: Any
    column_sums: Any
    slope: Float[Array, "r c"] | None


TileFunction: TypeAlias = Callable[[Float[Array, "r c"], Side, Side], Tile]


class Walk(NamedTuple):
    """The result of a walk.

    Attributes:
        row_sums: combined over all tiles of the rows, [b] each.
        column_sums: combined over all tiles of the columns, [b] each.
        row_gradient: of the rows' embeddings, in at least float32 [b d]; None where the tiles had no slope.
        column_gradient: the same of the columns'.
    """

    row_sums: Any
    column_sums: Any
    row_gradient: Any
    column_gradient: Any


# ---------------------------------------------------------------------------------------------------------------------
# Products


def embeddings(*arrays: Float[Array, "b d"], where: Bool[Array, " b"] | None) -> list[Float[Array, "b d"]]:
    """The arrays as operands of matrix products: of one type, bfloat16 or at least float32; 0 in masked rows."""
    given = [jnp.asarray(array) for array in arrays]
    dtype = jnp.result_type(*given)
    if dtype != jnp.bfloat16:
        dtype = jnp.promote_types(dtype, jnp.float32)
    return [mask_rows(array.astype(dtype), where) for array in given]


def require_pairs(
    caller: str,
    embeds: Mapping[str, Float[Array, "b d"]],
    *,
    form: Form,
    where: Bool[Array, " b"] | None,
    weights: Float[Array, " b"] | None,
    logit_scale: Scalar,
    labels: Int[Array, " b"] | None,
    **others: tuple[Any, str],
) -> list[Float[Array, "b d"]]:
    """The embeddings as operands of products, after the checks that all losses over pairs have in common.

    Args:
        caller: name of the loss, for messages.
        embeds: the two embeddings by the names of their arguments.
        form: as given to the loss.
        where: as given.
        weights: as given.
        logit_scale: as given.
        labels: as given.
        others: further arrays by name, each with what it is to be; see `repkit.checks.require_arrays`.
    """
    arrays = {name: (x, "float b d") for name, x in embeds.items()} | {"logit_scale": (logit_scale, "number")}
    rows = {"labels": (labels, "int b"), "where": (where, "bool b"), "weights": (weights, "float b")}
    require_arrays(caller, arrays | others | rows)
    require_form(caller, form)
    return embeddings(*embeds.values(), where=where)


def pair_products(anchors: Float[Array, "r d"], candidates: Float[Array, "c d"]) -> Float[Array, "r c"]:
    """`<anchor_i, candidate_j>`, summed in at least float32; of bfloat16 rows it is exact up to that sum."""
    return _matmul(anchors, candidates.T)


def row_products(x: Float[Array, "b d"], y: Float[Array, "b d"]) -> Float[Array, " b"]:
    """`<x_i, y_i>` in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(x.astype(dtype) * y.astype(dtype), axis=-1)


def _matmul(x: Float[Array, "m k"], y: Float[Array, "k n"]) -> Float[Array, "m n"]:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if not _has_low_precision_products():
        x, y = x.astype(dtype), y.astype(dtype)
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


def _has_low_precision_products() -> bool:
    """Whether bfloat16 operands make a product faster; a CPU converts them."""
    return target_platform() != "cpu"


# Sums as matrix-vector products: the tile's values are computed once and read at the speed of a matrix product.


def row_sums(values: Float[Array, "r c"], columns: Side) -> Float[Array, " r"]:
    """The sums over the valid columns."""
    return _matmul(values, columns.valid[:, None])[:, 0]


def column_sums(values: Float[Array, "r c"], rows: Side) -> Float[Array, " c"]:
    """The sums over the valid rows."""
    return _matmul(rows.valid[None, :], values)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The choice of blocks


def row_blocks(rows: int, form: Blocks) -> RowBlocks:
    """The blocks of one side of the matrix."""
    # Large enough that a tile's matrix products take much longer than its launch, small enough for the cache. A matrix
    # of at most four tiles is walked as one, whose products are kept: a quarter of the work less for some memory.
    most = form.size or (1024 if target_platform() == "cpu" else 4096)
    return RowBlocks.contiguous(rows, rows if rows <= 2 * most and form.size is None else most)


def is_one_tile(rows: int, form: Blocks, axis_name: AxisName | None) -> bool:
    """Whether the pair matrix is one tile, so that its products are worth keeping for the backward walk."""
    return axis_name is None and row_blocks(rows, form).blocks == 1


# ---------------------------------------------------------------------------------------------------------------------
# Gradients in the forward walk
#
# Where the slopes do not wait for a sum over all pairs, one walk can give the sums and the gradient, if it is known in
# advance what the sums' cotangents will be up to a factor. They are what the rows' weights make of them, whenever the
# loss is reduced to a weighted sum or mean. A backward rule checks that, and walks again where it was not so.


def foreseen_factor(
    cotangents: Float[Array, "..."], foreseen: Float[Array, "..."], axis_name: AxisName | None
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """The factor between cotangents and what was foreseen, of all devices, and whether there is one."""
    squares = sum_over(jnp.sum(jnp.square(foreseen)), axis_name)
    factor = sum_over(jnp.sum(cotangents * foreseen), axis_name) / jnp.where(squares > 0, squares, 1.0)
    # The difference between the two ways of rounding, of exponents up to 100.
    tolerance = 200 * jnp.finfo(foreseen.dtype).eps * jnp.abs(factor * foreseen)
    return factor, all_over(jnp.all(jnp.abs(cotangents - factor * foreseen) <= tolerance), axis_name)


def unless(is_done: Bool[Array, ""], compute: Callable[[Float[Array, ""]], Walk], done: Walk) -> Walk:
    """`done`, or what `compute` gives, in the same buffers; `compute` must multiply its slopes by its argument, 1."""
    # A loop of at most one turn, because a conditional would copy what it passes on; and the factor, because the
    # compiler moves what does not depend on the loop out of it, to where it is always computed.
    dtype = jax.tree.leaves(done)[0].dtype

    def turn(carry: tuple[Bool[Array, ""], Walk]) -> tuple[Bool[Array, ""], Walk]:
        return ~carry[0], compute(1.0 - carry[0].astype(dtype))

    return jax.lax.while_loop(lambda carry: ~carry[0], turn, (is_done, done))[1]


# ---------------------------------------------------------------------------------------------------------------------
# The walk


def walk_pairs(
    tile: TileFunction,
    rows: Side,
    columns: Side,
    *,
    form: Blocks,
    axis_name: AxisName | None,
    combine: Combine = "sum",
    products: Float[Array, "b b"] | None = None,
) -> Walk:
    """Calls `tile` for all pairs of this device's rows with all devices' columns.

    Args:
        tile: the loss's function of a tile; see `Tile`. It is called for tiles of one shape.
        rows: this device's rows.
        columns: this device's columns. The result has their sums and gradients over all devices' rows.
        form: the blocks' size, and how columns travel.
        axis_name: the axis of `pmap` or `shard_map` that rows and columns are split over; None when they are global.
        combine: how the tiles' sums are combined.
        products: the products, if they are at hand; only for a matrix of one tile.
    """
    if products is not None:
        return _one_tile(tile, rows, columns, products)
    local = functools.partial(_walk_local, tile, form=form, axis_name=axis_name, combine=combine)
    if axis_name is None or jax.lax.axis_size(axis_name) == 1:
        return local(rows, columns)
    if form.exchange == "ring":
        return _walk_ring(local, rows, columns, axis_name, combine)
    return _walk_gathered(local, rows, columns, axis_name, combine)


def _one_tile(tile: TileFunction, rows: Side, columns: Side, products: Float[Array, "b b"]) -> Walk:
    row_sums, column_sums, slope = tile(products, rows, columns)
    if slope is None:
        return Walk(row_sums, column_sums, None, None)
    return Walk(row_sums, column_sums, *_gradients(slope, rows, columns))


def _gradients(slope: Float[Array, "r c"], rows: Side, columns: Side) -> tuple[Array, Array]:
    if _has_low_precision_products():
        slope = slope.astype(rows.embeds.dtype)
    return _matmul(slope, columns.embeds), _matmul(slope.T, rows.embeds)


def _walk_local(
    tile: TileFunction, rows: Side, columns: Side, *, form: Blocks, axis_name: AxisName | None, combine: Combine
) -> Walk:
    of_rows, of_columns = (row_blocks(len(side.valid), form) for side in (rows, columns))
    if of_rows.blocks == of_columns.blocks == 1:
        return _one_tile(tile, rows, columns, pair_products(rows.embeds, columns.embeds))

    def one(row: Side, column: Side) -> Walk:
        return _one_tile(tile, row, column, pair_products(row.embeds, column.embeds))

    shapes = jax.eval_shape(lambda: one(_take(of_rows, rows, 0), _take(of_columns, columns, 0)))
    shapes = shapes._replace(
        column_sums=_lengthened(shapes.column_sums, len(columns.valid)),
        column_gradient=_lengthened(shapes.column_gradient, len(columns.valid)),
    )

    def row_step(i: Array, walk: Walk) -> Walk:
        row = _take(of_rows, rows, i)

        def column_step(j: Array, walk: Walk) -> Walk:
            column = _take(of_columns, columns, j)
            part = one(row, column)
            return Walk(
                _merge(combine, walk.row_sums, part.row_sums),
                _put(of_columns, walk.column_sums, part.column_sums, j, combine),
                jax.tree.map(jnp.add, walk.row_gradient, part.row_gradient),
                _put(of_columns, walk.column_gradient, part.column_gradient, j, "sum"),
            )

        nothing = _filled(shapes, combine, axis_name)
        first = walk._replace(row_sums=nothing.row_sums, row_gradient=nothing.row_gradient)
        part = jax.lax.fori_loop(0, of_columns.blocks, column_step, first)
        return part._replace(
            row_sums=_put(of_rows, walk.row_sums, part.row_sums, i, combine),
            row_gradient=_put(of_rows, walk.row_gradient, part.row_gradient, i, "sum"),
        )

    whole = shapes._replace(
        row_sums=_lengthened(shapes.row_sums, len(rows.valid)),
        row_gradient=_lengthened(shapes.row_gradient, len(rows.valid)),
    )
    return jax.lax.fori_loop(0, of_rows.blocks, row_step, _filled(whole, combine, axis_name))


def _lengthened(shapes: Any, length: int) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype), shapes)


def _filled(shapes: Walk, combine: Combine, axis_name: AxisName | None) -> Walk:
    """A walk over nothing."""

    def full(value: float, shapes: Any) -> Any:
        def leaf(shape: jax.ShapeDtypeStruct) -> Array:
            start = value if jnp.issubdtype(shape.dtype, jnp.floating) else 0
            return varying(jnp.full(shape.shape, start, shape.dtype), axis_name)

        return jax.tree.map(leaf, shapes)

    value = 0.0 if combine == "sum" else -jnp.inf
    return Walk(
        full(value, shapes.row_sums),
        full(value, shapes.column_sums),
        full(0.0, shapes.row_gradient),
        full(0.0, shapes.column_gradient),
    )


def _merge(combine: Combine, first: Any, second: Any) -> Any:
    if combine == "sum":
        return jax.tree.map(jnp.add, first, second)

    def largest(x: Any, y: Any) -> Any:
        if isinstance(x, Best):
            return Best(jnp.maximum(x.score, y.score), jnp.where(y.score > x.score, y.place, x.place))
        return jnp.maximum(x, y)

    return jax.tree.map(largest, first, second, is_leaf=lambda x: isinstance(x, Best))


def _take(blocks: RowBlocks, side: Side, i: Array | int) -> Side:
    """Block i, in which rows of an earlier block take no part."""
    block = jax.tree.map(lambda x: blocks.take(x, i), side)
    if not blocks.repeats:
        return block
    new = blocks.is_new(i)
    return block._replace(embeds=mask_rows(block.embeds, new), valid=mask_rows(block.valid, new))


def _put(blocks: RowBlocks, totals: Any, parts: Any, i: Array, combine: Combine) -> Any:
    """The totals with block i's parts combined into them, but for rows of an earlier block."""
    before = jax.tree.map(lambda x: blocks.take(x, i), totals)

    def place(total: Array, old: Array, new: Array) -> Array:
        if blocks.repeats:
            new = jnp.where(blocks.is_new(i).reshape(-1, *(1,) * (new.ndim - 1)), new, old)
        return blocks.put(total, new, i)

    return jax.tree.map(place, totals, before, _merge(combine, before, parts))


def _walk_ring(
    local: Callable[[Side, Side], Walk], rows: Side, columns: Side, axis_name: AxisName, combine: Combine
) -> Walk:
    devices = jax.lax.axis_size(axis_name)
    ring = [(device, (device + 1) % devices) for device in range(devices)]

    def shift(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, ring), tree)

    def merge(walk: Walk, part: Walk) -> Walk:
        return Walk(
            _merge(combine, walk.row_sums, part.row_sums),
            _merge(combine, walk.column_sums, part.column_sums),
            jax.tree.map(jnp.add, walk.row_gradient, part.row_gradient),
            jax.tree.map(jnp.add, walk.column_gradient, part.column_gradient),
        )

    def follow(walk: Walk) -> Walk:
        """The columns' totals travel behind the columns."""
        return walk._replace(column_sums=shift(walk.column_sums), column_gradient=shift(walk.column_gradient))

    def step(_: Array, carry: tuple[Side, Walk]) -> tuple[Side, Walk]:
        columns, walk = carry
        # Neither transfer waits for this step's tiles, nor do they wait for it.
        coming, arrived = shift(columns), follow(walk)
        return coming, merge(arrived, local(rows, columns))

    nothing = _filled(jax.eval_shape(local, rows, columns), combine, axis_name)
    _, walk = jax.lax.fori_loop(0, devices, step, (columns, nothing))
    return follow(walk)


def _walk_gathered(
    local: Callable[[Side, Side], Walk], rows: Side, columns: Side, axis_name: AxisName, combine: Combine
) -> Walk:
    everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, axis=0, tiled=True), columns)
    walk = local(rows, everyone)

    def scatter(x: Array) -> Array:
        return jax.lax.psum_scatter(x, axis_name, scatter_dimension=0, tiled=True)

    def exchange(x: Array) -> Array:
        """From all devices' results for all columns to all devices' results for this device's columns."""
        parts = x.reshape(jax.lax.axis_size(axis_name), -1)
        return jax.lax.all_to_all(parts, axis_name, split_axis=0, concat_axis=0, tiled=True)

    if combine == "sum":
        column_sums = jax.tree.map(scatter, walk.column_sums)
    else:
        parts = jax.tree.map(exchange, walk.column_sums)
        each = [jax.tree.map(lambda x, k=k: x[k], parts) for k in range(jax.lax.axis_size(axis_name))]
        column_sums = functools.reduce(functools.partial(_merge, combine), each)
    return walk._replace(
        column_sums=column_sums,
        column_gradient=jax.tree.map(scatter, walk.column_gradient),
    )
