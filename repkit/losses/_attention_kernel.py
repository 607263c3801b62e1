"""Attention map alignment as a TPU kernel: an example's maps are read from memory once, its gradient is written once.

Products of a few heads over many cells would fill a tenth of a matrix unit. Here the vector unit multiplies cells, head
by head, while an example's maps lie in the core's own memory. The formulas are those of
`repkit.losses._attention_blocks`, by the same names; what they call sums over cells are walks over blocks of query rows
here, and what they do with matrices of heads is done with their entries, each an array [1 1].
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from repkit.losses._attention_blocks import NEAR_ZERO, Masks, Settings, Start
from repkit.losses._attention_plain import SMALLEST_SHARE, Divergence, has_cells, inverse, inverse_root
from repkit.numerics import target_platform

ROWS = 64
"""Query rows of a block; the more, the fewer turns of its loops, and the longer the program."""
_FOLDED = 8
"""Rows that a block's cells are added up to before the walk ends: those of a register of float32."""
_LANES = 128
"""Cells of a row in a register."""
_MEMORY = 15 * 2**20
"""Bytes that a kernel may have on every TPU."""
_MOST_PAIRS = 256
"""Pairs of heads, each of which is written out: the kernel's program grows with them."""

_TINY = float(np.finfo(np.float32).tiny)

Entries: TypeAlias = np.ndarray
"""A matrix or vector of heads, whose entries are arrays [1 1]; numpy's arithmetic on objects."""
Block: TypeAlias = Callable[[Start, int], Sequence[Array]]
"""From the first row of a block and their number to arrays of its cells."""


# ---------------------------------------------------------------------------------------------------------------------
# Heads as entries, and cells in blocks of query rows


def _entries(arrays: Sequence[Array], *shape: int) -> Entries:
    entries = np.empty(len(arrays), object)
    for place, array in enumerate(arrays):
        entries[place] = array
    return entries.reshape(shape)


def _map(function: Callable[..., Array], *entries: Entries) -> Entries:
    return np.asarray(np.frompyfunc(function, len(entries), 1)(*entries))


def _softmax_of_rows(logits: Entries, allowed: Entries) -> Entries:
    """Over the entries of each row that are allowed; the others, and rows without any, are 0."""
    weights = []
    for row, counts in zip(logits, allowed, strict=True):
        row = [jnp.where(is_one, x, jnp.finfo(x.dtype).min) for x, is_one in zip(row, counts, strict=True)]
        largest = functools.reduce(jnp.maximum, row)
        powers = [jnp.exp(x - largest) for x in row]
        total = functools.reduce(jnp.add, powers)
        weights += [jnp.where(is_one, x / total, 0.0) for x, is_one in zip(powers, counts, strict=True)]
    return _entries(weights, *logits.shape)


def _combined(coefficients: Iterable[Array], cells: Iterable[Array]) -> Array:
    """`sum_i coefficient_i cells_i`."""
    return functools.reduce(jnp.add, (coefficient * x for coefficient, x in zip(coefficients, cells, strict=True)))


class _Cells(NamedTuple):
    """References to the cells [h q k] of the heads of one example."""

    ref: Any

    @property
    def number(self) -> int:
        return self.ref.shape[0]

    def head(self, head: int, start: Start, size: int) -> Float[Array, "size k"]:
        return self.ref[head, pl.ds(start, size), :]

    def heads(self, start: Start, size: int) -> list[Float[Array, "size k"]]:
        return [self.head(head, start, size) for head in range(self.number)]

    def put(self, head: int, start: Start, cells: Float[Array, "size k"]) -> None:
        self.ref[head, pl.ds(start, len(cells)), :] = cells

    def sums(self, block: Block, number: int) -> list[Float[Array, "1 1"]]:
        """Sums over all cells of each of the arrays, so many, that `block(start, size)` gives for a block of rows."""
        _, rows, keys = self.ref.shape
        whole, rest = divmod(rows, ROWS)

        def step(i: Array, folded: list[Array]) -> list[Array]:
            cells = block(pl.multiple_of(i * ROWS, ROWS), ROWS)
            return [total + _folded(x) for total, x in zip(folded, cells, strict=True)]

        zeros = [jnp.zeros((_FOLDED, keys), jnp.float32)] * number
        parts = [jax.lax.fori_loop(0, whole, step, zeros)] if whole else []
        parts += [block(whole * ROWS, rest)] if rest else []
        totals = [[jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True) for x in part] for part in parts]
        return [functools.reduce(jnp.add, each) for each in zip(*totals, strict=True)]


def _folded(cells: Float[Array, "size k"]) -> Float[Array, "8 k"]:
    return functools.reduce(jnp.add, (cells[i : i + _FOLDED] for i in range(0, len(cells), _FOLDED)))


