"""Cross-entropy of captions: certainty, smoothing, ids that do not exist; the rest is in test_contract.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repkit import losses

caption_cross_entropy = jax.jit(losses.caption_cross_entropy, static_argnames=("reduction", "label_smoothing"))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IDS = np.random.default_rng(1).integers(0, 7, (3, 4)).astype(np.int32)
MASK = np.array([[True] * 4, [True, True, False, False], [True, False, False, False]])


def test_it_is_the_mean_over_tokens_of_the_usual_cross_entropy():
    logits = draw(3, 4, 7)
    tokens = optax.softmax_cross_entropy_with_integer_labels(logits, IDS)
    rows = caption_cross_entropy(logits, IDS, token_mask=MASK, reduction="none")
    np.testing.assert_allclose(rows, np.sum(tokens * MASK, axis=1) / MASK.sum(axis=1), rtol=1e-5)
    by_token = caption_cross_entropy(logits, IDS, token_mask=MASK, weights=MASK.sum(axis=1).astype(np.float32))
    assert float(by_token) == pytest.approx(float(np.mean(tokens[MASK])), rel=1e-5)


def test_padding_may_hold_anything():
    logits = draw(3, 4, 7)
    holes = np.where(MASK[..., None], logits, np.nan)
    evaluate = jax.value_and_grad(lambda x, ids: caption_cross_entropy(x, ids, token_mask=MASK, label_smoothing=0.1))
    value, gradient = evaluate(logits, IDS)
    holed_value, holed_gradient = evaluate(holes, np.where(MASK, IDS, -100))
    assert value == holed_value
    np.testing.assert_array_equal(gradient, holed_gradient)


@pytest.mark.parametrize("wrong", [-1, 7, -100])
def test_an_id_that_does_not_exist_is_nan(wrong):
    ids = IDS.copy()
    ids[0, 1] = wrong
    rows = caption_cross_entropy(draw(3, 4, 7), ids, reduction="none")
    assert np.isnan(rows).tolist() == [True, False, False]


def test_digits_are_kept_when_the_model_is_certain():
    logits = jnp.array([[[30.0, 0.0, 0.0]]])
    value, gradient = jax.value_and_grad(caption_cross_entropy)(logits, jnp.array([[0]]))
    small = np.exp(-30.0)
    assert float(value) == pytest.approx(2 * small, rel=1e-5)
    np.testing.assert_allclose(gradient[0, 0], [-2 * small, small, small], rtol=1e-5)


def test_smoothing_is_smallest_at_the_smoothed_targets():
    targets = 0.9 * np.eye(7, dtype=np.float32)[IDS] + np.float32(0.1 / 7)
    value, gradient = jax.value_and_grad(lambda x: caption_cross_entropy(x, IDS, label_smoothing=0.1))(np.log(targets))
    entropy = -np.mean(np.sum(targets * np.log(targets), axis=-1))
    assert float(value) == pytest.approx(float(entropy), rel=1e-5)
    np.testing.assert_allclose(gradient, np.zeros_like(targets), atol=1e-7)


@pytest.mark.parametrize("others", [-np.inf, 0.0])
def test_tokens_that_are_ruled_out_leave_value_and_gradient_finite(others):
    logits = jnp.full((1, 1, 4), -jnp.inf).at[0, 0, 2].set(1.0).at[0, 0, 1].set(others)
    value, gradient = jax.value_and_grad(caption_cross_entropy)(logits, jnp.array([[2]]))
    assert float(value) == pytest.approx(float(np.log1p(np.exp(others - 1.0))), rel=1e-6)
    assert np.all(np.isfinite(gradient))
