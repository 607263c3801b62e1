"""Compares programs on one problem: time in turns, compile time, temporary memory, and what the machine can do.

A problem is a loss at a shape; its entrants are ours, its peers, and programs that show a limit: the same matrix
products and nothing else, or a copy of the same arrays. All entrants get the same arrays, as arguments, and run in
turns, so that a change of the machine's speed meets all of them alike: read the ratios, not the times.
"""

import contextlib
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from benchmarks import torch_peers

Role: TypeAlias = Literal["ours", "peer", "limit", "machine"]
Row: TypeAlias = dict[str, Any]
Arrays: TypeAlias = tuple[Any, ...]

FEWEST, MOST = 3, 30
"""Timed samples of an entrant, whatever the time that it may take."""

SHORTEST_SAMPLE = 5e-3
"""Seconds; faster programs are called several times for one sample."""

WARM_UP = 0.1
"""Seconds of calls before the first sample, but no more than the samples themselves may take."""

MACHINE_DTYPE = "float32"
"""In which the machine's rates are measured."""

PAUSE = 0.02
"""Seconds before each sample, in which the threads of the program before it stop spinning."""

SHARE_OF_FREE_MEMORY = 0.8
"""What an entrant may allocate of the memory that is free, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One program for a problem.

    Attributes:
        name: in tables and rows.
        role: ours and peers are losses, and are differentiated; limits and the machine's rates are run as they are.
        function: of the problem's arrays. A loss returns a scalar, or a scalar and what else it computes.
        flops: floating-point operations of its matrix products, value and gradient; None where they do not describe it.
        traffic: array elements that it cannot avoid to read and write; None where they do not describe it.
        learned: the arguments that it is differentiated in, where they are not the problem's.
        package: what the function is written in.
        estimated_memory: bytes of intermediate results, for a package that does not tell before it runs.
    """

    name: str
    role: Role
    function: Callable[..., Any]
    flops: float | None = None
    traffic: float | None = None
    learned: tuple[int, ...] | None = None
    package: Literal["jax", "torch"] = "jax"
    estimated_memory: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A loss at a shape, and who competes on it.

    Attributes:
        loss: its name.
        shape: name of each dimension to its size.
        arrays: makes the arguments of the entrants' functions, in a floating-point type.
        learned: how many of the arguments, from the first, the losses are differentiated in.
        entrants: ours first.
    """

    loss: str
    shape: Mapping[str, int]
    arrays: Callable[[str], Arrays]
    learned: int
    entrants: tuple[Entrant, ...]

    @property
    def name(self) -> str:
        """Such as info_nce/4096x512."""
        return f"{self.loss}/{'x'.join(map(str, self.shape.values()))}"


class Budget(NamedTuple):
    """What a comparison may take.

    Attributes:
        seconds: of samples per entrant; there are at least `FEWEST` samples.
        memory: bytes that an entrant may allocate; None for a share of what is free.
        compiler_options: of XLA; none where times are to mean anything.
    """

    seconds: float
    memory: float | None
    compiler_options: Mapping[str, Any]


class Skipped(Exception):
    """An entrant cannot take part; the message says why."""


# ---------------------------------------------------------------------------------------------------------------------
# One problem


def compare(problem: Problem, machine: Problem, dtype: str, budget: Budget) -> list[Row]:
    """A row of results for each entrant and each rate of the machine; a skipped or failed entrant's row says so."""
    rows: dict[str, Row] = {}
    warm: dict[str, Warm] = {}
    for each, arrays in ((problem, problem.arrays(dtype)), (machine, machine.arrays(MACHINE_DTYPE))):
        for entrant in each.entrants:
            row: Row = {
                "kind": "time",
                "loss": problem.loss,
                "shape": dict(problem.shape),
                "dtype": dtype,
                "entrant": entrant.name,
                "role": entrant.role,
            }
            rows[entrant.name] = row
            with _reporting(row, f"{problem.name}: {entrant.name}"):
                learned = entrant.learned or tuple(range(each.learned))
                run = _prepare(entrant, learned, arrays, budget, row)
                warm[entrant.name] = warm_up(run, min(WARM_UP, budget.seconds))
                if entrant.role in ("ours", "peer"):
                    row["value"] = warm[entrant.name].value
    for name, timing in in_turns(warm, seconds=budget.seconds).items():
        rows[name] |= timing
    for entrant in problem.entrants:
        _add_rates(rows[entrant.name], entrant, dtype)
    for entrant in machine.entrants:
        _add_rates(rows[entrant.name], entrant, MACHINE_DTYPE)
    _add_ratios(rows[problem.entrants[0].name], list(rows.values()))
    return list(rows.values())


@contextlib.contextmanager
def _reporting(row: Row, name: str) -> Iterator[None]:
    """Writes into the row, and onto the terminal, why an entrant is missing; the others go on."""
    try:
        yield
    except Skipped as reason:
        row["skipped"] = str(reason)
        print(f"{name}: skipped, {reason}", flush=True)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        print(f"{name}: FAILED", file=sys.stderr)
        traceback.print_exc()


