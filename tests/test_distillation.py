"""Matches of layers: the layer maps, the terms and their mean, what must be captured, the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit import losses
from repkit.checks import InputError
from repkit.distillation import Match, describe, layer_terms, match_layers, required_captures
from repkit.objective import Objective

STUDENT = ("decoder.blocks.0.cross_attention", "decoder.blocks.1.cross_attention")
TEACHER = tuple(f"decoder.blocks.{i}.cross_attention" for i in range(4))
MASKS = {"query_where": "outputs.masks.decoder", "key_where": "outputs.masks.encoder"}
ROWS, QUERIES, KEYS = 3, 4, 5


def _names(prefix, count):
    return [f"{prefix}.{i}" for i in range(count)]


@pytest.mark.parametrize(
    ("ours", "theirs", "how", "expected"),
    [
        (4, 12, "even", [0, 4, 7, 11]),
        (3, 12, "even", [0, 6, 11]),  # 5.5 is a tie
        (3, 6, "even", [0, 2, 5]),  # 2.5 is a tie
        (2, 2, "even", [0, 1]),
        (4, 2, "even", [0, 0, 1, 1]),
        (1, 6, "even", [5]),
        (1, 1, "even", [0]),
        (3, 1, "even", [0, 0, 0]),
        (2, 6, "last", [4, 5]),
        (1, 6, "last", [5]),
    ],
)
def test_layer_maps(ours, theirs, how, expected):
    pairs = match_layers(_names("student", ours), _names("teacher", theirs), how=how)
    assert pairs == tuple(zip(_names("student", ours), (f"teacher.{i}" for i in expected), strict=True))


def test_explicit_pairs_are_taken_as_they_are():
    pairs = [("student.1", "teacher.0"), ("student.1", "teacher.2")]
    assert match_layers(_names("student", 2), _names("teacher", 3), how=pairs) == tuple(pairs)


@pytest.mark.parametrize(
    ("arguments", "how", "message"),
    [
        (([], ["a"]), "even", "at least one layer of the student"),
        ((["a"], []), "even", "at least one layer of the teacher"),
        (("abc", ["a"]), "even", "paths of at least one layer of the student, got 'abc'"),
        ((["a", "b"], ["c"]), "last", "got 1 for 2"),
        ((["a"], ["b"]), "evenly", "unknown how 'evenly'; did you mean 'even'"),
        ((["a"], ["b"]), [], "at least one pair"),
        ((["blocks.0"], ["b"]), [("block.0", "b")], "unknown layer of the student 'block.0'; did you mean 'blocks.0'"),
        ((["a"], ["blocks.3"]), [("a", "blocks.30")], "unknown layer of the teacher 'blocks.30'; did you mean"),
    ],
)
def test_layers_that_cannot_be_matched_are_refused(arguments, how, message):
    with pytest.raises(InputError, match=message):
        match_layers(*arguments, how=how)


def _maps(seed, heads, layers, queries=QUERIES, keys=KEYS):
    rng = np.random.default_rng(seed)
    maps = {layer: rng.uniform(size=(ROWS, heads, queries, keys)).astype(np.float32) ** 3 for layer in layers}
    return {layer: values / values.sum(-1, keepdims=True) for layer, values in maps.items()}


def _masks():
    return {
        "decoder": np.arange(QUERIES) < np.array([[4], [2], [3]]),
        "encoder": np.arange(KEYS) < np.array([[5], [3], [4]]),
    }


def _evaluate(terms, outputs, teacher):
    @jax.jit
    def evaluate(outputs, teacher):
        batch = {"where": jnp.array([True, True, False])}
        return Objective(terms)(batch, outputs, {}, step=0, key=jax.random.key(0), teacher=teacher)

    return evaluate(outputs, teacher)


def test_the_terms_are_a_weighted_mean_over_the_pairs_with_masks():
    student, teacher, masks = _maps(0, 2, STUDENT), _maps(1, 3, TEACHER), _masks()
    pairs = match_layers(STUDENT, TEACHER)
    matches = [
        Match(*pair, losses.mean_head_attention, options={"variant": "mse"}, keywords=MASKS, weight=weight)
        for pair, weight in zip(pairs, (1.0, 3.0), strict=True)
    ]
    total, report = _evaluate(
        layer_terms("heads", matches, weight=0.5), {"attention": student, "masks": masks}, {"attention": teacher}
    )

    @jax.jit
    def of_pair(student, teacher):
        return losses.mean_head_attention(
            student,
            teacher,
            variant="mse",
            query_where=masks["decoder"],
            key_where=masks["encoder"],
            where=jnp.array([True, True, False]),
        )

    expected = [
        of_pair(student[ours], teacher[theirs]) for ours, theirs in [(STUDENT[0], TEACHER[0]), (STUDENT[1], TEACHER[3])]
    ]
    np.testing.assert_allclose(total, 0.5 * (expected[0] + 3 * expected[1]) / 2, rtol=1e-5)
    values = [report.means[f"heads/{ours}/{theirs}"].value() for ours, theirs in pairs]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_weights_may_be_functions_of_the_step():
    pairs = match_layers(STUDENT, TEACHER)
    matches = [Match(*pair, losses.mean_head_attention, weight=lambda step: step + 1.0) for pair in pairs]
    terms = layer_terms("heads", matches, weight=lambda step: 2.0 * step)
    weights = Objective(terms).weights_at(jnp.asarray(3))
    assert [float(weight) for weight in weights.values()] == [2 * 3 * 4 / 2] * 2


def test_queries_and_keys_give_the_value_of_their_maps():
    rng, heads = np.random.default_rng(0), {"student": 2, "teacher": 3}
    arrays = {
        side: [rng.standard_normal((ROWS, heads[side], length, 6), np.float32) for length in (QUERIES, KEYS)]
        for side in heads
    }

    def outputs(side, layer):
        query, key = arrays[side]
        maps = np.exp(np.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(6))
        maps = maps / maps.sum(-1, keepdims=True)
        return {"queries": {layer: query}, "keys": {layer: key}, "attention": {layer: maps}}

    student, teacher = outputs("student", STUDENT[0]), outputs("teacher", TEACHER[3])
    pair = (STUDENT[0], TEACHER[3])
    from_maps = layer_terms("maps", [Match(*pair, losses.attention_map_alignment)])
    both = layer_terms("both", [Match(*pair, losses.attention_alignment_from_queries_keys, ("queries", "keys"))])
    np.testing.assert_allclose(
        _evaluate(from_maps, student, teacher)[0], _evaluate(both, student, teacher)[0], rtol=1e-5
    )


@pytest.mark.parametrize("learned", ["mixer", "projection"])
def test_what_a_loss_learns_comes_by_path_and_gets_a_gradient(learned):
    student, teacher = _maps(0, 2, STUDENT), _maps(1, 3, TEACHER)
    cells = QUERIES * KEYS
    if learned == "mixer":
        loss, options, value = losses.mixed_head_attention, {}, jnp.full((3, 2), 0.5)
    else:
        loss, options = losses.attention_map_alignment, {"variant": "projected_kl", "form": "plain"}
        value = losses.MapProjection(jnp.eye(cells) + 0.01, jnp.full(cells, 0.01))
    match = Match(STUDENT[0], TEACHER[0], loss, options=options, keywords={learned: "outputs.learned.heads.0"})

    def total(value, teacher):
        outputs = {"attention": student, "learned": {"heads.0": value}}
        return _evaluate(layer_terms("heads", [match]), outputs, {"attention": teacher})[0]

    for_value, for_teacher = jax.grad(total, (0, 1))(value, teacher)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(for_value))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(for_teacher))


def test_a_pair_of_different_lengths_is_named_before_anything_is_computed():
    match = Match(STUDENT[1], TEACHER[2], losses.attention_map_alignment)
    outputs, teacher = {"attention": _maps(0, 2, STUDENT)}, {"attention": _maps(1, 3, TEACHER, keys=7)}
    with pytest.raises(
        InputError, match=rf"term 'heads/{STUDENT[1]}/{TEACHER[2]}' .*expected k = 5, as in student_maps, got k = 7"
    ):
        jax.eval_shape(lambda: _evaluate(layer_terms("heads", [match]), outputs, teacher))


def test_only_what_is_taken_is_captured():
    align, mean = losses.attention_alignment_from_queries_keys, losses.mean_head_attention
    matches = [
        Match("a", "x", align, ("queries", "keys")),
        Match("b", "x", align, ("queries", "keys")),
        Match("b", "y", mean),
        Match("blocks.0", "blocks.1", mean, ("hidden",)),
    ]
    required = required_captures(matches)
    assert required.student == {"maps": ("b",), "queries_keys": ("a", "b"), "hidden": ("blocks.0",)}
    assert required.teacher == {"maps": ("y",), "queries_keys": ("x",), "hidden": ("blocks.1",)}


def test_lists_that_make_no_terms_are_refused():
    match = Match("a", "b", losses.mean_head_attention)
    with pytest.raises(InputError, match="'heads': expected at least one pair of layers"):
        layer_terms("heads", [])
    with pytest.raises(InputError, match="two matches are called 'heads/a/b'"):
        layer_terms("heads", [match, match])
    with pytest.raises(InputError, match="unknown argument of mean_head_attention 'variants'; did you mean 'variant'"):
        layer_terms("heads", [Match("a", "b", losses.mean_head_attention, options={"variants": "kl"})])
    with pytest.raises(InputError, match="unknown group of captured outputs 'maps'"):
        Match("a", "b", losses.mean_head_attention, ("maps",))
    with pytest.raises(InputError, match="got 'hidden'"):
        Match("a", "b", losses.mean_head_attention, "hidden")


def test_the_table_names_layers_sizes_loss_and_weight():
    matches = [
        Match(STUDENT[0], TEACHER[1], losses.attention_map_alignment, options={"variant": "kl"}, weight=2.0),
        Match("decoder.blocks.0", "decoder.blocks.3", _hidden, ("hidden",), weight=lambda step: step),
    ]
    outputs = {
        "attention": _maps(0, 2, STUDENT),
        "hidden": {"decoder.blocks.0": jax.ShapeDtypeStruct((ROWS, QUERIES, 16), jnp.float32)},
    }
    # As a cache holds them: the whole path is the key.
    cached = {
        f"attention.{TEACHER[1]}": np.zeros((99, 8, QUERIES, KEYS)),
        "hidden.decoder.blocks.3": np.zeros((99, QUERIES, 64)),
    }
    heading, first, second = describe(matches, outputs=outputs, teacher=cached).splitlines()
    assert heading.split() == ["student", "teacher", "takes", "sizes", "loss", "weight"]
    assert first.split() == [
        *(STUDENT[0], TEACHER[1], "attention", "8", "->", "2", "heads"),
        *("attention_map_alignment(variant='kl')", "2"),
    ]
    assert second.split()[3:] == ["64", "->", "16", "features", "_hidden()", "scheduled"]
    assert "? -> ? heads" in describe(matches)
    with pytest.raises(
        InputError, match=rf"nothing at the path 'outputs.attention.{STUDENT[0]}'; near: .*{STUDENT[1]}"
    ):
        describe(matches, outputs={"attention": {STUDENT[1]: np.zeros((1, 2, 3, 3))}})


def _hidden(student, teacher, *, where=None, reduction="mean"):
    return jnp.zeros(len(student))
