"""What repkit promises about faults, measured; the table of docs/reliability.md.

    python -m tests.faults.soak --list
    python -m tests.faults.soak damage kills --count 20 --output /tmp/soak
    python -m tests.faults.soak --minutes 30 --docs docs/reliability.md

A row can be run alone, and with fewer trials than the table asks for: the figure says how many it were. Each runs in a
process of its own. Figures are kept in a JSON file; the table shows the last of every row.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from repkit.checks import InputError, RunWarning, require_choice
from repkit.cli import main as repkit_command
from repkit.recipe import load_recipe
from repkit.simulation import simulated_devices
from repkit.train.checkpoint import Checkpointer, CheckpointReader, SaveFailedError
from repkit.train.config import make_optimizer
from repkit.train.interrupt import EXIT_INTERRUPTED
from repkit.train.logging import MetricLogger, read_metrics
from repkit.train.mesh import batch_axes, make_mesh
from repkit.train.processes import EXIT_LOST_PEER
from repkit.train.state import TrainState, init_state
from repkit.train.step import Placement, jit_placement, make_update
from repkit.train.watchdog import EXIT_HUNG

ROOT = Path(__file__).parent.parent.parent
RECIPE = Path(__file__).with_name("recipe.py")
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- table of make soak -->", "<!-- end of the table -->"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        test: what is done.
        measure: from a scratch folder and the number of trials to the figure; raises `AssertionError` where the promise
            is broken.
        trials: as many as the table asks for.
        devices: on how many it runs.
    """

    test: str
    measure: Callable[[Path, int], str]
    trials: int
    devices: int = 1


# ---------------------------------------------------------------------------------------------------------------------
# Runs of the small recipe


def train(run: Path, *settings: str, **faults: Any) -> tuple[int, str]:
    """`repkit train --resume` in this process: its exit code and standard error."""
    words = [word for setting in settings for word in ("--set", setting)]
    errors, output = io.StringIO(), io.StringIO()
    with (
        _environment(REPKIT_FAULTS=json.dumps(faults)),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(output),
    ):
        code = repkit_command(["train", str(RECIPE), "--run", str(run), "--resume", *words])
    return code, errors.getvalue()


def start(
    run: Path,
    *settings: str,
    log: Path,
    limit: int | None = None,
    variables: Mapping[str, str] | None = None,
    **faults: Any,
) -> subprocess.Popen[bytes]:
    """`repkit train --resume` in a process of its own, on one device; `limit` in bytes on the files it writes."""
    words = [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "XLA_FLAGS": "", "REPKIT_FAULTS": json.dumps(faults), "PYTHONPATH": str(ROOT)}
    environment |= variables or {}
    command = [sys.executable, "-m", "repkit.cli", "train", str(RECIPE), "--run", str(run), "--resume", *words]
    if limit is not None:
        command = ["prlimit", f"--fsize={limit}", *command]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def leaves(run: Path, step: int | None = None) -> dict[str, Any]:
    """Every leaf of a run's checkpoint by its path, on the host; random keys as their data."""
    return _on_host(CheckpointReader(run / "checkpoints"), step)


