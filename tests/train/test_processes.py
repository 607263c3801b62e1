"""Several processes on loopback make the very step that one process makes."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("step_of_processes.py")
ROOT = Path(__file__).parents[2]


def _script():
    spec = importlib.util.spec_from_file_location("repkit_tests_step_of_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "axes"),
    [(2, {}), (4, {"fsdp": 2}), (4, {"tensor": 4}), (2, {"data": 1, "tensor": 8})],
    ids=["2, data", "4, data and fsdp", "4, tensor over two processes", "2, tensor over all"],
)
def test_processes_make_the_step_of_one(processes, axes, tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    output = tmp_path / "gradient.npz"
    common = (f"127.0.0.1:{_free_port()}", str(processes), json.dumps(axes), str(output))
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), common[0], str(process), *common[1:]],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        texts = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(texts)
    expected = _script().gradient(axes)
    with np.load(output) as found:
        for name, gradient in expected.items():
            norm = np.linalg.norm(gradient)
            # Not bit for bit: processes add their shares in another order than threads of one process.
            assert np.linalg.norm(found[name] - gradient) <= 1e-6 * norm + 1e-9, name
