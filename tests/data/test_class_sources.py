import hashlib

import pytest
import tensorflow_datasets as tfds

from repkit.checks import InputError
from repkit.data import digit_scenes
from repkit.data.class_sources import (
    LabelledText,
    all_class_texts,
    common_answers,
    questions_as_classes,
    scene_class_source,
)
from repkit.data.images import load_image
from repkit.data.scene_classes import CLASS_TASKS
from repkit.data.scene_questions import NUMBER_NAMES
from repkit.data.sequence_sources import scene_task_source

SMALL = {"train": 60, "validation": 12, "test": 24}
"""As in `tasks_dir`."""

CLASSES = {
    "statements": ("false", "true"),
    "assignment": ("first", "second", "neither"),
    "entailment": ("entailment", "neutral", "contradiction"),
}


VERSIONS = {"statements": "1.1.0", "assignment": "1.1.0", "entailment": "1.0.0"}


@pytest.mark.parametrize("task", CLASS_TASKS)
def test_records_hold_what_the_task_composed(tasks_dir, task):
    pictures = 1 if task == "entailment" else 2
    for split, size in SMALL.items():
        source = scene_class_source(task, split, tasks_dir)
        size *= digit_scenes.TRAINING_FACTORS.get(task, 1) if split == "train" else 1
        assert len(source) == size
        assert (source.class_names, source.pictures) == (CLASSES[task], pictures)
        records = [source[index] for index in range(size)]
        counts = [[record["label"] for record in records].count(label) for label in range(len(CLASSES[task]))]
        assert counts == [size // len(CLASSES[task])] * len(CLASSES[task])
        for index, record in enumerate(records):
            origin = f"digit_scenes/{task}/{VERSIONS[task]} {split}[{index}]"
            assert (record["example_id"], record["origin"]) == (index, origin)
            assert source.labelled_text(index) == LabelledText(record["text"], record["label"])
            assert ("second_image" in record) == ("second_ground_truth" in record) == (pictures == 2)
            for name in ("image", "second_image")[:pictures]:
                assert load_image(record[name], image_size=24).shape == (24, 24, 3)
            assert record["form"]
            assert 2 <= len(record["ground_truth"]["digits"]) <= 4
        assert all_class_texts(source) == [record["text"] for record in records]


@pytest.mark.parametrize("task", CLASS_TASKS)
def test_no_stroke_of_one_split_occurs_in_another(tasks_dir, task):
    used = []
    for split in SMALL:
        source = scene_class_source(task, split, tasks_dir)
        truths = [source[i].get(name) for i in range(len(source)) for name in ("ground_truth", "second_ground_truth")]
        digits = [digit for truth in truths if truth for digit in [*truth["digits"], truth.get("covered")] if digit]
        used.append({digit["stroke_id"] for digit in digits})
    assert sum(map(len, used)) == len(set.union(*used))


def test_unknown_task_is_refused_with_the_nearest_name(tasks_dir):
    with pytest.raises(InputError, match="unknown classification task on digit scenes 'statement'; did you mean"):
        scene_class_source("statement", "train", tasks_dir)


@pytest.mark.parametrize(
    ("task", "digest"),
    [("statements", "72f775065cb1b98d"), ("assignment", "194a9466887142a9"), ("entailment", "70a4ca2574db96ce")],
)
def test_the_examples_are_the_same_on_every_machine(tmp_path, task, digest):
    """A change of these numbers changes the data set: raise its version with it."""
    builder = digit_scenes.DigitScenes(config=task, data_dir=tmp_path)
    # As they are written, but not written: preparing all splits takes longer.
    examples = list(builder._split_generators(tfds.download.DownloadManager(download_dir=tmp_path))["test"])
    assert [index for index, _ in examples] == list(range(digit_scenes.TASK_SPLIT_SIZES["test"]))
    found = hashlib.sha256()
    for _, example in examples:
        for name in ("image", "second_image")[: CLASS_TASKS[task].pictures]:
            found.update(load_image(example[name].getvalue(), image_size=24).tobytes())
        found.update(f"{example['text']}\n{example['label']}".encode())
    assert found.hexdigest()[:16] == digest


def test_questions_on_scenes_become_classes(tasks_dir):
    def plain(answer: str) -> str:
        return NUMBER_NAMES[int(answer)] if answer.isdecimal() else answer.lower().rstrip(".")

    training = scene_task_source("questions", "train", tasks_dir)
    answers = common_answers(training, count=100, normalize=plain)
    true_answers = [training[index].get("answer") for index in range(len(training))]
    assert set(answers) == set(true_answers)
    assert true_answers.count(answers[0]) == max(map(true_answers.count, answers))
    assert common_answers(training, count=2, normalize=plain) == answers[:2]
    test = scene_task_source("questions", "test", tasks_dir)
    source = questions_as_classes(test, answers, normalize=plain)
    for index in range(len(test)):
        record, question = source[index], test[index]
        expected = answers.index(question["answer"]) if question["answer"] in answers else -1
        assert (record["text"], record["label"]) == source.labelled_text(index) == (question["source_text"], expected)
        assert record["answers"] == question["target_texts"]
        assert record["question_type"] == question["question_type"]
        assert record["ground_truth"] == question["ground_truth"]
