"""The training loop: steps, log lines, validation, checkpoints, and an orderly stop on a signal."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array

from repkit.checks import InputError
from repkit.train.checkpoint import Checkpointer
from repkit.train.interrupt import Interrupts
from repkit.train.logging import MetricLogger
from repkit.train.non_finite import MOST_IN_A_ROW, SKIPPED, NonFinitePolicy, NonFiniteStep, UnexaminedSteps
from repkit.train.processes import largest, on_this_process
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
    """The loss or its gradient was not finite, and the policy says to stop; the checkpoints are as they were."""


AGREE_EVERY = 10
"""Steps after which several processes agree whether one of them was asked to stop: all must stop at the same step."""

MOST_UNEXAMINED = 100
"""Steps after which the loop waits for the devices to know whether all of them were finite, if it logs more rarely."""

_SHOWN_EXAMPLES = 8


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
    non_finite: NonFinitePolicy = "skip",
    beat: Callable[[str], None] = lambda doing: None,
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
        non_finite: what follows a step whose loss or gradient is not finite, see
            `repkit.train.non_finite.NonFinitePolicy`. It is noticed at the next log row or checkpoint, or after
            `MOST_UNEXAMINED` steps; the log then names the step, the terms and the examples.
        beat: told what the loop begins to do, for `repkit.train.watchdog.Watchdog`.

    Raises:
        NonFiniteLoss: if a step was not finite and the policy says to stop.
        SaveFailedError: if a checkpoint cannot be written.
        InputError: if the run that is to go on had another teacher.
    """
    state, step, skipped_steps = _start(placement, batches, key, checkpointer)
    unexamined = UnexaminedSteps()
    rolled_back = 0
    stopping = False

    def asked_to_stop() -> bool:
        nonlocal stopping
        if jax.process_count() == 1 or step % AGREE_EVERY == 0:
            stopping = stopping or largest(interrupts.requested is not None) > 0
        return stopping

    def save() -> None:
        quality: dict[str, float] = {}
        try:
            # A signal leaves little time; the state matters more than its quality.
            if validate is not None and not asked_to_stop():
                beat(f"the validation after step {step}")
                quality = dict(validate(on_this_process(placement.get_state(state).evaluation_params)))
                logger.log(step, quality)
        finally:
            beat(f"the saving of step {step}")
            position = {**_position(placement, batches), "skipped_steps": skipped_steps}
            checkpointer.save(step, placement.get_state(state), position, quality)

    def all_is_well() -> bool:
        """Looks at the steps since the last look; whether to go on from here, and not from the checkpoint."""
        nonlocal skipped_steps
        found, in_a_row = unexamined.examine()
        skipped_steps += len(found)
        for each in found:
            logger.event(_told(each), {"event": "non_finite", **each._asdict()})
        is_too_much = found and (
            non_finite == "stop"
            or (non_finite == "skip" and in_a_row >= MOST_IN_A_ROW)
            or (non_finite == "roll_back" and rolled_back >= MOST_IN_A_ROW)
        )
        if is_too_much:
            raise NonFiniteLoss(f"{_told(found[-1])}; the newest checkpoint is step {saved}")
        return not found or non_finite == "skip"

    def roll_back() -> tuple[TrainState, int]:
        nonlocal rolled_back
        rolled_back += 1
        logger.go_back()
        checkpointer.wait()
        if checkpointer.latest_step() is None:
            return placement.init(key), 0
        restored = checkpointer.restore(placement.abstract)
        return placement.put_state(restored.state), restored.step

    saved = step
    while step < steps and not asked_to_stop():
        beat(f"step {step + 1}, waiting for its batch")
        host_batch = next(batches)
        beat(f"step {step + 1}")
        batch = placement.put_batch(host_batch)
        is_logged = (step + 1) % log_every == 0 or step + 1 == steps
        is_saved = (step + 1) % checkpoint_every == 0 or step + 1 == steps
        norms = term_gradient_norms(state, batch) if is_logged and term_gradient_norms is not None else {}
        state, metrics = placement.update(state, batch)
        step += 1
        unexamined.add(step, host_batch, metrics)
        if (is_logged or is_saved or len(unexamined) >= MOST_UNEXAMINED) and not all_is_well():
            state, step = roll_back()
            saved = step
            continue
        if is_logged:
            row = _row({**metrics, **norms})
            row |= {"learning_rate": float(schedule(step - 1))}
            row |= {"skipped_steps": skipped_steps, "corrupt_examples": batches.corrupt}
            logger.log(step, row, examples=step * len(host_batch["where"]) * jax.process_count())
        if is_saved:
            save()
            saved, rolled_back = step, 0
    if saved < step:
        if all_is_well():
            save()
        else:
            state, step = roll_back()
    checkpointer.wait()
    signal_name = interrupts.requested or "a signal to another process"
    return Outcome(placement.get_state(state), step, signal_name if step < steps else None)


def _start(
    placement: Placement, batches: Batches, key: Array, checkpointer: Checkpointer
) -> tuple[TrainState, int, int]:
    """The state, its step, and how many steps were skipped up to there."""
    if checkpointer.latest_step() is None:
        return placement.init(key), 0, 0
    restored = checkpointer.restore(placement.abstract)
    position = restored.data_position
    saved, here = (each.get("teacher") for each in (position, _position(placement, batches)))
    if saved != here:
        saved, here = ("none" if teacher is None else f"{teacher[:12]}…" for teacher in (saved, here))
        raise InputError(f"cannot resume with another teacher: the run had {saved}, here it is {here}")
    batches.set_state(position)
    return placement.put_state(restored.state), restored.step, position.get("skipped_steps", 0)


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

    values = jax.device_get({name: value for name, value in metrics.items() if name != SKIPPED})
    return {name: float(values[name]) for name in sorted(values, key=importance)}


def _told(found: NonFiniteStep) -> str:
    shown = ", ".join(map(str, found.example_ids[:_SHOWN_EXAMPLES]))
    rest = len(found.example_ids) - _SHOWN_EXAMPLES
    examples = f"; its examples: {shown}{f' and {rest} more' if rest > 0 else ''}" if found.example_ids else ""
    return f"step {found.step} is not finite ({', '.join(found.terms)}) and changed no weight{examples}"
