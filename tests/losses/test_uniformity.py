"""Uniformity: closed forms, the walk against the plain form, and what it holds in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repkit import losses
from tests.reference import losses as reference

# These programs run once on tiny arrays: compiling is all they cost.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def unit(seed: int, rows: int, dim: int = 5) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("form", [losses.Blocks(), "plain"])
@pytest.mark.parametrize(
    ("embeds", "expected"), [(np.ones((4, 1)), np.log(8)), (np.eye(4), np.log(2 + 6 * np.exp(-4)))]
)
def test_equal_and_orthogonal_features(form, embeds, expected):
    x = jnp.asarray(embeds, jnp.float32)
    rows = losses.uniformity(x, x, form=form, reduction="none")
    np.testing.assert_allclose(rows, np.full(4, expected), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 6, 8])
def test_blocks_that_divide_the_rows_or_repeat_some(rows):
    with jax.enable_x64(True):
        x, y = unit(0, rows), unit(1, rows)
        weights = np.random.default_rng(2).uniform(0, 2, rows)

        def gradient(form):
            return jax.value_and_grad(lambda *a: losses.uniformity(a[0], a[1], weights=a[2], form=form), (0, 1, 2))

        got, wanted = (quickly(gradient(form))(x, y, weights) for form in (losses.Blocks(size=3), "plain"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), got, wanted)
        expected = reference.uniformity(x, y, weights=weights)[0]
        assert got[0] == pytest.approx(expected, rel=1e-12)


def test_long_vectors_are_at_distance_0_from_themselves():
    x = jnp.asarray(1e4 * unit(0, 6), jnp.float32)
    for form in (losses.Blocks(), "plain"):
        assert losses.uniformity(x, x, form=form) == pytest.approx(np.log(2), rel=1e-6)


def test_plain_form_has_second_derivatives_and_forward_mode():
    with jax.enable_x64(True):
        x, y = unit(0, 5), unit(1, 5)
        direction = np.random.default_rng(3).normal(size=x.shape)
        gradient = jax.grad(lambda x: losses.uniformity(x, y, form="plain"))
        got = quickly(lambda: jax.jvp(gradient, (x,), (direction,))[1])()
        blocked = quickly(jax.grad(lambda x: losses.uniformity(x, y)))
        step = 1e-6
        expected = (blocked(x + step * direction) - blocked(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


def temporary(form, rows: int, dim: int) -> float:
    x = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    compiled = (
        jax.jit(jax.value_and_grad(lambda x, y: losses.uniformity(x, y, form=form), (0, 1))).lower(x, x).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def test_temporary_memory_is_that_of_the_inputs():
    """MiB; two pair matrices of 8192 rows are 512."""
    assert temporary(losses.Blocks(), 8192, 512) < temporary("plain", 8192, 512) / 8
    assert temporary(losses.Blocks(), 32768, 128) < 40


compiled = quickly(
    jax.value_and_grad(lambda x, y, where, weights: losses.uniformity(x, y, where=where, weights=weights), (0, 1, 3))
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    rows=st.sampled_from([1, 7]),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-12, 6),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    mask=st.integers(0, 2**7 - 1),
)
def test_value_and_gradient_are_finite(rows, seed, exponent, dtype, mask):
    rng = np.random.default_rng(seed)
    x, y = (10.0**exponent * rng.normal(size=(2, rows, 4))).astype(dtype)
    where = np.array([mask >> i & 1 for i in range(rows)], bool)
    weights = rng.choice([0.0, 1e-3, 1.0], rows).astype(np.float32)
    assert all(
        np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(compiled(x, y, where, weights))
    )
