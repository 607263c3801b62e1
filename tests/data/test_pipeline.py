import itertools
import json

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.data.augment import Augmentation
from repkit.data.images import load_image
from repkit.data.pipeline import Batches, caption_hash, caption_table, make_batches
from repkit.data.sources import jsonl_source

PAIRS = 23
FIELDS = {"image", "token_ids", "token_mask", "example_id", "caption_id", "where", "label"}
AUGMENTED_FIELDS = {"augmented_image", "augmented_token_ids", "augmented_token_mask"}


@pytest.fixture
def batches_of(tokenizer):
    """Training batches of eight, read by one process without threads unless told otherwise."""
    opened: list[Batches] = []

    def make(source, **options) -> Batches:
        defaults = {
            "tokenizer": tokenizer,
            "batch_size": 8,
            "image_size": 8,
            "max_length": 12,
            "shuffle": True,
            "seed": 3,
            "repeat": True,
            "process_index": 0,
            "process_count": 1,
            "num_threads": 0,
        }
        opened.append(make_batches(source, **{**defaults, **options}))
        return opened[-1]

    yield make
    for batches in opened:
        batches.close()


def take(batches: Batches, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, count))


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_batch_holds_what_the_source_says(pairs, batches_of, tokenizer):
    batch = next(batches_of(pairs))
    assert batch.keys() == FIELDS
    assert batch["image"].shape == (8, 8, 8, 3)
    assert {name: batch[name].dtype for name in FIELDS} == {
        "image": np.uint8,
        "token_ids": np.int32,
        "token_mask": bool,
        "example_id": np.int32,
        "caption_id": np.int32,
        "where": bool,
        "label": np.int32,
    }
    assert batch["where"].all()
    texts = tokenizer.decode(batch["token_ids"])
    for row, index in enumerate(batch["example_id"]):
        record = pairs[index]
        np.testing.assert_array_equal(batch["image"][row], load_image(record["image"], image_size=8))
        assert texts[row] in record["captions"]
        assert batch["caption_id"][row] == caption_hash(texts[row])
        assert batch["label"][row] == record["label"]


def test_every_epoch_shows_each_example_once_in_an_order_of_its_own(pairs, batches_of):
    ids = join(take(batches_of(pairs), PAIRS))["example_id"].reshape(8, PAIRS)
    assert (np.sort(ids, axis=1) == np.arange(PAIRS)).all()
    assert len({tuple(epoch) for epoch in ids}) == 8


def test_without_shuffling_the_order_is_that_of_the_source(pairs, batches_of):
    ids = join(take(batches_of(pairs, shuffle=False), 6))["example_id"]
    np.testing.assert_array_equal(ids, np.arange(48) % PAIRS)


def test_the_seed_decides(pairs, batches_of):
    ours = take(batches_of(pairs, augmentation=Augmentation()), 6)
    assert_equal(take(batches_of(pairs, augmentation=Augmentation()), 6), ours)
    other = join(take(batches_of(pairs, seed=4), 6))
    assert (other["example_id"] != join(ours)["example_id"]).any()


def test_neighbouring_seeds_do_not_share_epochs(pairs, batches_of):
    """A shuffle that adds the epoch to the seed would give seed 3 in its second epoch the first epoch of seed 4."""
    epochs = [join(take(batches_of(pairs, seed=seed), PAIRS))["example_id"].reshape(8, PAIRS) for seed in (3, 4)]
    assert not {tuple(epoch) for epoch in epochs[0]} & {tuple(epoch) for epoch in epochs[1]}


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 4), (1, 1), (4, 9)])
def test_threads_do_not_change_the_batches(pairs, batches_of, num_threads, prefetch):
    options = {"augmentation": Augmentation(), "num_threads": num_threads, "prefetch": prefetch}
    assert_equal(take(batches_of(pairs, **options), 9), take(batches_of(pairs, augmentation=Augmentation()), 9))


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_processes_shares_together_are_the_global_batch(pairs, batches_of, process_count):
    shares = [
        take(batches_of(pairs, augmentation=Augmentation(), process_index=i, process_count=process_count), 7)
        for i in range(process_count)
    ]
    whole = take(batches_of(pairs, augmentation=Augmentation()), 7)
    assert_equal([join(list(parts)) for parts in zip(*shares, strict=True)], whole)


