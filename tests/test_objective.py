"""The objective: where a term's arguments are found, what a teacher gives, and which term cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit import losses
from repkit.checks import InputError
from repkit.objective import Objective, Term, value_at


def _squared_error(prediction, target, *, factor=1.0, where=None, reduction="mean"):
    return factor * jnp.square(prediction - target)


def _evaluate(objective, outputs, teacher=None, batch=None):
    batch = {"where": jnp.ones(2, bool)} if batch is None else batch
    return objective(batch, outputs, {}, step=0, key=jax.random.key(0), teacher=teacher)[0]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("outputs.attention.encoder.blocks.0.attention", "layer 0"),
        ("outputs.attention.encoder.blocks.10.attention", "layer 10"),
        ("outputs.attention.encoder", "whole"),
        ("outputs.hidden.encoder.blocks.0", "the longest key"),
        ("outputs.hidden.encoder.blocks.0.norm", "a shorter key, as the longest leads no further"),
        ("batch.image", "pixels"),
    ],
)
def test_keys_of_outputs_may_hold_dots(path, expected):
    sources = {
        "outputs": {
            "attention": {
                "encoder.blocks.0.attention": "layer 0",
                "encoder.blocks.10.attention": "layer 10",
                "encoder": "whole",
            },
            "hidden": {
                "encoder": {"blocks": {"0.norm": "a shorter key, as the longest leads no further", "0": "shorter"}},
                "encoder.blocks.0": "the longest key",
            },
        },
        "batch": {"image": "pixels"},
    }
    assert value_at(sources, path, "the test") == expected


def test_a_path_that_leads_nowhere_names_near_ones():
    layers = {f"encoder.blocks.{i}.attention": jnp.ones(2) for i in range(3)}
    objective = Objective({"error": Term(_squared_error, ("outputs.attention.encoder.block.1.attention", "batch.y"))})
    with pytest.raises(
        InputError, match=r"term 'error': nothing at .*; near: .*outputs\.attention\.encoder\.blocks\.1"
    ):
        _evaluate(objective, {"attention": layers})


def test_no_gradient_reaches_the_teacher():
    objective = Objective({"error": Term(_squared_error, ("outputs.y", "teacher.y"))})

    def loss(student, teacher):
        return _evaluate(objective, {"y": student}, {"y": teacher})

    student, teacher = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])
    np.testing.assert_allclose(loss(student, teacher), (4 + 9) / 2)
    for_student, for_teacher = jax.grad(loss, (0, 1))(student, teacher)
    np.testing.assert_allclose(for_student, student - teacher)
    np.testing.assert_array_equal(for_teacher, np.zeros(2))


def test_a_term_of_a_teacher_that_is_not_there_says_so():
    objective = Objective({"error": Term(_squared_error, ("outputs.y", "teacher.y"))})
    with pytest.raises(InputError, match=r"term 'error' takes 'teacher.y', but there is no teacher"):
        _evaluate(objective, {"y": jnp.ones(2)})


def test_the_paths_that_are_taken_from_the_teacher():
    terms = {
        "one": Term(_squared_error, ("outputs.y", "teacher.hidden.blocks.0")),
        "two": Term(_squared_error, ("outputs.y", "teacher.hidden.blocks.0"), keywords={"factor": "teacher.factor"}),
        "three": Term(_squared_error, ("outputs.y", "batch.y")),
    }
    assert Objective(terms).teacher_paths() == ("hidden.blocks.0", "factor")


def test_a_loss_that_refuses_its_arguments_is_named_with_its_term():
    layer = "attention.blocks.0.attention"
    objective = Objective({"heads": Term(losses.attention_map_alignment, (f"outputs.{layer}", f"teacher.{layer}"))})
    maps = {"attention": {"blocks.0.attention": jnp.ones((2, 3, 4, 4))}}
    longer = {"attention": {"blocks.0.attention": jnp.ones((2, 5, 6, 6))}}
    with pytest.raises(InputError, match=rf"term 'heads' of outputs\.{layer}, teacher\.{layer}: .*expected q = 4"):
        _evaluate(objective, maps, longer)
