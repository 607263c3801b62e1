"""Where arrays live: the device mesh, the sharding of batches, and the sharding of state by path rules.

A mesh has up to three axes. Rows are split over `data` and `fsdp`; parameters, with all that follows them, over `fsdp`,
which gathers a layer when it is needed, and over `tensor`, where each device computes its part of a layer.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from repkit.checks import InputError, unknown_name
from repkit.config import formerly

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

Rules = Sequence[tuple[str, PartitionSpec]]
"""Pairs of a regular expression on a leaf's path and how that leaf is sharded; the first match counts."""

SMALLEST_SPLIT = 2**16
"""Elements from which on a leaf without a rule is split over `fsdp`; splitting smaller ones saves little memory."""


@dataclass(frozen=True)
class MeshConfig:
    """The sizes of a mesh's axes; one of them may be -1 and takes the devices that the others leave.

    Attributes:
        data: parts of the batch; each has a copy of the parameters.
        fsdp: parts of the batch among which a copy of parameters, optimizer and moving average is split.
        tensor: devices that compute each layer together; neighbours, as they exchange the most.

    Example:
        >>> dict(MeshConfig().make(jax.devices()[:1]).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """

    data: int = -1
    fsdp: int = field(default=1, metadata=formerly(1))
    tensor: int = field(default=1, metadata=formerly(1))

    def make(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of these devices, or of all; see `make_mesh`."""
        return make_mesh(dataclasses.asdict(self), devices)


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
    places the optimizer's moments and the moving average of that parameter. Of leaves without a match, large ones are
    split over `fsdp` along their longest axis that divides evenly, the examples of the losses' memories over the batch
    axes where they divide evenly, and all others are replicated.

    Args:
        abstract_state: pytree of arrays or `jax.ShapeDtypeStruct`.
        mesh: the mesh.
        rules: (regular expression, PartitionSpec) pairs, such as one's own before those of
            `repkit.models.sharding`; a rule with `PartitionSpec()` keeps a leaf whole.

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
        if not name.startswith("memories/"):
            return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh))
        is_split = leaf.shape and leaf.shape[0] % batch_devices(mesh) == 0
        return batch_sharding(mesh) if is_split else NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(sharding, abstract_state)
    if unused:
        raise InputError(f"sharding rules that match no leaf of the state: {', '.join(sorted(unused))}")
    return shardings


def _fsdp_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    parts = mesh.shape.get("fsdp", 1)
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not divisible or math.prod(shape) < SMALLEST_SPLIT:
        return PartitionSpec()
    longest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * longest, "fsdp")


def _check_fits(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise InputError(f"the sharding {spec} has more axes than '{name}' of shape {shape}")
    for size, axes in zip(shape, spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        for axis in names:
            if axis not in mesh.shape:
                raise unknown_name(f"mesh axis in the sharding {spec} of '{name}'", axis, mesh.shape)
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts:
            raise InputError(f"the sharding {spec} splits {size} in '{name}' of shape {shape} over {parts} devices")


@dataclass(frozen=True)
class BatchShare:
    """Which rows of the global batch a process feeds: share `index` of `count` equal ones."""

    index: int
    count: int


WHOLE_BATCH = BatchShare(0, 1)


def batch_share(mesh: Mesh, process_index: int | None = None) -> BatchShare:
    """The share of the global batch that a process feeds, which follows from where its devices are in the mesh.

    Processes whose devices compute the same rows, such as those of one `tensor` group, feed the same share.

    Args:
        mesh: the mesh.
        process_index: of the process; None is this one.

    Raises:
        InputError: if the processes' rows overlap without being the same.

    Example:
        >>> batch_share(make_mesh(devices=jax.devices()[:1]))
        BatchShare(index=0, count=1)
    """
    process_index = jax.process_index() if process_index is None else process_index
    rows: dict[int, set[int]] = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((batch_devices(mesh),)).items():
        rows.setdefault(device.process_index, set()).add(part.start or 0)
    shares = sorted({tuple(sorted(parts)) for parts in rows.values()})
    if sum(map(len, shares)) != batch_devices(mesh) or len(set(map(len, shares))) != 1:
        raise InputError(
            f"the mesh {dict(mesh.shape)} cuts through the rows of a process; "
            "choose sizes of tensor and fsdp that divide a process's devices, or are multiples of them"
        )
    return BatchShare(shares.index(tuple(sorted(rows[process_index]))), len(shares))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's share of the rows, see `batch_share`, split over the mesh's batch axes."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:  # all rows are here, and one call takes a third of the time of many
        return jax.device_put(dict(batch), sharding)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