@pytest.mark.parametrize("consumed", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("num_threads", [0, 3])
def test_resuming_goes_on_at_the_exact_next_batch(pairs, batches_of, consumed, num_threads):
    expected = take(batches_of(pairs, augmentation=Augmentation()), consumed + 4)
    first = batches_of(pairs, augmentation=Augmentation(), num_threads=num_threads)
    assert_equal(take(first, consumed), expected[:consumed])
    state = json.loads(json.dumps(first.get_state()))
    assert state["position"] == consumed * 8

    second = batches_of(pairs, augmentation=Augmentation(), num_threads=num_threads)
    second.set_state(state)
    assert second.get_state() == state
    assert_equal(take(second, 4), expected[consumed:])


def test_a_running_iterator_can_be_set_back_and_forth(pairs, batches_of):
    batches = batches_of(pairs)
    start = batches.get_state()
    expected = take(batches, 5)
    later = batches.get_state()
    batches.set_state(start)
    assert_equal(take(batches, 2), expected[:2])
    batches.set_state(later)
    following = take(batches, 1)
    batches.set_state(start)
    assert_equal(take(batches, 6), expected + following)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4)])
def test_resuming_on_another_number_of_processes(pairs, batches_of, before, after):
    def shares(count):
        return [
            batches_of(pairs, augmentation=Augmentation(), process_index=i, process_count=count) for i in range(count)
        ]

    expected = take(batches_of(pairs, augmentation=Augmentation()), 5)
    first = shares(before)
    for share in first:
        take(share, 3)
    states = [share.get_state() for share in first]
    assert all(state == states[0] for state in states)
    second = shares(after)
    for share in second:
        share.set_state(states[0])
    resumed = [join(list(parts)) for parts in zip(*(take(share, 2) for share in second), strict=True)]
    assert_equal(resumed, expected[3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "it was saved with seed 3, here it is 4"),
        ({"batch_size": 4}, "it was saved with batch_size 8, here it is 4"),
        ({"shuffle": False}, "it was saved with shuffle True, here it is False"),
    ],
)
def test_a_state_of_another_order_is_refused(pairs, batches_of, options, message):
    with pytest.raises(InputError, match=message):
        batches_of(pairs, **options).set_state(batches_of(pairs).get_state())


def test_training_draws_among_the_captions_and_evaluation_takes_the_first(pairs, batches_of):
    drawn = join(take(batches_of(pairs), 2 * PAIRS))
    for index in range(PAIRS):
        captions = pairs.captions(index)
        of_example = drawn["caption_id"][drawn["example_id"] == index]
        assert set(of_example) == {caption_hash(caption) for caption in captions}
    first = join(list(batches_of(pairs, shuffle=False, repeat=False)))
    expected = [caption_hash(pairs.captions(index)[0]) for index in range(PAIRS)]
    np.testing.assert_array_equal(first["caption_id"][first["where"]], expected)


def test_a_single_pass_shows_each_example_once_and_fills_up_the_last_batch(pairs, batches_of, tokenizer):
    passed = list(batches_of(pairs, shuffle=False, repeat=False))
    assert [batch["where"].sum() for batch in passed] == [8, 8, 7]
    rows = join(passed)
    np.testing.assert_array_equal(rows["example_id"][rows["where"]], np.arange(PAIRS))
    padding = {name: values[-1] for name, values in rows.items()}
    assert padding["image"].max() == padding["example_id"] == padding["caption_id"] == padding["label"] == 0
    # Begin and end: attention over a row without any token would be NaN, and no later mask keeps that from a gradient.
    assert padding["token_mask"].sum() == 2


