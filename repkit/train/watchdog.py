"""Ends a run that hangs, with the stacks of all its threads, so that a scheduler can start it again."""

import faulthandler
import os
import threading
from pathlib import Path
from time import monotonic
from typing import Self

EXIT_HUNG = 79
"""Exit code of a run that made no progress for too long. No standard gives it another meaning."""

STACKS_FILE = "stacks.txt"
_STANDARD_ERROR = 2
_LOOKS = 20
"""How often it looks within the time that is allowed."""


class Watchdog:
    """Ends the process when nothing was heard from the training loop for too long.

    It prints one line, writes the stacks of all threads into a file and ends the process with `EXIT_HUNG`; the newest
    checkpoint stays as it is. Time in which the whole process stood still, because somebody stopped it, does not count.
    A thread that never gives Python's lock away is ended as well, by the C library below, after twice the time and with
    exit code 1.

    Args:
        seconds: the longest time without a `beat`; None for no watch.
        folder: where stacks.txt is written.

    Example:
        >>> with Watchdog(60.0, Path(".")) as watchdog:
        ...     for step in range(3):
        ...         watchdog.beat(f"step {step}")
    """

    def __init__(self, seconds: float | None, folder: Path):
        self._seconds = seconds
        self._stacks = folder / STACKS_FILE
        self._doing = "the start"
        self._waited = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str) -> None:
        """Tells that the loop is alive, and what it begins to do now."""
        self._doing = doing
        self._waited = 0.0

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, seconds: float) -> None:
        interval = seconds / _LOOKS
        last = monotonic()
        faulthandler.dump_traceback_later(2 * seconds, file=_STANDARD_ERROR, exit=True)
        while not self._ended.wait(interval):
            now = monotonic()
            # A longer gap than asked for is one in which this thread did not run either.
            self._waited += min(now - last, 2 * interval)
            last = now
            faulthandler.dump_traceback_later(2 * seconds, file=_STANDARD_ERROR, exit=True)
            if self._waited > seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        where = f"its stacks are in {self._stacks}"
        try:
            with self._stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            where = "its stacks follow"
            faulthandler.dump_traceback(_STANDARD_ERROR, all_threads=True)
        text = f"repkit: no progress for {seconds:g} s in {self._doing}; {where}\n"
        os.write(_STANDARD_ERROR, text.encode())
        os._exit(EXIT_HUNG)
