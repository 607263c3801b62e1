"""Several processes are found by the environment, and on loopback make the very step that one process makes; how they
train and end is the row `processes` of the soak."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.simulation import simulated_devices
from repkit.train.processes import Cluster, barrier, cluster_from, from_first, largest, on_this_process

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
    environment = os.environ | simulated_devices(8 // processes) | {"PYTHONPATH": str(ROOT)}
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


SLURM = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}
OURS = {"REPKIT_COORDINATOR": "10.0.0.1:9000", "REPKIT_PROCESSES": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({**OURS, "REPKIT_PROCESS": "3"}, Cluster("10.0.0.1:9000", 3, 4)),
        ({**OURS, "JOB_COMPLETION_INDEX": "1"}, Cluster("10.0.0.1:9000", 1, 4)),
        ({**SLURM, **OURS, "REPKIT_PROCESS": "0"}, Cluster("10.0.0.1:9000", 0, 4)),
        ({**OURS, "REPKIT_PROCESSES": "1", "REPKIT_PROCESS": "0"}, None),
        ({**SLURM, "SLURM_NODELIST": "gpu[003-006,9],other"}, Cluster("gpu003:61441", 3, 8)),
        ({**SLURM, "SLURM_NODELIST": "all", "SLURM_STEP_NODELIST": "a-7,b"}, Cluster("a-7:61441", 3, 8)),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        # A shell in an allocation, which srun has not started.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NODELIST": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}, Cluster("t-0.svc:8476", 1, 2)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_the_cluster_is_found_in_the_environment(environment, expected):
    assert cluster_from(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"REPKIT_PROCESSES": "2", "REPKIT_PROCESS": "0"}, "REPKIT_COORDINATOR to be host:port of process 0, got ''"),
        ({**OURS, "REPKIT_COORDINATOR": "host", "REPKIT_PROCESS": "0"}, "host:port of process 0, got 'host'"),
        (OURS, "need REPKIT_PROCESS to be a number"),
        ({**OURS, "REPKIT_PROCESS": "x"}, "need REPKIT_PROCESS to be a number from 0, got 'x'"),
        ({**OURS, "REPKIT_PROCESS": "4"}, "process 4 is none of 4; they are numbered from 0"),
        ({**OURS, "REPKIT_PROCESSES": "-2", "REPKIT_PROCESS": "0"}, "need REPKIT_PROCESSES to be a number"),
        (SLURM, "need SLURM_NODELIST, got ''"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "need TPU_WORKER_ID to be a number"),
    ],
)
def test_half_a_cluster_is_refused(environment, message):
    with pytest.raises(InputError, match=message):
        cluster_from(environment)


def test_one_process_waits_for_nobody_and_agrees_with_itself():
    barrier("here", seconds=0.01)
    assert (from_first(3), largest(4)) == (3, 4)
    tree = {"w": object()}
    assert on_this_process(tree) is tree
