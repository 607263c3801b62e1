"""Saves checkpoints as fast as it can, until it is killed; says in a file which save has begun.

python -m tests.faults.saver <directory of checkpoints> <file for the steps> <steps between saves>
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from repkit.train.checkpoint import Checkpointer

SIZE = 1 << 19
LIKE = {f"array_{index}": np.zeros(SIZE, np.float32) for index in range(4)}


def state_at(step: int) -> dict[str, jnp.ndarray]:
    """The state of a step, by which a restored one is known."""
    return {name: jnp.arange(SIZE, dtype=jnp.float32) + step + index for index, name in enumerate(LIKE)}


def main(directory: Path, begun: Path, interval: int) -> None:
    """Goes on from the newest step, for ever."""
    with Checkpointer(directory, keep_last=2) as checkpoints, begun.open("a") as file:
        step = checkpoints.restore(LIKE).step if checkpoints.steps() else 0
        print(f"restored {step}", flush=True)
        while True:
            step += interval
            checkpoints.wait()
            file.write(f"{step}\n")
            file.flush()
            checkpoints.save(step, state_at(step), {"position": step})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
