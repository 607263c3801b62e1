"""Attention map alignment as its formula reads: the plain form, which every transformation of JAX works on."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Divergence: TypeAlias = Literal["mse", "kl"]
AlignmentGradient: TypeAlias = Literal["through", "stopped"]

SMALLEST_SHARE = 1e-30
"""Below this share of a map's mass a student's cell counts as this large in a logarithm, and gets no gradient."""
_SMALLEST_LENGTH = 1e-6
"""A shorter map is empty: so little is left of it that its direction, and the gradient, would be meaningless."""


def counting_cells(
    query_where: Bool[Array, "b q"] | None, key_where: Bool[Array, "b k"] | None
) -> Bool[Array, "b 1 #q #k"] | None:
    """Which cells of a map count, given which queries and keys do; None for all."""
    by_query = None if query_where is None else query_where[:, None, :, None]
    by_key = None if key_where is None else key_where[:, None, None, :]
    if by_query is None or by_key is None:
        return by_key if by_query is None else by_query
    return by_query & by_key


def masked_softmax(logits: Float[Array, "*shape n"], allowed: Bool[Array, "*#shape n"]) -> Float[Array, "*shape n"]:
    """Softmax over the entries of the last axis that are allowed; the others, and rows without any, are 0."""
    logits = jnp.where(allowed, logits, jnp.finfo(logits.dtype).min)
    return jnp.where(allowed, jax.nn.softmax(logits, axis=-1), 0.0)


def has_cells(squares: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Whether a map is not empty, from the sum of its squares."""
    return squares > _SMALLEST_LENGTH**2


def inverse(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`1 / x` of a map's sum; 0 with zero gradient for an empty map, which has no larger sum than this."""
    is_present = x > _SMALLEST_LENGTH
    return jnp.where(is_present, 1.0 / jnp.where(is_present, x, 1.0), 0.0)


def inverse_root(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`1 / sqrt(x)` of the sum of a map's squares; 0 with zero gradient for an empty map."""
    is_present = has_cells(x)
    return jnp.where(is_present, jax.lax.rsqrt(jnp.where(is_present, x, 1.0)), 0.0)


def unit_maps(maps: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
    """Maps of Euclidean length 1; an empty one stays 0."""
    return maps * inverse_root(jnp.sum(jnp.square(maps), axis=-1, keepdims=True))


def map_shares(maps: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
    """Maps of sum 1; an empty one stays 0."""
    return maps * inverse(jnp.sum(maps, axis=-1, keepdims=True))


def normalized(maps: Float[Array, "*shape n"], kind: Divergence) -> Float[Array, "*shape n"]:
    """Maps in the norm that the divergence compares them in."""
    return unit_maps(maps) if kind == "mse" else map_shares(maps)


def head_weights(
    cosines: Float[Array, "*shape ht hs"],
    teacher_squares: Float[Array, "*shape ht"],
    student_squares: Float[Array, "*shape hs"],
    temperature: Float[Array, "*#shape 1 1"],
) -> Float[Array, "*shape ht hs"]:
    """a_ij, the softmax over student heads of the cosines; empty heads take no part."""
    allowed = has_cells(teacher_squares)[..., :, None] & has_cells(student_squares)[..., None, :]
    return masked_softmax(cosines / temperature, allowed)


def alignment(
    student: Float[Array, "*shape hs n"], teacher: Float[Array, "*shape ht n"], temperature: Float[Array, "*#shape 1 1"]
) -> Float[Array, "*shape ht hs"]:
    """a_ij of flattened maps."""
    cosines = jnp.matmul(unit_maps(teacher), unit_maps(student).mT, precision=jax.lax.Precision.HIGHEST)
    teacher_squares, student_squares = (jnp.sum(jnp.square(maps), axis=-1) for maps in (teacher, student))
    return head_weights(cosines, teacher_squares, student_squares, temperature)


def head_divergences(
    student: Float[Array, "*shape h n"], teacher: Float[Array, "*shape h n"], kind: Divergence
) -> Float[Array, "*shape h"]:
    """Squared distance or KL(teacher || student) of normalised maps; 0 for a teacher's map that is empty."""
    if kind == "mse":
        cells = jnp.square(student - teacher)
        return jnp.where(jnp.any(teacher != 0, axis=-1), jnp.sum(cells, axis=-1), 0.0)
    log_ratio = jnp.log(jnp.maximum(teacher, SMALLEST_SHARE)) - jnp.log(jnp.maximum(student, SMALLEST_SHARE))
    return jnp.sum(teacher * log_ratio, axis=-1)


def aligned_divergence(
    student: Float[Array, "*shape hs n"],
    teacher: Float[Array, "*shape ht n"],
    *,
    kind: Divergence,
    temperature: Float[Array, "*#shape 1 1"],
    alignment_gradient: AlignmentGradient,
) -> Float[Array, "*shape"]:
    """Divergence of each teacher head from the student heads' mixture under its weights, summed over teacher heads."""
    weights = alignment(student, teacher, temperature)
    if alignment_gradient == "stopped":
        weights = jax.lax.stop_gradient(weights)
    mixture = jnp.matmul(weights, normalized(student, kind), precision=jax.lax.Precision.HIGHEST)
    # A teacher head without a student head to learn from is left out.
    has_student = jnp.any(weights > 0, axis=-1, keepdims=True)
    return jnp.sum(head_divergences(mixture, jnp.where(has_student, normalized(teacher, kind), 0.0), kind), axis=-1)


def attention_maps(
    query: Float[Array, "b h q d"], key: Float[Array, "b h k d"], allowed: Bool[Array, "b 1 #q #k"] | None
) -> Float[Array, "b h q k"]:
    """Softmax over the keys of the inner products with the queries."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.softmax(logits, axis=-1) if allowed is None else masked_softmax(logits, allowed)


def flatten_cells(maps: Float[Array, "*b h q k"]) -> Float[Array, "*b h n"]:
    """One vector per head."""
    return maps.reshape(*maps.shape[:-2], -1)


def token_rows(maps: Float[Array, "*b h q k"]) -> Float[Array, "*b q h k"]:
    """The heads' rows of each query."""
    return jnp.swapaxes(maps, -3, -2)
