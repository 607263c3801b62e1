"""Programs that do only what a loss cannot avoid: the same matrix products, or one pass over the arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def pair_products(size: int) -> Callable[..., tuple[Array, Array]]:
    """One walk over all pairs in blocks of `size` rows on both sides: 3 products of B^2 D.

    These are the scores, and what a gradient makes of them on both sides.
    """

    def program(image: Float[Array, "b d"], text: Float[Array, "b d"], *_: Any) -> tuple[Array, Array]:
        blocks = _Blocks(len(image), min(size, len(image)))

        def rows(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            images = blocks.take(image, i)

            def columns(j: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
                texts = blocks.take(text, j)
                scores = images @ texts.T
                text_sums = blocks.put(sums[1], blocks.take(sums[1], j) + scores.T @ images, j)
                return sums[0] + scores @ texts, text_sums

            image_sums, text_sums = jax.lax.fori_loop(0, blocks.count, columns, (jnp.zeros_like(images), sums[1]))
            return blocks.put(sums[0], image_sums, i), text_sums

        return jax.lax.fori_loop(0, blocks.count, rows, (jnp.zeros_like(image), jnp.zeros_like(text)))

    return program


def pair_products_twice(size: int) -> Callable[..., tuple[Array, Array, Array]]:
    """A walk over all pairs that makes the scores alone before the one that makes all: 4 products of B^2 D.

    A loss whose gradient needs sums over all pairs cannot do with less, unless it keeps the scores.
    """

    def program(image: Float[Array, "b d"], text: Float[Array, "b d"], *_: Any) -> tuple[Array, Array, Array]:
        blocks = _Blocks(len(image), min(size, len(image)))

        def scores(pair: Array, total: Array) -> Array:
            i, j = jnp.divmod(pair, blocks.count)
            # Without the barrier the compiler would compute only the entry that is used.
            block = jax.lax.optimization_barrier(blocks.take(image, i) @ blocks.take(text, j).T)
            return total + block[0, 0]

        total = jax.lax.fori_loop(0, blocks.count**2, scores, jnp.zeros((), image.dtype))
        return total, *pair_products(size)(image, text)

    return program


def symmetric_products(size: int) -> Callable[..., tuple[Array, ...]]:
    """For each array, one walk over half of the pairs of its own rows: 3 products of B^2 D / 2 each."""

    def one(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        blocks = _Blocks(len(x), min(size, len(x)))

        def rows(i: Array, sums: Array) -> Array:
            first = blocks.take(x, i)

            def columns(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                second = blocks.take(x, j)
                scores = first @ second.T
                sums = blocks.put(carry[1], blocks.take(carry[1], j) + scores.T @ first, j)
                return carry[0] + scores @ second, sums

            own, sums = jax.lax.fori_loop(i, blocks.count, columns, (jnp.zeros_like(first), sums))
            return blocks.put(sums, blocks.take(sums, i) + own, i)

        return jax.lax.fori_loop(0, blocks.count, rows, jnp.zeros_like(x))

    return lambda *arrays: tuple(one(x) for x in arrays)


def gram_products(size: int) -> Callable[..., tuple[Array, Array]]:
    """Two Gram matrices of all rows, and the rows times them, in blocks of rows: 4 products of B D^2."""

    def program(image: Float[Array, "b d"], text: Float[Array, "b d"], *_: Any) -> tuple[Array, Array]:
        blocks = _Blocks(len(image), min(size, len(image)))

        def forward(i: Array, grams: tuple[Array, Array]) -> tuple[Array, Array]:
            images, texts = blocks.take(image, i), blocks.take(text, i)
            return grams[0] + images.T @ images, grams[1] + texts.T @ texts

        def backward(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            images, texts = blocks.take(image, i), blocks.take(text, i)
            return blocks.put(sums[0], images @ grams[1], i), blocks.put(sums[1], texts @ grams[0], i)

        empty = jnp.zeros((image.shape[1],) * 2, image.dtype)
        grams = jax.lax.fori_loop(0, blocks.count, forward, (empty, empty))
        return jax.lax.fori_loop(0, blocks.count, backward, (jnp.zeros_like(image), jnp.zeros_like(text)))

    return program


def copy(count: int) -> Callable[..., tuple[Array, ...]]:
    """Reads the first `count` arrays, and writes as many."""

    def program(*arrays: Array) -> tuple[Array, ...]:
        return tuple(-array for array in arrays[:count])

    return program


def read_maps(student: Float[Array, "b hs q k"], teacher: Float[Array, "b ht q k"]) -> Float[Array, "b hs q k"]:
    """Reads both models' maps, and writes an array of the size of the student's."""
    return student + jnp.sum(teacher, axis=1, keepdims=True)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of rows; the last begins early where they do not divide."""

    length: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def take(self, x: Float[Array, "b d"], i: Array) -> Float[Array, "n d"]:
        return jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size)

    def put(self, x: Float[Array, "b d"], block: Float[Array, "n d"], i: Array) -> Float[Array, "b d"]:
        return jax.lax.dynamic_update_slice_in_dim(x, block, i * self.size, 0)
