"""What the tests of the studies share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_study(tmp_path):
    """Runs the command of a study in the test's folder, on one device as a user does; returns what it prints."""

    def run(study: str, *options: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        command = [sys.executable, "-m", f"experiments.{study}", *options]
        environment["PYTHONPATH"] = str(ROOT)
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    return run
