"""Checkpoints of a training run: any pytree, the position in the data and the metrics, one folder for each step.

    <directory>/<step>/state/            the arrays, written by Orbax under their paths, such as `params/image/kernel`
    <directory>/<step>/about/about.json  format, step, metrics, data position; shape and dtype of every leaf
    <directory>/<step>/manifest.json     size and sha256 of every file, versions, and the configuration's hash
    <directory>/unfinished/              the step that is being written
    <directory>/todelete/                steps on their way out
    <directory>/.lock                    held by the process that saves here

A step is written in `unfinished` and gets its name by one rename when all of it, the manifest included, is on the disk:
a listed step is a complete one. Steps leave by a rename into `todelete`. So a process may be killed at any moment; what
it leaves in these two folders goes when the next one opens the directory. Orbax does not notice most flipped bits:
everything is compared with the manifest before it is read.
"""

import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import repkit
from repkit.checks import InputError, RunWarning, require_choice, unknown_name
from repkit.lock import FolderLock
from repkit.train.manifest import MANIFEST_FILE, Damage, check_files, folder_to_disk, read_manifest, write_manifest
from repkit.train.memory import return_freed_memory
from repkit.train.processes import barrier, from_first

_FORMAT = 2
_WITHOUT_MANIFEST = 1
"""The format before there were manifests; it is read as it is."""

_STATE, _ABOUT_FILE = "state", "about/about.json"
_UNFINISHED, _TO_DELETE = "unfinished", "todelete"
_PLAIN_TYPES = (bool, int, float, str)
_NAMED_AT_MOST = 5

Verify = Literal["contents", "nothing"]
"""Whether a checkpoint is compared with its manifest before it is restored: all of its bytes, or nothing at all."""


class DamagedCheckpointError(InputError):
    """A checkpoint is not what was written; the message names the file."""


class SaveFailedError(OSError):
    """A checkpoint could not be written; the older ones are as they were."""


