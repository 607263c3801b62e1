"""The update: one value and one gradient on every placement, and what it does to the state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from repkit import losses
from repkit.checks import InputError
from repkit.models.encoders import TextConfig, VisionConfig
from repkit.models.two_tower import TwoTowerConfig, two_tower
from repkit.numerics import normalize
from repkit.objective import Objective, Term
from repkit.train.mesh import make_mesh
from repkit.train.state import init_state
from repkit.train.step import PMAP_AXIS, jit_placement, make_term_gradient_norms, make_update, pmap_placement

ROWS = 16
PAIR = ("outputs.image.embeds", "outputs.text.embeds")
CONFIG = TwoTowerConfig(
    image=VisionConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2),
    text=TextConfig(vocabulary_size=12, max_length=6, width=16, depth=1, heads=2),
    embed_dim=8,
)


def make_objective() -> Objective:
    """A contrastive loss with memory and sampling, and a second term on a schedule."""
    gamma = Term(
        losses.gamma_contrastive,
        PAIR,
        keywords={
            "logit_scale": "outputs.logit_scale",
            "labels": "batch.caption_id",
            "example_id": "batch.example_id",
        },
        options={"memory_rate": 0.5},
        memory=functools.partial(losses.init_memory, 32),
    )
    info_nce = Term(
        losses.info_nce,
        PAIR,
        keywords={"logit_scale": "outputs.logit_scale"},
        weight=optax.linear_schedule(1.0, 0.5, 10),
        weights="batch.weight",
    )
    return Objective({"gamma": gamma, "info_nce": info_nce})


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with an uneven mask: the first two of eight devices have no valid row, others one or two."""
    rng = np.random.default_rng(seed)
    where = np.ones(ROWS, bool)
    where[[0, 1, 2, 3, 7, 12]] = False
    return {
        "image": rng.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8),
        "token_ids": rng.integers(3, 12, (ROWS, 6), dtype=np.int32),
        "token_mask": np.arange(6) < rng.integers(2, 7, (ROWS, 1)),
        "example_id": rng.permutation(32)[:ROWS].astype(np.int32),
        "caption_id": rng.integers(0, 12, ROWS, dtype=np.int32),
        "weight": rng.uniform(0.5, 2.0, ROWS).astype(np.float32),
        "where": where,
    }


class Model(NamedTuple):
    init: Callable[[Array], Any]
    forward: Callable[..., dict[str, Any]]


def _linear_forward(params, batch, key):
    image = batch["image"].reshape(len(batch["image"]), -1) / 255.0 - 0.5
    text = jnp.where(batch["token_mask"][..., None], params["tokens"][batch["token_ids"]], 0).sum(1)
    return {
        "image": {"embeds": normalize(image @ params["image"])},
        "text": {"embeds": normalize(text @ params["text"])},
        "logit_scale": jnp.exp(params["log_scale"]),
    }


def _linear_init(key):
    keys = jax.random.split(key, 3)
    return {
        "image": jax.random.normal(keys[0], (192, 8), jnp.float32),
        "tokens": jax.random.normal(keys[1], (12, 16), jnp.float32),
        "text": jax.random.normal(keys[2], (16, 8), jnp.float32),
        "log_scale": jnp.asarray(1.0, jnp.float32),
    }


# A model that compiles fast: what the step does to it is what it does to every model.
LINEAR = Model(_linear_init, _linear_forward)

# The gradient is read off an update with plain SGD at rate 1: Adam would hide a constant factor.
SGD = optax.sgd(1.0)


def _gradient_by(name: str, model, *, accumulate: int = 1, rules=()):
    objective = make_objective()

    def make_state(key):
        return init_state(model.init, SGD, objective, key=key)

    update = make_update(
        model.forward, objective, SGD, accumulate=accumulate, axis_name=PMAP_AXIS if name == "pmap" else None
    )
    if name == "pmap":
        placement = pmap_placement(update, make_state)
    elif name == "data and tensor":
        placement = jit_placement(update, make_state, make_mesh({"data": 4, "tensor": 2}), rules=rules)
    else:
        placement = jit_placement(update, make_state, make_mesh(devices=jax.devices()[: int(name)]))
    state = placement.init(jax.random.key(1))
    before = jax.device_get(placement.get_state(state).params)
    state, metrics = placement.update(state, placement.put_batch(make_batch()))
    after = placement.get_state(state)
    gradient = jax.tree.map(lambda x, y: x - np.asarray(y), before, after.params)
    return gradient, jax.device_get(after.memories), jax.device_get(metrics)


def _assert_equal_gradients(one, other) -> None:
    norm = optax.tree.norm(other)
    assert norm > 0.1
    assert optax.tree.norm(jax.tree.map(lambda x, y: x - y, one, other)) < 1e-5 * norm


@pytest.fixture(scope="module")
def on_one_device():
    return _gradient_by("1", LINEAR)


@pytest.mark.parametrize(
    "placement", ["8", *(pytest.param(other, marks=pytest.mark.slow) for other in ("pmap", "data and tensor"))]
)
def test_same_gradient_on_every_placement(placement, on_one_device):
    rules = [("params/image", P(None, "tensor")), ("params/text", P("tensor"))]
    gradient, memories, metrics = _gradient_by(placement, LINEAR, rules=rules)
    expected_gradient, expected_memories, expected_metrics = on_one_device
    _assert_equal_gradients(gradient, expected_gradient)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), memories, expected_memories)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["pmap", "data and tensor"])
