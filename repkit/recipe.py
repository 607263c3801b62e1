"""Recipes: Python files that describe a run, and the run directory that holds what came of it.

A recipe module has three names:

- `Config`: a frozen dataclass whose fields have defaults (see `repkit.config` for their types); its field `train` is a
  `repkit.train.config.TrainConfig`.
- `smoke(config)`: the same run made so small that it takes seconds.
- `build(config, directory)`: the `Experiment`. It checks all of its input, and writes nothing.
"""

import functools
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import repkit
from repkit.checks import InputError
from repkit.config import differences, from_json, to_json
from repkit.lock import FolderLock
from repkit.objective import Objective

CONFIG_FILE = "config.json"
_BEGINNING = ".beginning"


class Experiment(NamedTuple):
    """The parts of a run, as a recipe assembles them.

    Attributes:
        init: from a typed key to the model's parameters.
        forward: `forward(params, batch, key) -> named outputs`.
        objective: the loss terms.
        batches: opens the stream of training batches.
        validate: from parameters to metrics on the validation data, run at each checkpoint.
        best_metric: the name of the validation metric by which the best checkpoint is chosen; larger is better.
        evaluate: from parameters to result rows on the test data.
        figures: from parameters and a folder to the paths of the figures drawn into it.
        save: writes what `build` needs to find again, such as a trained tokenizer, into the run directory.
        sharding_rules: how leaves of the training state are sharded over a mesh.
        teacher: loads what gives the training step its targets, see `repkit.train.teacher`; None where nothing runs
            beside the model. Evaluations do not call it.
        summary: text to read before the training begins, such as `repkit.distillation.describe` of its matches.
    """

    init: Callable[[Any], Any]
    forward: Callable[..., dict[str, Any]]
    objective: Objective
    batches: Callable[[], Any]
    validate: Callable[[Any], Mapping[str, float]]
    best_metric: str
    evaluate: Callable[[Any], list[Any]]
    figures: Callable[[Any, Path], list[Path]]
    save: Callable[[Path], None]
    sharding_rules: tuple[Any, ...] = ()
    teacher: Callable[[], Any] | None = None
    summary: Callable[[], str] | None = None


def load_recipe(path: Path) -> ModuleType:
    """Imports a recipe file.

    Raises:
        InputError: if there is no such file, or it lacks a name that a recipe needs.
    """
    if not path.is_file():
        raise InputError(
            f"no recipe at '{path}'; a recipe is a Python file, such as experiments/two_tower.py of a checkout"
        )
    return _imported(path.resolve(), path.stat().st_mtime_ns)


@functools.cache
def _imported(path: Path, changed: int) -> ModuleType:
    """The module of a recipe file; one and the same as long as the file is, so that what it keeps serves many runs."""
    del changed  # It tells apart what the file has held.
    name = f"repkit_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    missing = [needed for needed in ("Config", "smoke", "build") if not hasattr(module, needed)]
    if missing:
        raise InputError(f"the recipe '{path}' does not define {', '.join(missing)}")
    return module


