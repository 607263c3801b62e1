"""Steps whose loss or gradient is no number: never applied to the state, found again, and answered by a policy."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from repkit.numerics import AxisName
from repkit.train.state import TrainState

NonFinitePolicy = Literal["skip", "roll_back", "stop"]
"""What a run does after a step that is not finite, whose update is left out under each of them:

- `skip` goes on with the next batch, and stops after `MOST_IN_A_ROW` such steps in a row.
- `roll_back` goes on from the newest checkpoint with the next batch, and stops when that has happened `MOST_IN_A_ROW`
  times without a new checkpoint.
- `stop` ends the run, with its checkpoints as they were.
"""

MOST_IN_A_ROW = 10

SKIPPED = "skipped"
"""The metric of a step that is 1 where its update was left out, else 0."""


class NonFiniteStep(NamedTuple):
    """A step whose update was left out.

    Attributes:
        step: the step.
        terms: the loss terms that were not finite; "gradient" where all of them were.
        example_ids: the examples of its batch that this process fed.
    """

    step: int
    terms: list[str]
    example_ids: list[int]


def require_finite_update(
    old: TrainState,
    new: TrainState,
    loss: Float[Array, ""],
    gradient_norm: Float[Array, ""],
    axis_name: AxisName | None = None,
) -> tuple[TrainState, Float[Array, ""]]:
    """The new state if loss and gradient are finite, else the old one with only the step's number moved on.

    All devices decide alike: what they look at is global, and with a mapped axis one device that sees a value that is
    not finite speaks for all.

    Args:
        old: before the update.
        new: after it.
        loss: the weighted total over all rows.
        gradient_norm: of the whole gradient; it is not finite if any entry is not.
        axis_name: as for `make_update`.

    Returns:
        The state to go on with, and 1 where the update was left out, else 0.

    Example:
        >>> key = jax.random.key(0)
        >>> old, new = (TrainState(jnp.int32(n), {"w": jnp.float32(n)}, (), {}, None, key) for n in (3, 4))
        >>> state, skipped = require_finite_update(old, new, jnp.float32(1.0), jnp.float32(jnp.nan))
        >>> int(state.step), float(state.params["w"]), float(skipped)
        (4, 3.0, 1.0)
    """
    is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if axis_name is not None:
        is_finite = jax.lax.pmin(is_finite.astype(jnp.int32), axis_name) == 1

    def kept(before: Any, after: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(is_finite, y, x), before, after)

    # The memory of a term that is gone goes with it.
    old = replace(old, memories={name: old.memories[name] for name in new.memories})
    parts = ("params", "optimizer_state", "memories", "ema")
    state = replace(new, **{part: kept(getattr(old, part), getattr(new, part)) for part in parts})
    return state, 1.0 - is_finite.astype(jnp.float32)


class UnexaminedSteps:
    """The steps that were made since somebody looked; their metrics are still on the device."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, np.ndarray | None, Mapping[str, Any]]] = []
        self._in_a_row = 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, host_batch: Mapping[str, np.ndarray], metrics: Mapping[str, Any]) -> None:
        """Notes a step with its batch and its metrics."""
        self._steps.append((step, host_batch.get("example_id"), metrics))

    def examine(self) -> tuple[list[NonFiniteStep], int]:
        """Waits for the steps.

        Returns:
            Those whose update was left out, and how many followed one another at most, those before the last call
            included.
        """
        steps, self._steps = self._steps, []
        found, longest = [], self._in_a_row
        flags = jax.device_get([metrics[SKIPPED] for _, _, metrics in steps])
        for (step, example_ids, metrics), skipped in zip(steps, flags, strict=True):
            self._in_a_row = self._in_a_row + 1 if skipped else 0
            longest = max(longest, self._in_a_row)
            if skipped:
                ids = [] if example_ids is None else example_ids.tolist()
                found.append(NonFiniteStep(step, _non_finite_terms(metrics), ids))
        return found, longest


def _non_finite_terms(metrics: Mapping[str, Any]) -> list[str]:
    values = jax.device_get(dict(metrics))
    # Behind a slash are diagnostics, some of which are infinite by right.
    terms: Iterable[str] = (name for name in values if "/" not in name and name not in ("loss", "gradient_norm"))
    return [name for name in terms if not np.isfinite(values[name])] or ["gradient"]
