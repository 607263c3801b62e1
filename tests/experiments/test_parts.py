"""Studies of several parts: their runs, and the settings that a user changes."""

import dataclasses
import json
import pickle

import pytest

from experiments.comparison import difference_tables
from experiments.gradient_bias.__main__ import STUDY as GRADIENT_BIAS
from experiments.modality_structure.__main__ import STUDY as MODALITY_STRUCTURE
from experiments.parts import Study, study_command
from experiments.recipe_runs import run_settings
from experiments.study import Run


@pytest.mark.parametrize("study", [GRADIENT_BIAS, MODALITY_STRUCTURE], ids=lambda study: study.name)
def test_each_run_has_a_name_of_its_own_and_can_be_made_by_a_worker(study):
    for parts in (study.parts, study.smoke):
        for name, part in parts.items():
            names = [json.dumps(settings) for settings in part.all_settings()]
            assert len(set(names)) == len(names) > 0, name
            assert pickle.loads(pickle.dumps(part)) == part
    assert study.parts.keys() == study.smoke.keys()


@dataclasses.dataclass(frozen=True)
class Roots:
    """A part for the test: the square of a number."""

    numbers: tuple[int, ...]

    def all_settings(self):
        return ({"number": number} for number in self.numbers)

    def make(self, settings, setup):
        return {"square": settings["number"] ** 2 + len(setup.changes)}

    def tables(self, finished):
        yield ", ".join(f"{run.metrics['square']:g}" for run in finished())

    def draw(self, finished, setup):
        (setup.results / "figure").touch()


def test_changed_settings_have_results_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = Study("numbers", "Numbers", parts={"roots": Roots((1, 2, 3))}, smoke={"roots": Roots((4,))})
    assert study_command(study, None, ["--smoke"]) == 0
    assert study_command(study, None, ["--set", "model.width=8"]) == 0
    folder = tmp_path / "runs" / "numbers"
    assert "16\n" in (folder / "smoke" / "results" / "RESULTS.md").read_text()
    assert "2, 5, 10\n" in (folder / "model.width=8" / "results" / "RESULTS.md").read_text()
    assert study_command(study, None, ["--set", "train.steps=9", "--minutes", "0"]) == 0
    assert "Not complete" in capsys.readouterr().out
    assert (folder / "train.steps=9" / "results" / "figure").exists()


def test_differences_are_taken_from_each_baseline_that_has_runs():
    found = {
        method: [Run({"seed": seed}, {"accuracy": value + seed / 10}) for seed in range(count)]
        for method, value, count in (("none", 0.5, 3), ("ours", 0.6, 3), ("new", 0.6, 1))
    }
    titles = {"none": "nothing", "ours": "Ours", "new": "New"}
    (table,) = difference_tables(found, ("none", "other"), titles, {"accuracy": "accuracy"})
    assert "Minus nothing" in table
    assert "| Ours | 10.0 ± 0.0 |" in table
    assert "New" not in table


@dataclasses.dataclass(frozen=True)
class Seeds(Roots):
    """A part whose runs differ in their seed."""

    def make(self, settings, setup):
        run_settings([f"train.seed={settings['number']}"], [], setup.changes)
        return super().make(settings, setup)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.seed=7"], "--set train.seed=7: train.seed is what the runs of the study differ in"),
        (["--set", "train.steps=" + 300 * "9"], "File name too long"),
        (["--report"], "line 1: expected a run as JSON, got 'half'"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.parts.RESULTS", tmp_path)
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "runs.jsonl").write_text("half\nhalf\n")
    study = Study("numbers", "Numbers", parts={"roots": Seeds((1, 2))}, smoke={})
    assert study_command(study, None, options) == 2
    said = capsys.readouterr().err
    assert said.startswith("repkit: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_a_number_of_workers_below_one_is_refused(capsys, workers):
    with pytest.raises(SystemExit):
        study_command(Study("numbers", "Numbers", parts={}, smoke={}), None, ["--workers", workers])
    assert f"expected a whole number of at least 1, got '{workers}'" in capsys.readouterr().err
