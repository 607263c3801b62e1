"""Reductions, norms and log-space sums at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.numerics import (
    WeightedMean,
    at_least_float32,
    log_interpolate,
    mask_rows,
    masked_logsumexp,
    normalize,
    reduce_loss,
    safe_norm,
)


def test_merging_means_is_the_mean_of_all():
    x = jnp.arange(10.0)
    where = x != 3
    weights = jnp.linspace(0.0, 2.0, 10)
    whole = WeightedMean.of(x, where, weights)
    parts = [WeightedMean.of(x[part], where[part], weights[part]) for part in (slice(0, 2), slice(2, 7), slice(7, 10))]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.value() == pytest.approx(float(whole.value()), rel=1e-6)
    assert whole.value() == pytest.approx(np.average(np.asarray(x), weights=np.where(where, weights, 0)), rel=1e-6)


def test_a_mean_of_nothing_is_zero_with_zero_gradient():
    def mean(x):
        return WeightedMean.of(x, jnp.zeros(3, bool)).value()

    value, gradient = jax.value_and_grad(mean)(jnp.array([1.0, jnp.nan, jnp.inf]))
    assert value == 0
    assert not np.any(gradient)


def test_means_count_booleans_and_integers():
    assert WeightedMean.of(jnp.array([True, False])).value() == 0.5
    assert WeightedMean.of(jnp.array([1, 2])).value() == 1.5


def test_mean_over_devices_divides_sums_and_not_means():
    """Device i holds i valid rows of value i: 140/28 = 5, while the mean of the devices' means is 3.5."""
    values = jnp.tile(jnp.arange(8.0)[:, None], (1, 8))
    where = jnp.arange(8)[None, :] < jnp.arange(8)[:, None]

    def mean(values, where):
        return reduce_loss(values, where=where, weights=None, axis_name="i", reduction="mean")

    np.testing.assert_allclose(jax.pmap(mean, axis_name="i")(values, where), np.full(8, 5.0), rtol=1e-6)
    with jax.enable_x64(False):
        np.testing.assert_allclose(jax.vmap(mean, axis_name="i")(values, where), np.full(8, 5.0), rtol=1e-6)


def test_reduction_none_masks_and_does_not_weigh():
    options = {"where": jnp.array([True, False, True]), "weights": jnp.array([2.0, 1.0, 0.0]), "axis_name": None}
    rows = reduce_loss(jnp.array([1.0, jnp.nan, 3.0]), **options, reduction="none")
    np.testing.assert_array_equal(rows, [1.0, 0.0, 3.0])
    assert reduce_loss(rows, **options, reduction="sum") == 2.0


def test_unknown_reduction():
    with pytest.raises(InputError, match="unknown reduction 'average'"):
        reduce_loss(jnp.ones(2), where=None, weights=None, axis_name=None, reduction="average")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(jnp.bfloat16, "float32"), (jnp.float16, "float32"), (jnp.int32, "float32"), (jnp.bool_, "float32")],
)
def test_at_least_float32(dtype, expected):
    assert at_least_float32(jnp.ones(2, dtype)).dtype == expected
    with jax.enable_x64(True):
        assert at_least_float32(jnp.ones(2, jnp.float64)).dtype == "float64"


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e30])
def test_norms_neither_overflow_nor_underflow(size):
    x = size * jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(safe_norm(x), [5 * size], rtol=1e-6)
    np.testing.assert_allclose(normalize(x), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(safe_norm(x)))(x), [[0.6, 0.8]], rtol=1e-6)


def test_normalize_differentiates_across_the_vector():
    x, direction = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 0.1, -0.7])
    gradient = jax.grad(lambda x: normalize(x) @ direction)(x)
    unit = x / np.linalg.norm(x)
    np.testing.assert_allclose(gradient, (direction - unit * (unit @ direction)) / np.linalg.norm(x), rtol=1e-5)


@pytest.mark.parametrize("function", [safe_norm, normalize])
def test_a_zero_vector_has_a_zero_gradient(function):
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(function(x)))(jnp.zeros((1, 3)))
    assert value == 0
    assert not np.any(gradient)


def test_logsumexp_of_nothing_has_a_zero_gradient():
    x, where = jnp.array([[1.0, jnp.nan], [500.0, 501.0]]), jnp.array([[False, False], [True, True]])

    def total(x):
        sums = masked_logsumexp(x, where)
        return jnp.sum(jnp.where(jnp.isfinite(sums), sums, 0.0)), sums

    gradient, sums = jax.grad(total, has_aux=True)(x)
    np.testing.assert_allclose(sums, [-np.inf, 501 + np.log1p(np.exp(-1))], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0], [1 / (1 + np.e), np.e / (1 + np.e)]], rtol=1e-5)


def test_interpolation_in_log_space():
    assert log_interpolate(jnp.float32(-500.0), jnp.float32(-500.0), 0.3) == pytest.approx(-500.0)
    assert log_interpolate(jnp.float32(3.0), jnp.float32(7.0), 1.0) == 7.0
    assert log_interpolate(jnp.float32(3.0), jnp.float32(7.0), 0.0) == 3.0


def test_masking_rows_of_any_rank():
    x = jnp.full((2, 3, 4), jnp.nan).at[1].set(1.0)
    gradient = jax.grad(lambda x: jnp.sum(mask_rows(x, jnp.array([False, True])) ** 2))(x)
    np.testing.assert_array_equal(gradient[0], np.zeros((3, 4)))
    np.testing.assert_array_equal(gradient[1], np.full((3, 4), 2.0))