class _OrbaxChatter(logging.Filter):
    """Drops what Orbax logs; its failures come as exceptions, and each of them besides as pages of traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


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
        config_hash: of the run's configuration; a checkpoint that was saved with another is refused. None accepts all.
        verify: whether checkpoints are compared with their manifests, at about 2 GB/s for each core.

    Raises:
        InputError: `directory` is a file, or `best_mode` or `verify` is none of its values.

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
        config_hash: str | None = None,
        verify: Verify = "contents",
    ):
        require_choice("best_mode", best_mode, ["max", "min"])
        require_choice("verify", verify, get_args(Verify))
        self.directory = Path(directory).absolute()
        self.best_metric = best_metric
        self.best_mode = best_mode
        self.config_hash = config_hash
        self.verify = verify
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
        ranked = self._ranked({step: self._metrics_if_readable(step) for step in self.steps()})
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
            step: the step to restore; None restores the latest good one, and warns of each damaged one after it.

        Returns:
            The step, the state and the data position.

        Raises:
            InputError: no checkpoint there; the one that was asked for, or all of them, are damaged; it belongs to
                another configuration; or its leaves differ from those of `like`, whose paths the message names.
        """
        if step is not None:
            return self._restore(like, step)
        return self._newest_good(lambda candidate: self._restore(like, candidate))

    def read(self, *under: str, step: int | None = None) -> Restored:
        """Reads a part of a state onto the host, whatever its structure: for fine-tuning, or to look at it.

        Args:
            under: how the paths of the leaves begin, such as `"params/image/"`. Of several, the first that leads to any
                leaf counts: `"ema/", "params/"` are the parameters to evaluate of a training state.
            step: as for `restore`.

        Returns:
            The step, the leaves by path (numpy arrays, random keys and Python values) and the data position.

        Raises:
            InputError: no leaf has such a path; and as `restore` does.
        """
        if step is not None:
            return self._read(under, step)
        return self._newest_good(lambda candidate: self._read(under, candidate))

    def _newest_good(self, restore: Callable[[int], Restored]) -> Restored:
        if jax.process_count() > 1:
            # One process looks, and all take what it found.
            found = self._newest_of(self._verified) if jax.process_index() == 0 else None
            return restore(from_first(-1 if found is None else found.step))
        return self._newest_of(restore)

    def _newest_of(self, restore: Callable[[int], Restored]) -> Restored:
        damaged: dict[int, DamagedCheckpointError] = {}
        while candidates := [step for step in self.steps() if step not in damaged]:
            step = max(candidates)
            try:
                restored = restore(step)
            except DamagedCheckpointError as error:
                # One that is gone was deleted by the run that saves here, and a newer one has come.
                if step in self.steps():
                    damaged[step] = error
                continue
            for error in damaged.values():
                warnings.warn(f"{error}; step {step} is taken instead", RunWarning, stacklevel=3)
            return restored
        if not damaged:
            raise InputError(f"no checkpoint in {self.directory}")
        raise DamagedCheckpointError(
            f"no checkpoint in {self.directory} is good: {'; '.join(str(error) for error in damaged.values())}"
        )

    def _verified(self, step: int) -> Restored:
        about = self._verified_about(step)
        return Restored(step, None, about["data_position"])

    def _restore(self, like: Any, step: int) -> Restored:
        about = self._verified_about(step)
        targets = _leaves_by_path(like)
        _check_width(targets)
        self._check_fit(step, about["leaves"], targets)
        stored = {path: leaf for path, leaf in targets.items() if _is_stored(about["leaves"][path])}
        arrays = self._read_arrays(step, stored)
        leaves = [_restored_leaf(about["leaves"][path], arrays.get(path), leaf) for path, leaf in targets.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), about["data_position"])

    def _read(self, under: Sequence[str], step: int) -> Restored:
        about = self._verified_about(step)
        leaves = about["leaves"]
        found = ({path: leaf for path, leaf in leaves.items() if path.startswith(prefix)} for prefix in under)
        chosen = next(filter(None, found), None)
        if chosen is None:
            wanted, there = " or ".join(map(repr, under)), sorted({path.partition("/")[0] for path in leaves})
            raise InputError(
                f"checkpoint {self.directory / str(step)} has nothing under {wanted}; there: {', '.join(there)}"
            )
        arrays = self._read_arrays(step, {path: _ON_HOST for path, saved in chosen.items() if _is_stored(saved)})
        on_host = {path: _leaf_on_host(saved, arrays.get(path)) for path, saved in chosen.items()}
        return Restored(step, on_host, about["data_position"])

    def _verified_about(self, step: int) -> dict[str, Any]:
        about = self._about(step)
        if about["format"] != _WITHOUT_MANIFEST and self.verify == "contents":
            folder = self.directory / str(step)
            try:
                manifest = read_manifest(folder)
                if manifest.get("step") != step:
                    raise Damage(MANIFEST_FILE, f"is that of step {manifest.get('step')}")
                if jax.process_index() == 0:
                    check_files(folder, manifest)
            except Damage as damage:
                raise self._damaged(step, damage) from damage
            saved = manifest.get("config")
            if saved is not None and self.config_hash is not None and saved != self.config_hash:
                raise InputError(
                    f"checkpoint {folder} was saved by a run with another configuration "
                    f"({saved[:12]}…, here it is {self.config_hash[:12]}…)"
                )
        return about

    def _about(self, step: int) -> dict[str, Any]:
        """What about.json says; what it says is believed where it agrees with the manifest."""
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"no checkpoint of step {step} in {self.directory}; there: {have}")
        folder = self.directory / str(step)
        try:
            about = json.loads((folder / _ABOUT_FILE).read_text())
            found = about["format"]
            if found in (_WITHOUT_MANIFEST, _FORMAT):
                _check_about(about)
            if (folder / MANIFEST_FILE).exists() and self.verify == "contents":
                check_files(folder, read_manifest(folder), [_ABOUT_FILE])
        except Damage as damage:
            raise self._damaged(step, damage) from damage
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({_reason(error)})"
            raise self._damaged(step, Damage(_ABOUT_FILE, reason)) from error
        if found not in (_WITHOUT_MANIFEST, _FORMAT):
            raise InputError(
                f"checkpoint {folder} has format {found}, this version of repkit reads {_WITHOUT_MANIFEST} and "
                f"{_FORMAT}; load it with the version that wrote it"
            )
        return about

    def _read_arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        if not targets:
            return {}
        # Orbax asks for a tree of the same keys beside the arguments; what its leaves are makes no difference.
        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(targets, 0),
            restore_args={path: _restore_arguments(leaf) for path, leaf in targets.items()},
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                return reader.restore(self.directory / str(step) / _STATE, args=arguments)
        # Damaged files make it raise nearly anything.
        except Exception as error:
            raise self._damaged(step, Damage(_STATE, f"cannot be read ({_reason(error)})")) from error

    def _damaged(self, step: int, damage: Damage) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"checkpoint {self.directory / str(step)} is damaged: {damage}")

    def _metrics_if_readable(self, step: int) -> dict[str, float]:
        # A damaged step must not keep a run from starting: whoever restores it is told.
        try:
            return self.metrics(step)
        except InputError:
            return {}

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

    The directory belongs to one process at a time, from the making of the object to `close`. A run's steps ascend:
    saving a step again is a no-op, unless it brings metrics that the step was not saved with; after an earlier step was
    restored, the first save removes the later ones, because they belong to a continuation that was given up or are
    damaged.

    Args:
        directory: where the checkpoints go; made if it is not there. What a killed process left unfinished is removed.
        keep_last: number of latest steps to keep, at least 1.
        keep_best: number of steps to keep besides for their `best_metric`; of equal ones the later.
        best_metric: name of the metric that ranks the steps; None keeps none for its metric.
        best_mode: "max" if a larger metric is better, "min" if a smaller one is.
        config_hash: of the run's configuration; it is saved with every step, and asked of every step that is restored.
        verify: as for `CheckpointReader`.

    Raises:
        InputError: another process has the directory; it is a file or cannot be written; or an argument is out of its
            range.

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
        config_hash: str | None = None,
        verify: Verify = "contents",
    ):
        super().__init__(
            directory, best_metric=best_metric, best_mode=best_mode, config_hash=config_hash, verify=verify
        )
        if keep_last < 1 or keep_best < 0:
            raise InputError(
                f"expected keep_last >= 1 and keep_best >= 0, got keep_last={keep_last}, keep_best={keep_best}"
            )
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._lock = self._opened()
        self._sweep()
        self._saved_metrics = {step: self._metrics_if_readable(step) for step in self.steps()}
        self._ours: set[int] = set()
        self._restored_step: int | None = None
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._unfinished: tuple[int, Future[None]] | None = None

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
            InputError: a leaf of another type; a data position that is not JSON; metrics without `best_metric`; later
                steps in the directory that no earlier restore has left behind; or the directory was removed.
            SaveFailedError: this or the previous checkpoint could not be written, on a full disk for instance. The
                steps that were there are as they were, and a later save may succeed.
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
        self._require_lock()
        self._remove_given_up(step)
        staging = self.directory / _UNFINISHED / str(step)
        try:
            if self._lock is not None:
                staging.mkdir(parents=True)
            if arrays:
                self._writer.save(staging / _STATE, args=ocp.args.PyTreeSave(arrays))
        except (OSError, ValueError) as error:
            self._sweep()
            raise self._save_failed(step, error) from error
        self._unfinished = (step, self._thread.submit(self._finish, step, about))

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Restores as `CheckpointReader.restore` does; the steps saved from now on continue from there."""
        self.wait()
        restored = super().restore(like, step)
        self._restored_step = restored.step
        self._ours = {ours for ours in self._ours if ours < restored.step} | {restored.step}
        return restored

    def wait(self) -> None:
        """Returns when everything is written, and raises what went wrong in the writing.

        Raises:
            SaveFailedError: as for `save`.
        """
        if self._unfinished is None:
            return
        (step, writing), self._unfinished = self._unfinished, None
        try:
            writing.result()
        except (OSError, ValueError) as error:
            self._sweep()
            raise self._save_failed(step, error) from error
        # The first process gives the step its name; then it is there for all.
        barrier(f"the checkpoint of step {step}")

    def close(self) -> None:
        """Waits for the writing to end, frees the threads and gives the directory up."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _opened(self) -> FolderLock | None:
        """Takes the directory; the first process does so for all."""
        if jax.process_index() > 0:
            return None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            return FolderLock(self.directory)
        except OSError as error:
            raise InputError(
                f"cannot write to checkpoint directory {self.directory}: {error.strerror}; choose another"
            ) from error

    def _require_lock(self) -> None:
        if self._lock is not None and not self._lock.is_held():
            raise InputError(
                f"{self.directory} was removed or replaced while this process used it; nothing is written there"
            )

    def _sweep(self) -> None:
        """Removes what is unfinished or given up, of a process that was killed as well."""
        if self._lock is not None and self._lock.is_held():
            unfinished = [path for path in self.directory.iterdir() if ".orbax-checkpoint-tmp" in path.name]
            for path in (self.directory / _UNFINISHED, self.directory / _TO_DELETE, *unfinished):
                shutil.rmtree(path, ignore_errors=True)

    def _finish(self, step: int, about: Mapping[str, Any]) -> None:
        """Waits for the arrays, completes the step and gives it its name; then removes what is not to be kept."""
        self._writer.wait_until_finished()
        if self._lock is not None:
            self._publish(step, about)
        self._saved_metrics[step] = about["metrics"]
        self._ours.add(step)
        if self._lock is not None:
            keep = self._steps_to_keep()
            self._delete([other for other in self.steps() if other not in keep])
            self._sweep()
        return_freed_memory()

    def _publish(self, step: int, about: Mapping[str, Any]) -> None:
        staging, final = self.directory / _UNFINISHED / str(step), self.directory / str(step)
        about_file = staging / _ABOUT_FILE
        about_file.parent.mkdir()
        about_file.write_text(json.dumps(about))
        versions = {"repkit": repkit.__version__, "jax": jax.__version__}
        write_manifest(staging, {"format": _FORMAT, "step": step, "config": self.config_hash, **versions})
        self._require_lock()
        self._delete([step] if final.exists() else [])
        staging.rename(final)
        folder_to_disk(self.directory)

    def _steps_to_keep(self) -> set[int]:
        steps = self.steps()
        best = self._ranked({step: self._saved_metrics.get(step, {}) for step in steps})[: self.keep_best]
        return {*steps[-self.keep_last :], *best}

    def _remove_given_up(self, step: int) -> None:
        """Removes the steps after the one that was restored; refuses to save where none was and they are in the way."""
        there = self.steps()
        foreign = [other for other in there if other not in self._ours]
        in_the_way = [other for other in there if other > step and other in self._ours]
        if self._restored_step is None:
            in_the_way += [other for other in foreign if other >= step]
        if in_the_way:
            raise InputError(
                f"{self.directory} already holds step {max(in_the_way)}, so that step {step} cannot be saved;"
                " restore an earlier step first, or choose another directory"
            )
        if self._restored_step is not None and self._lock is not None:
            self._delete([other for other in foreign if other > self._restored_step])
            self._sweep()

    def _delete(self, steps: Iterable[int]) -> None:
        """Takes steps off the list at once, each by a rename; `_sweep` frees their space."""
        for step in steps:
            leaving = self.directory / _TO_DELETE / str(step)
            shutil.rmtree(leaving, ignore_errors=True)
            leaving.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(leaving)

    def _save_failed(self, step: int, error: Exception) -> SaveFailedError:
        newest = self.latest_step()
        kept = "there is none before it" if newest is None else f"the newest one is that of step {newest}"
        return SaveFailedError(
            f"the checkpoint of step {step} cannot be written to {self.directory} ({_reason(error)}); {kept}"
        )


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


