import hashlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.data.digit_scenes import SPLIT_SIZES
from repkit.data.images import load_image
from repkit.data.scenes import DIGIT_NAMES
from repkit.data.sources import digit_scenes_source

PREPARE = """
import sys
from repkit.data.sources import digit_scenes_source
source = digit_scenes_source(sys.argv[1], "test", sys.argv[2])
print(len(source), "tensorflow" in sys.modules)
"""


def prepare_elsewhere(config: str, data_dir) -> subprocess.Popen:
    command = [sys.executable, "-c", PREPARE, config, str(data_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_splits_have_their_sizes_and_every_record_its_fields(single_scenes):
    for split, size in SPLIT_SIZES.items():
        source = single_scenes(split)
        assert len(source) == size
        assert source.has_labels
        record = source[size - 1]
        assert record["example_id"] == size - 1
        assert load_image(record["image"], image_size=16).shape == (16, 16, 3)
        (digit,) = record["ground_truth"]["digits"]
        assert digit["digit"] == record["label"]
        assert record["captions"] == source.captions(size - 1)
        assert DIGIT_NAMES[record["label"]] in record["captions"][0]


def test_no_stroke_of_the_test_scenes_occurs_in_training(single_scenes):
    used = {}
    for split in SPLIT_SIZES:
        source = single_scenes(split)
        used[split] = {source[i]["ground_truth"]["digits"][0]["stroke_id"] for i in range(min(len(source), 1500))}
    assert used["train"].isdisjoint(used["validation"] | used["test"])
    assert used["validation"].isdisjoint(used["test"])


def test_the_scenes_are_the_same_on_every_machine(single_scenes):
    """A change of this number changes the data set: raise its version with it."""
    source = single_scenes("test")
    digest = hashlib.sha256()
    for index in range(len(source)):
        record = source[index]
        digest.update(load_image(record["image"], image_size=16).tobytes() + record["captions"][0].encode())
    assert digest.hexdigest()[:16] == "c1ee20c87017e2dd"


def test_the_image_is_the_scene_that_the_ground_truth_describes(single_scenes):
    from repkit.data import scenes

    strokes = scenes.load_strokes()
    source = single_scenes("validation")
    for index in range(20):
        record = source[index]
        (digit,) = record["ground_truth"]["digits"]
        image = load_image(record["image"], image_size=16).astype(float)
        box = image[digit["top"] : digit["top"] + 8, digit["left"] : digit["left"] + 8]
        # The ink of a stroke is the share of the way from the background to the digit's colour.
        background = image[8 - digit["top"], 8 - digit["left"]] if digit["top"] != 4 else image[0, 0]
        along = ((box - background) ** 2).sum(-1) ** 0.5
        np.testing.assert_allclose(along / along.max(), strokes.images[digit["stroke_id"]], atol=0.02)


def test_unknown_config_and_split_are_refused_with_the_nearest_name(scenes_dir):
    with pytest.raises(InputError, match="unknown digit_scenes config 'singel'; did you mean 'single'"):
        digit_scenes_source("singel", "train", scenes_dir)
    with pytest.raises(InputError, match="unknown split of digit_scenes/single 'trian'; did you mean 'train'"):
        digit_scenes_source("single", "trian[:10]", scenes_dir)


def test_a_part_of_a_split_can_be_taken(single_scenes):
    part, whole = single_scenes("test[10:20]"), single_scenes("test")
    assert len(part) == 10
    assert part[0]["image"] == whole[10]["image"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot prepare digit_scenes/single in .*file.*; give another data_dir"):
        digit_scenes_source("single", "train", tmp_path / "file")


@pytest.mark.slow
def test_pairs_are_prepared_without_tensorflow_by_two_processes_at_once(tmp_path):
    processes = [prepare_elsewhere("pairs", tmp_path) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert output == "512 False\n"
    source = digit_scenes_source("pairs", "test", tmp_path)
    assert not source.has_labels
    for index in range(50):
        record = source[index]
        assert len(record["captions"]) == 2
        assert load_image(record["image"], image_size=32).shape == (32, 32, 3)
        assert 2 <= len(record["ground_truth"]["digits"]) <= 4
    assert not list(tmp_path.glob("digit_scenes/pairs/*incomplete*"))


@pytest.mark.slow
def test_an_interrupted_build_is_made_anew(tmp_path):
    process = prepare_elsewhere("single", tmp_path)
    while not list(tmp_path.glob("digit_scenes/single/*incomplete*/*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "digit_scenes/single/1.0.0").exists()
    assert len(digit_scenes_source("single", "test", tmp_path)) == 512
