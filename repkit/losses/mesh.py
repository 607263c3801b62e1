"""Losses of global arrays, computed on every device of a mesh with its own rows."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from repkit.checks import InputError, unknown_name
from repkit.numerics import AxisName

ROW_ARGUMENTS = frozenset(
    {"where", "weights", "labels", "example_id", "time", "query_where", "key_where", "token_mask"}
)
"""Keyword arguments of the losses that, as arrays, have one entry per row."""


def over_mesh(loss: Callable[..., Any], mesh: Mesh, axis_name: AxisName = "data") -> Callable[..., Any]:
    """Makes a loss of global arrays that splits its rows over mesh axes, for use under `jax.jit`.

    The result is called like the loss and gives the same value and gradient; its rows' devices exchange what the loss's
    `form` says, and nothing else. Without it, `jit` leaves it to the compiler to split the loop over blocks, which it
    does by gathering the embeddings on every device. A memory's examples are split as well where they divide evenly.

    Args:
        loss: any loss of this package, or of its signature: rows in the positional arguments' first axis, and in that
            of the keyword arguments `where`, `weights`, `labels`, `example_id`, `time` and masks.
        mesh: the device mesh.
        axis_name: the axis, or axes, of the mesh that rows are split over. Over other axes the work is repeated.

    Returns:
        The loss, without use for an `axis_name`. It raises `InputError` if the rows do not divide.

    Raises:
        InputError: if the mesh has no such axis, or the loss takes no `axis_name`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from repkit import losses
        >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
        >>> info_nce = losses.over_mesh(losses.info_nce, mesh)
        >>> print(f"{jax.jit(info_nce)(jnp.eye(4), jnp.eye(4), logit_scale=2.0):.4f}")
        0.3408
    """
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for axis in axes:
        if axis not in mesh.shape:
            raise unknown_name("mesh axis", axis, mesh.shape)
    parameters = inspect.signature(loss).parameters
    loss_name = getattr(loss, "__name__", "the loss")
    if "axis_name" not in parameters:
        raise InputError(f"over_mesh: {loss_name} takes no axis_name")
    devices = math.prod(mesh.shape[axis] for axis in axes)
    split, whole = P(axes), P()

    @functools.wraps(loss)
    def split_loss(*arrays: Any, axis_name: None = None, **keywords: Any) -> Any:
        if axis_name is not None:
            raise InputError(f"{loss_name}: a loss from over_mesh takes global arrays; axis_name must be None")
        rows = np.shape(arrays[0])[0]
        if rows % devices:
            raise InputError(f"{loss_name}: {rows} rows cannot be split over {devices} devices of the mesh")
        traced = {name: value for name, value in keywords.items() if _is_traced(value)}
        fixed = {name: value for name, value in keywords.items() if name not in traced}

        specs = {name: split if name in ROW_ARGUMENTS and np.ndim(value) else whole for name, value in traced.items()}
        if "memory" in traced:
            is_split = all(np.ndim(leaf) == 0 or len(leaf) % devices == 0 for leaf in jax.tree.leaves(traced["memory"]))
            specs["memory"] = jax.tree.map(
                lambda leaf: split if is_split and np.ndim(leaf) else whole, traced["memory"]
            )
            fixed["memory_axis_name"] = axes if is_split else None
        is_rows = keywords.get("reduction") == "none"
        loss_spec = split if is_rows else whole
        out_specs = (loss_spec, specs.get("memory", whole)) if "memory" in parameters else loss_spec

        def local(arrays: tuple[Any, ...], traced: dict[str, Any]) -> Any:
            return loss(*arrays, **traced, **fixed, axis_name=axes)

        array_specs = jax.tree.map(lambda _: split, arrays)
        return jax.shard_map(local, mesh=mesh, in_specs=(array_specs, specs), out_specs=out_specs)(arrays, traced)

    return split_loss


def _is_traced(value: Any) -> bool:
    """Whether a keyword argument is, or holds, arrays."""
    return any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))
