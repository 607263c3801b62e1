"""One parameter whose best value is known: where do mini-batches take it?

An anchor meets m negatives a step, with scores `theta b`, b ~ N(0, sigma^2), and a positive with score `kappa theta`.
Over the whole population the contrastive loss is

    L(theta) = -kappa theta + log E exp(theta b) = theta^2 sigma^2 / 2 - sigma^2 theta      for kappa = sigma^2

whose minimum is theta = 1. The parameter is the logit scale of embeddings that have one dimension, so that the losses
of `repkit.losses` are trained as they are: the anchor is `sqrt(kappa)` and a negative `b / sqrt(kappa)`, in both
modalities, and only the first row has a weight.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate, stats

from repkit import losses

Method = Literal["info_nce", "decoupled", "global", "gamma_sampled", "gamma_expected"]
Loss = Callable[..., tuple[jax.Array, Any]]

POPULATION = 2
"""Size of the memory's data set: one negative, so that S is the mean over negatives. The number cancels."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How the parameter is trained.

    Attributes:
        negatives: m of a step.
        steps: number of updates by `theta <- theta - rate gradient`.
        rate: of the first step; `rate / (1 + step / decay)` of a later one.
        decay: steps until the rate is halved.
        memory_rate: share of a batch in the moving average of the partition.
        shape: of the gamma distribution.
        largest_score: bound of |b| / sigma; none for the normal distribution.
        record_every: steps between the recorded values; a divisor of `steps`.
    """

    negatives: int = 4
    steps: int = 100_000
    rate: float = 0.02
    decay: float = 5_000.0
    memory_rate: float = 0.01
    shape: float = 1.0
    largest_score: float | None = None
    record_every: int = 50


class Lane(NamedTuple):
    """One training among those of a program: the spread of the negatives, and where it begins."""

    sigma: float
    start: float


def train(method: Method, training: Training, lanes: list[Lane], *, seed: int) -> np.ndarray:
    """The parameter of each lane after every `record_every` steps [lanes records].

    Lanes of one place in the list have the same negatives whatever the method.
    """
    kappas = jnp.array([positive_score(lane.sigma, training.largest_score) for lane in lanes])
    sigmas = jnp.array([lane.sigma for lane in lanes])
    starts = jnp.array([lane.start for lane in lanes])
    keys = jax.random.split(jax.random.key(seed), len(lanes))
    run = jax.jit(jax.vmap(partial(_trajectory, _loss(method, training), training)))
    return np.asarray(run(kappas, sigmas, starts, keys))


def positive_score(sigma: float, largest: float | None) -> float:
    """kappa, the positive's score at theta = 1 for which the minimum is there: `E[b exp b] / E[exp b]`.

    >>> positive_score(0.5, None), round(positive_score(0.5, 8.0), 6), round(positive_score(2.0, 2.0), 2)
    (0.25, 0.25, 2.71)
    """
    if largest is None:
        return sigma**2

    def moment(power: int) -> float:
        return integrate.quad(
            lambda z: (sigma * z) ** power * np.exp(sigma * z) * stats.norm.pdf(z), -largest, largest
        )[0]

    return moment(1) / moment(0)


def _trajectory(
    loss: Loss, training: Training, kappa: jax.Array, sigma: jax.Array, start: jax.Array, key: jax.Array
) -> jax.Array:
    def step(state: tuple[jax.Array, Any], index: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        theta, memory = state
        draw_key, loss_key = jax.random.split(jax.random.fold_in(key, index))
        anchor = jnp.sqrt(kappa)
        negatives = sigma * _unit_scores(draw_key, training) / anchor
        embeds = jnp.concatenate([anchor[None], negatives])[:, None]
        gradient, memory = jax.grad(partial(loss, embeds=embeds, memory=memory, key=loss_key), has_aux=True)(theta)
        return (theta - training.rate / (1 + index / training.decay) * gradient, memory), None

    def record(state: tuple[jax.Array, Any], first: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        state, _ = jax.lax.scan(step, state, first + jnp.arange(training.record_every))
        return state, state[0]

    firsts = jnp.arange(0, training.steps, training.record_every)
    return jax.lax.scan(record, (start, losses.init_memory(1)), firsts)[1]


def _unit_scores(key: jax.Array, training: Training) -> jax.Array:
    shape = (training.negatives,)
    if training.largest_score is None:
        return jax.random.normal(key, shape)
    return jax.random.truncated_normal(key, -training.largest_score, training.largest_score, shape)


def _loss(method: Method, training: Training) -> Loss:
    """`(theta, embeds, memory, key) -> (loss of the first row, memory)`."""
    is_anchor = jnp.arange(training.negatives + 1) == 0
    weights = is_anchor.astype(jnp.float32)
    remembered = {"example_id": jnp.where(is_anchor, 0, -1), "memory_rate": training.memory_rate}

    def loss(theta: jax.Array, *, embeds: jax.Array, memory: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        common = {"logit_scale": theta, "weights": weights, "form": "plain"}
        match method:
            case "info_nce":
                return losses.info_nce(embeds, embeds, **common), memory
            case "decoupled":
                return losses.decoupled_contrastive(embeds, embeds, **common), memory
            case "global":
                return losses.global_contrastive(embeds, embeds, memory=memory, **remembered, **common)
            case "gamma_sampled" | "gamma_expected":
                return losses.gamma_contrastive(
                    embeds,
                    embeds,
                    memory=memory,
                    dataset_size=POPULATION,
                    draw="sampled" if method == "gamma_sampled" else "expected",
                    # Both directions are this anchor's: the mean of their two draws has the shape that is asked for.
                    shape=training.shape / 2,
                    positive_weight=0.0,
                    key=key,
                    **remembered,
                    **common,
                )

    return loss
