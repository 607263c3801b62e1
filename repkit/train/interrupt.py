"""Ending a run from outside: SIGTERM or Ctrl-C asks for it, the loop saves at the end of its step and leaves."""

import signal
import threading
from types import FrameType
from typing import Any, Self

EXIT_INTERRUPTED = 75
"""Exit code of a run that was interrupted and saved a checkpoint: the same command with `--resume` continues it.

It is EX_TEMPFAIL of sysexits.h, 'try again later', by which a scheduler can tell an interrupted run from a failed one.
"""


class Interrupts:
    """Takes note of SIGTERM and SIGINT while a loop runs, which looks at `requested` wherever it can stop cleanly.

    The second SIGINT raises KeyboardInterrupt at once. The handlers that were there before come back at the end.
    Outside the main thread, where Python allows no handlers, `requested` stays None.

    Attributes:
        requested: the name of the first signal that came, "SIGTERM" or "SIGINT"; None as long as none came.

    Example:
        >>> import os
        >>> with Interrupts() as interrupts:
        ...     for step in range(5):
        ...         if step == 2:
        ...             os.kill(os.getpid(), signal.SIGTERM)
        ...         if interrupts.requested:
        ...             break
        >>> step, interrupts.requested
        (2, 'SIGTERM')
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._sigint_came = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python and cannot be set from it either.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._sigint_came:
                raise KeyboardInterrupt
            self._sigint_came = True
        self.requested = self.requested or signal.Signals(number).name
