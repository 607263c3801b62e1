"""Linear probes on features whose best classifier is known."""

import builtins

import numpy as np
import pytest
from scipy.stats import t
from sklearn.linear_model import LogisticRegression

from repkit.checks import InputError
from repkit.evaluate import evaluate_few_shot, evaluate_linear_probe
from repkit.evaluate.linear_probe import ITERATIONS


def features(seed, rows, noise, classes=3):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    x = 3 * np.eye(classes, 6)[labels] + noise * rng.normal(size=(rows, 6))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.fixture
def splits():
    return features(0, 60, 1.5), features(1, 60, 1.5), features(2, 90, 1.5)


def test_the_penalty_is_chosen_on_validation_and_reported_on_test(splits):
    train, validation, test = splits
    strengths = (0.001, 1.0, 1000.0)
    models = [LogisticRegression(C=strength, max_iter=ITERATIONS).fit(*train) for strength in strengths]
    best = int(np.argmax([model.score(*validation) for model in models]))
    found = evaluate_linear_probe(train, validation, test, strengths=strengths)
    assert found == {"accuracy": models[best].score(*test), "inverse_penalty": strengths[best]}
    assert found["accuracy"] > 0.6


def test_labels_that_say_nothing_give_chance():
    rng = np.random.default_rng(3)
    split = [(rng.normal(size=(300, 4)), rng.integers(0, 3, 300)) for _ in range(3)]
    assert evaluate_linear_probe(*split)["accuracy"] < 0.45


def test_more_shots_are_better_and_one_seed_repeats(splits):
    found = evaluate_few_shot(*splits, seed=0, shots=(1, 16), draws=4)
    assert found["16_shot/accuracy"] > found["1_shot/accuracy"] > 1 / 3
    assert evaluate_few_shot(*splits, seed=0, shots=(1, 16), draws=4) == found
    assert evaluate_few_shot(*splits, seed=1, shots=(1, 16), draws=4) != found


def test_the_interval_is_students_over_draws(splits):
    train, validation, test = splits
    accuracies = []
    for draw in range(3):
        rng = np.random.default_rng([7, draw])
        rows = np.concatenate([rng.permutation(np.flatnonzero(train[1] == label))[:2] for label in range(3)])
        accuracies.append(LogisticRegression(C=10.0).fit(train[0][rows], train[1][rows]).score(*test))
    found = evaluate_few_shot(train, validation, test, seed=7, shots=(2,), draws=3, strengths=(10.0,))
    assert found["2_shot/accuracy"] == pytest.approx(np.mean(accuracies))
    low, high = t.interval(0.95, 2, loc=np.mean(accuracies), scale=np.std(accuracies, ddof=1) / np.sqrt(3))
    assert found["2_shot/accuracy_interval"] == pytest.approx((high - low) / 2)
    assert found["2_shot/accuracy_interval"] > 0


def test_few_shot_refuses_what_it_cannot_draw(splits):
    with pytest.raises(InputError, match="at least 32 training examples of every class for 32 shots, class 0 has 20"):
        evaluate_few_shot(*splits, seed=0, shots=(1, 32))
    with pytest.raises(InputError, match="at least 2 draws"):
        evaluate_few_shot(*splits, seed=0, draws=1)


def test_bad_features_are_named(splits):
    train, validation, test = splits
    with pytest.raises(InputError, match="validation features hold NaN"):
        evaluate_linear_probe(train, (validation[0] * np.nan, validation[1]), test)
    with pytest.raises(InputError, match=r"test features \[n d\] and labels \[n\].*\(90, 6\) and labels \(5,\)"):
        evaluate_linear_probe(train, validation, (test[0], test[1][:5]))
    with pytest.raises(InputError, match="at least 2 classes, got 1"):
        evaluate_linear_probe((train[0], train[1] * 0), validation, test)


def test_a_missing_scikit_learn_names_the_extra(splits, monkeypatch):
    import_module = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(InputError, match=r'pip install "repkit\[evaluate\]"'):
        evaluate_linear_probe(*splits)