def _on_host(reader: CheckpointReader, step: int | None) -> dict[str, Any]:
    state = reader.read("", step=step).state
    # What is a jax array there is a random key.
    keys = {path: jax.random.key_data(leaf) for path, leaf in state.items() if isinstance(leaf, jax.Array)}
    return {path: np.asarray(leaf) for path, leaf in {**state, **keys}.items()}


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The paths of leaves that are not equal bit by bit."""
    paths = sorted({*first, *second})
    return [
        path
        for path in paths
        if path not in first or path not in second or first[path].tobytes() != second[path].tobytes()
    ]


def examples_by_position(ids: Path) -> dict[int, list[int]]:
    """The examples of every batch; where a batch was drawn twice, both times must give the same."""
    seen: dict[int, list[int]] = {}
    for line in ids.read_text().splitlines():
        position, examples = json.loads(line)
        assert seen.setdefault(position, examples) == examples, f"batch {position} differs between two sessions"
    return seen


def resume_mid_epoch(folder: Path, trials: int) -> str:
    """Interrupted in mid-epoch, resumed with another number of loader threads, against a run that never stopped."""
    assert train(folder / "whole", ids=str(folder / "whole.ids"))[0] == 0
    expected, expected_ids = leaves(folder / "whole"), examples_by_position(folder / "whole.ids")
    # An epoch is 6 1/4 batches.
    for index, position in enumerate([9, 23, 46, 4, 17, 31, 38, 52, 61, 67][:trials]):
        run, ids = folder / f"run_{index}", str(folder / f"{index}.ids")
        assert train(run, sigterm_at=[position], ids=ids)[0] == EXIT_INTERRUPTED
        assert train(run, threads=index % 3, ids=ids)[0] == 0
        different = differing(expected, leaves(run))
        assert not different, f"interrupted at {position}: {different}"
        assert examples_by_position(Path(ids)) == expected_ids
    return f"{trials} points in mid-epoch: 0 of {len(expected)} leaves differ; the same examples in all 70 batches"


def sigterm_every_seven(folder: Path, trials: int) -> str:
    """SIGTERM after every seven batches of a process, to step 70."""
    assert train(folder / "whole")[0] == 0
    expected = leaves(folder / "whole")
    sessions = 0
    for index in range(trials):
        code = EXIT_INTERRUPTED
        while code == EXIT_INTERRUPTED:
            code, errors = train(folder / f"run_{index}", sigterm_every=7)
            sessions += 1
            assert sessions < 20 * trials, "it does not come to an end"
        assert code == 0, errors
        assert not differing(expected, leaves(folder / f"run_{index}"))
    return f"{trials} run, {sessions} sessions: identical final state"


# ---------------------------------------------------------------------------------------------------------------------
# Kills and damage


def kills(folder: Path, trials: int, *, interval: int = 10) -> str:
    """kill -9 of a process that does nothing but save and delete."""
    from tests.faults.saver import LIKE, state_at

    directory, begun = folder / "checkpoints", folder / "begun"
    rng, restarts, lost, leftovers = random.Random(0), 0, [], 0
    command = [sys.executable, "-m", "tests.faults.saver", str(directory), str(begun), str(interval)]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    for _ in range(trials):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("restored"), "it did not start again"
            restarts += 1
            time.sleep(rng.uniform(0.05, 1.0))
            process.kill()
        leftovers += any((directory / name).exists() for name in ("unfinished", "todelete"))
        reader = CheckpointReader(directory)
        for step in reader.steps():
            restored = reader.restore(LIKE, step).state
            assert not differing({name: np.asarray(x) for name, x in state_at(step).items()}, restored)
        if begun.read_text():
            last = int(begun.read_text().splitlines()[-1])
            lost.append(last - (reader.latest_step() or 0))
    assert max(lost) <= interval
    return (
        f"{trials} kills, {leftovers} of them in the middle of saving or deleting: {restarts} restarts; at most "
        f"{max(lost)} steps lost of a save begun, with one every {interval}; 0 unreadable steps listed"
    )


def _damage(kind: str, content: bytearray, rng: random.Random) -> bytearray:
    if kind == "flip":
        position = rng.randrange(8 * len(content))
        content[position // 8] ^= 1 << position % 8
    elif kind == "zeros":
        start_ = rng.randrange(len(content))
        stop = min(len(content), start_ + 512)
        before = bytes(content)
        content[start_:stop] = bytes(stop - start_)
        if content == before:  # It was zero before; half of a block of ones then.
            content[start_] = 255
    else:
        del content[rng.randrange(len(content)) :]
    return content


def damage(folder: Path, trials: int) -> str:
    """Every kind of damage to every kind of file of the newest checkpoint."""
    like = {"w": np.zeros(4096, np.float32), "b": np.zeros(7, np.float32)}
    states = {step: {"w": np.arange(4096, dtype=np.float32) + step, "b": np.full(7, step, "f4")} for step in (1, 2, 3)}
    with Checkpointer(folder / "checkpoints") as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"position": step})
    newest = folder / "checkpoints" / "3"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    rng, counts = random.Random(0), {}
    reader = CheckpointReader(folder / "checkpoints")
    third = -(-trials // 3)
    for kind, count in (("flip", trials), ("zeros", third), ("cut", third), ("gone", third)):
        for index in range(count):
            # Every other time by size, so that most hits are where most bytes are.
            weights = [path.stat().st_size for path in files] if index % 2 else None
            (path,) = rng.choices(files, weights)
            content = path.read_bytes()
            if kind == "gone":
                path.unlink()
            else:
                path.write_bytes(_damage(kind, bytearray(content), rng))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                restored = reader.restore(like)
            named = [str(warning.message) for warning in caught if warning.category is RunWarning]
            assert len(named) == 1, f"{kind} of {path.name} was not noticed"
            assert path.name in named[0], named
            assert restored.step == 2
            assert not differing(states[2], restored.state)
            path.write_bytes(content)
        counts[kind] = count
    assert reader.restore(like).step == 3
    return (
        f"{counts['flip']} flipped bits, {counts['zeros']} zeroed blocks, {counts['cut']} cut and {counts['gone']} "
        f"deleted files in {len(files)} files: 100 % detected and named, 100 % recovered from the step before"
    )


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[str]:
    """A disk of its own where the system allows it, else a limit on the files that this process writes."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        try:
            yield "a disk of 4 MiB"
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, hard))
    try:
        yield "files limited to 1 MiB"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(folder: Path, trials: int) -> str:
    """A disk that is full when a checkpoint is written and has room again later; a directory that cannot be written."""
    small, large = {"w": np.arange(2**14, dtype=np.float32)}, np.random.default_rng(0).normal(size=2**21)
    with _small_disk(folder / "disk", 4 * 2**20) as kind:
        directory = folder / "disk" / "checkpoints"
        with Checkpointer(directory, keep_last=2) as checkpoints:
            checkpoints.save(1, small, {})
            checkpoints.wait()
            for step in range(2, 2 + trials):
                message = ""
                try:
                    checkpoints.save(step, {"w": large}, {})
                    checkpoints.wait()
                except SaveFailedError as error:
                    message = str(error)
                assert re.search(r"No space left|File too large", message), f"unclear: {message!r}"
                assert "\n" not in message
                assert not differing(small, checkpoints.restore(small, step=1).state)
            checkpoints.save(100, small, {})
            checkpoints.wait()
            assert checkpoints.steps() == [1, 100]
        names = sorted(path.name for path in directory.iterdir())
        assert names == [".lock", "1", "100"], names
    refused = ""
    try:
        Checkpointer("/proc/checkpoints")
    except InputError as error:
        refused = str(error)
    assert "cannot write to checkpoint directory" in refused
    return f"{kind}, {trials} failed saves: a clear error, the older step intact, nothing left after the next good save"


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def _placed(axes: Mapping[str, int], folder: Path) -> tuple[Placement, Any]:
    recipe = load_recipe(RECIPE)
    config = recipe.Config()
    experiment = recipe.build(config, folder)
    mesh = make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    objective = experiment.objective.over_mesh(mesh, batch_axes(mesh)) if mesh.size > 1 else experiment.objective
    optimizer, teacher = make_optimizer(config.train), experiment.teacher()
    update = make_update(experiment.forward, objective, optimizer, teacher=teacher, ema_decay=config.train.ema_decay)
    rules = (("first|second", PartitionSpec("fsdp")),) if "fsdp" in axes else ()

    def make_state(key: jax.Array) -> TrainState:
        return init_state(experiment.init, optimizer, objective, key=key, ema=True)

    return jit_placement(update, make_state, mesh, rules=rules, teacher=teacher), experiment


