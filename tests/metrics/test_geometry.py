"""Geometry of embeddings against float64 loops and limiting cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.metrics import alignment, effective_rank, modality_gap, uniformity


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 11, 5)) + 0.3
    return x / np.linalg.norm(x, axis=2, keepdims=True)


WHERE = np.array([True] * 7 + [False, True, False, True])


def poisoned(rows):
    return jnp.asarray(np.where(WHERE[:, None], rows, np.nan), jnp.float32)


def test_modality_gap_equals_the_loop(points):
    image, text = points
    centre = [np.mean([row for row, valid in zip(side, WHERE, strict=True) if valid], axis=0) for side in points]
    found = modality_gap(poisoned(image), poisoned(text), image_where=jnp.asarray(WHERE), text_where=jnp.asarray(WHERE))
    assert float(found) == pytest.approx(math.dist(*centre), rel=1e-5)
    assert float(modality_gap(jnp.asarray(image), jnp.asarray(image[::-1].copy()))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_alignment_equals_the_loop(points, exponent):
    pairs = [(a, b) for a, b, valid in zip(*points, WHERE, strict=True) if valid]
    expected = np.mean([math.dist(a, b) ** exponent for a, b in pairs])
    found = alignment(*map(poisoned, points), exponent=exponent, where=jnp.asarray(WHERE))
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("block", [1, 3, 11, 100])
def test_uniformity_equals_the_loop(points, block):
    rows = points[0][WHERE]
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    expected = math.log(np.mean([math.exp(-3.0 * math.dist(rows[i], rows[j]) ** 2) for i, j in pairs]))
    with jax.numpy_rank_promotion("raise"):
        found = uniformity(poisoned(points[0]), scale=3.0, where=jnp.asarray(WHERE), block=block)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_uniformity_of_one_place_is_zero_and_of_one_point_undefined():
    assert float(uniformity(jnp.ones((6, 3)) / math.sqrt(3))) == pytest.approx(0.0, abs=1e-5)
    assert math.isnan(float(uniformity(jnp.ones((1, 3)))))


def test_uniformity_does_not_underflow_for_distant_points():
    # exp(-2 * 400) is 0 in float32.
    assert float(uniformity(jnp.array([[10.0], [-10.0]]))) == pytest.approx(-800.0)


def test_effective_rank_equals_the_formula(points):
    singular = np.linalg.svd(points[0][WHERE], compute_uv=False)
    share = singular / singular.sum()
    expected = math.exp(-sum(p * math.log(p) for p in share))
    assert float(effective_rank(poisoned(points[0]), where=jnp.asarray(WHERE))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "rank"),
    [(np.eye(6), 6.0), (np.eye(6)[[0, 1, 1, 0]], 2.0), (np.ones((5, 3)), 1.0), (np.zeros((4, 3)), 1.0)],
)
def test_effective_rank_of_known_matrices(rows, rank):
    assert float(effective_rank(jnp.asarray(rows, jnp.float32))) == pytest.approx(rank, rel=1e-3)


def test_wrong_shapes_are_named():
    with pytest.raises(InputError, match=r"image_embeds \(2, 3\) and text_embeds \(2, 4\)"):
        modality_gap(jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(InputError, match=r"first \(2, 3\) and second \(3, 3\)"):
        alignment(jnp.ones((2, 3)), jnp.ones((3, 3)))
    with pytest.raises(InputError, match=r"uniformity: expected embeds \[b d\], got embeds \(3,\)"):
        uniformity(jnp.ones(3))
    with pytest.raises(InputError, match=r"effective_rank: expected embeds \[b d\]"):
        effective_rank(jnp.ones(3))
    with pytest.raises(InputError, match="block of at least 1"):
        uniformity(jnp.ones((2, 3)), block=0)
