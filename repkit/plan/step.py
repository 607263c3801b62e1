"""What a training step will need on devices that are not here: compiled for them, and not run.

For a TPU the TPU's own compiler says it. For other devices, and where that compiler is not installed, as many simulated
devices of this host stand in: the same program is split in the same way, but compiled for a CPU.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from repkit.checks import InputError
from repkit.numerics import tracing_for
from repkit.plan.chips import Chip, Topology, has_tpu_compiler
from repkit.plan.program import Costs, Exchange, device_bytes, program_costs, traced_flops
from repkit.simulation import simulated_devices
from repkit.train.config import TracedUpdate, TrainConfig, trace_update
from repkit.train.mesh import batch_devices

Compiler = Literal["TPU", "CPU"]


@dataclass(frozen=True)
class StepPlan:
    """What one step needs on each device.

    Attributes:
        topology: name of the devices.
        compiler: whose word it is; "CPU" stands in for another.
        devices: their number.
        batch_size: rows of the global batch.
        state_bytes: of parameters, optimizer, moving average and memories.
        batch_bytes: of the batch.
        temporary_bytes: of what the step computes on its way; None if it does not fit, and the compiler does not say.
        memory_bytes: all of it at its peak.
        capacity: bytes that a device has.
        flops: operations of its share of the matrix products, recomputation included.
        traffic: bytes that its operations read from memory and write to it, an upper bound.
        exchanges: the collectives.
        least_seconds: of each kind of work, where the program's choices are cheap; see `repkit.plan.program.Bound`. The
            work of a chip is what the TPU's compiler estimates of its operations, or else its matrix products at the
            chip's peak rate and its traffic at that of the memory.
        most_seconds: the same, where they are dear.
        peak_seconds: of the matrix products at the chip's peak rate.
    """

    topology: str
    compiler: Compiler
    devices: int
    batch_size: int
    state_bytes: int
    batch_bytes: int
    temporary_bytes: int | None
    memory_bytes: int
    capacity: float
    flops: float
    traffic: float
    exchanges: tuple[Exchange, ...]
    least_seconds: dict[str, float]
    most_seconds: dict[str, float]
    peak_seconds: float

    @property
    def fits(self) -> bool:
        """Whether a device has as much memory."""
        return self.memory_bytes <= self.capacity

    @property
    def estimated_seconds(self) -> tuple[float, float]:
        """Of a step: if all work overlaps and choices are cheap, and if none does and they are dear."""
        return max(self.least_seconds.values()), sum(self.most_seconds.values())


def plan_step(trace: Callable[[Sequence[Any], int], TracedUpdate], topology: Topology, batch_size: int) -> StepPlan:
    """Compiles a step for a topology.

    Args:
        trace: from the devices and the size of the global batch to the traced step, such as
            `repkit.train.config.trace_update` gives it.
        topology: the devices.
        batch_size: rows of the global batch.

    Raises:
        InputError: if this host cannot simulate as many devices as it would have to.
    """
    devices, compiler = target_devices(topology)
    with tracing_for(devices[0].platform):
        traced = trace(devices, batch_size)
        lowered = traced.program.lower()
    flops = traced_flops(traced.program.jaxpr) / len(devices)
    try:
        compiled = lowered.compile()
    except Exception as error:
        used = _used_memory(str(error))
        if used is None:
            raise
        text, temporary, memory = "", None, used
    else:
        text = compiled.as_text() or ""
        analysis = compiled.memory_analysis()
        temporary = analysis.temp_size_in_bytes
        arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
        memory = arguments + outputs - analysis.alias_size_in_bytes + temporary
    costs, chip = program_costs(text), topology.chip
    return StepPlan(
        topology=topology.name,
        compiler=compiler,
        devices=len(devices),
        batch_size=batch_size,
        state_bytes=device_bytes((traced.state, traced.teacher_params)),
        batch_bytes=device_bytes(traced.batch),
        temporary_bytes=temporary,
        memory_bytes=memory,
        capacity=chip.memory,
        flops=flops,
        traffic=costs.traffic,
        exchanges=costs.exchanges,
        least_seconds=_seconds(program_costs(text, "least"), chip, flops),
        most_seconds=_seconds(costs, chip, flops),
        peak_seconds=flops / chip.flops,
    )


def _seconds(costs: Costs, chip: Chip, flops: float) -> dict[str, float]:
    """The least time of each kind of work."""
    network = {"network": sum(exchange.sent for exchange in costs.exchanges) / chip.link_bandwidth}
    if chip.clock is not None and costs.cycles:
        return {"operations": costs.cycles / chip.clock} | network
    return {"matrix products": flops / chip.flops, "memory": costs.traffic / chip.memory_bandwidth} | network


def plan_recipe(
    config: TrainConfig, experiment: Any, rows: Mapping[str, Any], topology: Topology, *, teacher: Any = None
) -> tuple[StepPlan, int | None]:
    """Plans the step of a recipe, and from a second step of half the rows what the largest batch is.

    Args:
        config: its settings; `batch_size` is the global batch.
        experiment: a `repkit.recipe.Experiment`.
        rows: a batch of any size of its data.
        topology: the devices.
        teacher: the experiment's teacher, if it has one.

    Returns:
        The plan, and the largest batch; None where the half is not a batch.

    Raises:
        InputError: if the batch does not divide.
    """
    parts = batch_devices(config.mesh.make(target_devices(topology)[0])) * config.parts
    if config.batch_size % parts:
        raise InputError(f"train.batch_size={config.batch_size} must be a multiple of {parts} on {topology.name}")

    def trace(devices: Sequence[Any], batch_size: int) -> TracedUpdate:
        batch = {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in rows.items()}
        model = experiment.init, experiment.forward, experiment.objective
        return trace_update(config, *model, batch, devices, rules=experiment.sharding_rules, teacher=teacher)

    plan = plan_step(trace, topology, config.batch_size)
    if config.batch_size % (2 * parts):
        return plan, None
    return plan, largest_batch(plan_step(trace, topology, config.batch_size // 2), plan, parts)


def largest_batch(smaller: StepPlan, larger: StepPlan, multiple: int) -> int:
    """The largest global batch that fits, from the memory at two sizes; memory grows in proportion to the rows.

    Args:
        smaller: a step.
        larger: the same step with more rows.
        multiple: what the batch must be a multiple of.

    Returns:
        A multiple of it; 0 if not even the state fits.
    """
    slope = (larger.memory_bytes - smaller.memory_bytes) / (larger.batch_size - smaller.batch_size)
    if slope <= 0:
        raise InputError("memory does not grow with the batch; compare larger batches")
    rows = larger.batch_size + (larger.capacity - larger.memory_bytes) / slope
    return max(0, math.floor(rows / multiple) * multiple)


def target_devices(topology: Topology) -> tuple[list[Any], Compiler]:
    """The devices to compile for: those of the topology, or simulated ones in their place."""
    if topology.shape is not None and has_tpu_compiler():
        from jax.experimental import topologies

        with _environment(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"):
            # A host has four chips unless it is said to have one.
            host = {"chips_per_host_bounds": (1, 1, 1)} if topology.devices == 1 else {}
            return list(topologies.get_topology_desc(topology.shape, platform="tpu", **host).devices), "TPU"
    devices = jax.devices()
    if len(devices) < topology.devices:
        raise InputError(
            f"{topology.name} needs {topology.devices} simulated devices, and this process has {len(devices)}; "
            f"start it with {' '.join(f'{k}={v}' for k, v in simulated_devices(topology.devices, {}).items())}"
        )
    return devices[: topology.devices], "CPU"


def describe(plan: StepPlan, fits: int | None = None) -> str:
    """The plan as text to read.

    Args:
        plan: the step.
        fits: the largest batch that fits, if known.
    """
    verdict = "" if plan.fits else ": DOES NOT FIT"
    lines = [
        f"{plan.topology}: {plan.devices} devices, global batch {plan.batch_size:,}, "
        f"{plan.batch_size // plan.devices:,} rows each; {_WHOSE[plan.compiler]}",
        f"memory of a device   {_gib(plan.memory_bytes)} of {_gib(plan.capacity)}{verdict}",
        f"  state              {_gib(plan.state_bytes)}",
        f"  batch              {_gib(plan.batch_bytes)}",
    ]
    if plan.temporary_bytes is not None:
        lines.append(f"  temporary          {_gib(plan.temporary_bytes)}")
    if fits is not None:
        lines.append(f"largest batch        {fits:,} rows fit, from the memory at two sizes (estimate)")
    lines.append(f"matrix products      {plan.flops / 1e12:.3f} TFLOP a device and step, recomputation included")
    if plan.temporary_bytes is None:
        return "\n".join(lines)
    least, most = plan.estimated_seconds
    parts = ", ".join(
        f"{name} {_milliseconds(seconds, plan.most_seconds[name])}" for name, seconds in plan.least_seconds.items()
    )
    whose = "from the chip's peak rates" if "memory" in plan.least_seconds else "of the TPU compiler's, by operation"
    lines += [
        f"memory traffic       {plan.traffic / 1e9:.2f} GB at most",
        f"time of a step       {_milliseconds(least, most)} ms, an estimate {whose}",
        f"  milliseconds of    {parts}",
        f"  products alone     {1e3 * plan.peak_seconds:.1f} ms at the chip's peak rate, of which the step reaches "
        f"{_range(f'{100 * plan.peak_seconds / seconds:.0f}' for seconds in (most, least))} %",
        "collectives          bytes left on a device, times a step, devices in a group",
    ]
    lines += [
        f"  {exchange.operation:<20}{_megabytes(exchange.bytes):>12}  x {exchange.times:<6} {exchange.group}"
        for exchange in plan.exchanges[:_SHOWN]
    ]
    rest = plan.exchanges[_SHOWN:]
    if rest:
        sent = sum(exchange.sent for exchange in rest)
        lines.append(
            f"  and {sum(exchange.times for exchange in rest)} smaller ones that send {_megabytes(sent)} in all"
        )
    return "\n".join(lines)


_SHOWN = 12
_WHOSE: dict[Compiler, str] = {
    "TPU": "compiled by the TPU compiler, not run",
    "CPU": "compiled for simulated devices of this CPU, whose memory and traffic are not those of the chip; not run",
}


def _used_memory(message: str) -> int | None:
    """What a program would use, from a compiler's message that it does not fit."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of ", message)
    if found is None:
        return None
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if old[name] is None})
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)


def _gib(size: float) -> str:
    return f"{size / 2**30:8.3f} GiB"


def _milliseconds(*seconds: float) -> str:
    return _range(f"{1e3 * each:.1f}" for each in seconds)


def _range(numbers: Iterable[str]) -> str:
    """From the first to the last number, or one number where both are written alike."""
    return " to ".join(dict.fromkeys(numbers))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.3f} MB"
