"""Classes that a model's head gives to the examples of a data set."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from repkit.checks import InputError
from repkit.evaluate.embed import Batch, to_host


class ClassLogits(NamedTuple):
    """What the head says of every example, in the order of the batches.

    Attributes:
        logits: float32 [n classes].
        label: the right class; negative where it is none of them [n].
        example_id: [n].
    """

    logits: Float[np.ndarray, "n classes"]
    label: Int[np.ndarray, " n"]
    example_id: Int[np.ndarray, " n"]


def class_logits(
    forward: Callable[[Any, Batch, None], dict[str, Any]],
    params: Any,
    batches: Iterable[Batch],
    *,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> ClassLogits:
    """Runs a model over a data set.

    Args:
        forward: `forward(params, batch, key) -> outputs` with `outputs["classes"]["logits"]` [b classes].
        params: its parameters.
        batches: host batches of one shape, with `label`, `example_id` and `where`. Rows with `where` False are dropped.
        place: puts a host batch on the devices.

    Raises:
        InputError: no batches, or no valid row in them.

    Example:
        >>> def forward(params, batch, key):
        ...     return {"classes": {"logits": params * batch["image"]}}
        >>> ids, where = np.arange(2), np.ones(2, bool)
        >>> batch = {"image": np.eye(2), "label": np.array([0, 0]), "example_id": ids, "where": where}
        >>> evaluate_classes(class_logits(forward, 3.0, [batch]))
        {'accuracy': 0.5}
    """
    collected = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in ("label", "example_id", "where")}
        rows = _run(forward, params, place(inputs)), batch["label"], batch["example_id"]
        collected.append([to_host(each)[to_host(batch["where"])] for each in rows])
    if not sum(len(each[0]) for each in collected):
        raise InputError("class_logits: expected at least one valid row, got none; is the data set empty or corrupt?")
    return ClassLogits(*map(np.concatenate, zip(*collected, strict=True)))


def evaluate_classes(classes: ClassLogits, kinds: Sequence[str] | None = None) -> dict[str, float]:
    """Accuracy, of all examples and of those of each kind.

    Args:
        classes: from `class_logits`.
        kinds: what kind of example each is, in the same order; None for no such distinction.

    Returns:
        `accuracy` and `<kind>/accuracy`, in [0, 1]. A label that is no class is never right.
    """
    is_right = classes.logits.argmax(axis=1) == classes.label
    metrics = {"accuracy": float(is_right.mean())}
    for kind in sorted(set(kinds or ())):
        metrics[f"{kind}/accuracy"] = float(is_right[np.array([each == kind for each in kinds or ()])].mean())
    return metrics


@partial(jax.jit, static_argnames="forward")
def _run(forward, params, inputs):
    return forward(params, inputs, None)["classes"]["logits"].astype("float32")
