"""Where the examples of generation tasks come from: an image, a source text, and the target texts that are right."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np

from repkit.checks import InputError, shown, unknown_name
from repkit.data._jsonl import jsonl_examples, parsed_texts
from repkit.data._listed import ListedExamples
from repkit.data._tfds import TfdsSplit, decoded_text, decoded_texts
from repkit.data.scene_tasks import TASKS
from repkit.data.tokenizer import Tokenizer


class SequenceRecord(TypedDict):
    """One example. `image` is encoded, or uint8 [h w 3]; `example_id` is its index in the source.

    Any of `target_texts` is right; for questions they are the annotators' answers, of which most are. `origin` says in
    words where the example comes from. Questions have their `question_type`, where it is known. Examples of digit
    scenes also have `ground_truth`, and questions on them the true `answer`.
    """

    image: bytes | np.ndarray
    source_text: str
    target_texts: list[str]
    example_id: int
    origin: str
    question_type: NotRequired[str]
    answer: NotRequired[str]
    ground_truth: NotRequired[dict[str, Any]]


class Texts(NamedTuple):
    """The source text of an example and its target texts."""

    source: str
    targets: list[str]


class SequenceSource(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SequenceRecord: ...

    def texts(self, index: int) -> Texts:
        """The texts of an example, where possible without reading its image."""
        ...


def all_texts(source: SequenceSource) -> list[str]:
    """Every source and target text in the order of the examples: what a tokenizer for both sides is trained on."""
    texts = (source.texts(index) for index in range(len(source)))
    return [text for group in texts for text in (group.source, *group.targets)]


class AsTokenized:
    """Records whose target texts are written as the tokenizer writes them, such as in small letters.

    Metrics of captions and translations then count what the model said, and not what the tokenizer cannot write.
    (Answers are compared as they were given: `vqa_accuracy` has a normalisation of its own.)

    Args:
        source: whose texts are read, without its images.
        tokenizer: of the generated texts.
        max_length: longest target text in tokens, begin and end included; what is behind is left out.

    Example:
        >>> from repkit.data.tokenizer import train_tokenizer
        >>> class Captions:
        ...     def texts(self, index):
        ...         return Texts("", ["A RED seven"])
        >>> tokenizer = train_tokenizer(["a red seven"], vocab_size=60)
        >>> AsTokenized(Captions(), tokenizer, max_length=16)[0]
        {'target_texts': ['a red seven']}
    """

    def __init__(self, source: SequenceSource, tokenizer: Tokenizer, *, max_length: int):
        self._source, self._tokenizer, self._max_length = source, tokenizer, max_length

    def __getitem__(self, index: int) -> dict[str, list[str]]:
        token_ids, _ = self._tokenizer.encode(self._source.texts(index).targets, self._max_length)
        return {"target_texts": self._tokenizer.decode(token_ids)}


def scene_task_source(task: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> "TfdsSequenceSource":
    """A generation task on digit scenes; composed at the first call, in some seconds, and read from disk afterwards.

    Args:
        task: "questions" (ten answers each), "captions" (four each), "translation" (English to German) or "grounding"
            (what is where).
        split: "train", "validation" or "test", or a part of one such as "train[:1000]".
        data_dir: folder of prepared data sets; None is TFDS's own (`~/tensorflow_datasets`, or `TFDS_DATA_DIR`).

    Returns:
        A source whose records also hold `ground_truth`, as those of `digit_scenes_source` do, and for questions their
        `question_type` and the true `answer`.

    Raises:
        InputError: unknown task or split, or `data_dir` cannot be written.
    """
    if task not in TASKS:
        raise unknown_name("task on digit scenes", task, TASKS)
    keys = ("source_text", "target_texts")
    return TfdsSequenceSource(TfdsSplit(f"digit_scenes/{task}", split, data_dir, image_keys=["image"], keys=keys))


class TfdsSequenceSource:
    """A split of a generation task on digit scenes; made by `scene_task_source`."""

    def __init__(self, examples: TfdsSplit):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> SequenceRecord:
        example = self._examples[index]
        source, targets = _texts(example)
        record = SequenceRecord(
            image=example["image"],
            source_text=source,
            target_texts=targets,
            example_id=index,
            origin=f"{self._examples.name}[{index}]",
            ground_truth=json.loads(example["ground_truth"]),
        )
        if "question_type" in example:
            record["question_type"] = decoded_text(example["question_type"])
            record["answer"] = decoded_text(example["answer"])
        return record

    def texts(self, index: int) -> Texts:
        return _texts(self._examples[index])


def _texts(example: Mapping[str, Any]) -> Texts:
    return Texts(decoded_text(example["source_text"]), decoded_texts(example["target_texts"]))


class ListedTexts(NamedTuple):
    """The texts of a listed image; of a question also its type, where it is known."""

    texts: Texts
    question_type: str | None


class ListedSequenceSource:
    """Images with source and target texts listed in a file; made by `jsonl_sequence_source` and the adapters of
    published data sets.
    """

    def __init__(self, examples: ListedExamples[ListedTexts]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> SequenceRecord:
        source, targets = self.texts(index)
        (image,) = self._examples.images(index)
        record = SequenceRecord(
            image=image,
            source_text=source,
            target_texts=targets,
            example_id=index,
            origin=self._examples.origin(index),
        )
        question_type = self._examples.entries[index].content.question_type
        if question_type is not None:
            record["question_type"] = question_type
        return record

    def texts(self, index: int) -> Texts:
        source, targets = self._examples.entries[index].content.texts
        return Texts(source, list(targets))


def jsonl_sequence_source(
    path: str | os.PathLike[str], *, image_root: str | os.PathLike[str] | None = None
) -> ListedSequenceSource:
    """Sequences from a JSONL file, one object a line: {"image": path, "source": text, "target": text or [text, ...]}.

    An empty "source" is right, for a task such as captioning that asks nothing; other keys are ignored. The whole file
    is checked at once: every image must be there, and the first one is opened; the others are read when their turn
    comes.

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
    keys = {"source": "text", "target": "text or [text, ...]"}
    return ListedSequenceSource(jsonl_examples(path, image_root=image_root, keys=keys, parse=_parse_texts))


def _parse_texts(value: Mapping[str, Any]) -> ListedTexts:
    if not isinstance(value["source"], str):
        raise InputError(f"expected 'source' to be a text, got {shown(value['source'])}")
    return ListedTexts(Texts(value["source"], parsed_texts("target", value["target"])), None)
