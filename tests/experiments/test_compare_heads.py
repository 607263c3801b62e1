"""The comparison of ways to distil a teacher of many heads, at its smallest."""

import dataclasses
import itertools
import json

import pytest

from experiments import compare_heads
from experiments.head_study import TITLES, Study, looked_at, phases, smoke, student_settings
from experiments.study import Runs


def test_within_a_phase_all_runs_of_one_seed_come_before_those_of_the_next():
    study = Study()
    settings = []
    for part in phases(study):
        seeds = [each["seed"] for each in part]
        assert seeds == sorted(seeds)
        settings += part
    assert len({json.dumps(each) for each in settings}) == len(settings)
    assert {each["method"] for each in settings} == set(TITLES)


def test_one_task_may_be_made_alone(tmp_path):
    study = dataclasses.replace(Study(), results=tmp_path, work=tmp_path / "work", seeds=(0, 1))
    runs = Runs(tmp_path / "runs.jsonl")
    for settings in itertools.chain(*phases(study), looked_at(study)):
        if settings["task"] == "captions":
            runs.run(settings, lambda: {"cider_d": 1.0})
    assert compare_heads.run_all(study, minutes=0, task="captions")
    assert not compare_heads.run_all(study, minutes=0)


def test_changed_settings_have_results_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare_heads.main(["--report", "--set", "model.width=8"]) == 0
    folder = tmp_path / "runs" / "head_alignment" / "model.width=8"
    assert (folder / "results" / "RESULTS.md").read_text() == "# Many heads into few\n\n\n"
    assert capsys.readouterr().out == "\n\n"


@pytest.mark.slow
def test_the_smoke_study_makes_tables_and_figures_and_is_not_made_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare_heads.main(["--smoke"]) == 0
    study = smoke(Study())
    results = study.results
    tables = (results / "RESULTS.md").read_text()
    assert "one to one, KL" in tables
    assert "Paired differences, questions" in tables
    assert (results / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "heads_amad_kl.png").read_bytes().startswith(b"\x89PNG")
    runs = Runs(results / "runs.jsonl")
    assert all(settings in runs for settings in student_settings(study, pretrained=True))
    lines = (results / "runs.jsonl").read_text()

    capsys.readouterr()
    assert compare_heads.run_all(study)
    assert capsys.readouterr().out == "", "nothing is trained a second time"
    assert (results / "runs.jsonl").read_text() == lines
