"""Runs of a recipe, by the same commands that a user gives: `repkit train` and `repkit evaluate`."""

import os
from collections.abc import Iterable
from pathlib import Path

import jax

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
"""Settings of that recipe for a smoke run."""


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
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()


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
