"""What exact alignment costs: features of two modalities that must be equal, in a world whose information is known.

A text X_T and an image X_V both show a bit a. Beside it they show, through noise, the same bit b ("shared"), bits b and
c ("own"), or the text alone shows b ("text"). The label Y is (a through noise, b) or (a through noise, b, c). All is
discrete and small, so that expectations are sums over all states and every information is known. For Z_T = Z_V

    excess = min E[CE(h(Z_T, Z_V), Y)] - H(Y | X_T, X_V) >= Delta = |I(X_T; Y) - I(X_V; Y)|        [nats]

because I(Z; Y) <= min(I(X_T; Y), I(X_V; Y)) and I(X_T, X_V; Y) >= max(I(X_T; Y), I(X_V; Y)).
"""

import dataclasses
import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from repkit.numerics import normalize

Joint = Float[np.ndarray, "t v y"]
"""P(X_T, X_V, Y)."""

SecondBit = Literal["shared", "own", "text"]

LABEL_NOISE = 0.1
"""Of the bit that both modalities show, so that no predictor needs unbounded logits."""


@dataclasses.dataclass(frozen=True)
class World:
    """Which bits there are, and how well each modality shows its own.

    Attributes:
        second_bit: whether text and image show one more bit, the same, each its own, or the text alone.
        text_noise: probability that the text's is wrong; 0.5 shows nothing.
        image_noise: probability that the image's is; without effect where the text alone shows one.
    """

    second_bit: SecondBit
    text_noise: float
    image_noise: float


class Informations(NamedTuple):
    """What is known of Y, in nats.

    Attributes:
        text: I(X_T; Y).
        image: I(X_V; Y).
        both: I(X_T, X_V; Y).
        aligned: I(Z; Y) of the finest Z that both modalities can compute.
    """

    text: float
    image: float
    both: float
    aligned: float

    @property
    def delta(self) -> float:
        """|I(X_T; Y) - I(X_V; Y)|."""
        return abs(self.text - self.image)


class Outcome(NamedTuple):
    """Of trained features.

    Attributes:
        excess: cross-entropy above that of the best predictor from both modalities, in nats.
        misalignment: E |Z_T - Z_V|^2.
    """

    excess: float
    misalignment: float


@dataclasses.dataclass(frozen=True)
class Training:
    """How features and their linear predictor are trained, on the whole population.

    Attributes:
        dim: of the features, which have length 1.
        largest_scale: bound of the predictor's norm; without one, differences as small as one likes would do, and no
            penalty but an infinite one would cost anything.
        steps: of Adam.
        rate: its peak rate.
    """

    dim: int = 8
    largest_scale: float = 20.0
    steps: int = 3000
    rate: float = 0.03


def joint_distribution(world: World) -> Joint:
    """P(X_T, X_V, Y), by going through all bits.

    >>> round(informations(joint_distribution(World("shared", 0.0, 0.5))).delta / float(np.log(2)), 3)
    1.0
    """
    bits = (0, 1)
    labels = 8 if world.second_bit == "own" else 4
    joint = np.zeros((4, 4, labels))
    image_noise = 0.5 if world.second_bit == "text" else world.image_noise
    for a, b, c, wrong_label, wrong_text, wrong_image in itertools.product(bits, repeat=6):
        noises = (LABEL_NOISE, world.text_noise, image_noise)
        flips = zip(noises, (wrong_label, wrong_text, wrong_image), strict=True)
        probability = np.prod([noise if wrong else 1 - noise for noise, wrong in flips]) / 8
        seen_by_image = c if world.second_bit == "own" else b
        text, image = 2 * a + (b ^ wrong_text), 2 * a + (seen_by_image ^ wrong_image)
        label = 2 * (a ^ wrong_label) + b
        joint[text, image, 2 * label + c if world.second_bit == "own" else label] += probability
    return joint


