"""A model in micro-batches: value, gradient and draws of the whole batch, and less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repkit.checks import InputError
from repkit.losses import geometric_consistency
from repkit.numerics import normalize
from repkit.train.config import TrainConfig, check_devices
from repkit.train.mesh import make_mesh
from repkit.train.micro_batches import every_nth, in_micro_batches
from repkit.train.state import init_state
from repkit.train.step import PMAP_AXIS, jit_placement, make_term_gradient_norms, make_update, pmap_placement
from repkit.train.teacher import MomentumTeacher
from tests.reference import every_loss

SGD = optax.sgd(1.0)  # the gradient is read off an update at rate 1
NAMES = ("global_contrastive",)  # it is between all rows, and keeps a memory


def step(name="1", *, names=NAMES, mask="uneven", **options):
    """The state and the metrics after one step."""
    objective, init = every_loss.objective(names), functools.partial(every_loss.init, names)

    def make_state(key):
        return init_state(init, SGD, objective, key=key, ema="teacher" in options)

    if name == "pmap":
        update = make_update(every_loss.forward, objective, SGD, axis_name=PMAP_AXIS, **options)
        placement = pmap_placement(update, make_state)
    else:
        mesh = make_mesh(devices=jax.devices()[: int(name)])
        if name != "1":
            objective = objective.over_mesh(mesh, "data")
        placement = jit_placement(make_update(every_loss.forward, objective, SGD, **options), make_state, mesh)
    state = placement.init(jax.random.key(1))
    state, metrics = placement.update(state, placement.put_batch(every_loss.batch(mask)))
    return jax.device_get((placement.get_state(state), metrics))


def assert_equal_steps(one, other):
    """Plain gradient descent at rate 1: equal parameters are equal gradients."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        (one[0].params, one[0].memories, one[1]),
        (other[0].params, other[0].memories, other[1]),
    )


@pytest.fixture(scope="module")
def expected():
    return step()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("1", 8), ("8", 2), ("pmap", 8)])
def test_a_step_is_that_of_the_whole_batch(name, count, expected):
    assert_equal_steps(step(name, micro_batches=count), expected)


@pytest.mark.slow
def test_parts_of_their_own_losses_go_through_the_model_in_micro_batches():
    names = ("geometric_consistency",)
    in_parts = step(names=names, accumulate=2)
    assert_equal_steps(step(names=names, accumulate=2, micro_batches=4), in_parts)


@pytest.mark.slow
def test_a_teacher_goes_through_the_same_micro_batches():
    rows = []

    def watched(params, batch, key):
        rows.append(len(batch["image"]))
        return every_loss.forward(params, batch, key)

    names = ("geometric_consistency",)
    with_teacher = {"teacher": MomentumTeacher(watched), "micro_batches": 4}
    batch = {name: x for name, x in every_loss.batch("even").items() if not name.startswith("teacher/")}
    objective = every_loss.objective(names)
    state = init_state(functools.partial(every_loss.init, names), SGD, objective, key=jax.random.key(0), ema=True)
    update = make_update(every_loss.forward, objective, SGD, ema_decay=0.5, **with_teacher)
    jax.eval_shape(update, state, batch)
    assert every_loss.ROWS // 4 in rows


@pytest.mark.slow
def test_gradient_norms_of_the_terms_are_those_of_the_whole_batch():
    names = ("geometric_consistency",)
    objective = every_loss.objective(names)
    state = init_state(functools.partial(every_loss.init, names), SGD, objective, key=jax.random.key(1))
    batch = every_loss.batch("uneven")
    norms = [
        jax.jit(make_term_gradient_norms(every_loss.forward, objective, micro_batches=count))(state, batch)
        for count in (1, 4)
    ]
    np.testing.assert_allclose(*(norm["geometric_consistency/gradient_norm"] for norm in norms), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The model itself

# These programs run once on tiny arrays: compiling is all they cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def towers(params, batch, key):
    """Both modalities through layers with dropout."""

    def tower(x, index):
        for layer, weights in enumerate(params["layers"]):
            x = jax.nn.gelu(x @ weights)
            if key is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(key, 10 * index + layer), 0.5, x.shape)
                x = jnp.where(kept, 2 * x, 0)
        return normalize(x)

    return {"image": tower(batch["image"], 0), "text": tower(batch["text"], 1), "scale": params["scale"]}


