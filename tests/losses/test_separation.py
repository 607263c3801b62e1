"""Feature separation: each part alone, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repkit import losses

feature_separation = jax.jit(losses.feature_separation, static_argnames="reduction")
uniformity = jax.jit(losses.uniformity)
info_nce = jax.jit(losses.info_nce, static_argnames="direction")


def parts(**weights):
    none = {"orthogonality_weight": 0.0, "contrastive_weight": 0.0, "uniformity_weight": 0.0}
    return none | weights


def test_orthogonality_is_the_mean_squared_product_of_both_modalities():
    shared, own = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
    loss = feature_separation(shared, shared, own, own, own, own, logit_scale=1.0, **parts(orthogonality_weight=1.0))
    assert loss == pytest.approx((0 + 2 * 0.36) / 2, rel=1e-6)


def test_contrast_is_info_nce_towards_the_augmented_views():
    x, y, x_view, y_view = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    loss = feature_separation(x, y, x, y, x_view, y_view, logit_scale=2.0, **parts(contrastive_weight=1.0))
    expected = info_nce(x, x_view, logit_scale=2.0, direction="image_to_text")
    expected += info_nce(y, y_view, logit_scale=2.0, direction="image_to_text")
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_uniformity_is_the_loss_of_that_name():
    x, y = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    rows = feature_separation(x, x, x, y, x, y, logit_scale=1.0, reduction="none", **parts(uniformity_weight=1.0))
    np.testing.assert_allclose(rows, np.full(5, uniformity(x, y)), rtol=1e-6)


def test_a_part_without_weight_takes_no_pair_matrix():
    x = jax.ShapeDtypeStruct((4096, 8), jnp.float32)

    def orthogonality(*arrays):
        return losses.feature_separation(
            *arrays, logit_scale=1.0, contrastive_weight=0, uniformity_weight=0.0, form="plain"
        )

    compiled = jax.jit(jax.value_and_grad(orthogonality, range(4))).lower(*[x] * 6).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


finite = jax.jit(
    jax.value_and_grad(
        lambda arrays, scale, where, weights: losses.feature_separation(
            *arrays, logit_scale=scale, where=where, weights=weights
        ),
        (0, 1, 3),
    ),
    compiler_options={"xla_backend_optimization_level": 0},
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    exponent=st.integers(-6, 3),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    mask=st.integers(0, 2**5 - 1),
)
def test_value_and_gradient_are_finite(seed, exponent, scale, dtype, mask):
    rng = np.random.default_rng(seed)
    arrays = list((10.0**exponent * rng.normal(size=(6, 5, 3))).astype(dtype))
    where = np.array([mask >> i & 1 for i in range(5)], bool)
    weights = rng.choice([0.0, 1e-3, 1.0], 5).astype(np.float32)
    results = jax.device_get(finite(arrays, np.float32(scale), where, weights))
    assert all(np.all(np.isfinite(leaf.astype(np.float32))) for leaf in jax.tree.leaves(results))