def informations(joint: Joint) -> Informations:
    """The mutual informations of a distribution."""
    parts = components(joint)
    aligned = np.zeros((parts[0].max() + 1, joint.shape[2]))
    np.add.at(aligned, parts[0], joint.sum(axis=1))
    tables = (joint.sum(axis=1), joint.sum(axis=0), joint.reshape(-1, joint.shape[2]), aligned)
    return Informations(*(_information(table) for table in tables))


def components(joint: Joint) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " v"]]:
    """For each text and each image the class it is in, when all that occur together must be in one class."""
    texts, images = np.nonzero(joint.sum(axis=2))
    count = sum(joint.shape[:2])
    graph = coo_array((np.ones(len(texts)), (texts, joint.shape[0] + images)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    return labels[: joint.shape[0]], labels[joint.shape[0] :]


def train(joint: Joint, penalty: float, seed: int, training: Training) -> Outcome:
    """Features by the cross-entropy plus `penalty E |Z_T - Z_V|^2`, each text and each image with its own."""
    texts, images = joint.shape[:2]
    return _outcome(joint, (range(texts), range(texts, texts + images)), penalty, seed, training)


def train_aligned(joint: Joint, seed: int, training: Training) -> Outcome:
    """Features that are equal for every text and image that occur together."""
    texts, images = components(joint)
    return _outcome(joint, (texts.tolist(), images.tolist()), 0.0, seed, training)


def _outcome(
    joint: Joint, rows: tuple[Iterable[int], Iterable[int]], penalty: float, seed: int, training: Training
) -> Outcome:
    texts, images = map(tuple, rows)
    return Outcome(*map(float, _train((texts, images), training, joint, _conditional_entropy(joint), penalty, seed)))


@partial(jax.jit, static_argnames=("rows", "training"))
def _train(
    rows: tuple[tuple[int, ...], tuple[int, ...]],
    training: Training,
    joint: Float[Array, "t v y"],
    entropy: Float[Array, ""],
    penalty: Float[Array, ""],
    seed: Int[Array, ""],
) -> tuple[Array, Array]:
    """Excess and misalignment of trained features; `rows` are the places of each text and image in their table."""
    features_key, head_key = jax.random.split(jax.random.key(seed))
    count, labels = max(map(max, rows)) + 1, joint.shape[2]
    text_rows, image_rows = map(np.array, rows)
    params = {
        "features": jax.random.normal(features_key, (count, training.dim)),
        "head": 0.1 * jax.random.normal(head_key, (2, training.dim, labels)),
        "bias": jnp.zeros(labels),
    }

    def outcome(params: dict[str, Array]) -> tuple[Array, Array]:
        features = normalize(params["features"])
        texts, images = features[text_rows], features[image_rows]
        head = params["head"] * jnp.minimum(1.0, training.largest_scale / jnp.linalg.norm(params["head"]))
        logits = (texts @ head[0])[:, None] + (images @ head[1])[None] + params["bias"]
        cross_entropy = -jnp.sum(joint * jax.nn.log_softmax(logits))
        distances = jnp.sum((texts[:, None] - images[None]) ** 2, axis=-1)
        return cross_entropy - entropy, jnp.sum(joint.sum(axis=2) * distances)

    def objective(params: dict[str, Array]) -> Array:
        excess, misalignment = outcome(params)
        return excess + penalty * misalignment

    optimizer = optax.adam(optax.cosine_decay_schedule(training.rate, training.steps))

    def step(state: tuple[Any, optax.OptState], _: None) -> tuple[tuple[Any, optax.OptState], None]:
        params, optimizer_state = state
        updates, optimizer_state = optimizer.update(jax.grad(objective)(params), optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=training.steps)
    return outcome(params)


def _information(table: Float[np.ndarray, "x y"]) -> float:
    independent = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True)
    occurs = table > 0
    return float(np.sum(table[occurs] * np.log(table[occurs] / independent[occurs])))


def _conditional_entropy(joint: Joint) -> float:
    """H(Y | X_T, X_V) in nats."""
    given = joint.sum(axis=2, keepdims=True)
    occurs = joint > 0
    return float(-np.sum(joint[occurs] * np.log((joint / np.where(given > 0, given, 1))[occurs])))
