"""The losses, their shapes, and who competes on each: one function of sizes per loss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from benchmarks import costs, limits, peers, torch_peers
from benchmarks.measure import Arrays, Entrant, Problem
from repkit import losses
from repkit.losses._pairs import block_size
from repkit.numerics import normalize

Shape: TypeAlias = tuple[int, ...]
Variant: TypeAlias = Literal["mse", "kl"]

LOGIT_SCALE = 14.3
GRAM_BLOCK = 2**20
"""Elements of a block of rows in the program of Gram matrices."""

FLOAT_BYTES = 4


def embeddings(count: int, rows: int, width: int, dtype: str) -> list[jax.Array]:
    """Unit rows, a new array for each."""
    keys = jax.random.split(jax.random.key(0), count)
    return [normalize(jax.random.normal(key, (rows, width), jnp.float32)).astype(dtype) for key in keys]


def attention(count: int, shape: Shape, dtype: str) -> jax.Array:
    """Maps whose rows are a softmax."""
    return jax.nn.softmax(2 * jax.random.normal(jax.random.key(count), shape, jnp.float32), axis=-1).astype(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Losses over all pairs


def info_nce(rows: int, width: int) -> Problem:
    """Against the plain form, optax, open_clip's formula, and the products alone."""

    def arrays(dtype: str) -> Arrays:
        return *embeddings(2, rows, width, dtype), jnp.float32(LOGIT_SCALE)

    return Problem(
        loss="info_nce",
        shape={"rows": rows, "width": width},
        arrays=arrays,
        learned=3,
        entrants=(
            _ours(
                lambda image, text, scale: losses.info_nce(image, text, logit_scale=scale),
                flops=_softmax_flops(rows, width),
                traffic=costs.pair_traffic(rows, width),
            ),
            _plain(peers.info_nce, flops=costs.pair_flops(rows, width, products=3)),
            Entrant(name="optax cross-entropy", role="peer", function=peers.optax_cross_entropy),
            Entrant(name="optax ntxent", role="peer", function=peers.optax_ntxent),
            _torch(torch_peers.clip, floats=6 * rows**2, flops=costs.pair_flops(rows, width, products=6)),
            _pair_limit(rows, width),
        ),
    )


def gamma_contrastive(rows: int, width: int) -> Problem:
    """With a memory, against our plain form and our InfoNCE."""

    def arrays(dtype: str) -> Arrays:
        memory = losses.init_memory(4 * rows)
        return *embeddings(2, rows, width, dtype), jnp.float32(LOGIT_SCALE), memory, jnp.arange(rows), jax.random.key(0)

    def gamma(image: Any, text: Any, scale: Any, memory: Any, example_id: Any, key: Any, *, form: losses.Form) -> Any:
        return losses.gamma_contrastive(
            image, text, logit_scale=scale, memory=memory, example_id=example_id, memory_rate=0.9, form=form, key=key
        )

    return Problem(
        loss="gamma_contrastive",
        shape={"rows": rows, "width": width},
        arrays=arrays,
        learned=3,
        entrants=(
            _ours(
                functools.partial(gamma, form=losses.Blocks()),
                flops=_softmax_flops(rows, width),
                traffic=costs.pair_traffic(rows, width),
            ),
            _plain(functools.partial(gamma, form="plain"), flops=costs.pair_flops(rows, width, products=3)),
            Entrant(
                name="info_nce",
                role="peer",
                function=lambda image, text, scale, *_: losses.info_nce(image, text, logit_scale=scale),
                flops=_softmax_flops(rows, width),
            ),
            _pair_limit(rows, width),
        ),
    )


