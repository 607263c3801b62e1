"""Attention map alignment as its formula reads: the plain form, which every transformation of JAX can work on."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Divergence: TypeAlias = Literal["mse", "kl"]
AlignmentGradient: TypeAlias = Literal["through", "stopped"]

SMALLEST_SHARE = 1e-30
"""Below this share of a map's mass a student's cell counts as this large in a logarithm, and gets no gradient."""


def masked_softmax(logits: Float[Array, "*shape n"], allowed: Bool[Array, "*shape n"]) -> Float[Array, "*shape n"]:
    """Softmax over the entries of the last axis that are allowed; the others, and rows without any, are 0."""
    logits = jnp.where(allowed, logits, jnp.finfo(logits.dtype).min)
    return jnp.where(allowed, jax.nn.softmax(logits, axis=-1), 0.0)


def inverse(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`1 / x`; 0 with zero gradient where x is 0."""
    return jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)


def inverse_root(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`1 / sqrt(x)`; 0 with zero gradient where x is 0."""
    return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def unit_maps(maps: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
    """Maps of Euclidean length 1; an empty one stays 0."""
    return maps * inverse_root(jnp.sum(jnp.square(maps), axis=-1, keepdims=True))


def map_shares(maps: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
    """Maps of sum 1; an empty one stays 0."""
    return maps * inverse(jnp.sum(maps, axis=-1, keepdims=True))


def head_weights(
    cosines: Float[Array, "*shape ht hs"],
    teacher_squares: Float[Array, "*shape ht"],
    student_squares: Float[Array, "*shape hs"],
    temperature: Float[Array, "*#shape 1 1"],
) -> Float[Array, "*shape ht hs"]:
    """a_ij, the softmax over student heads of the cosines; empty heads, whose square is 0, take no part."""
    allowed = (teacher_squares > 0)[..., :, None] & (student_squares > 0)[..., None, :]
    return masked_softmax(cosines / temperature, allowed)


def alignment(
    student: Float[Array, "*shape hs n"], teacher: Float[Array, "*shape ht n"], temperature: Float[Array, "*#shape 1 1"]
) -> Float[Array, "*shape ht hs"]:
    """a_ij of flattened maps."""
    cosines = jnp.matmul(unit_maps(teacher), unit_maps(student).mT, precision=jax.lax.Precision.HIGHEST)
    squares = (jnp.sum(jnp.square(maps), axis=-1) for maps in (teacher, student))
    return head_weights(cosines, *squares, temperature)


def divergence(
    student: Float[Array, "*shape h n"], teacher: Float[Array, "*shape h n"], kind: Divergence
) -> Float[Array, "*shape"]:
    """Squared distance or KL(teacher || student) of normalised maps, summed over heads."""
    match kind:
        case "mse":
            cells = jnp.square(student - teacher)
        case "kl":
            log_ratio = jnp.log(jnp.maximum(teacher, SMALLEST_SHARE)) - jnp.log(jnp.maximum(student, SMALLEST_SHARE))
            cells = teacher * log_ratio
    return jnp.sum(cells, axis=(-2, -1))


def normalized(maps: Float[Array, "*shape h n"], kind: Divergence) -> Float[Array, "*shape h n"]:
    """Maps in the norm that the divergence compares them in."""
    return unit_maps(maps) if kind == "mse" else map_shares(maps)


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
    return divergence(mixture, jnp.where(has_student, normalized(teacher, kind), 0.0), kind)


def flatten_cells(maps: Float[Array, "*b h q k"]) -> Float[Array, "*b h n"]:
    """One vector per head."""
    return maps.reshape(*maps.shape[:-2], -1)


def token_rows(maps: Float[Array, "*b h q k"]) -> Float[Array, "*b q h k"]:
    """The heads' rows of each query."""
    return jnp.swapaxes(maps, -3, -2)
