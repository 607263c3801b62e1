"""One pure update, and its two placements: `jax.jit` over a mesh, and `jax.pmap`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from repkit.checks import InputError
from repkit.numerics import AxisName
from repkit.objective import Objective, Report
from repkit.train.mesh import Rules, batch_devices, batch_sharding, batch_share, put_batch, state_shardings
from repkit.train.micro_batches import every_nth, in_micro_batches
from repkit.train.non_finite import SKIPPED, require_finite_update
from repkit.train.state import TrainState

Batch = Mapping[str, Any]
Metrics = dict[str, Array]
Forward = Callable[[Any, Batch, Array | None], dict[str, Any]]
"""`forward(params, batch, key) -> named outputs`; a key of None asks for the deterministic evaluation."""
Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
UnplacedUpdate = Callable[..., tuple[TrainState, Metrics]]
"""`update(state, batch, teacher_params=()) -> (new state, metrics)`, as `make_update` makes it."""

TEACHER_ARRAYS = "teacher/"
"""How the names of a batch's arrays begin that a teacher gave, such as those of a cache: `teacher/<path>`."""


class Teacher(Protocol):
    """A model that is not trained in the step and gives it targets; see `repkit.train.teacher`."""

    @property
    def identity(self) -> str | None:
        """Of the parameters, where they are fixed."""
        ...

    @property
    def rules(self) -> Rules:
        """How the teacher's own parameters are sharded over a mesh."""
        ...

    def abstract_params(self) -> Any:
        """Shapes and dtypes of its own parameters; `()` if it has none."""
        ...

    def put_params(self, shardings: Any) -> Any:
        """Places a copy of its own parameters."""
        ...

    def outputs(self, params: Any, state: TrainState, batch: Batch) -> dict[str, Any]:
        """Its named outputs for these rows, with its own parameters as `put_params` placed them."""
        ...


def make_update(
    forward: Forward,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    teacher: Teacher | None = None,
    accumulate: int = 1,
    micro_batches: int = 1,
    ema_decay: float | None = None,
    axis_name: AxisName | None = None,
) -> UnplacedUpdate:
    """Makes the pure function `(state, batch, teacher_params=()) -> (new state, metrics)` of one training step.

    What the batch holds as `teacher/<path>` is for the terms only, at their paths `teacher.<path>`; the models do not
    see it.

    Args:
        forward: the model.
        objective: the loss terms.
        optimizer: the optax optimizer, gradient clipping included.
        teacher: runs in the same step, without a gradient; its own parameters are the update's third argument. None
            where there is no teacher, or the batches bring what it said.
        accumulate: number of parts in which the batch is walked, one after the other, so that the model holds the
            activations of one part at a time. Losses between examples see the candidates of their part only.
        micro_batches: number of parts in which the rows go through the model and the teacher, so that they hold the
            activations of one part at a time, for a second forward pass. Losses see all rows, and the gradient is that
            of the whole batch; see `repkit.train.micro_batches.in_micro_batches`.
        ema_decay: d of the moving average  ema <- d ema + (1 - d) params;  None for a state without one.
        axis_name: the mapped axis when the update runs inside `jax.pmap`; None for `jax.jit`, where arrays are global.

    Returns:
        The update. Its metrics are scalars: `loss` (the weighted total), every term by its name, `gradient_norm`
        before any clipping, the diagnostics of the losses with a memory, and `skipped`: 1 where loss or gradient were
        not finite, so that of the state only the step's number has changed.
    """

    forward = in_micro_batches(forward, micro_batches)

    def update(state: TrainState, batch: Batch, teacher_params: Any = ()) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        normalizers = objective.normalizers(batch, axis_name)

        def gradients(rows: Batch, memories: dict[str, Any], key: Array) -> tuple[Any, Report]:
            # Outside of what is differentiated, so that no tangent or residual of the teacher is ever computed.
            rows, targets = _with_targets(teacher, teacher_params, state, rows, micro_batches)

            def scalar(params: Any) -> tuple[Float[Array, ""], Report]:
                outputs = forward(params, rows, _device_key(key, axis_name))
                return objective(
                    rows,
                    outputs,
                    memories,
                    step=state.step,
                    key=key,
                    teacher=targets,
                    normalizers=normalizers,
                    axis_name=axis_name,
                )

            return jax.grad(scalar, has_aux=True)(state.params)

        if accumulate == 1:
            grads, report = gradients(batch, state.memories, key)
        else:
            grads, report = _accumulated(gradients, _parts(batch, accumulate), state, key)
        if axis_name is not None:
            # Each device differentiated its share of the total, so the shares add up.
            grads = jax.lax.psum(grads, axis_name)
            totals = jax.lax.psum({name: mean.total for name, mean in report.means.items()}, axis_name)
            means = {name: mean._replace(total=totals[name]) for name, mean in report.means.items()}
            report = report._replace(means=means)

        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
        new_state = TrainState(state.step + 1, params, optimizer_state, report.memories, ema, state.key)
        metrics = _metrics(report, objective, state.step, optax.tree.norm(grads))
        new_state, skipped = require_finite_update(
            state, new_state, metrics["loss"], metrics["gradient_norm"], axis_name
        )
        return new_state, {**metrics, SKIPPED: skipped}

    return update