@pytest.mark.parametrize("process_count", [2, 4])
def test_a_single_pass_in_shares_is_the_single_pass(pairs, batches_of, process_count):
    options = {"shuffle": False, "repeat": False}
    shares = [
        list(batches_of(pairs, **options, process_index=i, process_count=process_count)) for i in range(process_count)
    ]
    assert_equal([join(list(parts)) for parts in zip(*shares, strict=True)], list(batches_of(pairs, **options)))


def test_a_single_pass_can_be_resumed(pairs, batches_of):
    options = {"shuffle": False, "repeat": False}
    batches = batches_of(pairs, **options)
    expected = list(batches)
    finished = batches.get_state()
    assert list(batches) == []
    batches.set_state({**finished, "position": 16})
    assert_equal(list(batches), expected[2:])
    batches.set_state(finished)
    assert list(batches) == []


def test_augmentation_adds_views_and_leaves_the_rest(pairs, batches_of):
    plain, augmented = next(batches_of(pairs)), next(batches_of(pairs, augmentation=Augmentation()))
    assert augmented.keys() == FIELDS | AUGMENTED_FIELDS
    for name in FIELDS:
        np.testing.assert_array_equal(plain[name], augmented[name])
    assert augmented["augmented_image"].shape == augmented["image"].shape
    assert (augmented["augmented_image"] != augmented["image"]).any()
    assert augmented["augmented_token_mask"].any(axis=1).all()
    later = join(take(batches_of(pairs, augmentation=Augmentation()), PAIRS))
    views = later["augmented_image"][later["example_id"] == 0]
    assert len(np.unique(views, axis=0)) == 8


def test_the_caption_table_has_every_caption_with_its_example(pairs, tokenizer):
    table = caption_table(pairs, tokenizer=tokenizer, max_length=12)
    captions = [(index, caption) for index in range(PAIRS) for caption in pairs.captions(index)]
    assert table.example_id.tolist() == [index for index, _ in captions]
    assert tokenizer.decode(table.token_ids) == [caption for _, caption in captions]
    assert table.caption_id.tolist() == [caption_hash(caption) for _, caption in captions]
    assert all(column.dtype == np.int32 for column in (table.token_ids, table.caption_id, table.example_id))


def test_equal_captions_have_equal_ids_and_others_differ():
    captions = [f"caption {number}" for number in range(2000)]
    hashes = [caption_hash(caption) for caption in captions]
    assert len(set(hashes)) == 2000
    assert min(hashes) >= 0
    assert max(hashes) < 2**31
    assert hashes == [caption_hash(caption) for caption in captions]