def meshes(folder: Path, trials: int) -> str:
    """One state from mesh to mesh, and the loss of the next step on each."""
    del trials
    chain = [{"data": 8}, {"data": 4}, {"data": 2}, {"data": 1}, {"data": 4, "fsdp": 2}, {"fsdp": 8}, {"data": 8}]
    placement, experiment = _placed(chain[0], folder)
    state = placement.init(jax.random.key(0))
    batches = experiment.batches()
    for _ in range(3):
        state, _ = placement.update(state, placement.put_batch(next(batches)))
    batch = next(batches)
    batches.close()
    saved: list[dict[str, Any]] = []
    losses: list[float] = []
    for step, axes in enumerate(chain, start=1):
        placement, _ = _placed(axes, folder)
        with Checkpointer(folder / "checkpoints") as checkpoints:
            if saved:
                state = placement.put_state(checkpoints.restore(placement.abstract).state)
            checkpoints.save(step, placement.get_state(state), {})
        saved.append(_on_host(CheckpointReader(folder / "checkpoints"), step))
        assert not differing(saved[0], saved[-1]), f"{axes}: {differing(saved[0], saved[-1])}"
        state, metrics = placement.update(state, placement.put_batch(batch))
        losses.append(float(metrics["loss"]))
    spread = max(losses) - min(losses)
    assert spread <= 1e-6 * max(1, abs(losses[0])), losses
    return f"{len(chain)} meshes ({' -> '.join(map(_short, chain))}): bit-equal; next loss within {spread:.1e}"