def make_term_gradient_norms(
    forward: Forward, objective: Objective, *, teacher: Teacher | None = None, micro_batches: int = 1
) -> Callable[..., Metrics]:
    """Makes the function `(state, batch, teacher_params=()) -> {term: |∂ weighted term / ∂ params|}`.

    It is for looking at how terms compete. It costs one forward pass and one backward pass per term, so it is run on
    demand and not in every step. Arguments are as those of `make_update`.
    """
    forward = in_micro_batches(forward, micro_batches)

    def norms(state: TrainState, batch: Batch, teacher_params: Any = ()) -> Metrics:
        key = jax.random.fold_in(state.key, state.step)
        batch, targets = _with_targets(teacher, teacher_params, state, batch, micro_batches)
        outputs, pull_back = jax.vjp(lambda params: forward(params, batch, key), state.params)

        def norm(name: str) -> Array:
            def scalar(outputs: dict[str, Any]) -> Array:
                term = objective.only(name)
                return term(batch, outputs, state.memories, step=state.step, key=key, teacher=targets)[0]

            return optax.tree.norm(pull_back(jax.grad(scalar)(outputs)))

        return {f"{name}/gradient_norm": norm(name) for name in objective.terms}

    return norms


def _with_targets(
    teacher: Teacher | None, teacher_params: Any, state: TrainState, batch: Batch, micro_batches: int
) -> tuple[Batch, dict[str, Any]]:
    """The batch without what a teacher gave, and that: the arrays the batch brought, or the teacher's outputs."""
    rows = {name: array for name, array in batch.items() if not name.startswith(TEACHER_ARRAYS)}
    brought = {name.removeprefix(TEACHER_ARRAYS): array for name, array in batch.items() if name not in rows}
    if teacher is None:
        return rows, brought
    if brought:
        raise InputError(
            f"the batch brings a teacher's arrays ({', '.join(brought)}), and the update has a teacher; use one of them"
        )

    def targets(params: Any, rows: Batch, _: Array | None) -> dict[str, Any]:
        return teacher.outputs(params, state, rows)

    return rows, in_micro_batches(targets, micro_batches)(teacher_params, rows, None)


def _device_key(key: Array, axis_name: AxisName | None) -> Array:
    """Dropout differs from device to device; the losses' draws, made for the global batch, must not."""
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def _parts(batch: Batch, count: int) -> dict[str, Array]:
    rows = len(batch["where"])
    if rows % count:
        raise InputError(f"a batch of {rows} rows cannot be accumulated in {count} equal parts")
    return every_nth(batch, count)


