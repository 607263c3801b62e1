"""What a loss exchanges between devices, and holds on each: read from the compiled program, which is not run.

    python -m benchmarks.collectives geometric_consistency over_mesh 32768 512

Eight host devices stand in for a mesh; the rows of the embeddings are split over it. With "jit" the compiler finds out
what to exchange, with "over_mesh" the loss says it. It prints one line of JSON.
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from repkit.simulation import simulated_devices

Placement: TypeAlias = Literal["jit", "over_mesh"]

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


def in_subprocess(loss: str, placement: Placement, rows: int, width: int) -> dict[str, Any]:
    """What this module prints, from a process that has the devices."""
    command = (sys.executable, "-m", "benchmarks.collectives", loss, placement, str(rows), str(width))
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | simulated_devices(DEVICES))
    if run.returncode:
        raise RuntimeError(run.stderr.strip())
    return json.loads(run.stdout)


def describe(loss: str, placement: Placement, rows: int, width: int) -> dict[str, Any]:
    """The exchanges and the memory per device of a loss of two modalities with its gradients."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from repkit import losses

    functions = {
        "info_nce": functools.partial(losses.info_nce, logit_scale=14.3),
        "sigmoid_contrastive": functools.partial(losses.sigmoid_contrastive, logit_scale=10.0, logit_bias=-10.0),
        "geometric_consistency": functools.partial(
            losses.geometric_consistency, cross_modal_weight=0.25, in_modal_weight=0.25
        ),
    }
    if loss not in functions:
        raise SystemExit(f"no loss is called '{loss}' here; there are {', '.join(functions)}")
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    function = losses.over_mesh(functions[loss], mesh) if placement == "over_mesh" else functions[loss]
    embeds = jax.ShapeDtypeStruct((rows, width), "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(embeds, embeds).compile()
    memory = program.memory_analysis()
    return {
        "devices": DEVICES,
        "placement": placement,
        "collectives": [found._asdict() for found in collectives(program.as_text() or "")],
        "temporary_bytes": memory.temp_size_in_bytes if memory is not None else None,
    }


def main() -> None:
    """Prints what the named loss exchanges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss")
    parser.add_argument("placement", choices=get_args(Placement))
    parser.add_argument("rows", type=int)
    parser.add_argument("width", type=int)
    options = parser.parse_args()
    print(json.dumps(describe(options.loss, options.placement, options.rows, options.width)))


if __name__ == "__main__":
    main()
