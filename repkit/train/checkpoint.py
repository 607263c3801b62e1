"""Checkpoints of a training run: any pytree, the position in the data and the metrics, one folder for each step.

    <directory>/<step>/state/            the arrays, written by Orbax under their paths, such as `params/image/kernel`
    <directory>/<step>/about/about.json  format, step, metrics, data position; shape and dtype of every leaf
    <directory>/todelete/                steps on their way out

A step's folder gets its name only when all of it is written, so that a listed step is a complete one. Steps leave by a
rename into `todelete`: a process killed while it deletes leaves no half-deleted step behind among the good ones.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationPolicy

from repkit.checks import InputError, unknown_name

_FORMAT = 1
_STATE, _ABOUT, _ABOUT_FILE, _TO_DELETE = "state", "about", "about.json", "todelete"
_PLAIN_TYPES = (bool, int, float, str)
_NAMED_AT_MOST = 5


class _OrbaxChatter(logging.Filter):
    """Drops what Orbax logs below the level of an error; its failures still come, and as exceptions."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


logging.getLogger("absl").addFilter(_OrbaxChatter())


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
        step: the step it was saved at.
        state: the state, in the structure and with the shardings asked for.
        data_position: the position in the data, as it was handed to `save`.
    """

    step: int
    state: Any
    data_position: dict[str, Any]


class CheckpointReader:
    """Reads the checkpoints in a directory and changes nothing in it, so that a run can be read while it trains.

    Args:
        directory: where the checkpoints are; a local or mounted path.
        best_metric: name of the metric by which steps are ranked; None ranks none.
        best_mode: "max" if a larger metric is better, "min" if a smaller one is.

    Raises:
        InputError: `directory` is a file, or `best_mode` is neither "max" nor "min".

    Example:
        >>> CheckpointReader("no/such/run").steps()
        []
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
    ):
        if best_mode not in ("max", "min"):
            raise unknown_name("best_mode", best_mode, ["max", "min"])
        self.directory = Path(directory).absolute()
        self.best_metric = best_metric
        self.best_mode = best_mode
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"checkpoint directory {self.directory} is a file; name a directory")

    def steps(self) -> list[int]:
        """The steps that are completely written, ascending; one that is still being written is not among them."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(entry.name) for entry in self.directory.iterdir() if entry.name.isdecimal() and entry.is_dir()
        )

    def latest_step(self) -> int | None:
        """The last completely written step; None where there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the best finite `best_metric`, of equals the latest; None where there is none."""
        ranked = self._ranked({step: self.metrics(step) for step in self.steps()})
        return ranked[0] if ranked else None

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a step; empty if none were.

        Raises:
            InputError: there is no such step, or it cannot be read.
        """
        return self._about(step)["metrics"]

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Restores a state, strictly: every leaf must be there, and have the shape and dtype that `like` asks for.

        Args:
            like: a pytree of the state's structure. A `jax.ShapeDtypeStruct` or `jax.Array` brings back a jax array
                with that sharding (the first device where it names none), on whatever number of devices; a numpy array
                or number brings back numpy; a Python bool, int, float or str brings back the saved one.
            step: the step to restore; None restores the latest.

        Returns:
            The step, the state and the data position.

        Raises:
            InputError: no checkpoint there; the checkpoint is damaged; or its leaves differ from those of `like`, whose
                paths the message names.
        """
        if step is None:
            step = self.latest_step()
        if step is None:
            raise InputError(f"no checkpoint in {self.directory}")
        about = self._about(step)
        targets = _leaves_by_path(like)
        _check_width(targets)
        self._check_fit(step, about["leaves"], targets)
        stored = {path: leaf for path, leaf in targets.items() if _is_stored(about["leaves"][path])}
        arrays = self._read_arrays(step, stored)
        leaves = [_restored_leaf(about["leaves"][path], arrays.get(path), leaf) for path, leaf in targets.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), about["data_position"])

    def _about(self, step: int) -> dict[str, Any]:
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"no checkpoint of step {step} in {self.directory}; there: {have}")
        try:
            about = json.loads((self.directory / str(step) / _ABOUT / _ABOUT_FILE).read_text())
            found = about["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(step, error) from error
        if found != _FORMAT:
            raise InputError(
                f"checkpoint {self.directory / str(step)} has format {found}, this version of repkit reads {_FORMAT}"
            )
        return about

    def _read_arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        if not targets:
            return {}
        # Orbax asks for a tree of the same keys beside the arguments; what its leaves are makes no difference.
        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(targets, 0),
            restore_args={path: _restore_arguments(leaf) for path, leaf in targets.items()},
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                return reader.restore(self.directory / str(step) / _STATE, args=arguments)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> InputError:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
        return InputError(
            f"checkpoint {self.directory / str(step)} is incomplete or damaged ({reason}); other steps there: {others}"
        )

    def _check_fit(self, step: int, saved: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
        expected = {path: _description(path, leaf) for path, leaf in targets.items()}
        complaints = {
            "not in the checkpoint": [path for path in expected if path not in saved],
            "only in the checkpoint": [path for path in saved if path not in expected],
            "different": [
                f"{path} (saved {_shown(saved[path])}, expected {_shown(expected[path])})"
                for path in expected
                if path in saved and _kind(saved[path]) != _kind(expected[path])
            ],
        }
        if any(complaints.values()):
            text = "; ".join(f"{what}: {_listed(paths)}" for what, paths in complaints.items() if paths)
            raise InputError(f"checkpoint {self.directory / str(step)} does not fit the state to restore: {text}")

    def _ranked(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Steps from best to worst; those without a finite value of the metric are left out."""
        sign = 1 if self.best_mode == "max" else -1
        scores = {step: sign * values.get(self.best_metric or "", math.nan) for step, values in metrics.items()}
        finite = [step for step, score in scores.items() if math.isfinite(score)]
        return sorted(finite, key=lambda step: (scores[step], step), reverse=True)


