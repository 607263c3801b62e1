"""Attention map alignment walked in blocks of query rows, so that no more than a block of maps is ever in memory.

The loss of an example depends on its maps through a few sums over cells: inner products of teacher and student heads
give the weights a, and with them a second walk gives the loss. Its gradient is, cell by cell, a combination of that
cell's values in all heads, whose coefficients need the sums `d loss / d a` that the second walk adds up as well. So the
forward pass walks twice and the backward pass once. The blocks are read from maps, or computed anew in every walk from
queries and keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.losses._attention_plain import (
    SMALLEST_SHARE,
    Divergence,
    aligned_divergence,
    head_weights,
    inverse,
    inverse_root,
    masked_softmax,
    token_rows,
)

Kind: TypeAlias = Divergence | Literal["token_kl"]
Start: TypeAlias = int | Int[Array, ""]

# Where a block of all heads is small enough for a core's cache, the three walks cost one trip to memory; an
# accelerator wants as much work as possible per kernel.
_BLOCK_CELLS = {"cpu": 2**17, "accelerator": 2**24}
# Up to this many heads a mixture of heads is written as a sum, which the compiler fuses with what is done to it.
_FUSED_HEADS = 16


class Settings(NamedTuple):
    """What is fixed when the walk is traced."""

    kind: Kind
    stop_alignment_gradient: bool
    causal: bool
    rows_per_block: int | None


class Maps(NamedTuple):
    """Attention maps as given."""

    maps: Float[Array, "*b h q k"]

    @property
    def shape(self) -> tuple[int, ...]:
        """(b, h, q, k) of the maps."""
        return self.maps.shape


class QueriesKeys(NamedTuple):
    """Attention maps as the softmax of `query key^T`."""

    query: Float[Array, "*b h q d"]
    key: Float[Array, "*b h k d"]

    @property
    def shape(self) -> tuple[int, ...]:
        """(b, h, q, k) of the maps."""
        return (*self.query.shape[:-1], self.key.shape[-2])


Source: TypeAlias = Maps | QueriesKeys


class Masks(NamedTuple):
    """Which queries and keys count; None for all."""

    query: Bool[Array, "*b q"] | None
    key: Bool[Array, "*b k"] | None


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its backward rule


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_alignment(
    settings: Settings, student: Source, teacher: Source, masks: Masks, temperature: Float[Array, ""]
) -> Float[Array, " b"]:
    """The loss of each example; its gradient reaches the student only."""
    return _forward(settings, student, teacher, masks, temperature)[0]


def _forward(
    settings: Settings, student: Source, teacher: Source, masks: Masks, temperature: Float[Array, ""]
) -> tuple[Float[Array, " b"], Any]:
    plan, keys = _plan(settings, student, teacher), student.shape[-1]
    student, teacher, masks = plan.grouped((student, teacher, masks))

    def group(step: Int[Array, ""]) -> tuple[Float[Array, " g"], Any]:
        blocks = _open(settings, plan, student, teacher, masks, step)
        if settings.kind == "token_kl":
            return blocks.total(functools.partial(_token_block, settings, keys, temperature)), ()
        alignment = _alignment(settings.kind, blocks, temperature)
        losses, slopes = _losses(settings.kind, blocks, alignment)
        return losses, (alignment, slopes)

    losses, saved = jax.lax.map(group, jnp.arange(plan.steps))
    return plan.ungrouped(losses.T), saved


def _forward_and_save(settings: Settings, *arguments: Any) -> tuple[Float[Array, " b"], Any]:
    losses, saved = _forward(settings, *arguments)
    return losses, (arguments, saved)


def _backward(settings: Settings, residuals: Any, cotangents: Float[Array, " b"]) -> tuple[Any, ...]:
    (student, teacher, masks, temperature), saved = residuals
    plan, keys = _plan(settings, student, teacher), student.shape[-1]
    student, teacher, masks, cotangents = plan.grouped((student, teacher, masks, cotangents))

    def group(step: Int[Array, ""], gradient: Source) -> Source:
        blocks = _open(settings, plan, student, teacher, masks, step)
        if settings.kind == "token_kl":
            cells_gradient = functools.partial(_token_cells_gradient, settings, keys, temperature, cotangents[:, step])
        else:
            alignment, slopes = jax.tree.map(lambda x: x[step], saved)
            parts = _gradient_parts(settings, alignment, slopes, temperature, cotangents[:, step])
            cells_gradient = functools.partial(_cells_gradient, settings.kind, alignment, parts)

        def block(gradient: Source, start: Start, size: int) -> Source:
            cells = blocks.student.rows(start, size)
            return blocks.student.pull_back(
                gradient, start, cells, cells_gradient(cells, blocks.teacher.rows(start, size))
            )

        return plan.fold(block, gradient)

    gradient = jax.lax.fori_loop(0, plan.steps, group, jax.tree.map(jnp.zeros_like, student))
    return plan.ungrouped(gradient), None, None, None


blockwise_alignment.defvjp(_forward_and_save, _backward)


# ---------------------------------------------------------------------------------------------------------------------
# Which blocks there are


class _Plan(NamedTuple):
    """The batch is walked in `steps` groups of `group` examples, and a group in blocks of `rows` query rows.

    Group t holds the examples t, t + steps, t + 2 steps, ...: a batch that is split over devices stays split when it is
    unfolded to [group, steps], so that every device walks its own examples.
    """

    group: int
    steps: int
    rows: int
    queries: int
    dtype: jnp.dtype

    def grouped(self, tree: Any) -> Any:
        """[b ...] to [group steps ...]."""
        return jax.tree.map(lambda x: x.reshape(self.group, self.steps, *x.shape[1:]), tree)

    def ungrouped(self, tree: Any) -> Any:
        """[group steps ...] to [b ...]."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def fold(self, step: Callable[[Any, Start, int], Any], carry: Any) -> Any:
        """`carry = step(carry, start, rows)` over the blocks of a group; the last one has the rows that are left."""
        whole, rest = divmod(self.queries, self.rows)
        if whole == 1:
            carry = step(carry, 0, self.rows)
        else:
            carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(carry, i * self.rows, self.rows), carry)
        return step(carry, whole * self.rows, rest) if rest else carry


