"""Geometric consistency: what it is blind to, and the identity with D x D matrices."""

import jax
import numpy as np
import pytest

from repkit import losses

geometric_consistency = jax.jit(losses.geometric_consistency)


def embeds(seed: int, rows: int = 9, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim))


def rotation(dim: int = 4) -> np.ndarray:
    return np.linalg.qr(embeds(7, dim, dim))[0]


def test_equal_modalities_and_views_are_consistent():
    x = embeds(0)
    assert geometric_consistency(x, x, x, x) == 0


def test_a_rotation_of_everything_changes_nothing():
    arrays = [embeds(seed) for seed in range(4)]
    with jax.enable_x64(True):
        before = geometric_consistency(*arrays)
        after = geometric_consistency(*(x @ rotation() for x in arrays))
        assert after == pytest.approx(float(before), rel=1e-12)


def test_a_rotation_of_one_modality_keeps_the_geometry_within_it():
    x = embeds(0)
    with jax.enable_x64(True):
        assert geometric_consistency(x, x @ rotation(), cross_modal_weight=0.0) == pytest.approx(0, abs=1e-20)
        assert geometric_consistency(x, x @ rotation(), in_modal_weight=0.0) > 1


def test_with_equal_weights_it_is_an_inner_product_of_two_small_matrices():
    """|V + T|'|V + T| with |V - T|'|V - T|, D x D each."""
    v, t = embeds(0), embeds(1)
    plus, minus = (v + t).T @ (v + t), (v - t).T @ (v - t)
    with jax.enable_x64(True):
        assert geometric_consistency(v, t) == pytest.approx(np.sum(plus * minus) / len(v), rel=1e-12)
