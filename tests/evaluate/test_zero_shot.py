"""Zero-shot classification from prompt ensembles."""

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.evaluate import class_scores, evaluate_zero_shot, prompt_embeddings


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return {f"prompt {i}": rng.normal(size=6) * rng.uniform(0.1, 10) for i in range(7)}


def test_scores_of_both_ensembles_equal_the_loop(texts):
    calls = []

    def encode_texts(prompts):
        calls.append(prompts)
        return np.stack([texts[prompt] for prompt in prompts])

    names = list(texts)
    prompts = {"seven": names[:3], 8: names[3:4], "nine": names[4:]}
    images = np.random.default_rng(2).normal(size=(4, 6))
    found = prompt_embeddings(encode_texts, prompts)
    by_embeddings = class_scores(images, found, ensemble="embeddings")
    by_probabilities = class_scores(images, found, ensemble="probabilities", logit_scale=3.0)
    for column, ensemble in enumerate(prompts.values()):
        unit = [texts[prompt] / np.linalg.norm(texts[prompt]) for prompt in ensemble]
        mean = sum(unit) / len(unit)
        for row, image in enumerate(images):
            expected = sum(image * mean) / np.linalg.norm(mean)
            np.testing.assert_allclose(by_embeddings[row, column], expected, rtol=1e-4)
            expected = np.log(sum(np.exp(3.0 * sum(image * prompt)) for prompt in unit) / len(unit))
            np.testing.assert_allclose(by_probabilities[row, column], expected, rtol=1e-4)
    assert len(calls) == 1


def test_probabilities_stay_finite_at_a_large_scale():
    scores = class_scores(np.eye(2), [np.eye(2), -np.eye(2)], ensemble="probabilities", logit_scale=1e4)
    assert np.isfinite(scores).all()
    assert (scores.argmax(axis=1) == 0).all()


def test_ensembles_that_cannot_be_formed_are_refused():
    with pytest.raises(InputError, match="did you mean 'embeddings'"):
        class_scores(np.eye(2), [np.eye(2)], ensemble="embedding")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs the model's logit_scale"):
        class_scores(np.eye(2), [np.eye(2)], ensemble="probabilities")


def test_accuracies_equal_the_loop():
    rng = np.random.default_rng(1)
    classes, images, labels = rng.normal(size=(8, 5)), rng.normal(size=(50, 5)), rng.integers(0, 8, 50)
    order = np.argsort(-(images @ classes.T), axis=1)
    metrics = evaluate_zero_shot((images @ classes.T).astype(np.float32), labels)
    assert metrics["top_1"] == pytest.approx(np.mean(order[:, 0] == labels))
    assert metrics["top_5"] == pytest.approx(
        np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)])
    )
    per_class = [np.mean(order[labels == y, 0] == y) for y in range(8)]
    assert metrics["mean_per_class"] == pytest.approx(np.mean(per_class))


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({}, "at least one class"),
        ({"seven": []}, r"list of prompts for class 'seven', got \[\]"),
        ({7: "a seven"}, "list of prompts for class 7, got 'a seven'"),
    ],
)
def test_classes_without_prompts_are_refused(prompts, said):
    with pytest.raises(InputError, match=said):
        prompt_embeddings(lambda texts: np.ones((len(texts), 2)), prompts)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_without_a_class_are_refused(label):
    with pytest.raises(InputError, match=rf"labels 0 ... 2, as many as classes with prompts, got {label}"):
        evaluate_zero_shot(np.eye(3, dtype=np.float32), np.array([0, 1, label]))
