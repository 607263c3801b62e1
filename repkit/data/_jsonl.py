"""JSONL files whose lines name an image: checked at once, with a message that names the line."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from repkit.checks import InputError
from repkit.data.images import CorruptExampleError, load_image

Content = TypeVar("Content")


class Line(NamedTuple, Generic[Content]):
    """One checked line: its number, the path of its image, and what else it says."""

    number: int
    image: str
    content: Content


class JsonlLines(Generic[Content]):
    """Random access to the checked lines of a file and to their images."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_root: str | os.PathLike[str] | None,
        keys: Mapping[str, str],
        parse: Callable[[Mapping[str, Any]], Content],
    ):
        """Reads and checks all lines, that their images are there, and that the first one is an image.

        Args:
            path: the file, UTF-8. Empty lines are skipped.
            image_root: folder that the image paths are relative to. None: the folder of the file, and absolute paths
                are refused. With a folder given, absolute paths inside of it are right too.
            keys: what each line must have beside "image", with what it should be, in words.
            parse: the object of a line -> its content; raises `InputError`.

        Raises:
            InputError: missing or empty file; malformed line, image path that leads out of the folder, missing image
                (each with the line's number); first image is no image.
        """
        self._path = Path(path)
        self._root = self._path.parent if image_root is None else Path(image_root)
        try:
            text = self._path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        self.lines = list(_parse_lines(self._path, text, self._root, image_root is not None, keys, parse))
        if not self.lines:
            raise InputError(f"{path}: the data set is empty")
        absent = next((line for line in self.lines if not (self._root / line.image).is_file()), None)
        if absent is not None:
            raise InputError(f"{path}:{absent.number}: cannot read image {absent.image!r}: No such file")
        try:
            load_image(self.image(0), image_size=1)
        except CorruptExampleError as error:
            raise InputError(f"{self.origin(0)}: {error}") from error

    def __len__(self) -> int:
        return len(self.lines)

    def image(self, index: int) -> bytes:
        """The encoded image of a line; raises `CorruptExampleError` where it is there no more."""
        line = self.lines[index]
        try:
            return (self._root / line.image).read_bytes()
        except OSError as error:
            raise CorruptExampleError(
                f"{self._path}:{line.number}: cannot read image {line.image!r}: {error.strerror}"
            ) from error

    def origin(self, index: int) -> str:
        """File, number and image of a line, in words."""
        line = self.lines[index]
        return f"{self._path}:{line.number} ({line.image})"


def parsed_texts(key: str, value: Any) -> list[str]:
    """One text or a list of them, none of them empty; raises `InputError` for anything else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError(f"expected '{key}' to be a text or a list of texts, not empty, got {value!r}")
    return texts


def _parse_lines(
    path: Path,
    text: bytes,
    root: Path,
    allow_absolute: bool,
    keys: Mapping[str, str],
    parse: Callable[[Mapping[str, Any]], Content],
) -> Iterator[Line[Content]]:
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = _object_with(json.loads(line.decode()), {"image": "path", **keys})
            content = parse(value)
            yield Line(number, _checked_image(value["image"], root, allow_absolute), content)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: expected one JSON object a line: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: expected UTF-8: {error.reason} at byte {error.start}") from error
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from error


def _object_with(value: Any, keys: Mapping[str, str]) -> Mapping[str, Any]:
    expected = "{" + ", ".join(f'"{key}": {meaning}' for key, meaning in keys.items()) + "}"
    if not isinstance(value, dict):
        raise InputError(f"expected {expected}, got {type(value).__name__}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise InputError(f"expected {expected}, '{missing[0]}' is missing")
    return value


def _checked_image(image: Any, root: Path, allow_absolute: bool) -> str:
    if not isinstance(image, str) or not image or "\0" in image:
        raise InputError(f"expected 'image' to be a path, got {image!r}")
    if os.path.isabs(image) and not allow_absolute:
        raise InputError(
            f"expected 'image' to be relative, got {image!r}; give image_root to allow absolute paths in it"
        )
    base = os.path.abspath(root)
    # Compared by name: a link inside the folder was put there by its owner and may lead to another disk.
    if os.path.commonpath([base, os.path.abspath(os.path.join(base, image))]) != base:
        raise InputError(f"image {image!r} leads out of {root}")
    return image
