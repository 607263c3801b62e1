import hashlib
import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from repkit.checks import InputError
from repkit.data import digit_scenes
from repkit.data.images import load_image
from repkit.data.scene_tasks import TASKS
from repkit.data.sequence_sources import Texts, all_texts, jsonl_sequence_source, scene_task_source
from repkit.evaluate.generation import evaluate_answers

SMALL = {"train": 60, "validation": 12, "test": 24}
"""As in `tasks_dir`."""


@pytest.mark.parametrize("task", TASKS)
def test_records_hold_what_the_task_composed(tasks_dir, task):
    for split, size in SMALL.items():
        source = scene_task_source(task, split, tasks_dir)
        assert len(source) == size * (digit_scenes.TRAINING_FACTORS.get(task, 1) if split == "train" else 1)
        for index in (0, size - 1):
            record = source[index]
            assert record["example_id"] == index
            assert record["origin"] == f"digit_scenes/{task}/1.0.0 {split}[{index}]"
            assert load_image(record["image"], image_size=24).shape == (24, 24, 3)
            assert source.texts(index) == Texts(record["source_text"], record["target_texts"])
            assert 2 <= len(record["ground_truth"]["digits"]) <= 4
            assert ("question_type" in record) == ("answer" in record) == (task == "questions")


def test_questions_have_their_type_and_ten_answers(tasks_dir):
    source = scene_task_source("questions", "test", tasks_dir)
    records = [source[index] for index in range(len(source))]
    assert {record["question_type"] for record in records} == {"digit", "colour", "count", "relation", "yes_no", "sum"}
    for record in records:
        assert len(record["target_texts"]) == 10
        assert record["answer"] in record["target_texts"]
        assert record["source_text"].endswith("?")
    metrics = evaluate_answers({record["example_id"]: record["answer"] for record in records}, source)
    for kind in {record["question_type"] for record in records}:
        assert metrics[f"{kind}/vqa_accuracy"] > 0.9


@pytest.mark.parametrize("task", TASKS)
def test_no_stroke_of_one_split_occurs_in_another(tasks_dir, task):
    used = []
    for split in SMALL:
        source = scene_task_source(task, split, tasks_dir)
        digits = [digit for index in range(len(source)) for digit in source[index]["ground_truth"]["digits"]]
        used.append({digit["stroke_id"] for digit in digits})
    assert sum(map(len, used)) == len(set.union(*used))


def test_all_texts_are_those_of_both_sides(tasks_dir):
    source = scene_task_source("translation", "validation", tasks_dir)
    expected = [text for i in range(12) for text in (source[i]["source_text"], *source[i]["target_texts"])]
    assert all_texts(source) == expected


def test_unknown_task_and_split_are_refused_with_the_nearest_name(tasks_dir):
    with pytest.raises(InputError, match="unknown task on digit scenes 'question'; did you mean 'questions'"):
        scene_task_source("question", "train", tasks_dir)
    with pytest.raises(InputError, match="unknown split of digit_scenes/captions 'tset'; did you mean 'test'"):
        scene_task_source("captions", "tset", tasks_dir)


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("questions", "6ffa74bcaa901268"),
        ("captions", "831dcf7a8eacbf83"),
        ("translation", "660b096d135b2924"),
        ("grounding", "eaf189feb22e4bf8"),
    ],
)
def test_the_examples_are_the_same_on_every_machine(tmp_path, task, digest):
    """A change of these numbers changes the data set: raise its version with it."""
    builder = digit_scenes.DigitScenes(config=task, data_dir=tmp_path)
    # As they are written, but not written: preparing all splits takes longer.
    examples = list(builder._split_generators(tfds.download.DownloadManager(download_dir=tmp_path))["test"])
    assert [index for index, _ in examples] == list(range(digit_scenes.TASK_SPLIT_SIZES["test"]))
    found = hashlib.sha256()
    for _, example in examples:
        found.update(load_image(example["image"].getvalue(), image_size=24).tobytes())
        found.update("\n".join([example["source_text"], *example["target_texts"]]).encode())
    assert found.hexdigest()[:16] == digest


GOOD = {"image": "images/0.png", "source": "a seven", "target": ["eine rote Sieben", "die rote Sieben"]}


def test_jsonl_gives_images_with_source_and_targets(write_pairs):
    path = write_pairs(GOOD, "", {**GOOD, "image": "images/5.png", "source": "", "target": "grün", "question_id": 3})
    source = jsonl_sequence_source(path)
    assert len(source) == 2
    first, second = source[0], source[1]
    assert (first["source_text"], first["target_texts"]) == ("a seven", ["eine rote Sieben", "die rote Sieben"])
    assert (second["source_text"], second["target_texts"]) == ("", ["grün"])
    assert second["example_id"] == 1
    assert second["origin"].endswith("pairs.jsonl:3 (images/5.png)")
    np.testing.assert_array_equal(
        load_image(second["image"], image_size=8), load_image((path.parent / "images/5.png").read_bytes(), image_size=8)
    )
    assert source.texts(0) == Texts("a seven", ["eine rote Sieben", "die rote Sieben"])
    assert all_texts(source) == ["a seven", "eine rote Sieben", "die rote Sieben", "", "grün"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected one JSON object a line: "),
        ([1], r'expected {"image": path, "source": text, "target": text or [text, ...]}, got list'),
        ({"image": "images/1.png", "target": "a"}, "'source' is missing"),
        ({"image": "images/1.png", "source": "a"}, "'target' is missing"),
        ({"source": "a", "target": "a"}, "'image' is missing"),
        ({**GOOD, "source": ["a"]}, "expected 'source' to be a text, got ['a']"),
        ({**GOOD, "target": []}, "expected 'target' to be a text or a list of texts, not empty, got []"),
        ({**GOOD, "target": ["a", " "]}, "expected 'target' to be a text or a list of texts, not empty"),
        ({**GOOD, "target": 7}, "expected 'target' to be a text or a list of texts, not empty, got 7"),
        ({**GOOD, "image": "../secret.png"}, "image '../secret.png' leads out of "),
        ({**GOOD, "image": "/etc/passwd"}, "expected 'image' to be relative, got '/etc/passwd'; give image_root"),
        ({**GOOD, "image": "images/none.png"}, "cannot read image 'images/none.png': No such file"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(write_pairs, line, message):
    path = write_pairs(GOOD, "", line if isinstance(line, str) else json.dumps(line), GOOD)
    with pytest.raises(InputError, match=rf"pairs\.jsonl:3: .*{re.escape(message)}") as error:
        jsonl_sequence_source(path)
    assert "\n" not in str(error.value)


def test_image_root_allows_absolute_paths_inside_of_it_only(write_pairs, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(elsewhere / "0.png")
    source = jsonl_sequence_source(write_pairs({**GOOD, "image": str(elsewhere / "0.png")}), image_root=elsewhere)
    assert load_image(source[0]["image"], image_size=4)[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: image .* leads out of .*elsewhere"):
        jsonl_sequence_source(write_pairs({**GOOD, "image": "../pairs/images/0.png"}), image_root=elsewhere)
