import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repkit.models.layers import (
    Attention,
    Block,
    Captured,
    Dense,
    KeysValues,
    attend,
    attention_map,
    causal_mask,
    dropout,
    padding_mask,
)

RANDOM = np.random.default_rng(0)


def numpy_attention(layer, tokens, context, visible):
    """Multi-head attention in float64, one query of one head at a time; also the map."""
    weights = {
        name: (np.float64(getattr(layer, name).kernel[...]), np.float64(getattr(layer, name).bias[...]))
        for name in ("query", "key", "value", "output")
    }

    def project(name, x):
        kernel, bias = weights[name]
        return np.float64(x) @ kernel + bias

    query, key, value = project("query", tokens), project("key", context), project("value", context)
    rows, queries, width = query.shape
    keys, size = key.shape[1], width // layer.heads
    maps = np.zeros((rows, layer.heads, queries, keys))
    mixed = np.zeros_like(query)
    for row in range(rows):
        for head in range(layer.heads):
            part = slice(head * size, (head + 1) * size)
            for q in range(queries):
                seen = np.flatnonzero(visible[row, q])
                logits = np.array([query[row, q, part] @ key[row, k, part] for k in seen]) / np.sqrt(size)
                probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                maps[row, head, q, seen] = probabilities
                mixed[row, q, part] = probabilities @ value[row, seen, part]
    return project("output", mixed), maps


def captured(layer, *args, **kwargs):
    layer.captured = ("attention",)
    output, sown = nnx.capture(layer, Captured)(*args, **kwargs)
    return output, sown["attention"].get_value()[0]


REAL = np.arange(5) < np.array([5, 2, 3])[:, None]
VISIBLE = {
    "none": (None, np.ones((3, 5, 5), bool)),
    "padding": (padding_mask(jnp.array(REAL)), np.broadcast_to(REAL[:, None], (3, 5, 5))),
    "causal": (causal_mask(5), np.broadcast_to(np.tril(np.ones((5, 5), bool)), (3, 5, 5))),
    "both": (padding_mask(jnp.array(REAL)) & causal_mask(5), REAL[:, None] & np.tril(np.ones((5, 5), bool))),
}


@pytest.mark.parametrize("mask", VISIBLE)
def test_self_attention_agrees_with_float64_loops(mask):
    given, visible = VISIBLE[mask]
    layer = Attention(12, 3, dtype="float32", rngs=nnx.Rngs(0))
    tokens = RANDOM.normal(size=(3, 5, 12)).astype(np.float32) * 3
    output, probabilities = captured(layer, jnp.array(tokens), mask=given)
    expected, expected_map = numpy_attention(layer, tokens, tokens, visible)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    np.testing.assert_allclose(probabilities, expected_map, atol=1e-6)
    assert not np.any(np.asarray(probabilities)[~np.broadcast_to(visible[:, None], probabilities.shape)])


def test_cross_attention_agrees_with_float64_loops():
    layer = Attention(12, 3, context_width=7, dtype="float32", rngs=nnx.Rngs(0))
    tokens, context = RANDOM.normal(size=(3, 2, 12)), RANDOM.normal(size=(3, 5, 7))
    output, probabilities = captured(
        layer, jnp.float32(tokens), jnp.float32(context), mask=padding_mask(jnp.array(REAL))
    )
    visible = np.broadcast_to(REAL[:, None], (3, 2, 5))
    expected, expected_map = numpy_attention(layer, np.float32(tokens), np.float32(context), visible)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    np.testing.assert_allclose(probabilities, expected_map, atol=1e-6)


def test_a_query_that_sees_nothing_gives_finite_values_and_gradients():
    query = jnp.float32(RANDOM.normal(size=(1, 2, 1, 4)))

    def first(query):
        return attention_map(query, query, jnp.zeros((1, 1, 2, 2), bool))[0, 0, 0, 0]

    value, gradient = jax.value_and_grad(first)(query)
    assert value == 0.5
    np.testing.assert_array_equal(gradient, 0)


