"""Small files in the formats that the data sets publish, written here."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repkit.checks import InputError
from repkit.data.class_sources import common_answers, questions_as_classes
from repkit.data.images import load_image
from repkit.data.published import (
    cc3m_source,
    coco_captions_source,
    flickr30k_source,
    multi30k_source,
    nlvr2_source,
    snli_ve_source,
    vqa_source,
)
from repkit.data.sequence_sources import Texts


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path, format="png")


def shade_of(image: bytes | np.ndarray) -> int:
    return int(load_image(image, image_size=4)[0, 0, 0])


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_json_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    return path


def assert_refused(message: str, opened, *arguments, **options) -> None:
    with pytest.raises(InputError) as error:
        opened(*arguments, **options)
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Captions in Karpathy's splits


def karpathy_entry(number: int, split: str, **changes: Any) -> dict[str, Any]:
    captions = [f"Caption {i} of image {number}." for i in range(5)]
    return {
        "filepath": "val2014",
        "sentids": [5 * number + i for i in range(5)],
        "filename": f"COCO_val2014_{number:012d}.jpg",
        "imgid": number,
        "split": split,
        "sentences": [
            {"tokens": text.lower()[:-1].split(), "raw": text, "imgid": number, "sentid": 5 * number + i}
            for i, text in enumerate(captions)
        ],
        "cocoid": number,
        **changes,
    }


SPLITS = ["test", "train", "val", "restval", "train"]


@pytest.fixture
def coco(tmp_path):
    for number in range(len(SPLITS)):
        write_image(tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)

    def write(*entries: Any) -> Path:
        return write_json(tmp_path / "dataset_coco.json", {"images": list(entries), "dataset": "coco"})

    return write


def coco_entries() -> list[dict[str, Any]]:
    return [karpathy_entry(number, split) for number, split in enumerate(SPLITS)]


def test_coco_gives_the_images_of_a_split_with_their_captions(coco, tmp_path):
    path = coco(*coco_entries())
    source = coco_captions_source(path, "train+restval", image_root=tmp_path)
    assert len(source) == 3
    assert not source.has_labels
    records = [source[index] for index in range(3)]
    assert [shade_of(record["image"]) for record in records] == [1, 3, 4]
    assert [record["example_id"] for record in records] == [0, 1, 2]
    assert records[1]["captions"] == source.captions(1) == [f"Caption {i} of image 3." for i in range(5)]
    assert records[1]["origin"].endswith("dataset_coco.json: images[3] (val2014/COCO_val2014_000000000003.jpg)")
    assert len(coco_captions_source(path, "test", image_root=tmp_path)) == 1


def test_flickr30k_lies_in_one_folder(tmp_path):
    entries = [karpathy_entry(7, "train", filename="1000092795.jpg"), karpathy_entry(8, "val", filename="10002456.jpg")]
    for entry in entries:
        del entry["filepath"], entry["cocoid"]
        write_image(tmp_path / "flickr30k-images" / entry["filename"], entry["imgid"])
    path = write_json(tmp_path / "dataset_flickr30k.json", {"images": entries, "dataset": "flickr30k"})
    source = flickr30k_source(path, "val", image_root=tmp_path / "flickr30k-images")
    assert [shade_of(source[index]["image"]) for index in range(len(source))] == [8]
    assert source.captions(0)[4] == "Caption 4 of image 8."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filename": 3}, "expected 'filename' to be a text, not empty, got 3"),
        ({"filepath": "../../etc"}, "image '../../etc/COCO_.*' leads out of "),
        ({"filename": "/etc/passwd"}, "image '/etc/passwd' leads out of "),
        ({"split": ""}, "expected 'split' to be a text, not empty, got ''"),
        ({"sentences": []}, r"expected 'sentences' to be a list, not empty, got \[\]"),
        ({"sentences": [{"tokens": ["a"]}]}, r"expected \{\"raw\": text\}, 'raw' is missing"),
        ({"sentences": [{"raw": " "}]}, "expected 'raw' to be a text, not empty, got ' '"),
    ],
)
def test_a_malformed_entry_is_refused_with_its_place_whatever_its_split(coco, tmp_path, changes, message):
    path = coco(*coco_entries(), karpathy_entry(5, "val") | changes)
    assert_refused(
        rf"dataset_coco\.json: images\[5\]: {message}", coco_captions_source, path, "train", image_root=tmp_path
    )


def test_karpathys_file_must_be_one(coco, tmp_path):
    path = coco(*coco_entries())
    assert_refused(
        "unknown split of .* 'tset'; did you mean 'test'", coco_captions_source, path, "tset", image_root="."
    )
    for text, message in [
        ("[]", r"dataset_coco\.json: expected \{\"images\": \[image, \.\.\.\]\}, got list"),
        ('{"images": 3}', r"dataset_coco\.json: expected 'images' to be a list, got int"),
        ('{"images":\n [', r"dataset_coco\.json:2: expected a JSON object: "),
        ('{"images": [3]}', r"dataset_coco\.json: images\[0\]: expected .* got int"),
    ]:
        path.write_text(text)
        assert_refused(message, coco_captions_source, path, "train", image_root=tmp_path)
    path.write_bytes(b'{"images": "caf\xe9"}')
    assert_refused(r"dataset_coco\.json: expected UTF-8", coco_captions_source, path, "train", image_root=tmp_path)


def test_a_missing_image_is_named_with_what_belongs_there(coco, tmp_path):
    path = coco(*coco_entries(), karpathy_entry(9, "train"))
    message = (
        r"images\[5\]: cannot read image 'val2014/COCO_val2014_000000000009.jpg': No such file in .*cocodataset\.org"
    )
    assert_refused(message, coco_captions_source, path, "train", image_root=tmp_path)
    assert len(coco_captions_source(path, "test", image_root=tmp_path)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# VQA v2


ANSWERS = {
    9: ["net"] * 6 + ["Netting"] * 3 + ["mesh"],
    10: ["yes"] * 10,
    11: ["2"] * 5 + ["two"] * 5,
}


@pytest.fixture
def vqa(tmp_path):
    """Writes both files; `question` and `annotation` change the last of each."""
    for image in (9, 25):
        write_image(tmp_path / "train2014" / f"COCO_train2014_{image:012d}.jpg", image)

    def write(question: dict | None = None, annotation: dict | None = None) -> tuple[Path, Path]:
        images = dict(zip(ANSWERS, (9, 25, 25), strict=True))
        questions = [{"image_id": images[i], "question": f"What is {i}?", "question_id": i} for i in ANSWERS]
        annotations = [
            {
                "question_type": "what is",
                "multiple_choice_answer": answers[0],
                "answers": [
                    {"answer": text, "answer_confidence": "maybe", "answer_id": place}
                    for place, text in enumerate(answers, start=1)
                ],
                "image_id": images[i],
                "answer_type": "other" if i == 9 else "yes/no",
                "question_id": i,
            }
            for i, answers in reversed(ANSWERS.items())
        ]
        questions[-1] |= question or {}
        annotations[-1] |= annotation or {}
        common = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": "train2014", "license": {}}
        return (
            write_json(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", common | {"questions": questions}),
            write_json(tmp_path / "v2_mscoco_train2014_annotations.json", common | {"annotations": annotations}),
        )

    return write


def test_vqa_gives_questions_with_their_ten_answers(vqa, tmp_path):
    source = vqa_source(*vqa(), image_root=tmp_path)
    assert len(source) == 3
    for index, (question_id, answers) in enumerate(ANSWERS.items()):
        record = source[index]
        assert source.texts(index) == Texts(f"What is {question_id}?", answers)
        assert (record["source_text"], record["target_texts"]) == source.texts(index)
        assert shade_of(record["image"]) == (9 if index == 0 else 25)
        assert record.get("question_type") == ("other" if index == 0 else "yes/no")
        assert f"questions.json: questions[{index}] (train2014/COCO" in record["origin"]


def test_answers_become_classes_that_keep_the_ten_answers(vqa, tmp_path):
    source = vqa_source(*vqa(), image_root=tmp_path)
    assert common_answers(source, count=2) == ["net", "yes"]
    classes = questions_as_classes(source, ["yes", "net"])
    assert classes.class_names == ["yes", "net"]
    records = [classes[index] for index in range(3)]
    assert [record["label"] for record in records] == [1, 0, -1]
    assert [classes.labelled_text(index).label for index in range(3)] == [1, 0, -1]
    assert [record.get("answers") for record in records] == list(ANSWERS.values())
    assert [record.get("question_type") for record in records] == ["other", "yes/no", "yes/no"]
    number = {"two": "2"}
    normalized = common_answers(source, count=9, normalize=lambda answer: number.get(answer, answer))
    assert normalized == ["net", "yes", "2"]
    assert_refused("expected count of at least 1, got 0", common_answers, source, count=0)
    assert_refused("expected answers to be different ones, at least one, got 2", questions_as_classes, source, "aa")


@pytest.mark.parametrize(
    ("question", "annotation", "message"),
    [
        ({"question": ""}, {}, r"questions\[2\]: expected 'question' to be a text, not empty, got ''"),
        ({"question_id": "11"}, {}, r"questions\[2\]: expected 'question_id' to be an integer from 0, got '11'"),
        ({"image_id": 9}, {}, r"questions\[2\]: no answers to question_id 11 about image_id 9 in .*annotations\.json"),
        ({}, {"answers": []}, r"annotations\[2\]: expected 'answers' to be a list, not empty"),
        ({}, {"answers": [{"answer": 3}]}, r"annotations\[2\]: expected every 'answer' to be a text, got \[3\]"),
        ({}, {"answer_type": 3}, r"annotations\[2\]: expected 'answer_type' to be a text"),
        ({"question_id": 9, "image_id": 9}, {}, r"questions\[2\]: no answers to question_id 9 about image_id 9"),
    ],
)
def test_questions_and_answers_must_fit(vqa, tmp_path, question, annotation, message):
    assert_refused(message, vqa_source, *vqa(question, annotation), image_root=tmp_path)


def test_answers_to_no_question_are_refused(vqa, tmp_path):
    questions, annotations = vqa()
    value = json.loads(questions.read_text())
    write_json(questions, value | {"questions": value["questions"][:2]})
    message = (
        r"annotations\.json: expected answers to the questions of .*question_id 11 about image_id 25, which is not"
    )
    assert_refused(message, vqa_source, questions, annotations, image_root=tmp_path)
    write_json(questions, value | {"data_subtype": "../train2014"})
    assert_refused("expected 'data_subtype' to be a name such as", vqa_source, questions, annotations, image_root=".")


# ---------------------------------------------------------------------------------------------------------------------
# NLVR2 and SNLI-VE


def nlvr2_line(pair: int, label: str, **changes: Any) -> dict[str, Any]:
    return {
        "validation": {"1": label},
        "sentence": f"Sentence {pair}.",
        "left_url": "http://images/left.png",
        "right_url": "http://images/right.png",
        "writer": "1",
        "label": label,
        "identifier": f"train-10171-{pair}-0",
        "synset": "acorn",
        "query": "two acorns fallen",
        "directory": 73,
        **changes,
    }


@pytest.mark.parametrize("folder", ["images", "images/73"])
def test_nlvr2_gives_two_images_in_the_numbered_folder_or_in_one(tmp_path, folder):
    lines = [nlvr2_line(0, "True"), nlvr2_line(2, "False")]
    for line, pair in zip(lines, (0, 2), strict=True):
        for side in (0, 1):
            write_image(tmp_path / folder / f"train-10171-{pair}-img{side}.png", 10 * pair + side)
        if folder == "images":
            del line["directory"]
    source = nlvr2_source(write_json_lines(tmp_path / "train.json", lines), image_root=tmp_path / "images")
    assert (source.class_names, source.pictures, source.left_out) == (("false", "true"), 2, 0)
    records = [source[index] for index in range(2)]
    assert [record["label"] for record in records] == [1, 0]
    assert [record["text"] for record in records] == ["Sentence 0.", "Sentence 2."]
    shades = [(shade_of(record["image"]), shade_of(record.get("second_image", b""))) for record in records]
    assert shades == [(0, 1), (20, 21)]
    assert source.labelled_text(1) == ("Sentence 2.", 0)


def test_nlvr2_may_go_on_without_the_images_that_are_gone(tmp_path):
    lines = [nlvr2_line(pair, "True") for pair in range(3)]
    for pair, side in [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]:
        write_image(tmp_path / "73" / f"train-10171-{pair}-img{side}.png", pair)
    path = write_json_lines(tmp_path / "train.json", lines)
    assert_refused(
        "train.json:1: cannot read image '73/train-10171-0-img1.png'.*lil.nlp.cornell.edu/nlvr",
        nlvr2_source,
        path,
        image_root=tmp_path,
    )
    source = nlvr2_source(path, image_root=tmp_path, missing_images="leave_out")
    assert (len(source), source.left_out) == (2, 1)
    assert [source[index]["text"] for index in range(2)] == ["Sentence 1.", "Sentence 2."]
    assert [source[index]["example_id"] for index in range(2)] == [0, 1]
    assert_refused("unknown missing_images 'skip'", nlvr2_source, path, image_root=tmp_path, missing_images="skip")
    assert_refused("cannot read image", nlvr2_source, path, image_root=tmp_path / "no", missing_images="leave_out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": True}, "expected the label to be one of False, True, got True"),
        ({"label": ["True"]}, r"expected the label to be one of False, True, got \['True'\]"),
        ({"sentence": None}, "expected 'sentence' to be a text, not empty, got None"),
        ({"identifier": "train-1-0-a"}, "expected 'identifier' such as 'train-1-0-1', got 'train-1-0-a'"),
        ({"identifier": "../../x-1"}, "image '../../x-img0.png' leads out of "),
        ({"directory": "../.."}, "image '../../train-10171-1-img0.png' leads out of "),
    ],
)
def test_a_malformed_line_of_nlvr2_is_refused_with_its_number(tmp_path, changes, message):
    path = write_json_lines(tmp_path / "dev.json", [nlvr2_line(0, "True"), nlvr2_line(1, "True") | changes])
    assert_refused(rf"dev\.json:2: {message}", nlvr2_source, path, image_root=tmp_path / "dev")


def snli_ve_line(label: str, **changes: Any) -> dict[str, Any]:
    return {
        "Flickr30K_ID": "4705552913",
        "annotator_labels": [label],
        "captionID": "4705552913.jpg#2",
        "gold_label": label,
        "pairID": "4705552913.jpg#2r1n",
        "sentence1": "Two women are embracing.",
        "sentence2": f"The sisters: {label}.",
        **changes,
    }


def test_snli_ve_gives_hypotheses_in_three_classes(tmp_path):
    write_image(tmp_path / "4705552913.jpg", 5)
    lines = [snli_ve_line(label) for label in ("neutral", "contradiction", "entailment")]
    source = snli_ve_source(write_json_lines(tmp_path / "snli_ve_dev.jsonl", lines), image_root=tmp_path)
    assert (source.class_names, source.pictures) == (("entailment", "neutral", "contradiction"), 1)
    records = [source[index] for index in range(3)]
    assert [source.class_names[record["label"]] for record in records] == ["neutral", "contradiction", "entailment"]
    assert records[0]["text"] == "The sisters: neutral."
    assert "second_image" not in records[0]
    assert shade_of(records[2]["image"]) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold_label": "-"}, "expected the label to be one of entailment, neutral, contradiction, got '-'"),
        ({"Flickr30K_ID": 4705552913}, "expected 'Flickr30K_ID' to be a text"),
        ({"Flickr30K_ID": "../4705552913"}, "image '../4705552913.jpg' leads out of "),
        ({"sentence2": ""}, "expected 'sentence2' to be a text, not empty"),
    ],
)
def test_a_malformed_line_of_snli_ve_is_refused_with_its_number(tmp_path, changes, message):
    lines = [snli_ve_line("neutral"), snli_ve_line("neutral") | changes]
    path = write_json_lines(tmp_path / "snli_ve_test.jsonl", lines)
    assert_refused(rf"snli_ve_test\.jsonl:2: {message}", snli_ve_source, path, image_root=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Multi30K and Conceptual Captions


@pytest.fixture
def multi30k(tmp_path):
    for name, shade in (("1007129816.jpg", 1), ("COCO_val2014_000000398076.jpg", 2)):
        write_image(tmp_path / "images" / name, shade)

    def write(
        english: str = "A man.\nA café.\n",
        german: str = "Ein Mann.\nEin Café.\n",
        images: str = "1007129816.jpg\nCOCO_val2014_000000398076.jpg#657409\n",
    ) -> list[Path]:
        paths = [tmp_path / "train.en", tmp_path / "train.de.gz", tmp_path / "train.txt"]
        paths[0].write_text(english, encoding="utf-8")
        paths[1].write_bytes(gzip.compress(german.encode()))
        paths[2].write_text(images)
        return paths

    return write


def test_multi30k_gives_sentences_with_translation_and_image(multi30k, tmp_path):
    source = multi30k_source(*multi30k(), image_root=tmp_path / "images")
    assert [source.texts(index) for index in range(len(source))] == [
        Texts("A man.", ["Ein Mann."]),
        Texts("A café.", ["Ein Café."]),
    ]
    assert [shade_of(source[index]["image"]) for index in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"english": "A man.\n"}, r"one line for each image: .*train\.en has 1, .*train\.de\.gz has 2, .*txt has 2"),
        ({"german": "Ein Mann.\n\n"}, r"train\.de\.gz:2: the line is empty"),
        ({"images": "1007129816.jpg\n../secret.jpg\n"}, r"train\.txt:2: image '../secret\.jpg' leads out of "),
        ({"images": "1007129816.jpg\n7.jpg\n"}, r"train\.txt:2: cannot read image '7\.jpg'.*Flickr30k|flickr30k"),
    ],
)
def test_files_of_multi30k_that_do_not_fit_are_refused(multi30k, tmp_path, changes, message):
    assert_refused(message, multi30k_source, *multi30k(**changes), image_root=tmp_path / "images")


def test_a_damaged_archive_is_refused(multi30k, tmp_path):
    paths = multi30k()
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    assert_refused(r"cannot read .*train\.de\.gz: ", multi30k_source, *paths, image_root=tmp_path / "images")


URLS = ["http://a.org/dog.jpg?size=3", "https://b.net/../cat.png", "http://gone.com/x.jpg"]


@pytest.fixture
def cc3m(tmp_path):
    for name, shade in (("0.jpg", 1), ("1.jpg", 2)):
        write_image(tmp_path / "training" / name, shade)

    def write(*rows: str) -> Path:
        path = tmp_path / "Train_GCC-training.tsv"
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        return path

    return write


def test_cc3m_gives_the_captions_whose_images_were_downloaded(cc3m, tmp_path):
    path = cc3m(*(f'caption "{number}"\t{url}' for number, url in enumerate(URLS)))
    names = {URLS[1]: "1.jpg", URLS[0]: "0.jpg"}
    source = cc3m_source(path, image_root=tmp_path / "training", image_names=names)
    assert (len(source), source.left_out) == (2, 1)
    assert [source.captions(index) for index in range(2)] == [['caption "0"'], ['caption "1"']]
    assert [shade_of(source[index]["image"]) for index in range(2)] == [1, 2]
    assert_refused(
        r"training\.tsv:3: cannot read image .*No such file",
        cc3m_source,
        path,
        image_root=tmp_path / "training",
        image_names=names,
        missing_images="refuse",
    )


def test_a_table_may_name_paths(cc3m, tmp_path):
    source = cc3m_source(cc3m("one\t1.jpg", "", "none\t7.jpg"), image_root=tmp_path / "training")
    assert (len(source), source.left_out, shade_of(source[0]["image"])) == (1, 1, 2)
    assert source[0]["origin"].endswith("training.tsv:1 (1.jpg)")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("no tab", "expected a caption, a tab, and the URL or the path of an image, got 'no tab'"),
        ("\t0.jpg", "expected a caption, a tab"),
        ("a\tb\tc", "expected a caption, a tab"),
        (f"a\t{URLS[0]}", "expected the path of an image, got 'http://a.org.*; give image_names, from URL to path"),
        ("a\t../0.jpg", "image '../0.jpg' leads out of "),
    ],
)
def test_a_malformed_row_is_refused_with_its_number(cc3m, tmp_path, row, message):
    path = cc3m("one\t0.jpg", row)
    assert_refused(rf"training\.tsv:2: {message}", cc3m_source, path, image_root=tmp_path / "training")


def test_a_name_may_not_lead_out_of_the_folder(cc3m, tmp_path):
    path = cc3m(f"a\t{URLS[0]}")
    names = {URLS[0]: "../../secret.jpg"}
    assert_refused("leads out of", cc3m_source, path, image_root=tmp_path / "training", image_names=names)
    # A row that has no name cannot name a file itself.
    write_image(tmp_path / "secret.jpg", 9)
    path = cc3m("one\t0.jpg", "secret\t../secret.jpg")
    source = cc3m_source(path, image_root=tmp_path / "training", image_names={"0.jpg": "0.jpg"})
    assert (len(source), source.left_out) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# All


@pytest.mark.parametrize(
    ("opened", "arguments", "published"),
    [
        (coco_captions_source, ["dataset_coco.json", "train"], "cs.stanford.edu/people/karpathy"),
        (flickr30k_source, ["dataset_flickr30k.json", "train"], "cs.stanford.edu/people/karpathy"),
        (vqa_source, ["questions.json", "annotations.json"], "visualqa.org"),
        (nlvr2_source, ["train.json"], "github.com/lil-lab/nlvr"),
        (snli_ve_source, ["snli_ve_train.jsonl"], "github.com/necla-ml/SNLI-VE"),
        (multi30k_source, ["train.en", "train.de", "train.txt"], "github.com/multi30k/dataset"),
        (cc3m_source, ["Train_GCC-training.tsv"], "ai.google.com/research/ConceptualCaptions"),
    ],
)
def test_a_missing_file_says_what_is_expected_and_where_it_is_published(tmp_path, opened, arguments, published):
    message = rf"cannot read {arguments[0]}: No such file or directory; expected .* {re.escape(published)}"
    assert_refused(message, opened, *arguments, image_root=tmp_path)


def test_a_folder_is_no_file(tmp_path):
    assert_refused("cannot read .*: Is a directory$", nlvr2_source, tmp_path, image_root=tmp_path)
