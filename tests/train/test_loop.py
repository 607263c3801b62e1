"""The loop: what it logs and saves, an orderly stop, a resumed run, a loss that is no number."""

import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repkit.objective import Objective, Term
from repkit.train.checkpoint import Checkpointer
from repkit.train.interrupt import Interrupts
from repkit.train.logging import MetricLogger, read_metrics
from repkit.train.loop import NonFiniteLoss, fit
from repkit.train.mesh import make_mesh
from repkit.train.state import init_state
from repkit.train.step import PMAP_AXIS, jit_placement, make_update, pmap_placement


def _squared_error(prediction, target, *, where=None, reduction="mean"):
    return jnp.square(prediction - target)


class Stream:
    """Endless batches whose content follows from their position; a signal or a bad batch comes at a given one."""

    corrupt = 0

    def __init__(self, *, signal_at: int | None = None, nan_at=()):
        self.position = 0
        self.signal_at = signal_at
        self.nan_at = nan_at

    def __next__(self):
        rng = np.random.default_rng(self.position)
        if self.position == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        y = rng.standard_normal(8).astype(np.float32)
        if self.position in self.nan_at:
            y[3] = np.nan
        self.position += 1
        x = rng.standard_normal((8, 3)).astype(np.float32)
        ids = 100 * (self.position - 1) + np.arange(8, dtype=np.int32)
        return {"x": x, "y": y, "where": np.ones(8, bool), "example_id": ids}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def _run(folder, stream, *, steps=12, checkpoint_every=5, log_every=2, validate=None, pmap=False, non_finite="skip"):
    objective = Objective({"error": Term(_squared_error, ("outputs.y", "batch.y"))})
    optimizer = optax.adam(0.1)

    def forward(params, batch, key):
        # A draw by the step's key, so that a resumed run must also resume its random numbers.
        noise = jax.random.normal(key, (), jnp.float32)
        return {"y": batch["x"] @ params["w"] + 0.1 * noise}

    def make_state(key):
        return init_state(
            lambda key: {"w": jax.random.normal(key, (3,), jnp.float32)}, optimizer, objective, key=key, ema=True
        )

    if pmap:
        update = make_update(forward, objective, optimizer, ema_decay=0.9, axis_name=PMAP_AXIS)
        placement = pmap_placement(update, make_state, jax.devices()[:2])
    else:
        update = make_update(forward, objective, optimizer, ema_decay=0.9)
        placement = jit_placement(update, make_state, make_mesh(devices=jax.devices()[:1]))
    with (
        Checkpointer(folder / "checkpoints", best_metric="quality" if validate else None, keep_last=1) as checkpointer,
        MetricLogger(folder, total_steps=steps, stream=io.StringIO(), tensorboard=False) as logger,
        Interrupts() as interrupts,
    ):
        return fit(
            placement,
            stream,
            steps=steps,
            key=jax.random.key(0),
            checkpointer=checkpointer,
            logger=logger,
            interrupts=interrupts,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            schedule=lambda step: 0.1,
            validate=validate,
            non_finite=non_finite,
        ), checkpointer.steps()


@pytest.mark.parametrize("pmap", [False, True], ids=["jit", "pmap"])
def test_a_stopped_run_goes_on_to_the_very_same_state(tmp_path, pmap):
    whole, _ = _run(tmp_path / "whole", Stream(), pmap=pmap)
    stopped, steps = _run(tmp_path / "stopped", Stream(signal_at=6), pmap=pmap)
    # The batch in hand is finished, and its step saved.
    assert (stopped.interrupted, stopped.step, steps) == ("SIGTERM", 7, [7])
    resumed, _ = _run(tmp_path / "stopped", Stream(), pmap=pmap)
    assert (resumed.interrupted, resumed.step) == (None, 12)
    states = [whole.state, resumed.state]
    for state in states:
        assert int(state.step) == 12
    leaves = [
        jax.tree.leaves((state.params, state.optimizer_state, state.ema, jax.random.key_data(state.key)))
        for state in states
    ]
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_array_equal(x, y)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_rows_are_logged_and_the_last_step_is_kept(tmp_path):
    _, steps = _run(tmp_path, Stream(), steps=7, checkpoint_every=5)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert {"loss", "error", "gradient_norm", "learning_rate", "corrupt_examples"} <= rows[0].keys()
    assert steps == [7]


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    qualities = iter([0.2, 0.9, 0.5])
    outcome, steps = _run(tmp_path, Stream(), steps=15, validate=lambda params: {"quality": next(qualities)})
    assert outcome.step == 15
    assert steps == [10, 15]