class RunDirectory:
    """The folder of one run: its configuration, checkpoints, metrics, results and figures."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Where the figures go."""
        return self.path / "figures"

    def check_usable(self, config: Any, *, resume: bool) -> None:
        """Checks that a run with this configuration may be started or resumed here; writes nothing.

        Raises:
            InputError: if the folder belongs to another configuration or holds something else, if it holds this run and
                `resume` is not asked for, or if it cannot be written.
        """
        try:
            self._check_usable(config, resume=resume)
        except OSError as error:
            raise InputError(f"the run directory '{self.path}' cannot be used: {error}") from error

    def _check_usable(self, config: Any, *, resume: bool) -> None:
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir():
            raise InputError(f"'{parent}' is a file; the run directory needs a folder there")
        if not _is_writable(parent):
            raise InputError(f"the run directory '{self.path}' cannot be written: no permission in '{parent}'")
        if not (self.path / CONFIG_FILE).exists():
            if self.path.exists() and self._entries() and not self._is_beginning():
                raise InputError(f"'{self.path}' holds other files and no run; choose another --run directory")
            return
        stored = self._config(type(config), self._stored())
        changed = differences(stored, config)
        if changed:
            raise InputError(
                f"'{self.path}' belongs to a run with another configuration ({'; '.join(changed)}); "
                "choose another --run directory"
            )
        if not resume and self.checkpoints.exists():
            raise InputError(f"'{self.path}' already holds this run; add --resume to continue it")

    def create(self, config: Any, recipe: Path, save: Callable[[Path], None]) -> None:
        """Makes the folder with the configuration and what `save` writes, if it is new.

        A process that is killed meanwhile leaves a beginning that the next one clears: the configuration comes last.

        Args:
            config: the configuration.
            recipe: the recipe file.
            save: writes files into a folder.

        Raises:
            InputError: if another process has just made it a run of another configuration, or is making it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.path):
            if (self.path / CONFIG_FILE).exists():
                return self.check_usable(config, resume=True)
            self._clear_beginning()
            beginning = self.path / _BEGINNING
            beginning.mkdir()
            save(beginning)
            for entry in beginning.iterdir():
                entry.rename(self.path / entry.name)
            stored = {"repkit": repkit.__version__, "recipe": str(recipe.resolve()), "config": to_json(config)}
            (beginning / CONFIG_FILE).write_text(json.dumps(stored, indent=2) + "\n")
            (beginning / CONFIG_FILE).rename(self.path / CONFIG_FILE)
            beginning.rmdir()
        return None

    def clear_beginning(self) -> None:
        """Removes what a process left that was killed while it made the folder.

        Raises:
            InputError: if it is still making it.
        """
        if self._is_beginning():
            with FolderLock(self.path):
                self._clear_beginning()

    def _is_beginning(self) -> bool:
        return (self.path / _BEGINNING).is_dir() and not (self.path / CONFIG_FILE).exists()

    def _clear_beginning(self) -> None:
        if self._is_beginning():
            for entry in self._entries():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            shutil.rmtree(self.path / _BEGINNING)

    def _entries(self) -> list[Path]:
        """What is in the folder, but for hidden files."""
        return [entry for entry in self.path.iterdir() if not entry.name.startswith(".")]

    def load(self, recipe: Path | None = None) -> tuple[ModuleType, Any]:
        """The recipe and the configuration of the run in this folder.

        Args:
            recipe: the recipe file; None takes the one that the run was started with.

        Raises:
            InputError: if the folder holds no run, or its recipe is not to be found.
        """
        stored = self._stored()
        if recipe is None:
            recipe = self._own_recipe(Path(stored["recipe"]))
        module = load_recipe(recipe)
        return module, self._config(module.Config, stored)

    def _own_recipe(self, recipe: Path) -> Path:
        """The recipe that the folder names, unless it came with the folder: that may be somebody else's code."""
        if not recipe.is_absolute() or recipe.resolve().is_relative_to(self.path.resolve()):
            raise InputError(
                f"'{self.path}' names '{recipe}' as its recipe, which is not where `repkit train` finds one; "
                "read it, and name it with --recipe"
            )
        if not recipe.is_file():
            raise InputError(f"the recipe of this run is no longer at '{recipe}'; name it with --recipe")
        return recipe

    def _config(self, kind: type[Any], stored: dict[str, Any]) -> Any:
        try:
            return from_json(kind, stored["config"])
        except InputError as error:
            raise InputError(f"'{self.path / CONFIG_FILE}' does not fit the recipe: {error}") from error

    def config_hash(self) -> str:
        """sha256 of the stored configuration, by which checkpoints are known to be this run's.

        Raises:
            InputError: if the folder holds no run.
        """
        return hashlib.sha256(json.dumps(self._stored()["config"], sort_keys=True).encode()).hexdigest()

    def _stored(self) -> dict[str, Any]:
        if not (self.path / CONFIG_FILE).exists():
            raise InputError(f"no run in '{self.path}' (there is no {CONFIG_FILE}); `repkit train` makes one")
        try:
            stored = json.loads((self.path / CONFIG_FILE).read_text())
            if not isinstance(stored["recipe"], str) or not isinstance(stored["config"], dict):
                raise TypeError("expected the path of a recipe, and settings")
            return {"recipe": stored["recipe"], "config": stored["config"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"'{self.path / CONFIG_FILE}' is not the configuration of a run: {error}") from error


def _is_writable(folder: Path) -> bool:
    # Asking the file system beats asking for permission bits, which say nothing of read-only mounts.
    probe = folder / ".repkit-write-test"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
