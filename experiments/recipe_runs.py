"""Runs of a recipe, by the same commands that a user gives: `repkit train` and `repkit evaluate`."""

import os
from collections.abc import Iterable
from pathlib import Path

import jax

from repkit.cli import main as repkit_command
from repkit.evaluate.results import Result, read_results


def keep_programs(folder: Path) -> None:
    """Keeps compiled programs, unless the environment says where: runs that differ in their seed are one program."""
    # Workers read the environment; this process has read it.
    shortest = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    kept = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(shortest))
    jax.config.update("jax_compilation_cache_dir", kept)


def train(recipe: Path, folder: Path, settings: Iterable[str], *, smoke: bool = False) -> None:
    """`repkit train` with these settings, NAME=VALUE, to the end; a run that was begun goes on."""
    options = [item for setting in settings for item in ("--set", setting)]
    command = ["train", str(recipe), "--run", str(folder), "--resume", *options]
    _require_success(repkit_command([*command, "--smoke"] if smoke else command))


def evaluate(folder: Path) -> list[Result]:
    """`repkit evaluate`: the results on the test data."""
    _require_success(repkit_command(["evaluate", str(folder)]))
    return read_results(folder / "results.jsonl")


def _require_success(code: int) -> None:
    if code:
        raise SystemExit(code)
