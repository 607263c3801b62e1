"""The settings that every training run has, and what they become: an optimizer and a placement."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from repkit.checks import InputError
from repkit.config import formerly
from repkit.numerics import AxisName
from repkit.objective import Objective
from repkit.train.mesh import (
    BatchShare,
    MeshConfig,
    Rules,
    batch_axes,
    batch_devices,
    batch_sharding,
    batch_share,
)
from repkit.train.non_finite import NonFinitePolicy
from repkit.train.state import TrainState, init_state
from repkit.train.step import (
    PMAP_AXIS,
    Batch,
    Forward,
    Placement,
    Teacher,
    UnplacedUpdate,
    jit_placement,
    jit_update,
    make_update,
    pmap_placement,
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: number of updates.
        batch_size: examples per update, over all devices and processes.
        seed: of parameters, data order, augmentation and every draw.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear increase up to the peak.
        weight_decay: AdamW's decay of the matrices; vectors and scalars are not decayed.
        clip_norm: gradients of a larger global norm are scaled down to it; none to leave them.
        accumulate: parts in which each batch is walked, each with losses of its own, see `make_update`.
        micro_batches: parts in which the rows of a batch, or of each of those parts, go through the model, with losses
            of all of them and the exact gradient, see `make_update`.
        ema_decay: decay of the moving average of the parameters, which is then what is evaluated; none for no average.
        placement: `jit` over a mesh, or `pmap`.
        mesh: the axes of the mesh for `jit`.
        log_every: steps between log rows.
        log_term_gradients: whether log rows also hold the norm of each term's own gradient.
        checkpoint_every: steps between checkpoints, each of them after a validation.
        keep_last: newest checkpoints kept.
        keep_best: best checkpoints kept by the recipe's validation metric.
        non_finite: what follows a step whose loss or gradient is not finite, see
            `repkit.train.non_finite.NonFinitePolicy`. Its update is left out in any case.
        hang_seconds: a run that makes no progress for so long is ended with its stacks, see
            `repkit.train.watchdog.Watchdog`; a compilation or a validation must be faster. None for no watch.

    Raises:
        InputError: if a value is out of range.
    """

    steps: int = 1000
    batch_size: int = 128
    seed: int = 0
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    accumulate: int = 1
    micro_batches: int = field(default=1, metadata=formerly(1))
    ema_decay: float | None = None
    placement: Literal["jit", "pmap"] = "jit"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log_every: int = 50
    log_term_gradients: bool = False
    checkpoint_every: int = 500
    keep_last: int = 3
    keep_best: int = 1
    non_finite: NonFinitePolicy = field(default="skip", metadata=formerly("stop"))
    hang_seconds: float | None = field(default=3600.0, metadata=formerly(None))

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "micro_batches",
            "log_every",
            "checkpoint_every",
            "keep_last",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "keep_best", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name} must be at least 0, got {getattr(self, name)}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError(f"train.clip_norm must be positive, got {self.clip_norm}")
        if self.batch_size % self.parts:
            raise InputError(
                f"train.batch_size must be a multiple of train.accumulate times train.micro_batches, "
                f"got {self.batch_size}, {self.accumulate} and {self.micro_batches}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InputError(f"train.ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.hang_seconds is not None and self.hang_seconds <= 0:
            raise InputError(f"train.hang_seconds must be positive, got {self.hang_seconds}")
        if self.learning_rate <= 0:
            raise InputError(f"train.learning_rate must be positive, got {self.learning_rate}")
        if self.log_term_gradients and (self.placement == "pmap" or self.accumulate > 1):
            raise InputError("train.log_term_gradients needs train.placement=jit and train.accumulate=1")

    @property
    def parts(self) -> int:
        """Into how many parts a batch is cut that go through the model one after the other."""
        return self.accumulate * self.micro_batches


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to 0 at the last step."""
    warmup_steps = min(config.warmup_steps, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup_steps, config.steps)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW on the schedule, after clipping by the global norm."""
    adamw = optax.adamw(
        make_schedule(config),
        b2=0.98,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def check_devices(config: TrainConfig) -> None:
    """Checks that each batch splits evenly over the devices.

    Raises:
        InputError: if it does not, or if the mesh does not fit the devices.
    """
    parts = batch_devices(config.mesh.make()) if config.placement == "jit" else jax.device_count()
    if config.batch_size % (parts * config.parts):
        parts_text = f"{parts} devices" + (f" in {config.parts} parts" if config.parts > 1 else "")
        raise InputError(
            f"train.batch_size={config.batch_size} cannot be split over {parts_text}; "
            f"choose a multiple of {parts * config.parts}"
        )


def data_share(config: TrainConfig) -> BatchShare:
    """The share of each batch that this process reads and feeds."""
    if config.placement == "pmap":
        return BatchShare(jax.process_index(), jax.process_count())
    return batch_share(config.mesh.make())


def make_placement(
    config: TrainConfig,
    init: Callable[[jax.Array], object],
    forward: Forward,
    objective: Objective,
    *,
    rules: Rules = (),
    teacher: Teacher | None = None,
) -> Placement:
    """Places the update that the configuration describes.

    Args:
        config: the settings.
        init: from a key to the model's parameters.
        forward: the model.
        objective: the loss terms.
        rules: how leaves of the state are sharded over the mesh.
        teacher: what gives the step its targets, if that runs in the step; see `repkit.train.teacher`.
    """
    if config.placement == "pmap":
        functions = _functions(config, init, forward, objective, teacher, axis_name=PMAP_AXIS)
        return pmap_placement(*functions, teacher=teacher)
    mesh = config.mesh.make()
    functions = _functions(config, init, forward, _over_mesh(objective, mesh), teacher)
    return jit_placement(*functions, mesh, rules=rules, teacher=teacher)


class TracedUpdate(NamedTuple):
    """A traced step, with shapes, dtypes and shardings of what it takes.

    Attributes:
        program: a `jax.stages.Traced`.
        state: the training state.
        batch: the global batch.
        teacher_params: the teacher's parameters.
    """

    program: Any
    state: Any
    batch: Any
    teacher_params: Any


def trace_update(
    config: TrainConfig,
    init: Callable[[jax.Array], object],
    forward: Forward,
    objective: Objective,
    batch: Batch,
    devices: Sequence[Any],
    *,
    rules: Rules = (),
    teacher: Teacher | None = None,
) -> TracedUpdate:
    """Traces the very step that `make_placement` places, for devices that need not be there; nothing is computed.

    Args:
        config: the settings; the placement is `jit`.
        init: from a key to the model's parameters.
        forward: the model.
        objective: the loss terms.
        batch: a global batch, or the shapes and dtypes of one.
        devices: of the mesh, such as those of `jax.experimental.topologies`.
        rules: how leaves of the state are sharded over the mesh.
        teacher: what gives the step its targets.
    """
    mesh = config.mesh.make(devices)
    functions = _functions(config, init, forward, _over_mesh(objective, mesh), teacher)
    jitted = jit_update(*functions, mesh, rules=rules, teacher=teacher)
    sharding = batch_sharding(mesh)
    rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in batch.items()}
    program = jitted.function.trace(jitted.state, rows, jitted.teacher_params)
    return TracedUpdate(program, jitted.state, rows, jitted.teacher_params)


def _over_mesh(objective: Objective, mesh: Mesh) -> Objective:
    return objective.over_mesh(mesh, batch_axes(mesh)) if batch_devices(mesh) > 1 else objective


def check_step(
    config: TrainConfig,
    init: Callable[[jax.Array], object],
    forward: Forward,
    objective: Objective,
    batch: Batch,
    *,
    teacher: Teacher | None = None,
) -> None:
    """Traces a step on a batch, without any computation, so that what cannot work is known before the run begins.

    Raises:
        InputError: what the model and the losses raise for settings and inputs that they cannot use.
    """
    update, make_state = _functions(config, init, forward, objective, teacher)
    teacher_params = () if teacher is None else teacher.abstract_params()
    jax.eval_shape(update, jax.eval_shape(make_state, jax.random.key(0)), dict(batch), teacher_params)


def _functions(
    config: TrainConfig,
    init: Callable[[jax.Array], object],
    forward: Forward,
    objective: Objective,
    teacher: Teacher | None,
    *,
    axis_name: AxisName | None = None,
) -> tuple[UnplacedUpdate, Callable[[jax.Array], TrainState]]:
    """The update, and what makes the state that it takes."""
    optimizer = make_optimizer(config)
    update = make_update(
        forward,
        objective,
        optimizer,
        teacher=teacher,
        accumulate=config.accumulate,
        micro_batches=config.micro_batches,
        ema_decay=config.ema_decay,
        axis_name=axis_name,
    )

    def make_state(key: jax.Array) -> TrainState:
        return init_state(init, optimizer, objective, key=key, ema=config.ema_decay is not None)

    return update, make_state