class _Masks(NamedTuple):
    """References to which queries [q 1] and keys [1 k] count, as 1 and 0."""

    query: Any
    key: Any

    def apply(self, cells: Float[Array, "size k"], start: Start) -> Float[Array, "size k"]:
        """0 where a cell does not count, whatever it holds."""
        return jnp.where(self.query[pl.ds(start, len(cells)), :] * self.key[...] > 0, cells, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The walks over one example. One teacher head after another meets all student heads, so that what is added up stays in
# registers.


class _Norms(NamedTuple):
    """Sums of each head's cells and of their squares."""

    squares: Entries
    totals: Entries


class _Alignment(NamedTuple):
    """As `_attention_blocks._Alignment`."""

    weights: Entries
    cosines: Entries
    mixing: Entries
    student_unit: Entries
    teacher_unit: Entries
    student_scale: Entries
    teacher_scale: Entries
    floors: Entries


def _norms(maps: Any, masks: _Masks, cells: _Cells) -> _Norms:
    """Writes the cells that count, in float32, and adds them up."""
    found = []
    for head in range(cells.number):

        def block(start: Start, size: int, head: int = head) -> list[Array]:
            x = masks.apply(maps[head, pl.ds(start, size), :].astype(jnp.float32), start)
            cells.put(head, start, x)
            return [x * x, x]

        found += cells.sums(block, 2)
    both = _entries(found, cells.number, 2)
    return _Norms(both[:, 0], both[:, 1])


def _aligned(
    kind: Divergence, student: _Cells, teacher: _Cells, of_student: _Norms, of_teacher: _Norms, temperature: Array
) -> _Alignment:
    products = []
    for i in range(teacher.number):

        def block(start: Start, size: int, i: int = i) -> list[Array]:
            t = teacher.head(i, start, size)
            return [t * s for s in student.heads(start, size)]

        products += student.sums(block, student.number)
    student_unit, teacher_unit = (_map(inverse_root, norms.squares) for norms in (of_student, of_teacher))
    student_has, teacher_has = (_map(has_cells, norms.squares) for norms in (of_student, of_teacher))
    allowed = teacher_has[:, None] & student_has[None, :]
    cosines = _entries(products, teacher.number, student.number) * teacher_unit[:, None] * student_unit[None, :]
    weights = _softmax_of_rows(_map(lambda x: x / temperature, cosines), allowed)
    student_scale, teacher_scale = student_unit, teacher_unit
    if kind == "kl":
        student_scale, teacher_scale = (_map(inverse, norms.totals) for norms in (of_student, of_teacher))
    has_student = np.bitwise_or.reduce(allowed, axis=1)
    teacher_scale = _map(lambda scale, is_one: jnp.where(is_one, scale, 0.0), teacher_scale, has_student)
    teacher_norm = _map(lambda scale: 1.0 / jnp.where(scale > 0, scale, 1.0), teacher_scale)
    return _Alignment(
        weights,
        cosines,
        weights * student_scale[None, :] * teacher_norm[:, None],
        student_unit,
        teacher_unit,
        student_scale,
        teacher_scale,
        _map(lambda norm: jnp.maximum(SMALLEST_SHARE * norm, _TINY), teacher_norm),
    )


def _compared(
    kind: Divergence, alignment: _Alignment, student: _Cells, teacher: _Cells, differences: _Cells
) -> tuple[Array, Entries]:
    """Writes the differences of `_attention_blocks._Compared`; the loss, and their products with student heads."""
    losses, slopes = [], []
    for i in range(teacher.number):

        def block(start: Start, size: int, i: int = i) -> list[Array]:
            s, t = student.heads(start, size), teacher.head(i, start, size)
            mixture = _combined(alignment.mixing[i], s)
            if kind == "kl":
                ratio = t / jnp.maximum(mixture, alignment.floors[i])
                difference = jnp.where(mixture > alignment.floors[i], ratio, 0.0)
                loss = t * jnp.log(jnp.maximum(ratio, _TINY)) - t + mixture
            else:
                difference = mixture - t
                loss = difference * difference
            differences.put(i, start, difference)
            return [loss, *(difference * x for x in s)]

        loss, *slope = student.sums(block, 1 + student.number)
        losses.append(loss)
        slopes += slope
    unit = alignment.teacher_scale if kind == "kl" else alignment.teacher_scale * alignment.teacher_scale
    return np.sum(_entries(losses, teacher.number) * unit), _entries(slopes, teacher.number, student.number)


class _Slopes(NamedTuple):
    """Factors of what a student head's gradient is made of."""

    direct: Entries
    through: Entries
    own: Entries
    along: Entries
    temperature: Array


def _slopes(settings: Settings, alignment: _Alignment, products: Entries, temperature: Array) -> _Slopes:
    weights, student_scale = alignment.weights, alignment.student_scale
    of_differences = alignment.teacher_scale * 2.0
    if settings.kind == "kl":
        of_differences = _map(lambda x: jnp.full_like(x, -1.0), of_differences)
    direct = weights * of_differences[:, None] * student_scale[None, :]
    weighted = direct * products
    of_cosines = _map(lambda x: x / temperature, weighted - weights * np.sum(weighted, axis=1, keepdims=True))
    if settings.alignment_gradient == "stopped":
        of_cosines = _map(jnp.zeros_like, of_cosines)
    return _Slopes(
        direct,
        of_cosines * alignment.teacher_unit[:, None] * alignment.student_unit[None, :],
        np.sum(of_cosines * alignment.cosines, axis=0) * alignment.student_unit * alignment.student_unit,
        np.sum(weighted, axis=0) * student_scale,
        -np.sum(_map(lambda x: x / temperature, of_cosines * alignment.cosines)),
    )


def _write_gradient(
    kind: Divergence,
    alignment: _Alignment,
    slopes: _Slopes,
    student: _Cells,
    teacher: _Cells,
    differences: _Cells,
    masks: _Masks,
    gradient: _Cells,
) -> None:
    for j in range(student.number):

        def block(start: Start, size: int, j: int = j) -> list[Array]:
            s = student.head(j, start, size)
            cells = _combined(slopes.direct[:, j], differences.heads(start, size)) - slopes.own[j] * s
            cells = cells + _combined(slopes.through[:, j], teacher.heads(start, size))
            cells = cells - slopes.along[j] * (1.0 if kind == "kl" else alignment.student_scale[j] * s)
            gradient.put(j, start, masks.apply(cells, start))
            return []

        student.sums(block, 0)


def _squared_distances(alignment: _Alignment, student: _Cells, teacher: _Cells) -> Array:
    """From differences of heads; see `_attention_blocks._squared_distances`."""
    distances = []
    for i in range(teacher.number):

        def surpluses(start: Start, size: int, i: int = i) -> list[Array]:
            t = teacher.head(i, start, size)
            return [(t - s) * (t + s) for s in student.heads(start, size)]

        surplus, unit = _entries(student.sums(surpluses, student.number), -1), alignment.teacher_unit[i : i + 1]
        both = _map(lambda x: jnp.where(x > 0, x, 1.0), alignment.student_unit + unit)
        longer = surplus * alignment.student_unit * alignment.student_unit * unit / both
        shares = alignment.weights[i] * alignment.teacher_scale[i : i + 1]

        def squares(
            start: Start, size: int, i: int = i, longer: Entries = longer, shares: Entries = shares
        ) -> list[Array]:
            t = teacher.head(i, start, size)
            apart = [(t - s) - more * s for s, more in zip(student.heads(start, size), longer, strict=True)]
            return [jnp.square(_combined(shares, apart))]

        distances += student.sums(squares, 1)
    return functools.reduce(jnp.add, distances)


def _kernel(
    settings: Settings,
    temperatures: Any,
    student_maps: Any,
    teacher_maps: Any,
    query_mask: Any,
    key_mask: Any,
    loss_ref: Any,
    gradient: Any,
    temperature_gradient: Any,
    *scratch: Any,
) -> None:
    """The loss of one example and its derivatives, from and to references; `scratch` is for cells in float32."""
    kind, masks = settings.kind, _Masks(query_mask, key_mask)
    assert kind != "token_kl"  # `covers` says so
    temperature = jnp.full((1, 1), temperatures[pl.program_id(0)], jnp.float32)
    student, teacher, differences = map(_Cells, scratch)
    norms = _norms(student_maps, masks, student), _norms(teacher_maps, masks, teacher)
    alignment = _aligned(kind, student, teacher, *norms, temperature)
    loss, products = _compared(kind, alignment, student, teacher, differences)
    slopes = _slopes(settings, alignment, products, temperature)
    loss_ref[...] = jnp.broadcast_to(loss, loss_ref.shape)
    temperature_gradient[...] = jnp.broadcast_to(slopes.temperature, temperature_gradient.shape)
    _write_gradient(kind, alignment, slopes, student, teacher, differences, masks, _Cells(gradient))
    if kind == "mse":
        compared_heads = np.sum(_map(lambda scale: jnp.where(scale > 0, 1.0, 0.0), alignment.teacher_scale))

        # A number can be taken out of a vector, a truth value cannot.
        @pl.when((loss - NEAR_ZERO * compared_heads)[0, 0] < 0)
        def _refine() -> None:
            loss_ref[...] = jnp.broadcast_to(_squared_distances(alignment, student, teacher), loss_ref.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def covers(settings: Settings, student: Float[Array, "b hs q k"], teacher: Float[Array, "b ht q k"]) -> bool:
    """Whether the kernel computes this loss.

    It has one set of weights per example, whose maps fit into a core's memory; and the arrays are one device's, because
    the compiler cannot split a kernel: they are inside `shard_map`, or there is one device.
    """
    (_, student_heads, rows, keys), teacher_heads = student.shape, teacher.shape[1]
    itemsize = max(student.dtype.itemsize, teacher.dtype.itemsize)
    mesh = jax.typeof(student).sharding.mesh
    split = math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes)
    devices = jax.device_count() if mesh.empty else split
    if settings.kind == "token_kl" or settings.rows_per_block is not None or itemsize > 4 or devices > 1:
        return False
    if student_heads * teacher_heads > _MOST_PAIRS:
        return False
    cells = (-(-rows // _FOLDED) * _FOLDED) * (-(-keys // _LANES) * _LANES)
    # What is read and written is there twice, so that one example is fetched while another one is computed.
    moved = 2 * (student_heads * (student.dtype.itemsize + 4) + teacher_heads * teacher.dtype.itemsize)
    return cells * (moved + 4 * (student_heads + 2 * teacher_heads)) <= _MEMORY


def kernel_alignment(
    settings: Settings,
    student: Float[Array, "b hs q k"],
    teacher: Float[Array, "b ht q k"],
    masks: Masks,
    temperature: Float[Array, ""],
) -> Float[Array, " b"]:
    """The loss of each example; gradients reach the student's maps and the temperature."""
    # One for each example: where a device's gradient is its share, JAX adds the shares.
    zeros = jnp.zeros_like(student, jnp.float32, shape=student.shape[:1])
    return _losses(settings, student, teacher, masks, zeros + temperature.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(settings: Settings, *inputs: Any) -> Float[Array, " b"]:
    return _losses_and_derivatives(settings, *inputs)[0]


class _Derivatives(NamedTuple):
    """Of each example's loss, and an array of the type that the student's is to have."""

    student: Float[Array, "b hs q k"]
    temperature: Float[Array, " b"]
    like: Float[Array, "0"]


def _losses_and_derivatives(
    settings: Settings, student: Array, teacher: Array, masks: Masks, temperature: Array
) -> tuple[Float[Array, " b"], _Derivatives]:
    rows, keys = student.shape[2:]
    counts = _counts(masks.query, rows, 1), _counts(masks.key, 1, keys)
    losses, of_student, of_temperature = _run(settings, temperature, student, teacher, *counts)
    return losses[:, 0, 0], _Derivatives(of_student, of_temperature[:, 0, 0], jnp.zeros(0, student.dtype))


def _scaled_derivatives(
    settings: Settings, derivatives: _Derivatives, cotangents: Float[Array, " b"]
) -> tuple[Any, ...]:
    of_student = derivatives.student * cotangents[:, None, None, None]
    return of_student.astype(derivatives.like.dtype), None, None, derivatives.temperature * cotangents


_losses.defvjp(_losses_and_derivatives, _scaled_derivatives)


def _counts(mask: Bool[Array, "b n"] | None, *shape: int) -> Float[Array, "..."]:
    """1 where a mask allows; one row for all examples where there is none."""
    return jnp.ones((1, *shape), jnp.float32) if mask is None else mask.astype(jnp.float32).reshape(-1, *shape)


def _run(settings: Settings, temperature: Array, *inputs: Any) -> tuple[Array, Array, Array]:
    student, teacher, *_ = inputs
    (examples, student_heads, rows, keys), teacher_heads = student.shape, teacher.shape[1]

    def block(array: Any) -> pl.BlockSpec:
        is_shared, rest = len(array) < examples, (0,) * (array.ndim - 1)
        return pl.BlockSpec((None, *array.shape[1:]), lambda i: (0 if is_shared else i, *rest))

    # Like the student's maps they vary over the mapped axes.
    varying = jax.typeof(student).manual_axis_type
    outputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
        for shape in ((examples, 1, _LANES), student.shape, (examples, 1, _LANES))
    ]
    return pl.pallas_call(
        functools.partial(_kernel, settings),
        grid=(examples,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *map(block, inputs)],
        out_specs=[pl.BlockSpec((None, *x.shape[1:]), lambda i, rest=(0,) * (x.ndim - 1): (i, *rest)) for x in outputs],
        out_shape=outputs,
        scratch_shapes=[
            pltpu.VMEM((heads, rows, keys), jnp.float32) for heads in (student_heads, teacher_heads, teacher_heads)
        ],
        # Elsewhere than on its target it is run for tests only.
        interpret=target_platform() != "tpu",
    )(temperature, *inputs)
