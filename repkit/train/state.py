"""The training state: everything that a step changes and a checkpoint keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from repkit.objective import Objective


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes.

    Attributes:
        step: number of updates made.
        params: the model's parameters.
        optimizer_state: the state of the optax optimizer.
        memories: the losses' memories by term name.
        ema: exponential moving average of the parameters, or None.
        key: the run's typed random key; a step folds its number into it, so it never changes.
    """

    step: Int[Array, ""]
    params: Any
    optimizer_state: Any
    memories: dict[str, Any]
    ema: Any
    key: Array

    @property
    def evaluation_params(self) -> Any:
        """The parameters to evaluate: the moving average where one is kept."""
        return self.params if self.ema is None else self.ema


def init_state(
    init: Callable[[Array], Any],
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    key: Array,
    ema: bool = False,
) -> TrainState:
    """Makes the state before the first step; a pure function, so that `jax.jit` can make it already sharded.

    Args:
        init: from a key to the model's parameters.
        optimizer: the optax optimizer.
        objective: gives the losses' initial memories.
        key: typed random key of the run.
        ema: whether to keep a moving average of the parameters.
    """
    init_key, run_key = jax.random.split(key)
    params = init(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_state=optimizer.init(params),
        memories=objective.init_memories(),
        # A copy: the parameters' buffers are donated to the step, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        key=run_key,
    )