def test_same_gradient_of_the_two_tower_on_every_placement(placement):
    rules = [("mlp/up/kernel", P(None, "tensor")), ("mlp/down/kernel", P("tensor"))]
    model = two_tower(CONFIG)
    _assert_equal_gradients(_gradient_by(placement, model, rules=rules)[0], _gradient_by("1", model)[0])


@pytest.mark.slow
def test_a_linen_model_plugs_in(linen_model):
    model = Model(*linen_model(image_size=8, vocabulary_size=12))
    gradient, memories, metrics = _gradient_by("8", model)
    assert optax.tree.norm(gradient) > 0.1
    assert np.isfinite(metrics["loss"])
    assert memories["gamma"].visited.sum() == make_batch()["where"].sum()


def _squared_error(prediction, target, *, where=None, reduction="mean"):
    return jnp.square(prediction - target)


REGRESSION = Objective({"error": Term(_squared_error, ("outputs.y", "batch.y"))})


def _linear(params, batch, key):
    return {"y": batch["x"] @ params["w"]}


def _regression_batch(where) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    return {"x": x, "y": y, "where": np.asarray(where)}


def _regression_state(optimizer, **options):
    return init_state(lambda key: {"w": jnp.ones(3)}, optimizer, REGRESSION, key=jax.random.key(0), **options)


def test_accumulation_gives_the_gradient_of_the_whole_batch_with_an_uneven_mask():
    batch = _regression_batch([True, False, False, False, False, True, True, True])
    whole = make_update(_linear, REGRESSION, SGD)(_regression_state(SGD), batch)
    in_parts = make_update(_linear, REGRESSION, SGD, accumulate=4)(_regression_state(SGD), batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), whole[0].params, in_parts[0].params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), whole[1], in_parts[1])


@pytest.mark.slow
def test_accumulation_of_pair_losses_passes_the_memory_on_and_agrees_over_placements():
    single = _gradient_by("1", LINEAR, accumulate=2)
    mesh = _gradient_by("8", LINEAR, accumulate=2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), single, mesh)
    visited = single[1]["gamma"].visited
    batch = make_batch()
    assert set(np.flatnonzero(visited)) == set(batch["example_id"][batch["where"]])


def test_parts_that_do_not_divide_the_batch_are_refused():
    update = make_update(_linear, REGRESSION, SGD, accumulate=3)
    with pytest.raises(InputError, match="8 rows cannot be accumulated in 3"):
        update(_regression_state(SGD), _regression_batch([True] * 8))


def test_moving_average_and_schedule_follow_their_definitions():
    optimizer = optax.sgd(0.1)
    state = _regression_state(optimizer, ema=True)
    update = jax.jit(make_update(_linear, REGRESSION, optimizer, ema_decay=0.9))
    ema = np.ones(3)
    for _ in range(3):
        state, _ = update(state, _regression_batch([True] * 8))
        ema = 0.9 * ema + 0.1 * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-6)
    assert state.evaluation_params is state.ema
    assert int(state.step) == 3


def test_clipping_bounds_the_step_and_the_logged_norm_is_the_one_before():
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    state = _regression_state(optimizer)
    new_state, metrics = make_update(_linear, REGRESSION, optimizer)(state, _regression_batch([True] * 8))
    np.testing.assert_allclose(np.linalg.norm(new_state.params["w"] - 1), 0.01, rtol=1e-4)
    assert metrics["gradient_norm"] > 0.1


def test_a_fully_masked_batch_changes_nothing():
    state, metrics = make_update(_linear, REGRESSION, SGD)(_regression_state(SGD), _regression_batch([False] * 8))
    np.testing.assert_array_equal(state.params["w"], np.ones(3))
    assert metrics["loss"] == 0


@pytest.mark.parametrize("ema", [False, True])
def test_the_step_compiles_once_and_gives_the_old_state_up(ema):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    objective = Objective({"info_nce": make_objective().terms["info_nce"]})
    placement = jit_placement(
        make_update(LINEAR.forward, objective, optimizer, ema_decay=0.99 if ema else None),
        lambda key: init_state(LINEAR.init, optimizer, objective, key=key, ema=ema),
        make_mesh(devices=jax.devices()[:2]),
    )
    state = placement.init(jax.random.key(0))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **labels: compiled.append(labels.get("fun_name")) if "backend_compile" in event else None
    )
    try:
        for seed in range(4):
            old = state
            state, _ = placement.update(state, placement.put_batch(make_batch(seed)))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled == ["jit(update)"]


def test_steps_with_different_numbers_draw_differently_and_equal_ones_alike():
    model, objective = LINEAR, make_objective().only("gamma")
    update = jax.jit(make_update(model.forward, objective, SGD))
    state = init_state(model.init, SGD, objective, key=jax.random.key(0))
    batch = make_batch()
    first, _ = update(state, batch)
    again, _ = update(state, batch)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    # Rates are drawn from the same memory, so that only the step's number can make a difference.
    other, _ = update(dataclasses.replace(state, step=jnp.asarray(1, jnp.int32)), batch)
    assert any(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True)
    )


def test_gradient_norms_of_the_terms():
    model, objective = LINEAR, make_objective()
    state = init_state(model.init, SGD, objective, key=jax.random.key(0))
    norms = jax.jit(make_term_gradient_norms(model.forward, objective))(state, make_batch())
    for name in objective.terms:
        alone = objective.only(name)
        new_state, _ = jax.jit(make_update(model.forward, alone, SGD))(state, make_batch())
        step = jax.tree.map(lambda x, y: x - y, state.params, new_state.params)
        np.testing.assert_allclose(norms[f"{name}/gradient_norm"], optax.tree.norm(step), rtol=1e-3)
