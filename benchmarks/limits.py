"""Programs that do only what a loss cannot avoid: the same matrix products, or one pass over the arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def pair_products(
    rows: int, columns: int
) -> Callable[..., tuple[Float[Array, ""], Float[Array, "b d"], Float[Array, "b d"]]]:
    """A loss over all pairs with its gradients, less the loss: 8 B^2 D operations in blocks of rows x columns.

    One walk over the blocks of scores, and a second that computes them again and multiplies them with the block's rows
    on both sides.
    """

    def program(image: Float[Array, "b d"], text: Float[Array, "b d"], *_: Any) -> tuple[Array, Array, Array]:
        height, width = min(rows, len(image)), min(columns, len(text))
        starts = [jnp.arange(-(-len(image) // size)) * size for size in (height, width)]

        def forward(total: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
            # Without the barrier the compiler would compute only the entry that is used.
            block = jax.lax.optimization_barrier(_cut(image, at[0], height) @ _cut(text, at[1], width).T)
            return total + block[0, 0], None

        def backward_row(text_sums: Array, row: Array) -> tuple[Array, Array]:
            images = _cut(image, row, height)

            def backward(sums: tuple[Array, Array], column: Array) -> tuple[tuple[Array, Array], None]:
                image_sums, text_sums = sums
                texts = _cut(text, column, width)
                block = images @ texts.T
                added = _cut(text_sums, column, width) + block.T @ images
                return (image_sums + block @ texts, _paste(text_sums, added, column)), None

            image_sums, text_sums = jax.lax.scan(backward, (jnp.zeros_like(images), text_sums), starts[1])[0]
            return text_sums, image_sums

        order = [at.reshape(-1) for at in jnp.meshgrid(*starts, indexing="ij")]
        total = jax.lax.scan(forward, jnp.zeros((), image.dtype), (order[0], order[1]))[0]
        text_sums, image_sums = jax.lax.scan(backward_row, jnp.zeros_like(text), starts[0])
        return total, image_sums, text_sums

    return program


def gram_products(rows: int) -> Callable[..., tuple[Float[Array, "b d"], Float[Array, "b d"]]]:
    """Two Gram matrices of all rows, and the rows times them: 8 B D^2 operations in blocks of rows."""

    def program(image: Float[Array, "b d"], text: Float[Array, "b d"], *_: Any) -> tuple[Array, Array]:
        height = min(rows, len(image))
        starts = jnp.arange(-(-len(image) // height)) * height

        def forward(grams: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
            images, texts = _cut(image, start, height), _cut(text, start, height)
            return (grams[0] + images.T @ images, grams[1] + texts.T @ texts), None

        def backward(sums: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
            images, texts = _cut(image, start, height), _cut(text, start, height)
            return (_paste(sums[0], images @ grams[1], start), _paste(sums[1], texts @ grams[0], start)), None

        empty = jnp.zeros((image.shape[1],) * 2, image.dtype)
        grams = jax.lax.scan(forward, (empty, empty), starts)[0]
        return jax.lax.scan(backward, (jnp.zeros_like(image), jnp.zeros_like(text)), starts)[0]

    return program


def copy(count: int) -> Callable[..., tuple[Array, ...]]:
    """Reads the first `count` arrays, and writes as many."""

    def program(*arrays: Array) -> tuple[Array, ...]:
        return tuple(-array for array in arrays[:count])

    return program


def read_maps(student: Float[Array, "b hs q k"], teacher: Float[Array, "b ht q k"]) -> Float[Array, "b hs q k"]:
    """Reads both models' maps, and writes an array of the size of the student's."""
    return student + jnp.sum(teacher, axis=1, keepdims=True)


def _cut(x: Float[Array, "b d"], start: Array, size: int) -> Float[Array, "n d"]:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _paste(x: Float[Array, "b d"], block: Float[Array, "n d"], start: Array) -> Float[Array, "b d"]:
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, 0)
