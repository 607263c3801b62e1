"""What a loss exchanges between devices, and holds on each: read from the compiled program, which is not run.

    python -m benchmarks.collectives geometric_consistency 32768 512

Eight host devices stand in for a mesh; the arrays' rows are split over it. It prints one line of JSON.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

DEVICES = 8

_OPERATIONS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
# As in `name = f32[8,4]{1,0} all-reduce(...)`, or with a tuple of shapes. Of an asynchronous pair -done is left out.
_COLLECTIVE = re.compile(rf"= (?P<shapes>\([^=]*?\)|\S+) (?P<operation>{_OPERATIONS})(?:-start)?\(")
_SHAPE = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One exchange of a compiled program, and how many elements it leaves on each device."""

    operation: str
    elements: int


def collectives(program: str) -> list[Collective]:
    """The exchanges in the text of a compiled program, as `jax.stages.Compiled.as_text` gives it.

    One inside a loop is found once. Of an asynchronous one the operands may be counted with the results.
    """
    found = []
    for match in _COLLECTIVE.finditer(program):
        shapes = _SHAPE.findall(match["shapes"])
        elements = sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)
        found.append(Collective(match["operation"], elements))
    return found


def in_subprocess(loss: str, rows: int, width: int) -> dict[str, Any]:
    """What this module prints, from a process that has the devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    command = (sys.executable, "-m", "benchmarks.collectives", loss, str(rows), str(width))
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(run.stderr.strip())
    return json.loads(run.stdout)


def describe(loss: str, rows: int, width: int) -> dict[str, Any]:
    """The exchanges and the memory per device of a loss of embeddings with its gradients."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from benchmarks.cases import FAMILIES
    from benchmarks.measure import value_and_gradients

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    problem = FAMILIES[loss].problem(rows, width)

    def placed(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("data") if array.shape[:1] == (rows,) else PartitionSpec()
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    arrays = jax.tree.map(placed, jax.eval_shape(lambda: problem.arrays("float32")))
    function = value_and_gradients(problem.entrants[0].function, tuple(range(problem.learned)))
    program = jax.jit(function).lower(*arrays).compile()
    memory = program.memory_analysis()
    return {
        "devices": DEVICES,
        "collectives": [found._asdict() for found in collectives(program.as_text() or "")],
        "temporary_bytes": memory.temp_size_in_bytes if memory is not None else None,
    }


def main() -> None:
    """Prints what the named loss exchanges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss")
    parser.add_argument("rows", type=int)
    parser.add_argument("width", type=int)
    options = parser.parse_args()
    print(json.dumps(describe(options.loss, options.rows, options.width)))


if __name__ == "__main__":
    main()
