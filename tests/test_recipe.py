"""The run directory: it begins whole or not at all, for one configuration, and its checkpoints know which."""

import dataclasses
import json
from pathlib import Path

import pytest

from repkit.checks import InputError
from repkit.recipe import RunDirectory


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 10


def save(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocabulary").mkdir()


def test_a_folder_has_its_configuration_once_everything_else_is_there(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a")
    run.create(Config(), Path("recipe.py"), save)
    assert sorted(entry.name for entry in run.path.iterdir()) == [
        *(".lock", "config.json", "tokenizer.json", "vocabulary")
    ]
    assert json.loads((run.path / "config.json").read_text())["config"] == {"steps": 10}
    # Another start of the same run leaves it as it is; one of another configuration is refused.
    run.create(Config(), Path("other.py"), lambda folder: pytest.fail("it was saved already"))
    with pytest.raises(InputError, match=r"another configuration \(steps: 10 -> 20\)"):
        run.create(Config(20), Path("recipe.py"), save)


def test_a_beginning_that_was_killed_is_cleared(tmp_path):
    run = RunDirectory(tmp_path / "a")

    def killed(folder: Path) -> None:
        save(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.create(Config(), Path("recipe.py"), killed)
    (run.path / ".beginning" / "vocabulary").rename(run.path / "vocabulary")  # Half of the files had been moved.
    run.check_usable(Config(20), resume=False)
    run.clear_beginning()
    assert [entry.name for entry in run.path.iterdir()] == [".lock"]
    run.create(Config(20), Path("recipe.py"), save)
    assert (run.path / "config.json").exists()


def test_a_folder_with_other_files_is_neither_used_nor_cleared(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    run = RunDirectory(tmp_path)
    with pytest.raises(InputError, match="holds other files and no run"):
        run.check_usable(Config(), resume=True)
    run.clear_beginning()
    assert (tmp_path / "thesis.tex").exists()


def test_the_hash_is_that_of_the_settings(tmp_path):
    runs = [RunDirectory(tmp_path / name) for name in "abc"]
    for run, config in zip(runs, [Config(), Config(), Config(20)], strict=True):
        run.create(config, Path(f"{run.path.name}.py"), save)
    first, second, third = (run.config_hash() for run in runs)
    assert first == second != third
    with pytest.raises(InputError, match="no run in"):
        RunDirectory(tmp_path / "none").config_hash()
