"""Where arrays live: the device mesh, the sharding of batches, and the sharding of state by path rules."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from repkit.checks import InputError

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

Rules = Sequence[tuple[str, PartitionSpec]]
"""Pairs of a regular expression on a leaf's path and how that leaf is sharded; the first match counts."""


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a device mesh from axis names and sizes.

    Args:
        axes: size by axis name; one size may be -1 and takes the devices that the others leave. None puts all devices
            on one `data` axis.
        devices: the devices to use; None takes all.

    Returns:
        A mesh with `AxisType.Auto` axes: the compiler chooses the collectives.

    Raises:
        InputError: if the sizes do not multiply to the number of devices.

    Example:
        >>> import jax
        >>> dict(make_mesh({"data": -1, "tensor": 1}, jax.devices()[:1]).shape)
        {'data': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(axes or {"data": -1})
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh axes need positive sizes, at most one of them -1; got {sizes}")
    if free:
        sizes[free[0]] = len(devices) // math.prod(size for size in sizes.values() if size != -1)
    if math.prod(sizes.values()) != len(devices):
        raise InputError(f"mesh axes {dict(axes or {})} do not multiply to the {len(devices)} devices there are")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh over which the rows of a batch are split."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def batch_devices(mesh: Mesh) -> int:
    """The number of parts into which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def state_shardings(abstract_state: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """A sharding for every leaf of a training state.

    A rule matches where its expression is found anywhere in the leaf's path, so one rule on a parameter's path also
    places the optimizer's moments and the moving average of that parameter. Leaves without a match are replicated, but
    for the losses' memories: their examples are split over the batch axes where they divide evenly.

    Args:
        abstract_state: pytree of arrays or `jax.ShapeDtypeStruct`.
        mesh: the mesh.
        rules: (regular expression, PartitionSpec) pairs.

    Returns:
        The pytree with a `NamedSharding` in place of every leaf.

    Raises:
        InputError: if a rule matches no leaf, or its spec does not fit the leaf it matches.
    """
    unused = {pattern for pattern, _ in rules}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                unused.discard(pattern)
                _check_fits(name, leaf.shape, spec, mesh)
                return NamedSharding(mesh, spec)
        is_split = name.startswith("memories/") and leaf.shape and leaf.shape[0] % batch_devices(mesh) == 0
        return batch_sharding(mesh) if is_split else NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(sharding, abstract_state)
    if unused:
        raise InputError(f"sharding rules that match no leaf of the state: {', '.join(sorted(unused))}")
    return shardings


def _check_fits(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise InputError(f"the sharding {spec} has more axes than '{name}' of shape {shape}")
    for size, axes in zip(shape, spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts:
            raise InputError(f"the sharding {spec} splits {size} in '{name}' of shape {shape} over {parts} devices")


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows, split over the batch axes of the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
