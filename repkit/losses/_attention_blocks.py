"""Attention map alignment, example by example and in blocks of query rows.

The loss of an example depends on its maps through a few sums over cells: inner products of teacher and student heads
give the weights a. The gradient is, cell by cell, a combination of that cell's values in all heads, whose coefficients
need one more sum, `d loss / d a`; a last walk writes it and adds up the loss. Blocks are cut from maps, or computed
anew in every walk from queries and keys. Maps of ordinary size are one block per example, which stays in the cache for
all walks.

An example's gradient is its cotangent times what does not depend on it. So the forward rule computes the gradients, and
the backward rule scales them in place: each map is read once.
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
    AlignmentGradient,
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

# Cells of all heads. An example's maps up to the first size are one block, because blocks of rows cost three trips to
# memory; larger ones, and those computed from queries and keys, are walked in blocks of the second size, and small
# examples several at a time up to it. As measured on a CPU.
_WHOLE_CELLS = 2**25
_BLOCK_CELLS = 2**20

# Below this squared distance per unit map, "mse" is formed from differences of heads: it takes longer, but keeps the
# digits that float32 loses in differences of unit maps.
NEAR_ZERO = 1e-4
_FEW_ROWS = 16


class Settings(NamedTuple):
    """What is fixed when the loss is traced."""

    kind: Kind
    alignment_gradient: AlignmentGradient
    causal: bool
    rows_per_block: int | None


class Maps(NamedTuple):
    """Attention maps as given, of flattened heads: n = q * k."""

    maps: Float[Array, "*b h n"]


class QueriesKeys(NamedTuple):
    """Attention maps as the softmax of `query key^T`; both of one dtype."""

    query: Float[Array, "*b h q d"]
    key: Float[Array, "*b h k d"]


Source: TypeAlias = Maps | QueriesKeys


class Masks(NamedTuple):
    """Which queries and keys count; None for all."""

    query: Bool[Array, "*b q"] | None
    key: Bool[Array, "*b k"] | None


class _Inputs(NamedTuple):
    student: Source
    teacher: Source
    masks: Masks
    temperature: Float[Array, "*b"]


class _Derivatives(NamedTuple):
    """Of each example's loss."""

    student: Source
    temperature: Float[Array, "*b"]


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its backward rule


def blockwise_alignment(
    settings: Settings,
    student: Source,
    teacher: Source,
    masks: Masks,
    temperature: Float[Array, ""],
    *,
    queries: int,
    keys: int,
) -> Float[Array, " b"]:
    """The loss of each example; gradients reach the student and the temperature."""
    plan = _plan(settings, student, teacher, queries, keys)
    # Zeros like an input vary over the same mapped axes; where a device's gradient is its share, JAX adds the shares.
    first = jax.tree.leaves(student)[0]
    zeros = jnp.zeros_like(first, plan.dtype, shape=first.shape[:1])
    return _losses(plan, student, teacher, masks, zeros + temperature.astype(plan.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(plan: "_Plan", *inputs: Any) -> Float[Array, " b"]:
    grouped = plan.grouped(_Inputs(*inputs))

    def group(step: Start, losses: Float[Array, "g steps"]) -> Float[Array, "g steps"]:
        blocks, temperature = _open(plan, grouped, step)
        result = _group(plan, blocks, temperature)
        return _put(losses, step, result.refined(blocks.total(result.losses)))

    return plan.ungrouped(plan.over_groups(group, jnp.zeros_like(grouped.temperature)))


def _losses_and_derivatives(plan: "_Plan", *inputs: Any) -> tuple[Float[Array, " b"], _Derivatives]:
    grouped = plan.grouped(_Inputs(*inputs))

    def group(step: Start, carry: tuple[Array, _Derivatives]) -> tuple[Array, _Derivatives]:
        losses, (student, temperature_gradient) = carry
        blocks, temperature = _open(plan, grouped, step)
        result = _group(plan, blocks, temperature)

        def block(carry: tuple[Source, Array], start: Start, size: int) -> tuple[Source, Array]:
            gradient, total = carry
            gradient = blocks.student.pull_back(gradient, start, *result.cells_and_gradient(start, size))
            return gradient, total + result.losses(start, size)

        student, total = plan.over_rows(block, (student, jnp.zeros_like(temperature)))
        derivatives = _Derivatives(student, _put(temperature_gradient, step, result.temperature_gradient))
        return _put(losses, step, result.refined(total)), derivatives

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, plan.dtype), _Derivatives(grouped.student, grouped.temperature))
    losses, derivatives = plan.over_groups(group, (zeros.temperature, zeros))
    return plan.ungrouped(losses), derivatives


