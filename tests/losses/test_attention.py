"""What the losses of attention maps promise beyond the contract of all losses."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from repkit import losses
from repkit.losses import _attention_blocks as blocks
from tests.reference import attention as reference

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
every_variant = pytest.mark.parametrize("variant", ["mse", "kl", "token_kl"])


def make_maps(seed: int, *shape: int, peak: float = 2.0) -> np.ndarray:
    logits = peak * np.random.default_rng(seed).normal(size=shape)
    maps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (maps / maps.sum(axis=-1, keepdims=True)).astype(np.float32)


def make_queries_keys(seed: int, b: int, h: int, q: int, k: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(b, h, q, d)).astype(np.float32), rng.normal(size=(b, h, k, d)).astype(np.float32)


def call(name: str, *arrays, **options):
    """The value of a loss, compiled whole."""
    return jit(functools.partial(getattr(losses, name), **options))(*arrays)


def evaluate(student, teacher, **options):
    """The loss and the student's gradient."""
    return jit(jax.value_and_grad(functools.partial(losses.attention_map_alignment, **options)))(student, teacher)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """As if maps were too large to walk whole, and several to a group."""
    monkeypatch.setattr(blocks, "_WHOLE_CELLS", 0)
    monkeypatch.setattr(blocks, "_BLOCK_CELLS", 300)


# ---------------------------------------------------------------------------------------------------------------------
# What the formula says


def orthogonal_heads(heads: int) -> np.ndarray:
    return np.eye(heads, dtype=np.float32).reshape(1, heads, 1, heads)


def test_floors_of_identical_orthogonal_heads():
    maps = orthogonal_heads(12)
    a = math.e / (math.e + 11)
    assert a == pytest.approx(0.19815, abs=5e-6)
    assert call("attention_map_alignment", maps, maps, variant="mse") == pytest.approx(8.41697, abs=5e-6)
    assert call("attention_map_alignment", maps, maps, variant="kl") == pytest.approx(19.42475, abs=5e-6)
    assert call("attention_map_alignment", maps, maps, variant="token_kl") == pytest.approx(19.42475, abs=5e-6)


@every_variant
def test_temperature_to_zero_is_the_nearest_head(variant):
    teacher = make_maps(0, 2, 5, 6, 7)
    student = teacher[:, [3, 0, 4, 1, 2, 2]]
    assert call("attention_map_alignment", student, teacher, variant=variant, temperature=1e-3) == pytest.approx(
        0, abs=2e-5
    )


@every_variant
def test_order_of_heads_does_not_matter(variant):
    student, teacher = make_maps(0, 2, 3, 4, 5), make_maps(1, 2, 4, 4, 5)
    expected, gradient = evaluate(student, teacher, variant=variant)
    order = np.array([2, 0, 1])
    value, permuted = evaluate(student[:, order], teacher[:, ::-1], variant=variant)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(permuted, gradient[:, order], rtol=1e-4, atol=1e-6)


def test_one_student_head_takes_all_the_weight():
    student, teacher = make_maps(0, 2, 1, 4, 5), make_maps(1, 2, 3, 4, 5)
    alone = call("attention_map_alignment", student, teacher, variant="kl")
    matched = call("one_to_one_attention", np.repeat(student, 3, axis=1), teacher, variant="kl")
    np.testing.assert_allclose(alone, matched, rtol=1e-6)


def test_weights_have_the_bounds_of_their_cosines():
    student, teacher = (list(make_maps(seed, 1, 4, 3, 3).reshape(4, 9)) for seed in (0, 1))
    weights = np.array(reference.alignment_weights(student, teacher, 1.0))
    assert np.all(weights >= 1 / (1 + 3 * math.e))
    assert np.all(weights <= math.e / (math.e + 3))


def test_kl_is_the_mean_of_the_rows_with_shared_weights():
    student, teacher = make_maps(0, 1, 3, 4, 5), make_maps(1, 1, 2, 4, 5)
    weights = np.array(
        reference.alignment_weights(*(list(x[0].reshape(len(x[0]), -1)) for x in (student, teacher)), 1.0)
    )
    mixture = np.einsum("ij,jqk->iqk", weights, student[0])
    by_row = np.sum(teacher[0] * np.log(teacher[0] / mixture), axis=-1).mean(axis=-1).sum()
    np.testing.assert_allclose(call("attention_map_alignment", student, teacher, variant="kl"), by_row, rtol=1e-5)


