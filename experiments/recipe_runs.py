"""Runs of a recipe, by the same commands that a user gives: `repkit train` and `repkit evaluate`."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax

from repkit.checks import InputError
from repkit.cli import main as repkit_command
from repkit.evaluate.results import Result, read_results

SMALLEST_TWO_TOWER = (
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "model.embed_dim=16",
    "data.train=train[:512]",
    "data.validation=validation[:256]",
    "data.test=test[:256]",
)
"""Settings of `experiments/two_tower.py` for a smoke run."""


def keep_programs(folder: Path) -> None:
    """Keeps compiled programs, unless the environment says where: runs that differ in their seed are one program."""
    # Workers read the environment; this process has read it.
    shortest = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    kept = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(shortest))
    jax.config.update("jax_compilation_cache_dir", kept)


def compile_quickly() -> None:
    """Leaves LLVM's expensive passes out: compiling is nearly all that tiny runs cost."""
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Workers read the environment, and so does this process when it compiles for the first time.
    flags = os.environ.get("XLA_FLAGS", "")
    if quick not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {quick}".strip()


def run_settings(own: Sequence[str], defaults: Sequence[str], changes: Sequence[str]) -> tuple[str, ...]:
    """The settings of a run, those of the user last.

    Args:
        own: what distinguishes it from other runs, NAME=VALUE; not to be changed, or all runs would be alike.
        defaults: what it has in common with them.
        changes: the user's.

    Raises:
        InputError: if a change has a name of `own`.

    Example:
        >>> run_settings(["train.seed=1"], ["train.steps=9"], ["train.steps=5"])
        ('train.seed=1', 'train.steps=9', 'train.steps=5')
        >>> run_settings(["train.seed=1"], [], ["train.seed=5"])
        Traceback (most recent call last):
        repkit.checks.InputError: --set train.seed=5: train.seed is what the runs of the study differ in
    """
    names = {setting.partition("=")[0] for setting in own}
    for change in changes:
        name = change.partition("=")[0]
        if name in names:
            raise InputError(f"--set {change}: {name} is what the runs of the study differ in")
    return (*own, *defaults, *changes)


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Writes what is printed to a log beside the folder: the lines of several runs at a time would be mixed up."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"  # a name may hold a dot
    with log.open("a") as file, contextlib.redirect_stdout(file):
        yield


def train(recipe: Path, folder: Path, settings: Iterable[str], *, smoke: bool = False) -> None:
    """`repkit train` with these settings, NAME=VALUE, to the end; a run that was begun goes on."""
    options = [item for setting in settings for item in ("--set", setting)]
    command = ["train", str(recipe), "--run", str(folder), "--resume", *options]
    _require_success(repkit_command([*command, "--smoke"] if smoke else command))


def evaluate(folder: Path) -> list[Result]:
    """`repkit evaluate`: the results on the test data."""
    _require_success(repkit_command(["evaluate", str(folder)]))
    return read_results(folder / "results.jsonl")


def named_metrics(results: Iterable[Result]) -> dict[str, float]:
    """The metrics of all tasks, as `<task>/<metric>`."""
    return {f"{result.task}/{name}": value for result in results for name, value in result.metrics.items()}


def _require_success(code: int) -> None:
    if code:
        raise SystemExit(code)
