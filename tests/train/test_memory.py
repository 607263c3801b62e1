"""One heap for all threads of a training."""

import os
import platform
import re
import subprocess
import sys

import pytest

from repkit.train.memory import return_freed_memory

PROGRAM = """
import ctypes, sys, threading
from repkit.train.memory import share_one_heap

share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
together = threading.Barrier(4)

def allocate():
    libc.malloc(10_000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.fopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
libc.fflush.argtypes = [ctypes.c_void_p]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fflush(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps for each thread are glibc's")
def test_threads_share_one_heap_unless_the_environment_says_otherwise(tmp_path):
    own = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}

    def heaps(**environment: str) -> int:
        report = tmp_path / "heaps.xml"
        subprocess.run([sys.executable, "-c", PROGRAM, str(report)], env=own | environment, check=True)
        return len(re.findall(r"<heap nr=", report.read_text()))

    assert heaps() == 1
    assert heaps(MALLOC_ARENA_MAX="3") == 3
    assert heaps(GLIBC_TUNABLES="glibc.malloc.arena_max=2") == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_goes_back():
    page, size = os.sysconf("SC_PAGE_SIZE"), 64 << 20

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * page

    pieces = [bytearray(b"x") * 100_000 for _ in range(size // 100_000)]
    end = bytearray(100_000)  # above them in the heap, so that nothing goes back by itself
    held = resident()
    del pieces
    return_freed_memory()
    assert resident() < held - size / 2
    assert len(end) == 100_000