def _check_about(about: Mapping[str, Any]) -> None:
    """Raises `ValueError` or what wrong types raise, where about.json is not as `save` writes it."""
    if not isinstance(about["data_position"], dict):
        raise ValueError("its data position is no object")
    if not all(type(value) in (int, float) for value in about["metrics"].values()):
        raise ValueError("its metrics are no numbers")
    for path, leaf in about["leaves"].items():
        if "python" in leaf:
            is_right = type(leaf["value"]) in _PLAIN_TYPES and type(leaf["value"]).__name__ == leaf["python"]
        else:
            is_right = isinstance(leaf["dtype"], str) and all(type(size) is int and size >= 0 for size in leaf["shape"])
            if "generator" in leaf:
                jax.random.key(0, impl=leaf["generator"])
            else:
                is_right = is_right and jnp.dtype(leaf["dtype"]) is not None
        if not is_right:
            raise ValueError(f"it says of {path} what cannot be")


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


def _reason(error: Exception) -> str:
    """The operating system's reason where there is one: below Orbax, it stands at the end of a long line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


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


_ON_HOST = np.zeros(())
"""Asks for a numpy array; its shape and dtype are those that were saved."""


def _leaf_on_host(saved: Mapping[str, Any], array: Any) -> Any:
    if "python" in saved:
        return saved["value"]
    if array is None:
        return np.empty(saved["shape"], jnp.dtype(saved["dtype"]))
    return jax.random.wrap_key_data(array, impl=saved["generator"]) if "generator" in saved else array


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
