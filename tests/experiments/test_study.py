"""Runs that are kept, and comparisons over paired seeds."""

import math
import operator

import numpy as np
import pytest

from experiments.study import Run, Runs, interval, paired_difference, run_missing
from repkit.checks import InputError


def runs_of(values: dict[int, float]) -> list[Run]:
    return [Run({"seed": seed}, {"accuracy": value}) for seed, value in values.items()]


def test_a_second_call_makes_only_the_runs_that_are_missing(tmp_path):
    path, made = tmp_path / "results" / "runs.jsonl", []

    def make(seed):
        made.append(seed)
        return {"accuracy": seed / 10}

    for seeds in ([0, 1], [0, 1, 2]):
        runs = Runs(path)
        for seed in seeds:
            runs.run({"method": "ours", "seed": seed}, lambda seed=seed: make(seed))
    assert made == [0, 1, 2]
    assert [run.metrics["accuracy"] for run in Runs(path).select(method="ours")] == [0.0, 0.1, 0.2]
    assert {"seed": 1, "method": "ours"} in Runs(path), "the order of the settings does not matter"


def test_a_line_cut_short_by_a_kill_is_made_again_and_damage_elsewhere_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    for seed in (0, 1):
        Runs(path).run({"seed": seed}, lambda: {"accuracy": 0.5})
    whole = path.read_text()
    path.write_text(whole[:-9])
    runs = Runs(path)
    assert {"seed": 0} in runs
    assert {"seed": 1} not in runs
    runs.run({"seed": 1}, lambda: {"accuracy": 0.5})
    assert path.read_text() == whole
    path.write_text("half\n" + whole)
    with pytest.raises(InputError, match="line 1"):
        Runs(path)


def test_the_interval_covers_the_mean_in_95_of_100_samples():
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    covered = [abs(mean - 3.0) <= half for mean, half, _ in map(interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)
    assert math.isinf(interval([1.0]).half_width)
    with pytest.raises(InputError, match="at least one"):
        interval([])


def test_a_difference_is_taken_seed_by_seed():
    ours, baseline = runs_of({0: 0.9, 1: 0.5, 7: 0.1}), runs_of({1: 0.4, 0: 0.8, 2: 0.0})
    difference = paired_difference(ours, baseline, "accuracy")
    assert difference.mean == pytest.approx(0.1)
    assert difference.half_width == pytest.approx(0, abs=1e-9)
    assert difference.values == 2
    with pytest.raises(InputError, match="no seed"):
        paired_difference(ours, runs_of({5: 0.1}), "accuracy")


@pytest.mark.parametrize("workers", [1, 2])
def test_missing_runs_are_made_and_kept_by_any_number_of_workers(tmp_path, workers):
    runs = Runs(tmp_path / "runs.jsonl")
    runs.run({"seed": 1}, lambda: {"seed": 10.0})
    settings = [{"seed": seed} for seed in range(4)]
    assert not run_missing(runs, settings, dict, workers=workers, minutes=0)
    assert len(list(runs)) == 1
    told = []
    # `dict` is a function that a worker finds: a run's metrics are its settings.
    assert run_missing(runs, settings, dict, workers=workers, tell=told.append)
    kept = {run.settings["seed"]: run.metrics["seed"] for run in Runs(tmp_path / "runs.jsonl")}
    assert kept == {0: 0.0, 1: 10.0, 2: 2.0, 3: 3.0}
    assert sorted(run.settings["seed"] for run in told) == [0, 2, 3]


def test_a_run_that_fails_ends_the_study_and_those_under_way_are_kept(tmp_path):
    runs = Runs(tmp_path / "runs.jsonl")
    settings = [{"seed": 0}, {"seed": 1, "metrics": {"accuracy": 0.5}}]
    with pytest.raises(KeyError, match="metrics"):
        run_missing(runs, settings, operator.itemgetter("metrics"), workers=2)
    assert [run.settings["seed"] for run in Runs(tmp_path / "runs.jsonl")] == [1]
