import io
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from repkit.checks import InputError
from repkit.data.images import load_image
from repkit.data.sources import all_captions, jsonl_source, tfds_source

NAMES = ["circle", "square", "cross"]


def png(pixels: np.ndarray) -> io.BytesIO:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="png")
    encoded.seek(0)
    return encoded


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """A data set as other people write them: encoded images under a key of their own, texts and classes."""

    VERSION = tfds.core.Version("2.1.0")

    def _info(self):
        features = {
            "picture": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "pixels": tfds.features.Tensor(shape=(6, 6, 3), dtype=np.uint8),
            "title": tfds.features.Text(),
            "sentences": tfds.features.Sequence(tfds.features.Text()),
            "shape": tfds.features.ClassLabel(names=NAMES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(7)}

    def _generate_examples(self, count):
        for index in range(count):
            pixels = np.full((6, 6, 3), 10 * index, np.uint8)
            yield (
                index,
                {
                    "picture": png(pixels),
                    "pixels": pixels,
                    "title": f"café number {index}",
                    "sentences": [f"sentence {part} of {index}" for part in range(index % 3 + 1)],
                    "shape": index % 3,
                },
            )


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    tfds_source("tiny_shapes", "train", folder, image_key="picture", caption_key="title")
    return folder


def test_any_tfds_data_set_is_read_by_name(shapes_dir):
    source = tfds_source(
        "tiny_shapes", "train", shapes_dir, image_key="picture", caption_key="title", label_key="shape"
    )
    assert len(source) == 7
    assert source.has_labels
    numbers = []
    for index in range(7):
        record = source[index]
        assert record["example_id"] == index
        number = int(record["captions"][0].removeprefix("café number "))
        assert record["label"] == number % 3
        assert isinstance(record["image"], bytes)
        np.testing.assert_array_equal(load_image(record["image"], image_size=6), 10 * number)
        numbers.append(number)
    assert sorted(numbers) == list(range(7))
    assert all_captions(source) == [f"café number {number}" for number in numbers]


def test_several_captions_arrays_as_images_and_class_names_as_captions(shapes_dir):
    several = tfds_source("tiny_shapes", "train", shapes_dir, image_key="pixels", caption_key="sentences")
    assert not several.has_labels
    for index in range(7):
        record = several[index]
        number = int(record["captions"][0].split()[-1])
        assert record["captions"] == [f"sentence {part} of {number}" for part in range(number % 3 + 1)]
        np.testing.assert_array_equal(load_image(record["image"], image_size=6), 10 * number)
        assert "label" not in record
    named = tfds_source("tiny_shapes", "train[:3]", shapes_dir, image_key="picture", label_key="shape")
    assert len(named) == 3
    assert [named[i]["captions"] for i in range(3)] == [[NAMES[named[i]["label"]]] for i in range(3)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("tiny_shape", "train"),
            {"caption_key": "title"},
            "unknown TFDS data set 'tiny_shape'; did you mean 'tiny_shapes'",
        ),
        (
            ("tiny_shapes", "tran"),
            {"caption_key": "title"},
            "unknown split of tiny_shapes 'tran'; did you mean 'train'",
        ),
        (("tiny_shapes", "train+test"), {"caption_key": "title"}, "unknown split of tiny_shapes 'test'"),
        (("tiny_shapes", "train[:x]"), {"caption_key": "title"}, r"tiny_shapes/2.1.0 train\[:x\]: "),
        (("tiny_shapes", "train[:0]"), {"caption_key": "title"}, "the data set is empty"),
        (("tiny_shapes:9.9.9", "train"), {"caption_key": "title"}, "TFDS data set tiny_shapes:9.9.9: "),
        (
            ("tiny_shapes", "train"),
            {"caption_key": "titel"},
            "unknown feature of tiny_shapes 'titel'; did you mean 'title'",
        ),
        (("tiny_shapes", "train"), {"caption_key": "title", "image_key": "image"}, "unknown feature .* 'image'"),
        (("tiny_shapes", "train"), {}, "expected caption_key or label_key, got neither"),
        (("tiny_shapes", "train"), {"label_key": "title"}, "'title' has no class names; give caption_key"),
    ],
)
def test_bad_tfds_arguments_are_refused(shapes_dir, arguments, options, message):
    with pytest.raises(InputError, match=message):
        tfds_source(*arguments, shapes_dir, **{"image_key": "picture", **options})


