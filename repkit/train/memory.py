"""Keeps the memory of a long run from creeping up, where the C library is glibc."""

import contextlib
import ctypes
import os

_M_ARENA_MAX = -8
"""Of malloc.h in glibc."""

# What other C libraries lack raises one of these.
_no_glibc = contextlib.suppress(AttributeError, OSError, TypeError)


def share_one_heap() -> None:
    """Lets all threads of this process allocate from one heap.

    Each save of a checkpoint runs in new threads. Glibc hands them one of up to eight heaps a processor, and what is
    left in each of them adds up. Threads that have a heap of their own already keep it. An environment that sets
    MALLOC_ARENA_MAX, or `glibc.malloc.arena_max` in GLIBC_TUNABLES, has decided otherwise.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with _no_glibc:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Gives the memory that is free back to the operating system, such as that of a save's copies of the state."""
    with _no_glibc:
        ctypes.CDLL(None).malloc_trim(0)
