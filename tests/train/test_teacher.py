"""Teachers in the step: one gradient on every placement, none to the teacher, and what becomes of its parameters."""

import dataclasses
import functools
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from repkit import losses
from repkit.checks import InputError
from repkit.distillation import Match, layer_terms
from repkit.objective import Objective, Term
from repkit.train.checkpoint import Checkpointer, CheckpointReader
from repkit.train.config import TrainConfig, check_step, make_placement
from repkit.train.interrupt import Interrupts
from repkit.train.logging import MetricLogger
from repkit.train.loop import fit
from repkit.train.mesh import make_mesh
from repkit.train.state import init_state
from repkit.train.step import PMAP_AXIS, jit_placement, make_term_gradient_norms, make_update, pmap_placement
from repkit.train.teacher import FrozenTeacher, MomentumTeacher, params_identity
from repkit.train.teacher_cache import TeacherBatches, open_cache, write_cache

ROWS, LENGTH, WIDTH, CLASSES = 16, 4, 6, 5
STUDENT_LAYER, TEACHER_LAYER = "blocks.0.attention", "blocks.2.attention"
SGD = optax.sgd(1.0)  # the gradient is read off an update at rate 1


def _init(heads, key):
    keys = jax.random.split(key, 4)
    shapes = {"query": (heads, WIDTH, 3), "key": (heads, WIDTH, 3), "up": (WIDTH, 8), "head": (8, CLASSES)}
    return {
        name: jax.random.normal(key, shape, jnp.float32) * 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _forward(layer):
    def forward(params, batch, key):
        assert not any(name.startswith("teacher/") for name in batch)
        query, key = (jnp.einsum("blw,hwd->bhld", batch["x"], params[name]) for name in ("query", "key"))
        scores = jnp.where(batch["mask"][:, None, None], jnp.einsum("bhqd,bhkd->bhqk", query, key), -1e9)
        logits = jax.nn.gelu(batch["x"].mean(1) @ params["up"]) @ params["head"]
        return {
            "attention": {layer: jax.nn.softmax(scores)},
            "queries": {layer: query},
            "keys": {layer: key},
            "logits": logits,
        }

    return forward


STUDENT, TEACHER = _forward(STUDENT_LAYER), _forward(TEACHER_LAYER)


def _init_student(key):
    return _init(2, key)


def _teacher_params(seed=7):
    return jax.device_get(jax.jit(functools.partial(_init, 3))(jax.random.key(seed)))


def _divergence(student_logits, teacher_logits, *, where=None, reduction="mean"):
    student, teacher = jax.nn.log_softmax(student_logits), jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def _objective(teacher_layer=TEACHER_LAYER):
    masks = {"query_where": "batch.mask", "key_where": "batch.mask"}
    match = Match(STUDENT_LAYER, teacher_layer, losses.attention_map_alignment, keywords=masks)
    return Objective(
        {"logits": Term(_divergence, ("outputs.logits", "teacher.logits"))} | layer_terms("heads", [match], weight=0.5)
    )


def _batch(seed=0):
    rng = np.random.default_rng(seed)
    where = np.ones(ROWS, bool)
    where[[0, 1, 2, 3, 7, 12]] = False
    return {
        "x": rng.standard_normal((ROWS, LENGTH, WIDTH), np.float32),
        "mask": np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (ROWS, 1)),
        "example_id": rng.permutation(ROWS).astype(np.int32),
        "where": where,
    }


def _whole_data():
    """Every example once, as `_batch` has it, in example order."""
    batch = _batch()
    order = np.argsort(batch["example_id"])
    ordered = {name: array[order] for name, array in batch.items()}
    for rows in np.split(np.arange(ROWS), 4):
        yield {name: array[rows] for name, array in ordered.items()} | {"where": np.ones(len(rows), bool)}


def _state(key, objective=None, **options):
    return init_state(_init_student, SGD, objective or _objective(), key=key, **options)


