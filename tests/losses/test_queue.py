"""The contrast with a momentum teacher's queue: limiting cases, and what stands in the queue."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit import losses
from repkit.numerics import normalize

B, D = 6, 4

# These programs run a few times on tiny arrays: compiling is all they cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LABELS = jnp.array([0, 1, 2, 1, 4, 5])


def pairs(seed=0, rows=B):
    """Embeddings of images and texts, and those of the teacher."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return [normalize(jax.random.normal(key, (rows, D))) for key in keys]


@pytest.mark.parametrize("form", [losses.Blocks(), "plain"])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_an_empty_queue_and_hard_targets_are_info_nce_against_the_teacher(labels, form):
    images, texts, teacher_images, teacher_texts = pairs()

    def expected(images, texts, scale):
        of_images = losses.info_nce(
            images, teacher_texts, logit_scale=scale, labels=labels, direction="image_to_text", form="plain"
        )
        of_texts = losses.info_nce(
            teacher_images, texts, logit_scale=scale, labels=labels, direction="text_to_image", form="plain"
        )
        return (of_images + of_texts) / 2

    def ours(images, texts, scale, size):
        return losses.queue_contrastive(
            images,
            texts,
            teacher_images,
            teacher_texts,
            logit_scale=scale,
            memory=losses.init_queue(size, D),
            target_share=0.0,
            labels=labels,
            form=form,
        )[0]

    wanted = jit(jax.value_and_grad(expected, argnums=(0, 1, 2)))(images, texts, 5.0)
    for size in (0, 3):
        got = jit(jax.value_and_grad(functools.partial(ours, size=size), argnums=(0, 1, 2)))(images, texts, 5.0)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), got, wanted)


def test_a_student_that_says_what_its_teacher_says_is_at_rest():
    images, texts, *_ = pairs()
    memory = losses.init_queue(8, D)._replace(
        image_embeds=jnp.tile(images, (2, 1))[:8], text_embeds=jnp.tile(texts, (2, 1))[:8], filled=jnp.ones(8, bool)
    )

    def loss(images, share):
        fixed = pairs()
        return losses.queue_contrastive(
            images, texts, fixed[0], fixed[1], logit_scale=5.0, memory=memory, target_share=share
        )[0]

    gradients = [np.abs(jit(jax.grad(loss))(images, share)).max() for share in (1.0, 0.5)]
    assert gradients[0] < 1e-6 < gradients[1]


def test_the_loss_keeps_its_digits_as_it_tends_to_zero():
    with jax.enable_x64(True):
        rows = np.eye(6)
        queue = losses.init_queue(2, 6, jnp.float64)._replace(
            image_embeds=jnp.asarray(-rows[:2]), text_embeds=jnp.asarray(-rows[:2]), filled=jnp.ones(2, bool)
        )

        def loss(embeds, dtype):
            memory = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float64 else x, queue)
            given = [jnp.asarray(rows, dtype)] * 3
            return losses.queue_contrastive(
                embeds, *given, logit_scale=jnp.asarray(40.0, dtype), memory=memory, target_share=0.0
            )[0]

        exact, low = (
            jax.device_get(jit(jax.value_and_grad(functools.partial(loss, dtype=dtype)))(jnp.asarray(rows, dtype)))
            for dtype in (jnp.float64, jnp.float32)
        )
    assert 0 < exact[0] < 1e-16
    np.testing.assert_allclose(low[0], exact[0], rtol=1e-4)
    np.testing.assert_allclose(low[1], exact[1], rtol=1e-4, atol=1e-20)


@pytest.mark.slow
def test_forward_mode_gives_the_gradient():
    arrays = pairs()

    def loss(scale):
        return losses.queue_contrastive(
            *arrays, logit_scale=scale, memory=losses.init_queue(4, D), target_share=0.4, labels=LABELS
        )[0]

    np.testing.assert_allclose(jit(jax.jacfwd(loss))(3.0), jit(jax.grad(loss))(3.0), rtol=1e-5)


@jit
def enqueue(memory, arrays, labels, where):
    options = {"logit_scale": 1.0, "target_share": 0.4, "labels": labels, "where": where}
    return losses.queue_contrastive(*arrays, memory=memory, **options)[1]


def test_new_pairs_take_the_places_of_the_oldest_and_masked_rows_none():
    size, memory, stored = 8, losses.init_queue(8, D), []
    for step in range(4):
        arrays, labels = pairs(step), LABELS + 10 * step
        where = jax.random.bernoulli(jax.random.key(step), 0.7, (B,))
        memory = enqueue(memory, arrays, labels, where)
        stored += [(arrays[2][row], arrays[3][row], labels[row]) for row in range(B) if where[row]]
        newest = stored[-size:]
        assert int(memory.filled.sum()) == len(newest)
        assert float(memory.diagnostics["filled"]) == pytest.approx(len(newest) / size)
        places = (len(stored) - len(newest) + np.arange(len(newest))) % size
        for kept, values in zip(memory[:3], zip(*newest, strict=True), strict=True):
            np.testing.assert_array_equal(kept[places], np.stack(values))
    assert len(stored) > size


def test_of_more_rows_than_places_the_last_are_kept():
    arrays = pairs()
    memory = enqueue(losses.init_queue(4, D), arrays, LABELS, jnp.ones(B, bool))
    order = np.argsort(memory.labels, kind="stable")
    np.testing.assert_array_equal(np.asarray(memory.labels)[order], np.sort(LABELS[-4:]))
    np.testing.assert_array_equal(memory.image_embeds[(np.arange(2, 6)) % 4], arrays[2][2:])


def test_a_hard_target_is_reported_beside_soft_ones():
    arrays = pairs()

    @jit
    def loss(share):
        return losses.queue_contrastive(*arrays, logit_scale=3.0, memory=losses.init_queue(4, D), target_share=share)

    values = [loss(share) for share in (0.0, 0.7)]
    assert float(values[0][0]) == pytest.approx(float(values[1][1].diagnostics["hard_cross_entropy"]), rel=1e-6)
    assert float(values[0][0]) != pytest.approx(float(values[1][0]), rel=1e-3)
