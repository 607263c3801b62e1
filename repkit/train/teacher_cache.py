"""What a frozen teacher says of every example of a data set, kept on disk and joined to the batches by example.

    <directory>/manifest.json   which teacher, which data, which inputs; path, shape and dtype of every array
    <directory>/000.npy ...     one array for each path [examples ...], memory-mapped
    <directory>/inputs.npy      checksums of each example's inputs [examples, inputs]
    <directory>/known.npy       which examples the teacher saw [examples]; the others were corrupt

The folder gets its name when all of it is written: an interrupted writing leaves `<directory>.partial`, which cannot be
opened, and the next writing begins anew.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, UInt32

from repkit.checks import InputError, require_choice, unknown_name
from repkit.objective import value_at
from repkit.train.loop import Batches
from repkit.train.mesh import batch_devices, make_mesh, put_batch, state_shardings
from repkit.train.step import TEACHER_ARRAYS, Batch
from repkit.train.teacher import FrozenTeacher

_FORMAT = 1
_MANIFEST, _INPUTS, _KNOWN = "manifest.json", "inputs.npy", "known.npy"
_NAMED_AT_MOST = 5
NOT_INPUTS = frozenset({"example_id", "where"})
"""Fields of a batch that say which example a row is, and not what it is."""


class Records(Protocol):
    """Random access to the records of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def data_identity(records: Records, *, sample: int = 64, ignore: Iterable[str] = ("origin",)) -> str:
    """sha256 over the number of records and a sample of them, spread evenly over the data set.

    Args:
        records: a data source; a record is made of mappings, sequences, arrays, bytes, text and numbers.
        sample: how many records are looked at.
        ignore: names in a record that do not matter, such as where a file lies.

    Returns:
        64 hexadecimal digits, the same on every machine.

    Raises:
        InputError: no records, or a record that holds something else.

    Example:
        >>> data_identity([{"text": "a red seven", "origin": "a.jsonl"}])[:12]
        '751d6ab3ca9b'
    """
    if not len(records):
        raise InputError("data_identity: expected at least one record, got none")
    ignored = frozenset(ignore)
    digest = hashlib.sha256(f"{len(records)}".encode())
    for index in sorted(set(np.linspace(0, len(records) - 1, sample).round().astype(int).tolist())):
        try:
            parts = list(_encoded(records[index], ignored))
        except InputError:
            raise
        except (ValueError, OSError):
            parts = [b"unreadable"]  # so it will be for everybody with the same data
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _encoded(value: Any, ignored: frozenset[str]) -> Iterator[bytes]:
    match value:
        case Mapping():
            kept = sorted(name for name in value if name not in ignored)
            yield f"mapping {len(kept)}".encode()
            for name in kept:
                yield str(name).encode()
                yield from _encoded(value[name], ignored)
        case np.ndarray():
            yield f"array {value.dtype} {value.shape}".encode()
            yield value.tobytes()
        case bytes():
            yield b"bytes"
            yield value
        case str() | int() | float() | None | np.generic():
            # A numpy number and a Python number of one value are one value.
            plain = value.item() if isinstance(value, np.generic) else value
            yield f"{type(plain).__name__} {plain!r}".encode()
        case Sequence():
            yield f"sequence {len(value)}".encode()
            for part in value:
                yield from _encoded(part, ignored)
        case _:
            raise InputError(
                f"data_identity: expected records of mappings, sequences, arrays, bytes, text and numbers, "
                f"got a {type(value).__name__}; give the cache a name of your own for the data"
            )