def _placement(name, teacher, *, objective=None, make_state=None, rules=(), **options):
    objective = objective or _objective()
    make_state = make_state or (lambda key: _state(key, objective))
    if name == "pmap":
        update = make_update(STUDENT, objective, SGD, teacher=teacher, axis_name=PMAP_AXIS, **options)
        return pmap_placement(update, make_state, teacher=teacher)
    mesh = make_mesh({"data": 4, "tensor": 2}) if name == "tensor" else make_mesh(devices=jax.devices()[: int(name)])
    if name == "8":
        objective = objective.over_mesh(mesh, "data")
    update = make_update(STUDENT, objective, SGD, teacher=teacher, **options)
    return jit_placement(update, make_state, mesh, rules=rules, teacher=teacher)


def _gradient(placement, batch):
    state = placement.init(jax.random.key(1))
    before = jax.device_get(placement.get_state(state).params)
    state, metrics = placement.update(state, placement.put_batch(batch))
    after = jax.device_get(placement.get_state(state).params)
    return jax.tree.map(np.subtract, before, after), metrics


def _assert_close(one, other, tolerance):
    norm = optax.tree.norm(other)
    assert norm > 0.05
    assert optax.tree.norm(jax.tree.map(lambda x, y: x - y, one, other)) < tolerance * norm


@pytest.fixture(scope="module")
def expected():
    """The gradient with the teacher's outputs as constants, without any step."""
    batch, objective = _batch(), _objective()
    state = jax.jit(_state)(jax.random.key(1))
    targets = jax.device_get(jax.jit(TEACHER)(_teacher_params(), batch, None))

    def scalar(params):
        outputs = STUDENT(params, batch, None)
        return objective(batch, outputs, {}, step=0, key=jax.random.key(0), teacher=targets)[0]

    return jax.device_get(jax.jit(jax.grad(scalar))(state.params))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    teacher = FrozenTeacher(TEACHER, _teacher_params())
    write_cache(folder, teacher, _whole_data(), paths=_objective().teacher_paths(), examples=ROWS, data="rows")
    return open_cache(folder, teacher=teacher.identity, data="rows")


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["1", "8", "pmap"])
def test_live_and_cached_teachers_give_one_gradient_on_every_placement(placement, expected, cache):
    batch = _batch()
    live, metrics = _gradient(_placement(placement, FrozenTeacher(TEACHER, _teacher_params())), batch)
    _assert_close(live, expected, 1e-5)
    cached, cached_metrics = _gradient(_placement(placement, None), {**batch, **cache.rows(batch)})
    _assert_close(cached, expected, 2e-3)
    np.testing.assert_allclose(metrics["loss"], cached_metrics["loss"], rtol=2e-3)


@pytest.mark.slow
def test_a_teacher_runs_in_the_parts_of_an_accumulated_batch(expected, cache):
    live, _ = _gradient(_placement("1", FrozenTeacher(TEACHER, _teacher_params()), accumulate=4), _batch())
    _assert_close(live, expected, 1e-5)
    cached, _ = _gradient(_placement("1", None, accumulate=4), {**_batch(), **cache.rows(_batch())})
    _assert_close(cached, expected, 2e-3)


def test_a_teacher_has_sharding_rules_and_a_dtype_of_its_own(expected):
    teacher = FrozenTeacher(
        TEACHER, _teacher_params(), jnp.bfloat16, [("^up$", P(None, "tensor")), ("^head$", P("tensor"))]
    )
    placement = _placement("tensor", teacher, rules=[("params/up", P(None, "tensor"))])
    placed = placement.teacher_params
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(placed)} == {"bfloat16"}
    assert (placed["up"].sharding.spec, placed["head"].sharding.spec) == (P(None, "tensor"), P("tensor"))
    assert placed["query"].sharding.is_fully_replicated
    _assert_close(_gradient(placement, _batch())[0], expected, 0.02)
    with pytest.raises(InputError, match=r"rules that match no leaf .*: nothing"):
        _placement("tensor", FrozenTeacher(TEACHER, _teacher_params(), rules=[("nothing", P())]))