def test_the_map_of_bfloat16_queries_is_float32():
    query = jnp.array(RANDOM.normal(size=(2, 3, 2, 8)), jnp.bfloat16)
    probabilities = attention_map(query, query)
    exact = attention_map(query.astype(jnp.float32), query.astype(jnp.float32))
    assert probabilities.dtype == jnp.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(probabilities, exact, atol=1e-6)


def test_dense_is_the_affine_map_over_the_last_axis():
    layer = Dense(5, 3, dtype="float32", rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.array([1.0, 2.0, 3.0])
    x = RANDOM.normal(size=(2, 4, 5))
    expected = np.float32(x).astype(np.float64) @ np.float64(layer.kernel[...]) + np.array([1, 2, 3])
    np.testing.assert_allclose(layer(jnp.float32(x)), expected, atol=1e-6)
    assert layer(jnp.zeros((0, 4, 5))).shape == (0, 4, 3)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    values = jnp.full(100_000, 2.0)
    dropped = dropout(values, 0.25, jax.random.key(0))
    zeros = float((dropped == 0).mean())
    assert abs(zeros - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 100_000)
    np.testing.assert_allclose(dropped[dropped != 0], 2.0 / 0.75, rtol=1e-6)
    assert dropout(values.astype(jnp.bfloat16), 0.25, jax.random.key(0)).dtype == jnp.bfloat16


def test_without_a_key_or_rate_dropout_is_the_identity():
    values = jnp.ones(8)
    assert dropout(values, 0.5, None) is values
    assert dropout(values, 0.0, jax.random.key(0)) is values


def test_both_branches_of_a_block_drop_values_independently():
    block = Block(8, 2, 16, dropout=0.5, dtype="float32", rngs=nnx.Rngs(0))
    tokens = jnp.float32(RANDOM.normal(size=(2, 3, 8)))
    # With the output layers at zero and their biases at one, a branch is 2 where kept and 0 where dropped.
    for layer in (block.attention.output, block.mlp.down):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
        layer.bias[...] = jnp.ones_like(layer.bias[...])
    run = nnx.jit(Block.__call__)
    added = np.asarray(run(block, tokens, None, jax.random.key(0)) - tokens)
    np.testing.assert_allclose(np.unique(added.round(4)), [0, 2, 4])
    np.testing.assert_allclose(run(block, tokens, None, None) - tokens, 2, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_float32_whatever_the_compute_dtype(dtype):
    block = Block(8, 2, 16, dropout=0.0, dtype=dtype, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(block))} == {np.dtype("float32")}
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(nnx.state(block)))
    assert block(jnp.zeros((1, 3, 8), dtype), None, None).dtype == dtype


@pytest.mark.parametrize("visible", ["all", "padded", "causal"])
def test_long_maps_are_walked_in_blocks_and_never_held(visible):
    """Rows that are no multiple of a block; value and gradient are those of the whole map."""
    length = 1100
    query, keys, values, weights = (jnp.asarray(RANDOM.normal(size=(2, length, 2, 4)), jnp.float32) for _ in range(4))
    mask = {
        "all": None,
        "padded": padding_mask(jnp.arange(length) < jnp.array([[length], [17]])),
        "causal": causal_mask(length),
    }[visible]

    def whole(query, keys, values):
        return jnp.sum(weights * jnp.einsum("bhqk,bkhd->bqhd", attention_map(query, keys, mask), values))

    def blocks(query, keys, values):
        return jnp.sum(weights * attend(query, KeysValues(keys, values), mask))

    results, programs = {}, {}
    for function in (whole, blocks):
        programs[function] = jax.jit(jax.value_and_grad(function, (0, 1, 2))).lower(query, keys, values).compile()
        results[function] = programs[function](query, keys, values)
    for expected, got in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    one_map = 4 * 2 * 2 * length**2
    memory = {function: program.memory_analysis().temp_size_in_bytes for function, program in programs.items()}
    assert memory[whole] > one_map
    assert memory[blocks] < one_map
