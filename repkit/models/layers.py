"""Transformer layers: parameters in float32, arithmetic in a chosen dtype, randomness only from an explicit key."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

_kernel_init = nnx.initializers.xavier_uniform()


class Captured(nnx.Variable):
    """What a layer shows of itself beside its output; see `repkit.models.capture`."""


class KeysValues(NamedTuple):
    """What attention looks at: the keys and values of a context.

    Attributes:
        keys: [b k heads head_dim].
        values: [b k heads head_dim].
    """

    keys: Float[Array, "b k heads head_dim"]
    values: Float[Array, "b k heads head_dim"]


def call(module: nnx.Module, *arguments: Any) -> Any:
    """`module(*arguments)`, as a function that `nnx.remat` takes."""
    return module(*arguments)


def fold(key: Key[Array, ""] | None, index: int) -> Key[Array, ""] | None:
    """The key of one numbered part of a computation; None, which means deterministic, stays None."""
    return None if key is None else jax.random.fold_in(key, index)


def dropout(values: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*shape"]:
    """Zeroes each value with probability `rate` and divides the others by `1 - rate`; the identity without a key.

    Args:
        values: any shape.
        rate: in [0, 1).
        key: typed key, used once; None means evaluation.

    Returns:
        An array like `values`, with the same mean over keys.

    Example:
        >>> dropout(jnp.ones(3), 0.5, None)
        Array([1., 1., 1.], dtype=float32)
    """
    if key is None or rate == 0.0:
        return values
    kept = jax.random.bernoulli(key, 1.0 - rate, values.shape)
    return jnp.where(kept, values / (1.0 - rate), 0.0)


def padding_mask(token_mask: Bool[Array, "b k"]) -> Bool[Array, "b 1 1 k"]:
    """The attention mask that hides padding tokens from every query."""
    return token_mask[:, None, None, :]


def causal_mask(length: int) -> Bool[Array, "1 1 l l"]:
    """The attention mask under which a token sees itself and the tokens before it.

    Example:
        >>> causal_mask(3)[0, 0].astype(int)
        Array([[1, 0, 0],
               [1, 1, 0],
               [1, 1, 1]], dtype=int32)
    """
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def attention_map(
    query: Float[Array, "b q heads head_dim"],
    key: Float[Array, "b k heads head_dim"],
    mask: Bool[Array, "#b #heads #q #k"] | None = None,
) -> Float[Array, "b heads q k"]:
    """Scaled dot-product attention probabilities, `softmax_k(query . key / sqrt(head_dim))`, in float32.

    Args:
        query: [b q heads head_dim].
        key: [b k heads head_dim].
        mask: True where a query may see a key; broadcasts to [b heads q k]. A query that may see nothing gets the
            uniform distribution, so that neither the map nor its gradient is NaN.

    Returns:
        [b heads q k] float32; rows sum to 1.

    Example:
        >>> attention_map(jnp.ones((1, 1, 1, 4)), jnp.ones((1, 2, 1, 4)))
        Array([[[[0.5, 0.5]]]], dtype=float32)
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits, axis=-1)


LONG_MAP = 512**2
"""Cells of an example's map for one head above which `attend` walks it in blocks of `QUERY_ROWS` queries."""

QUERY_ROWS = 128


def attend(
    query: Float[Array, "b q heads head_dim"], seen: "KeysValues", mask: Bool[Array, "#b #heads #q #k"] | None = None
) -> Float[Array, "b q heads head_dim"]:
    """`attention_map(query, keys, mask) values`, of long sequences without ever holding the map.

    A map of more than `LONG_MAP` cells is walked in blocks of queries, each of which is computed again in the backward
    pass. The memory is that of one block, at about a third more arithmetic.

    Args:
        query: [b q heads head_dim].
        seen: keys and values of the context.
        mask: as for `attention_map`.

    Returns:
        [b q heads head_dim], in the dtype of the values.

    Example:
        >>> seen = KeysValues(jnp.zeros((1, 2, 1, 4)), jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1))
        >>> attend(jnp.ones((1, 1, 1, 4)), seen)
        Array([[[[2.]]]], dtype=float32)
    """
    length = query.shape[1]
    if length * seen.keys.shape[1] <= LONG_MAP:
        return _mix(attention_map(query, seen.keys, mask), seen.values)

    @jax.checkpoint
    def block(query: Array, mask: Array | None) -> Array:
        return _mix(attention_map(query, seen.keys, mask), seen.values)

    def rows(start: Array | int, count: int) -> Array:
        part = None if mask is None or mask.shape[2] == 1 else jax.lax.dynamic_slice_in_dim(mask, start, count, 2)
        return block(jax.lax.dynamic_slice_in_dim(query, start, count, 1), mask if part is None else part)

    whole, rest = divmod(length, QUERY_ROWS)
    blocks = jax.lax.map(lambda index: rows(index * QUERY_ROWS, QUERY_ROWS), jnp.arange(whole))
    mixed = jnp.moveaxis(blocks, 0, 1).reshape(query.shape[0], whole * QUERY_ROWS, *blocks.shape[3:])
    return jnp.concatenate([mixed, rows(whole * QUERY_ROWS, rest)], axis=1) if rest else mixed