def test_whole_numbers_of_a_teacher_are_not_cast():
    teacher = FrozenTeacher(TEACHER, {"w": np.ones(2, np.float32), "ids": np.arange(2, dtype=np.int32)}, jnp.bfloat16)
    assert {name: str(leaf.dtype) for name, leaf in teacher.abstract_params().items()} == {
        "w": "bfloat16",
        "ids": "int32",
    }
    with pytest.raises(InputError, match="must be a floating-point type, got int8"):
        FrozenTeacher(TEACHER, {}, jnp.int8)


def test_the_step_differentiates_nothing_of_the_teacher(cache):
    def products(teacher, batch, *params):
        update = make_update(STUDENT, _objective(), SGD, teacher=teacher)
        state = jax.eval_shape(_state, jax.random.key(0))
        return len(re.findall("dot_general", str(jax.make_jaxpr(update)(state, batch, *params))))

    teacher = FrozenTeacher(TEACHER, _teacher_params())
    with_teacher = products(teacher, _batch(), teacher.params)
    without = products(None, {**_batch(), **cache.rows(_batch())})
    forward = len(re.findall("dot_general", str(jax.make_jaxpr(TEACHER)(teacher.params, _batch(), None))))
    assert with_teacher - without == forward == 5


@pytest.mark.parametrize("name", ["2", "pmap"])
def test_donating_the_state_leaves_a_teacher_of_the_same_buffers_and_the_step_compiles_once(name):
    states = []

    def forward(params, batch, key):
        outputs = STUDENT(params, batch, key)
        return {**outputs, "attention": {TEACHER_LAYER: outputs["attention"][STUDENT_LAYER]}}

    start = _placement(name, None).init(jax.random.key(1))
    own = jax.tree.map(lambda x: x[0], start.params) if name == "pmap" else start.params
    teacher = FrozenTeacher(forward, own)
    placement = _placement(name, teacher)
    kept = jax.device_get(placement.teacher_params)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **labels: compiled.append(labels.get("fun_name")) if "backend_compile" in event else None
    )
    try:
        state = start
        for seed in range(3):
            states.append(state)
            state, metrics = placement.update(state, placement.put_batch(_batch(seed)))
    finally:
        jax.monitoring.clear_event_listeners()
    assert all(leaf.is_deleted() for old in states for leaf in jax.tree.leaves(old.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placement.teacher_params), kept)
    assert np.isfinite(metrics["loss"])
    assert len(compiled) == 1, compiled


@pytest.mark.parametrize("name", ["1", "pmap"])
def test_a_momentum_teacher_is_the_moving_average_before_the_step(name):
    objective, batch = _objective(STUDENT_LAYER), _batch(3)
    placement = _placement(
        name,
        MomentumTeacher(STUDENT),
        objective=objective,
        make_state=lambda key: _state(key, objective, ema=True),
        ema_decay=0.9,
    )
    state = placement.get_state(placement.init(jax.random.key(1)))
    ema = jax.device_get(state.ema)
    # Away from its average, or the student would have nothing to learn from it.
    params = jax.tree.map(lambda x: x + 0.3 * np.sign(x) * (np.arange(x.shape[-1]) % 2).astype(np.float32), ema)
    state, _ = placement.update(
        placement.put_state(dataclasses.replace(state, params=params)), placement.put_batch(batch)
    )
    new = placement.get_state(state)

    def scalar(params):
        targets, outputs = STUDENT(ema, batch, None), STUDENT(params, batch, None)
        return objective(batch, outputs, {}, step=0, key=jax.random.key(0), teacher=targets)[0]

    gradient = jax.tree.map(lambda x, y: x - np.asarray(y), params, new.params)
    _assert_close(gradient, jax.device_get(jax.jit(jax.grad(scalar))(params)), 1e-5)
    jax.tree.map(
        lambda average, old, params: np.testing.assert_allclose(
            average, 0.9 * old + 0.1 * params, rtol=1e-4, atol=1e-6
        ),
        new.ema,
        ema,
        jax.device_get(new.params),
    )


