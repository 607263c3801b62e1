"""Feature separation: each part alone, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit import losses

feature_separation = jax.jit(losses.feature_separation, static_argnames="reduction")
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


@pytest.mark.parametrize(
    ("embeds", "expected"), [(np.ones((4, 1)), np.log(8)), (np.eye(4), np.log(2 + 6 * np.exp(-4)))]
)
def test_uniformity_of_equal_and_of_orthogonal_features(embeds, expected):
    x = jnp.asarray(embeds, jnp.float32)
    rows = feature_separation(x, x, x, x, x, x, logit_scale=1.0, reduction="none", **parts(uniformity_weight=1.0))
    np.testing.assert_allclose(rows, np.full(4, expected), rtol=1e-6)
