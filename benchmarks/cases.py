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
from repkit.losses._pairs import row_blocks
from repkit.numerics import normalize

Shape: TypeAlias = tuple[int, ...]
Variant: TypeAlias = Literal["mse", "kl"]

VARIANTS: tuple[Variant, ...] = ("mse", "kl")
LOGIT_SCALE = 14.3
GRAM_BLOCK = 2**20
"""Elements of a block of rows in the program of Gram matrices."""

UNIFORMITY_BLOCK = 512
"""Rows of a block in the program of symmetric products."""

FLOAT_BYTES = 4


def embeddings(count: int, rows: int, width: int, dtype: str) -> list[jax.Array]:
    """Unit rows, a new array for each."""
    keys = jax.random.split(jax.random.key(0), count)
    return [normalize(jax.random.normal(key, (rows, width), jnp.float32)).astype(dtype) for key in keys]


def attention(seed: int, shape: Shape, dtype: str) -> jax.Array:
    """Maps whose rows are a softmax."""
    return jax.nn.softmax(2 * jax.random.normal(jax.random.key(seed), shape, jnp.float32), axis=-1).astype(dtype)


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
            _pair_limit(rows, _softmax_flops(rows, width), products=_softmax_products(rows)),
        ),
    )


def in_modal_info_nce(rows: int, width: int) -> Problem:
    """One modality against its augmented views, in one direction."""

    def arrays(dtype: str) -> Arrays:
        return *embeddings(2, rows, width, dtype), jnp.float32(LOGIT_SCALE)

    return Problem(
        loss="in_modal_info_nce",
        shape={"rows": rows, "width": width},
        arrays=arrays,
        learned=3,
        entrants=(
            _ours(
                lambda embeds, views, scale: losses.in_modal_info_nce(embeds, views, logit_scale=scale),
                flops=_softmax_flops(rows, width),
                traffic=costs.pair_traffic(rows, width),
            ),
            _plain(peers.one_way_info_nce, flops=costs.pair_flops(rows, width, products=3)),
            _pair_limit(rows, _softmax_flops(rows, width), products=_softmax_products(rows)),
        ),
    )


def decoupled_contrastive(rows: int, width: int) -> Problem:
    """Against the plain form, our InfoNCE, and the products alone."""

    def arrays(dtype: str) -> Arrays:
        return *embeddings(2, rows, width, dtype), jnp.float32(LOGIT_SCALE)

    return Problem(
        loss="decoupled_contrastive",
        shape={"rows": rows, "width": width},
        arrays=arrays,
        learned=3,
        entrants=(
            _ours(
                lambda image, text, scale: losses.decoupled_contrastive(image, text, logit_scale=scale),
                flops=_softmax_flops(rows, width),
                traffic=costs.pair_traffic(rows, width),
            ),
            _plain(peers.decoupled_contrastive, flops=costs.pair_flops(rows, width, products=3)),
            _our_info_nce(rows, width),
            _pair_limit(rows, _softmax_flops(rows, width), products=_softmax_products(rows)),
        ),
    )


def gamma_contrastive(rows: int, width: int, *, rates_from: Literal["updated", "previous"]) -> Problem:
    """With a memory that knows all rows and sampled rates, against our plain form and our InfoNCE."""

    def loss(image: Any, text: Any, scale: Any, memory: Any, example_id: Any, key: Any, *, form: losses.Form) -> Any:
        return losses.gamma_contrastive(
            image,
            text,
            logit_scale=scale,
            memory=memory,
            example_id=example_id,
            memory_rate=0.9,
            rates_from=rates_from,
            form=form,
            key=key,
        )

    name = f"gamma_contrastive_{rates_from}"
    return _with_memory(name, rows, width, loss, products=3 if rates_from == "previous" else _softmax_products(rows))


def global_contrastive(rows: int, width: int) -> Problem:
    """With a memory that knows all rows, against our plain form and our InfoNCE."""

    def loss(image: Any, text: Any, scale: Any, memory: Any, example_id: Any, _: Any, *, form: losses.Form) -> Any:
        return losses.global_contrastive(
            image, text, logit_scale=scale, memory=memory, example_id=example_id, memory_rate=0.9, form=form
        )

    return _with_memory("global_contrastive", rows, width, loss, products=_softmax_products(rows))


def _with_memory(name: str, rows: int, width: int, loss: Callable[..., Any], *, products: int) -> Problem:
    def arrays(dtype: str) -> Arrays:
        size = 4 * rows
        # About the partition of random embeddings, so that nothing is at its bound.
        log_partition = jnp.full(size, jnp.log(size), jnp.float32)
        memory = losses.init_memory(size)._replace(
            image_to_text=log_partition, text_to_image=log_partition, visited=jnp.ones(size, bool)
        )
        return *embeddings(2, rows, width, dtype), jnp.float32(LOGIT_SCALE), memory, jnp.arange(rows), jax.random.key(0)

    flops = costs.pair_flops(rows, width, products=products)
    return Problem(
        loss=name,
        shape={"rows": rows, "width": width},
        arrays=arrays,
        learned=3,
        entrants=(
            _ours(
                functools.partial(loss, form=losses.Blocks()),
                flops=flops,
                traffic=costs.pair_traffic(rows, width),
            ),
            _plain(functools.partial(loss, form="plain"), flops=costs.pair_flops(rows, width, products=3)),
            _our_info_nce(rows, width),
            _pair_limit(rows, flops, products=products),
        ),
    )


