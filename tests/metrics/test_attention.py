"""Cosines between heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.metrics.attention import head_cosines


def maps(seed: int, *shape: int) -> np.ndarray:
    return np.array(jax.nn.softmax(3 * jax.random.normal(jax.random.key(seed), shape), axis=-1))


def test_cosines_against_a_loop_over_valid_cells():
    student, teacher = maps(0, 4, 2, 5, 3), maps(1, 4, 3, 5, 3)
    query_where = np.array([[True] * 5, [True] * 2 + [False] * 3, [True] * 5, [False] * 5])
    key_where = np.array([[True] * 3, [True, False, True], [True] * 3, [True] * 3])
    where = np.array([True, True, False, True])
    student[2] = np.nan
    expected = np.zeros((3, 2))
    for b in (0, 1, 3):
        cells = np.ix_(query_where[b], key_where[b])
        for i in range(3):
            for j in range(2):
                t, s = teacher[b, i][cells].ravel().astype(float), student[b, j][cells].ravel().astype(float)
                if t.size:
                    expected[i, j] += t @ s / np.sqrt((t @ t) * (s @ s)) / 3
    found = head_cosines(
        jnp.asarray(student),
        jnp.asarray(teacher),
        query_where=jnp.asarray(query_where),
        key_where=jnp.asarray(key_where),
        where=jnp.asarray(where),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_permutation_of_the_same_heads_is_a_permutation_matrix_of_ones():
    teacher = np.eye(4, dtype=np.float32).reshape(1, 4, 2, 2)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(head_cosines(jnp.asarray(teacher[:, order]), jnp.asarray(teacher)), np.eye(4)[:, order])


def test_maps_of_other_lengths_are_refused():
    with pytest.raises(InputError, match=r"head_cosines: .*q"):
        head_cosines(jnp.asarray(maps(0, 1, 2, 5, 3)), jnp.asarray(maps(0, 1, 2, 4, 3)))