def _scaled_derivatives(plan: "_Plan", derivatives: _Derivatives, cotangents: Float[Array, " b"]) -> tuple[Any, ...]:
    cotangents = plan.grouped(cotangents)

    # One example after another, so that the compiler can write the result where the derivatives were.
    def group(step: Start, scaled: _Derivatives) -> _Derivatives:
        def scale(x: Array) -> Array:
            factor = _at(cotangents, step)
            return _put(x, step, _at(x, step) * factor.reshape(*factor.shape, *(1,) * (x.ndim - 2)))

        return jax.tree.map(scale, scaled)

    scaled = plan.ungrouped(plan.over_groups(group, derivatives))
    student = jax.tree.map(lambda x: x.astype(plan.student_dtype), scaled.student)
    return student, None, None, scaled.temperature


_losses.defvjp(_losses_and_derivatives, _scaled_derivatives)


class _Group(NamedTuple):
    """A group of examples.

    Attributes:
        losses: what a block of rows, given by its start and size, adds to the examples' losses [*g].
        cells_and_gradient: the student's cells of a block [*g hs n], and the losses' gradient.
        temperature_gradient: the losses' derivatives in the temperature.
        refined: the losses [*g], given their sum over the blocks, from which digits may be missing.
    """

    losses: Callable[[Start, int], Array]
    cells_and_gradient: Callable[[Start, int], tuple[Array, Array]]
    temperature_gradient: Float[Array, "*g"]
    refined: Callable[[Array], Array]


def _group(plan: "_Plan", blocks: "_Blocks", temperature: Float[Array, "*g"]) -> _Group:
    if plan.settings.kind == "token_kl":
        return _token_group(plan, blocks, temperature)
    return _example_group(plan, blocks, temperature)


# ---------------------------------------------------------------------------------------------------------------------
# Which blocks there are


