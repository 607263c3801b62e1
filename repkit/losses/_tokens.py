"""Tokens that count, and the mean over them: for losses that have one value per token of an example."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from repkit.numerics import row_mask


def counting_tokens(
    shape: tuple[int, ...], token_mask: Bool[Array, " b *l"] | None, where: Bool[Array, " b"] | None
) -> Bool[Array, " b *l"]:
    """Which tokens of examples [b *l] count; all of those of an example that `where` allows, without a mask."""
    rows = row_mask(where, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    return jnp.broadcast_to(rows, shape) if token_mask is None else token_mask & rows


def mask_vectors(x: Float[Array, " b *l d"], counting: Bool[Array, " b *#l"]) -> Float[Array, " b *l d"]:
    """`x` with 0 for tokens that do not count; they get a zero gradient even if they hold NaN."""
    return jnp.where(counting[..., None], x, jnp.zeros_like(x))


def mean_over_tokens(values: Float[Array, " b *l"], counting: Bool[Array, " b *l"]) -> Float[Array, " b"]:
    """The mean over the tokens of each example that count; 0 with zero gradient for none."""
    tokens = tuple(range(1, values.ndim))
    total = jnp.sum(jnp.where(counting, values, jnp.zeros_like(values)), axis=tokens)
    number = jnp.sum(counting, axis=tokens, dtype=values.dtype)
    return total / jnp.maximum(number, jnp.ones_like(number))
