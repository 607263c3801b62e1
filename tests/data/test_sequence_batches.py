"""Batches of generation tasks; what they share with those of pairs is tested there in full, and here by example."""

import itertools
import json

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.data.images import load_image
from repkit.data.pipeline import Batches, make_sequence_batches
from repkit.data.scene_tasks import TASKS
from repkit.data.sequence_sources import all_texts, jsonl_sequence_source, scene_task_source
from repkit.data.tokenizer import train_tokenizer

EXAMPLES = 23
COLOURS = ("red", "green", "blue")
LENGTHS = {"source": 10, "target": 5}


@pytest.fixture
def lines():
    """23 images with a question each and one, two or three answers by turns."""

    def line(index):
        answers = [f"{COLOURS[(index + shift) % 3]} {index}" for shift in range(index % 3 + 1)]
        return {"image": f"images/{index}.png", "source": f"what is number {index}?", "target": answers}

    return [line(index) for index in range(EXAMPLES)]


@pytest.fixture
def source(write_pairs, lines):
    return jsonl_sequence_source(write_pairs(*lines))


@pytest.fixture
def tokenizer(source):
    return train_tokenizer(all_texts(source), vocab_size=200)


@pytest.fixture
def batches_of(tokenizer):
    """Training batches of eight, read by one process without threads unless told otherwise."""
    opened: list[Batches] = []

    def make(source, **options) -> Batches:
        defaults = {
            "tokenizer": tokenizer,
            "batch_size": 8,
            "image_size": 8,
            "max_source_length": LENGTHS["source"],
            "max_target_length": LENGTHS["target"],
            "shuffle": True,
            "seed": 3,
            "repeat": True,
            "process_index": 0,
            "process_count": 1,
            "num_threads": 0,
        }
        opened.append(make_sequence_batches(source, **{**defaults, **options}))
        return opened[-1]

    yield make
    for batches in opened:
        batches.close()


def take(batches, count):
    return list(itertools.islice(batches, count))


def join(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_batch_holds_what_the_source_says(source, batches_of, tokenizer):
    batch = next(batches_of(source))
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        "image": ((8, 8, 8, 3), np.uint8),
        "source_ids": ((8, LENGTHS["source"]), np.int32),
        "source_mask": ((8, LENGTHS["source"]), bool),
        "target_ids": ((8, LENGTHS["target"]), np.int32),
        "target_mask": ((8, LENGTHS["target"]), bool),
        "example_id": ((8,), np.int32),
        "where": ((8,), bool),
    }
    assert batch["where"].all()
    asked, answered = tokenizer.decode(batch["source_ids"]), tokenizer.decode(batch["target_ids"])
    for row, index in enumerate(batch["example_id"]):
        record = source[index]
        np.testing.assert_array_equal(batch["image"][row], load_image(record["image"], image_size=8))
        assert asked[row] == record["source_text"]
        assert answered[row] in record["target_texts"]


def test_targets_are_the_text_s_tokens_and_the_end_without_the_begin(source, batches_of, tokenizer):
    batch = next(batches_of(source))
    texts = tokenizer.decode(batch["target_ids"])
    for ids, mask, text in zip(batch["target_ids"], batch["target_mask"], texts, strict=True):
        with_begin, begin_mask = tokenizer.encode([text], LENGTHS["target"] + 1)
        assert ids[mask].tolist() == with_begin[0][begin_mask[0]][1:].tolist()
        assert ids[mask][-1] == tokenizer.eos_id
        assert tokenizer.bos_id not in ids
        assert (ids[~mask] == tokenizer.pad_id).all()
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3


def test_a_long_target_loses_its_last_tokens_and_never_its_end(source, batches_of, tokenizer):
    batch = next(batches_of(source, max_target_length=2))
    assert batch["target_mask"].all()
    assert (batch["target_ids"][:, 1] == tokenizer.eos_id).all()
    assert set(tokenizer.decode(batch["target_ids"])) <= set(COLOURS)


def test_training_draws_among_the_targets_and_evaluation_takes_the_first(source, batches_of, tokenizer):
    drawn = join(take(batches_of(source), 2 * EXAMPLES))
    texts = np.array(tokenizer.decode(drawn["target_ids"]))
    for index in range(EXAMPLES):
        assert set(texts[drawn["example_id"] == index]) == set(source.texts(index).targets)
    passed = join(list(batches_of(source, shuffle=False, repeat=False)))
    first = tokenizer.decode(passed["target_ids"][passed["where"]])
    assert first == [source.texts(index).targets[0] for index in range(EXAMPLES)]