def geometric_consistency(rows: int, width: int) -> Problem:
    """With CyCLIP's weights, against CyCLIP's formula and the products alone."""
    if 3 * rows < 4 * width:
        limit, flops = limits.pair_products(rows), costs.pair_flops(rows, width, products=3)
    else:
        limit, flops = limits.gram_products(GRAM_BLOCK // width), costs.gram_flops(rows, width, products=4)
    return Problem(
        loss="geometric_consistency",
        shape={"rows": rows, "width": width},
        arrays=lambda dtype: tuple(embeddings(2, rows, width, dtype)),
        learned=2,
        entrants=(
            _ours(
                lambda image, text: losses.geometric_consistency(
                    image, text, cross_modal_weight=0.25, in_modal_weight=0.25
                ),
                flops=flops,
                traffic=costs.pair_traffic(rows, width),
            ),
            _plain(peers.cyclip, flops=costs.pair_flops(rows, width, products=9)),
            _torch(torch_peers.cyclip, floats=7 * rows**2, flops=costs.pair_flops(rows, width, products=9)),
            Entrant(name="products alone", role="limit", function=limit, flops=flops),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Losses over the rows


def _bridge(image: Any, text: Any, augmented: Any) -> jax.Array:
    return losses.brownian_bridge(image, text, augmented)


def _separation(image: Any, text: Any, own_image: Any, own_text: Any) -> jax.Array:
    """The orthogonality term; the others are losses over pairs."""
    return losses.feature_separation(
        image,
        text,
        own_image,
        own_text,
        own_image,
        own_text,
        logit_scale=LOGIT_SCALE,
        contrastive_weight=0.0,
        uniformity_weight=0.0,
    )


def brownian_bridge(rows: int, width: int) -> Problem:
    """Against the formula in torch, and a copy of its arrays."""
    return _elementwise("brownian_bridge", rows, width, 3, _bridge, torch_peers.brownian_bridge)


def orthogonality(rows: int, width: int) -> Problem:
    """Feature separation without its losses over pairs."""
    return _elementwise("orthogonality", rows, width, 4, _separation, torch_peers.orthogonality)


def orthogonality_and_bridge(rows: int, width: int) -> Problem:
    """Both in one program, against each alone, as torch does them, and a copy of their arrays."""

    def both(image: Any, text: Any, own_image: Any, own_text: Any, augmented: Any) -> jax.Array:
        return _separation(image, text, own_image, own_text) + _bridge(image, text, augmented)

    def torch_both(image: Any, text: Any, own_image: Any, own_text: Any, augmented: Any) -> Any:
        bridge = torch_peers.brownian_bridge(image, text, augmented)
        return torch_peers.orthogonality(image, text, own_image, own_text) + bridge

    alone = (
        Entrant(
            name="orthogonality alone",
            role="peer",
            function=lambda image, text, own_image, own_text, _: _separation(image, text, own_image, own_text),
            learned=(0, 1, 2, 3),
        ),
        Entrant(
            name="bridge alone",
            role="peer",
            function=lambda image, text, _, __, augmented: _bridge(image, text, augmented),
            learned=(0, 1, 4),
        ),
    )
    return _elementwise("orthogonality_and_bridge", rows, width, 5, both, torch_both, alone)


def _elementwise(
    loss: str,
    rows: int,
    width: int,
    count: int,
    ours: Callable[..., Any],
    torch: Callable[..., Any],
    others: tuple[Entrant, ...] = (),
) -> Problem:
    traffic = costs.elementwise_traffic(rows, width, arrays=count)
    return Problem(
        loss=loss,
        shape={"rows": rows, "width": width},
        arrays=lambda dtype: tuple(embeddings(count, rows, width, dtype)),
        learned=count,
        entrants=(
            _ours(ours, traffic=traffic),
            *others,
            _torch(torch, floats=4 * count * rows * width),
            Entrant(name="copy alone", role="limit", function=limits.copy(count), traffic=traffic),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Who competes


def _ours(function: Callable[..., Any], *, traffic: float, flops: float | None = None) -> Entrant:
    return Entrant(name="repkit", role="ours", function=function, flops=flops, traffic=traffic)


def _plain(function: Callable[..., Any], *, flops: float) -> Entrant:
    return Entrant(name="plain", role="peer", function=function, flops=flops)


def _torch(function: Callable[..., Any], *, floats: float, flops: float | None = None, name: str = "torch") -> Entrant:
    return Entrant(
        name=name,
        role="peer",
        function=function,
        flops=flops,
        package="torch",
        estimated_memory=FLOAT_BYTES * floats,
    )


def _softmax_flops(rows: int, width: int) -> float:
    """The scores are computed twice unless the pair matrix is one block."""
    return costs.pair_flops(rows, width, products=3 if block_size(rows, losses.Blocks()) == rows else 4)


def _pair_limit(rows: int, width: int) -> Entrant:
    return Entrant(
        name="products alone",
        role="limit",
        function=limits.pair_products(block_size(rows, losses.Blocks())),
        flops=_softmax_flops(rows, width),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which shapes


@dataclass(frozen=True)
class Family:
    """The problems of one loss.

    Attributes:
        problem: of the sizes of a shape.
        usual: shapes that take seconds.
        large: shapes that take up to minutes.
        smallest: the sizes that a smoke run uses instead.
    """

    problem: Callable[..., Problem]
    usual: tuple[Shape, ...]
    large: tuple[Shape, ...]
    smallest: Shape

    def at(self, shape: Shape, *, smoke: bool) -> Problem:
        """The problem of this shape, made small for a smoke run."""
        return self.problem(*(map(min, shape, self.smallest) if smoke else shape))


_SMALL_BATCHES = ((32, 512), (128, 512), (512, 512), (1024, 512))
_PAIRS = (*_SMALL_BATCHES, (4096, 128), (4096, 512), (4097, 511))
_MANY_PAIRS = ((64, 512), (256, 512), (2048, 512), (8192, 512), (16384, 512), (65536, 512))
_ROWS = ((1024, 512), (4097, 511), (16384, 512))
_MANY_ROWS = ((65536, 512),)
_SMALLEST_PAIRS = (48, 16)

FAMILIES = {
    "info_nce": Family(info_nce, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    "gamma_contrastive": Family(gamma_contrastive, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    "geometric_consistency": Family(
        geometric_consistency,
        (*_PAIRS, (1024, 1024), (4096, 64), (4096, 256), (4096, 1024)),
        (*_MANY_PAIRS, (32768, 512)),
        _SMALLEST_PAIRS,
    ),
    "brownian_bridge": Family(brownian_bridge, _ROWS, _MANY_ROWS, _SMALLEST_PAIRS),
    "orthogonality": Family(orthogonality, _ROWS, _MANY_ROWS, _SMALLEST_PAIRS),
    "orthogonality_and_bridge": Family(orthogonality_and_bridge, _ROWS, _MANY_ROWS, _SMALLEST_PAIRS),
}