class _Plan(NamedTuple):
    """The batch is walked in `steps` groups of `group` examples, and a group in blocks of `rows` query rows.

    Group t holds the examples t, t + steps, t + 2 steps, ...: a batch that is split over devices stays split when it is
    unfolded to [group, steps], so that every device walks its own examples.
    """

    settings: Settings
    group: int
    steps: int
    rows: int
    queries: int
    keys: int
    dtype: jnp.dtype
    student_dtype: jnp.dtype

    @property
    def is_whole(self) -> bool:
        """Whether an example's maps are one block."""
        return self.rows == self.queries

    def grouped(self, tree: Any) -> Any:
        """[b ...] to [group steps ...]."""
        return jax.tree.map(lambda x: x.reshape(self.group, self.steps, *x.shape[1:]), tree)

    def ungrouped(self, tree: Any) -> Any:
        """[group steps ...] to [b ...]."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def over_groups(self, group: Callable[[Start, Any], Any], carry: Any) -> Any:
        """`carry = group(step, carry)` over the steps."""
        return group(0, carry) if self.steps == 1 else jax.lax.fori_loop(0, self.steps, group, carry)

    def over_rows(self, block: Callable[[Any, Start, int], Any], carry: Any) -> Any:
        """`carry = block(carry, start, rows)` over the blocks of a group; the last one has the rows that are left."""
        whole, rest = divmod(self.queries, self.rows)
        if whole == 1:
            carry = block(carry, 0, self.rows)
        else:
            carry = jax.lax.fori_loop(0, whole, lambda i, carry: block(carry, i * self.rows, self.rows), carry)
        return block(carry, whole * self.rows, rest) if rest else carry


def _plan(settings: Settings, student: Source, teacher: Source, queries: int, keys: int) -> _Plan:
    first, *others = jax.tree.leaves((student, teacher))
    examples = first.shape[0]
    cells_per_row = (first.shape[1] + others[-1].shape[1]) * keys
    is_whole = isinstance(student, Maps) and queries * cells_per_row <= _WHOLE_CELLS
    rows = settings.rows_per_block or (queries if is_whole else _block_rows(cells_per_row))
    rows = min(rows, queries)
    parts = math.gcd(examples, _batch_parts(first))
    local = examples // parts
    largest = max(1, _BLOCK_CELLS // (queries * cells_per_row)) if rows == queries else 1
    group = parts * max(size for size in range(1, min(local, largest) + 1) if local % size == 0)
    dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in (first, *others)), jnp.float32)
    return _Plan(settings, group, examples // group, rows, queries, keys, jnp.dtype(dtype), first.dtype)


def _block_rows(cells_per_row: int) -> int:
    """Rows of a block: a multiple of 32, below which products of matrices are slow."""
    return 32 * max(1, round(_BLOCK_CELLS / cells_per_row / 32))


def _batch_parts(x: Array) -> int:
    """Into how many parts the compiler may split the batch: the devices of the mesh that it places the array on."""
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[name] for name in mesh.auto_axes)


def _at(x: Array, step: Start) -> Array:
    """`x[:, step]`; without the first axis if its length is 1, because such an axis slows products of matrices."""
    x = jax.lax.dynamic_index_in_dim(x, step, axis=1, keepdims=False)
    return x[0] if len(x) == 1 else x


def _put(x: Array, step: Start, value: Array) -> Array:
    """`x` with `value` at `[:, step]`."""
    return jax.lax.dynamic_update_slice_in_dim(x, value.astype(x.dtype).reshape(len(x), 1, *x.shape[2:]), step, axis=1)


def _as_part(x: Array, whole: Array) -> Array:
    """A group's `x` with the axes of `whole`, of which it is a part at one step."""
    return x.astype(whole.dtype).reshape(len(whole), 1, *x.shape[-(whole.ndim - 2) :])


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of maps, and the way of their gradient back to what the maps came from