def test_a_momentum_teacher_without_a_moving_average_is_refused():
    update = make_update(STUDENT, _objective(STUDENT_LAYER), SGD, teacher=MomentumTeacher(STUDENT))
    with pytest.raises(InputError, match="set ema_decay"):
        jax.eval_shape(update, jax.eval_shape(_state, jax.random.key(0)), _batch())


def test_a_teacher_of_another_length_is_refused_with_the_term_s_name():
    def longer(params, batch, key):
        return TEACHER(params, {**batch, **{n: jnp.repeat(batch[n], 2, axis=1) for n in ("x", "mask")}}, key)

    config = TrainConfig(steps=4, batch_size=ROWS, warmup_steps=1)
    teacher = FrozenTeacher(longer, _teacher_params())
    with pytest.raises(InputError, match=rf"term 'heads/{STUDENT_LAYER}/{TEACHER_LAYER}'.*\[16, 3, 8, 8\]"):
        check_step(config, _init_student, STUDENT, _objective(), _batch(), teacher=teacher)


@pytest.fixture(scope="module")
def attention_step():
    """A step on the attention term alone, with the teacher's maps as arrays of the batch."""
    objective = _objective().only(f"heads/{STUDENT_LAYER}/{TEACHER_LAYER}")
    return jax.jit(make_update(STUDENT, objective, SGD)), _state(jax.random.key(1), objective)


def _with_maps(batch):
    maps = jax.device_get(TEACHER(_teacher_params(), batch, None)["attention"][TEACHER_LAYER])
    return {**batch, f"teacher/attention.{TEACHER_LAYER}": np.array(maps)}


def test_not_a_number_in_a_teacher_s_map_counts_where_the_cell_does(attention_step):
    update, state = attention_step
    batch = _with_maps(_batch())
    maps = batch[f"teacher/attention.{TEACHER_LAYER}"]
    clean, clean_metrics = update(state, batch)
    counts = np.einsum("b,bq,bk->bqk", batch["where"], batch["mask"], batch["mask"])[:, None] > 0
    hidden, _ = update(state, {**batch, f"teacher/attention.{TEACHER_LAYER}": np.where(counts, maps, np.nan)})
    jax.tree.map(np.testing.assert_array_equal, hidden.params, clean.params)
    assert np.isfinite(float(clean_metrics["loss"]))
    row = int(np.flatnonzero(batch["where"])[0])
    maps[row, 0, 0, 0] = np.nan
    _, metrics = update(state, batch)
    assert np.isnan(float(metrics["loss"])), "a wrong map must not pass for a right one"


def test_all_tokens_padded_is_an_exact_zero(attention_step):
    update, state = attention_step
    batch = _with_maps(_batch())
    new_state, metrics = update(state, {**batch, "mask": np.zeros_like(batch["mask"])})
    assert float(metrics["loss"]) == 0.0
    assert float(metrics["gradient_norm"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, new_state.params, state.params)


def test_two_teachers_at_once_are_refused(cache):
    teacher = FrozenTeacher(TEACHER, _teacher_params())
    update = make_update(STUDENT, _objective(), SGD, teacher=teacher)
    with pytest.raises(InputError, match=r"the batch brings a teacher's arrays .*logits"):
        jax.eval_shape(update, jax.eval_shape(_state, jax.random.key(0)), {**_batch(), **cache.rows(_batch())}, ())


def test_gradient_norms_of_the_terms_with_a_teacher():
    teacher, batch = FrozenTeacher(TEACHER, _teacher_params()), _batch()
    state = jax.jit(_state)(jax.random.key(1))
    norms = jax.jit(make_term_gradient_norms(STUDENT, _objective(), teacher=teacher))(state, batch, teacher.params)
    alone = jax.jit(make_update(STUDENT, _objective().only("logits"), SGD, teacher=teacher))
    new_state, _ = alone(state, batch, teacher.params)
    expected = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, new_state.params))
    np.testing.assert_allclose(norms["logits/gradient_norm"], expected, rtol=1e-4)