def queue_contrastive(rows: int, width: int) -> Problem:
    """With soft targets and a queue of two batches, against our plain form."""

    def arrays(dtype: str) -> Arrays:
        image, text, teacher_image, teacher_text = embeddings(4, rows, width, dtype)
        queue = losses.init_queue(2 * rows, width, dtype)
        stored = embeddings(2, 2 * rows, width, dtype)
        queue = queue._replace(image_embeds=stored[0], text_embeds=stored[1], filled=jnp.ones(2 * rows, bool))
        return image, text, jnp.float32(LOGIT_SCALE), teacher_image, teacher_text, queue

    def loss(image: Any, text: Any, scale: Any, *teacher: Any, form: losses.Form) -> Any:
        *embeds, queue = teacher
        return losses.queue_contrastive(
            image, text, *embeds, logit_scale=scale, memory=queue, target_share=0.4, form=form
        )

    # Both directions, three batches of candidates: the scores of student and teacher, and the anchors' gradient; in
    # more than one block the scores are made three times.
    products = 3 if row_blocks(3 * rows, losses.Blocks()).blocks == 1 else 7
    return Problem(
        loss="queue_contrastive",
        shape={"rows": rows, "width": width},
        arrays=arrays,
        learned=3,
        entrants=(
            _ours(
                functools.partial(loss, form=losses.Blocks()),
                flops=costs.pair_flops(rows, width, products=6 * products),
                traffic=3 * costs.pair_traffic(rows, width),
            ),
            _plain(functools.partial(loss, form="plain"), flops=costs.pair_flops(rows, width, products=18)),
        ),
    )


def sigmoid_contrastive(rows: int, width: int) -> Problem:
    """Against the plain form, open_clip's formula, and the products alone."""

    def arrays(dtype: str) -> Arrays:
        return *embeddings(2, rows, width, dtype), jnp.float32(10.0), jnp.float32(-10.0)

    flops = costs.pair_flops(rows, width, products=3)
    return Problem(
        loss="sigmoid_contrastive",
        shape={"rows": rows, "width": width},
        arrays=arrays,
        learned=4,
        entrants=(
            _ours(
                lambda image, text, scale, bias: losses.sigmoid_contrastive(
                    image, text, logit_scale=scale, logit_bias=bias
                ),
                flops=flops,
                traffic=costs.pair_traffic(rows, width),
            ),
            _plain(peers.sigmoid_contrastive, flops=flops),
            _torch(torch_peers.siglip, floats=6 * rows**2, flops=flops),
            _pair_limit(rows, flops, products=3),
        ),
    )


