"""The losses in JAX as one would write them down: whole pair matrices, whole maps; and optax's.

They share no code with repkit. `benchmarks.torch_peers` holds the same in torch.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def products(anchors: Float[Array, "*b n d"], candidates: Float[Array, "*b m d"]) -> Float[Array, "*b n m"]:
    """Inner products of all rows, accumulated in at least float32."""
    dtype = jnp.promote_types(anchors.dtype, jnp.float32)
    return jnp.matmul(anchors, candidates.mT, preferred_element_type=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of embeddings


def info_nce(image: Float[Array, "b d"], text: Float[Array, "b d"], logit_scale: Float[Array, ""]) -> Float[Array, ""]:
    """Two cross-entropies of one matrix of logits."""
    logits = logit_scale * products(image, text)
    positive = jnp.diagonal(logits)
    both = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return jnp.mean(both / 2 - positive)


def one_way_info_nce(
    anchors: Float[Array, "b d"], candidates: Float[Array, "b d"], logit_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """One cross-entropy of a matrix of logits."""
    logits = logit_scale * products(anchors, candidates)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits))


def optax_cross_entropy(
    image: Float[Array, "b d"], text: Float[Array, "b d"], logit_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """The same with optax's cross-entropy, both ways."""
    logits = logit_scale * products(image, text)
    labels = jnp.arange(len(image))
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.mean(cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def optax_ntxent(
    image: Float[Array, "b d"], text: Float[Array, "b d"], logit_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """optax's loss of its kind. It is another one: every row of both modalities is an anchor against all others."""
    labels = jnp.tile(jnp.arange(len(image)), 2)
    return optax.losses.ntxent(jnp.concatenate([image, text]), labels, temperature=1 / logit_scale)


def sigmoid_contrastive(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
) -> Float[Array, ""]:
    """A matrix of logits and one of labels, 1 for pairs and -1 for the rest."""
    logits = logit_scale * products(image, text) + logit_bias
    labels = 2 * jnp.eye(len(image)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(labels * logits)) / len(image)


def decoupled_contrastive(
    image: Float[Array, "b d"], text: Float[Array, "b d"], logit_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """InfoNCE whose denominators leave the positive out."""
    logits = logit_scale * products(image, text)
    positive = jnp.diagonal(logits)
    negatives = jnp.where(jnp.eye(len(image), dtype=bool), -jnp.inf, logits)
    both = jax.nn.logsumexp(negatives, axis=1) + jax.nn.logsumexp(negatives, axis=0)
    return jnp.mean(both / 2 - positive)


def cyclip(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    *,
    cross_modal_weight: float = 0.25,
    in_modal_weight: float = 0.25,
) -> Float[Array, ""]:
    """CyCLIP's consistency losses: three pair matrices."""
    scores = products(image, text)
    cross_modal = jnp.sum(jnp.square(scores - scores.T))
    in_modal = jnp.sum(jnp.square(products(image, image) - products(text, text)))
    return (cross_modal_weight * cross_modal + in_modal_weight * in_modal) / len(image)


def gram_consistency(
    image: Float[Array, "b d"], text: Float[Array, "b d"], *, cross_modal_weight: float, in_modal_weight: float
) -> Float[Array, ""]:
    """The same by the textbook identities for Gram matrices, which cancel as the texts approach the images."""
    images, texts, mixed = products(image.T, image.T), products(text.T, text.T), products(image.T, text.T)
    cross_modal = 2 * (jnp.sum(images * texts) - jnp.sum(mixed * mixed.T))
    in_modal = jnp.sum(jnp.square(images)) + jnp.sum(jnp.square(texts)) - 2 * jnp.sum(jnp.square(mixed))
    return (cross_modal_weight * cross_modal + in_modal_weight * in_modal) / len(image)


def uniformity(image: Float[Array, "b d"], text: Float[Array, "b d"]) -> Float[Array, ""]:
    """The Gaussian kernels of all pairs within each modality, in both orders and with the diagonal."""

    def kernels(x: Float[Array, "b d"]) -> Float[Array, ""]:
        squares = jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), axis=-1)
        distances = jnp.maximum(squares[:, None] + squares - 2 * products(x, x), 0.0)
        return jnp.sum(jnp.exp(-2 * distances))

    return jnp.log((kernels(image) + kernels(text)) / len(image))


# ---------------------------------------------------------------------------------------------------------------------
# Attention maps

Variant = Literal["mse", "kl"]


def attention_maps(
    student: Float[Array, "b hs q k"],
    teacher: Float[Array, "b ht q k"],
    *,
    variant: Variant,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Attention alignment, with the aligned maps in memory."""
    student, teacher = _flat(student), _flat(teacher)
    unit_student, unit_teacher = _unit(student), _unit(teacher)
    cosines = jnp.einsum("bin,bjn->bij", unit_teacher, unit_student)
    weights = jax.nn.softmax(cosines / temperature, axis=-1)
    if variant == "mse":
        return _squared_distance(unit_teacher, jnp.einsum("bij,bjn->bin", weights, unit_student))
    return _divergence(_shares(teacher), jnp.einsum("bij,bjn->bin", weights, _shares(student)))


def pairwise_attention_maps(
    student: Float[Array, "b hs q k"], teacher: Float[Array, "b ht q k"], *, variant: Variant
) -> Float[Array, ""]:
    """The same with the maps of all head pairs in memory, as the formula is often written down."""
    student, teacher = _flat(student), _flat(teacher)
    unit_student, unit_teacher = _unit(student), _unit(teacher)
    cosines = jnp.sum(unit_teacher[:, :, None] * unit_student[:, None], axis=-1)
    weights = jax.nn.softmax(cosines, axis=-1)[..., None]
    if variant == "mse":
        return _squared_distance(unit_teacher, jnp.sum(weights * unit_student[:, None], axis=2))
    return _divergence(_shares(teacher), jnp.sum(weights * _shares(student)[:, None], axis=2))


def gram_attention_maps(
    student: Float[Array, "b hs q k"], teacher: Float[Array, "b ht q k"], *, temperature: float
) -> Float[Array, ""]:
    """The squared form by the expansion of the square, which cancels as the aligned maps approach the teacher's."""
    student, teacher = _unit(_flat(student)), _unit(_flat(teacher))
    cosines = jnp.einsum("bin,bjn->bij", teacher, student)
    weights = jax.nn.softmax(cosines / temperature, axis=-1)
    mixed = jnp.einsum("bij,bik,bjk->bi", weights, weights, jnp.einsum("bjn,bkn->bjk", student, student))
    return jnp.mean(jnp.sum(1 - 2 * jnp.sum(weights * cosines, axis=-1) + mixed, axis=-1))


def attention_queries_keys(
    student_query: Float[Array, "b hs l d"],
    student_key: Float[Array, "b hs l d"],
    teacher_query: Float[Array, "b ht l d"],
    teacher_key: Float[Array, "b ht l d"],
    *,
    variant: Variant,
) -> Float[Array, ""]:
    """Attention alignment of the maps that queries and keys give, with all maps in memory."""

    def maps(query: Float[Array, "b h l d"], key: Float[Array, "b h l d"]) -> Float[Array, "b h l l"]:
        return jax.nn.softmax(products(query, key) / query.shape[-1] ** 0.5, axis=-1)

    teacher = maps(jax.lax.stop_gradient(teacher_query), jax.lax.stop_gradient(teacher_key))
    return attention_maps(maps(student_query, student_key), teacher, variant=variant)


def _flat(maps: Float[Array, "b h q k"]) -> Float[Array, "b h n"]:
    return maps.reshape(*maps.shape[:2], -1).astype(jnp.promote_types(maps.dtype, jnp.float32))


def _unit(maps: Float[Array, "b h n"]) -> Float[Array, "b h n"]:
    return maps / jnp.linalg.norm(maps, axis=-1, keepdims=True)


def _shares(maps: Float[Array, "b h n"]) -> Float[Array, "b h n"]:
    return maps / jnp.sum(maps, axis=-1, keepdims=True)


def _squared_distance(teacher: Float[Array, "b h n"], aligned: Float[Array, "b h n"]) -> Float[Array, ""]:
    return jnp.mean(jnp.sum(jnp.square(teacher - aligned), axis=(1, 2)))


def _divergence(teacher: Float[Array, "b h n"], aligned: Float[Array, "b h n"]) -> Float[Array, ""]:
    return jnp.mean(jnp.sum(teacher * (jnp.log(teacher) - jnp.log(aligned)), axis=(1, 2)))
