"""From batches to embeddings in host memory."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from repkit.checks import InputError

Batch = dict[str, Any]

MODEL_INPUTS = ("image", "token_ids", "token_mask")
"""What the model sees of a batch; augmented views are for training and would double the work."""

KEPT_FIELDS = ("example_id", "caption_id", "label")
"""What is handed on beside the embeddings, where the batch has it."""


def embed(
    forward: Callable[[Any, Batch, None], dict[str, Any]],
    params: Any,
    batches: Iterable[Batch],
    *,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> dict[str, np.ndarray]:
    """The embeddings of every valid row, in the order of the batches.

    The model runs without a key (deterministic) and is compiled once for batches of one shape; a later call with the
    same `forward` and shapes compiles nothing. While a batch is on the device the next one is fetched and placed.

    Args:
        forward: `forward(params, batch, key) -> outputs` with `outputs["image"]["embeds"]` and
            `outputs["text"]["embeds"]`, or one of them when the batch has only images or only text.
        params: the model's parameters, wherever they are placed.
        batches: host batches of one shape. Rows with `where` False (padding, corrupt input) are dropped.
        place: puts a host batch on the devices, for instance sharded over a mesh. With several processes it must make
            global arrays; every process then gets the rows of all.

    Returns:
        `image_embeds` and `text_embeds` float32 [n d], and `example_id`, `caption_id`, `label` [n], as far as the
        batches have them.

    Raises:
        InputError: no batches, or no valid row in them.

    Example:
        >>> import numpy as np
        >>> def forward(params, batch, key):
        ...     return {"image": {"embeds": params * batch["image"]}}
        >>> batch = {"image": np.array([[1.0], [2.0], [3.0]]), "where": np.array([True, True, False])}
        >>> embed(forward, 10.0, [batch])["image_embeds"].tolist()
        [[10.0], [20.0]]
    """
    collected: list[dict[str, np.ndarray]] = []
    running = None
    for batch in batches:
        started = _embed_batch(forward, params, place(batch))
        if running is not None:
            collected.append(_valid_rows(running))
        running = started
    if running is None:
        raise InputError("embed: expected at least one batch, got none; is the data set empty?")
    collected.append(_valid_rows(running))
    result = {name: np.concatenate([rows[name] for rows in collected]) for name in collected[0]}
    if not all(map(len, result.values())):
        raise InputError("embed: every row is masked out (where is False throughout); is all of the data corrupt?")
    return result


def token_batches(
    token_ids: Int[np.ndarray, "n l"], token_mask: Bool[np.ndarray, "n l"], *, batch_size: int
) -> Iterator[Batch]:
    """Text-only batches of one shape, the last one filled up with rows that `where` masks out.

    Args:
        token_ids: one row per text.
        token_mask: True for real tokens.
        batch_size: rows per batch.

    Yields:
        Batches with `token_ids`, `token_mask` and `where`, ready for `embed`.

    Example:
        >>> import numpy as np
        >>> batches = token_batches(np.ones((3, 4), np.int32), np.ones((3, 4), bool), batch_size=2)
        >>> [batch["where"].tolist() for batch in batches]
        [[True, True], [True, False]]
    """
    for start in range(0, len(token_ids), batch_size):
        # Padding repeats real text, because a row without any real token may be NaN in a model's attention.
        rows = np.minimum(np.arange(start, start + batch_size), len(token_ids) - 1)
        yield {
            "token_ids": token_ids[rows],
            "token_mask": token_mask[rows],
            "where": np.arange(start, start + batch_size) < len(token_ids),
        }


@partial(jax.jit, static_argnames="forward")
def _run(forward, params, inputs):
    outputs = forward(params, inputs, None)
    return {
        f"{modality}_embeds": outputs[modality]["embeds"].astype("float32")
        for modality in ("image", "text")
        if modality in outputs
    }


def _embed_batch(forward, params, batch: Batch) -> Batch:
    embeds = _run(forward, params, {name: batch[name] for name in MODEL_INPUTS if name in batch})
    kept = {name: batch[name] for name in (*KEPT_FIELDS, "where") if name in batch}
    return {**embeds, **kept}


def _valid_rows(rows: Batch) -> dict[str, np.ndarray]:
    on_host = {name: to_host(value) for name, value in rows.items()}
    where = on_host.pop("where", None)
    return on_host if where is None else {name: value[where] for name, value in on_host.items()}


def to_host(value: Any) -> np.ndarray:
    """The whole array in this process's memory, where it may be spread over the devices of several."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils  # needs a distributed runtime that a single process does not have

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)
