"""What a loss remembers of every example of the data set: the log-partition of either modality as the anchor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.checks import InputError, require_range
from repkit.numerics import (
    AxisName,
    Scalar,
    WeightedMean,
    local_rows,
    log_interpolate,
    replicated_rows_over,
    row_count,
    row_indices,
    sum_over,
)

_DIAGNOSTICS = ("info_nce", "drift", "clipped", "visited")


class LogPartitionMemory(NamedTuple):
    """What is known of every example's log-partition `log S`, per direction; made by `init_memory`.

    Attributes:
        image_to_text: log S of each image as anchor, over the data set's texts [n].
        text_to_image: log S of each text as anchor, over the data set's images [n].
        visited: whether the example was seen; the two others mean nothing where it was not [n].
        diagnostics: scalars that describe the call which returned this memory:
            `info_nce`: mean of `-s+ + log S`, with S estimated from this batch for the whole data set: what the
                conventional loss would show (the surrogate's own value is not a likelihood);
            `drift`: mean of |log S of this batch - log S of the memory before the call| over the visited rows:
                staleness plus the noise of the batch estimate;
            `clipped`: share of the anchors' sums that exceeded exp(`max_exponent`);
            `visited`: share of the rows that the memory knew before the call.
    """

    image_to_text: Float[Array, " n"]
    text_to_image: Float[Array, " n"]
    visited: Bool[Array, " n"]
    diagnostics: dict[str, Float[Array, ""]]


def init_memory(size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> LogPartitionMemory:
    """A memory for the examples 0 to size - 1, none of which was visited.

    Example:
        >>> init_memory(3).visited
        Array([False, False, False], dtype=bool)
    """
    # Each field gets a buffer of its own, so that a training step may donate them all.
    zero = {name: jnp.zeros((), jnp.float32) for name in _DIAGNOSTICS}
    return LogPartitionMemory(jnp.zeros(size, dtype), jnp.zeros(size, dtype), jnp.zeros(size, bool), zero)


class Found(NamedTuple):
    """What a memory held of the batch's rows, of all devices.

    Attributes:
        ids: place in the whole memory; -1 for rows that are not in it [B].
        slots: place in this device's part of the memory, or 0 [B].
        is_here: whether the example is in this device's part [B].
        visited: whether the example was met before [B].
        log_values: what was stored, 0 where not visited [2 B].
    """

    ids: Int[Array, " B"]
    slots: Int[Array, " B"]
    is_here: Bool[Array, " B"]
    visited: Bool[Array, " B"]
    log_values: Float[Array, "2 B"]


def look_up(
    memory: LogPartitionMemory,
    example_id: Int[Array, " b"],
    valid: Bool[Array, " b"],
    dtype: jnp.dtype,
    axis_name: AxisName | None,
    memory_axis_name: AxisName | None,
) -> Found:
    """What the memory knows of the valid rows; all devices learn it of all rows."""
    memory = jax.lax.stop_gradient(memory)
    local_size = memory.visited.shape[0]
    size = row_count(local_size, memory_axis_name)
    is_known = valid & (example_id >= 0) & (example_id < size)
    ids = replicated_rows_over(jnp.where(is_known, example_id, -1), axis_name)
    slots = ids - row_indices(local_size, memory_axis_name)[0]
    is_here = (ids >= 0) & (slots >= 0) & (slots < local_size)
    slots = jnp.where(is_here, slots, 0)
    visited = sum_over((is_here & memory.visited[slots]).astype(jnp.int32), memory_axis_name) > 0
    stored = jnp.stack([memory.image_to_text[slots], memory.text_to_image[slots]]).astype(dtype)
    log_values = sum_over(jnp.where(is_here, stored, 0.0), memory_axis_name)
    return Found(ids, slots, is_here, visited, jnp.where(visited, log_values, 0.0))


class Recalled(NamedTuple):
    """This device's rows of an updated memory, and the memory."""

    log_values: Float[Array, "2 b"]
    drift: Float[Array, " b"]
    visited: Bool[Array, " b"]
    memory: LogPartitionMemory


def remember(
    memory: LogPartitionMemory,
    found: Found,
    fresh: Float[Array, "2 b"],
    usable: Bool[Array, " b"],
    memory_rate: Scalar,
    axis_name: AxisName | None,
) -> Recalled:
    """Updates the memory with this batch's estimates, `fresh`, of its usable rows.

    The order of devices, and of rows with equal ids, does not matter. All devices do it with all rows, each in its own
    part of the memory; beside that it costs sending every row's id and estimates to all devices.
    """
    memory = jax.lax.stop_gradient(memory)
    everyone = replicated_rows_over(usable, axis_name)
    estimates = replicated_rows_over(fresh.T, axis_name).T
    known, here = (flags & everyone for flags in (found.ids >= 0, found.is_here))
    strangers = jnp.iinfo(found.ids.dtype).max - jnp.arange(len(found.ids), dtype=found.ids.dtype)
    averages = _average_of_copies(estimates, jnp.where(known, found.ids, strangers))
    visited = found.visited & everyone
    new = jnp.where(visited, log_interpolate(found.log_values, averages, memory_rate), averages)
    targets = jnp.where(here, found.slots, memory.visited.shape[0])
    image_to_text, text_to_image = new.astype(memory.image_to_text.dtype)
    updated = memory._replace(
        image_to_text=memory.image_to_text.at[targets].set(image_to_text, mode="drop"),
        text_to_image=memory.text_to_image.at[targets].set(text_to_image, mode="drop"),
        visited=memory.visited.at[targets].set(True, mode="drop"),
    )
    drift = jnp.where(visited, jnp.mean(jnp.abs(averages - found.log_values), axis=0), 0.0)
    log_values = jnp.where(known, new, estimates)
    mine = [local_rows(rows, axis_name) for rows in (log_values.T, drift, visited)]
    return Recalled(mine[0].T, mine[1], mine[2], updated)


def require_ids_and_rate(
    caller: str, example_id: Int[Array, " b"] | None, memory_rate: Scalar | None
) -> tuple[Int[Array, " b"], Scalar]:
    """Both; raises `InputError` where one is missing or the rate out of range."""
    if example_id is None or memory_rate is None:
        missing = "example_id" if example_id is None else "memory_rate"
        raise InputError(f"{caller}: a memory needs {missing}; pass it, or memory=None to do without")
    require_range(caller, "memory_rate", memory_rate, above=0, at_most=1)
    return example_id, memory_rate


def _average_of_copies(log_values: Float[Array, "2 B"], ids: Int[Array, " B"]) -> Float[Array, "2 B"]:
    """log of the mean of the values of equal ids: an example met twice is remembered once, whatever the order."""
    order = jnp.argsort(ids)
    is_first = jnp.diff(ids[order], prepend=ids[order][:1] - 1) != 0
    group = jnp.zeros_like(ids).at[order].set(jnp.cumsum(is_first, dtype=ids.dtype) - 1)

    def average(values: Float[Array, " B"]) -> Float[Array, " B"]:
        largest = jax.ops.segment_max(values, group, num_segments=len(ids))
        total = jax.ops.segment_sum(jnp.exp(values - largest[group]), group, num_segments=len(ids))
        count = jax.ops.segment_sum(jnp.ones_like(values), group, num_segments=len(ids))
        return jnp.log(total[group] / count[group]) + largest[group]

    return jax.vmap(average)(log_values)


def describe(
    recalled: Recalled,
    info_nce: Float[Array, "2 b"],
    is_clipped: Bool[Array, "*terms 2 b"],
    usable: Bool[Array, " b"],
    axis_name: AxisName | None,
) -> dict[str, Float[Array, ""]]:
    """The diagnostics of a call; see `LogPartitionMemory`."""

    def mean_over_rows(values: Array, where: Array) -> Array:
        mean = WeightedMean.of(values, where).sum_over(axis_name).value()
        return jax.lax.stop_gradient(mean).astype(jnp.float32)

    def share(flags: Bool[Array, "*more b"]) -> Float[Array, " b"]:
        return jnp.mean(flags, axis=tuple(range(flags.ndim - 1)), dtype=info_nce.dtype)

    return {
        "info_nce": mean_over_rows(jnp.mean(info_nce, axis=0), usable),
        "drift": mean_over_rows(recalled.drift, recalled.visited),
        "clipped": mean_over_rows(share(is_clipped), usable),
        "visited": mean_over_rows(recalled.visited, usable),
    }


def bounded_exp(x: Float[Array, "*shape"], bound: float) -> Float[Array, "*shape"]:
    """exp(x), continued beyond the bound by its tangent."""
    return jnp.exp(jnp.minimum(x, bound)) * (1.0 + jnp.maximum(x - bound, 0.0))
