"""Geometric consistency: what it is blind to, that all forms agree, and what they hold and exchange."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from repkit import losses
from tests.reference import losses as reference

# These programs run once on tiny arrays: compiling is all they cost.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
jitted = quickly(losses.geometric_consistency, static_argnames=("cross_modal_weight", "in_modal_weight", "reduction"))


def embeds(seed: int, rows: int = 9, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim))


def rotation(dim: int = 4) -> np.ndarray:
    return np.linalg.qr(embeds(7, dim, dim))[0]


# ---------------------------------------------------------------------------------------------------------------------
# What it measures


def test_equal_modalities_and_views_are_consistent():
    x = embeds(0)
    assert jitted(x, x, x, x) == 0


def test_a_rotation_of_everything_changes_nothing():
    arrays = [embeds(seed) for seed in range(4)]
    with jax.enable_x64(True):
        before = jitted(*arrays)
        after = jitted(*(x @ rotation() for x in arrays))
        assert after == pytest.approx(float(before), rel=1e-12)


@pytest.mark.parametrize("rows", [9, 40])
def test_a_rotation_of_one_modality_keeps_the_geometry_within_it(rows):
    x = embeds(0, rows)
    with jax.enable_x64(True):
        assert jitted(x, x @ rotation(), cross_modal_weight=0.0) == pytest.approx(0, abs=1e-12)
        assert jitted(x, x @ rotation(), in_modal_weight=0.0) > 1


def test_with_equal_weights_it_is_an_inner_product_of_two_small_matrices():
    """|V + T|'|V + T| with |V - T|'|V - T|, D x D each."""
    v, t = embeds(0), embeds(1)
    plus, minus = (v + t).T @ (v + t), (v - t).T @ (v - t)
    with jax.enable_x64(True):
        assert jitted(v, t) == pytest.approx(np.sum(plus * minus) / len(v), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# All ways to compute it. With 40 rows of 4 features it is D x D matrices, with 4 rows a pair matrix; blocks of 10 rows
# divide the 40, of 9 repeat rows.


def value_and_gradient(arrays, *, slopes=None, where=None, weights=None, **options):
    """Of the mean, or of the sum of the rows times `slopes`; all arguments that can have a gradient have one."""

    def loss(arrays, weights, cross_modal_weight, in_modal_weight):
        if "cross_modal_weight" not in options:
            scalars = {"cross_modal_weight": cross_modal_weight, "in_modal_weight": in_modal_weight}
        else:
            scalars = {}
        keywords = options | scalars | {"where": where, "weights": weights}
        if slopes is None:
            return losses.geometric_consistency(*arrays, **keywords)
        return jnp.sum(slopes * losses.geometric_consistency(*arrays, **keywords, reduction="none"))

    argnums = (0, 2, 3) if weights is None else (0, 1, 2, 3)
    return quickly(jax.value_and_grad(loss, argnums))(arrays, weights, jnp.float64(0.25), jnp.float64(0.5))


@pytest.mark.parametrize("slopes", [None, pytest.param("alike", marks=pytest.mark.slow), "unlike"])
@pytest.mark.parametrize(("count", "equal"), [(2, True), (4, False)])
@pytest.mark.parametrize("size", [pytest.param(10, marks=pytest.mark.slow), 9])
def test_blocks_agree_with_the_plain_form(slopes, count, equal, size):
    with jax.enable_x64(True):
        rng, arrays = np.random.default_rng(1), [embeds(seed, 40) for seed in range(count)]
        where = rng.random(40) < 0.8
        given = {None: None, "alike": np.full(40, 0.3), "unlike": rng.normal(size=40)}[slopes]
        options = {"cross_modal_weight": 0.25, "in_modal_weight": 0.25} if equal else {}
        run = functools.partial(value_and_gradient, arrays, slopes=given, where=where, **options)
        got, wanted = run(form=losses.Blocks(size)), run(form="plain")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), got, wanted)


@pytest.mark.parametrize("rows", [4, 40])
def test_weights_have_a_gradient(rows):
    with jax.enable_x64(True):
        arrays = [embeds(seed, rows) for seed in range(4)]
        run = functools.partial(value_and_gradient, arrays, weights=np.random.default_rng(1).uniform(0, 2, rows))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), run(), run(form="plain"))


@pytest.mark.parametrize("rows", [4, 40])
def test_rows_are_those_of_the_definition(rows):
    with jax.enable_x64(True):
        arrays = [embeds(seed, rows) for seed in range(4)]
        where = np.arange(rows) % 4 != 1
        got = jitted(*arrays, in_modal_weight=0.5, where=where, reduction="none")
        wanted = reference.geometric_consistency(*arrays, in_modal_weight=0.5, where=where)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_plain_form_has_second_derivatives_and_forward_mode():
    with jax.enable_x64(True):
        x, y, direction = embeds(0, 40), embeds(1, 40), embeds(2, 40)
        gradient = jax.grad(lambda x: losses.geometric_consistency(x, y, form="plain"))
        got = quickly(lambda: jax.jvp(gradient, (x,), (direction,))[1])()
        blocked = quickly(jax.grad(lambda x: losses.geometric_consistency(x, y)))
        step = 1e-5
        expected = (blocked(x + step * direction) - blocked(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def exact(v, t, a, b):
    """Value and gradients in float64, by D x D matrices of the definition."""
    v, t = np.asarray(v, np.float64), np.asarray(t, np.float64)
    n = len(v)
    s, r = v @ t.T - t @ v.T, v @ v.T - t @ t.T
    value = (a * np.sum(s**2) + b * np.sum(r**2)) / n
    return value, (4 * a * (s @ t) + 4 * b * (r @ v)) / n, (-4 * a * (s @ v) - 4 * b * (r @ t)) / n


@functools.cache
def compiled(**options):
    return quickly(jax.value_and_grad(functools.partial(losses.geometric_consistency, **options), (0, 1)))


def errors(v, t, *, form=None, **weights):
    """Relative errors of the value and of the gradient."""
    value, gradients = compiled(form=form or losses.Blocks(), **weights)(v, t)
    wanted, *wanted_gradients = exact(v, t, weights["cross_modal_weight"], weights["in_modal_weight"])
    off = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(gradients, wanted_gradients, strict=True)]
    return abs(float(value) - wanted) / wanted, max(off)


BOTH = {"cross_modal_weight": 0.25, "in_modal_weight": 0.25}
CROSS, WITHIN = {**BOTH, "in_modal_weight": 0.0}, {**BOTH, "cross_modal_weight": 0.0}


def noisy(kind: str, noise: float, rows: int, dim: int = 64):
    v = embeds(0, rows, dim)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    symmetric = embeds(8, dim, dim)
    turn = {"equal": np.eye(dim), "rotated": rotation(dim), "symmetric": (symmetric + symmetric.T) / dim}[kind]
    t = v @ turn + noise * embeds(1, rows, dim) / np.sqrt(dim)
    return v.astype(np.float32), t.astype(np.float32)


@pytest.mark.parametrize("weights", [BOTH, CROSS, WITHIN], ids=["both", "cross", "within"])
@pytest.mark.parametrize("noise", [1.0, pytest.param(1e-2, marks=pytest.mark.slow), 1e-4])
@pytest.mark.parametrize("rows", [600, 60])
def test_nothing_cancels_where_the_modalities_are_nearly_equal(weights, noise, rows):
    value, gradient = errors(*noisy("equal", noise, rows), **weights)
    assert value < 1e-6
    assert gradient < 1e-6


def test_the_plain_form_does_cancel_there():
    assert errors(*noisy("equal", 1e-4, 600), form="plain", **BOTH)[1] > 1e-5


@pytest.mark.parametrize(("kind", "weights"), [("rotated", BOTH), ("symmetric", BOTH)])
def test_one_part_may_vanish_beside_the_other(kind, weights):
    value, gradient = errors(*noisy(kind, 1e-4, 600), **weights)
    assert value < 1e-6
    assert gradient < 1e-6


@pytest.mark.parametrize(("kind", "weights"), [("rotated", WITHIN), ("symmetric", CROSS)])
@pytest.mark.parametrize(
    ("rows", "noise", "value_error", "gradient_error"),
    [(600, 1e-1, 1e-4, 1e-5), (600, 1e-2, 1e-2, 1e-4), (60, 1e-2, 1e-5, 1e-4)],
)
def test_one_part_alone_that_vanishes_loses_digits(kind, weights, rows, noise, value_error, gradient_error):
    """As the docstring says; a pair matrix (60 rows) keeps the value's."""
    value, gradient = errors(*noisy(kind, noise, rows), **weights)
    assert value < value_error
    assert gradient < gradient_error


