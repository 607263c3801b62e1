"""What a program costs, read from its text as the compiler left it, and from the operations that were traced.

The compiler's own count takes the body of a loop once; here it is taken as often as it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
# They move nothing, or what they move is counted where it is done.
_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "iota", "copy-done", "opt-barrier", "async-done", "async-update",
    }
)  # fmt: skip
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<operation>[a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
# The memory space of a TPU's core, which operations read at the speed of their arithmetic.
_ON_CHIP = "S(1)"
_CALLED = re.compile(
    r"\b(?P<role>body|condition|to_apply|calls|true_computation|false_computation)=%?(?P<name>[\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{(?P<names>[^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]\s*\{(?P<axes>[^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CONSTANT = re.compile(r" constant\((-?\d+)\)")
_ELEMENT = re.compile(r"index=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Exchange(NamedTuple):
    """A collective operation of a program, on each device.

    Attributes:
        operation: such as "all-reduce".
        group: devices among which it is done; 0 where the text does not say.
        bytes: what it leaves on the device.
        times: how often it is done in one run.
    """

    operation: str
    group: int
    bytes: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run, around a ring of the group."""
        share = (self.group - 1) / self.group if self.group else 1.0
        if self.operation == "all-reduce":
            return 2 * share * self.bytes * self.times
        if self.operation == "reduce-scatter":
            return share * self.group * self.bytes * self.times
        if self.operation in ("all-gather", "all-to-all", "ragged-all-to-all"):
            return share * self.bytes * self.times
        return float(self.bytes * self.times)


class Costs(NamedTuple):
    """What one run costs each device.

    Attributes:
        exchanges: the collectives, those of one kind and size together.
        traffic: bytes that its operations read from memory and write to it, were nothing kept in caches: an upper
            bound, for an operation that reads a part of an array counts as one that reads all of it.
        cycles: that its operations take by the estimate of the compiler, of transfers between them none; 0 from a
            compiler that makes no estimate, as only that of TPUs does.
    """

    exchanges: tuple[Exchange, ...]
    traffic: float
    cycles: float


class _Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    line: str


Bound: TypeAlias = Literal["least", "most"]
"""Where a program chooses: the cheapest branches, and no turn of a loop whose number of turns is not known; or the
dearest branches, and one turn."""


def program_costs(text: str, bound: Bound = "most") -> Costs:
    """Reads the text of a compiled program, as `jax.stages.Compiled.as_text` gives it.

    Args:
        text: the program.
        bound: what counts where it chooses.

    Example:
        >>> text = '''
        ... ENTRY %main (x: f32[8]) -> f32[64] {
        ...   %x = f32[8]{0} parameter(0)
        ...   ROOT %all = f32[64]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
        ... }'''
        >>> program_costs(text)
        Costs(exchanges=(Exchange(operation='all-gather', group=8, bytes=256, times=1),), traffic=288.0, cycles=0.0)
    """
    computations, entry = _computations(text)
    if not entry:
        return Costs((), 0.0, 0.0)
    cost = _cost(computations, entry, bound, is_fused=False)
    found = tuple(Exchange(*kind, times) for kind, times in cost.exchanges.items())
    return Costs(tuple(sorted(found, key=lambda exchange: -exchange.sent)), cost.traffic, cost.cycles)


class _Cost(NamedTuple):
    """As `Costs`; the exchanges by operation, group and bytes."""

    exchanges: Counter[tuple[str, int, int]]
    traffic: float
    cycles: float

    def plus(self, other: "_Cost", times: int = 1) -> "_Cost":
        exchanges = self.exchanges + Counter({kind: times * number for kind, number in other.exchanges.items()})
        return _Cost(exchanges, self.traffic + times * other.traffic, self.cycles + times * other.cycles)


def _cost(computations: dict[str, list[_Instruction]], name: str, bound: Bound, *, is_fused: bool) -> _Cost:
    """Of one run of a computation and of all that it calls; the inside of a fused operation has exchanges alone."""
    total = _Cost(Counter(), 0.0, 0.0)
    sizes = {instruction.name: _memory_bytes(instruction.shape) for instruction in computations[name]}
    for instruction in computations[name]:
        operation = instruction.operation.removesuffix("-start")
        if operation in _COLLECTIVES:
            total.exchanges[operation, _group(instruction.line), _result_bytes(instruction)] += 1
        if not is_fused and operation not in _FREE and not operation.endswith("-done"):
            traffic, cycles = sizes[instruction.name], _CYCLES.search(instruction.line)
            if instruction.operation != "copy-start":  # whose result names what it reads as well
                traffic += sum(sizes.get(operand, 0) for operand in _operands(instruction))
            total = total.plus(_Cost(Counter(), traffic, float(cycles[1]) if cycles else 0.0))
        inside = is_fused or operation not in ("while", "conditional", "call")
        called = [
            _cost(computations, other, bound, is_fused=inside)
            for other in _called(instruction)
            if other in computations
        ]
        if operation == "conditional" and called:
            choose = max if bound == "most" else min
            called = [choose(called, key=lambda cost: (cost.cycles, cost.traffic))]
        turns = _turns(computations, name, instruction) if operation == "while" else 1
        if turns is None:
            turns = 1 if bound == "most" else 0
        for cost in called:
            total = total.plus(cost, turns)
    return total