def _accumulated(gradients: Callable[..., Any], parts: Batch, state: TrainState, key: Array) -> tuple[Any, Report]:
    """Walks the parts of a batch; gradients and sums add up, memories pass from part to part."""
    count = len(parts["where"])

    def one(carry: tuple[Any, dict[str, Any]], part: tuple[Array, Batch]) -> tuple[tuple[Any, dict[str, Any]], Report]:
        grads, memories = carry
        index, rows = part
        new_grads, report = gradients(rows, memories, jax.random.fold_in(key, index))
        return (jax.tree.map(jnp.add, grads, new_grads), report.memories), report

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, memories), reports = jax.lax.scan(one, (zeros, state.memories), (jnp.arange(count), parts))
    means = {name: mean._replace(total=mean.total.sum(), weight=mean.weight[0]) for name, mean in reports.means.items()}
    return grads, Report(memories, means, jax.tree.map(lambda x: x.mean(0), reports.diagnostics))


def _metrics(report: Report, objective: Objective, step: Array, gradient_norm: Array) -> Metrics:
    terms = {name: mean.value() for name, mean in report.means.items()}
    weights = objective.weights_at(step)
    total = jnp.stack([weights[name] * value for name, value in terms.items()]).sum()
    return {"loss": total, **terms, "gradient_norm": gradient_norm, **report.diagnostics}


class Placement(NamedTuple):
    """One way of placing a training step on devices; all that a loop and a checkpoint need to know of it.

    Attributes:
        abstract: shapes, dtypes and shardings of the state as a checkpoint keeps it.
        init: from the run's key to the placed first state.
        put_state: from a state with the shardings of `abstract` to the placed state.
        get_state: the way back.
        put_batch: moves the rows that this process feeds to the devices.
        update: one step; the buffers of the old state are given up to the new one.
        teacher_params: the placed parameters of a teacher, which `update` already has; `()` without one.
        teacher_identity: which teacher it is, where its parameters are fixed; checkpoints keep it.
    """

    abstract: TrainState
    init: Callable[[Array], TrainState]
    put_state: Callable[[TrainState], TrainState]
    get_state: Callable[[TrainState], TrainState]
    put_batch: Callable[[Mapping[str, np.ndarray]], dict[str, Array]]
    update: Update
    teacher_params: Any = ()
    teacher_identity: str | None = None


class JittedUpdate(NamedTuple):
    """An update under `jax.jit` over a mesh, and what it takes beside the batch, of which nothing is placed yet.

    Attributes:
        function: `function(state, batch, teacher_params)`.
        state: shapes, dtypes and shardings of the state.
        teacher_params: those of the teacher's parameters.
    """

    function: Any
    state: Any
    teacher_params: Any