class _MapBlocks(NamedTuple):
    """Blocks of a group's maps, cut from the maps of the batch."""

    maps: Float[Array, "g steps h n"]
    step: Start
    masks: Masks
    keys: int
    dtype: jnp.dtype

    def rows(self, start: Start, size: int) -> Float[Array, "*g h n"]:
        """Cells of `size` query rows, 0 where they do not count."""
        at = (0, self.step, 0, start * self.keys)
        cells = jax.lax.dynamic_slice(self.maps, at, (len(self.maps), 1, self.maps.shape[2], size * self.keys))
        cells = self._counting(_at(cells, 0).astype(self.dtype), start, size)
        # Cut once; left alone, the compiler would cut it anew for each use.
        return jax.lax.optimization_barrier(cells)

    def pull_back(self, gradient: Any, start: Start, cells: Array, cells_gradient: Float[Array, "*g h n"]) -> Maps:
        """`gradient` with that of a block in its place."""
        del cells
        block = self._counting(cells_gradient, start, cells_gradient.shape[-1] // self.keys)
        at = (0, self.step, 0, start * self.keys)
        return Maps(jax.lax.dynamic_update_slice(gradient.maps, _as_part(block, gradient.maps), at))

    def _counting(self, cells: Float[Array, "*g h n"], start: Start, size: int) -> Float[Array, "*g h n"]:
        counts = _counting_cells(self.masks, start, size)
        if counts is None:
            return cells
        counts = jnp.broadcast_to(counts, (*counts.shape[:-2], size, self.keys))
        return jnp.where(counts.reshape(*counts.shape[:-2], -1), cells, 0.0)


class _AttentionBlocks(NamedTuple):
    """Blocks of a group's maps, computed from its queries and keys."""

    query: Float[Array, "*g h q d"]
    key: Float[Array, "*g h k d"]
    step: Start
    masks: Masks
    causal: bool

    def rows(self, start: Start, size: int) -> Float[Array, "*g h n"]:
        """Cells of `size` query rows, 0 where they do not count."""
        logits = _contract("...qd,...kd->...qk", self._queries(start, size), self.key)
        counts = _counting_cells(self.masks, start, size)
        if self.causal:
            query, key = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - side) for side in (2, 1))
            counts = start + query >= key if counts is None else counts & (start + query >= key)
        maps = jax.nn.softmax(logits, axis=-1) if counts is None else masked_softmax(logits, counts)
        return maps.reshape(*maps.shape[:-2], -1)

    def pull_back(
        self, gradient: Any, start: Start, cells: Float[Array, "*g h n"], cells_gradient: Float[Array, "*g h n"]
    ) -> QueriesKeys:
        """`gradient` with a block's share added: through the softmax and the inner products."""
        queries = self._queries(start, cells.shape[-1] // self.key.shape[-2])
        maps, maps_gradient = (x.reshape(*queries.shape[:-1], -1) for x in (cells, cells_gradient))
        mean = jnp.sum(maps * maps_gradient, axis=-1, keepdims=True)
        logits_gradient = maps * (maps_gradient - mean)
        query = _contract("...qk,...kd->...qd", logits_gradient, self.key)
        key = _contract("...qk,...qd->...kd", logits_gradient, queries)
        at = (0, self.step, 0, start, 0)
        return QueriesKeys(
            jax.lax.dynamic_update_slice(gradient.query, _as_part(query, gradient.query), at),
            _put(gradient.key, self.step, _at(gradient.key, self.step) + key),
        )

    def _queries(self, start: Start, size: int) -> Float[Array, "*g h q d"]:
        return jax.lax.dynamic_slice_in_dim(self.query, start, size, axis=-2)


class _Blocks(NamedTuple):
    """The maps of both models for a group of examples."""

    plan: _Plan
    student: _MapBlocks | _AttentionBlocks
    teacher: _MapBlocks | _AttentionBlocks

    def reading(self, derive: Callable[[Float[Array, "*g hs n"], Float[Array, "*g ht n"]], Any]) -> "_Reading":
        """`derive(student cells, teacher cells)` of the block that begins at a row and has so many."""

        def read(start: Start, size: int) -> Any:
            return derive(self.student.rows(start, size), self.teacher.rows(start, size))

        if not self.plan.is_whole:
            return read
        whole = read(0, self.plan.rows)
        return lambda start, size: whole

    def total(self, read: "_Reading") -> Any:
        """The sum over the blocks."""
        if self.plan.is_whole:
            return read(0, self.plan.rows)
        like = jax.tree.leaves(self.student)[0]
        shapes = jax.eval_shape(lambda start: read(start, self.plan.rows), 0)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(like, x.dtype, shape=x.shape), shapes)
        return self.plan.over_rows(lambda carry, start, size: jax.tree.map(jnp.add, carry, read(start, size)), zeros)


_Reading: TypeAlias = Callable[[Start, int], Any]