@pytest.mark.parametrize("repeat", [True, False])
def test_the_commonest_target_is_the_same_in_every_epoch(write_pairs, lines, batches_of, tokenizer, repeat):
    for line in lines:
        line["target"] = [*line["target"], line["target"][-1]]
    source = jsonl_sequence_source(write_pairs(*lines))
    rows = join(list(itertools.islice(batches_of(source, repeat=repeat, targets="commonest"), 3)))
    texts = np.array(tokenizer.decode(rows["target_ids"]))
    for index, text in zip(rows["example_id"][rows["where"]], texts[rows["where"]], strict=True):
        assert text == lines[index]["target"][-1]


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_on_digit_scenes_pass_through_one_tokenizer(tasks_dir, batches_of, task):
    sources = [scene_task_source(name, "train", tasks_dir) for name in TASKS]
    shared = train_tokenizer([text for source in sources for text in all_texts(source)], vocab_size=512)
    source = scene_task_source(task, "train", tasks_dir)
    batch = next(batches_of(source, tokenizer=shared, image_size=32, max_source_length=40, max_target_length=64))
    asked, told = shared.decode(batch["source_ids"]), shared.decode(batch["target_ids"])
    for row, index in enumerate(batch["example_id"]):
        record = source[index]
        assert asked[row] == record["source_text"]
        # The tokenizer knows lower case only.
        assert told[row] in [text.lower() for text in record["target_texts"]]
        np.testing.assert_array_equal(batch["image"][row], load_image(record["image"], image_size=32))


def test_every_epoch_shows_each_example_once_in_an_order_of_its_own(source, batches_of):
    ids = join(take(batches_of(source), EXAMPLES))["example_id"].reshape(8, EXAMPLES)
    assert (np.sort(ids, axis=1) == np.arange(EXAMPLES)).all()
    assert len({tuple(epoch) for epoch in ids}) == 8


@pytest.mark.parametrize(("consumed", "num_threads"), [(0, 0), (3, 0), (4, 3)])
def test_resuming_goes_on_at_the_exact_next_batch(source, batches_of, consumed, num_threads):
    expected = take(batches_of(source), consumed + 4)
    first = batches_of(source, num_threads=num_threads)
    assert_equal(take(first, consumed), expected[:consumed])
    state = json.loads(json.dumps(first.get_state()))
    second = batches_of(source, num_threads=num_threads)
    second.set_state(state)
    assert_equal(take(second, 4), expected[consumed:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_processes_shares_together_are_the_global_batch(source, batches_of, process_count):
    shares = [take(batches_of(source, process_index=i, process_count=process_count), 5) for i in range(process_count)]
    assert_equal([join(list(parts)) for parts in zip(*shares, strict=True)], take(batches_of(source), 5))


def test_the_last_batch_of_a_single_pass_is_filled_up_with_rows_to_ignore(source, batches_of, tokenizer):
    passed = list(batches_of(source, shuffle=False, repeat=False))
    assert [batch["where"].sum() for batch in passed] == [8, 8, 7]
    padding = {name: values[-1] for name, values in passed[-1].items()}
    assert padding["image"].max() == padding["example_id"] == 0
    # Attention over a row without any token would be NaN, and no later mask keeps that from a gradient.
    assert padding["source_ids"][padding["source_mask"]].tolist() == [tokenizer.bos_id, tokenizer.eos_id]
    assert padding["target_ids"][padding["target_mask"]].tolist() == [tokenizer.eos_id]


def test_a_corrupt_example_keeps_its_row_and_texts(write_pairs, lines, batches_of):
    path = write_pairs(*lines)
    damaged = jsonl_sequence_source(path)
    whole = join(take(batches_of(damaged), 9))
    (path.parent / "images/5.png").write_bytes(b"no image")
    (path.parent / "images/6.png").unlink()
    batches = batches_of(damaged, max_corrupt_share=0.1)
    rows = join(take(batches, 9))
    corrupt = np.isin(rows["example_id"], (5, 6))
    np.testing.assert_array_equal(rows["where"], ~corrupt)
    assert rows["image"][corrupt].max() == 0
    for name in rows.keys() - {"image", "where"}:
        np.testing.assert_array_equal(rows[name], whole[name])
    assert batches.corrupt == corrupt.sum() > 0
    with pytest.raises(InputError, match=r"more than max_corrupt_share 0 allows; .*pairs.jsonl:\d+.*images/[56].png"):
        take(batches_of(damaged, max_corrupt_share=0.0), 9)


def test_an_example_without_targets_is_corrupt(source, batches_of):
    class WithoutTargets:
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            return {**source[index], "target_texts": []} if index == 4 else source[index]

        def texts(self, index):
            texts = source.texts(index)
            return texts._replace(targets=[]) if index == 4 else texts

    rows = join(list(batches_of(WithoutTargets(), repeat=False, shuffle=False, max_corrupt_share=0.1)))
    assert np.flatnonzero(~rows["where"]).tolist() == [4, 23]
    with pytest.raises(InputError, match=r"the last one: .*pairs.jsonl:5 .*: there is no target text"):
        list(batches_of(WithoutTargets(), max_corrupt_share=0.0, repeat=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"process_count": 3}, "expected a batch_size that divides by the 3 processes, got 8"),
        ({"seed": -1}, "expected seed of at least 0, got -1"),
        ({"max_source_length": 2}, r"expected max_source_length of at least 3 \(begin, one token, end\), got 2"),
        ({"targets": "comonest"}, "unknown targets 'comonest'; did you mean 'commonest'"),
        ({"max_target_length": 1}, r"expected max_target_length of at least 2 \(one token, end\), got 1"),
    ],
)
def test_bad_arguments_are_refused(source, batches_of, options, message):
    with pytest.raises(InputError, match=message):
        batches_of(source, **options)