def jit_update(
    update: UnplacedUpdate,
    make_state: Callable[[Array], TrainState],
    mesh: Mesh,
    *,
    rules: Rules = (),
    teacher: Teacher | None = None,
) -> JittedUpdate:
    """What `jit_placement` places, also for a mesh of devices that are not there; arguments are as for that."""

    def sharded(tree: Any, rules: Rules) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            state_shardings(tree, mesh, rules),
        )

    state = sharded(jax.eval_shape(make_state, jax.random.key(0)), rules)
    teacher_params = () if teacher is None else sharded(teacher.abstract_params(), teacher.rules)
    function = jax.jit(
        update,
        in_shardings=(_shardings(state), batch_sharding(mesh), _shardings(teacher_params)),
        out_shardings=(_shardings(state), NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return JittedUpdate(function, state, teacher_params)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def jit_placement(
    update: UnplacedUpdate,
    make_state: Callable[[Array], TrainState],
    mesh: Mesh,
    *,
    rules: Rules = (),
    teacher: Teacher | None = None,
) -> Placement:
    """Places an update with `jax.jit` over a mesh: arrays are global, the compiler chooses the collectives.

    Args:
        update: from `make_update` without an axis name.
        make_state: from a key to the first state; run under `jax.jit`, so no device ever holds more than its part.
        mesh: the device mesh; rows are split over its `data` and `fsdp` axes.
        rules: how leaves of the state are sharded, see `repkit.train.mesh.state_shardings`.
        teacher: the one that the update was made with. Its parameters are placed once, by its own rules.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, optax
        >>> from repkit.objective import Objective, Term
        >>> from repkit.train.mesh import make_mesh
        >>> from repkit.train.state import init_state
        >>> def squared_error(prediction, target, *, where=None, reduction="mean"):
        ...     return (prediction - target) ** 2
        >>> objective = Objective({"error": Term(squared_error, ("outputs.prediction", "batch.target"))})
        >>> forward = lambda params, batch, key: {"prediction": params["w"] * batch["x"]}
        >>> optimizer = optax.sgd(0.1)
        >>> make_state = lambda key: init_state(lambda key: {"w": jnp.zeros(())}, optimizer, objective, key=key)
        >>> update = make_update(forward, objective, optimizer)
        >>> placement = jit_placement(update, make_state, make_mesh(devices=jax.devices()[:1]))
        >>> state = placement.init(jax.random.key(0))
        >>> batch = {"x": np.ones(4, "f4"), "target": np.full(4, 3.0, "f4"), "where": np.ones(4, bool)}
        >>> for _ in range(20):
        ...     state, metrics = placement.update(state, placement.put_batch(batch))
        >>> print(f"{state.params['w']:.2f}")
        2.97
    """
    jitted = jit_update(update, make_state, mesh, rules=rules, teacher=teacher)
    shardings = _shardings(jitted.state)
    teacher_params = () if teacher is None else teacher.put_params(_shardings(jitted.teacher_params))
    return Placement(
        abstract=jitted.state,
        init=jax.jit(make_state, out_shardings=shardings),
        put_state=lambda state: state,
        get_state=lambda state: state,
        put_batch=lambda batch: put_batch(_divisible(batch, batch_share(mesh).count, batch_devices(mesh)), mesh),
        update=lambda state, batch: jitted.function(state, batch, teacher_params),
        teacher_params=teacher_params,
        teacher_identity=None if teacher is None else teacher.identity,
    )


PMAP_AXIS = "data"


def pmap_placement(
    update: UnplacedUpdate,
    make_state: Callable[[Array], TrainState],
    devices: Sequence[Any] | None = None,
    *,
    teacher: Teacher | None = None,
) -> Placement:
    """Places an update with `jax.pmap`, for code that still uses it: every device holds the whole state.

    Args:
        update: from `make_update` with `axis_name=PMAP_AXIS`.
        make_state: from a key to the first state.
        devices: this process's devices; None takes all of them.
        teacher: the one that the update was made with; every device holds all of its parameters.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    mesh = Mesh(np.array(devices), PMAP_AXIS)
    replicated, copies = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(PMAP_AXIS))
    mapped = jax.pmap(update, PMAP_AXIS, out_axes=(0, None), devices=devices, donate_argnums=0)

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(devices), -1, *x.shape[1:])

    put_state = jax.jit(
        lambda leaves: jax.tree.map(lambda x: jnp.broadcast_to(x, (len(devices), *x.shape)), leaves),
        out_shardings=copies,
    )
    teacher_params = ()
    if teacher is not None:
        teacher_params = put_state(teacher.put_params(jax.tree.map(lambda _: replicated, teacher.abstract_params())))

    return Placement(
        abstract=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
            jax.eval_shape(make_state, jax.random.key(0)),
        ),
        init=lambda key: put_state(jax.jit(make_state, out_shardings=replicated)(key)),
        put_state=put_state,
        get_state=lambda state: jax.tree.map(lambda x: x[0], state),
        put_batch=lambda batch: jax.tree.map(split, dict(_divisible(batch, 1, len(devices)))),
        update=lambda state, batch: mapped(state, batch, teacher_params),
        teacher_params=teacher_params,
        teacher_identity=None if teacher is None else teacher.identity,
    )


def _divisible(batch: Mapping[str, np.ndarray], shares: int, parts: int) -> Mapping[str, np.ndarray]:
    rows = len(batch["where"]) * shares
    if rows % parts:
        raise InputError(f"a batch of {rows} rows cannot be split over {parts} devices; choose a multiple of {parts}")
    return batch
