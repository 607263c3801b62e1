"""Where examples come from: random access to images with their captions, from TFDS or from JSONL files."""

import contextlib
import functools
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from repkit.checks import InputError, unknown_name
from repkit.data.images import CorruptExampleError, load_image

MOST_KEPT_BYTES = 64 * 2**20
"""TFDS data sets up to this size are kept in memory once read, still encoded."""


class Record(TypedDict):
    """One example. `image` is encoded, or uint8 [h w 3]; `example_id` is its index in the source.

    `origin` says in words where the example comes from. Examples of digit scenes also have `ground_truth`.
    """

    image: bytes | np.ndarray
    captions: list[str]
    example_id: int
    origin: str
    label: NotRequired[int]
    ground_truth: NotRequired[dict[str, Any]]


class Source(Protocol):
    """Random access to records. Either all records have a label or none has."""

    has_labels: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def captions(self, index: int) -> list[str]:
        """The captions of an example, where possible without reading its image."""
        ...


def all_captions(source: Source) -> list[str]:
    """Every caption of a source in the order of its examples: what a tokenizer is trained on."""
    return [caption for index in range(len(source)) for caption in source.captions(index)]


def digit_scenes_source(config: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> "TfdsSource":
    """The digit scenes; they are composed at the first call, which takes a few seconds, and read from disk afterwards.

    Args:
        config: "single" (one digit; its class is the label) or "pairs" (two to four digits with relations).
        split: "train", "validation" or "test", or a part of one such as "train[:1000]".
        data_dir: folder of prepared data sets; None is TFDS's own (`~/tensorflow_datasets`, or `TFDS_DATA_DIR`).

    Returns:
        A source whose records also hold `ground_truth`: {"background": name, "digits": [{"digit", "colour", "row",
        "column", "top", "left", "stroke_id"}]}.

    Raises:
        InputError: unknown config or split, or `data_dir` cannot be written.
    """
    from repkit.data.digit_scenes import DigitScenes

    if config not in DigitScenes.builder_configs:
        raise unknown_name("digit_scenes config", config, DigitScenes.builder_configs)
    return tfds_source(
        f"digit_scenes/{config}",
        split,
        data_dir,
        image_key="image",
        caption_key="captions",
        label_key="label" if config == "single" else None,
    )


def tfds_source(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_key: str = "image",
    caption_key: str | None = None,
    label_key: str | None = None,
) -> "TfdsSource":
    """Any TFDS data set, without TensorFlow. It is prepared first, downloads included, where `data_dir` lacks it.

    Args:
        name: as TFDS writes it: "name", "name/config" or "name/config:version".
        split: as TFDS writes it: "train", "test[:100]", "train+validation", ...
        data_dir: folder of prepared data sets; None is TFDS's own (`~/tensorflow_datasets`, or `TFDS_DATA_DIR`).
        image_key: feature with the image.
        caption_key: feature with a text or a sequence of texts. None takes the name of the label's class as the
        caption. label_key: feature with the class, if there is one.

    Returns:
        The source.

    Raises:
        InputError: unknown data set, split or feature; the data set is on disk in a format that only TensorFlow reads;
            it cannot be prepared; it is empty.
    """
    if caption_key is None and label_key is None:
        raise InputError(f"{name}: expected caption_key or label_key, got neither; without one there are no captions")
    builder = _prepared_builder(name, data_dir)
    for key in filter(None, (image_key, caption_key, label_key)):
        if key not in builder.info.features:
            raise unknown_name(f"feature of {name}", key, builder.info.features)
    for part in re.findall(r"(?:^|\+)\s*([\w-]+)", split):
        if part not in builder.info.splits:
            raise unknown_name(f"split of {name}", part, builder.info.splits)
    return TfdsSource(builder, split, image_key=image_key, caption_key=caption_key, label_key=label_key)


class TfdsSource:
    """A split of a prepared TFDS data set; made by `tfds_source`.

    `class_names` are the names of the labels, in their order, where the data set has them.
    """

    def __init__(self, builder: Any, split: str, *, image_key: str, caption_key: str | None, label_key: str | None):
        import tensorflow_datasets as tfds

        image = builder.info.features[image_key]
        # Encoded images stay encoded: their decoding belongs to the pipeline, which counts what cannot be decoded.
        decoders = {image_key: tfds.decode.SkipDecoding()} if isinstance(image, tfds.features.Image) else None
        self._name = f"{builder.info.full_name} {split}"
        try:
            if not builder.info.splits[split].num_examples:
                raise InputError("the data set is empty")
            self._examples = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise InputError(
                f"{builder.info.full_name} lies in {builder.data_path} as {builder.info.file_format}, which only "
                'TensorFlow reads; give another data_dir, or prepare it anew with file_format="array_record"'
            ) from error
        except ValueError as error:
            raise InputError(f"{self._name}: {error}") from error
        # Parsing costs more than a small data set's memory, and training and evaluation read it again and again.
        keep = builder.info.dataset_size <= MOST_KEPT_BYTES
        self._read = functools.cache(self._examples.__getitem__) if keep else self._examples.__getitem__
        self._image_key, self._caption_key, self._label_key = image_key, caption_key, label_key
        label = None if label_key is None else builder.info.features[label_key]
        self.class_names: list[str] | None = getattr(label, "names", None)
        if caption_key is None and self.class_names is None:
            raise InputError(f"{self._name}: feature '{label_key}' has no class names; give caption_key")
        self.has_labels = label_key is not None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        example = self._read(index)
        record = Record(
            image=example[self._image_key],
            captions=self._captions_of(example),
            example_id=index,
            origin=f"{self._name}[{index}]",
        )
        if self._label_key is not None:
            record["label"] = int(example[self._label_key])
        if "ground_truth" in example:
            record["ground_truth"] = json.loads(example["ground_truth"])
        return record

    def captions(self, index: int) -> list[str]:
        return self._captions_of(self._read(index))

    def _captions_of(self, example: Any) -> list[str]:
        if self._caption_key is None:
            assert self.class_names is not None  # refused when the source was made
            return [self.class_names[int(example[self._label_key])]]
        value = example[self._caption_key]
        # TFDS gives texts as bytes, and its test doubles as str.
        texts = [value] if isinstance(value, bytes | str) else value
        return [text.decode(errors="replace") if isinstance(text, bytes) else text for text in texts]


class JsonlSource:
    """Image-caption pairs listed in a JSONL file; made by `jsonl_source`."""

    def __init__(self, path: Path, root: Path, lines: "list[_Line]"):
        self._path = path
        self._root = root
        self._lines = lines
        self.has_labels = lines[0].label is not None

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        line = self._lines[index]
        origin = f"{self._path}:{line.number}"
        try:
            encoded = (self._root / line.image).read_bytes()
        except OSError as error:
            # It was there when the source was opened.
            raise CorruptExampleError(f"{origin}: cannot read image {line.image!r}: {error.strerror}") from error
        record = Record(
            image=encoded, captions=list(line.captions), example_id=index, origin=f"{origin} ({line.image})"
        )
        if line.label is not None:
            record["label"] = line.label
        return record

    def captions(self, index: int) -> list[str]:
        return list(self._lines[index].captions)


def jsonl_source(path: str | os.PathLike[str], *, image_root: str | os.PathLike[str] | None = None) -> JsonlSource:
    """Image-caption pairs from a JSONL file, one object a line: {"image": path, "caption": text or [text, ...]}.

    An optional "label" is an integer class, on all lines or on none; other keys are ignored. The whole file is checked
    at once: every image must be there, and the first one is opened; the others are read when their turn comes.

    Args:
        path: the file, UTF-8. Empty lines are skipped.
        image_root: folder that the image paths are relative to. None: the folder of the file, and absolute paths are
            refused. With a folder given, absolute paths inside of it are right too.

    Returns:
        The source.

    Raises:
        InputError: missing or empty file; malformed line, image path that leads out of the folder, missing image (each
            with the line's number); first image is no image.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    lines = list(_parse_lines(path, text, root, allow_absolute=image_root is not None))
    if not lines:
        raise InputError(f"{path}: the data set is empty")
    unlike = next((line for line in lines if (line.label is None) != (lines[0].label is None)), None)
    if unlike is not None:
        raise InputError(f"{path}:{unlike.number}: expected a label on all lines or on none")
    absent = next((line for line in lines if not (root / line.image).is_file()), None)
    if absent is not None:
        raise InputError(f"{path}:{absent.number}: cannot read image {absent.image!r}: No such file")
    source = JsonlSource(path, root, lines)
    first = source[0]
    try:
        load_image(first["image"], image_size=1)
    except CorruptExampleError as error:
        raise InputError(f"{first['origin']}: {error}") from error
    return source


class _Line:
    """One checked line of a JSONL file."""

    __slots__ = ("captions", "image", "label", "number")

    def __init__(self, number: int, image: str, captions: Sequence[str], label: int | None):
        self.number = number
        self.image = image
        self.captions = captions
        self.label = label


def _parse_lines(path: Path, text: bytes, root: Path, *, allow_absolute: bool) -> Iterator[_Line]:
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield _parse_line(number, json.loads(line.decode()), root, allow_absolute)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: expected one JSON object a line: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: expected UTF-8: {error.reason} at byte {error.start}") from error
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from error


def _parse_line(number: int, value: Any, root: Path, allow_absolute: bool) -> _Line:
    expected = '{"image": path, "caption": text or [text, ...]}'
    if not isinstance(value, dict):
        raise InputError(f"expected {expected}, got {type(value).__name__}")
    missing = [key for key in ("image", "caption") if key not in value]
    if missing:
        raise InputError(f"expected {expected}, '{missing[0]}' is missing")
    captions = [value["caption"]] if isinstance(value["caption"], str) else value["caption"]
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise InputError(f"expected 'caption' to be a text or a list of texts, not empty, got {value['caption']!r}")
    label = value.get("label")
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31):
        raise InputError(f"expected 'label' to be an integer from 0, got {label!r}")
    return _Line(number, _checked_image(value["image"], root, allow_absolute), captions, label)


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


def _prepared_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The builder of a data set that is completely on disk; several processes may ask at once.

    TFDS writes into a folder of its own and renames it when it is complete. So an interrupted build leaves nothing that
    could be taken for data, and of two builds at the same time the second one finds its name taken and is dropped.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError('TFDS data sets need tensorflow-datasets: pip install "repkit[data]"') from error
    from repkit.data import digit_scenes  # registers its name with TFDS

    def make_builder() -> Any:
        return tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir))

    try:
        builder = make_builder()
    except tfds.core.DatasetNotFoundError as error:
        raise unknown_name("TFDS data set", name, tfds.list_builders(with_community_datasets=False)) from error
    # TFDS says with an AssertionError that it has no such version.
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"TFDS data set {name}: {str(error).splitlines()[0]}") from error
    if builder.data_path.exists():
        return builder
    quiet = isinstance(builder, digit_scenes.DigitScenes)
    try:
        with _without_output() if quiet else contextlib.nullcontext():
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        if not builder.data_path.exists():
            raise InputError(f"cannot prepare {name} in {builder.data_path}: {error}; give another data_dir") from error
    except ImportError as error:
        raise InputError(f"cannot prepare {name}: its builder needs what is not installed: {error}") from error
    # A new one, because the information of a builder that lost the race is incomplete.
    return make_builder()


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Swallows TFDS's greeting and its progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