def _plan(settings: Settings, student: Source, teacher: Source) -> _Plan:
    examples, student_heads, queries, keys = student.shape
    cells_per_row = (student_heads + teacher.shape[1]) * keys
    budget = _BLOCK_CELLS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    rows = min(queries, settings.rows_per_block or max(1, budget // cells_per_row))
    parts = math.gcd(examples, _batch_parts(student))
    local = examples // parts
    largest = max(1, budget // (queries * cells_per_row)) if rows == queries else 1
    group = parts * max(size for size in range(1, min(local, largest) + 1) if local % size == 0)
    dtypes = (leaf.dtype for leaf in jax.tree.leaves((student, teacher)))
    dtype = jnp.promote_types(functools.reduce(jnp.promote_types, dtypes), jnp.float32)
    return _Plan(group, examples // group, rows, queries, dtype)


def _batch_parts(source: Source) -> int:
    """Into how many parts the compiler may split the batch: the devices of the mesh that it places the arrays on."""
    mesh = jax.typeof(jax.tree.leaves(source)[0]).sharding.mesh
    return math.prod(mesh.shape[name] for name in mesh.auto_axes)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of maps, and the way of their gradient back to what the maps came from


class _MapBlocks(NamedTuple):
    """Blocks of a group's maps, cut from the maps of the batch."""

    maps: Float[Array, "g steps h q k"]
    step: Int[Array, ""]
    masks: Masks
    dtype: jnp.dtype

    def rows(self, start: Start, size: int) -> Float[Array, "g h n"]:
        """Cells of `size` query rows, 0 where they do not count."""
        keys = self.maps.shape[-1]
        cells = _cut(_flat(self.maps), self.step, start * keys, size * keys).astype(self.dtype)
        return self._counting(cells, start, size)

    def pull_back(self, gradient: Maps, start: Start, cells: Array, cells_gradient: Float[Array, "g h n"]) -> Maps:
        """`gradient` with that of a block in its place."""
        del cells
        keys = self.maps.shape[-1]
        block = self._counting(cells_gradient, start, cells_gradient.shape[-1] // keys)
        return Maps(_paste(_flat(gradient.maps), block, self.step, start * keys).reshape(self.maps.shape))

    def _counting(self, cells: Float[Array, "g h n"], start: Start, size: int) -> Float[Array, "g h n"]:
        counts = _counting_cells(self.masks, start, size)
        if counts is None:
            return cells
        counts = jnp.broadcast_to(counts, (cells.shape[0], 1, size, self.maps.shape[-1]))
        return jnp.where(counts.reshape(cells.shape[0], 1, -1), cells, 0.0)


class _AttentionBlocks(NamedTuple):
    """Blocks of a group's maps, computed from its queries and keys."""

    query: Float[Array, "g steps h q d"]
    key: Float[Array, "g h k d"]
    step: Int[Array, ""]
    masks: Masks
    causal: bool

    def rows(self, start: Start, size: int) -> Float[Array, "g h n"]:
        """Cells of `size` query rows, 0 where they do not count."""
        counts = _counting_cells(self.masks, start, size)
        if self.causal:
            earlier = (start + jnp.arange(size))[:, None] >= jnp.arange(self.key.shape[-2])
            counts = earlier if counts is None else counts & earlier
        logits = _contract("ghqd,ghkd->ghqk", self._queries(start, size), self.key)
        maps = jax.nn.softmax(logits, axis=-1) if counts is None else masked_softmax(logits, counts)
        return maps.reshape(*maps.shape[:2], -1)

    def pull_back(
        self, gradient: QueriesKeys, start: Start, cells: Float[Array, "g h n"], cells_gradient: Float[Array, "g h n"]
    ) -> QueriesKeys:
        """`gradient` with a block's share added: through the softmax and the inner products."""
        queries = self._queries(start, cells.shape[-1] // self.key.shape[-2])
        maps, maps_gradient = (x.reshape(*queries.shape[:-1], -1) for x in (cells, cells_gradient))
        mean = jnp.sum(maps * maps_gradient, axis=-1, keepdims=True)
        logits_gradient = maps * (maps_gradient - mean)
        query = _contract("ghqk,ghkd->ghqd", logits_gradient, self.key)
        key = _contract("ghqk,ghqd->ghkd", logits_gradient, queries)
        return QueriesKeys(_paste(gradient.query, query, self.step, start), gradient.key.at[:, self.step].add(key))

    def _queries(self, start: Start, size: int) -> Float[Array, "g h q d"]:
        queries = _cut(self.query, self.step, start, size)
        counts = _cut_mask(self.masks.query, start, size)
        return queries if counts is None else jnp.where(counts[:, None, :, None], queries, 0.0)


class _Blocks(NamedTuple):
    """The maps of both models for a group of examples."""

    plan: _Plan
    student: _MapBlocks | _AttentionBlocks
    teacher: _MapBlocks | _AttentionBlocks

    def total(self, value: Callable[[Float[Array, "g hs n"], Float[Array, "g ht n"]], Any]) -> Any:
        """The sum of `value(student cells, teacher cells)` over the blocks."""

        def block(start: Start, size: int) -> Any:
            return value(self.student.rows(start, size), self.teacher.rows(start, size))

        # Zeros like an input vary over the same mapped axes as what is added to them.
        like = jax.tree.leaves(self.student)[0]
        shapes = jax.eval_shape(functools.partial(block, size=self.plan.rows), 0)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(like, dtype=x.dtype, shape=x.shape), shapes)
        return self.plan.fold(lambda carry, start, size: jax.tree.map(jnp.add, carry, block(start, size)), zeros)


def _open(
    settings: Settings, plan: _Plan, student: Source, teacher: Source, masks: Masks, step: Int[Array, ""]
) -> _Blocks:
    masks = jax.tree.map(lambda mask: mask[:, step], masks)

    def blocks(source: Source) -> _MapBlocks | _AttentionBlocks:
        match source:
            case Maps(maps):
                return _MapBlocks(maps, step, masks, plan.dtype)
            case QueriesKeys(query, key):
                keys = key[:, step].astype(plan.dtype)
                if masks.key is not None:
                    keys = jnp.where(masks.key[:, None, :, None], keys, 0.0)
                return _AttentionBlocks(query, keys, step, masks, settings.causal)

    return _Blocks(plan, blocks(student), blocks(teacher))


def _flat(maps: Float[Array, "g steps h q k"]) -> Float[Array, "g steps h n"]:
    return maps.reshape(*maps.shape[:3], -1)


def _cut(x: Array, step: Int[Array, ""], start: Start, size: int) -> Array:
    """`x[:, step, :, start : start + size]`."""
    at = (0, step, 0, start, *(0,) * (x.ndim - 4))
    return jax.lax.dynamic_slice(x, at, (x.shape[0], 1, x.shape[2], size, *x.shape[4:]))[:, 0]


def _paste(x: Array, block: Array, step: Int[Array, ""], start: Start) -> Array:
    """`x` with `block` in the place that `_cut` takes it from."""
    return jax.lax.dynamic_update_slice(x, block[:, None].astype(x.dtype), (0, step, 0, start, *(0,) * (x.ndim - 4)))


def _cut_mask(mask: Bool[Array, "g q"] | None, start: Start, size: int) -> Bool[Array, "g r"] | None:
    return None if mask is None else jax.lax.dynamic_slice_in_dim(mask, start, size, 1)


def _counting_cells(masks: Masks, start: Start, size: int) -> Bool[Array, "g 1 #r #k"] | None:
    """Which cells of a block of query rows count; None for all."""
    sides = []
    if masks.query is not None:
        sides.append(_cut_mask(masks.query, start, size)[:, None, :, None])
    if masks.key is not None:
        sides.append(masks.key[:, None, None, :])
    return functools.reduce(jnp.logical_and, sides) if sides else None


def _contract(spec: str, first: Array, second: Array) -> Array:
    return jnp.einsum(spec, first, second, precision=jax.lax.Precision.HIGHEST)


def _combine(coefficients: Float[Array, "g o i"], heads: Float[Array, "g i n"]) -> Float[Array, "g o n"]:
    """`sum_i coefficients_oi heads_i`."""
    if heads.shape[1] > _FUSED_HEADS:
        return _contract("goi,gin->gon", coefficients, heads)
    terms = (coefficients[:, :, i, None] * heads[:, None, i] for i in range(heads.shape[1]))
    return functools.reduce(jnp.add, terms)


# ---------------------------------------------------------------------------------------------------------------------
# One set of weights per example: "mse" and "kl"


class _Alignment(NamedTuple):
    """What the sums over all cells of an example say about its heads.

    Attributes:
        weights: a_ij, 0 for empty heads.
        cosines: of teacher and student heads.
        mixing: from student heads to what teacher heads are compared with, `m_i = sum_j mixing_ij s_j`, in the units of
            the teacher's maps.
        student_unit: 1 / |s_j|, the Euclidean length, 0 for an empty head.
        teacher_unit: 1 / |t_i|.
        student_scale: 1 / the norm of s_j in which the maps are compared.
        teacher_scale: 1 / that of t_i.
    """

    weights: Float[Array, "g ht hs"]
    cosines: Float[Array, "g ht hs"]
    mixing: Float[Array, "g ht hs"]
    student_unit: Float[Array, "g hs"]
    teacher_unit: Float[Array, "g ht"]
    student_scale: Float[Array, "g hs"]
    teacher_scale: Float[Array, "g ht"]


def _alignment(kind: Kind, blocks: _Blocks, temperature: Float[Array, ""]) -> _Alignment:
    """The first walk."""

    def block(student: Float[Array, "g hs n"], teacher: Float[Array, "g ht n"]) -> Any:
        squares = [jnp.sum(jnp.square(cells), axis=-1) for cells in (student, teacher)]
        sums = [jnp.sum(cells, axis=-1) for cells in (student, teacher)] if kind == "kl" else []
        return _contract("gin,gjn->gij", teacher, student), squares, sums

    products, squares, sums = blocks.total(block)
    student_unit, teacher_unit = map(inverse_root, squares)
    cosines = products * teacher_unit[:, :, None] * student_unit[:, None, :]
    student_squares, teacher_squares = squares
    weights = head_weights(cosines, teacher_squares, student_squares, temperature)
    student_scale, teacher_scale = map(inverse, sums) if kind == "kl" else (student_unit, teacher_unit)
    # A teacher head without a student head to learn from is left out.
    teacher_scale = jnp.where(jnp.any(weights > 0, axis=-1), teacher_scale, 0.0)
    mixing = weights * student_scale[:, None, :] * inverse(teacher_scale)[:, :, None]
    return _Alignment(weights, cosines, mixing, student_unit, teacher_unit, student_scale, teacher_scale)


def _losses(kind: Kind, blocks: _Blocks, alignment: _Alignment) -> tuple[Float[Array, " g"], Float[Array, "g ht hs"]]:
    """The second walk: the losses, and their slopes `d loss / d a_ij`."""

    def block(student: Float[Array, "g hs n"], teacher: Float[Array, "g ht n"]) -> Any:
        mixture = _combine(alignment.mixing, student)
        slopes = _slopes(kind, alignment, teacher, mixture)
        if kind == "mse":
            cells = jnp.square(slopes)
        else:
            floor = _floor(alignment)
            log_ratio = jnp.log(jnp.maximum(teacher, floor) / jnp.maximum(mixture, floor))
            # The last two terms add up to 0 over the cells, and make each cell's value second order in the difference,
            # so that it does not matter how exactly the maps are normalised.
            cells = teacher * log_ratio - teacher + mixture
        return jnp.sum(cells, axis=-1), _contract("gin,gjn->gij", slopes, student)

    values, slopes = blocks.total(block)
    losses = jnp.sum(values * (alignment.teacher_scale ** (2 if kind == "mse" else 1)), axis=-1)
    return losses, slopes * _slope_scale(kind, alignment)[:, :, None] * alignment.student_scale[:, None, :]


def _floor(alignment: _Alignment) -> Float[Array, "g ht 1"]:
    """The smallest share of a map's mass that counts, in the units of the teacher's maps."""
    scale = alignment.teacher_scale
    return (SMALLEST_SHARE / jnp.where(scale > 0, scale, 1.0))[:, :, None]


def _slopes(
    kind: Kind, alignment: _Alignment, teacher: Float[Array, "g ht n"], mixture: Float[Array, "g ht n"]
) -> Float[Array, "g ht n"]:
    """`d loss / d m_in` in units of `_slope_scale`."""
    if kind == "mse":
        return mixture - teacher
    floor = _floor(alignment)
    return jnp.where(mixture > floor, 1.0 - teacher / jnp.maximum(mixture, floor), 1.0)


def _slope_scale(kind: Kind, alignment: _Alignment) -> Float[Array, "g ht"]:
    return 2.0 * alignment.teacher_scale if kind == "mse" else jnp.ones_like(alignment.teacher_scale)


class _GradientParts(NamedTuple):
    """The gradient at a cell of student head j is

        sum_i direct_ji slope_i + sum_i through_ji t_i - own_j s_j - offset_j

    Attributes:
        direct: through the mixture.
        through: through the cosine with the teacher's heads; None where the weights are held fixed.
        own: through the cosine's and the mixture's Euclidean norms.
        offset: through the mixture's sums.
    """

    direct: Float[Array, "g hs ht"]
    through: Float[Array, "g hs ht"] | None
    own: Float[Array, "g hs"]
    offset: Float[Array, "g hs"]


def _gradient_parts(
    settings: Settings,
    alignment: _Alignment,
    slopes: Float[Array, "g ht hs"],
    temperature: Float[Array, ""],
    cotangents: Float[Array, " g"],
) -> _GradientParts:
    cotangents = cotangents.astype(slopes.dtype)[:, None, None]
    weights, scale = alignment.weights, alignment.student_scale
    weighted = weights * slopes * cotangents
    direct = weights * _slope_scale(settings.kind, alignment)[:, :, None] * scale[:, None, :] * cotangents
    along = jnp.sum(weighted, axis=1)
    own, offset = (along * jnp.square(scale), 0.0 * along) if settings.kind == "mse" else (0.0 * along, along * scale)
    if settings.stop_alignment_gradient:
        return _GradientParts(direct.mT, None, own, offset)
    cosines = (weighted - weights * jnp.sum(weighted, axis=-1, keepdims=True)) / temperature.astype(slopes.dtype)
    through = cosines * alignment.teacher_unit[:, :, None] * alignment.student_unit[:, None, :]
    own = own + jnp.sum(cosines * alignment.cosines, axis=1) * jnp.square(alignment.student_unit)
    return _GradientParts(direct.mT, through.mT, own, offset)


def _cells_gradient(
    kind: Kind,
    alignment: _Alignment,
    parts: _GradientParts,
    student: Float[Array, "g hs n"],
    teacher: Float[Array, "g ht n"],
) -> Float[Array, "g hs n"]:
    """The third walk: the gradient of a block's student cells."""
    slopes = _slopes(kind, alignment, teacher, _combine(alignment.mixing, student))
    gradient = _combine(parts.direct, slopes) - parts.own[:, :, None] * student
    if parts.through is not None:
        gradient = gradient + _combine(parts.through, teacher)
    return gradient - parts.offset[:, :, None] if kind == "kl" else gradient


# ---------------------------------------------------------------------------------------------------------------------
# Weights per query row: "token_kl". Rows do not interact, so that a block is all that its loss and gradient need.


def _token_block(
    settings: Settings,
    keys: int,
    temperature: Float[Array, ""],
    student: Float[Array, "g hs n"],
    teacher: Float[Array, "g ht n"],
) -> Float[Array, " g"]:
    student, teacher = (token_rows(cells.reshape(*cells.shape[:2], -1, keys)) for cells in (student, teacher))
    losses = aligned_divergence(
        student,
        teacher,
        kind="kl",
        temperature=temperature,
        stop_alignment_gradient=settings.stop_alignment_gradient,
    )
    return jnp.sum(losses, axis=-1)


def _token_cells_gradient(
    settings: Settings,
    keys: int,
    temperature: Float[Array, ""],
    cotangents: Float[Array, " g"],
    student: Float[Array, "g hs n"],
    teacher: Float[Array, "g ht n"],
) -> Float[Array, "g hs n"]:
    losses, pull_back = jax.vjp(lambda student: _token_block(settings, keys, temperature, student, teacher), student)
    return pull_back(cotangents.astype(losses.dtype))[0]