def _prepare(entrant: Entrant, learned: tuple[int, ...], arrays: Arrays, budget: Budget, row: Row) -> Callable[[], Any]:
    """The entrant as a program of no arguments, with what is known before it runs in the row."""
    if entrant.package == "torch":
        reason = torch_peers.missing(arrays)
        if reason is not None:
            raise Skipped(reason)
        _require_memory(entrant.estimated_memory, budget)
        run = torch_peers.value_and_gradients(entrant.function, learned, arrays)
        row["temporary_bytes"] = torch_peers.temporary_bytes(run)
        return run
    function = value_and_gradients(entrant.function, learned) if entrant.role in ("ours", "peer") else entrant.function
    lowered = jax.jit(function).lower(*arrays)
    start = time.perf_counter()
    program = lowered.compile(dict(budget.compiler_options))
    row["compile_seconds"] = time.perf_counter() - start
    memory = program.memory_analysis()
    if memory is not None:
        row["temporary_bytes"] = memory.temp_size_in_bytes
        _require_memory(memory.temp_size_in_bytes + memory.output_size_in_bytes, budget)
    return lambda: jax.block_until_ready(program(*arrays))


def value_and_gradients(loss: Callable[..., Any], learned: tuple[int, ...]) -> Callable[..., Any]:
    """Value and gradients in some arguments.

    What a loss returns beside its value stays an output, so that the compiler cannot leave it out.
    """

    def with_rest(*arrays: Any) -> tuple[jax.Array, Any]:
        result = loss(*arrays)
        return result if isinstance(result, tuple) else (result, ())

    return jax.value_and_grad(with_rest, argnums=learned, has_aux=True)


def _require_memory(needed: float, budget: Budget) -> None:
    free = free_memory()
    allowed = budget.memory if budget.memory is not None else free and SHARE_OF_FREE_MEMORY * free
    if allowed is not None and needed > allowed:
        raise Skipped(f"needs {needed / 2**30:.1f} GiB, and may take {allowed / 2**30:.1f} GiB")


class Warm(NamedTuple):
    """A program that has run: how long its last call took, and the first number of its result."""

    run: Callable[[], Any]
    seconds: float
    value: float


def warm_up(run: Callable[[], Any], seconds: float) -> Warm:
    """Calls the program for so long, at least once."""
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        result = run()
        end = time.perf_counter()
        value = float(jax.tree.leaves(result)[0].ravel()[0])
        del result
        if end - begin >= seconds:
            return Warm(run, end - start, value)


def in_turns(programs: Mapping[str, Warm], *, seconds: float) -> dict[str, Row]:
    """Median, quartiles, best and number of the samples of each program; one sample of each before the next of any."""
    calls = {name: max(1, math.ceil(SHORTEST_SAMPLE / program.seconds)) for name, program in programs.items()}
    samples: dict[str, list[float]] = {name: [] for name in programs}

    def has_enough(name: str) -> bool:
        taken = samples[name]
        return len(taken) >= FEWEST and (len(taken) >= MOST or sum(taken) * calls[name] >= seconds)

    while waiting := [name for name in programs if not has_enough(name)]:
        for name in waiting:
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(calls[name]):
                programs[name].run()
            samples[name].append((time.perf_counter() - start) / calls[name])
    return {name: _summary(taken) for name, taken in samples.items()}


def _summary(samples: Sequence[float]) -> Row:
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median_seconds": median,
        "quartiles_seconds": [lower, upper],
        "best_seconds": min(samples),
        "repetitions": len(samples),
    }


def _add_rates(row: Row, entrant: Entrant, dtype: str) -> None:
    if "median_seconds" in row:
        if entrant.flops is not None:
            row["gflops_per_second"] = entrant.flops / row["median_seconds"] / 1e9
        if entrant.traffic is not None:
            row["gbytes_per_second"] = entrant.traffic * jnp.dtype(dtype).itemsize / row["median_seconds"] / 1e9


def _add_ratios(ours: Row, rows: Sequence[Row]) -> None:
    """How ours stands to each peer and each limit; the peers' memory also where they could not be run."""

    def ratios(role: Role, quantity: str) -> dict[str, float]:
        return {
            row["entrant"]: row[quantity] / ours[quantity]
            for row in rows
            if row["role"] == role and row.get(quantity) and ours.get(quantity)
        }

    ours["times_faster_than"] = ratios("peer", "median_seconds")
    ours["times_smaller_than"] = ratios("peer", "temporary_bytes")
    ours["share_of_limit"] = ratios("limit", "median_seconds")
    machine = ratios("machine", "gflops_per_second") | ratios("machine", "gbytes_per_second")
    ours["share_of_machine"] = {name: 1 / ratio for name, ratio in machine.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def machine(size: int) -> Problem:
    """The rates of one large matrix product, and of reading an array and writing another that fit in no cache."""
    length = 16 * size**2

    def arrays(dtype: str) -> Arrays:
        square, line = jax.random.normal(jax.random.key(0), (size, size), dtype), jnp.ones(length, dtype)
        return square, line

    return Problem(
        loss="machine",
        shape={"size": size},
        arrays=arrays,
        learned=0,
        entrants=(
            Entrant(
                name="matrix product",
                role="machine",
                function=lambda square, line: square @ square,
                flops=2.0 * size**3,
            ),
            Entrant(name="streaming copy", role="machine", function=lambda square, line: -line, traffic=2.0 * length),
        ),
    )


def free_memory() -> float | None:
    """Bytes that can still be allocated on the first device; None where nobody tells."""
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device and "bytes_limit" in statistics_of_device:
        return statistics_of_device["bytes_limit"] - statistics_of_device["bytes_in_use"]
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    return next(1024.0 * int(line.split()[1]) for line in table.read_text().splitlines() if "MemAvailable" in line)


def about() -> Row:
    """What a row of results must say of its origin."""
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "optax", "torch", "repkit"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Of the checkout that this file is in, with a + where files differ from it."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run((*git, "status", "--porcelain", "-uno"), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes.stdout.strip() else "")
