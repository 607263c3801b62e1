"""The lock of a folder: one process has it, and a killed one no longer does."""

import subprocess
import sys

import pytest

from repkit.checks import InputError
from repkit.lock import FolderLock

OWNER = """
import sys, time
from pathlib import Path
from repkit.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_another_process_is_refused_until_the_owner_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {owner.pid} on "):
            FolderLock(tmp_path)
        owner.kill()
    with FolderLock(tmp_path) as lock:
        assert lock.is_held()
    assert not lock.is_held()


def test_a_replaced_folder_is_no_longer_held(tmp_path):
    with FolderLock(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        assert not lock.is_held()
        with FolderLock(tmp_path):
            assert not lock.is_held()