def _short(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items())


def nan_in_one_replica(folder: Path, trials: int) -> str:
    """A value that is no number in the rows of one of eight devices, under both placements."""
    del trials
    for placement in ("jit", "pmap"):
        run = folder / placement
        code, errors = train(run, f"train.placement={placement}", "train.steps=20", nan_at=[3, 4, 12])
        assert code == 0, errors
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
        assert [row["skipped_steps"] for row in rows] == [0] * 3 + [1] + [2] * 8 + [3] * 8
        state = leaves(run)
        assert all(np.isfinite(leaf).all() for path, leaf in state.items() if path.startswith(("params", "ema", "opt")))
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events] == [4, 5, 13]
        assert all(event["terms"] == ["gamma", "queue"] and len(event["example_ids"]) == 8 for event in events)
    return "jit and pmap on 8 devices, 3 bad batches of 20: skipped on all, weights finite, examples and terms named"


def steady(folder: Path, trials: int) -> str:
    """Memory and compilations of a long run."""
    compilations: list[float] = []

    def count(name: str, seconds: float, **more: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compilations.append(time.monotonic())

    jax.monitoring.register_event_duration_secs_listener(count)
    at: dict[int, tuple[int, int]] = {}
    log = MetricLogger.log

    def watched(self: MetricLogger, step: int, metrics: Mapping[str, Any], examples: int | None = None) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        at[step] = (resident, len(compilations))
        log(self, step, metrics, examples)

    MetricLogger.log = watched  # type: ignore[method-assign]
    settings = (f"train.steps={trials}", "train.checkpoint_every=50", "train.log_every=5")
    code, errors = train(folder / "run", *settings)
    assert code == 0, errors
    begin = max(trials // 4, 60) // 5 * 5
    (before, compiled), (after, compiled_after) = at[begin], at[trials]
    assert compiled_after == compiled, f"{compiled_after - compiled} compilations after step {begin}"
    assert after < 1.01 * before, f"resident memory grew by {after / before - 1:.1%}"
    return f"from step {begin} to {trials}: resident memory {after / before - 1:+.2%}, no compilation"


def hang(folder: Path, trials: int) -> str:
    """A loader that never gives the next batch."""
    del trials
    settings = ("train.steps=20", "train.hang_seconds=120")
    process = start(folder / "run", *settings, log=folder / "log", hang_at=[15])
    _await_step(folder / "log", 0, 15, process, seconds=600)
    began = time.monotonic()
    assert process.wait(600) == EXIT_HUNG
    seconds = time.monotonic() - began
    assert "no progress for 120 s in step 16, waiting for its batch" in (folder / "log").read_text()
    assert "__next__" in (folder / "run" / "stacks.txt").read_text()
    assert train(folder / "run", *settings)[0] == 0
    return f"ended after {seconds:.0f} s at a limit of 120 s, with exit code {EXIT_HUNG} and stacks; resumed to the end"


def _pair(run: Path, log: Path, *settings: str, **faults_of_second: Any) -> list[subprocess.Popen[bytes]]:
    """Two processes of one training on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"REPKIT_COORDINATOR": address, "REPKIT_PROCESSES": "2"}
    return [
        start(
            run,
            *settings,
            log=log.with_suffix(f".{number}"),
            variables={**shared, "REPKIT_PROCESS": str(number)},
            **(faults_of_second if number else {}),
        )
        for number in range(2)
    ]


def processes(folder: Path, trials: int) -> str:
    """Two processes, of which one is killed; both started again; the checkpoint taken on by one process alone."""
    settings = ("train.steps=30",)
    assert [each.wait(1800) for each in _pair(folder / "whole", folder / "whole", *settings)] == [0, 0]
    expected = leaves(folder / "whole")
    slowest = 0.0
    for index in range(trials):
        run, log = folder / f"run_{index}", folder / f"log_{index}"
        first, second = _pair(run, log, *settings, kill_at=[15 + index])
        assert second.wait(1800) == -signal.SIGKILL
        began = time.monotonic()
        assert first.wait(60) == EXIT_LOST_PEER
        slowest = max(slowest, time.monotonic() - began)
        assert "process 0 ends: process 1 has ended" in log.with_suffix(".0").read_text()
        shutil.copytree(run, folder / f"alone_{index}")
        assert [each.wait(1800) for each in _pair(run, log, *settings)] == [0, 0]
        assert not differing(expected, leaves(run))
        alone = folder / f"alone_{index}"
        restored = leaves(alone)
        assert start(alone, *settings, log=folder / "alone.log", sigterm_at=[11]).wait(1800) == EXIT_INTERRUPTED
        losses = [
            {row["step"]: row["loss"] for row in read_metrics(each / "metrics.jsonl") if "loss" in row}[11]
            for each in (folder / "whole", alone)
        ]
        assert abs(losses[0] - losses[1]) <= 1e-6 * max(1.0, abs(losses[0])), losses
        assert restored["step"] == 10
    return (
        f"{trials} time(s): the other ended {slowest:.1f} s later with a message and exit code {EXIT_LOST_PEER}; both "
        f"started again: identical final state; one process went on from the checkpoint of two, next loss within 1e-6"
    )


def hostile(folder: Path, trials: int) -> str:
    """All files of tests/faults/hostile.py."""
    from tests.faults.hostile import CASES, refusal

    del trials
    for index, case in enumerate(CASES.values()):
        place = folder / str(index) / "folder"
        place.mkdir(parents=True)
        refusal(case, place)
    assert not list(folder.rglob("pwned"))
    return f"{len(CASES)} files: all refused in one clear line, nothing written"


# ---------------------------------------------------------------------------------------------------------------------
# Everything at once


def everything(folder: Path, minutes: int) -> str:
    """A run that meets random faults, and is started again by nothing but its own command."""
    rng = random.Random(0)
    run, log = folder / "run", folder / "log"
    settings = ("train.steps=1000000", "train.checkpoint_every=20", "train.log_every=1")
    bad = list(range(30, 100_000, 97))
    counts: dict[str, int] = {}
    lost, began = 0, time.monotonic()
    while time.monotonic() - began < 60 * minutes:
        fault = rng.choice(["kill", "kill", "terminate", "damage", "full disk", "second process", "pause"])
        before = _latest(run)
        offset = log.stat().st_size if log.exists() else 0
        process = start(
            run, *settings, log=log, nan_at=bad, seconds=0.01, limit=20_000 if fault == "full disk" else None
        )
        _await_step(log, offset, before + rng.randrange(1, 60), process, seconds=1800)
        if fault == "second process":
            second = start(run, *settings, log=folder / "second")
            assert second.wait(600) == 2, "a second process was let in"
            assert "in use by process" in (folder / "second").read_text()
        if fault == "pause":
            process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM if fault in ("terminate", "second process", "pause") else signal.SIGKILL)
        process.wait(600)
        if fault == "damage" and len(_steps(run)) > 1:
            files = sorted(path for path in (run / "checkpoints" / str(_latest(run))).rglob("*") if path.is_file())
            path = rng.choice(files)
            kind = rng.choice(["flip", "zeros", "cut"])
            path.write_bytes(_damage(kind, bytearray(path.read_bytes()), rng))
        reached = _last_logged(log, offset)
        usable = _latest_good(run)
        lost += max(0, reached - usable)
        counts[fault] = counts.get(fault, 0) + 1
    spent = time.monotonic() - began
    final = _latest_good(run)
    assert final > 0, f"no session came to a checkpoint: {counts}"
    reference = folder / "reference"
    began = time.monotonic()
    process = start(
        reference, *settings, log=folder / "reference.log", nan_at=bad, seconds=0.01, sigterm_at=[final - 1]
    )
    assert process.wait(3600) == EXIT_INTERRUPTED
    undisturbed = time.monotonic() - began
    different = differing(leaves(run, final), leaves(reference, final))
    assert not different, different
    told = ", ".join(f"{count} x {fault}" for fault, count in sorted(counts.items()))
    return (
        f"{minutes} minutes, {sum(counts.values())} sessions ({told}): step {final}, identical to an undisturbed run; "
        f"{lost} steps made twice, goodput {undisturbed / spent:.0%} (starts included), zero manual fixes"
    )


def _steps(run: Path) -> list[int]:
    return CheckpointReader(run / "checkpoints").steps()


def _latest(run: Path) -> int:
    return max(_steps(run), default=0)


def _latest_good(run: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CheckpointReader(run / "checkpoints").read("step").step if _steps(run) else 0


def _last_logged(log: Path, offset: int) -> int:
    steps = re.findall(rb"^step (\d+)/", log.read_bytes()[offset:], re.MULTILINE)
    return int(steps[-1]) if steps else 0


def _await_step(log: Path, offset: int, step: int, process: subprocess.Popen[bytes], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and _last_logged(log, offset) < step:
        time.sleep(0.02)


ROWS = {
    "resume": Row("resume equals uninterrupted, with dropout, moving average, memory and queue", resume_mid_epoch, 3),
    "sigterm": Row("SIGTERM every 7 steps to step 70", sigterm_every_seven, 1),
    "kills": Row("kill -9 at random moments of saving and deleting", kills, 100),
    "damage": Row("flipped bits, zeroed blocks, cut and deleted files", damage, 300),
    "disk": Row("full disk, directory that cannot be written", full_disk, 5),
    "meshes": Row("restored on other meshes", meshes, 1, 8),
    "nan": Row("a value that is no number in one replica", nan_in_one_replica, 1, 8),
    "steady": Row("memory and compilations of a long run", steady, 2000),
    "hang": Row("a loader that hangs", hang, 1),
    "processes": Row("two processes, one killed", processes, 1),
    "hostile": Row("hostile files", hostile, 1),
    "everything": Row("random faults of all kinds", everything, 30),
}


def measured(name: str, trials: int, folder: Path) -> dict[str, Any]:
    """Runs a row; what it found, or how it failed."""
    row = ROWS[name]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        figure, passed = row.measure(folder, trials), True
    except Exception as error:  # A row that fails must not keep the others from being measured.
        figure, passed = f"FAILED: {type(error).__name__}: {error}", False
    return {"figure": figure, "passed": passed, "seconds": round(time.monotonic() - began), "jax": jax.__version__}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows that have been measured, in the order of `ROWS`."""
    lines = ["| test | figure | seconds |", "|---|---|---|"]
    lines += [
        f"| {row.test} | {results[name]['figure'].replace('|', '/')} | {results[name]['seconds']} |"
        for name, row in ROWS.items()
        if name in results
    ]
    return "\n".join(lines)


def write_table(results: Mapping[str, Mapping[str, Any]], page: Path) -> None:
    """Puts the table between its marks in a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def in_own_process(name: str, trials: int, folder: Path) -> dict[str, Any]:
    """`measured`, in a process with as many devices as the row asks for."""
    folder.mkdir(parents=True)
    environment = {**os.environ, **simulated_devices(ROWS[name].devices), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.faults.soak", name, "--count", str(trials), "--inside", str(folder)]
    with (folder / "errors").open("w") as errors:
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        tail = (folder / "errors").read_text().splitlines()[-1:]
        return {"figure": f"FAILED: ended with code {done.returncode}: {tail}", "passed": False, "seconds": 0}
    return json.loads(lines[-1])


def main() -> int:
    """Runs the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to run; none for all")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument("--count", type=int, help="trials of each row, instead of the table's")
    parser.add_argument("--minutes", type=int, help="minutes of the row 'everything', instead of 30")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file that keeps the figures")
    parser.add_argument("--docs", type=Path, help="page whose table is to be written")
    parser.add_argument("--keep", type=Path, help="folder for what the rows write; a temporary one if none")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.rows:
        require_choice("row", name, ROWS)
    if options.inside is not None:
        (name,) = options.rows
        print(json.dumps(measured(name, options.count, options.inside)))
        return 0
    if options.list:
        for name, row in ROWS.items():
            print(f"{name:<12} {row.test} ({row.trials})")
        return 0
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    scratch = options.keep or Path(tempfile.mkdtemp(prefix="repkit-soak-"))
    passed = True
    for name in options.rows or ROWS:
        chosen = options.minutes if name == "everything" else options.count
        results[name] = in_own_process(name, chosen or ROWS[name].trials, scratch / name)
        passed = passed and results[name]["passed"]
        print(f"{name}: {results[name]['figure']} ({results[name]['seconds']} s)", flush=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    if options.docs is not None:
        write_table(results, options.docs)
    if options.keep is None:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