@pytest.fixture
def with_corrupt(write_pairs, pair_lines):
    """The pairs with the images of the given examples spoilt."""

    def make(*indices: int):
        path = write_pairs(*pair_lines)
        source = jsonl_source(path)
        for index in indices:
            (path.parent / "images" / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
        return source

    return make


def test_a_corrupt_example_keeps_its_row_and_is_counted(pairs, with_corrupt, batches_of):
    whole = join(take(batches_of(pairs), 9))
    batches = batches_of(with_corrupt(5), max_corrupt_share=0.1)
    rows = join(take(batches, 9))
    corrupt = rows["example_id"] == 5
    np.testing.assert_array_equal(rows["where"], ~corrupt)
    assert rows["image"][corrupt].max() == 0
    for name in FIELDS - {"image", "where"}:
        np.testing.assert_array_equal(rows[name], whole[name])
    np.testing.assert_array_equal(rows["image"][~corrupt], whole["image"][~corrupt])
    assert batches.corrupt == corrupt.sum() > 0


def test_more_corrupt_examples_than_their_share_end_the_run(with_corrupt, batches_of):
    source = with_corrupt(5, 11)
    # Two of 23 are 8.7 %.
    assert len(list(batches_of(source, max_corrupt_share=0.09, repeat=False))) == 3
    with pytest.raises(
        InputError, match=r"2 of \d+ examples read are corrupt, more than max_corrupt_share 0.08 allows"
    ):
        list(batches_of(source, max_corrupt_share=0.08, repeat=False))
    with pytest.raises(InputError, match=r"the last one: .*pairs.jsonl:6 \(images/5.png\): not a readable image"):
        list(batches_of(source, max_corrupt_share=0.0, repeat=False, shuffle=False))


def test_what_was_corrupt_is_still_known_after_a_resumption(with_corrupt, batches_of):
    source = with_corrupt(5, 11)
    whole, first, second = (batches_of(source, max_corrupt_share=0.09) for _ in range(3))
    take(whole, 12)
    take(first, 5)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert first.corrupt > 0
    take(second, 7)
    assert second.corrupt == whole.corrupt
    assert second.get_state() == whole.get_state()
    # The same two examples, met again: none of them counts twice against the share.
    take(second, 20)


def test_padding_is_not_taken_for_the_example_whose_id_it_has(with_corrupt, batches_of):
    batches = batches_of(with_corrupt(0), max_corrupt_share=0.1, repeat=False, shuffle=False)
    rows = join(list(batches))
    assert (rows["example_id"] == 0).sum() == 2
    assert batches.corrupt == 1


def test_the_share_is_of_all_rows_read_however_many_epochs(with_corrupt, batches_of):
    batches = batches_of(with_corrupt(5, 11), max_corrupt_share=0.09)
    take(batches, PAIRS)
    assert batches.corrupt == 8 * 2


def test_a_missing_image_ends_the_run_with_its_line(pairs, write_pairs, pair_lines, batches_of):
    path = write_pairs(*pair_lines)
    (path.parent / "images/7.png").unlink()
    with pytest.raises(InputError, match=r"pairs.jsonl:8: cannot read image 'images/7.png': No such file"):
        take(batches_of(jsonl_source(path)), 4)


def test_digit_scenes_pass_through_unchanged(single_scenes, batches_of):
    source = single_scenes("test")
    batch = next(batches_of(source, image_size=16, batch_size=64))
    for row in range(64):
        record = source[batch["example_id"][row]]
        np.testing.assert_array_equal(batch["image"][row], load_image(record["image"], image_size=16))
        assert batch["label"][row] == record["label"]


def test_images_too_many_to_be_kept_are_decoded_each_time(monkeypatch, pairs, batches_of):
    expected = take(batches_of(pairs), 6)
    monkeypatch.setattr("repkit.data.pipeline.MOST_CACHED_BYTES", 1000)
    assert_equal(take(batches_of(pairs), 6), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"image_size": 0}, "expected image_size of at least 1, got 0"),
        ({"process_count": 3}, "expected a batch_size that divides by the 3 processes, got 8"),
        ({"process_count": 2, "process_index": 2}, "expected process_index from 0 to 1, got 2"),
        ({"seed": -1}, "expected seed of at least 0, got -1"),
        ({"max_corrupt_share": 1.5}, r"expected max_corrupt_share in \[0, 1\], got 1.5"),
        ({"max_length": 2}, "expected max_length of at least 3"),
    ],
)
def test_bad_arguments_are_refused(pairs, batches_of, options, message):
    with pytest.raises(InputError, match=message):
        batches_of(pairs, **options)


def test_an_empty_source_is_refused(batches_of):
    with pytest.raises(InputError, match="the data set is empty"):
        batches_of([])


def test_the_processes_are_those_of_jax_by_default(pairs, batches_of):
    assert len(next(batches_of(pairs, process_index=None, process_count=None))["image"]) == 8


def test_closed_batches_leave_no_thread(pairs, batches_of):
    import threading

    before = set(threading.enumerate())
    with batches_of(pairs, num_threads=3) as batches:
        next(batches)
        started = set(threading.enumerate()) - before
        assert started
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
