"""Reductions, masks, norms and log-space sums whose values and gradients stay finite; they need JAX and nothing else.

`reduce_loss` is the one road from per-row values to a loss, and `WeightedMean` what travels on it: sums are added over
devices and steps, and the division comes last, because a mean of per-device means is wrong as soon as masks are uneven.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from repkit.checks import unknown_name

Reduction: TypeAlias = Literal["mean", "sum", "none"]
Scalar: TypeAlias = Float[Array, ""] | Int[Array, ""] | float | int
AxisName: TypeAlias = str | tuple[str, ...]
"""The axis of `pmap` or `shard_map` over which rows are split; of a tuple, the first axis is the slowest."""


# ---------------------------------------------------------------------------------------------------------------------
# Precision and masks


def at_least_float32(x: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, also if it holds integers or booleans, or in float64 where it is that already.

    >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    x = jnp.asarray(x)
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def row_mask(where: Bool[Array, " b"] | None, rows: int) -> Bool[Array, " b"]:
    """`where`, or all True."""
    return jnp.ones(rows, bool) if where is None else where


def mask_rows(x: Float[Array, " b *shape"], where: Bool[Array, " b"] | None) -> Float[Array, " b *shape"]:
    """`x` with 0 in the rows where `where` is False; those rows get a zero gradient even if they hold NaN.

    >>> mask_rows(jnp.array([[1.0, 2.0], [jnp.nan, 3.0]]), jnp.array([True, False]))
    Array([[1., 2.],
           [0., 0.]], dtype=float32)
    """
    if where is None:
        return x
    return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))


def same_precision(*arrays: Float[Array, " b *shape"], where: Bool[Array, " b"] | None) -> list[Float[Array, "..."]]:
    """The arrays in their common precision, at least float32, with the masked rows set to 0."""
    given = [jnp.asarray(array) for array in arrays]
    dtype = jnp.promote_types(jnp.result_type(*given), jnp.float32)
    return [mask_rows(array.astype(dtype), where) for array in given]


# ---------------------------------------------------------------------------------------------------------------------
# Norms


def safe_norm(x: Float[Array, "*shape d"]) -> Float[Array, "*shape"]:
    """Euclidean norm over the last axis, `|x|`; the gradient at a zero vector is 0; no square over- or underflows."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    squares = jnp.sum(jnp.square(x / unit), axis=-1)
    is_zero = squares == 0
    return jnp.where(is_zero, jnp.zeros_like(squares), jnp.sqrt(jnp.where(is_zero, 1.0, squares)) * unit[..., 0])


