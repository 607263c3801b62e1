"""What the TPU's compiler says of the losses: they are compiled for a chip that is not here, and not run.

    python -m benchmarks.tpu                             all of them on a v5e; some minutes
    python -m benchmarks.tpu --chip v4 --only 'attention*'
    python -m benchmarks.tpu --output results.jsonl

Value and gradient of a loss on one chip, bfloat16 inputs. Cycles are the compiler's estimates of its operations, loops
as often as they turn, where the program's choices are cheap, as they are as a rule, and where they are dear; a kernel's
are the instructions that it schedules, taken as often as its loops turn. Beside them stand the cycles that the matrix
products would take at the chip's peak rate for bfloat16, and those of reading the inputs and writing the gradients
once. Needs the extra `tpu`.
"""

import argparse
import fnmatch
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import measure
from repkit import losses
from repkit.losses import _attention_kernel
from repkit.numerics import tracing_for
from repkit.plan.chips import CHIPS, has_tpu_compiler, topology
from repkit.plan.program import Bound, program_costs, traced_flops
from repkit.plan.step import target_devices

KERNEL = re.compile(r'%?([\w.\-]+) = .* custom-call\(.*custom_call_target="tpu_custom_call"')
BOUNDS: tuple[Bound, ...] = ("least", "most")
BUNDLE = re.compile(r"^\s*0x[0-9a-f]+\s+(?:[A-Z]+)?\s*:\s*(>*)")


class Case(NamedTuple):
    """A loss at a shape.

    Attributes:
        loss: of its inputs, to be differentiated in those before `fixed`.
        inputs: their shapes, in bfloat16.
        fixed: how many of the last inputs get no gradient.
        turns: of the loops of its kernel, the outer one first; empty without a kernel.
    """

    loss: Callable[..., jax.Array]
    inputs: tuple[tuple[int, ...], ...]
    fixed: int = 0
    turns: tuple[int, ...] = ()


def cases() -> dict[str, Case]:
    """By name."""
    rows = (16_384, 512)
    pairs = {
        "info_nce": functools.partial(losses.info_nce, logit_scale=20.0),
        "sigmoid_contrastive": functools.partial(losses.sigmoid_contrastive, logit_scale=10.0, logit_bias=-10.0),
        "geometric_consistency": losses.geometric_consistency,
    }
    found = {name: Case(loss, (rows, rows)) for name, loss in pairs.items()}
    examples, heads, tokens = 32, (6, 12), 197
    maps = tuple((examples, h, tokens, tokens) for h in heads)
    for variant in ("mse", "kl"):
        loss = functools.partial(losses.attention_map_alignment, variant=variant)
        turns = (examples, tokens // _attention_kernel.ROWS)
        found[f"attention_maps_{variant}"] = Case(loss, maps, 1, turns)
        # A given block size is walked by the compiler's operations.
        blocks = functools.partial(loss, form=losses.Blocks(size=tokens))
        found[f"attention_maps_{variant}, no kernel"] = Case(blocks, maps, 1)
    return found


def compiled(case: Case, chip: str, dump: Path) -> measure.Row:
    """What the compiler says of a case."""
    devices, _ = target_devices(topology(f"{chip}-{min(CHIPS[chip].slices or (1,))}"))
    sharding = NamedSharding(Mesh(devices[:1], ("data",)), PartitionSpec())
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in case.inputs]
    learned = tuple(range(len(inputs) - case.fixed))
    with tracing_for("tpu"):
        traced = jax.jit(jax.value_and_grad(case.loss, learned)).trace(*inputs)
        program = traced.lower().compile()
    text, clock, memory = program.as_text() or "", CHIPS[chip].clock, program.memory_analysis()
    assert clock is not None
    assert memory is not None
    kernels = sum(scheduled_cycles(dump, name, case.turns) for name in KERNEL.findall(text))
    operations = [program_costs(text, bound).cycles for bound in BOUNDS]
    moved = sum(x.size * x.dtype.itemsize for x in inputs) + sum(inputs[i].size * 2 for i in learned)
    return {
        "chip": chip,
        "clock": clock,
        "operation_cycles": operations,
        "kernel_cycles": kernels,
        "product_cycles": traced_flops(traced.jaxpr, "least") / CHIPS[chip].flops * clock,
        "memory_cycles": moved / CHIPS[chip].memory_bandwidth * clock,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def scheduled_cycles(dump: Path, kernel: str, turns: Sequence[int]) -> float:
    """Instructions of a kernel's schedule, one a cycle, those in a loop as often as it turns."""
    listing = max(dump.glob(f"*-{kernel}-*-final_bundles.txt"), key=lambda path: ("schedule" not in path.name, path))
    depths = [len(match[1]) for line in listing.read_text().splitlines() if (match := BUNDLE.match(line))]
    times = [1]
    for number in turns:
        times.append(times[-1] * number)
    return float(sum(times[depth] for depth in depths))


def table(rows: Sequence[measure.Row]) -> Iterator[str]:
    """The lines of the table."""
    yield f"{'':<34}{'operations':>20}{'kernel':>9}{'milliseconds':>16}{'products':>10}{'memory':>8}{'temporary':>11}"
    yield f"{'':<34}{'Mcycles':>20}{'Mcycles':>9}{'':>16}{'Mcycles':>10}{'Mcycles':>8}{'MiB':>11}"
    for row in rows:
        low, high = row["operation_cycles"]
        times = [1e3 * (each + row["kernel_cycles"]) / row["clock"] for each in (low, high)]
        millions = [f"{row[name] / 1e6:.2f}" for name in ("kernel_cycles", "product_cycles", "memory_cycles")]
        kernel, products, memory = millions
        yield (
            f"{row['loss']:<34}{_range(low / 1e6, high / 1e6):>20}{kernel:>9}{_range(*times):>16}"
            f"{products:>10}{memory:>8}{row['temporary_bytes'] / 2**20:>11.1f}"
        )


def _range(low: float, high: float) -> str:
    ends = f"{low:.2f}", f"{high:.2f}"
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e", choices=[name for name, chip in CHIPS.items() if chip.slices])
    parser.add_argument("--only", default="*", help="pattern of the names of what is compiled")
    parser.add_argument("--output", type=Path, help="file that the rows are added to, as JSON lines")
    options = parser.parse_args(arguments)
    if not has_tpu_compiler():
        print("the TPU's compiler is not installed: pip install 'repkit[tpu]'", file=sys.stderr)
        return 2
    chosen = {name: case for name, case in cases().items() if fnmatch.fnmatch(name, options.only)}
    if not chosen:
        print(f"nothing is called '{options.only}'; there are {', '.join(cases())}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        # Read once, when the compiler is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        # A program from the cache would leave no listing.
        jax.config.update("jax_enable_compilation_cache", False)
        rows: list[Any] = []
        for name, case in chosen.items():
            rows.append({**measure.about(), "kind": "tpu", "loss": name, **compiled(case, options.chip, Path(folder))})
    print(f"{options.chip}, compiled and not run")
    print("\n".join(table(rows)))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
