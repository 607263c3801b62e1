"""A model in micro-batches: the outputs of a whole batch, and their exact gradient, with the activations of a part.

Losses between rows need the outputs of all rows at once, but a model can make them a few rows at a time. They are
computed first, without keeping what a gradient needs; when the losses have said how they change with them, each
micro-batch goes through the model again, and its share of the parameters' gradient is added to that of the others.

References:
    Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983 (GradCache).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from repkit.checks import InputError

Batch = Mapping[str, Any]
Forward = Callable[[Any, Batch, Array | None], dict[str, Any]]


def in_micro_batches(forward: Forward, count: int) -> Forward:
    """The model that walks its batch in `count` micro-batches, one after the other.

    Differentiated, it holds the activations of one micro-batch at a time, for a second forward pass. Value and gradient
    are those of the model: the two passes are one function of the same keys, so that they drop the same units.

    Args:
        forward: `forward(params, batch, key) -> outputs`. It treats each row by itself; one that mixes rows, such as a
            model that draws hard negatives, mixes those of a micro-batch. Its outputs have the rows in their first
            axis, or are the same for all batches, such as a logit scale.
        count: number of micro-batches; 1 gives `forward` as it is. Each takes every count-th row, so that the rows of
            every device are spread over all of them. Micro-batch i draws with the key folded with i.

    Returns:
        The model. It raises `InputError` if the rows do not divide, or an output is of neither kind.

    Example:
        >>> def forward(params, batch, key):
        ...     return {"y": batch["x"] * params["w"], "w": params["w"]}
        >>> walked = in_micro_batches(forward, 2)
        >>> print(jax.grad(lambda w: walked({"w": w}, {"x": jnp.arange(4.0)}, None)["y"].sum())(1.0))
        6.0
    """
    if count < 1:
        raise InputError(f"the number of micro-batches must be at least 1, got {count}")
    if count == 1:
        return forward

    def walk(params: Any, batch: Batch, key: Array | None) -> dict[str, Any]:
        rows = len(next(iter(batch.values())))
        if rows % count:
            raise InputError(f"a batch of {rows} rows cannot go through the model in {count} equal micro-batches")
        parts = every_nth(batch, count)
        has_rows = _has_rows(forward, params, batch, key, parts)
        # Inside a loop there is nothing that the second pass could be merged with.
        recomputed = jax.checkpoint(forward, prevent_cse=False)

        def one(part: tuple[Array, Batch]) -> dict[str, Any]:
            index, rows = part
            return recomputed(params, rows, None if key is None else jax.random.fold_in(key, index))

        outputs = jax.lax.map(one, (jnp.arange(count), parts))
        # Of what is the same for all micro-batches one is taken, which gets the whole of its gradient.
        return jax.tree.map(lambda x, is_rows: _in_order(x) if is_rows else x[0], outputs, has_rows)

    return walk


def every_nth(batch: Batch, count: int) -> dict[str, Array]:
    """[b ...] -> [count, b/count ...], part i from every count-th row, so that each device's rows are in all parts."""
    return {name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for name, x in batch.items()}


def _in_order(parts: Array) -> Array:
    """The way back of `every_nth`, for one array."""
    return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])


def _has_rows(forward: Forward, params: Any, batch: Batch, key: Array | None, parts: Batch) -> Any:
    """Which of the outputs have the batch's rows in their first axis; the others must not depend on the rows."""
    depends = None

    @jax.custom_batching.custom_vmap
    def note(outputs: Any) -> Any:
        return outputs

    @note.def_vmap
    def _(axis_size: int, in_batched: tuple[Any], outputs: Any) -> tuple[Any, Any]:
        nonlocal depends
        depends = in_batched[0]
        return outputs, depends

    whole = jax.eval_shape(forward, params, batch, key)
    walked = jax.eval_shape(jax.vmap(lambda rows: note(forward(params, rows, key))), parts)
    rows, count = len(next(iter(batch.values()))), len(next(iter(parts.values())))

    def kind(path: Any, whole: Any, walked: Any, is_dependent: bool) -> bool:
        if whole.shape == (rows, *walked.shape[2:]) and walked.shape[1:2] == (rows // count,):
            return True
        if whole.shape == walked.shape[1:] and not is_dependent:
            return False
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        raise InputError(
            f"outputs.{name} of shape {list(whole.shape)} cannot be put together from micro-batches of "
            f"{rows // count} of {rows} rows: its first axis must be the rows, or it must not depend on them"
        )

    return jax.tree_util.tree_map_with_path(kind, whole, walked, depends)
