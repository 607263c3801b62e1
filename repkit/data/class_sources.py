"""Where the examples of classification tasks come from: one image or two, a text, and the class that they belong to.

Questions become such a task by their answers: the most frequent answers of the training questions are the classes.
"""

import collections
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np

from repkit.checks import InputError, unknown_name
from repkit.data._draws import commonest_texts
from repkit.data._listed import ListedExamples
from repkit.data._tfds import TfdsSplit, decoded_text
from repkit.data.scene_classes import CLASS_TASKS
from repkit.data.sequence_sources import SequenceSource

IMAGE_NAMES = ("image", "second_image")


class ClassRecord(TypedDict):
    """One example. Images are encoded, or uint8 [h w 3]; `example_id` is its index in the source.

    `second_image` is there if the task has two pictures. `label` is the place of its class among the source's class
    names; -1 for a question whose answer is none of them. `origin` says in words where the example comes from.
    Questions keep all their `answers` and, where it is known, their `question_type`. Examples of digit scenes also have
    the `form` of their text and the `ground_truth` of their pictures.
    """

    image: bytes | np.ndarray
    second_image: NotRequired[bytes | np.ndarray]
    text: str
    label: int
    example_id: int
    origin: str
    answers: NotRequired[list[str]]
    question_type: NotRequired[str]
    form: NotRequired[str]
    ground_truth: NotRequired[dict[str, Any]]
    second_ground_truth: NotRequired[dict[str, Any]]


class LabelledText(NamedTuple):
    """The text of an example and its label."""

    text: str
    label: int


