"""One process of several that make a training step together; `test_processes.py` starts them.

    python step_of_processes.py COORDINATOR PROCESS PROCESSES MESH OUTPUT

It feeds the rows that its devices compute, and the first process saves the gradient.
"""

import functools
import json
import sys
from collections.abc import Mapping

import jax
import numpy as np
import optax

from repkit.train.mesh import MeshConfig, batch_axes, batch_share
from repkit.train.state import init_state
from repkit.train.step import jit_placement, make_update
from tests.reference import every_loss

NAMES = ("global_contrastive",)
SGD = optax.sgd(1.0)


def rows_of(batch: Mapping[str, np.ndarray], index: int, count: int) -> dict[str, np.ndarray]:
    """Share `index` of `count`."""
    return {name: np.split(x, count)[index] for name, x in batch.items()}


def gradient(axes: dict[str, int]) -> dict[str, np.ndarray]:
    """The gradient of one step on all devices of all processes, in every process."""
    from jax.experimental import multihost_utils

    mesh = MeshConfig(**axes).make()
    objective = every_loss.objective(NAMES).over_mesh(mesh, batch_axes(mesh))
    placement = jit_placement(
        make_update(every_loss.forward, objective, SGD, micro_batches=2),
        lambda key: init_state(functools.partial(every_loss.init, NAMES), SGD, objective, key=key),
        mesh,
    )

    def whole(tree):
        return {
            jax.tree_util.keystr(path): np.asarray(
                multihost_utils.process_allgather(leaf, tiled=True) if jax.process_count() > 1 else leaf
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    state = placement.init(jax.random.key(1))
    before = whole(state.params)
    share = batch_share(mesh)
    rows = rows_of(every_loss.batch("uneven"), share.index, share.count)
    state, _ = placement.update(state, placement.put_batch(rows))
    after = whole(state.params)
    return {name: before[name] - after[name] for name in before}


def main() -> None:
    coordinator, process, processes, mesh, output = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(process))
    found = gradient(json.loads(mesh))
    if jax.process_index() == 0:
        np.savez(output, **found)


if __name__ == "__main__":
    main()
