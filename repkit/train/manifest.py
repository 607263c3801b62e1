"""A folder's manifest: size and sha256 of every file in it, by which damage is found before anything is believed."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST_FILE = "manifest.json"


class Damage(Exception):
    """A file is not as it was written.

    Attributes:
        file: its path in the folder.
        reason: what is wrong with it.
    """

    def __init__(self, file: str, reason: str):
        super().__init__(f"{file}: {reason}")
        self.file = file
        self.reason = reason


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the manifest of all files of a folder; what it describes and the manifest are on the disk afterwards.

    Args:
        folder: the folder, complete.
        about: JSON-able values that the manifest holds besides.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = (Path(name) / "weights").write_bytes(b"1234")
        ...     write_manifest(Path(name), {"step": 7})
        ...     manifest = read_manifest(Path(name))
        ...     check_files(Path(name), manifest)
        >>> manifest["step"], manifest["files"]["weights"]["size"]
        (7, 4)
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor() as threads:
        described = threads.map(lambda name: _describe(folder / name, to_disk=True), sorted(names))
        content = {**about, "files": dict(zip(sorted(names), described, strict=True))}
    text = _signed(content)
    with (folder / MANIFEST_FILE).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            folder_to_disk(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, which vouches for itself.

    Raises:
        Damage: it is not there, or not as it was written.
    """
    try:
        text = (folder / MANIFEST_FILE).read_text()
        content = json.loads(text)
        del content["sha256"]
        # Not a byte of it may differ, be it one that makes no difference to a JSON reader.
        is_whole = text == _signed(content)
        names = [(name, described["size"], described["sha256"]) for name, described in content["files"].items()]
    except FileNotFoundError as error:
        raise Damage(MANIFEST_FILE, "is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(MANIFEST_FILE, f"cannot be read ({type(error).__name__})") from error
    if not is_whole:
        raise Damage(MANIFEST_FILE, "is not as it was written")
    for name, _, _ in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Damage(MANIFEST_FILE, f"names a file outside of the folder: {name}")
    return content


def check_files(folder: Path, manifest: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Compares the files of a folder with its manifest.

    Args:
        folder: the folder.
        manifest: what `read_manifest` returned.
        names: the files to compare; None compares all that the manifest knows.

    Raises:
        Damage: a file is missing, or its size or content differs; the first one by name.
    """
    expected = manifest["files"]
    chosen = sorted(expected if names is None else names)
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda name: _check(folder, name, expected.get(name)), chosen))


def folder_to_disk(folder: Path) -> None:
    """Returns when the names in a folder are on the disk, such as that of a file renamed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(folder: Path, name: str, expected: Mapping[str, Any] | None) -> None:
    if expected is None:
        raise Damage(name, f"is not in {MANIFEST_FILE}")
    try:
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            raise Damage(name, f"has {size} bytes, {expected['size']} were written")
        found = _describe(folder / name)
    except FileNotFoundError as error:
        raise Damage(name, "is missing") from error
    except OSError as error:
        raise Damage(name, f"cannot be read ({error.strerror})") from error
    if found != expected:
        raise Damage(name, "its sha256 is not that of what was written")


def _describe(path: Path, *, to_disk: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if to_disk:
            os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


def _signed(content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n"