def test_validation_sees_the_moving_average(tmp_path):
    seen = []

    def validate(params):
        seen.append(np.asarray(params["w"]))
        return {"quality": 0.0}

    outcome, _ = _run(tmp_path, Stream(), steps=5, validate=validate)
    np.testing.assert_array_equal(seen[-1], outcome.state.ema["w"])
    assert not np.array_equal(seen[-1], outcome.state.params["w"])


def test_a_signal_saves_without_validating(tmp_path):
    outcome, steps = _run(tmp_path, Stream(signal_at=3), validate=lambda params: pytest.fail("there is no time for it"))
    assert (outcome.interrupted, steps) == ("SIGTERM", [4])


def test_a_failing_validation_loses_no_step(tmp_path):
    def validate(params):
        raise OSError("the validation data are gone")

    with pytest.raises(OSError, match="are gone"):
        _run(tmp_path, Stream(), validate=validate)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.steps() == [5]


def test_the_policy_stop_names_the_step_and_leaves_the_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step 8 is not finite \(error\).*700, 701.* newest checkpoint is step 5"):
        _run(tmp_path, Stream(nan_at=[7]), log_every=100, non_finite="stop")
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.steps() == [5]


def _leaves(state):
    return jax.tree.leaves((state.params, state.optimizer_state, state.ema))


@pytest.mark.parametrize("pmap", [False, True], ids=["jit", "pmap"])
def test_a_skipped_batch_changes_nothing_but_the_count(tmp_path, pmap):
    # The bad row is in the second device's half of the batch.
    before, _ = _run(tmp_path / "before", Stream(), steps=3, pmap=pmap)
    outcome, _ = _run(tmp_path / "bad", Stream(nan_at=[3]), steps=4, pmap=pmap)
    assert int(outcome.state.step) == outcome.step == 4
    for x, y in zip(_leaves(before.state), _leaves(outcome.state), strict=True):
        np.testing.assert_array_equal(x, y)
    rows = read_metrics(tmp_path / "bad" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1]
    (event,) = [json.loads(line) for line in (tmp_path / "bad" / "events.jsonl").read_text().splitlines()]
    assert event == {"event": "non_finite", "step": 4, "terms": ["error"], "example_ids": list(range(300, 308))}
    resumed, _ = _run(tmp_path / "bad", Stream(), steps=8, pmap=pmap)
    assert all(np.isfinite(leaf).all() for leaf in _leaves(resumed.state))
    assert read_metrics(tmp_path / "bad" / "metrics.jsonl")[-1]["skipped_steps"] == 1


def test_skipping_ends_where_nothing_is_finite_any_more(tmp_path):
    with pytest.raises(NonFiniteLoss, match="step 16 is not finite"):
        _run(tmp_path, Stream(nan_at=range(6, 100)), steps=40)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.steps() == [15]


def test_rolling_back_goes_on_from_the_checkpoint_with_the_next_batches(tmp_path):
    outcome, _ = _run(tmp_path / "bad", Stream(nan_at=[7]), non_finite="roll_back")
    assert outcome.step == 12
    # Steps 1 to 5, back from step 8, whose batch was the bad one, and the batches after it.
    expected = Stream()
    batches = [next(expected) for _ in range(15)]

    class Good(Stream):
        def __next__(self):
            self.position += 1
            return (batches[:5] + batches[8:])[self.position - 1]

    good, _ = _run(tmp_path / "good", Good())
    for x, y in zip(_leaves(good.state), _leaves(outcome.state), strict=True):
        np.testing.assert_array_equal(x, y)
    assert [row["step"] for row in read_metrics(tmp_path / "bad" / "metrics.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert len((tmp_path / "bad" / "events.jsonl").read_text().splitlines()) == 1


def test_rolling_back_begins_anew_without_a_checkpoint_and_ends_some_day(tmp_path):
    with pytest.raises(NonFiniteLoss, match="the newest checkpoint is step 0"):
        _run(tmp_path, Stream(nan_at=range(1, 100)), non_finite="roll_back")
