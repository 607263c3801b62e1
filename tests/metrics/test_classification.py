"""Accuracies against loops, with ties, masks and labels out of range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.metrics import confusion_matrix, mean_per_class_accuracy, top_k_accuracy


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_equals_the_loop(k):
    rng = np.random.default_rng(0)
    scores, labels, where = rng.normal(size=(40, 7)), rng.integers(0, 7, 40), rng.random(40) < 0.7
    hits = [labels[i] in np.argsort(-scores[i])[:k] for i in range(40) if where[i]]
    with jax.numpy_rank_promotion("raise"):
        found = top_k_accuracy(jnp.asarray(scores), jnp.asarray(labels), k=k, where=jnp.asarray(where))
    assert float(found) == pytest.approx(np.mean(hits))


def test_equal_scores_are_wrong_until_all_classes_are_looked_at():
    scores, labels = jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0])
    assert [float(top_k_accuracy(scores, labels, k=k)) for k in (1, 2, 3)] == [0.0, 0.0, 1.0]


def test_nan_scores_are_wrong():
    scores = jnp.array([[jnp.nan, 0.0], [1.0, 0.0]])
    assert float(top_k_accuracy(scores, jnp.array([0, 0]), k=1)) == 0.5


def test_masked_rows_may_hold_nan():
    scores = jnp.array([[jnp.nan, jnp.nan], [1.0, 0.0]])
    assert float(top_k_accuracy(scores, jnp.array([0, 0]), k=1, where=jnp.array([False, True]))) == 1.0


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_never_right(label):
    assert float(top_k_accuracy(jnp.array([[0.1, 0.2]]), jnp.array([label]), k=2)) == 0.0


def test_confusion_and_mean_per_class_accuracy_equal_the_loop():
    rng = np.random.default_rng(1)
    predictions, labels, where = rng.integers(0, 4, 60), rng.integers(0, 3, 60), rng.random(60) < 0.8
    expected = np.zeros((4, 4), int)
    for prediction, label, counts in zip(predictions, labels, where, strict=True):
        expected[label, prediction] += counts
    given = (jnp.asarray(predictions), jnp.asarray(labels))
    with jax.numpy_rank_promotion("raise"):
        matrix = confusion_matrix(*given, classes=4, where=jnp.asarray(where))
        mean = mean_per_class_accuracy(*given, classes=4, where=jnp.asarray(where))
    assert matrix.tolist() == expected.tolist()
    # Class 3 has no example, so that the mean is over three classes.
    assert float(mean) == pytest.approx(np.mean([expected[y, y] / expected[y].sum() for y in range(3)]))


def test_confusion_matrix_leaves_out_what_lies_outside():
    matrix = confusion_matrix(jnp.array([0, 5, 1]), jnp.array([-1, 0, 1]), classes=2)
    assert matrix.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("metric", [confusion_matrix, mean_per_class_accuracy])
def test_shapes_that_differ_are_refused(metric):
    with pytest.raises(InputError, match=r"predictions \(2,\) and labels \(3,\)"):
        metric(jnp.zeros(2, int), jnp.zeros(3, int), classes=2)


def test_top_k_refuses_wrong_shapes_and_k():
    with pytest.raises(InputError, match=r"scores \(2, 3\) and labels \(3,\)"):
        top_k_accuracy(jnp.zeros((2, 3)), jnp.zeros(3, int), k=1)
    with pytest.raises(InputError, match="k of at least 1"):
        top_k_accuracy(jnp.zeros((2, 3)), jnp.zeros(2, int), k=0)