@every_variant
def test_queries_and_keys_give_what_their_maps_give(variant):
    student, teacher = make_queries_keys(0, 2, 3, 5, 6, 4), make_queries_keys(1, 2, 4, 5, 6, 8)

    def from_maps(*student):
        maps = [
            jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5)
            for query, key in (student, teacher)
        ]
        return losses.attention_map_alignment(*maps, variant=variant, form="plain")

    def direct(*student):
        return losses.attention_alignment_from_queries_keys(*student, *teacher, variant=variant)

    expected, gradients = jit(jax.value_and_grad(from_maps, (0, 1)))(*student)
    value, direct_gradients = jit(jax.value_and_grad(direct, (0, 1)))(*student)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(direct_gradients, gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6)


def test_the_teachers_heads_are_shared_out_evenly():
    student, teacher = make_maps(0, 2, 2, 3, 4), make_maps(1, 2, 4, 3, 4)
    pairs = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.float32)
    np.testing.assert_allclose(
        call("merged_head_attention", student, teacher),
        call("merged_head_attention", student, teacher, merging=pairs),
        rtol=1e-6,
    )
    more_student_heads = call("merged_head_attention", teacher, student)
    repeated = call("one_to_one_attention", teacher, np.repeat(student, 2, axis=1))
    np.testing.assert_allclose(more_student_heads, repeated, rtol=1e-6)


def test_a_gradient_reaches_what_is_learned():
    student, teacher = make_maps(0, 2, 2, 2, 3), make_maps(1, 2, 3, 2, 3)

    def projected(projection):
        return losses.attention_map_alignment(student, teacher, variant="projected_kl", projection=projection)

    identity = losses.MapProjection(jnp.eye(6), jnp.full(6, 0.01))
    for gradient in jit(jax.grad(projected))(identity):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient)
    unprojected = call("attention_map_alignment", student, teacher)
    no_bias = projected(losses.MapProjection(jnp.eye(6), jnp.zeros(6)))
    np.testing.assert_allclose(no_bias, unprojected, rtol=1e-6)

    for loss, name, shape in (
        (losses.mixed_head_attention, "mixer", (3, 2)),
        (losses.merged_head_attention, "merging", (2, 3)),
    ):
        gradient = jit(jax.grad(lambda shares, loss=loss, name=name: loss(student, teacher, **{name: shares})))
        assert np.any(gradient(jnp.ones(shape)))


# ---------------------------------------------------------------------------------------------------------------------
# Forms


@every_variant
@pytest.mark.usefixtures("float64")
def test_plain_form_has_forward_mode_and_second_derivatives(variant):
    student, teacher = (x.astype(np.float64) for x in (make_maps(0, 2, 2, 2, 3), make_maps(1, 2, 3, 2, 3)))
    direction = np.random.default_rng(2).normal(size=student.shape)

    def loss(student, form):
        return losses.attention_map_alignment(student, teacher, variant=variant, form=form)

    plain, streamed = functools.partial(loss, form="plain"), functools.partial(loss, form=losses.Blocks())
    streamed_gradient = jit(jax.grad(streamed))
    gradient = streamed_gradient(student)
    _, along = jit(lambda student: jax.jvp(plain, (student,), (direction,)))(student)
    np.testing.assert_allclose(along, np.sum(gradient * direction), rtol=1e-9)
    _, curvature = jit(lambda student: jax.jvp(jax.grad(plain), (student,), (direction,)))(student)
    step = 1e-6
    difference = streamed_gradient(student + step * direction) - streamed_gradient(student - step * direction)
    np.testing.assert_allclose(curvature, difference / (2 * step), rtol=1e-5, atol=1e-5)


@every_variant
@pytest.mark.usefixtures("float64", "small_blocks")
def test_groups_and_blocks_give_what_the_plain_form_gives(variant):
    """Several groups of several examples, and blocks of rows of which the last is smaller."""
    student, teacher = (x.astype(np.float64) for x in (make_maps(0, 6, 2, 7, 5), make_maps(1, 6, 3, 7, 5)))
    query_where = np.random.default_rng(2).random((6, 7)) < 0.8
    for form in (losses.Blocks(), losses.Blocks(size=3), losses.Blocks(size=7)):
        options = {"variant": variant, "query_where": query_where, "temperature": 0.3}
        expected, expected_gradient = evaluate(student, teacher, form="plain", **options)
        value, gradient = evaluate(student, teacher, form=form, **options)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["mse", "kl"])
