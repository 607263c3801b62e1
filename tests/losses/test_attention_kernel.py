"""The TPU kernel of attention map alignment: run by Pallas' interpreter, and lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from repkit import losses
from repkit.losses import _attention_kernel as kernel
from repkit.losses._attention_blocks import Masks, Settings
from repkit.numerics import tracing_for
from tests.losses.test_attention import jit, make_maps
from tests.reference import attention as reference

# One block of rows and a rest that is none.
EXAMPLES, TEACHER_HEADS, STUDENT_HEADS, ROWS, KEYS = 2, 3, 2, 69, 5
NO_MASKS = Masks(None, None)
QUERY_MASK = np.arange(ROWS) < np.array([[ROWS], [66]])
KEY_MASK = np.arange(KEYS) < np.array([[4], [KEYS]])


@pytest.fixture(scope="module")
def maps():
    student = make_maps(0, EXAMPLES, STUDENT_HEADS, ROWS, KEYS)
    return student, make_maps(1, EXAMPLES, TEACHER_HEADS, ROWS, KEYS)


def run(student, teacher, masks=NO_MASKS, *, kind="kl", temperature=1.0, alignment_gradient="through"):
    """The losses of the examples, and the derivatives of their weighted sum in the student and in the temperature."""
    settings = Settings(kind, alignment_gradient, False, None)

    def total(student, temperature):
        found = kernel.kernel_alignment(settings, student, jnp.asarray(teacher), masks, temperature)
        return jnp.sum(found * jnp.arange(1.0, 1.0 + len(found))), found

    (_, found), gradients = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(
        jnp.asarray(student), jnp.float32(temperature)
    )
    return found, *gradients


def plain(student, teacher, *, kind="kl", temperature=1.0, **options):
    def total(student, temperature):
        found = losses.attention_map_alignment(
            student, teacher, variant=kind, temperature=temperature, reduction="none", form="plain", **options
        )
        return jnp.sum(found * jnp.arange(1.0, 1.0 + len(found)))

    return jit(jax.grad(total, argnums=(0, 1)))(jnp.asarray(student), jnp.float32(temperature))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "is_masked"),
    [("mse", False), ("kl", True), pytest.param("mse", True, marks=slow), pytest.param("kl", False, marks=slow)],
)
def test_kernel_is_the_reference(maps, kind, is_masked):
    student, teacher = maps
    where = {"query_where": QUERY_MASK, "key_where": KEY_MASK} if is_masked else {}
    expected = reference.attention_map_alignment(student, teacher, variant=kind, temperature=0.7, **where)
    slopes = plain(student, teacher, kind=kind, temperature=0.7, **where)
    if is_masked:  # what does not count may hold anything
        counts = QUERY_MASK[:, None, :, None] & KEY_MASK[:, None, None, :]
        student, teacher = (np.where(counts, maps, np.nan) for maps in maps)
    masks = Masks(QUERY_MASK, KEY_MASK) if is_masked else NO_MASKS
    found, of_student, of_temperature = run(student, teacher, masks, kind=kind, temperature=0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(of_student, slopes[0], atol=2e-6 * float(jnp.abs(slopes[0]).max()))
    assert of_temperature == pytest.approx(float(slopes[1]), rel=1e-4)


@slow
def test_weights_may_be_held(maps):
    slopes, _ = plain(*maps, alignment_gradient="stopped")
    _, of_student, of_temperature = run(*maps, alignment_gradient="stopped")
    np.testing.assert_allclose(of_student, slopes, atol=2e-6 * float(jnp.abs(slopes).max()))
    assert of_temperature == 0


def test_empty_maps_and_masked_examples_cost_nothing(maps):
    student, teacher = (maps.copy() for maps in maps)
    student[0, 1], teacher[0, 2] = 0, 0
    masks = Masks(np.array([[True] * ROWS, [False] * ROWS]), None)
    found, of_student, of_temperature = run(student, teacher, masks)
    expected = reference.attention_map_alignment(student[:1, :1], teacher[:1, :2], variant="kl")
    np.testing.assert_allclose(found, [*expected, 0.0], rtol=1e-5)
    assert not np.any(of_student[1])
    assert not np.any(of_student[0, 1])
    assert np.isfinite(of_temperature)


def test_squared_distances_near_zero_are_exact(maps):
    _, teacher = maps
    # All heads alike, so that the mixture is what each of them is, but for a small noise.
    teacher = np.repeat(teacher[:, :1], TEACHER_HEADS, axis=1)
    noise = np.random.default_rng(2).normal(size=(EXAMPLES, STUDENT_HEADS, ROWS, KEYS))
    student = (teacher[:, :STUDENT_HEADS] * (1 + 1e-5 * noise)).astype(np.float32)
    expected = reference.attention_map_alignment(student.astype(np.float64), teacher.astype(np.float64), variant="mse")
    assert np.all(expected < 1e-8)
    found, *_ = run(student, teacher, kind="mse")
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@slow
def test_bfloat16_maps_are_computed_in_float32(maps):
    student, teacher = (jnp.asarray(maps, jnp.bfloat16) for maps in maps)
    found, of_student, _ = run(student, teacher)
    again, slopes, _ = run(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(found, again, rtol=1e-6)
    assert of_student.dtype == jnp.bfloat16
    np.testing.assert_array_equal(of_student, slopes.astype(jnp.bfloat16))


def lowered_for_tpu(
    devices: int, *, split: bool, rows: int = ROWS, teacher_heads: int = TEACHER_HEADS, **options
) -> str:
    """The program of a loss of maps over a mesh, as it would be given to the compiler of a TPU."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    loss = losses.attention_map_alignment
    loss = losses.over_mesh(loss, mesh) if split else loss
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    maps = [
        jax.ShapeDtypeStruct((2, heads, rows, KEYS), jnp.bfloat16, sharding=sharding)
        for heads in (STUDENT_HEADS, teacher_heads)
    ]
    with tracing_for("tpu"):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, **{"variant": "kl", **options})))
        return step.trace(*maps).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("variant", ["mse", "kl"])
def test_on_tpus_a_device_runs_the_kernel_on_its_own_examples(variant):
    assert "tpu_custom_call" in lowered_for_tpu(1, split=False, variant=variant)
    assert "tpu_custom_call" in lowered_for_tpu(2, split=True, variant=variant)


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 2, "split": False},  # the compiler cannot split a kernel
        {"devices": 1, "split": False, "variant": "token_kl"},
        {"devices": 1, "split": False, "rows": 30_000},  # maps larger than a core's memory
        {"devices": 1, "split": False, "teacher_heads": 130},  # they fit, but are too many pairs to be written out
        {"devices": 1, "split": False, "form": losses.Blocks(size=8)},
        {"devices": 1, "split": False, "form": "plain"},
    ],
    ids=["left to the compiler", "weights per row", "large", "many heads", "block size", "plain"],
)
def test_elsewhere_there_is_none(options):
    assert "tpu_custom_call" not in lowered_for_tpu(**options)