@pytest.mark.parametrize("placement", ["jit", "pmap"])
def test_the_configured_placement_takes_a_teacher(placement):
    config = TrainConfig(steps=4, batch_size=ROWS, placement=placement, warmup_steps=1)
    teacher = FrozenTeacher(TEACHER, _teacher_params())
    check_step(config, _init_student, STUDENT, _objective(), _batch(), teacher=teacher)
    with pytest.raises(InputError, match="there is no teacher"):
        check_step(config, _init_student, STUDENT, _objective(), _batch())
    placed = make_placement(config, _init_student, STUDENT, _objective(), teacher=teacher)
    assert placed.teacher_identity == teacher.identity
    _, metrics = placed.update(placed.init(jax.random.key(0)), placed.put_batch(_batch()))
    assert float(metrics["logits"]) > 0


def test_the_identity_is_of_the_values_wherever_they_are():
    params = _teacher_params()
    identity = params_identity(params)
    mesh = make_mesh({"data": 4, "tensor": 2})
    placed = _placement("tensor", FrozenTeacher(TEACHER, params, rules=[("up", P(None, "tensor"))])).teacher_params
    assert len(placed["up"].sharding.device_set) == mesh.size
    assert params_identity(placed) == identity
    for change in (
        lambda params: params | {"up": np.nextafter(params["up"], np.float32(9))},
        lambda params: params | {"up": params["up"].T},
        lambda params: params | {"up": params["up"].astype(jnp.bfloat16)},
        lambda params: {name: params[other] for name, other in zip(params, reversed(params), strict=True)},
    ):
        assert params_identity(change(params)) != identity


class _Stream:
    corrupt = 0

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return _batch()

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        assert "teacher" not in state or "position" in state
        self.position = state["position"]

    def close(self):
        pass


def _fit(folder, placement, batches, steps):
    with (
        Checkpointer(folder / "checkpoints") as checkpointer,
        MetricLogger(folder, total_steps=steps, stream=io.StringIO(), tensorboard=False) as logger,
        Interrupts() as interrupts,
    ):
        return fit(
            placement,
            batches,
            steps=steps,
            key=jax.random.key(0),
            checkpointer=checkpointer,
            logger=logger,
            interrupts=interrupts,
            log_every=1,
            checkpoint_every=2,
            schedule=lambda step: 1.0,
        )


def test_a_run_goes_on_with_its_own_teacher_only_be_it_live_or_cached(tmp_path, cache):
    live = _placement("1", FrozenTeacher(TEACHER, _teacher_params()))
    none = _placement("1", None)
    assert _fit(tmp_path, live, _Stream(), 2).step == 2
    saved = CheckpointReader(tmp_path / "checkpoints").restore(live.abstract)
    assert saved.data_position == {"position": 2, "skipped_steps": 0, "teacher": live.teacher_identity}
    assert not any("up" in path and "teacher" in path for path in map(str, jax.tree.leaves(saved.state)))
    with pytest.raises(InputError, match=r"another teacher: the run had \w{12}…, here it is \w{12}…"):
        _fit(tmp_path, _placement("1", FrozenTeacher(TEACHER, _teacher_params(8))), _Stream(), 4)
    with pytest.raises(InputError, match="here it is none"):
        _fit(tmp_path, none, _Stream(), 4)
    assert _fit(tmp_path, live, _Stream(), 4).step == 4
    # The cache is of the same teacher.
    batches = TeacherBatches(_Stream(), cache)
    assert _fit(tmp_path, none, batches, 6).step == 6
    assert batches.get_state() == {"position": 6, "teacher": live.teacher_identity}
