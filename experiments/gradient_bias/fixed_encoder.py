"""The mean gradient of mini-batches beside the gradient of all pairs at once, for an encoder that stands still."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repkit import losses
from repkit.numerics import normalize

Estimator = Literal[
    "info_nce",
    "scaled",
    "decoupled",
    "global",
    "gamma_expected_exact",
    "gamma_sampled_exact",
    "gamma_expected",
    "gamma_sampled",
]
Inputs = tuple[jax.Array, jax.Array]
Projections = tuple[jax.Array, jax.Array]
Loss = Callable[..., tuple[jax.Array, Any]]

PARTS = 20
"""Stretches of the batches whose means tell the noise."""


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Linear encoders of random pairs, and the sampling.

    Attributes:
        pairs: n of the data set, at least `negatives + 1`.
        features: of an input.
        dim: of an embedding.
        logit_scale: of all losses.
        memory_rate: of the losses that remember.
        rows: rows that the mean is over, whatever the batch size.
        warm_up: rows that only fill the memory before, as a share of `rows`.
    """

    pairs: int = 512
    features: int = 64
    dim: int = 32
    logit_scale: float = 10.0
    memory_rate: float = 0.1
    rows: int = 400_000
    warm_up: float = 0.2


class Errors(NamedTuple):
    """Of a mean gradient, relative to the norm of the gradient of all pairs.

    Attributes:
        error: of the mean over the batches that were drawn.
        noise: what is expected of that error for an estimator without bias.
        deviation: of a single batch's gradient from its mean.
    """

    error: float
    noise: float
    deviation: float


def measure(estimator: Estimator, encoders: Encoders, *, negatives: int, seed: int) -> Errors:
    """Draws batches of `negatives + 1` pairs and compares the mean of their gradients with that of all pairs."""
    inputs, projections = _random_encoders(encoders, seed)
    embed_all = _embedder(inputs, jnp.arange(encoders.pairs))
    # What the estimator would minimise if it saw all pairs; these two leave the positive out of the sum.
    full_loss = losses.decoupled_contrastive if estimator in ("decoupled", "global") else losses.info_nce
    options = {"logit_scale": encoders.logit_scale, "form": "plain"}
    full = jax.jit(jax.grad(lambda weights: full_loss(*embed_all(weights), **options)))(projections)

    memory = losses.init_memory(encoders.pairs)
    if estimator.endswith("_exact"):
        logits = encoders.logit_scale * jnp.matmul(embed_all(projections)[0], embed_all(projections)[1].T)
        sums = jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)
        memory = memory._replace(image_to_text=sums[0], text_to_image=sums[1], visited=jnp.ones(encoders.pairs, bool))

    batches = _Batches(estimator, encoders, negatives + 1)
    length = max(encoders.rows // batches.size // PARTS, 1)
    warm_up = round(encoders.warm_up * PARTS)
    means, squares = [], []
    for place, key in enumerate(jax.random.split(jax.random.key(seed), warm_up + PARTS)):
        memory, mean, square = _walk(batches, length, inputs, projections, memory, key)
        if place >= warm_up:
            means.append(np.concatenate([np.ravel(x) for x in mean]))
            squares.append(float(square))
    exact = np.concatenate([np.ravel(x) for x in full])
    mean, norm = np.mean(means, axis=0), np.linalg.norm(exact)
    # The batches of one stretch share a memory with those of the next, but little of it.
    noise = np.sqrt(np.sum(np.var(means, axis=0, ddof=1)) / PARTS)
    deviation = np.sqrt(max(np.mean(squares) - np.sum(mean**2), 0.0))
    return Errors(*(float(x / norm) for x in (np.linalg.norm(mean - exact), noise, deviation)))


class _Batches(NamedTuple):
    """What is drawn: pairs of a batch, and the estimate of the gradient from them."""

    estimator: Estimator
    encoders: Encoders
    size: int


@partial(jax.jit, static_argnums=(0, 1))
def _walk(
    batches: _Batches, steps: int, inputs: Inputs, projections: Projections, memory: Any, key: jax.Array
) -> tuple[Any, Projections, jax.Array]:
    """Draws batches; the memory afterwards, the mean gradient, and the mean of its square."""
    gradient = jax.grad(partial(_loss(batches.estimator, batches.encoders), inputs), has_aux=True)

    def step(state: tuple[Any, Any, Any], key: jax.Array) -> tuple[tuple[Any, Any, Any], None]:
        memory, total, squares = state
        rows_key, key = jax.random.split(key)
        rows = jax.random.choice(rows_key, batches.encoders.pairs, (batches.size,), replace=False)
        drawn, memory = gradient(projections, rows, memory, key)
        return (memory, jax.tree.map(jnp.add, total, drawn), squares + _square(drawn)), None

    zero = jax.tree.map(jnp.zeros_like, projections)
    (memory, total, squares), _ = jax.lax.scan(step, (memory, zero, jnp.zeros(())), jax.random.split(key, steps))
    return memory, jax.tree.map(lambda x: x / steps, total), squares / steps


def _random_encoders(encoders: Encoders, seed: int) -> tuple[Inputs, Projections]:
    rng = np.random.default_rng(seed)
    shape = (encoders.pairs, encoders.features)
    shared = rng.normal(size=shape)
    inputs = (shared, shared + 0.5 * rng.normal(size=shape))
    scale = np.sqrt(encoders.features)
    first = rng.normal(size=(encoders.features, encoders.dim)) / scale
    second = first + 0.3 * rng.normal(size=first.shape) / scale
    as_float32 = partial(jnp.asarray, dtype=jnp.float32)
    return (as_float32(inputs[0]), as_float32(inputs[1])), (as_float32(first), as_float32(second))


def _embedder(inputs: Inputs, rows: jax.Array) -> Callable[[Projections], list[jax.Array]]:
    return lambda projections: [normalize(x[rows] @ w) for x, w in zip(inputs, projections, strict=True)]


def _square(tree: Any) -> jax.Array:
    return sum((jnp.sum(x**2) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


def _loss(estimator: Estimator, encoders: Encoders) -> Loss:
    """`(inputs, projections, rows, memory, key) -> (loss of these rows, memory)`."""

    def loss(
        inputs: Inputs, projections: Projections, rows: jax.Array, memory: Any, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        embeds = _embedder(inputs, rows)(projections)
        common = {"logit_scale": encoders.logit_scale, "form": "plain"}
        remembered = {"memory": memory, "example_id": rows, "memory_rate": encoders.memory_rate}
        match estimator:
            case "info_nce":
                return losses.info_nce(*embeds, **common), memory
            case "decoupled":
                return losses.decoupled_contrastive(*embeds, **common), memory
            case "scaled":
                options = {"memory": None, "dataset_size": encoders.pairs, "draw": "expected"}
                return losses.gamma_contrastive(*embeds, **options, **common)[0], memory
            case "global":
                return losses.global_contrastive(*embeds, **remembered, **common)
            case "gamma_expected_exact" | "gamma_sampled_exact":
                options = remembered | {"draw": estimator.split("_")[1], "rates_from": "previous", "key": key}
                # What the memory holds is exact, and stays as it is.
                return losses.gamma_contrastive(*embeds, **options, **common)[0], memory
            case "gamma_expected" | "gamma_sampled":
                options = remembered | {"draw": estimator.split("_")[1], "key": key}
                return losses.gamma_contrastive(*embeds, **options, **common)

    return loss
