"""Brownian bridge: its identity, its ends, and several points on one path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repkit import losses
from repkit.losses.bridge import SAMPLED_TIMES

brownian_bridge_path = jax.jit(losses.brownian_bridge_path, static_argnames="times")
brownian_bridge = jax.jit(losses.brownian_bridge, static_argnames="reduction")
sampled_bridge = jax.jit(functools.partial(losses.brownian_bridge, time="sampled"), static_argnames="reduction")


def unit(seed: int, *shape: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


IMAGES, TEXTS, VIEWS = unit(0, 7, 5), unit(1, 7, 5), unit(2, 7, 5)


@pytest.mark.parametrize("t", [0.1, 0.25, 0.5, 0.9])
def test_identity_for_unit_vectors(t):
    v, w, z = IMAGES, TEXTS, VIEWS
    towards = t * np.sum(v * z, axis=1) + (1 - t) * np.sum(w * z, axis=1)
    length = np.sqrt(t**2 + (1 - t) ** 2 + 2 * t * (1 - t) * np.sum(v * w, axis=1))
    loss = brownian_bridge(v, w, z, time=t, reduction="none")
    np.testing.assert_allclose(loss, 2 - 2 * towards / length, rtol=1e-5)


def test_the_ends_are_text_at_time_0_and_image_at_time_1():
    for t, end in ((0.0, TEXTS), (1.0, IMAGES)):
        assert brownian_bridge(IMAGES, TEXTS, end, time=t) == pytest.approx(0, abs=1e-12)


def test_times_may_differ_by_row():
    times = np.linspace(0.1, 0.9, 7, dtype=np.float32)
    rows = brownian_bridge(IMAGES, TEXTS, VIEWS, time=jnp.asarray(times), reduction="none")
    for i, t in enumerate(times):
        alone = brownian_bridge(IMAGES[i : i + 1], TEXTS[i : i + 1], VIEWS[i : i + 1], time=float(t))
        assert rows[i] == pytest.approx(float(alone), rel=1e-6)


def test_antipodal_ends_have_no_mean_and_a_finite_gradient():
    image, view = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])

    def loss(image, view):
        return brownian_bridge(image, -jnp.array([[1.0, 0.0]]), view, time=0.5)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(image, view)
    assert value == pytest.approx(1.0)
    np.testing.assert_array_equal(gradients[0], np.zeros((1, 2)))
    np.testing.assert_allclose(gradients[1], 2 * view)


def test_sampled_times_differ_by_row_and_key_and_stay_in_their_interval():
    """With a view at twice the mean the residual is a unit vector, and the loss 1/(2 t (1 - t)) tells the time."""
    same = np.tile(unit(0, 1, 5), (500, 1))
    draws = [
        np.asarray(sampled_bridge(same, same, 2 * same, key=jax.random.key(i), reduction="none")) for i in range(2)
    ]
    assert not np.any(draws[0] == draws[1])
    from_middle = np.sqrt(0.25 - 1 / (2 * draws[0]))
    low, high = SAMPLED_TIMES
    assert np.max(from_middle) <= (high - low) / 2 + 1e-5
    assert np.mean(from_middle) == pytest.approx((high - low) / 4, abs=0.03)


def test_one_point_on_a_path_is_the_bridge_with_its_likelihood():
    path = brownian_bridge_path(IMAGES, TEXTS, VIEWS[:, None], times=(0.3,))
    assert path == pytest.approx(float(brownian_bridge(IMAGES, TEXTS, VIEWS, time=0.3)) / (2 * 0.3 * 0.7), rel=1e-5)


def test_neighbouring_points_are_compared_with_one_another():
    """Two residuals that agree are likelier than two that oppose each other."""
    image, text = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[1.0, 0.0, 0.0]])
    aside = jnp.array([0.0, 0.1, 0.0])
    agreeing = brownian_bridge_path(image, text, jnp.stack([image + aside, image + aside], 1), times=(0.4, 0.6))
    opposing = brownian_bridge_path(image, text, jnp.stack([image + aside, image - aside], 1), times=(0.4, 0.6))
    assert agreeing < opposing / 3


def bridge_at(arrays, time, where, weights):
    return losses.brownian_bridge(*arrays, time=time, where=where, weights=weights)


def bridge_at_sampled_times(arrays, time, where, weights):
    key = jax.random.fold_in(jax.random.key(0), (100 * time).astype(jnp.int32))
    return losses.brownian_bridge(*arrays, time="sampled", key=key, where=where, weights=weights)


def path_of_two_views(arrays, time, where, weights):
    images, texts, views = arrays
    path = jnp.stack([views, time * views], axis=1)
    return losses.brownian_bridge_path(images, texts, path, times=(0.01, 0.5), where=where, weights=weights)


gradients_of = {
    loss: jax.jit(jax.value_and_grad(loss, (0, 1, 3)), compiler_options={"xla_backend_optimization_level": 0})
    for loss in (bridge_at, bridge_at_sampled_times, path_of_two_views)
}


@pytest.mark.slow
@pytest.mark.parametrize("loss", gradients_of)
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    exponent=st.integers(-12, 6),
    opposite=st.booleans(),
    time=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    mask=st.integers(0, 2**5 - 1),
)
def test_value_and_gradient_are_finite(loss, seed, exponent, opposite, time, dtype, mask):
    rng = np.random.default_rng(seed)
    arrays = 10.0**exponent * rng.normal(size=(3, 5, 3))
    if opposite:
        arrays[1] = -arrays[0]
    where = np.array([mask >> i & 1 for i in range(5)], bool)
    weights = rng.choice([0.0, 1e-3, 1.0], 5).astype(np.float32)
    results = jax.device_get(gradients_of[loss](list(arrays.astype(dtype)), np.float32(time), where, weights))
    assert all(np.all(np.isfinite(leaf.astype(np.float32))) for leaf in jax.tree.leaves(results))


def test_temporary_memory_is_less_than_one_input():
    """Value and gradient walk the rows again rather than keep what they computed of them."""
    x = jax.ShapeDtypeStruct((16384, 256), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(losses.brownian_bridge, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
