"""JSONL files whose lines name images: checked at once, with a message that names the line."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from repkit.checks import InputError, shown
from repkit.data._listed import Content, Entry, ListedExamples, checked_path, place_in


def jsonl_examples(
    path: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None,
    keys: Mapping[str, str],
    parse: Callable[[Mapping[str, Any]], Content],
) -> ListedExamples[Content]:
    """The examples of a file with an image a line; all lines are read and checked, and that their images are there.

    Args:
        path: the file, UTF-8. Empty lines are skipped.
        image_root: folder that the image paths are relative to. None: the folder of the file, and absolute paths are
            refused. With a folder given, absolute paths inside of it are right too.
        keys: what each line must have beside "image", with what it should be, in words.
        parse: the object of a line -> its content; raises `InputError`.

    Raises:
        InputError: missing or empty file; malformed line, image path that leads out of the folder, missing image (each
            with the line's number); first image is no image.
    """
    root = Path(path).parent if image_root is None else Path(image_root)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error

    def parse_line(value: Mapping[str, Any]) -> tuple[tuple[str, ...], Content]:
        content = parse(value)
        return (checked_path(value["image"], root, image_root_given=image_root is not None),), content

    return ListedExamples(path, json_lines(path, data, {"image": "path", **keys}, parse_line), image_root=root)


def json_lines(
    path: str | os.PathLike[str],
    data: bytes,
    keys: Mapping[str, str],
    parse: Callable[[Mapping[str, Any]], tuple[tuple[str, ...], Content]],
) -> Iterator[Entry[Content]]:
    """An example for each line that is not empty; what is wrong with a line is said with its number.

    Args:
        path: the file, to be named in messages.
        data: what it holds, UTF-8.
        keys: what each line must have, with what it should be, in words.
        parse: the object of a line -> its images and its content; raises `InputError`.
    """
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            images, content = parse(object_with(json.loads(line.decode()), keys))
        except json.JSONDecodeError as error:
            raise InputError(f"{place_in(path, number)}: expected one JSON object a line: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{place_in(path, number)}: expected UTF-8: {error.reason} at byte {error.start}"
            ) from error
        except InputError as error:
            raise InputError(f"{place_in(path, number)}: {error}") from error
        except (ValueError, RecursionError) as error:
            # Numbers of thousands of digits, and brackets in brackets in brackets.
            raise InputError(f"{place_in(path, number)}: expected one JSON object a line: {error}") from error
        yield Entry(number, images, content)


def object_with(value: Any, keys: Mapping[str, str]) -> Mapping[str, Any]:
    """The JSON object, if it has all keys; raises `InputError` otherwise."""
    expected = "{" + ", ".join(f'"{key}": {meaning}' for key, meaning in keys.items()) + "}"
    if not isinstance(value, dict):
        raise InputError(f"expected {expected}, got {type(value).__name__}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise InputError(f"expected {expected}, '{missing[0]}' is missing")
    return value


def parsed_text(key: str, value: Any) -> str:
    """A text that is not empty; raises `InputError` for anything else."""
    if not _is_text(value):
        raise InputError(f"expected '{key}' to be a text, not empty, got {shown(value)}")
    return value


def parsed_texts(key: str, value: Any) -> list[str]:
    """One text or a list of them, none of them empty; raises `InputError` for anything else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
        raise InputError(f"expected '{key}' to be a text or a list of texts, not empty, got {shown(value)}")
    return texts


def _is_text(value: Any) -> bool:
    """A text that is not empty and can be encoded: JSON may hold halves of characters."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= char <= "\udfff" for char in value)