def test_rounding_leaves_no_negative_loss():
    for rows in (60, 600):
        v, t = noisy("rotated", 0.0, rows)
        for reduction in ("mean", "none"):
            assert np.all(jitted(v, t, **WITHIN, reduction=reduction) >= 0)


# ---------------------------------------------------------------------------------------------------------------------
# Memory and exchange


def temporary(rows: int, dim: int, **options):
    x = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    loss = functools.partial(losses.geometric_consistency, **options)
    where = jax.ShapeDtypeStruct((rows,), bool)
    total = jax.value_and_grad(lambda v, t, where: jnp.sum(loss(v, t, where=where)), (0, 1))
    return jax.jit(total).lower(x, x, where).compile().memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.parametrize(("reduction", "most"), [("mean", 20), ("none", 30)])
def test_temporary_memory_does_not_grow_with_the_batch(reduction, most):
    small, large = (temporary(rows, 512, reduction=reduction, **BOTH) for rows in (16384, 65536))
    assert small <= most
    # One number per row where rows are asked for.
    assert large <= small + 1


def test_repeated_rows_cost_no_memory():
    assert temporary(65537, 64, **BOTH) <= temporary(65536, 64, **BOTH) + 2


def sharded(place, **options):
    """The compiled value and gradient of 32,768 rows of 512 features over 8 devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((32768, 512), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    loss = functools.partial(losses.geometric_consistency, **options)
    if place == "shard_map":
        mapped = functools.partial(loss, axis_name="data")
        loss = jax.shard_map(mapped, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, x).compile()


@pytest.mark.parametrize("place", ["shard_map", "jit"])
@pytest.mark.parametrize(("options", "matrices"), [(BOTH, 2), ({"in_modal_weight": 0.5}, 3)])
def test_devices_exchange_one_sum_of_small_matrices(place, options, matrices):
    program = sharded(place, **options)
    text = program.as_text()
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    assert len(sums) == 1
    assert sums[0].count("f32[512,512]") == matrices
    assert not re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", text)
    assert program.memory_analysis().temp_size_in_bytes <= 40 * 2**20


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("differentiated", ["outside", pytest.param("inside", marks=pytest.mark.slow)])
def test_devices_agree_with_one(size, reduction, differentiated):
    """Without weights, so that the mean needs no row's loss, and all valid rows of "none" have one slope."""
    with jax.enable_x64(True):
        arrays, where = [embeds(seed, 48) for seed in range(4)], np.random.default_rng(1).random(48) < 0.7
        where[:6] = False
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows, whole = P("data"), P() if reduction == "mean" else P("data")

        def loss(arrays, where, axis_name=None, form=losses.Blocks(size)):
            return losses.geometric_consistency(
                *arrays, where=where, axis_name=axis_name, form=form, reduction=reduction
            )

        def gradient(loss):
            return jax.grad(lambda arrays, where: jnp.sum(loss(arrays, where)))

        on_devices = functools.partial(loss, axis_name="data")
        if differentiated == "outside":
            mapped = gradient(jax.shard_map(on_devices, mesh=mesh, in_specs=(rows, rows), out_specs=whole))
        else:
            mapped = jax.shard_map(gradient(on_devices), mesh=mesh, in_specs=(rows, rows), out_specs=rows)
        wanted = quickly(gradient(functools.partial(loss, form="plain")))(arrays, where)
        got = quickly(mapped)(arrays, where)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), got, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Any input


@functools.partial(quickly, static_argnames="reduction")
def finite(arrays, where, weights, reduction):
    def loss(arrays, weights):
        keywords = {"where": where, "weights": weights, "reduction": reduction}
        return jnp.sum(losses.geometric_consistency(*arrays, **keywords, form=losses.Blocks(8)))

    return jax.value_and_grad(loss, (0, 1))(arrays, weights)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    variant=st.sampled_from([(3, 5, 4, "mean"), (13, 2, 2, "none"), (13, 2, 4, "mean")]),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-12, 6),
    noise=st.sampled_from([0.0, 1e-6, 1.0]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    mask=st.integers(0, 2**13 - 1),
)
def test_value_and_gradient_are_finite(variant, seed, exponent, noise, dtype, mask):
    rows, dim, count, reduction = variant
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(rows, dim))
    arrays = [10.0**exponent * (common + noise * rng.normal(size=(rows, dim))) for _ in range(count)]
    arrays = [x.astype(dtype) for x in arrays]
    where = np.array([mask >> i & 1 for i in range(rows)], bool)
    weights = rng.choice([0.0, 1e-3, 1.0], rows).astype(np.float32)
    value, gradients = finite(arrays, where, weights, reduction)
    assert value >= 0
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves((value, gradients)))