def _mix(
    probabilities: Float[Array, "b heads q k"], values: Float[Array, "b k heads head_dim"]
) -> Float[Array, "b q heads head_dim"]:
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(values.dtype), values)


class Dense(nnx.Module):
    """`x W + b` over the last axis.

    All leading axes are one to the matrix product: XLA's CPU backend computes the kernel's gradient as one plain
    product then, twice as fast as a contraction over two axes.
    """

    def __init__(self, inputs: int, outputs: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(_kernel_init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if use_bias else None

    def __call__(self, inputs: Float[Array, "*shape inputs"]) -> Float[Array, "*shape outputs"]:
        rows = inputs.reshape(-1, inputs.shape[-1]).astype(self.dtype)
        outputs = rows @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            outputs = outputs + self.bias[...].astype(self.dtype)
        return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation with its statistics in float32, and the variance taken about the mean (no cancellation)."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(width, dtype=dtype, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention, `output(softmax(Q K' / sqrt(d)) V)`; cross-attention when a context is given.

    `captured` names what is sown as `Captured` beside the output: "attention", the map [b heads q k]; "queries" and
    "keys" [b heads l head_dim], not yet scaled. `repkit.models.functional` sets it on the layers asked for.

    Args:
        width: features of the tokens; a multiple of `heads`.
        heads: number of heads.
        context_width: features of the context; `width` by default.
        dtype: of the arithmetic; the softmax is float32 always.
        rngs: source of the initial parameters.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, dtype: DTypeLike, rngs: nnx.Rngs):
        context_width = width if context_width is None else context_width
        self.heads = heads
        self.captured: tuple[str, ...] = ()
        self.query = Dense(width, width, dtype=dtype, rngs=rngs)
        self.key = Dense(context_width, width, dtype=dtype, rngs=rngs)
        self.value = Dense(context_width, width, dtype=dtype, rngs=rngs)
        self.output = Dense(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b q width"],
        context: Float[Array, "b k context_width"] | None = None,
        *,
        mask: Bool[Array, "#b #heads #q #k"] | None = None,
    ) -> Float[Array, "b q width"]:
        return self.attend(tokens, self.keys_values(tokens if context is None else context), mask=mask)

    def keys_values(self, context: Float[Array, "b k context_width"]) -> KeysValues:
        """What `attend` looks at; in decoding it is made once for each token of the context."""
        return KeysValues(self._split_heads(self.key(context)), self._split_heads(self.value(context)))

    def attend(
        self,
        tokens: Float[Array, "b q width"],
        seen: KeysValues,
        *,
        mask: Bool[Array, "#b #heads #q #k"] | None = None,
    ) -> Float[Array, "b q width"]:
        """Attention of tokens to the keys and values of a context."""
        query = self._split_heads(self.query(tokens))
        if "queries" in self.captured:
            self.sow(Captured, "queries", query.swapaxes(1, 2))
            self.sow(Captured, "keys", seen.keys.swapaxes(1, 2))
        if "attention" in self.captured:
            probabilities = attention_map(query, seen.keys, mask)
            self.sow(Captured, "attention", probabilities)
            mixed = _mix(probabilities, seen.values)
        else:
            mixed = attend(query, seen, mask)
        return self.output(mixed.reshape(tokens.shape))

    def _split_heads(self, values: Float[Array, "b l width"]) -> Float[Array, "b l heads head_dim"]:
        return values.reshape(*values.shape[:2], self.heads, -1)


class MLP(nnx.Module):
    """Two layers with a GELU (tanh form) between them."""

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.up = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Dense(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "*shape width"]) -> Float[Array, "*shape width"]:
        return self.down(jax.nn.gelu(self.up(tokens), approximate=True))


class Block(nnx.Module):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`, dropout on both branches."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, dropout: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dropout = dropout
        self.attention_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, mlp_width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b l width"],
        mask: Bool[Array, "#b #heads #l #l"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b l width"]:
        attended = self.attention(self.attention_norm(tokens), mask=mask)
        tokens = tokens + dropout(attended, self.dropout, fold(key, 0))
        return tokens + dropout(self.mlp(self.mlp_norm(tokens)), self.dropout, fold(key, 1))
