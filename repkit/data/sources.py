"""Where examples come from: random access to images with their captions, from TFDS or from JSONL files."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np

from repkit.checks import InputError, shown, unknown_name
from repkit.data._jsonl import jsonl_examples, parsed_texts
from repkit.data._listed import ListedExamples, place_in
from repkit.data._tfds import TfdsSplit, decoded_texts
from repkit.data.scenes import SCENES


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
    if config not in SCENES:
        raise unknown_name("digit_scenes config", config, SCENES)
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
    keys = [key for key in (caption_key, label_key) if key is not None]
    examples = TfdsSplit(name, split, data_dir, image_keys=[image_key], keys=keys)
    return TfdsSource(examples, image_key=image_key, caption_key=caption_key, label_key=label_key)


class TfdsSource:
    """A split of a prepared TFDS data set; made by `tfds_source`.

    `class_names` are the names of the labels, in their order, where the data set has them.
    """

    def __init__(self, examples: TfdsSplit, *, image_key: str, caption_key: str | None, label_key: str | None):
        self._examples = examples
        self._image_key, self._caption_key, self._label_key = image_key, caption_key, label_key
        label = None if label_key is None else examples.features[label_key]
        self.class_names: list[str] | None = getattr(label, "names", None)
        if caption_key is None and self.class_names is None:
            raise InputError(f"{examples.name}: feature '{label_key}' has no class names; give caption_key")
        self.has_labels = label_key is not None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        example = self._examples[index]
        record = Record(
            image=example[self._image_key],
            captions=self._captions_of(example),
            example_id=index,
            origin=f"{self._examples.name}[{index}]",
        )
        if self._label_key is not None:
            record["label"] = int(example[self._label_key])
        if "ground_truth" in example:
            record["ground_truth"] = json.loads(example["ground_truth"])
        return record

    def captions(self, index: int) -> list[str]:
        return self._captions_of(self._examples[index])

    def _captions_of(self, example: Any) -> list[str]:
        if self._caption_key is None:
            assert self.class_names is not None  # refused when the source was made
            return [self.class_names[int(example[self._label_key])]]
        return decoded_texts(example[self._caption_key])


class Pair(NamedTuple):
    """The captions of a listed image, and its label where it has one."""

    captions: list[str]
    label: int | None


class ListedSource:
    """Image-caption pairs listed in a file; made by `jsonl_source` and the adapters of published data sets.

    `left_out` is how many examples of the file are not among them because their images are missing.
    """

    def __init__(self, examples: ListedExamples[Pair]):
        self._examples = examples
        self.has_labels = examples.entries[0].content.label is not None
        self.left_out = examples.left_out

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        captions, label = self._examples.entries[index].content
        (image,) = self._examples.images(index)
        record = Record(image=image, captions=list(captions), example_id=index, origin=self._examples.origin(index))
        if label is not None:
            record["label"] = label
        return record

    def captions(self, index: int) -> list[str]:
        return list(self._examples.entries[index].content.captions)


def jsonl_source(path: str | os.PathLike[str], *, image_root: str | os.PathLike[str] | None = None) -> ListedSource:
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
    keys = {"caption": "text or [text, ...]"}
    examples = jsonl_examples(path, image_root=image_root, keys=keys, parse=_parse_pair)
    labelled = examples.entries[0].content.label is not None
    unlike = next((entry for entry in examples.entries if (entry.content.label is not None) != labelled), None)
    if unlike is not None:
        raise InputError(f"{place_in(path, unlike.place)}: expected a label on all lines or on none")
    return ListedSource(examples)


def _parse_pair(value: Mapping[str, Any]) -> Pair:
    captions = parsed_texts("caption", value["caption"])
    label = value.get("label")
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31):
        raise InputError(f"expected 'label' to be an integer from 0, got {shown(label)}")
    return Pair(captions, label)
