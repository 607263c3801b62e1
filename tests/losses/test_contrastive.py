"""InfoNCE: closed forms and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit import losses

# Compiled whole: eager calls compile every operation by itself.
info_nce = jax.jit(losses.info_nce, static_argnames=("direction", "reduction"))


@pytest.mark.parametrize("direction", ["symmetric", "image_to_text", "text_to_image"])
def test_orthogonal_pairs(direction):
    embeds = jnp.eye(6)
    loss = info_nce(embeds, embeds, logit_scale=3.0, direction=direction)
    assert loss == pytest.approx(np.log1p(5 * np.exp(-3.0)), rel=1e-6)


def test_directions_are_the_transposes_of_one_another():
    images, texts = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    there = info_nce(images, texts, logit_scale=2.0, direction="image_to_text")
    back = info_nce(texts, images, logit_scale=2.0, direction="text_to_image")
    both = info_nce(images, texts, logit_scale=2.0)
    assert there == back
    assert both == pytest.approx(
        float(there + info_nce(images, texts, logit_scale=2.0, direction="text_to_image")) / 2, rel=1e-6
    )


def test_equal_captions_are_no_negatives():
    """Two images with one caption: the best loss is that of choosing evenly between the two, log 2, and no lower."""
    embeds = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = info_nce(embeds, embeds, logit_scale=50.0, labels=jnp.array([4, 4, 2]), reduction="none")
    np.testing.assert_allclose(loss, [np.log(2), np.log(2), 0], atol=1e-6)


def test_a_row_alone_has_no_loss():
    images, texts = jnp.ones((1, 3)), -jnp.ones((1, 3))
    loss, gradient = jax.value_and_grad(lambda x: info_nce(x, texts, logit_scale=5.0))(images)
    assert loss == 0
    assert not np.any(gradient)


@pytest.mark.parametrize(("dim", "noise"), [(24, 0.3), (32, 0.3), (64, 0.05)])
def test_digits_are_kept_as_the_loss_tends_to_zero(dim, noise):
    """At logit scale 100 with losses of 1e-11 to 1e-22, in float32, against float64."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(256, dim))
    texts = images + noise * rng.normal(size=(256, dim))
    images, texts = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (images, texts))

    products = images.astype(np.float64) @ texts.astype(np.float64).T
    logits, positives = 100 * products, 100 * np.diagonal(products)
    apart = ~np.eye(256, dtype=bool)
    row_sums = np.sum(np.exp(logits - positives[:, None]), axis=1, where=apart)
    column_sums = np.sum(np.exp(logits - positives[None, :]), axis=0, where=apart)
    value = np.mean(np.log1p(row_sums) + np.log1p(column_sums)) / 2
    weights = np.exp(logits - positives[:, None]) / (1 + row_sums)[:, None]
    weights += np.exp(logits - positives[None, :]) / (1 + column_sums)[None, :]
    weights[~apart] = -(row_sums / (1 + row_sums) + column_sums / (1 + column_sums))
    gradient = 100 * weights @ texts.astype(np.float64) / (2 * 256)

    got, got_gradient = jax.device_get(
        jax.jit(jax.value_and_grad(lambda x: info_nce(x, jnp.asarray(texts), logit_scale=100.0)))(images)
    )
    assert value < 1e-11
    assert got == pytest.approx(value, rel=2e-5)
    error = np.linalg.norm(got_gradient.astype(np.float64) - gradient) / np.linalg.norm(gradient)
    assert error < 2e-5