def _open(plan: _Plan, inputs: _Inputs, step: Start) -> tuple[_Blocks, Float[Array, "*g"]]:
    """The blocks of one group, and its temperature."""
    masks = jax.tree.map(lambda mask: _at(mask, step), inputs.masks)

    def counting(x: Float[Array, "*g h n d"], counts: Bool[Array, "*g n"] | None) -> Float[Array, "*g h n d"]:
        x = x.astype(plan.dtype)
        return x if counts is None else jnp.where(counts[..., None, :, None], x, 0.0)

    def blocks(source: Source) -> _MapBlocks | _AttentionBlocks:
        match source:
            case Maps(maps):
                return _MapBlocks(maps, step, masks, plan.keys, plan.dtype)
            case QueriesKeys(query, key):
                query, key = counting(_at(query, step), masks.query), counting(_at(key, step), masks.key)
                return _AttentionBlocks(query, key, step, masks, plan.settings.causal)

    return _Blocks(plan, blocks(inputs.student), blocks(inputs.teacher)), _at(inputs.temperature, step)


def _counting_cells(masks: Masks, start: Start, size: int) -> Bool[Array, "*g 1 #r #k"] | None:
    """Which cells of a block of query rows count; None for all."""
    sides = []
    if masks.query is not None:
        sides.append(jax.lax.dynamic_slice_in_dim(masks.query, start, size, -1)[..., None, :, None])
    if masks.key is not None:
        sides.append(masks.key[..., None, None, :])
    return functools.reduce(jnp.logical_and, sides) if sides else None


def _contract(spec: str, first: Array, second: Array) -> Array:
    return jnp.einsum(spec, first, second, precision=jax.lax.Precision.HIGHEST)


def _combine(coefficients: Float[Array, "*g o i"], heads: Float[Array, "*g i n"]) -> Float[Array, "*g o n"]:
    """`sum_i coefficients_oi heads_i`."""
    return _contract("...oi,...in->...on", coefficients, heads)


def _products(first: Float[Array, "*g i n"], second: Float[Array, "*g j n"]) -> Float[Array, "*g i j"]:
    """Inner products over cells."""
    return _contract("...in,...jn->...ij", first, second)


# ---------------------------------------------------------------------------------------------------------------------
# One set of weights per example: "mse" and "kl"


class _Alignment(NamedTuple):
    """What the sums over all cells of an example say about its heads.

    Attributes:
        products: inner products of teacher and student heads.
        student_products: of student heads; None where the differences from their mixture are multiplied instead.
        weights: a_ij, 0 for empty heads.
        cosines: of teacher and student heads.
        mixing: from student heads to what teacher heads are compared with, `m_i = sum_j mixing_ij s_j`, in the units of
            the teacher's maps.
        student_unit: 1 / |s_j|, the Euclidean length; 0 for an empty head.
        teacher_unit: 1 / |t_i|.
        student_scale: 1 / the norm of s_j in which the maps are compared.
        teacher_scale: 1 / that of t_i; 0 without a student head to learn from.
    """

    products: Float[Array, "*g ht hs"]
    student_products: Float[Array, "*g hs hs"] | None
    weights: Float[Array, "*g ht hs"]
    cosines: Float[Array, "*g ht hs"]
    mixing: Float[Array, "*g ht hs"]
    student_unit: Float[Array, "*g hs"]
    teacher_unit: Float[Array, "*g ht"]
    student_scale: Float[Array, "*g hs"]
    teacher_scale: Float[Array, "*g ht"]


def _alignment(kind: Kind, blocks: _Blocks, temperature: Float[Array, "*g"]) -> _Alignment:
    """The first walk."""

    def block(student: Float[Array, "*g hs n"], teacher: Float[Array, "*g ht n"]) -> Any:
        squares = [jnp.sum(jnp.square(cells), axis=-1) for cells in (student, teacher)]
        sums = [jnp.sum(cells, axis=-1) for cells in (student, teacher)] if kind == "kl" else []
        own = None if kind == "kl" or blocks.plan.is_whole else _products(student, student)
        return _products(teacher, student), own, squares, sums

    products, student_products, squares, sums = blocks.total(blocks.reading(block))
    student_squares, teacher_squares = squares
    student_unit, teacher_unit = map(inverse_root, squares)
    cosines = products * teacher_unit[..., :, None] * student_unit[..., None, :]
    weights = head_weights(cosines, teacher_squares, student_squares, temperature)
    student_scale, teacher_scale = map(inverse, sums) if kind == "kl" else (student_unit, teacher_unit)
    teacher_scale = jnp.where(jnp.any(weights > 0, axis=-1), teacher_scale, 0.0)
    teacher_norm = 1.0 / jnp.where(teacher_scale > 0, teacher_scale, 1.0)
    mixing = weights * student_scale[..., None, :] * teacher_norm[..., :, None]
    return _Alignment(
        products,
        student_products,
        weights,
        cosines,
        mixing,
        student_unit,
        teacher_unit,
        student_scale,
        teacher_scale,
    )