class ClassSource(Protocol):
    """Random access to records. `pictures` is how many images each has: 1 or 2."""

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def pictures(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ClassRecord: ...

    def labelled_text(self, index: int) -> LabelledText:
        """The text of an example and its label, where possible without reading its images."""
        ...


def all_class_texts(source: ClassSource) -> list[str]:
    """Every text in the order of the examples: what a tokenizer is trained on."""
    return [source.labelled_text(index).text for index in range(len(source))]


def scene_class_source(task: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> "TfdsClassSource":
    """A classification task on digit scenes; composed at the first call, in seconds, and read from disk later.

    Args:
        task: "statements" (two pictures; false, true), "assignment" (two pictures; first, second, neither) or
            "entailment" (one picture; entailment, neutral, contradiction).
        split: "train", "validation" or "test", or a part of one such as "train[:1000]".
        data_dir: folder of prepared data sets; None is TFDS's own (`~/tensorflow_datasets`, or `TFDS_DATA_DIR`).

    Returns:
        A source whose records also hold the `form` of the text and the `ground_truth` of each picture, as those of
        `digit_scenes_source` do; that of an entailment also has what the card covers: `covered`.

    Raises:
        InputError: unknown task or split, or `data_dir` cannot be written.
    """
    if task not in CLASS_TASKS:
        raise unknown_name("classification task on digit scenes", task, CLASS_TASKS)
    image_names = IMAGE_NAMES[: CLASS_TASKS[task].pictures]
    keys = ("text", "label", "form")
    examples = TfdsSplit(f"digit_scenes/{task}", split, data_dir, image_keys=image_names, keys=keys)
    return TfdsClassSource(examples, class_names=CLASS_TASKS[task].class_names, pictures=len(image_names))


class TfdsClassSource:
    """A split of a classification task on digit scenes; made by `scene_class_source`."""

    def __init__(self, examples: TfdsSplit, *, class_names: Sequence[str], pictures: int):
        self._examples = examples
        self.class_names = class_names
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> ClassRecord:
        example = self._examples[index]
        text, label = _labelled_text(example)
        record = ClassRecord(
            image=example["image"],
            text=text,
            label=label,
            example_id=index,
            origin=f"{self._examples.name}[{index}]",
            form=decoded_text(example["form"]),
            ground_truth=json.loads(example["ground_truth"]),
        )
        if self.pictures == 2:
            record["second_image"] = example["second_image"]
            record["second_ground_truth"] = json.loads(example["second_ground_truth"])
        return record

    def labelled_text(self, index: int) -> LabelledText:
        return _labelled_text(self._examples[index])


def _labelled_text(example: Mapping[str, Any]) -> LabelledText:
    return LabelledText(decoded_text(example["text"]), int(example["label"]))


class ListedClassSource:
    """Labelled texts about the images of a folder, listed in a file; made by the adapters of published data sets.

    `left_out` is how many examples of the file are not among them because their images are missing.
    """

    def __init__(self, examples: ListedExamples[LabelledText], *, class_names: Sequence[str]):
        self._examples = examples
        self.class_names = class_names
        self.pictures = len(examples.entries[0].images)
        self.left_out = examples.left_out

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> ClassRecord:
        text, label = self.labelled_text(index)
        image, *second = self._examples.images(index)
        record = ClassRecord(image=image, text=text, label=label, example_id=index, origin=self._examples.origin(index))
        if second:
            record["second_image"] = second[0]
        return record

    def labelled_text(self, index: int) -> LabelledText:
        return self._examples.entries[index].content


def _as_given(answer: str) -> str:
    return answer


def common_answers(source: SequenceSource, *, count: int, normalize: Callable[[str], str] = _as_given) -> list[str]:
    """The most frequent answers of questions, the most frequent first: the classes of answering as classification.

    Each question counts once, with the answer that most of its annotators gave.

    Args:
        source: the training questions; their target texts are the annotators' answers.
        count: most answers to return.
        normalize: makes answers equal that say the same, such as `repkit.metrics.normalize_answer`; the answers are
            returned as it writes them.

    Returns:
        Up to `count` answers; of equally frequent ones the one met first comes first.

    Raises:
        InputError: count below 1.
    """
    if count < 1:
        raise InputError(f"expected count of at least 1, got {count}")
    answers = collections.Counter(_majority(source.texts(index).targets, normalize) for index in range(len(source)))
    return [answer for answer, _ in answers.most_common(count)]


def questions_as_classes(
    source: SequenceSource, answers: Sequence[str], *, normalize: Callable[[str], str] = _as_given
) -> "QuestionClassSource":
    """Question answering as classification: the label of a question is the place of its answer among `answers`.

    Args:
        source: questions, whose target texts are the annotators' answers, such as those of `scene_task_source` and
            `vqa_source`.
        answers: the classes, from `common_answers` of the training questions.
        normalize: as for `common_answers`.

    Returns:
        A source with the answers as class names. The label is that of the answer that most annotators gave, the first
        of them where several are as frequent; -1 where it is none of the classes. Records keep all `answers`, as they
        were given, for the metric.

    Raises:
        InputError: no answers, or some of them twice.
    """
    if not answers or len(set(answers)) != len(answers):
        raise InputError(f"expected answers to be different ones, at least one, got {len(answers)}")
    return QuestionClassSource(source, answers, normalize)


class QuestionClassSource:
    """Questions with the places of their answers among the classes; made by `questions_as_classes`."""

    pictures = 1

    def __init__(self, source: SequenceSource, answers: Sequence[str], normalize: Callable[[str], str]):
        self._source = source
        self._normalize = normalize
        self.class_names = list(answers)
        self._labels = {answer: label for label, answer in enumerate(answers)}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> ClassRecord:
        example = self._source[index]
        record = ClassRecord(
            image=example["image"],
            text=example["source_text"],
            label=self._label(example["target_texts"]),
            example_id=index,
            origin=example["origin"],
            answers=example["target_texts"],
        )
        if "question_type" in example:
            record["question_type"] = example["question_type"]
        if "ground_truth" in example:
            record["ground_truth"] = example["ground_truth"]
        return record

    def labelled_text(self, index: int) -> LabelledText:
        question, answers = self._source.texts(index)
        return LabelledText(question, self._label(answers))

    def _label(self, answers: Sequence[str]) -> int:
        return self._labels.get(_majority(answers, self._normalize), -1)


def _majority(answers: Sequence[str], normalize: Callable[[str], str]) -> str:
    return commonest_texts([[normalize(answer) for answer in answers]])[0]