def _called(instruction: _Instruction) -> list[str]:
    called = [match["name"] for match in _CALLED.finditer(instruction.line)]
    for branches in _BRANCHES.finditer(instruction.line):
        called += _OPERAND.findall(branches["names"])
    return called


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if (opened := _COMPUTATION.match(line)) is not None:
            current = computations.setdefault(opened["name"], [])
            entry = opened["name"] if opened["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)) is not None:
            current.append(_Instruction(found["name"], found["shape"], found["operation"], line))
    return computations, entry


def _turns(computations: dict[str, list[_Instruction]], where: str, loop: _Instruction) -> int | None:
    """As the compiler says; that of TPUs does not, but its loops count up by one to a constant in their condition. None
    where neither is so."""
    if (known := _TRIPS.search(loop.line)) is not None:
        return int(known[1])
    condition = {match["role"]: match["name"] for match in _CALLED.finditer(loop.line)}.get("condition", "")
    test = {each.name: each for each in computations.get(condition, ())}
    last = next((each for each in test.values() if each.line.lstrip().startswith("ROOT")), None)
    if last is None or last.operation != "compare" or "direction=LT" not in last.line:
        return None
    counter, limit = (test.get(name) for name in _operands(last))
    end = None if limit is None else _CONSTANT.search(limit.line)
    place = None if counter is None else _ELEMENT.search(counter.line)
    if end is None or place is None:
        return None
    around = {each.name: each for each in computations[where]}
    initial = around.get(_operands(loop)[0])
    first = None if initial is None or initial.operation != "tuple" else around.get(_operands(initial)[int(place[1])])
    while first is not None and first.operation == "copy":
        first = around.get(_operands(first)[0])
    begin = None if first is None else _CONSTANT.search(first.line)
    return max(int(end[1]) - (int(begin[1]) if begin else 0), 1)


def _operands(instruction: _Instruction) -> list[str]:
    return _OPERAND.findall(instruction.line.partition(f" {instruction.operation}(")[2].partition(")")[0])


def _memory_bytes(shape: str) -> int:
    """Of an array's shape, or of all in a tuple's, that lie in memory."""
    return sum(_array_bytes(kind, sizes) for kind, sizes, layout in _SHAPE.findall(shape) if _ON_CHIP not in layout)


def _array_bytes(kind: str, sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size) * _BITS.get(kind, 32) // 8


def _result_bytes(instruction: _Instruction) -> int:
    """Without the operands that the result of an asynchronous start holds as well."""
    shapes = [_array_bytes(kind, sizes) for kind, sizes, _ in _SHAPE.findall(instruction.shape)]
    if not instruction.operation.endswith("-start") or instruction.operation.startswith("all-reduce"):
        return sum(shapes)
    # (operands, results, counters of some bytes)
    arrays = [size for size in shapes if size > 8] or shapes
    return sum(arrays[len(arrays) // 2 :])


def _group(line: str) -> int:
    if (over := _MESH_GROUPS.search(line)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", over["sizes"]))
        # A part of an axis is written as 'axis':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", over["axes"])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    groups = _GROUPS.search(line)
    if groups is None:
        return 0
    return int(groups[2]) if groups[2] else len(groups[3].split(","))


def traced_flops(jaxpr: Any, bound: Bound = "most") -> float:
    """Operations of the matrix products and convolutions of a traced program, over all devices.

    A loop counts as often as it runs, and what is computed again for a gradient counts again.

    Args:
        jaxpr: such as `jax.make_jaxpr` gives it.
        bound: what counts where it chooses.

    Example:
        >>> import jax.numpy as jnp
        >>> product = lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y @ y, x)
        >>> traced_flops(jax.make_jaxpr(product)(jnp.ones((4, 4))))
        384.0
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        inner = [traced_flops(other, bound) for value in parameters.values() for other in _jaxprs(value)]
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
        elif name == "scan":
            total += parameters["length"] * sum(inner)
        elif name == "cond":
            total += (max if bound == "most" else min)(inner, default=0.0)
        elif name == "while":
            total += sum(inner) if bound == "most" else 0.0
        elif name == "shard_map":
            mesh = parameters["mesh"]
            axes = parameters.get("newly_manual_axes", parameters.get("manual_axes", mesh.axis_names))
            total += math.prod(mesh.shape[axis] for axis in axes) * sum(inner)
        else:
            total += sum(inner)
    return total


def _jaxprs(value: Any) -> Iterator[Any]:
    if hasattr(getattr(value, "jaxpr", value), "eqns"):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _jaxprs(one)


def device_bytes(abstract: Any) -> int:
    """Bytes of arrays on each device, from shapes with shardings."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