def _example_group(plan: _Plan, blocks: _Blocks, temperature: Float[Array, "*g"]) -> _Group:
    kind = plan.settings.kind
    temperature = temperature[..., None, None]
    alignment = _alignment(kind, blocks, temperature)
    read = blocks.reading(functools.partial(_compare, kind, alignment))
    unit = jnp.square(alignment.teacher_scale) if kind == "mse" else alignment.teacher_scale
    difference_scale = 2 * alignment.teacher_scale if kind == "mse" else -jnp.ones_like(alignment.teacher_scale)

    def losses(start: Start, size: int) -> Float[Array, "*g"]:
        return jnp.sum(_head_losses(kind, alignment, read(start, size), plan.keys) * unit, axis=-1)

    def products(start: Start, size: int) -> Float[Array, "*g ht hs"]:
        compared = read(start, size)
        return _products(compared.differences, compared.student)

    if alignment.student_products is None:
        slopes = blocks.total(products)
    else:
        # Saves a walk. It cancels where the loss is nearly 0, but so does the difference of maps computed from keys.
        slopes = _combine(alignment.mixing, alignment.student_products) - alignment.products
    weighted = alignment.weights * slopes * difference_scale[..., :, None] * alignment.student_scale[..., None, :]
    logits = weighted - alignment.weights * jnp.sum(weighted, axis=-1, keepdims=True)
    of_cosines = jnp.zeros_like(logits) if plan.settings.alignment_gradient == "stopped" else logits / temperature
    of_temperature = -jnp.sum(of_cosines * alignment.cosines / temperature, axis=(-2, -1))
    cells_gradient = _cells_gradient(kind, alignment, difference_scale, jnp.sum(weighted, axis=-2), of_cosines)

    def cells_and_gradient(start: Start, size: int) -> tuple[Float[Array, "*g hs n"], Float[Array, "*g hs n"]]:
        compared = read(start, size)
        return compared.student, cells_gradient(compared)

    def refined(losses: Float[Array, "*g"]) -> Float[Array, "*g"]:
        # Maps computed from keys are themselves not exact enough for their differences to have more digits.
        if kind == "kl" or isinstance(blocks.student, _AttentionBlocks):
            return losses
        compared_heads = jnp.sum(alignment.teacher_scale > 0, axis=-1, dtype=losses.dtype)
        is_near_zero = jnp.any(losses < NEAR_ZERO * compared_heads)
        return jax.lax.cond(is_near_zero, lambda: _squared_distances(blocks, alignment), lambda: losses)

    return _Group(losses, cells_and_gradient, of_temperature, refined)


class _Compared(NamedTuple):
    """A block of cells.

    Attributes:
        student: s [*g hs n].
        teacher: t [*g ht n].
        mixture: m, of student heads for each teacher head, in the units of t.
        differences: `m - t` for "mse", `t / m` for "kl": the loss's derivative in m, up to a factor and, for "kl", a
            constant over all cells and heads, which has no effect on the gradient because mixtures sum to 1.
    """

    student: Float[Array, "*g hs n"]
    teacher: Float[Array, "*g ht n"]
    mixture: Float[Array, "*g ht n"]
    differences: Float[Array, "*g ht n"]


