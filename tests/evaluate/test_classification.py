"""Classes of the examples of a data set, by a model's head."""

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.evaluate.classification import ClassLogits, class_logits, evaluate_classes


def batch(values, labels, where):
    rows = len(values)
    ids = np.arange(100, 100 + rows)
    return {"values": np.array(values, np.float32), "label": np.array(labels), "example_id": ids, "where": where}


def forward(params, batch, key):
    assert set(batch) == {"values"}, "the model does not see what it is to say"
    return {"classes": {"logits": params * batch["values"]}}


def test_valid_rows_come_in_their_order():
    first = batch([[1, 0], [0, 1]], [0, 0], np.array([True, True]))
    second = batch([[2, 0], [0, 2]], [0, -1], np.array([False, True]))
    classes = class_logits(forward, 10.0, [first, second])
    np.testing.assert_array_equal(classes.logits, [[10, 0], [0, 10], [0, 20]])
    np.testing.assert_array_equal(classes.label, [0, 0, -1])
    np.testing.assert_array_equal(classes.example_id, [100, 101, 101])
    for nothing in ([], [batch([[1, 0]], [0], np.array([False]))]):
        with pytest.raises(InputError, match="at least one valid row"):
            class_logits(forward, 1.0, nothing)


def test_accuracy_is_of_all_examples_and_of_each_kind():
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    classes = ClassLogits(logits, np.array([0, 1, 1, -1]), np.arange(4))
    metrics = evaluate_classes(classes, ["count", "count", "colour", "count"])
    assert metrics == {"accuracy": 0.5, "colour/accuracy": 0.0, "count/accuracy": pytest.approx(2 / 3)}
    assert evaluate_classes(classes) == {"accuracy": 0.5}
