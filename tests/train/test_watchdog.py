"""The watchdog: a process that hangs ends with its stacks, and one that goes on does not."""

import subprocess
import sys
import time

import pytest

from repkit.train.watchdog import EXIT_HUNG, Watchdog

SCRIPT = """
import sys, time
from pathlib import Path
from repkit.train.watchdog import Watchdog
def stuck():
    time.sleep(600)
with Watchdog(0.5, Path(sys.argv[1])) as watchdog:
    for step in range(8):
        watchdog.beat(f"step {step}")
        time.sleep(0.1)
    stuck()
"""


@pytest.mark.parametrize("folder", ["run", pytest.param("nowhere", marks=pytest.mark.slow)])
def test_a_process_that_hangs_ends_with_its_stacks(tmp_path, folder):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_HUNG
    assert "repkit: no progress for 0.5 s in step 7; its stacks" in done.stderr
    stacks = (tmp_path / "run" / "stacks.txt").read_text() if folder == "run" else done.stderr
    assert "in stuck" in stacks


def test_one_that_goes_on_is_left_alone(tmp_path):
    with Watchdog(2.0, tmp_path) as watchdog:
        for _ in range(6):
            time.sleep(0.05)
            watchdog.beat("a step")
    with Watchdog(None, tmp_path):
        pass
    assert not list(tmp_path.iterdir())
