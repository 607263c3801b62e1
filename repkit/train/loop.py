"""The training loop: steps, log lines, validation, checkpoints, and an orderly stop on a signal."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array

from repkit.checks import InputError
from repkit.train.checkpoint import Checkpointer
from repkit.train.interrupt import Interrupts
from repkit.train.logging import MetricLogger
from repkit.train.state import TrainState
from repkit.train.step import Batch, Metrics, Placement


class Batches(Protocol):
    """A stream of host batches that can say where it stands and be put there again."""

    corrupt: int

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Outcome(NamedTuple):
    """How a training run ended.

    Attributes:
        state: the final state, as a checkpoint keeps it.
        step: the number of steps made in all.
        interrupted: the name of the signal that ended the run early, or None.
    """

    state: TrainState
    step: int
    interrupted: str | None


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is no longer finite; the run has been stopped, with its checkpoints as they were."""


def fit(
    placement: Placement,
    batches: Batches,
    *,
    steps: int,
    key: Array,
    checkpointer: Checkpointer,
    logger: MetricLogger,
    interrupts: Interrupts,
    log_every: int,
    checkpoint_every: int,
    schedule: Callable[[int], Any],
    validate: Callable[[Any], Mapping[str, float]] | None = None,
    term_gradient_norms: Callable[[TrainState, Batch], Metrics] | None = None,
) -> Outcome:
    """Trains to a number of steps, from the newest checkpoint where there is one.

    A resumed run makes the very steps that the uninterrupted one would have made: the state holds every random key and
    moving average, and the batches go on at the next one.

    Args:
        placement: the placed update.
        batches: the stream of host batches.
        steps: the step at which training is complete.
        key: typed random key of the run.
        checkpointer: where states are kept; it is asked for its newest one first.
        logger: takes one row of metrics each `log_every` steps.
        interrupts: asked after each step whether a signal came; if so the state is saved and the loop ends.
        log_every: steps between log rows.
        checkpoint_every: steps between checkpoints; the last step is always kept.
        schedule: the learning rate by step, for the log.
        validate: from the parameters to metrics, run before each checkpoint; the best checkpoint is chosen by them.
        term_gradient_norms: from state and batch to each term's gradient norm, for the log rows; None for rows without.

    Raises:
        NonFiniteLoss: if the loss or the gradient of a step that is logged or saved is not finite.
        InputError: if the run that is to go on had another teacher.
    """
    state, step = _start(placement, batches, key, checkpointer)

    def save() -> None:
        quality: dict[str, float] = {}
        try:
            # A signal leaves little time; the state matters more than its quality.
            if validate is not None and interrupts.requested is None:
                quality = dict(validate(placement.get_state(state).evaluation_params))
                logger.log(step, quality)
        finally:
            checkpointer.save(step, placement.get_state(state), _position(placement, batches), quality)

    saved = step
    metrics: Metrics = {}
    while step < steps and interrupts.requested is None:
        host_batch = next(batches)
        batch = placement.put_batch(host_batch)
        is_logged = (step + 1) % log_every == 0 or step + 1 == steps
        norms = term_gradient_norms(state, batch) if is_logged and term_gradient_norms is not None else {}
        state, metrics = placement.update(state, batch)
        step += 1
        if is_logged:
            row = _row({**metrics, **norms})
            row |= {"learning_rate": float(schedule(step - 1)), "corrupt_examples": batches.corrupt}
            logger.log(step, row, examples=step * len(host_batch["where"]) * jax.process_count())
            _require_finite(metrics, step, saved)
        if step % checkpoint_every == 0 or step == steps:
            _require_finite(metrics, step, saved)
            save()
            saved = step
    if saved < step:
        _require_finite(metrics, step, saved)
        save()
    checkpointer.wait()
    return Outcome(placement.get_state(state), step, interrupts.requested if step < steps else None)


def _start(placement: Placement, batches: Batches, key: Array, checkpointer: Checkpointer) -> tuple[TrainState, int]:
    if checkpointer.latest_step() is None:
        return placement.init(key), 0
    restored = checkpointer.restore(placement.abstract)
    saved, here = (position.get("teacher") for position in (restored.data_position, _position(placement, batches)))
    if saved != here:
        saved, here = ("none" if teacher is None else f"{teacher[:12]}…" for teacher in (saved, here))
        raise InputError(f"cannot resume with another teacher: the run had {saved}, here it is {here}")
    batches.set_state(restored.data_position)
    return placement.put_state(restored.state), restored.step


def _position(placement: Placement, batches: Batches) -> dict[str, Any]:
    """Where the run stands in its data, and which teacher it learns from, be it in the step or in the batches."""
    position = batches.get_state()
    return position if placement.teacher_identity is None else {**position, "teacher": placement.teacher_identity}


def _row(metrics: Metrics) -> dict[str, float]:
    """The metrics as numbers, in the order in which a reader wants them: a terminal shows the first few."""

    def importance(name: str) -> int:
        if name in ("loss", "gradient_norm"):
            return 0 if name == "loss" else 3
        return 1 if name.endswith("/info_nce") else 2 if "/" not in name else 4

    values = jax.device_get(dict(metrics))
    return {name: float(values[name]) for name in sorted(values, key=importance)}


def _require_finite(metrics: Metrics, step: int, saved: int) -> None:
    loss, gradient_norm = (float(metrics[name]) for name in ("loss", "gradient_norm"))
    if not math.isfinite(loss + gradient_norm):
        raise NonFiniteLoss(
            f"the loss is {loss} and the gradient's norm {gradient_norm} at step {step}; "
            f"the newest checkpoint is step {saved}"
        )
