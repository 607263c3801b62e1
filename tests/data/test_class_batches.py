"""Batches of classification tasks; what they share with those of pairs is tested there in full, and here by example."""

import itertools

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.data.class_sources import all_class_texts, questions_as_classes, scene_class_source
from repkit.data.images import load_image
from repkit.data.pipeline import Batches, make_class_batches
from repkit.data.scene_classes import CLASS_TASKS
from repkit.data.sequence_sources import scene_task_source
from repkit.data.tokenizer import train_tokenizer

LENGTH = 32


@pytest.fixture
def batches_of(tasks_dir):
    """Training batches of eight, read by one process without threads unless told otherwise."""
    texts = [text for task in CLASS_TASKS for text in all_class_texts(scene_class_source(task, "train", tasks_dir))]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    opened: list[Batches] = []

    def make(source, **options) -> Batches:
        defaults = {
            "tokenizer": tokenizer,
            "batch_size": 8,
            "image_size": 24,
            "max_length": LENGTH,
            "shuffle": True,
            "seed": 3,
            "repeat": True,
            "process_index": 0,
            "process_count": 1,
            "num_threads": 0,
        }
        opened.append(make_class_batches(source, **{**defaults, **options}))
        return opened[-1]

    yield make
    for batches in opened:
        batches.close()


@pytest.mark.parametrize("task", CLASS_TASKS)
def test_a_batch_holds_what_the_source_says(tasks_dir, batches_of, task):
    source = scene_class_source(task, "train", tasks_dir)
    batch = next(batches_of(source))
    names = ("image", "second_image")[: source.pictures]
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        **dict.fromkeys(names, ((8, 24, 24, 3), np.uint8)),
        "token_ids": ((8, LENGTH), np.int32),
        "token_mask": ((8, LENGTH), bool),
        "label": ((8,), np.int32),
        "example_id": ((8,), np.int32),
        "where": ((8,), bool),
    }
    assert batch["where"].all()
    for row, index in enumerate(batch["example_id"]):
        record = source[index]
        assert batch["label"][row] == record["label"]
        for name in names:
            np.testing.assert_array_equal(batch[name][row], load_image(record[name], image_size=24))
    tokenizer = train_tokenizer(all_class_texts(source), vocab_size=300)
    batch = next(batches_of(source, tokenizer=tokenizer, max_length=64))
    assert tokenizer.decode(batch["token_ids"]) == [source[index]["text"] for index in batch["example_id"]]


def test_resuming_goes_on_at_the_exact_next_batch(tasks_dir, batches_of):
    source = scene_class_source("statements", "train", tasks_dir)
    expected = list(itertools.islice(batches_of(source), 12))
    first, second = batches_of(source, num_threads=2), batches_of(source)
    for _ in range(7):
        next(first)
    second.set_state(first.get_state())
    for batch in expected[7:]:
        for name, values in next(second).items():
            np.testing.assert_array_equal(values, batch[name])


def test_the_last_batch_of_a_single_pass_is_filled_up_with_rows_to_ignore(tasks_dir, batches_of):
    source = scene_class_source("assignment", "validation", tasks_dir)
    passed = list(batches_of(source, shuffle=False, repeat=False))
    assert [batch["where"].sum() for batch in passed] == [8, 4]
    assert np.concatenate([batch["label"][batch["where"]] for batch in passed]).tolist() == [0, 1, 2] * 4
    padding = {name: values[-1] for name, values in passed[-1].items()}
    assert padding["image"].max() == padding["second_image"].max() == padding["label"] == 0
    assert padding["token_mask"].sum() == 2


@pytest.mark.parametrize("damaged", ["image", "second_image"])
def test_one_image_that_cannot_be_read_makes_the_example_corrupt(tasks_dir, batches_of, damaged):
    whole = scene_class_source("statements", "validation", tasks_dir)

    class Damaged:
        class_names, pictures, labelled_text = whole.class_names, whole.pictures, whole.labelled_text

        def __len__(self):
            return len(whole)

        def __getitem__(self, index):
            return {**whole[index], **({damaged: b"no image"} if index == 5 else {})}

    batches = batches_of(Damaged(), shuffle=False, repeat=False, max_corrupt_share=0.1)
    expected = list(batches_of(whole, shuffle=False, repeat=False))
    rows = list(batches)
    assert batches.corrupt == 1
    assert rows[0]["where"].tolist() == [True] * 5 + [False] + [True] * 2
    assert rows[0]["image"][5].max() == rows[0]["second_image"][5].max() == 0
    for name in ("label", "token_ids", "example_id"):
        np.testing.assert_array_equal(rows[0][name], expected[0][name])
    with pytest.raises(InputError, match=r"the last one: digit_scenes/statements/1\.1\.0 validation\[5\]: not a"):
        list(batches_of(Damaged(), repeat=False, max_corrupt_share=0.0))


def test_a_question_without_a_class_is_an_example_with_label_minus_one(tasks_dir, batches_of):
    questions = scene_task_source("questions", "validation", tasks_dir)
    known = questions[0].get("answer")
    source = questions_as_classes(questions, [known])
    labels = np.concatenate([b["label"][b["where"]] for b in batches_of(source, shuffle=False, repeat=False)])
    assert labels.tolist() == [0 if questions[i].get("answer") == known else -1 for i in range(len(questions))]


def test_bad_lengths_are_refused(tasks_dir, batches_of):
    with pytest.raises(InputError, match="expected max_length of at least 3"):
        batches_of(scene_class_source("entailment", "train", tasks_dir), max_length=2)
