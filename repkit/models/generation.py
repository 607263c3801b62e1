"""Beam search, of which greedy decoding is the case of one beam, as one program with a cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from repkit.checks import InputError, require_range
from repkit.models.functional import Batch, Params, require_in_batch

Cache = TypeVar("Cache")
"""Arrays [b beams ...]: what a model keeps of each hypothesis."""

Step = Callable[
    [Int32[Array, "b beams"], Int[Array, ""], Cache],
    tuple[Float[Array, "b beams v"], Cache],
]
"""From the newest token of each hypothesis and the number of tokens before it to the logits of the next token."""


class Generated(NamedTuple):
    """The sequences found.

    Attributes:
        token_ids: [b max_length], the end token included where there is one, padding behind it.
        scores: [b] float32, `log p(sequence) / length ** length_penalty`.
    """

    token_ids: Int32[Array, "b max_length"]
    scores: Float[Array, " b"]


class _Search(NamedTuple):
    """Where a search stands: the unfinished hypotheses, and the best finished one of each row.

    Attributes:
        length: tokens of an unfinished hypothesis, the begin token not counted.
        token_ids: the unfinished hypotheses, the begin token first.
        log_probs: of the unfinished hypotheses, falling; -inf where there is none.
        cache: what the model keeps of them.
        best: the best finished hypothesis, its score -inf where there is none.
    """

    length: Int32[Array, ""]
    token_ids: Int32[Array, "b beams max_length+1"]
    log_probs: Float[Array, "b beams"]
    cache: Any
    best: Generated


def beam_search(
    step: Step[Cache],
    cache: Cache,
    *,
    rows: int,
    beams: int,
    max_length: int,
    begin_id: int,
    end_id: int,
    pad_id: int,
    length_penalty: float | Float[Array, ""] = 0.0,
) -> Generated:
    """The most probable sequences, each built token by token from the `beams` best beginnings.

    A sequence ends with the end token, or without one at `max_length`; it never holds the begin or the padding token
    [ours]. Its score is `log p / length ** length_penalty`, where the length counts the end token. An end counts if
    it is among the `beams` best continuations of a row; it leaves its place to the next best. A row is done when no
    unfinished hypothesis can still win, whatever follows, so with enough beams for all sequences the best one is found;
    the loop ends when all rows are done. With one beam this is greedy decoding, which is done at its first end. Among
    equals the first is taken: hypotheses in their order, then token ids.

    Args:
        step: `step(token_ids, position, cache) -> (logits, cache)` for the newest token of each hypothesis.
        cache: its cache, empty; arrays [b beams ...].
        rows: b.
        beams: hypotheses kept for each row, at least 1.
        max_length: most tokens of a sequence, the end token included.
        begin_id: the token before the first.
        end_id: the token that ends a sequence.
        pad_id: the token behind it; may be the end token.
        length_penalty: >= 0; 0 looks for the most probable sequence, 1 for the best mean log-probability of a token.

    Returns:
        The best sequence of each row.

    Raises:
        InputError: for a value outside these ranges.

    Example:
        >>> logits = jnp.log(jnp.array([0.0, 0.0, 0.3, 0.7]))  # of pad, begin, end and one word, whatever came before
        >>> def step(token_ids, position, cache):
        ...     return jnp.broadcast_to(logits, (*token_ids.shape, 4)), cache
        >>> ids = dict(begin_id=1, end_id=2, pad_id=0)
        >>> print(beam_search(step, (), rows=1, beams=1, max_length=4, **ids).token_ids)
        [[3 3 3 3]]
        >>> print(beam_search(step, (), rows=1, beams=3, max_length=4, **ids).token_ids)
        [[2 0 0 0]]
    """
    for name, value in (("beams", beams), ("max_length", max_length)):
        require_range("beam_search", name, value, at_least=1)
    require_range("beam_search", "length_penalty", length_penalty, at_least=0)
    if begin_id == end_id:
        raise InputError(f"begin_id and end_id must differ, got {begin_id} for both")
    never = jnp.array([token for token in (begin_id, pad_id) if token != end_id])

    def score(log_probs: Float[Array, "*shape"], length: Int[Array, ""] | int) -> Float[Array, "*shape"]:
        return log_probs / jnp.maximum(length, 1) ** jnp.asarray(length_penalty, jnp.float32)

    def done(search: _Search) -> Bool[Array, " b"]:
        # log p only falls, and weighs least at the greatest length.
        greatest = search.length if beams == 1 else max_length
        return search.best.scores >= score(search.log_probs[:, 0], greatest)

    def advance(search: _Search) -> _Search:
        newest = jax.lax.dynamic_index_in_dim(search.token_ids, search.length, axis=2, keepdims=False)
        logits, cache = step(newest, search.length, search.cache)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).at[..., never].set(-jnp.inf)
        # An end for each beam at most: among twice as many continuations are enough that do not end.
        totals = (search.log_probs[..., None] + log_probs).reshape(rows, -1)
        totals, places = jax.lax.top_k(totals, 2 * beams)
        parents, tokens = jnp.divmod(places.astype(jnp.int32), logits.shape[-1])
        length = search.length + 1
        token_ids = _take(search.token_ids, parents)
        token_ids = jax.lax.dynamic_update_slice_in_dim(token_ids, tokens[..., None], length, axis=2)
        ends = tokens == end_id

        finished = jnp.where(ends & (jnp.arange(2 * beams) < beams), score(totals, length), -jnp.inf)
        best = _better(search.best, finished, token_ids, may=~done(search))
        log_probs, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, totals), beams)
        if beams > 1:
            cache = _take(cache, _take(parents, kept))
        return _Search(length, _take(token_ids, kept), log_probs, cache, best)

    start = _Search(
        length=jnp.zeros((), jnp.int32),
        token_ids=jnp.full((rows, beams, max_length + 1), pad_id, jnp.int32).at[..., 0].set(begin_id),
        log_probs=jnp.full((rows, beams), -jnp.inf, jnp.float32).at[:, 0].set(0.0),
        cache=cache,
        best=Generated(jnp.full((rows, max_length), pad_id, jnp.int32), jnp.full((rows,), -jnp.inf, jnp.float32)),
    )
    search = jax.lax.while_loop(lambda s: (s.length < max_length) & ~done(s).all(), advance, start)
    return _better(search.best, score(search.log_probs, max_length), search.token_ids, may=~done(search))


class Generator(Protocol):
    """A module that generates sequences."""

    def generate(self, batch: Batch, *, beams: int, max_length: int, length_penalty: Array) -> Generated: ...


def make_generate(
    restore: Callable[[Params], Generator], *, source: Sequence[str], longest: int
) -> Callable[..., Generated]:
    """`generate(params, batch, *, beams=1, max_length=None, length_penalty=0.0)` of a module, as one jitted program.

    Args:
        restore: from parameters to the module.
        source: the arrays of a batch that it reads.
        longest: most tokens of a sequence, which `max_length` is at most, and by default.
    """

    @functools.partial(jax.jit, static_argnames=("beams", "max_length"))
    def search(params: Params, batch: Batch, length_penalty: Array, *, beams: int, max_length: int) -> Generated:
        return restore(params).generate(batch, beams=beams, max_length=max_length, length_penalty=length_penalty)

    def generate(
        params: Params, batch: Batch, *, beams: int = 1, max_length: int | None = None, length_penalty: float = 0.0
    ) -> Generated:
        max_length = longest if max_length is None else max_length
        require_range("generate", "beams", beams, at_least=1)
        require_range("generate", "max_length", max_length, at_least=1, at_most=longest)
        require_range("generate", "length_penalty", length_penalty, at_least=0)
        require_in_batch(batch, source)
        arrays = {name: batch[name] for name in source}
        return search(params, arrays, jnp.float32(length_penalty), beams=beams, max_length=max_length)

    return generate


def _better(
    best: Generated,
    scores: Float[Array, "b hypotheses"],
    token_ids: Int32[Array, "b hypotheses max_length+1"],
    *,
    may: Bool[Array, " b"],
) -> Generated:
    """The best of these and the best so far, in the rows that may change."""
    first = jnp.argmax(scores, axis=1)[:, None]
    challenger = Generated(_take(token_ids, first)[:, 0, 1:], jnp.take_along_axis(scores, first, axis=1)[:, 0])
    wins = may & (challenger.scores > best.scores)
    return Generated(
        jnp.where(wins[:, None], challenger.token_ids, best.token_ids), jnp.where(wins, challenger.scores, best.scores)
    )


def _take(tree: Cache, index: Int32[Array, "b taken"]) -> Cache:
    """For each row the hypotheses at these places, in a tree of arrays [b beams ...]."""
    return jax.tree.map(lambda values: jax.vmap(lambda row, places: row[places])(values, index), tree)
