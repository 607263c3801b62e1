"""The benchmarks of a step run, and say what they are asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repkit.simulation import simulated_devices

ROOT = Path(__file__).parents[2]


def rows_of(what: str, path: Path, *arguments: str, devices: int = 1) -> list[dict]:
    command = (sys.executable, "-m", "benchmarks.step", what, "--output", str(path), *arguments)
    environment = os.environ | simulated_devices(devices)
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_memory_falls_with_the_number_of_micro_batches(tmp_path):
    whole, in_parts = rows_of("memory", tmp_path / "rows.jsonl", "--batch", "64", "--parts", "1", "8")
    assert in_parts["temporary MiB"] < whole["temporary MiB"] / 3
    # A second forward pass is a third more.
    assert in_parts["GFLOP"] == pytest.approx(4 / 3 * whole["GFLOP"], rel=0.05)


@pytest.mark.slow
def test_a_step_and_its_parts_are_timed(tmp_path):
    rows = {row["part"]: row for row in rows_of("time", tmp_path / "rows.jsonl", "--batch", "8", "--seconds", "0.1")}
    assert {"step", "towers", "loss", "optimizer", "batch to the devices"} == rows.keys()
    assert rows["step"]["examples per second and device"] > 0
    assert 0 < rows["step"]["share of the matrix rate"] < 1


@pytest.mark.slow
def test_what_devices_send_is_counted_for_each_mesh(tmp_path):
    rows = rows_of("scaling", tmp_path / "rows.jsonl", "--batch", "8")
    assert [row["devices"] for row in rows] == [1] + [count for count in (2, 4, 8) for _ in range(3)]
    assert rows[0]["MB sent a device"] == 0
    assert all(row["MB sent a device"] > 0 for row in rows[1:])


@pytest.mark.slow
def test_what_a_loss_adds_to_a_step_of_many_devices_is_planned(tmp_path):
    options = ("--topology", "h100-4", "--batch", "64", "--parts", "1")
    rows = rows_of("pod", tmp_path / "rows.jsonl", *options, devices=4)
    sent = {row["loss"]: row["MB sent a device"] for row in rows}
    assert "collective-permute" in sent["info_nce"]
    assert "all-gather" in sent["info_nce, plain"]
    assert not {"all-gather", "collective-permute"} & (
        sent["own pairs alone"].keys() | sent["geometric_consistency"].keys()
    )
