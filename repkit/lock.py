"""A lock on a folder: one process at a time, and nobody who has died."""

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import Self

from repkit.checks import InputError, RunWarning

LOCK_FILE = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Holds a folder for this process, until it is released or the process ends, in whatever way.

    The operating system keeps the lock, so that a process that was killed leaves none behind. The file says who has it
    and stays when it is free: removing it would let two processes lock two files of one name.

    Args:
        folder: a folder that is there.

    Raises:
        InputError: another process has the folder; the message names it.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, FolderLock(Path(folder)) as lock:
        ...     lock.is_held()
        True
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: int | None = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "another process"
            self.release()
            raise InputError(f"{folder} is in use by {owner}; wait for its end, or choose another directory") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                self.release()
                raise
            warnings.warn(
                f"{folder} is on a file system without locks: make sure that no other process uses it",
                RunWarning,
                stacklevel=2,
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def is_held(self) -> bool:
        """Whether the folder is still the one that was locked, and not removed or replaced by another since.

        A process that goes on saving after somebody has removed its folder would otherwise write into a new run that
        was given the same name.
        """
        try:
            there = os.stat(self.folder / LOCK_FILE)
        except OSError:
            return False
        return self._file is not None and os.path.samestat(there, os.fstat(self._file))

    def release(self) -> None:
        """Gives the folder up."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