def normalize(x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
    """`x / |x|` over the last axis; a zero vector stays zero and gets a zero gradient.

    >>> normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    Array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    # The direction does not depend on the length, so that dividing by a constant of the vector's size leaves value and
    # gradient as they are, and keeps the squares in range.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    is_zero = squares == 0
    return jnp.where(is_zero, jnp.zeros_like(x), x * jax.lax.rsqrt(jnp.where(is_zero, 1.0, squares)))


# ---------------------------------------------------------------------------------------------------------------------
# Platforms

_traced_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("traced_platform", default=None)


def target_platform() -> str:
    """The platform that a program is traced for, such as "cpu"; what is fast differs among them."""
    return _traced_platform.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Within it, programs are traced as for a platform that need not be there, to be compiled for it.

    >>> with tracing_for("tpu"):
    ...     target_platform()
    'tpu'
    """
    token = _traced_platform.set(platform)
    try:
        yield
    finally:
        _traced_platform.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# Log space


def masked_logsumexp(x: Float[Array, "*shape n"], where: Bool[Array, "*shape n"]) -> Float[Array, "*shape"]:
    """`log sum_j exp(x_j)` over the entries of the last axis that `where` allows; -inf, with zero gradient, for none.

    >>> masked_logsumexp(jnp.array([[0.0, 0.0, 9.0], [1.0, 2.0, 3.0]]), jnp.array([[True, True, False], [False] * 3]))
    Array([0.6931472,      -inf], dtype=float32)
    """
    x = jnp.where(where, x, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(x, axis=-1, initial=-jnp.inf))
    largest = jnp.where(jnp.isfinite(largest), largest, jnp.zeros_like(largest))
    total = jnp.sum(jnp.where(where, jnp.exp(x - largest[..., None]), jnp.zeros_like(x)), axis=-1)
    is_empty = ~jnp.any(where, axis=-1)
    return jnp.where(is_empty, -jnp.inf, jnp.log(jnp.where(is_empty, 1.0, total)) + largest)


def log_interpolate(
    log_old: Float[Array, "*shape"], log_new: Float[Array, "*shape"], share: Scalar
) -> Float[Array, "*shape"]:
    """`log((1 - share) exp(log_old) + share exp(log_new))`, for a share in [0, 1].

    >>> float(jnp.exp(log_interpolate(jnp.log(2.0), jnp.log(6.0), 0.25)))  # doctest: +ELLIPSIS
    3.0...
    """
    share = jnp.asarray(share, log_old.dtype)
    return jnp.logaddexp(jnp.log1p(-share) + log_old, jnp.log(share) + log_new)


# ---------------------------------------------------------------------------------------------------------------------
# Across devices. `axis_name` None means that the arrays are global; a name, that they are this device's rows.


def sum_over(x: Shaped[Array, "*shape"], axis_name: AxisName | None) -> Shaped[Array, "*shape"]:
    """The sum of `x` over the devices of the axis."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def largest_over(x: Shaped[Array, "*shape"], axis_name: AxisName | None) -> Shaped[Array, "*shape"]:
    """The largest `x` of all devices."""
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def all_over(x: Bool[Array, "*shape"], axis_name: AxisName | None) -> Bool[Array, "*shape"]:
    """Whether `x` holds on all devices."""
    return x if axis_name is None else jax.lax.pmin(x.astype(jnp.int32), axis_name) > 0


def varying(x: Shaped[Array, "*shape"], axis_name: AxisName | None) -> Shaped[Array, "*shape"]:
    """`x` as a value that may differ from device to device; its gradient is then summed over the devices.

    A rule of its own for a gradient gives each device's share; JAX adds the shares only of what it knows to vary.
    """
    if axis_name is None:
        return x
    zero = jax.lax.pcast(jnp.zeros((), x.dtype), axis_name, to="varying")
    return x | zero if x.dtype == bool else x + zero


def rows_over(x: Shaped[Array, " b *shape"], axis_name: AxisName | None) -> Shaped[Array, " B *shape"]:
    """All devices' rows in the order of the axis; the gradient is summed over the devices that used a row."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=0, tiled=True)


def row_indices(rows: int, axis_name: AxisName | None) -> Int[Array, " b"]:
    """The places of this device's rows among all devices' rows."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
    return first + jnp.arange(rows)


def local_rows(x: Shaped[Array, " B *shape"], axis_name: AxisName | None) -> Shaped[Array, " b *shape"]:
    """This device's rows of an array that every device holds whole."""
    if axis_name is None:
        return x
    return x[row_indices(x.shape[0] // jax.lax.axis_size(axis_name), axis_name)]


def row_count(rows: int, axis_name: AxisName | None) -> int:
    """The number of all devices' rows."""
    return rows if axis_name is None else rows * jax.lax.axis_size(axis_name)


def replicated_rows_over(x: Shaped[Array, " b *shape"], axis_name: AxisName | None) -> Shaped[Array, " B *shape"]:
    """All devices' rows, in a form that JAX knows to be equal on every device, so that a replicated result may follow.

    It is a sum of arrays that are zero outside one device's rows; `rows_over` is cheaper where the result stays local.
    """
    if axis_name is None:
        return x
    everywhere = jnp.zeros((row_count(x.shape[0], axis_name), *x.shape[1:]), x.dtype)
    return jax.lax.psum(everywhere.at[row_indices(x.shape[0], axis_name)].set(x), axis_name)


# ---------------------------------------------------------------------------------------------------------------------
# Reductions


class WeightedMean(NamedTuple):
    """A mean that is not yet divided: `total = sum w x`, `weight = sum w`, both of which can be added over batches.

    Example:
        >>> first = WeightedMean.of(jnp.array([1.0, 3.0]))
        >>> second = WeightedMean.of(jnp.array([5.0, jnp.nan]), where=jnp.array([True, False]))
        >>> print(first.merge(second).value())
        3.0
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def of(
        cls,
        values: Shaped[Array, "*shape"],
        where: Bool[Array, "*shape"] | None = None,
        weights: Float[Array, "*shape"] | None = None,
    ) -> "WeightedMean":
        """The sums over all entries that `where` allows; the others get a zero gradient, whatever they hold."""
        values = at_least_float32(values)
        weights = jnp.ones_like(values) if weights is None else weights.astype(values.dtype)
        if where is not None:
            values = jnp.where(where, values, jnp.zeros_like(values))
            weights = jnp.where(where, weights, jnp.zeros_like(weights))
        return cls(jnp.sum(weights * values), jnp.sum(weights))

    def merge(self, other: "WeightedMean") -> "WeightedMean":
        """The mean over both sets of entries."""
        return WeightedMean(self.total + other.total, self.weight + other.weight)

    def sum_over(self, axis_name: AxisName | None) -> "WeightedMean":
        """The mean over the entries of all devices of the axis."""
        return WeightedMean(sum_over(self.total, axis_name), sum_over(self.weight, axis_name))

    def value(self) -> Float[Array, ""]:
        """`total / weight`; 0 with zero gradient where the weight is 0."""
        is_empty = self.weight == 0
        mean = self.total / jnp.where(is_empty, jnp.ones_like(self.weight), self.weight)
        return jnp.where(is_empty, jnp.zeros_like(mean), mean)


def reduce_loss(
    values: Shaped[Array, " b"],
    *,
    where: Bool[Array, " b"] | None,
    weights: Float[Array, " b"] | None,
    axis_name: AxisName | None,
    reduction: Reduction,
) -> Float[Array, ""] | Float[Array, " b"]:
    """Per-row values to a loss: `sum_i w_i l_i / sum_i w_i` over the rows that `where` allows.

    Args:
        values: the rows' losses [b].
        where: False leaves a row out, with zero gradient even where its value is NaN [b].
        weights: the row's share w of the mean, >= 0 [b]; 1 when None.
        axis_name: the axis of `pmap` or `shard_map` over which totals and weights are added; None outside of them.
        reduction: "mean"; "sum" for `sum_i w_i l_i`; "none" for the rows' losses as they are: 0 where masked, and *not*
            multiplied by `weights`, ready for `WeightedMean.of(rows, where, weights)`.

    Returns:
        A scalar, or [b] for "none", in at least float32. The mean of nothing is 0 with zero gradient.

    Raises:
        InputError: `reduction` is not one of the three.

    Example:
        >>> rows = jnp.array([1.0, 2.0, jnp.nan])
        >>> where, weights = jnp.array([True, True, False]), jnp.array([1.0, 3.0, 1.0])
        >>> print(reduce_loss(rows, where=where, weights=weights, axis_name=None, reduction="mean"))
        1.75
    """
    if reduction not in get_args(Reduction):
        raise unknown_name("reduction", reduction, get_args(Reduction))
    if reduction == "none":
        values = at_least_float32(values)
        return values if where is None else jnp.where(where, values, jnp.zeros_like(values))
    mean = WeightedMean.of(values, where, weights).sum_over(axis_name)
    return mean.total if reduction == "sum" else mean.value()