class Checkpointer(CheckpointReader):
    """Saves the checkpoints of a run, in the background, and keeps the last and the best; restores them.

    The directory belongs to one run at a time. A run's steps ascend: saving a step again is a no-op, unless it brings
    metrics that the step was not saved with; after an earlier step was restored, the first save removes the later ones,
    because they belong to a continuation that was given up.

    Args:
        directory: where the checkpoints go; made if it is not there.
        keep_last: number of latest steps to keep, at least 1.
        keep_best: number of steps to keep besides for their `best_metric`; of equal ones the later.
        best_metric: name of the metric that ranks the steps; None keeps none for its metric.
        best_mode: "max" if a larger metric is better, "min" if a smaller one is.

    Raises:
        InputError: the directory is a file or cannot be written, or an argument is out of its range.

    Example:
        >>> import tempfile
        >>> state = {"params": {"kernel": jnp.ones((2, 3))}, "key": jax.random.key(0), "step": 7}
        >>> with tempfile.TemporaryDirectory() as directory, Checkpointer(directory) as checkpoints:
        ...     checkpoints.save(7, state, {"example": 448}, {"loss": 0.25})
        ...     checkpoints.wait()
        ...     step, restored, data_position = checkpoints.restore(like=state)
        >>> step, restored["step"], restored["params"]["kernel"].sum().item(), data_position
        (7, 7, 6.0, {'example': 448})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
    ):
        super().__init__(directory, best_metric=best_metric, best_mode=best_mode)
        if keep_last < 1 or keep_best < 0:
            raise InputError(
                f"expected keep_last >= 1 and keep_best >= 0, got keep_last={keep_last}, keep_best={keep_best}"
            )
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._require_writable()
        self._saved_metrics = {step: self._metrics_if_readable(step) for step in self.steps()}
        self._ours: set[int] = set()
        self._restored_step: int | None = None
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(self._steps_to_keep), todelete_subdir=_TO_DELETE, cleanup_tmp_directories=True
            ),
            item_handlers={
                _STATE: ocp.PyTreeCheckpointHandler(),
                _ABOUT: ocp.JsonCheckpointHandler(filename=_ABOUT_FILE),
            },
        )

    def save(
        self, step: int, state: Any, data_position: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Starts to write a checkpoint and returns once nothing of the state is needed any more.

        The state's buffers may be donated or overwritten as soon as this returns. An error of the writing itself comes
        from the next `save`, from `wait` or from `close`.

        Args:
            step: the step, at least 0.
            state: a pytree of jax arrays, typed random keys, numpy arrays and numbers, Python bools, ints, floats and
                strs.
            data_position: a JSON-able dict.
            metrics: scalars by name; those of a step that is to be ranked hold `best_metric`.

        Raises:
            InputError: a leaf of another type; a data position that is not JSON; metrics without `best_metric`; or
                later steps in the directory that no earlier restore has left behind.
            OSError, ValueError: the writing of the previous checkpoint failed, on a full disk for instance.
        """
        step = int(step)
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if values and self.best_metric is not None and self.best_metric not in values:
            raise unknown_name("best_metric", self.best_metric, values)
        self.wait()
        known = step in self._ours and step in self.steps()
        if known and (not values or values == self._saved_metrics[step]):
            return
        leaves = _leaves_by_path(state)
        about = {
            "format": _FORMAT,
            "step": step,
            "metrics": values,
            "data_position": _json_copy(data_position),
            "leaves": {path: _description(path, leaf) for path, leaf in leaves.items()},
        }
        arrays = {path: _storable(leaf) for path, leaf in leaves.items() if _is_stored(about["leaves"][path])}
        self._remove_from(step)
        self._saved_metrics[step] = values
        self._ours.add(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{_STATE: ocp.args.PyTreeSave(arrays), _ABOUT: ocp.args.JsonSave(about)},
            ),
            force=True,
        )

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Restores as `CheckpointReader.restore` does; the steps saved from now on continue from there."""
        self.wait()
        restored = super().restore(like, step)
        self._restored_step = restored.step
        self._ours = {ours for ours in self._ours if ours < restored.step} | {restored.step}
        return restored

    def wait(self) -> None:
        """Returns when everything is written, and raises what went wrong in the writing."""
        self._manager.wait_until_finished()
        self._empty_to_delete()

    def close(self) -> None:
        """Waits for the writing to end and frees the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _steps_to_keep(self, steps: list[int]) -> set[int]:
        best = self._ranked({step: self._saved_metrics.get(step, {}) for step in steps})[: self.keep_best]
        return {*sorted(steps)[-self.keep_last :], *best}

    def _remove_from(self, step: int) -> None:
        """Removes a step and what follows it, if a restore has left it behind."""
        stale = [other for other in self._manager.all_steps() if other >= step]
        in_the_way = [s for s in stale if (s > step if s in self._ours else self._restored_step is None)]
        if in_the_way:
            raise InputError(
                f"{self.directory} already holds step {max(in_the_way)}, so that step {step} cannot be saved;"
                " restore an earlier step first, or choose another directory"
            )
        for other in stale:
            self._manager.delete(other)

    def _require_writable(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
            self._empty_to_delete()
        except OSError as error:
            raise InputError(
                f"cannot write to checkpoint directory {self.directory}: {error.strerror}; choose another"
            ) from error

    def _empty_to_delete(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / _TO_DELETE, ignore_errors=True)

    def _metrics_if_readable(self, step: int) -> dict[str, float]:
        # A damaged step must not keep the run from starting: whoever restores it is told.
        try:
            return self.metrics(step)
        except InputError:
            return {}


class _Keep(PreservationPolicy):
    """Tells Orbax which steps stay."""

    def __init__(self, steps_to_keep: Callable[[list[int]], set[int]]):
        self._steps_to_keep = steps_to_keep

    def should_preserve(self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: object) -> list[bool]:
        keep = self._steps_to_keep([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in keep for checkpoint in checkpoints]


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    flat = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    leaves = dict(flat)
    if len(leaves) < len(flat):
        names = [path for path, _ in flat]
        raise InputError(f"two leaves of the state have one path: {next(p for p in names if names.count(p) > 1)}")
    return leaves


def _is_numeric(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, np.number) or jnp.issubdtype(leaf.dtype, np.bool_) or _is_key(leaf)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _description(path: str, leaf: Any) -> dict[str, Any]:
    """What about.json says of a leaf: Python type and value, or shape, dtype and the generator of a random key."""
    if type(leaf) in _PLAIN_TYPES:
        return {"python": type(leaf).__name__, "value": leaf}
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic) or not _is_numeric(leaf):
        raise InputError(
            f"a checkpoint holds arrays, numbers and strings; {path or 'the state'} is {type(leaf).__name__}"
        )
    description: dict[str, Any] = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        description["generator"] = str(jax.random.key_impl(leaf))
    return description


def _check_width(targets: Mapping[str, Any]) -> None:
    for path, leaf in targets.items():
        on_device = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not _is_key(leaf)
        if on_device and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise InputError(
                f"{path} is to be restored as a {leaf.dtype} jax array, which jax would cut to 32 bits;"
                " set jax_enable_x64, or ask for a numpy array"
            )


def _kind(description: Mapping[str, Any]) -> Any:
    return description.get("python") or (description["dtype"], description["shape"])


def _shown(description: Mapping[str, Any]) -> str:
    return description.get("python") or f"{description['dtype']}[{','.join(map(str, description['shape']))}]"


def _listed(paths: list[str]) -> str:
    rest = len(paths) - _NAMED_AT_MOST
    return ", ".join(paths[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def _is_stored(description: Mapping[str, Any]) -> bool:
    """Python values are in about.json, and Orbax refuses arrays without elements."""
    return "python" not in description and 0 not in description["shape"]


def _storable(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    # A copy, because the caller may write into the array while it is being saved.
    return np.array(leaf)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _restore_arguments(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, np.ndarray | np.generic):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=_sharding(leaf))


def _restored_leaf(saved: Mapping[str, Any], array: Any, like: Any) -> Any:
    if "python" in saved:
        return saved["value"]
    if array is None:
        array = _empty(like)
    if "generator" in saved and not isinstance(like, np.ndarray | np.generic):
        return jax.random.wrap_key_data(array, impl=saved["generator"])
    return array[()] if isinstance(like, np.generic) else array


def _empty(like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(like.shape, like.dtype)
    if _is_key(like):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(like.shape, like.dtype))
        return jnp.empty(data.shape, data.dtype)
    return jax.device_put(jnp.empty(like.shape, like.dtype), _sharding(like))


def _json_copy(data_position: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(data_position)))
    except (TypeError, ValueError) as error:
        raise InputError(f"the data position must be a JSON-able dict: {error}") from error