def write_cache(
    directory: str | os.PathLike[str],
    teacher: FrozenTeacher,
    batches: Iterable[Batch],
    *,
    paths: Sequence[str],
    examples: int,
    data: str,
    inputs: Sequence[str] | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    mesh: Mesh | None = None,
) -> None:
    """Runs a teacher once over a data set and keeps what it says.

    Run it in one process. The folder appears when all is written; a writing that was interrupted begins anew.

    Args:
        directory: where the cache goes; nothing may be there.
        teacher: the teacher, whose outputs hold the paths.
        batches: one pass over the data, each example in one row, with `example_id` and `where`; rows with `where` False
            (padding, corrupt examples) are left out. Inputs must be as in training: no augmentation, no random choice.
        paths: dotted paths of the outputs to keep, with one entry per row, such as
            `repkit.objective.Objective.teacher_paths` gives them. Queries and keys take length x width numbers where
            maps take heads x length^2.
        examples: number of examples of the data set; every `example_id` is below it.
        data: which data these are: `data_identity` of the source, or a name of your own.
        inputs: fields of a batch that the outputs depend on. Their checksums are kept, and each later batch is compared
            with them. None takes all but `example_id` and `where`.
        dtype: of floating-point outputs on disk; others keep theirs.
        mesh: devices to run on; None takes the first.

    Raises:
        InputError: something is there already; a path leads nowhere or to something without rows; an output of a valid
            row is not finite in `dtype`; examples do not come, or have an unknown number; too little disk space.
    """
    directory = Path(directory)
    require_choice("dtype", dtype, ["float16", "float32"])
    if not paths:
        raise InputError("write_cache: expected at least one path of the teacher's outputs, got none")
    if directory.exists():
        raise InputError(f"write_cache: '{directory}' is already there; open it, or remove it to write it anew")
    partial = _partial(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        writer = _Writer(partial, examples, inputs)
        for batch, outputs in _outputs(teacher, batches, paths, dtype, mesh):
            writer.add(batch, outputs)
        arrays = writer.close()
        about = {
            "format": _FORMAT,
            "teacher": teacher.identity,
            "data": data,
            "examples": examples,
            "inputs": list(writer.inputs),
            "arrays": arrays,
        }
        with (partial / _MANIFEST).open("w") as file:
            json.dump(about, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _Outputs(NamedTuple):
    """One path's outputs for a batch, and which rows are finite."""

    values: Array
    is_finite: Bool[Array, " b"]


def _outputs(
    teacher: FrozenTeacher, batches: Iterable[Batch], paths: Sequence[str], dtype: str, mesh: Mesh | None
) -> Iterator[tuple[Batch, dict[str, _Outputs]]]:
    """Batches with the teacher's outputs by path; the device computes one batch while the last one is being written."""
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    params = teacher.put_params(state_shardings(teacher.abstract_params(), mesh, teacher.rules))

    def chosen(params: Any, batch: Batch) -> dict[str, _Outputs]:
        outputs = {"teacher": teacher.forward(params, batch, None)}
        return {path: stored(path, value_at(outputs, f"teacher.{path}", "write_cache"), batch) for path in paths}

    def stored(path: str, values: Any, batch: Batch) -> _Outputs:
        rows = len(batch["where"])
        if not hasattr(values, "shape") or values.shape[:1] != (rows,):
            what = f"{values.dtype}{list(values.shape)}" if hasattr(values, "shape") else type(values).__name__
            raise InputError(f"write_cache: expected {rows} rows at '{path}', got {what}")
        if not jnp.issubdtype(values.dtype, jnp.floating):
            return _Outputs(values, jnp.ones(rows, bool))
        values = values.astype(dtype)
        return _Outputs(values, jnp.all(jnp.isfinite(values), axis=tuple(range(1, values.ndim))))

    run = jax.jit(chosen)
    running = None
    for batch in batches:
        rows, parts = len(batch["where"]), batch_devices(mesh)
        if rows % parts:
            raise InputError(f"write_cache: a batch of {rows} rows cannot be split over {parts} devices")
        started = (batch, run(params, put_batch(batch, mesh)))
        if running is not None:
            yield running
        running = started
    if running is not None:
        yield running


class _Writer:
    """Takes rows in any order and puts each at its example's place."""

    def __init__(self, folder: Path, examples: int, inputs: Sequence[str] | None):
        self._folder = folder
        self._examples = examples
        self._asked_for = inputs
        self.inputs: tuple[str, ...] = ()
        self._arrays: dict[str, np.memmap] = {}
        self._checksums = np.zeros((0, 0), np.uint32)
        self._known = np.zeros(examples, bool)
        self._came = np.zeros(examples, bool)

    def add(self, batch: Batch, outputs: Mapping[str, _Outputs]) -> None:
        example_id, where = _rows(batch)
        if not self._arrays:
            self._begin(batch, outputs)
        ids = example_id[where]
        in_range = (example_id >= 0) & (example_id < self._examples)
        beyond = example_id[where & ~in_range]
        if len(beyond):
            raise InputError(f"write_cache: expected example_id in [0, {self._examples}), got {beyond[0]}")
        for path, (values, is_finite) in outputs.items():
            bad = example_id[where & ~np.asarray(is_finite)]
            if len(bad):
                raise InputError(
                    f"write_cache: the teacher's '{path}' is not finite in {self._arrays[path].dtype} for example "
                    f"{bad[0]}; look at the teacher, or choose dtype='float32' if its values are large"
                )
            self._arrays[path][ids] = np.asarray(values)[where]
        self._checksums[ids] = _checksums(batch, self.inputs)[where]
        self._known[ids] = True
        self._came[example_id[in_range]] = True

    def _begin(self, batch: Batch, outputs: Mapping[str, _Outputs]) -> None:
        every = tuple(name for name in batch if name not in NOT_INPUTS)
        self.inputs = every if self._asked_for is None else tuple(self._asked_for)
        for name in self.inputs:
            if name not in batch:
                raise unknown_name("input of the batch", name, batch)
        shapes = {path: (self._examples, *values.shape[1:]) for path, (values, _) in outputs.items()}
        needed = sum(math.prod(shapes[path]) * values.dtype.itemsize for path, (values, _) in outputs.items())
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            # Writing into a memory map on a full disk would kill the process.
            raise InputError(
                f"write_cache: the cache needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free in "
                f"'{self._folder.parent}'; keep fewer layers, or queries and keys in the place of maps"
            )
        for index, (path, (values, _)) in enumerate(outputs.items()):
            self._arrays[path] = np.lib.format.open_memmap(
                self._folder / f"{index:03}.npy", mode="w+", dtype=values.dtype, shape=shapes[path]
            )
        self._checksums = np.zeros((self._examples, len(self.inputs)), np.uint32)

    def close(self) -> dict[str, dict[str, Any]]:
        """Ends the writing and describes the arrays."""
        if not self._known.any():
            raise InputError("write_cache: no batch brought a valid row")
        if not self._came.all():
            missing = np.flatnonzero(~self._came)
            raise InputError(
                f"write_cache: {len(missing)} of {self._examples} examples never came, such as {_listed(missing)}; "
                "the batches must be one pass over the data"
            )
        for array in self._arrays.values():
            array.flush()
        np.save(self._folder / _INPUTS, self._checksums)
        np.save(self._folder / _KNOWN, self._known)
        return {
            path: {"file": Path(str(array.filename)).name, "shape": list(array.shape), "dtype": str(array.dtype)}
            for path, array in self._arrays.items()
        }


class TeacherCache:
    """A written cache, opened for reading; made by `open_cache`.

    Attributes:
        directory: where it lies.
        teacher: the identity of the teacher that it was written with.
        arrays: [examples ...] by path, memory-mapped.
    """

    def __init__(
        self,
        directory: Path,
        teacher: str,
        arrays: dict[str, np.ndarray],
        inputs: Sequence[str],
        checksums: UInt32[np.ndarray, "n i"],
        known: Bool[np.ndarray, " n"],
    ):
        self.directory = directory
        self.teacher = teacher
        self.arrays = arrays
        self._inputs = tuple(inputs)
        self._checksums = checksums
        self._known = known

    def rows(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the teacher said of the rows of a batch.

        Args:
            batch: with `example_id`, `where` and the inputs that the teacher saw.

        Returns:
            `teacher/<path>` [b ...] for every path; 0 in rows with `where` False.

        Raises:
            InputError: an example that the teacher has not seen, or has seen with other inputs.
        """
        example_id, where = _rows(batch)
        ids = example_id[where]
        self._check(batch, ids, where)
        targets = {}
        for path, array in self.arrays.items():
            rows = np.zeros((len(where), *array.shape[1:]), array.dtype)
            rows[where] = array[ids]
            targets[f"{TEACHER_ARRAYS}{path}"] = rows
        return targets

    def _check(self, batch: Batch, ids: np.ndarray, where: np.ndarray) -> None:
        in_range = (ids >= 0) & (ids < len(self._known))
        unknown = ids[~in_range | ~self._known[np.where(in_range, ids, 0)]]
        if len(unknown):
            raise InputError(f"the teacher's cache '{self.directory}' has no example {_listed(np.unique(unknown))}")
        missing = [name for name in self._inputs if name not in batch]
        if missing:
            raise InputError(
                f"the teacher's cache '{self.directory}' belongs to inputs {', '.join(self._inputs)}; "
                f"the batch has no {', '.join(missing)}"
            )
        differs = _checksums(batch, self._inputs)[where] != self._checksums[ids]
        if differs.any():
            names = [name for name, column in zip(self._inputs, differs.T, strict=True) if column.any()]
            raise InputError(
                f"the teacher's cache '{self.directory}' does not fit the batch: example {ids[differs.any(1)][0]} "
                f"has other {', '.join(names)} than the teacher saw; a cache needs inputs that are the same in every "
                "epoch (no augmentation, no captions or targets drawn at random)"
            )


def open_cache(directory: str | os.PathLike[str], *, teacher: str, data: str) -> TeacherCache:
    """Opens a cache and checks that it is the one meant.

    Args:
        directory: where it was written.
        teacher: identity of the teacher, `FrozenTeacher.identity`.
        data: which data, as when it was written.

    Raises:
        InputError: there is no cache, its writing was interrupted, it is damaged, or it belongs to another teacher or
            other data.
    """
    directory = Path(directory)
    if not (directory / _MANIFEST).is_file():
        unfinished = _partial(directory).exists()
        hint = "its writing has not come to its end; write it again" if unfinished else "write_cache makes one"
        raise InputError(f"no teacher's cache in '{directory}'; {hint}")
    try:
        about = json.loads((directory / _MANIFEST).read_text())
        found = {name: about[name] for name in ("format", "teacher", "data")}
        if about["format"] != _FORMAT:
            raise InputError(f"teacher's cache '{directory}' has format {about['format']}, expected {_FORMAT}")
        differences = [
            f"it belongs to {what} {_short(found[name])}, expected {_short(wanted)}"
            for name, what, wanted in (("teacher", "the teacher", teacher), ("data", "the data", data))
            if found[name] != wanted
        ]
        if differences:
            raise InputError(f"teacher's cache '{directory}' cannot be used: {'; '.join(differences)}")
        examples, inputs = about["examples"], about["inputs"]
        arrays = {
            path: _mapped(directory / _plain_name(array["file"]), array) for path, array in about["arrays"].items()
        }
        checksums = _mapped(directory / _INPUTS, {"shape": [examples, len(inputs)], "dtype": "uint32"})
        known = _mapped(directory / _KNOWN, {"shape": [examples], "dtype": "bool"})
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"teacher's cache '{directory}' is damaged ({error}); remove it and write it again") from error
    return TeacherCache(directory, about["teacher"], arrays, inputs, np.array(checksums), np.array(known))


class ClosableBatches(Batches, Protocol):
    """A stream of batches that holds threads or files."""

    def close(self) -> None: ...


class TeacherBatches:
    """A stream of batches whose rows also hold what a cached teacher said, as arrays `teacher/<path>`.

    Its position is that of the stream within, with the teacher's identity beside it.

    Args:
        batches: the stream.
        cache: of the same data.
    """

    def __init__(self, batches: ClosableBatches, cache: TeacherCache):
        self._batches = batches
        self._cache = cache

    @property
    def corrupt(self) -> int:
        """Corrupt rows of the stream within."""
        return self._batches.corrupt

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        return {**batch, **self._cache.rows(batch)}

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, and the teacher."""
        return {**self._batches.get_state(), "teacher": self._cache.teacher}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called."""
        self._batches.set_state({name: value for name, value in state.items() if name != "teacher"})

    def close(self) -> None:
        """Ends the stream within."""
        self._batches.close()


def _rows(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    for name in ("example_id", "where"):
        if name not in batch:
            raise InputError(f"a teacher's cache needs batches with {name}; got {', '.join(batch)}")
    return np.asarray(batch["example_id"]), np.asarray(batch["where"])


def _checksums(batch: Batch, inputs: Sequence[str]) -> UInt32[np.ndarray, "b i"]:
    rows = len(batch["where"])
    as_bytes = [np.ascontiguousarray(batch[name]).reshape(rows, -1).view(np.uint8) for name in inputs]
    return np.array([[zlib.crc32(field[row].data) for field in as_bytes] for row in range(rows)], np.uint32).reshape(
        rows, len(inputs)
    )


def _plain_name(file: str) -> str:
    if Path(file).name != file:
        raise ValueError(f"'{file}' is no name of a file in it")
    return file


def _mapped(path: Path, about: Mapping[str, Any]) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if list(array.shape) != about["shape"] or str(array.dtype) != about["dtype"]:
        raise ValueError(f"{path.name} holds {array.dtype}{list(array.shape)}, not {about['dtype']}{about['shape']}")
    return array


def _partial(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.partial")


def _short(identity: str) -> str:
    return f"'{identity}'" if len(identity) <= 40 else f"'{identity[:12]}…'"


def _listed(numbers: np.ndarray) -> str:
    rest = len(numbers) - _NAMED_AT_MOST
    return ", ".join(map(str, numbers[:_NAMED_AT_MOST])) + (f" and {rest} more" if rest > 0 else "")
