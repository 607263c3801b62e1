"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal; what is out of the ordinary: events.jsonl.

A failure to write a log never ends the training: it is reported once, on the terminal, and the run goes on.
"""

import contextlib
import itertools
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic, time, time_ns
from typing import Any, NamedTuple, Protocol, Self, TextIO

import jax
import numpy as np
from tqdm import tqdm

from repkit.checks import InputError

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
_TENSORBOARD_FOLDER = "tensorboard"
_TERMINAL = "the terminal"
_SHOWN_ON_TERMINAL = 4


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in the order in which they were logged.

    A last line that is cut off, because the process was killed while it wrote or is just writing, is left out.

    Args:
        path: the file.

    Returns:
        One dict for each row: "step" and the metrics by name. What was not finite is NaN.

    Raises:
        InputError: the file cannot be read, or a line other than the last is no JSON object.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read metrics from {path}: {error.strerror}") from error
    rows = [_parsed(line) for line in lines]
    if rows and rows[-1] is None:
        rows.pop()
    if None in rows:
        raise InputError(f"{path}, line {rows.index(None) + 1}: expected a JSON object with a step")
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows if row]


class Pace(NamedTuple):
    """How fast a run goes.

    Attributes:
        examples_per_second: since the row before; None where that is not known.
        seconds_left: to the last step, at the mean speed so far; None where that is not known.
    """

    examples_per_second: float | None
    seconds_left: float | None


class MetricLogger:
    """Writes rows of metrics to metrics.jsonl, TensorBoard and the terminal.

    A row is in metrics.jsonl when `log` returns. A value that is not finite becomes null there, since JSON has no word
    for it: plotting tools read that as a gap, `read_metrics` as NaN; the terminal and TensorBoard show it as it is.
    Steps never descend in the file: when a run goes on from an earlier step, its first row removes the rows of that
    step and of later ones.

    The time up to the first row counts for no speed, because the step is compiled in it, nor does the time between two
    rows of one step, in which a validation ran.

    Args:
        directory: receives metrics.jsonl and the folder tensorboard.
        total_steps: number of the run's last step.
        enabled: False writes nothing at all; for every process but the first.
        stream: the terminal, standard error if None: a progress bar where it is one, otherwise one line for each row.
        tensorboard: whether to write for TensorBoard.

    Raises:
        InputError: `directory` cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with MetricLogger(folder, total_steps=200, stream=sys.stdout) as logger:
        ...         logger.log(100, {"loss": 2.3125})
        ...         logger.log(200, {"loss": float("nan")})
        ...     read_metrics(Path(folder) / METRICS_FILE)
        step 100/200  loss 2.312
        step 200/200  loss nan  0:00 left
        [{'step': 100, 'loss': 2.3125}, {'step': 200, 'loss': nan}]
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        total_steps: int,
        enabled: bool = True,
        stream: TextIO | None = None,
        tensorboard: bool = True,
    ):
        self._pace = _Stopwatch(total_steps)
        self._last_step: int | None = None
        self._failed: set[str] = set()
        self._sinks: dict[str, _Sink] = {}
        if not enabled:
            return
        terminal: TextIO = stream or sys.stderr
        self._sinks[_TERMINAL] = (_Bar if terminal.isatty() else _Lines)(terminal, total_steps)
        self._sinks[METRICS_FILE] = _JsonLines(Path(directory) / METRICS_FILE)
        self._sinks[EVENTS_FILE] = _EventLines(Path(directory) / EVENTS_FILE)
        if tensorboard:
            self._sinks["TensorBoard"] = _TensorBoard(Path(directory) / _TENSORBOARD_FOLDER)

    def log(self, step: int, metrics: Mapping[str, Any], examples: int | None = None) -> None:
        """Writes one row.

        Args:
            step: the step that the metrics belong to.
            metrics: scalars by name, numbers or arrays without axes; the terminal shows the first four.
            examples: number of examples that the run has consumed so far, for the examples per second.

        Raises:
            InputError: a metric is no scalar, or is called "step".
        """
        if not self._sinks:
            return
        step = int(step)
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        pace = self._pace.at(step, examples)
        if pace.examples_per_second is not None:
            values["examples_per_second"] = pace.examples_per_second
        if self._last_step is None or step < self._last_step:
            self._each(lambda sink: sink.restart(step))
        self._last_step = step
        self._each(lambda sink: sink.write(step, values, pace))

    def note(self, text: str) -> None:
        """Prints a line on the terminal, above the progress bar if there is one."""
        self._each(lambda sink: sink.note(text))

    def go_back(self) -> None:
        """The run goes on from an earlier step: the next row removes those of its own step and of later ones."""
        self._last_step = None

    def event(self, text: str, details: Mapping[str, Any]) -> None:
        """Tells of something out of the ordinary: a line on the terminal, and one of details in events.jsonl.

        Args:
            text: for the reader of the terminal.
            details: JSON-able values by name.
        """
        self.note(text)
        self._each(lambda sink: sink.event(details))

    def close(self) -> None:
        """Closes the files. Rows logged afterwards are dropped."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _each(self, action: "Callable[[_Sink], None]") -> None:
        for name, sink in self._sinks.items():
            try:
                action(sink)
            except Exception as error:  # No log is worth a training run, whatever its library raises.
                self._report(name, error)

    def _report(self, name: str, error: Exception) -> None:
        if name in self._failed:
            return
        self._failed.add(name)
        with contextlib.suppress(Exception):
            text = f"warning: cannot log to {name} ({type(error).__name__}: {error}); training goes on"
            self._sinks[_TERMINAL].note(text)


class _Sink(Protocol):
    """One place that rows go to; notes go to the terminal alone, events to a file of their own."""

    def restart(self, step: int) -> None:
        """Forgets the rows from a step on."""
        ...

    def write(self, step: int, values: Mapping[str, float], pace: Pace) -> None: ...

    def note(self, text: str) -> None: ...

    def event(self, details: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, path: Path):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a row is in the file when it is logged and a failed one can be taken back.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another directory") from error

    def restart(self, step: int) -> None:
        def stays(line: bytes) -> bool:
            row = _parsed(line)
            return line.endswith(b"\n") and row is not None and row["step"] < step

        # Steps never descend, so that what is to go is the end of the file: cutting it off is one atomic operation.
        lines = self._path.read_bytes().splitlines(keepends=True)
        self._file.truncate(sum(map(len, itertools.takewhile(stays, lines))))

    def write(self, step: int, values: Mapping[str, float], pace: Pace) -> None:
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        rest = json.dumps(row, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            # Half a row, of a disk that is full, would spoil the rows after it.
            self._file.truncate(size)
            raise

    def note(self, text: str) -> None: ...

    def event(self, details: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        self._file.close()


class _EventLines:
    """Made with the first event: most runs have none."""

    def __init__(self, path: Path):
        self._path = path

    def restart(self, step: int) -> None: ...

    def write(self, step: int, values: Mapping[str, float], pace: Pace) -> None: ...

    def note(self, text: str) -> None: ...

    def event(self, details: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(details) + "\n")

    def close(self) -> None: ...


class _TensorBoard:
    """Event files, written here and now.

    tensorboardX's own SummaryWriter hands events to a thread; when that dies, of a full disk, its queue fills and the
    next call blocks for ever.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None
        self._broken = False

    def restart(self, step: int) -> None:
        self.close()
        self._guarded(lambda: self._open(step))

    def write(self, step: int, values: Mapping[str, float], pace: Pace) -> None:
        self._guarded(lambda: self._write_values(step, values))

    def note(self, text: str) -> None: ...

    def event(self, details: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _guarded(self, action: Callable[[], None]) -> None:
        """After a failure the file may end in half a record, behind which TensorBoard reads nothing."""
        if self._broken:
            return
        try:
            action()
        except Exception:
            self._broken = True
            with contextlib.suppress(Exception):
                self.close()
            raise

    def _open(self, step: int) -> None:
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = RecordWriter(str(self._folder / f"events.out.tfevents.{time_ns()}.{socket.gethostname()}"))
        self._write_event(file_version="brain.Event:2")
        # TensorBoard hides what earlier files hold from this step on.
        self._write_event(step=step, session_log={"status": "START"})

    def _write_values(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [{"tag": name, "simple_value": float(value)} for name, value in values.items()]
        self._write_event(step=step, summary={"value": scalars})
        self._writer.flush()

    def _write_event(self, **fields: Any) -> None:
        from tensorboardX.proto import event_pb2

        event = event_pb2.Event(wall_time=time(), **fields)  # pyright: ignore[reportAttributeAccessIssue]
        self._writer.write(event.SerializeToString())


class _Lines:
    """The terminal's stand-in in a file or a pipe: one line for each row."""

    def __init__(self, stream: TextIO, total_steps: int):
        self._stream = stream
        self._total_steps = total_steps

    def restart(self, step: int) -> None: ...

    def write(self, step: int, values: Mapping[str, float], pace: Pace) -> None:
        self.note(f"step {step}/{self._total_steps}  {_summary(values, pace)}")

    def note(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def event(self, details: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Bar:
    """A progress bar. Its speed and remaining time are ours, because tqdm's would count the compilation."""

    def __init__(self, stream: TextIO, total_steps: int):
        self._stream = stream
        layout = "{percentage:3.0f}%|{bar:20}| step {n_fmt}/{total_fmt}{postfix}"
        self._bar = tqdm(total=total_steps, file=stream, bar_format=layout, dynamic_ncols=True)

    def restart(self, step: int) -> None: ...

    def write(self, step: int, values: Mapping[str, float], pace: Pace) -> None:
        self._bar.n = step
        self._bar.set_postfix_str(_summary(values, pace))

    def note(self, text: str) -> None:
        self._bar.write(text, file=self._stream)

    def event(self, details: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        self._bar.close()


class _Stopwatch:
    """Speed from the times of the rows."""

    def __init__(self, total_steps: int):
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0, None)

    def at(self, step: int, examples: int | None) -> Pace:
        now = monotonic()
        last_step, last_time, last_examples = self._last
        if self._first is None or step < last_step:
            self._first = (step, now)
            self._last = (step, now, examples)
            return Pace(None, None)
        if step == last_step:
            self._last = (step, now, last_examples)
            return Pace(None, None)
        self._last = (step, now, examples)
        first_step, first_time = self._first
        left = (now - first_time) / (step - first_step) * max(self._total_steps - step, 0)
        if examples is None or last_examples is None or now == last_time:
            return Pace(None, left)
        return Pace((examples - last_examples) / (now - last_time), left)


def _scalar(name: str, value: Any) -> float:
    if name == "step":
        raise InputError("a metric cannot be called 'step': every row has the step")
    if isinstance(value, jax.Array | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, int | float):
        shape = getattr(value, "shape", type(value).__name__)
        raise InputError(f"metric '{name}' must be a scalar, got {shape}")
    return value


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _summary(values: Mapping[str, float], pace: Pace) -> str:
    shown = [name for name in values if name != "examples_per_second"][:_SHOWN_ON_TERMINAL]
    parts = [f"{name} {values[name]:.4g}" for name in shown]
    if pace.examples_per_second is not None:
        parts.append(f"{pace.examples_per_second:,.0f} examples/s")
    if pace.seconds_left is not None:
        parts.append(f"{_clock(pace.seconds_left)} left")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
