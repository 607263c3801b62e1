"""What a linear classifier reads from frozen features, with all labels and with a few per class."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from repkit.checks import InputError

Labelled: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Features float [n d] and their classes int [n]."""

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""The inverse strengths C of the L2 penalty that are tried; the large ones suit rows of length 1."""

ITERATIONS = 1000
"""At most; the CLIP paper's number."""

THREADED_SIZE = 2**22
"""Features of fewer entries are fitted on one thread: BLAS threads that share their cores with other work wait for one
another, which made 8,192 x 64 features 15 times slower on two busy cores."""


def evaluate_linear_probe(
    train: Labelled, validation: Labelled, test: Labelled, *, strengths: Sequence[float] = STRENGTHS
) -> dict[str, float]:
    """Test accuracy of multinomial logistic regression on frozen features.

        W = argmin_W |W|^2 / 2 + C sum_i -log softmax(W x_i + b)_y_i,      C the best on validation data

    Fitted by L-BFGS on the training rows alone; of equally good C the smallest (the strongest penalty) is taken [ours].

    Args:
        train: features and labels to fit on. Features are used as given.
        validation: those that choose C.
        test: those that are reported.
        strengths: the values of C to try.

    Returns:
        `accuracy` on the test rows in [0, 1], and the chosen `inverse_penalty` C.

    Raises:
        InputError: scikit-learn is not installed, features that are not finite or do not fit their labels, or one class
            only.

    Example:
        >>> import numpy as np
        >>> rows = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), np.array([0, 0, 1, 1])
        >>> evaluate_linear_probe(rows, rows, rows)["accuracy"]
        1.0

    References:
        Radford et al., CLIP, ICML 2021, arXiv 2103.00020, appendix A.3.
    """
    _check(train=train, validation=validation, test=test)
    accuracies = np.array([_accuracies(train, (validation, test), strength) for strength in strengths])
    best = int(accuracies[:, 0].argmax())
    return {"accuracy": float(accuracies[best, 1]), "inverse_penalty": float(strengths[best])}


def evaluate_few_shot(
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    *,
    seed: int,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    draws: int = 5,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, float]:
    """Test accuracy of the probe when it is fitted on k random examples per class, over several draws.

        mean over draws +- t_(0.975, draws - 1) * standard deviation / sqrt(draws)

    A draw orders the examples of each class at random once and takes the first k, so that the examples of k = 1 are
    among those of k = 2; the same seed draws the same rows for every model on the same data. C is chosen for each k, by
    the mean validation accuracy over the draws [ours].

    Args:
        train: features and labels to draw from.
        validation: those that choose C.
        test: those that are reported.
        seed: decides the draws.
        shots: the numbers k of examples per class.
        draws: how many random draws, at least 2.
        strengths: the values of C to try.

    Returns:
        For every k `k_shot/accuracy`, the mean over draws in [0, 1], and `k_shot/accuracy_interval`, half the width of
        its 95 % interval. It is about the draw of examples and says nothing about the training of the encoder.

    Raises:
        InputError: as `evaluate_linear_probe`; a class with fewer than k training examples; fewer than 2 draws.

    Example:
        >>> import numpy as np
        >>> rows = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), np.array([0, 0, 1, 1])
        >>> evaluate_few_shot(rows, rows, rows, seed=0, shots=(1,), draws=2)
        {'1_shot/accuracy': 1.0, '1_shot/accuracy_interval': 0.0}
    """
    _check(train=train, validation=validation, test=test)
    if draws < 2:
        raise InputError(f"few-shot: expected at least 2 draws, because one has no interval, got {draws}")
    features, labels = train
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < max(shots):
        raise InputError(
            f"few-shot: expected at least {max(shots)} training examples of every class for {max(shots)} shots, "
            f"class {classes[counts.argmin()]} has {counts.min()}; take fewer shots"
        )
    orders = [_random_order_by_class(labels, classes, np.random.default_rng([seed, draw])) for draw in range(draws)]

    metrics = {}
    for k in shots:
        rows_of_draws = [np.concatenate([order[:k] for order in orders_of_classes]) for orders_of_classes in orders]
        accuracies = np.array(
            [
                [_accuracies((features[rows], labels[rows]), (validation, test), strength) for rows in rows_of_draws]
                for strength in strengths
            ]
        )
        best = np.argmax(accuracies[:, :, 0].mean(axis=1))
        on_test = accuracies[best, :, 1]
        metrics[f"{k}_shot/accuracy"] = float(on_test.mean())
        metrics[f"{k}_shot/accuracy_interval"] = _interval(on_test)
    return metrics


def _accuracies(train: Labelled, tests: Sequence[Labelled], strength: float) -> list[float]:
    try:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise InputError('linear probes need scikit-learn: pip install "repkit[evaluate]"') from error
    with threadpool_limits(1 if train[0].size < THREADED_SIZE else None):
        model = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(*train)
        return [float(model.score(*test)) for test in tests]


def _random_order_by_class(labels: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.permutation(np.flatnonzero(labels == label)) for label in classes]


def _interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t."""
    from scipy.stats import t  # takes long to import, and only this needs it

    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def _check(**splits: Labelled) -> None:
    for name, (features, labels) in splits.items():
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise InputError(
                f"linear probe: expected {name} features [n d] and labels [n], got features {features.shape} and "
                f"labels {labels.shape}"
            )
        if not np.isfinite(features).all():
            raise InputError(f"linear probe: {name} features hold NaN or infinity; did the training diverge?")
    if len(np.unique(splits["train"][1])) < 2:
        raise InputError("linear probe: expected training examples of at least 2 classes, got 1")