def uniformity(rows: int, width: int) -> Problem:
    """Against the plain form, the formula in torch, and the products alone."""
    flops = costs.pair_flops(rows, width, products=3)
    return Problem(
        loss="uniformity",
        shape={"rows": rows, "width": width},
        arrays=lambda dtype: tuple(embeddings(2, rows, width, dtype)),
        learned=2,
        entrants=(
            _ours(losses.uniformity, flops=flops, traffic=costs.pair_traffic(rows, width)),
            _plain(peers.uniformity, flops=costs.pair_flops(rows, width, products=6)),
            _torch(torch_peers.uniformity, floats=8 * rows**2, flops=costs.pair_flops(rows, width, products=6)),
            _products_alone(limits.symmetric_products(UNIFORMITY_BLOCK), flops),
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
            _products_alone(limit, flops),
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
# Attention maps


def attention_maps(
    examples: int, teacher_heads: int, student_heads: int, queries: int, keys: int, *, variant: Variant
) -> Problem:
    """Against the sums over head pairs contracted and spelled out, in JAX and torch, and one pass over the maps."""
    cells = queries * keys
    flops = costs.attention_map_flops(examples, teacher_heads, student_heads, cells)
    traffic = costs.attention_map_traffic(examples, teacher_heads, student_heads, cells)

    def arrays(dtype: str) -> Arrays:
        shapes = [(examples, heads, queries, keys) for heads in (student_heads, teacher_heads)]
        return tuple(attention(seed, shape, dtype) for seed, shape in enumerate(shapes))

    def with_variant(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, variant=variant)

    return Problem(
        loss=f"attention_maps_{variant}",
        shape={
            "examples": examples,
            "teacher_heads": teacher_heads,
            "student_heads": student_heads,
            "queries": queries,
            "keys": keys,
        },
        arrays=arrays,
        learned=1,
        entrants=(
            _ours(with_variant(losses.attention_map_alignment), flops=flops, traffic=traffic),
            _plain(with_variant(peers.attention_maps), flops=flops),
            Entrant(name="pairwise", role="peer", function=with_variant(peers.pairwise_attention_maps), flops=flops),
            _torch(
                with_variant(torch_peers.attention_maps),
                floats=4 * examples * (teacher_heads + 2 * student_heads) * cells,
                flops=flops,
            ),
            _torch(
                with_variant(torch_peers.pairwise_attention_maps),
                name="torch pairwise",
                floats=6 * examples * teacher_heads * student_heads * cells,
                flops=flops,
            ),
            Entrant(name="one pass", role="limit", function=limits.read_maps, traffic=traffic),
        ),
    )


def attention_queries_keys(
    examples: int, teacher_heads: int, student_heads: int, length: int, width: int, *, variant: Variant
) -> Problem:
    """Against the maps of both models in memory, in JAX and torch."""
    sizes = examples, teacher_heads, student_heads, length, width

    def arrays(dtype: str) -> Arrays:
        heads = (student_heads, student_heads, teacher_heads, teacher_heads)
        keys = jax.random.split(jax.random.key(0), len(heads))
        return tuple(
            jax.random.normal(key, (examples, each, length, width), jnp.float32).astype(dtype)
            for key, each in zip(keys, heads, strict=True)
        )

    plain_flops = costs.plain_queries_keys_flops(*sizes)
    return Problem(
        loss=f"attention_queries_keys_{variant}",
        shape=dict(zip(("examples", "teacher_heads", "student_heads", "length", "width"), sizes, strict=True)),
        arrays=arrays,
        learned=2,
        entrants=(
            _ours(
                functools.partial(losses.attention_alignment_from_queries_keys, variant=variant),
                flops=costs.queries_keys_flops(*sizes),
                traffic=costs.queries_keys_traffic(*sizes),
            ),
            _plain(functools.partial(peers.attention_queries_keys, variant=variant), flops=plain_flops),
            _torch(
                functools.partial(torch_peers.attention_queries_keys, variant=variant),
                floats=6 * examples * (teacher_heads + student_heads) * length**2,
                flops=plain_flops,
            ),
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


def _our_info_nce(rows: int, width: int) -> Entrant:
    return Entrant(
        name="info_nce",
        role="peer",
        function=lambda image, text, scale, *_: losses.info_nce(image, text, logit_scale=scale),
        flops=_softmax_flops(rows, width),
    )


def _products_alone(function: Callable[..., Any], flops: float) -> Entrant:
    return Entrant(name="products alone", role="limit", function=function, flops=flops)


def _softmax_products(rows: int) -> int:
    """The scores are computed twice unless the pair matrix is one block."""
    return 3 if row_blocks(rows, losses.Blocks()).blocks == 1 else 4


def _softmax_flops(rows: int, width: int) -> float:
    return costs.pair_flops(rows, width, products=_softmax_products(rows))


def _pair_limit(rows: int, flops: float, *, products: int) -> Entrant:
    program = limits.pair_products if products == 3 else limits.pair_products_twice
    return _products_alone(program(row_blocks(rows, losses.Blocks()).rows), flops)


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
_MAPS = ((8, 7, 3, 50, 50), (8, 12, 6, 197, 197))
_MANY_MAPS = ((32, 12, 6, 197, 197), (8, 16, 8, 577, 577), (1, 7, 3, 1025, 1025))
_QUERIES = ((4, 12, 6, 50, 64), (4, 12, 6, 512, 64), (1, 7, 3, 1025, 64))
_MANY_QUERIES = ((1, 12, 6, 2048, 64), (1, 12, 6, 4096, 64))

FAMILIES = {
    "info_nce": Family(info_nce, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    "in_modal_info_nce": Family(in_modal_info_nce, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    "decoupled_contrastive": Family(decoupled_contrastive, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    "global_contrastive": Family(global_contrastive, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    **{
        f"gamma_contrastive_{order}": Family(
            functools.partial(gamma_contrastive, rates_from=order), _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS
        )
        for order in ("updated", "previous")
    },
    "queue_contrastive": Family(queue_contrastive, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    "sigmoid_contrastive": Family(sigmoid_contrastive, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    "uniformity": Family(uniformity, _PAIRS, _MANY_PAIRS, _SMALLEST_PAIRS),
    "geometric_consistency": Family(
        geometric_consistency,
        (*_PAIRS, (1024, 1024), (4096, 64), (4096, 256), (4096, 1024)),
        (*_MANY_PAIRS, (32768, 512)),
        _SMALLEST_PAIRS,
    ),
    **{
        f"attention_maps_{variant}": Family(
            functools.partial(attention_maps, variant=variant), _MAPS, _MANY_MAPS, (2, 3, 2, 5, 7)
        )
        for variant in VARIANTS
    },
    **{
        f"attention_queries_keys_{variant}": Family(
            functools.partial(attention_queries_keys, variant=variant), _QUERIES, _MANY_QUERIES, (2, 3, 2, 9, 4)
        )
        for variant in VARIANTS
    },
    "brownian_bridge": Family(brownian_bridge, _ROWS, _MANY_ROWS, _SMALLEST_PAIRS),
    "orthogonality": Family(orthogonality, _ROWS, _MANY_ROWS, _SMALLEST_PAIRS),
    "orthogonality_and_bridge": Family(orthogonality_and_bridge, _ROWS, _MANY_ROWS, _SMALLEST_PAIRS),
}