def test_no_source_brings_in_tensorflow(shapes_dir, tmp_path):
    """In another process, which also finds a prepared data set without the code that made it."""
    program = (
        "import sys\n"
        "from repkit.data.sources import tfds_source\n"
        "source = tfds_source('tiny_shapes', 'train', sys.argv[1], image_key='picture', caption_key='title')\n"
        "print(len(source), len(source[0]['image']) > 0, 'tensorflow' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(shapes_dir)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "7 True False\n"


def test_jsonl_gives_images_with_one_caption_or_several(pairs, pair_lines):
    assert len(pairs) == len(pair_lines)
    assert pairs.has_labels
    for index, line in enumerate(pair_lines):
        record = pairs[index]
        captions = [line["caption"]] if isinstance(line["caption"], str) else line["caption"]
        assert record["captions"] == pairs.captions(index) == captions
        assert (record["example_id"], record["label"]) == (index, line["label"])
        assert record["origin"].endswith(f"pairs.jsonl:{index + 1} (images/{index}.png)")
        assert load_image(record["image"], image_size=8).shape == (8, 8, 3)
    assert all_captions(pairs)[:3] == [pair_lines[0]["caption"], *pair_lines[1]["caption"]]


def test_jsonl_allows_empty_lines_other_keys_a_byte_order_mark_and_any_language(write_pairs):
    path = write_pairs({"image": "images/0.png", "caption": "eine rote Sieben über Grün", "image_id": 5}, "", "  ")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    source = jsonl_source(path)
    assert len(source) == 1
    assert not source.has_labels
    assert source[0]["captions"] == ["eine rote Sieben über Grün"]


GOOD = {"image": "images/0.png", "caption": "a caption"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected one JSON object a line: "),
        ("[1, 2]", r'expected \{"image": path, "caption": text or \[text, \.\.\.\]\}, got list'),
        ({"image": "images/1.png"}, "'caption' is missing"),
        ({"caption": "a caption"}, "'image' is missing"),
        ({**GOOD, "caption": []}, r"expected 'caption' to be a text or a list of texts, not empty, got \[\]"),
        ({**GOOD, "caption": " "}, "expected 'caption' .* got ' '"),
        ({**GOOD, "caption": ["a", 3]}, r"expected 'caption' .* got \['a', 3\]"),
        ({**GOOD, "caption": None}, "expected 'caption' .* got None"),
        ({**GOOD, "image": ""}, "expected 'image' to be a path, got ''"),
        ({**GOOD, "image": 7}, "expected 'image' to be a path, got 7"),
        ({**GOOD, "image": "images/\0.png"}, "expected 'image' to be a path"),
        ({**GOOD, "image": "../secret.png"}, r"image '\.\./secret\.png' leads out of "),
        ({**GOOD, "image": "images/../../secret.png"}, "leads out of "),
        ({**GOOD, "image": "/etc/passwd"}, "expected 'image' to be relative, got '/etc/passwd'; give image_root"),
        ({**GOOD, "label": "seven"}, "expected 'label' to be an integer from 0, got 'seven'"),
        ({**GOOD, "label": -1}, "expected 'label' to be an integer from 0, got -1"),
        ({**GOOD, "label": True}, "expected 'label' to be an integer from 0, got True"),
        ({**GOOD, "label": 1}, "expected a label on all lines or on none"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(write_pairs, line, message):
    path = write_pairs(GOOD, "", line, GOOD)
    with pytest.raises(InputError, match=rf"pairs\.jsonl:3: .*{message}") as error:
        jsonl_source(path)
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_utf_8_is_refused_with_its_number(write_pairs):
    path = write_pairs(GOOD)
    path.write_bytes(path.read_bytes() + b'{"image": "images/1.png", "caption": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: expected UTF-8"):
        jsonl_source(path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(write_pairs, content):
    path = write_pairs()
    path.write_text(content)
    with pytest.raises(InputError, match=r"pairs\.jsonl: the data set is empty"):
        jsonl_source(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.jsonl: No such file"):
        jsonl_source(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        jsonl_source(tmp_path)


def test_every_image_must_be_there_and_the_first_is_opened_at_the_start(write_pairs):
    missing = {"image": "images/none.png", "caption": "a caption"}
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: cannot read image 'images/none\.png': No such file"):
        jsonl_source(write_pairs(missing, GOOD))
    with pytest.raises(InputError, match=r"pairs\.jsonl:1 \(pairs\.jsonl\): not a readable image"):
        jsonl_source(write_pairs({"image": "pairs.jsonl", "caption": "no image"}, GOOD))
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: cannot read image 'images/none\.png': No such file"):
        jsonl_source(write_pairs(GOOD, missing))


def test_a_malformed_line_is_found_before_any_image_is_opened(write_pairs):
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: expected one JSON object"):
        jsonl_source(write_pairs({"image": "images/none.png", "caption": "a caption"}, "{"))


def test_image_root_allows_absolute_paths_inside_of_it_only(write_pairs, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(elsewhere / "0.png")
    for image in ("0.png", str(elsewhere / "0.png")):
        source = jsonl_source(write_pairs({"image": image, "caption": "a caption"}), image_root=elsewhere)
        assert load_image(source[0]["image"], image_size=4)[0, 0].tolist() == [1, 2, 3]
    for image in ("../pairs/images/0.png", str(tmp_path / "pairs/images/0.png")):
        with pytest.raises(InputError, match=r"pairs\.jsonl:1: image .* leads out of .*elsewhere"):
            jsonl_source(write_pairs({"image": image, "caption": "a caption"}), image_root=elsewhere)


def test_relative_paths_are_relative_to_the_file_wherever_one_stands(write_pairs, monkeypatch, tmp_path):
    path = write_pairs(GOOD)
    monkeypatch.chdir(tmp_path)
    assert json.loads(path.read_text())["image"] == "images/0.png"
    assert len(jsonl_source(path.relative_to(tmp_path))[0]["image"]) > 0