def _compare(
    kind: Kind, alignment: _Alignment, student: Float[Array, "*g hs n"], teacher: Float[Array, "*g ht n"]
) -> _Compared:
    mixture = _combine(alignment.mixing, student)
    if kind == "mse":
        differences = mixture - teacher
    else:
        floor = _floor(alignment)
        differences = jnp.where(mixture > floor, teacher / jnp.maximum(mixture, floor), 0.0)
    # They are read several times; left alone, the compiler would compute them anew each time.
    return _Compared(student, teacher, mixture, jax.lax.optimization_barrier(differences))


def _head_losses(kind: Kind, alignment: _Alignment, compared: _Compared, keys: int) -> Float[Array, "*g ht"]:
    """The share of a block of cells in the loss of each teacher head, in units of the teacher's map."""
    _, teacher, mixture, differences = compared
    if kind == "mse":
        return jnp.sum(jnp.square(differences), axis=-1)
    floor = _floor(alignment)
    ratio = jnp.where(mixture > floor, differences, teacher / floor)
    # The last two terms add up to 0 over the cells, and make each cell's value second order in the difference, so that
    # it does not matter how exactly the maps are normalised.
    cells = teacher * jnp.log(jnp.maximum(ratio, jnp.finfo(ratio.dtype).tiny)) - teacher + mixture
    # Over rows first: XLA's CPU backend computes what it sums over the last axis one cell at a time.
    rows = jnp.sum(cells.reshape(*cells.shape[:-1], -1, keys), axis=-2)
    return jnp.sum(jax.lax.optimization_barrier(rows), axis=-1)


def _squared_distances(blocks: _Blocks, alignment: _Alignment) -> Float[Array, "*g"]:
    """The "mse" losses from differences of heads, which keep the digits that differences of unit maps lose.

    As the weights sum to 1, `t_i / |t_i| - sum_j a_ij s_j / |s_j|` is

        `sum_j a_ij ((t_i - s_j) - (|t_i| / |s_j| - 1) s_j) / |t_i|`,

    where `|t_i| - |s_j| = <t_i - s_j, t_i + s_j> / (|t_i| + |s_j|)`.
    """
    # Rows are read again from the maps: what is computed from few of them takes little memory.
    blocks = blocks._replace(plan=blocks.plan._replace(rows=min(blocks.plan.rows, _FEW_ROWS)))

    def surpluses(student: Float[Array, "*g hs n"], teacher: Float[Array, "*g ht n"]) -> Float[Array, "*g ht hs"]:
        def of_head(head: Float[Array, "*g 1 n"]) -> Float[Array, "*g hs"]:
            return jnp.sum((head - student) * (head + student), axis=-1)

        return jnp.moveaxis(_over_heads(of_head, teacher[..., None, :]), 0, -2)

    student_unit, teacher_unit = alignment.student_unit[..., None, :], alignment.teacher_unit[..., :, None]
    units = jnp.where(student_unit + teacher_unit > 0, student_unit + teacher_unit, 1.0)
    longer = blocks.total(blocks.reading(surpluses)) * jnp.square(student_unit) * teacher_unit / units
    shares = alignment.weights * alignment.teacher_scale[..., :, None]

    def squares(student: Float[Array, "*g hs n"], teacher: Float[Array, "*g ht n"]) -> Float[Array, "*g"]:
        def of_head(
            head: Float[Array, "*g 1 n"], shares: Float[Array, "*g hs 1"], longer: Float[Array, "*g hs 1"]
        ) -> Float[Array, "*g"]:
            return jnp.sum(jnp.square(jnp.sum(shares * ((head - student) - longer * student), axis=-2)), axis=-1)

        heads = _over_heads(of_head, teacher[..., None, :], shares[..., None], longer[..., None])
        return jnp.sum(heads, axis=0)

    return blocks.total(blocks.reading(squares))


