"""Tokens hidden from a model that is to name them: the corruption of masked language modelling."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key


class MaskedTokens(NamedTuple):
    """A text of which some tokens are to be predicted.

    Attributes:
        token_ids: what the model reads [b l].
        chosen: which tokens it has to name [b l].
    """

    token_ids: Int[Array, "b l"]
    chosen: Bool[Array, "b l"]


def mask_tokens(
    token_ids: Int[Array, "b l"],
    token_mask: Bool[Array, "b l"],
    *,
    rate: float,
    mask_id: int,
    special_ids: Sequence[int],
    vocabulary_size: int,
    key: Key[Array, ""],
) -> MaskedTokens:
    """Chooses each token with probability `rate`: 80 % of them are masked, 10 % are other tokens, 10 % stay (BERT).

    Args:
        token_ids: [b l].
        token_mask: True for real tokens; padding is never chosen.
        rate: in [0, 1].
        mask_id: what stands in the place of a masked token.
        special_ids: tokens that are never chosen and never put in a token's place, such as begin and end.
        vocabulary_size: number of token ids.
        key: typed random key.

    Example:
        >>> ids = jnp.array([[1, 5, 6, 7, 2, 0]])
        >>> masked = mask_tokens(
        ...     ids, ids > 0, rate=1.0, mask_id=9, special_ids=(0, 1, 2), vocabulary_size=10, key=jax.random.key(0)
        ... )
        >>> print(masked.chosen)
        [[False  True  True  True False False]]

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", arXiv
        1810.04805, section 3.1. Drawing each token on its own, and no special token, are ours.
    """
    special = jnp.array([*special_ids, mask_id])
    ordinary = jnp.setdiff1d(
        jnp.arange(vocabulary_size), special, size=vocabulary_size - len({*special_ids, mask_id}), fill_value=0
    )
    choose, corrupt, other = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(choose, rate, token_ids.shape) & token_mask & ~jnp.isin(token_ids, special)
    way = jax.random.uniform(corrupt, token_ids.shape)
    drawn = ordinary[jax.random.randint(other, token_ids.shape, 0, len(ordinary))].astype(token_ids.dtype)
    read = jnp.where(way < 0.8, jnp.asarray(mask_id, token_ids.dtype), jnp.where(way < 0.9, drawn, token_ids))
    return MaskedTokens(jnp.where(chosen, read, token_ids), chosen)