def loss(outputs):
    return outputs["scale"] * geometric_consistency(outputs["image"], outputs["text"])


def problem(rows=16, width=8, depth=1):
    keys = jax.random.split(jax.random.key(0), 3)
    layers = list(jax.random.normal(keys[0], (depth, width, width), jnp.float32))
    batch = {name: jax.random.normal(k, (rows, width)) for name, k in zip(("image", "text"), keys[1:], strict=True)}
    return {"layers": layers, "scale": jnp.asarray(5.0, jnp.float32)}, batch


def test_both_passes_drop_the_same_units():
    params, batch = problem()
    key, count = jax.random.key(3), 2

    def one_pass(params):
        """The micro-batches' outputs side by side, with all activations kept."""
        parts = every_nth(batch, count)
        outputs = [
            towers(params, {name: x[i] for name, x in parts.items()}, jax.random.fold_in(key, i)) for i in range(count)
        ]
        # Losses do not mind an order that is the same for both modalities.
        return loss(
            {name: jnp.concatenate([part[name] for part in outputs]) for name in ("image", "text")}
            | {"scale": params["scale"]}
        )

    def two_passes(params):
        return loss(in_micro_batches(towers, count)(params, batch, key))

    actual, expected = (jit(jax.value_and_grad(function))(params) for function in (two_passes, one_pass))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), actual, expected)


def test_rows_keep_their_order():
    params, batch = problem()
    whole, walked = (in_micro_batches(towers, count)(params, batch, None) for count in (1, 4))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), walked, whole)


def test_memory_falls_with_the_number_of_micro_batches():
    params, batch = problem(rows=1024, width=32, depth=4)

    def temporary_bytes(count):
        gradient = jit(jax.grad(lambda params, batch: loss(in_micro_batches(towers, count)(params, batch, None))))
        return gradient.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    whole, in_parts = temporary_bytes(1), temporary_bytes(16)
    assert in_parts < whole / 3


def with_output(make):
    return lambda params, batch, key: {**towers(params, batch, key), "more": {"one": make(params, batch)}}


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda params, batch: batch["image"].mean(), r"\[\]"),
        (lambda params, batch: batch["image"].mean(0), r"\[8\]"),
        (lambda params, batch: batch["image"].T, r"\[8, 16\]"),
        (lambda params, batch: batch["image"].reshape(-1), r"\[128\]"),
    ],
)
def test_an_output_that_cannot_be_put_together_is_refused(make, shape):
    params, batch = problem()
    with pytest.raises(InputError, match=rf"outputs\.more\.one of shape {shape} .* micro-batches of 4 of 16 rows"):
        in_micro_batches(with_output(make), 4)(params, batch, None)


def test_outputs_without_rows_may_have_any_shape_and_constants_may_have_rows():
    params, batch = problem()
    learned = in_micro_batches(with_output(lambda params, batch: params["layers"][0][:4]), 4)(params, batch, None)
    np.testing.assert_array_equal(learned["more"]["one"], params["layers"][0][:4])
    constant = in_micro_batches(with_output(lambda params, batch: jnp.ones((len(batch["image"]), 2))), 4)
    assert constant(params, batch, None)["more"]["one"].shape == (16, 2)


@pytest.mark.parametrize(
    ("count", "message"),
    [(3, "16 rows cannot go through the model in 3 equal micro-batches"), (0, "must be at least 1, got 0")],
)
def test_numbers_of_micro_batches_that_do_not_fit_are_refused(count, message):
    params, batch = problem()
    with pytest.raises(InputError, match=message):
        in_micro_batches(towers, count)(params, batch, None)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(
        InputError, match=r"a multiple of train\.accumulate times train\.micro_batches, got 12, 2 and 4"
    ):
        TrainConfig(batch_size=12, accumulate=2, micro_batches=4)
    with pytest.raises(InputError, match=r"train\.micro_batches must be at least 1"):
        TrainConfig(micro_batches=0)
    with pytest.raises(InputError, match="cannot be split over 8 devices in 4 parts; choose a multiple of 32"):
        check_devices(TrainConfig(batch_size=16, micro_batches=4))