def _over_heads(of_head: Callable[..., Array], *arrays: Float[Array, "*g ht i j"]) -> Array:
    """`of_head` of one teacher head after another: no array of all pairs of heads."""
    return jax.lax.map(lambda head: of_head(*head), tuple(jnp.moveaxis(x, -3, 0) for x in arrays))


def _floor(alignment: _Alignment) -> Float[Array, "*g ht 1"]:
    """The smallest share of a map's mass that counts, in the units of the teacher's maps."""
    scale = alignment.teacher_scale
    floor = SMALLEST_SHARE / jnp.where(scale > 0, scale, 1.0)
    return jnp.maximum(floor, jnp.finfo(scale.dtype).tiny)[..., :, None]


def _cells_gradient(
    kind: Kind,
    alignment: _Alignment,
    difference_scale: Float[Array, "*g ht"],
    along: Float[Array, "*g hs"],
    of_cosines: Float[Array, "*g ht hs"],
) -> Callable[[_Compared], Float[Array, "*g hs n"]]:
    """The gradient of a block of cells, from the loss's derivatives in the cosines and `along` the student heads."""
    scale, unit = alignment.student_scale, alignment.student_unit
    # Products of transposed factors: one that the compiler has to transpose itself goes a slower way.
    direct = alignment.weights.mT * difference_scale[..., None, :] * scale[..., :, None]
    through = of_cosines.mT * alignment.teacher_unit[..., None, :] * unit[..., :, None]
    own = jnp.sum(of_cosines * alignment.cosines, axis=-2) * jnp.square(unit)

    def of_distance(compared: _Compared) -> Float[Array, "*g hs n"]:
        # `through` applies to teacher heads, which are the mixtures of student heads less the differences. There are
        # fewer student heads than teacher heads, as a rule.
        heads = jnp.sum(through[..., :, :, None] * alignment.mixing[..., None, :, :], axis=-2)
        heads = heads - jnp.eye(heads.shape[-1]) * (own + along * jnp.square(scale))[..., None, :]
        return _combine(direct - through, compared.differences) + _combine(heads, compared.student)

    def of_divergence(compared: _Compared) -> Float[Array, "*g hs n"]:
        cells = _combine(direct, compared.differences) + _combine(through, compared.teacher)
        return cells - own[..., :, None] * compared.student - (along * scale)[..., :, None]

    return of_distance if kind == "mse" else of_divergence


# ---------------------------------------------------------------------------------------------------------------------
# Weights per query row: "token_kl". Rows do not interact, so that a block is all that its loss and gradient need.


def _token_group(plan: _Plan, blocks: _Blocks, temperature: Float[Array, "*g"]) -> _Group:
    def losses(
        temperature: Float[Array, "*g"], student: Float[Array, "*g hs n"], teacher: Float[Array, "*g ht n"]
    ) -> Float[Array, "*g"]:
        rows = (token_rows(cells.reshape(*cells.shape[:-1], -1, plan.keys)) for cells in (student, teacher))
        losses = aligned_divergence(
            *rows,
            kind="kl",
            temperature=temperature[..., None, None, None],
            alignment_gradient=plan.settings.alignment_gradient,
        )
        return jnp.sum(losses, axis=-1)

    def of_temperature(student: Float[Array, "*g hs n"], teacher: Float[Array, "*g ht n"]) -> Float[Array, "*g"]:
        values, pull_back = jax.vjp(lambda temperature: losses(temperature, student, teacher), temperature)
        return pull_back(jnp.ones_like(values))[0]

    def gradient(student: Float[Array, "*g hs n"], teacher: Float[Array, "*g ht n"]) -> tuple[Array, Array]:
        values, pull_back = jax.vjp(lambda student: losses(temperature, student, teacher), student)
        return student, pull_back(jnp.ones_like(values))[0]

    return _Group(
        blocks.reading(functools.partial(losses, temperature)),
        blocks.reading(gradient),
        blocks.total(blocks.reading(of_temperature)),
        refined=lambda losses: losses,
    )
