"""A transformer decoder: all tokens at once in training, one token at a time, with a cache, in generation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from repkit.models.encoders import Transformer, TransformerConfig
from repkit.models.generation import Generated, beam_search
from repkit.models.layers import MLP, Attention, KeysValues, LayerNorm, causal_mask, dropout, fold, padding_mask


class DecoderBlock(nnx.Module):
    """Pre-norm decoder block: self-attention, attention to a context, then the MLP; dropout on all three branches."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, dropout: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dropout = dropout
        self.self_attention_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.self_attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.cross_attention_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.cross_attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, mlp_width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b l width"],
        context: Float[Array, "b k width"],
        mask: Bool[Array, "#b #heads #l #l"] | None,
        context_mask: Bool[Array, "#b #heads #l #k"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b l width"]:
        attended = self.self_attention(self.self_attention_norm(tokens), mask=mask)
        tokens = tokens + dropout(attended, self.dropout, fold(key, 0))
        attended = self.cross_attention(self.cross_attention_norm(tokens), context, mask=context_mask)
        tokens = tokens + dropout(attended, self.dropout, fold(key, 1))
        return tokens + dropout(self.mlp(self.mlp_norm(tokens)), self.dropout, fold(key, 2))

    def step(
        self,
        tokens: Float[Array, "b beams width"],
        position: Int[Array, ""],
        past: KeysValues,
        context: KeysValues,
        context_mask: Bool[Array, "#b #heads 1 #k"] | None,
    ) -> tuple[Float[Array, "b beams width"], KeysValues]:
        """The block for one more token of each of several sequences of an example, as `__call__` has it, causally.

        Args:
            tokens: the token of each sequence at `position`.
            position: the number of tokens before it.
            past: keys and values of the tokens before it, [b beams length heads head_dim]; the token's own are put in.
            context: keys and values of the context, `cross_attention.keys_values(context)`, one for all sequences.
            context_mask: True where a key may be seen.
        """
        batch, beams, length, heads, head_dim = past.keys.shape
        normed = self.self_attention_norm(tokens).reshape(batch * beams, 1, -1)
        new = self.self_attention.keys_values(normed)
        past = jax.tree.map(
            lambda before, added: jax.lax.dynamic_update_slice_in_dim(
                before, added.reshape(batch, beams, 1, heads, head_dim), position, axis=2
            ),
            past,
            new,
        )
        seen = jax.tree.map(lambda values: values.reshape(batch * beams, length, heads, head_dim), past)
        mask = padding_mask((jnp.arange(length) <= position)[None])
        attended = self.self_attention.attend(normed, seen, mask=mask)
        tokens = tokens + attended.reshape(tokens.shape)
        # The sequences of an example stand where a sequence's tokens do: none of them sees another.
        tokens = tokens + self.cross_attention.attend(self.cross_attention_norm(tokens), context, mask=context_mask)
        return tokens + self.mlp(self.mlp_norm(tokens)), past


class Decoder(Transformer):
    """Dropout, `depth` decoder blocks and a final norm over embedded tokens, which attend to a context."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, block=DecoderBlock, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b t width"],
        context: Float[Array, "b n width"],
        context_mask: Bool[Array, "b n"],
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t width"]:
        """All tokens at once, none of which sees those after it."""
        return self.transform(tokens, context, causal_mask(tokens.shape[1]), padding_mask(context_mask), key=key)

    def contexts(self, context: Float[Array, "b n width"]) -> list[KeysValues]:
        """What each block's cross-attention looks at, made once for all tokens."""
        return [block.cross_attention.keys_values(context) for block in self.blocks]

    def step(
        self,
        tokens: Float[Array, "b beams width"],
        position: Int[Array, ""],
        past: list[KeysValues],
        contexts: list[KeysValues],
        context_mask: Bool[Array, "b n"],
    ) -> tuple[Float[Array, "b beams width"], list[KeysValues]]:
        """One more token of each of several sequences of an example; see `DecoderBlock.step`."""
        mask, now = padding_mask(context_mask), []
        for block, keys_values, context in zip(self.blocks, past, contexts, strict=True):
            tokens, keys_values = block.step(tokens, position, keys_values, context, mask)
            now.append(keys_values)
        return self.norm(tokens), now

    def search(
        self,
        context: Float[Array, "b n width"],
        context_mask: Bool[Array, "b n"],
        *,
        embed: Callable[[Int[Array, "b beams"], Int[Array, ""]], Float[Array, "b beams width"]],
        predict: Callable[[Float[Array, "b beams width"]], Float[Array, "b beams v"]],
        beams: int,
        max_length: int,
        **options: Any,
    ) -> Generated:
        """The sequences that beam search finds, with a cache of keys and values.

        Args:
            context: what the tokens attend to.
            context_mask: True for its real tokens.
            embed: from token ids and their position to embedded tokens.
            predict: from decoded tokens to the logits of the next ones.
            beams: see `beam_search`.
            max_length: see `beam_search`.
            options: further arguments of `beam_search`.
        """
        contexts = self.contexts(context)

        def step(
            token_ids: Int[Array, "b beams"], position: Int[Array, ""], past: list[KeysValues]
        ) -> tuple[Float[Array, "b beams v"], list[KeysValues]]:
            tokens, past = self.step(embed(token_ids, position), position, past, contexts, context_mask)
            return predict(tokens), past

        rows, _, *head = contexts[0].keys.shape
        empty = jnp.zeros((rows, beams, max_length, *head), contexts[0].keys.dtype)
        cache = [KeysValues(empty, empty) for _ in contexts]
        return beam_search(step, cache, rows=rows, beams=beams, max_length=max_length, **options)
