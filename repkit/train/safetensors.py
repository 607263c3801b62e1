"""Reads safetensors files, of whoever wrote them: nothing in the header is believed before it is checked."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from repkit.checks import InputError

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format's own library."""

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "BOOL": np.bool_,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name, mapped into memory and read-only.

    Args:
        path: the file. Its header must be at most `LONGEST_HEADER` long, name each array once, and give it a known
            dtype, a shape and the bytes that just hold it; together the arrays must fill the file without a gap.

    Returns:
        The arrays; after renaming, `repkit.train.start.started_from` takes them.

    Raises:
        InputError: the file cannot be read, or is not as above.

    Example:
        >>> import struct, tempfile
        >>> header = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.safetensors"
        ...     _ = file.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1, 2))
        ...     read_safetensors(file)["w"].tolist()
        [1.0, 2.0]
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise InputError(f"a header of {length} bytes does not fit into {size}")
            header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
        return _arrays(Path(path), 8 + length, size - 8 - length, header)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no good safetensors file: {str(error).splitlines()[0][:200]}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise InputError("a name is there twice")
    return values


def _arrays(path: Path, offset: int, size: int, header: Any) -> dict[str, np.ndarray]:
    if not isinstance(header, dict):
        raise InputError("the header is no JSON object")
    entries = {name: _checked(name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise InputError(f"'{name}' begins at byte {begin}, expected {end}")
        end = stop
    if end != size:
        raise InputError(f"the arrays have {end} bytes, the file {size}")
    data = np.memmap(path, np.uint8, "r", offset, (size,)) if size else np.zeros(0, np.uint8)
    arrays = {}
    for name, (dtype, shape, begin, stop) in entries.items():
        content = data[begin:stop]
        if dtype == np.bool_ and content.max(initial=0) > 1:
            raise InputError(f"'{name}' holds bytes that are neither true nor false")
        arrays[name] = content.view(dtype).reshape(shape)
    return arrays


def _checked(name: str, entry: Any) -> tuple[np.dtype, list[int], int, int]:
    """dtype, shape, first byte and the byte after the last."""
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"'{name}' has not just a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f"'{name}' has the unknown dtype {str(dtype)[:20]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise InputError(f"'{name}' has a shape or data_offsets that are no lists of sizes")
    size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != size:
        raise InputError(f"'{name}' needs {size} bytes, its data_offsets give {offsets[1] - offsets[0]}")
    return np.dtype(_DTYPES[dtype]), shape, offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