@pytest.mark.usefixtures("float64", "small_blocks")
def test_blocks_of_queries_give_what_the_plain_form_gives(variant):
    student, teacher = make_queries_keys(0, 4, 2, 7, 5, 3), make_queries_keys(1, 4, 3, 7, 5, 4)
    arrays = [x.astype(np.float64) for x in (*student, *teacher)]

    def results(form):
        def loss(query, key, *teacher):
            return losses.attention_alignment_from_queries_keys(
                query, key, *teacher, variant=variant, visible="causal", form=form
            )

        return jit(jax.value_and_grad(loss, (0, 1)))(*arrays)

    expected, expected_gradients = results("plain")
    for form in (losses.Blocks(), losses.Blocks(size=3)):
        value, gradients = results(form)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        for got, wanted in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["mse", "kl"])
@pytest.mark.usefixtures("small_blocks")
def test_groups_are_split_over_devices(variant):
    """Every device walks its own examples: the compiled program exchanges no maps."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    student, teacher = make_maps(0, 16, 2, 4, 5), make_maps(1, 16, 3, 4, 5)
    loss = jax.value_and_grad(functools.partial(losses.attention_map_alignment, variant=variant))
    expected, expected_gradient = jit(loss)(student, teacher)
    arrays = [jax.device_put(x, jax.NamedSharding(mesh, P("data"))) for x in (student, teacher)]
    program = jax.jit(loss).lower(*arrays).compile()
    assert "all-gather" not in program.as_text()
    value, gradient = program(*arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and extremes


@pytest.mark.parametrize("variant", ["mse", "kl"])
@pytest.mark.parametrize("relative_residual", [pytest.param(1e-4, marks=pytest.mark.slow), 1e-10])
def test_a_nearly_perfect_mixture_keeps_its_digits(variant, relative_residual):
    """`|R|^2 / |T|^2`, against the float64 formula on the same float32 maps."""
    rng = np.random.default_rng(0)
    student = make_maps(1, 1, 1, 40, 50)
    noise = 1 + math.sqrt(relative_residual) * rng.normal(size=(1, 3, 40, 50))
    teacher = (student.astype(np.float64) * noise).astype(np.float32)
    value, gradient = evaluate(student, teacher, variant=variant)
    with jax.enable_x64(True):
        exact, exact_gradient = map(
            np.asarray, evaluate(student.astype(np.float64), teacher.astype(np.float64), variant=variant)
        )
    # Rounding a cell in float32, by 3e-8 of it, is what is left: 3e-3 of a difference of 1e-5.
    rounding = 3e-8 / math.sqrt(relative_residual)
    np.testing.assert_allclose(value, exact, rtol=0.3 * rounding, atol=0 if variant == "mse" else 1e-8)
    error = np.linalg.norm(np.asarray(gradient) - exact_gradient) / np.linalg.norm(exact_gradient)
    assert error < 10 * rounding


@pytest.mark.parametrize("form", [losses.Blocks(), losses.Blocks(size=24)])
@pytest.mark.parametrize("relative_residual", [pytest.param(1e-8, marks=pytest.mark.slow), 1e-10])
def test_squared_distances_near_zero_are_exact(relative_residual, form):
    """Each teacher head approaches a student head; a masked example, whose loss is 0, changes nothing."""
    rng = np.random.default_rng(2)
    student = make_maps(1, 3, 6, 64, 64)
    noise = rng.uniform(-math.sqrt(3), math.sqrt(3), size=(3, 12, 64, 64))
    teacher = (student[:, np.arange(12) % 6] * (1 + math.sqrt(relative_residual) * noise)).astype(np.float32)
    options = {"variant": "mse", "temperature": 0.02, "query_where": np.arange(3)[:, None] < np.array([2] * 64)}
    value, _ = evaluate(student, teacher, form=form, **options)
    alone = call("attention_map_alignment", student, teacher, form=form, **options)
    with jax.enable_x64(True):
        student, teacher = student.astype(np.float64), teacher.astype(np.float64)
        exact = np.asarray(call("attention_map_alignment", student, teacher, form="plain", **options))
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    np.testing.assert_allclose(alone, exact, rtol=1e-6)


@every_variant
def test_bfloat16_maps_are_computed_in_float32(variant):
    student, teacher = (jnp.asarray(make_maps(seed, 2, 2, 6, 6), jnp.bfloat16) for seed in (0, 1))
    value, gradient = evaluate(student, teacher, variant=variant)
    expected, expected_gradient = evaluate(student.astype(jnp.float32), teacher.astype(jnp.float32), variant=variant)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient.astype(np.float32), expected_gradient, rtol=4e-3, atol=1e-7)


@every_variant
def test_cells_and_examples_that_do_not_count_do_not_matter(variant):
    student, teacher = make_maps(0, 3, 2, 4, 5), make_maps(1, 3, 3, 4, 5)
    query_where, key_where, where = np.ones((3, 4), bool), np.ones((3, 5), bool), np.array([True, True, False])
    query_where[0, 2:], key_where[1, :2] = False, False
    counting = (query_where[:, :, None] & key_where[:, None, :] & where[:, None, None])[:, None]
    options = {"variant": variant, "query_where": query_where, "key_where": key_where, "where": where}
    expected, expected_gradient = evaluate(student, teacher, **options)
    value, gradient = evaluate(*(np.where(counting, x, np.nan) for x in (student, teacher)), **options)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert not np.any(np.where(counting, 0.0, gradient))
    assert np.any(gradient)


@every_variant
@pytest.mark.parametrize("form", [losses.Blocks(), "plain"])
def test_empty_heads_count_nothing(variant, form):
    student, teacher = make_maps(0, 1, 3, 4, 5), make_maps(1, 1, 3, 4, 5)
    student[:, 1], teacher[:, 2] = 0.0, 0.0
    expected, expected_gradient = evaluate(student[:, [0, 2]], teacher[:, :2], variant=variant, form=form)
    value, gradient = evaluate(student, teacher, variant=variant, form=form)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, [0, 2]], expected_gradient, rtol=1e-4, atol=1e-6)
    assert not np.any(gradient[:, 1])
    for pair in ((0 * student, teacher), (student, 0 * teacher)):
        value, gradient = evaluate(*pair, variant=variant, form=form)
        assert value == 0
        assert not np.any(gradient)


MAPS_SHAPES = [(1, 1, 1, 1, 1), (2, 1, 3, 2, 3), (2, 3, 2, 3, 2), (3, 2, 2, 1, 5)]
map_cases = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(MAPS_SHAPES),
        "dtype": st.sampled_from([np.float32, jnp.bfloat16]),
        "seed": st.integers(0, 2**20),
        "peak": st.sampled_from([0.0, 1.0, 30.0, 1e4]),
        "size": st.sampled_from([0.0, 1e-4, 1.0, 1e6]),
        "same": st.booleans(),
        "masked": st.booleans(),
        "temperature": st.sampled_from([1e-3, 1.0, 1e3]),
    }
)


@functools.cache
def compiled_maps(name: str, variant: str):
    loss = functools.partial(getattr(losses, name), variant=variant)

    def mean(student, teacher, options, masks):
        return loss(student, teacher, **options, **masks)

    return jit(jax.value_and_grad(mean))


MAP_LOSSES = [
    *(("attention_map_alignment", variant) for variant in ("mse", "kl", "token_kl", "projected_kl")),
    ("one_to_one_attention", "mse"),
    ("one_to_one_attention", "kl"),
    ("mean_head_attention", "kl"),
    ("mixed_head_attention", "kl"),
    ("merged_head_attention", "kl"),
]


@pytest.mark.parametrize(("name", "variant"), MAP_LOSSES)
@pytest.mark.slow
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(case=map_cases)
def test_any_maps_give_a_finite_value_and_gradient(name, variant, case):
    b, hs, ht, q, k = case["shape"]
    rng = np.random.default_rng(case["seed"])
    maps = [case["size"] * make_maps(case["seed"] + i, b, h, q, k, peak=case["peak"]) for i, h in enumerate((hs, ht))]
    if case["same"] and hs == ht:
        maps[1] = maps[0]
    kept = 0.5 if case["masked"] else 1.1
    masks = {"query_where": rng.random((b, q)) < kept, "key_where": rng.random((b, k)) < kept}
    masks["where"] = rng.random(b) < kept
    options = {"temperature": np.float32(case["temperature"])} if name == "attention_map_alignment" else {}
    if name == "mixed_head_attention":
        options["mixer"] = rng.normal(size=(ht, hs)).astype(np.float32)
    if variant == "projected_kl":
        options["projection"] = losses.MapProjection(
            rng.normal(size=(q * k, q * k)).astype(np.float32), rng.normal(size=q * k).astype(np.float32)
        )
    student, teacher = (jnp.asarray(x.astype(case["dtype"])) for x in maps)
    value, gradient = compiled_maps(name, variant)(student, teacher, options, masks)
    assert np.isfinite(value)
    assert value >= -1e-4
    assert np.all(np.isfinite(gradient.astype(np.float32)))


@functools.cache
def compiled_queries_keys(variant: str, visible: str):
    loss = functools.partial(losses.attention_alignment_from_queries_keys, variant=variant, visible=visible)

    def mean(arrays, masks):
        return loss(*arrays, **masks)

    return jit(jax.value_and_grad(mean))


@pytest.mark.parametrize(("variant", "visible"), [("mse", "causal"), ("kl", "all"), ("token_kl", "causal")])
@pytest.mark.slow
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.sampled_from(MAPS_SHAPES),
    dtype=st.sampled_from([np.float32, jnp.bfloat16]),
    seed=st.integers(0, 2**20),
    size=st.sampled_from([0.0, 1e-10, 1.0, 30.0, 1e4]),
    masked=st.booleans(),
)
def test_any_queries_and_keys_give_a_finite_value_and_gradient(variant, visible, shape, dtype, seed, size, masked):
    b, hs, ht, q, k = shape
    rng = np.random.default_rng(seed)
    arrays = [size * x for i, h in enumerate((hs, ht)) for x in make_queries_keys(seed + i, b, h, q, k, 3)]
    kept = 0.5 if masked else 1.1
    masks = {"query_where": rng.random((b, q)) < kept, "key_where": rng.random((b, k)) < kept}
    arrays = tuple(jnp.asarray(x.astype(dtype)) for x in arrays)
    value, gradient = compiled_queries_keys(variant, visible)(arrays, masks)
    assert np.isfinite(value)
    assert value >= -1e-4
    assert all(np.all(np.isfinite(each.astype(np.float32))) for each in gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Memory of the compiled value and gradient


def scratch(loss, *shapes: tuple[int, ...]) -> int:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    arguments = tuple(range(len(shapes) // 2))
    memory = jax.jit(jax.value_and_grad(loss, arguments)).lower(*arrays).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize(("variant", "examples_held"), [("mse", 2.2), ("kl", 4.8)])
def test_maps_need_the_memory_of_a_few_examples(variant, examples_held):
    """Each map is read once: of an example, its maps and what they differ by; of the batch, nothing but the result."""
    student, teacher = (16, 6, 197, 197), (16, 12, 197, 197)
    loss = functools.partial(losses.attention_map_alignment, variant=variant)
    example = 4 * (6 + 12) * 197 * 197
    assert scratch(loss, student, teacher) < examples_held * example
    assert scratch(loss, student, teacher) < scratch(functools.partial(loss, form="plain"), student, teacher) / 7


@pytest.mark.parametrize("variant", ["mse", "kl"])
def test_queries_and_keys_need_no_map(variant):
    student, teacher = 2 * [(1, 6, 1024, 64)], 2 * [(1, 12, 1024, 64)]
    loss = functools.partial(losses.attention_alignment_from_queries_keys, variant=variant)
    one_map_each = 4 * (6 + 12) * 1024**2
    assert scratch(loss, *student, *teacher) < one_map_each / 3
    few_rows = functools.partial(loss, form=losses.Blocks(size=16))
    assert scratch(few_rows, *student, *teacher) < one_map_each / 7


def test_hundreds_of_heads():
    """The program does not grow with the number of heads."""
    student, teacher = make_maps(0, 1, 200, 4, 4), make_maps(1, 1, 300, 4, 4)
    expected, expected_gradient = evaluate(student, teacher, form="plain")
    value, gradient = evaluate(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-2, atol=1e-4)
    sizes = [
        len(jax.jit(losses.attention_map_alignment).lower(*2 * [np.ones((1, heads, 4, 4), np.float32)]).as_text())
        for heads in (8, 300)
    ]
    assert sizes[1] < 1.1 * sizes[0]
