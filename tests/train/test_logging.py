"""Metric logging: the file survives kills, resumes and full disks; the terminal shows true speeds."""

import contextlib
import io
import json
import math
import os
import pty
import resource
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from repkit.checks import InputError
from repkit.train import logging
from repkit.train.logging import METRICS_FILE, MetricLogger, read_metrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the logger sees: one number, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr(logging, "monotonic", lambda: now[0])
    return now


def logger_to(directory: Path, stream: io.StringIO | None = None, **options: Any) -> MetricLogger:
    return MetricLogger(directory, **{"total_steps": 100, "stream": stream or io.StringIO(), **options})


def events(directory: Path) -> list[Any]:
    """The events of all files, read by the format's own rules: length, checksum, record, checksum."""
    found = []
    for file in sorted((directory / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
            found.append(event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(directory: Path) -> list[tuple[int, str, float]]:
    return [(event.step, value.tag, value.simple_value) for event in events(directory) for value in event.summary.value]


def test_rows_go_to_the_file_at_once_and_to_tensorboard(tmp_path: Path) -> None:
    with logger_to(tmp_path) as logger:
        logger.log(10, {"loss": jnp.float32(0.5), "scale": jnp.bfloat16(2), "count": np.int64(3), "ok": True})
        assert read_metrics(tmp_path / METRICS_FILE) == [
            {"step": 10, "loss": 0.5, "scale": 2.0, "count": 3, "ok": True}
        ]
        assert scalars(tmp_path) == [(10, "loss", 0.5), (10, "scale", 2.0), (10, "count", 3.0), (10, "ok", 1.0)]


def test_non_finite_values_are_valid_json_and_come_back_as_nan(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logger_to(tmp_path, stream) as logger:
        logger.log(1, {"loss": math.inf, "norm": jnp.float32(jnp.nan)})
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None}
    row = read_metrics(tmp_path / METRICS_FILE)[0]
    assert math.isnan(row["loss"])
    assert math.isnan(row["norm"])
    assert stream.getvalue() == "step 1/100  loss inf  norm nan\n"
    assert scalars(tmp_path)[0] == (1, "loss", math.inf)


def test_plain_lines_show_speed_and_remaining_time_without_the_compilation(tmp_path: Path, clock: list[float]) -> None:
    stream = io.StringIO()
    with logger_to(tmp_path, stream, total_steps=2400) as logger:
        clock[0] = 60.0  # a minute of compilation, in which the first 100 steps ran as well
        logger.log(100, {"loss": 2.3}, examples=51_200)
        clock[0] = 70.0
        logger.log(200, {"loss": 2.25, "a": 1, "b": 2, "c": 3, "not shown": 4}, examples=102_400)
        clock[0] = 90.0
        logger.log(200, {"recall": 0.5})  # a validation of 20 s
        clock[0] = 100.0
        logger.log(300, {"loss": 2.0}, examples=153_600)
    assert stream.getvalue().splitlines() == [
        "step 100/2400  loss 2.3",
        "step 200/2400  loss 2.25  a 1  b 2  c 3  5,120 examples/s  3:40 left",
        "step 200/2400  recall 0.5",
        "step 300/2400  loss 2  5,120 examples/s  7:00 left",
    ]
    assert [row.get("examples_per_second") for row in read_metrics(tmp_path / METRICS_FILE)] == [None, 5120, None, 5120]


def test_hours_are_shown(tmp_path: Path, clock: list[float]) -> None:
    stream = io.StringIO()
    with logger_to(tmp_path, stream, total_steps=3) as logger:
        logger.log(1, {})
        clock[0] = 3723
        logger.log(2, {})
    assert stream.getvalue().endswith("1:02:03 left\n")


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    for steps in ([10, 20, 30, 40], [30, 40, 50]):
        with logger_to(tmp_path) as logger:
            for step in steps:
                logger.log(step, {"loss": float(steps[0])})
            logger.log(steps[-1], {"recall": 0.5})
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 50]
    assert [row.get("loss") for row in rows] == [10, 10, 30, 30, 30, None]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [10, 30]


def test_going_back_within_a_run_drops_the_rows_given_up(tmp_path: Path) -> None:
    with logger_to(tmp_path) as logger:
        for step in (1, 2, 3, 2, 3):
            logger.log(step, {})
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3]


def test_opening_a_logger_alone_removes_nothing(tmp_path: Path) -> None:
    with logger_to(tmp_path) as logger:
        logger.log(1, {"loss": 1.0})
    logger_to(tmp_path).close()
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1


def test_a_cut_off_last_line_is_left_out_and_does_not_spoil_a_resumed_run(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 3.0}]
    with logger_to(tmp_path) as logger:
        logger.log(2, {"loss": 2.0})
    assert read_metrics(file) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(file)
    with pytest.raises(InputError, match="cannot read metrics"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_disabled_logger_touches_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with MetricLogger(tmp_path / "run", total_steps=1, enabled=False, stream=stream) as logger:
        logger.log(1, {"loss": 1.0})
        logger.note("hello")
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("metrics", [{"loss": jnp.ones(2)}, {"loss": "high"}, {"step": 3}, {"loss": None}])
def test_what_is_no_scalar_is_refused(tmp_path: Path, metrics: dict[str, Any]) -> None:
    with logger_to(tmp_path) as logger, pytest.raises(InputError, match=next(iter(metrics))):
        logger.log(1, metrics)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        logger_to(tmp_path / "file")


def test_a_failing_tensorboard_is_reported_once_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    stream = io.StringIO()
    with logger_to(tmp_path, stream) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": 1.0})
    warnings = [line for line in stream.getvalue().splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "TensorBoard" in warnings[0]
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 3


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Stands in for a full disk: the operating system refuses to write more into a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_costs_rows_and_not_the_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logger_to(tmp_path, stream) as logger:
        with files_of_at_most(1000):
            for step in range(1, 61):
                logger.log(step, {"loss": 1.0, "name": 2.0})
        logger.log(61, {"loss": 2.0})
    rows = read_metrics(tmp_path / METRICS_FILE)
    written = [row["step"] for row in rows]
    assert written[:-1] == list(range(1, len(written)))
    assert 10 < len(written) < 60
    assert written[-1] == 61
    warnings = [line.split("(")[0] for line in stream.getvalue().splitlines() if line.startswith("warning")]
    assert sorted(warnings) == ["warning: cannot log to TensorBoard ", "warning: cannot log to metrics.jsonl "]
    assert stream.getvalue().count("step ") == 61


def test_a_closed_terminal_costs_the_lines_and_not_the_run(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    with MetricLogger(tmp_path, total_steps=2, stream=stream) as logger:
        logger.log(1, {"loss": 1.0})
        logger.note("hello")
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1


def test_a_terminal_gets_a_bar_that_notes_do_not_break(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    script = """
import sys
import termios
from repkit.train.logging import MetricLogger
with MetricLogger(sys.argv[1], total_steps=40, tensorboard=False) as logger:
    logger.log(10, {"loss": 2.5})
    logger.note("saved step 10")
    logger.log(40, {"loss": 1.25})
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], stderr=terminal, check=True, timeout=30)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how the end of a terminal is told on Linux
        while part := os.read(controller, 65536):
            shown += part
    os.close(controller)
    pieces = shown.decode().replace("\n", "\r").split("\r")
    assert "saved step 10" in pieces
    assert any("25%" in piece and "step 10/40, loss 2.5" in piece for piece in pieces)
    assert any("100%" in piece and "step 40/40, loss 1.25" in piece for piece in pieces)
