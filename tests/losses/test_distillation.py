"""Distillation losses in closed form and at their limits; what all losses promise is in test_contract.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit import losses

logit_distillation = jax.jit(losses.logit_distillation, static_argnames="reduction")
hidden_state_distillation = jax.jit(losses.hidden_state_distillation, static_argnames="reduction")
attention_relation_distillation = jax.jit(
    losses.attention_relation_distillation, static_argnames=("relation_heads", "reduction")
)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Logits


def test_a_high_temperature_compares_centred_logits():
    student, teacher = draw(5, 7), draw(5, 7, seed=1)
    centred = (student - student.mean(1, keepdims=True)) - (teacher - teacher.mean(1, keepdims=True))
    loss = logit_distillation(student, teacher, temperature=1000.0)
    assert float(loss) == pytest.approx(np.sum(centred**2) / (2 * 7 * 5), rel=5e-3)


def test_the_gradient_is_the_difference_of_the_distributions():
    student, teacher, tau = draw(4, 7), draw(4, 7, seed=1), 2.5
    gradient = jax.grad(lambda x: logit_distillation(x, teacher, temperature=tau, reduction="sum"))(student)
    expected = tau * (jax.nn.softmax(student / tau) - jax.nn.softmax(teacher / tau))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_digits_are_kept_as_the_student_approaches_the_teacher(distance):
    """To first order of what rounding the logits leaves of their difference."""
    teacher = draw(20, 50)
    student = teacher + np.float32(distance) * draw(20, 50, seed=1)
    p, q = (np.exp(x.astype(np.float64)) for x in (teacher, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    ratio = q / p - 1
    expected = np.mean(np.sum(p * (ratio - np.log1p(ratio)), axis=1))
    loss = float(logit_distillation(student, teacher, temperature=1.0))
    assert loss == pytest.approx(expected, rel=1e-5 + 2e-6 / distance)
    assert logit_distillation(teacher, teacher, temperature=1.0) == 0


def test_adding_a_constant_to_all_logits_changes_nothing():
    student, teacher = draw(5, 7), draw(5, 7, seed=1)
    moved = logit_distillation(student + 8, teacher - 4, temperature=2.0)
    assert float(moved) == pytest.approx(float(logit_distillation(student, teacher, temperature=2.0)), rel=1e-5)


def test_classes_that_both_rule_out_take_no_part():
    student, teacher = draw(5, 7), draw(5, 7, seed=1)
    without = np.full((5, 3), -np.inf, np.float32)
    wide = [np.concatenate([x, without], axis=1) for x in (student, teacher)]
    evaluate = jax.value_and_grad(lambda x, y: losses.logit_distillation(x, y, temperature=2.0))
    value, gradient = evaluate(*map(jnp.asarray, wide))
    expected, expected_gradient = evaluate(jnp.asarray(student), jnp.asarray(teacher))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(gradient[:, :7], expected_gradient, rtol=1e-5, atol=1e-7)
    assert not np.any(gradient[:, 7:])


def test_a_class_that_one_alone_rules_out():
    student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, -jnp.inf]])
    assert float(logit_distillation(student, teacher, temperature=1.0)) == pytest.approx(np.log(2), rel=1e-6)
    assert logit_distillation(teacher, student, temperature=1.0) == np.inf


def test_logits_may_have_any_number_of_token_axes():
    student, teacher = draw(3, 2, 4, 7), draw(3, 2, 4, 7, seed=1)
    mask = np.random.default_rng(2).random((3, 2, 4)) < 0.7
    flat = [x.reshape(3, 8, *x.shape[3:]) for x in (student, teacher, mask)]
    loss = logit_distillation(student, teacher, temperature=2.0, token_mask=mask)
    assert float(loss) == pytest.approx(
        float(logit_distillation(flat[0], flat[1], temperature=2.0, token_mask=flat[2])), rel=1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# Padding


def masked_calls():
    mask = np.array([[True, True, False, False], [True, False, False, True]])
    relation = {"relation_heads": 2}
    return {
        "logit_distillation": (logit_distillation, (2, 4, 5), {"temperature": 2.0}, mask),
        "hidden_state_distillation": (hidden_state_distillation, (2, 4, 5), {}, mask),
        "attention_relation_distillation": (attention_relation_distillation, (2, 2, 4, 3), relation, mask),
    }


@pytest.mark.parametrize("name", masked_calls())
def test_what_padding_holds_does_not_matter(name):
    loss, shape, options, mask = masked_calls()[name]
    arrays = [draw(*shape, seed=seed) for seed in (0, 1)]
    axes = (slice(None), None) if len(shape) == 4 else (slice(None),)
    holes = [np.where(mask[(*axes, Ellipsis, None)], x, np.nan) for x in arrays]

    def evaluate(student, teacher):
        return loss(student, teacher, token_mask=mask, **options)

    value, gradient = jax.value_and_grad(evaluate)(*arrays)
    holed_value, holed_gradient = jax.value_and_grad(evaluate)(*holes)
    assert value == holed_value > 0
    np.testing.assert_array_equal(gradient, holed_gradient)
    assert not np.any(np.where(mask[(*axes, Ellipsis, None)], 0.0, gradient))


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states


def test_a_projection_learns():
    student, teacher, projection = draw(2, 3, 4), draw(2, 3, 5, seed=1), draw(4, 5, seed=2)
    loss, gradient = jax.value_and_grad(lambda w: hidden_state_distillation(student, teacher, projection=w))(projection)
    residual = student @ projection - teacher
    assert float(loss) == pytest.approx(np.mean(residual**2), rel=1e-5)
    expected = 2 * np.einsum("bld,ble->de", student, residual) / residual.size
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_identity_as_projection_changes_nothing():
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    loss = hidden_state_distillation(student, teacher, projection=np.eye(4, dtype=np.float32))
    assert float(loss) == pytest.approx(float(hidden_state_distillation(student, teacher)), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Relations


def test_relations_do_not_depend_on_how_features_are_divided_into_heads():
    student, teacher = draw(2, 4, 5, 3), draw(2, 2, 5, 9, seed=1)
    in_one_head = student.swapaxes(1, 2).reshape(2, 5, 12)[:, None]
    loss = attention_relation_distillation(student, teacher, relation_heads=3)
    assert float(loss) == pytest.approx(
        float(attention_relation_distillation(in_one_head, teacher, relation_heads=3)), rel=1e-5
    )


def test_relations_do_not_see_a_rotation_of_a_heads_features():
    vectors = draw(2, 2, 5, 3)
    rotation = np.linalg.qr(draw(3, 3, seed=1))[0]
    loss = attention_relation_distillation(vectors @ rotation, vectors, relation_heads=2)
    assert 0 <= float(loss) < 1e-9


def test_relations_as_heads_of_attention():
    """With as many relation heads as heads, the relation of a head is the softmax of its own scaled products."""
    student, teacher = draw(2, 2, 5, 3), draw(2, 2, 5, 4, seed=1)

    def relation(x):
        return np.asarray(jax.nn.softmax(np.einsum("bhid,bhjd->bhij", x, x) / np.sqrt(x.shape[-1]), axis=-1))

    p, q = relation(teacher), relation(student)
    expected = np.mean(np.sum(p * np.log(p / q), axis=-1))
    loss = attention_relation_distillation(student, teacher, relation_heads=2)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
