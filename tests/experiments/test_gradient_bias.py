"""The study of gradient bias, at its smallest."""

import numpy as np
import pytest

from experiments import gradient_bias, scalar_problem
from experiments.scalar_problem import Lane, Training
from experiments.study import Runs


def test_programs_name_every_run_once_up_to_the_shown_negatives():
    study = gradient_bias.Study()
    named = [str(each) for program in gradient_bias.programs(study, gradient_bias.PARTS) for each in program.settings]
    shown = len(study.optimum.methods) * len(study.optimum.sigmas) * len(study.optimum.starts)
    assert len(named) - len(set(named)) == shown


def test_batches_of_all_sizes_see_the_same_examples():
    part = gradient_bias.Scenes()
    configs = [gradient_bias.scene_config(part, "gamma_sampled", size).train for size in part.batch_sizes]
    assert {config.steps * config.batch_size for config in configs} == {part.examples}
    assert configs[0].learning_rate == pytest.approx(2 * configs[2].learning_rate)


def test_the_positive_score_of_bounded_negatives_puts_the_minimum_at_one():
    sigma, bound = 1.5, 1.0
    z = np.linspace(-bound, bound, 20_001)
    weights = np.exp(-(z**2) / 2)

    def loss(theta):
        scores = np.exp(theta * sigma * z)
        return -theta * scalar_problem.positive_score(sigma, bound) + np.log(np.sum(weights * scores) / np.sum(weights))

    assert loss(1.0) < min(loss(0.98), loss(1.02))


@pytest.mark.slow
def test_ours_goes_to_one_where_the_mini_batch_loss_does_not():
    lanes = [Lane(0.5, 0.5), Lane(0.5, 1.5)]
    training = Training(steps=6_000, record_every=100)
    ours = scalar_problem.train("gamma_expected", training, lanes, seed=0)
    conventional = scalar_problem.train("decoupled", training, lanes, seed=0)
    assert ours.shape == (2, 60)
    assert np.all(np.abs(ours[:, -1] - 1) < 0.2)
    assert np.all(conventional[:, -1] > 1.25)


@pytest.mark.slow
def test_the_smoke_study_makes_tables_and_figures_and_is_not_made_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert gradient_bias.main(["--smoke"]) == 0
    study = gradient_bias.smoke(gradient_bias.Study())
    tables = (study.results / "RESULTS.md").read_text()
    for heading in ("The optimum at 1, 4 negatives", "What tames it", "Error of the mean gradient", "Digit scenes"):
        assert heading in tables
    for name in ("optimum", "optimum_sweep", "gradient", "scenes"):
        assert (study.results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = (study.results / "runs.jsonl").read_text()
    runs = Runs(study.results / "runs.jsonl")
    programs = list(gradient_bias.programs(study, gradient_bias.PARTS))
    assert all(settings in runs for program in programs for settings in program.settings)

    assert gradient_bias.run_all(study, gradient_bias.PARTS, minutes=0)
    assert (study.results / "runs.jsonl").read_text() == lines
