"""Adapters: the files that well-known data sets publish, as they are, become the pipeline's sources.

Nothing is downloaded. Each function takes the paths of files that you have, reads and checks all of the file that lists
the examples, and checks that the images are there. docs/data.md says where each data set is published and which file
goes where.

| function | data set | source |
|---|---|---|
| `coco_captions_source` | COCO captions, in Karpathy's splits | image-caption pairs |
| `flickr30k_source` | Flickr30k, in Karpathy's splits | image-caption pairs |
| `cc3m_source` | Conceptual Captions, or another TSV of captions | image-caption pairs |
| `vqa_source` | VQA v2 | questions with ten answers |
| `multi30k_source` | Multi30K | translation with an image |
| `nlvr2_source` | NLVR2 | statements about two images |
| `snli_ve_source` | SNLI-VE | entailment |
"""

import gzip
import json
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from repkit.checks import InputError, shown, unknown_name
from repkit.data._jsonl import json_lines, object_with, parsed_text
from repkit.data._listed import Entry, ListedExamples, MissingImages, checked_path, place_in
from repkit.data.class_sources import LabelledText, ListedClassSource
from repkit.data.scene_entailment import ENTAILMENT_CLASSES
from repkit.data.scene_statements import STATEMENT_CLASSES
from repkit.data.sequence_sources import ListedSequenceSource, ListedTexts, Texts
from repkit.data.sources import ListedSource, Pair

PathLike = str | os.PathLike[str]
Value = TypeVar("Value")


MOST_UNPACKED_BYTES = 4 * 2**30
"""More than any of the files has; a small file can claim to hold far more."""


class Published(NamedTuple):
    """Where a data set is published: its files, and its images."""

    files: str
    images: str


COCO_CAPTIONS = Published(
    "dataset_coco.json from caption_datasets.zip at cs.stanford.edu/people/karpathy/deepimagesent",
    "image_root holds train2014/ and val2014/ from cocodataset.org",
)
FLICKR30K = Published(
    "dataset_flickr30k.json from caption_datasets.zip at cs.stanford.edu/people/karpathy/deepimagesent",
    "image_root is flickr30k-images/ from shannon.cs.illinois.edu/DenotationGraph",
)
VQA = Published(
    "v2_OpenEnded_mscoco_..._questions.json and v2_mscoco_..._annotations.json from visualqa.org/download.html",
    "image_root holds train2014/ and val2014/ from cocodataset.org",
)
NLVR2 = Published(
    "train.json, dev.json or test1.json from nlvr2/data at github.com/lil-lab/nlvr",
    "image_root is images/train/, dev/ or test1/ from lil.nlp.cornell.edu/nlvr",
)
SNLI_VE = Published(
    "snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl from github.com/necla-ml/SNLI-VE", FLICKR30K.images
)
MULTI30K = Published(
    "the .en and .de files of data/task1/raw and the lists of data/task1/image_splits at github.com/multi30k/dataset",
    f"{FLICKR30K.images}; the test images of 2017 and 2018 have folders of their own",
)
CC3M = Published(
    "Train_GCC-training.tsv or Validation_GCC-1.1.0-Validation.tsv from ai.google.com/research/ConceptualCaptions",
    "image_root holds the images that were downloaded from the file's URLs",
)


def coco_captions_source(path: PathLike, split: str, *, image_root: PathLike) -> ListedSource:
    """COCO's images with their five captions each, in Karpathy's splits.

    Args:
        path: Karpathy's dataset_coco.json.
        split: "train", "restval", "val" or "test", or several such as "train+restval", on which most papers train.
        image_root: folder with COCO's folders train2014 and val2014.

    Returns:
        The source, in the order of the file.

    Raises:
        InputError: missing file, with where it is published; malformed entry, image path that leads out of the folder,
            missing image (each with the entry's place); unknown split.

    References:
        Karpathy, Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", CVPR 2015. Lin et al.,
        "Microsoft COCO: Common Objects in Context", ECCV 2014.
    """
    return _karpathy_source(path, split, Path(image_root), COCO_CAPTIONS)


def flickr30k_source(path: PathLike, split: str, *, image_root: PathLike) -> ListedSource:
    """Flickr30k's images with their five captions each, in Karpathy's splits.

    Args:
        path: Karpathy's dataset_flickr30k.json.
        split: "train", "val" or "test", or several such as "train+val".
        image_root: the folder with the images.

    Returns:
        The source, in the order of the file.

    Raises:
        InputError: as `coco_captions_source` does.

    References:
        Young et al., "From image descriptions to visual denotations", TACL 2014; the splits as for
        `coco_captions_source`.
    """
    return _karpathy_source(path, split, Path(image_root), FLICKR30K)


def vqa_source(questions_path: PathLike, annotations_path: PathLike, *, image_root: PathLike) -> ListedSequenceSource:
    """VQA v2's questions with their ten answers.

    Args:
        questions_path: such as v2_OpenEnded_mscoco_train2014_questions.json.
        annotations_path: the answers to the same questions, such as v2_mscoco_train2014_annotations.json.
        image_root: folder with COCO's folders train2014 and val2014. Image 9 of the questions of train2014 is
            train2014/COCO_train2014_000000000009.jpg.

    Returns:
        The source, in the order of the questions; target texts are the answers, and the question's type is VQA's
        `answer_type`: "yes/no", "number" or "other". `questions_as_classes` makes a classification task of it.

    Raises:
        InputError: missing file, with where it is published; malformed entry, question without answers or answers
            without a question, missing image (each with the entry's place).

    References:
        Goyal et al., "Making the V in VQA Matter", CVPR 2017.
    """
    root = Path(image_root)
    questions = _json_object(questions_path, {"data_subtype": "text", "questions": "[question, ...]"}, VQA)
    annotations = _json_object(annotations_path, {"annotations": "[annotation, ...]"}, VQA)
    subset = questions["data_subtype"]
    if not isinstance(subset, str) or not re.fullmatch(r"\w+", subset):
        raise InputError(
            f"{questions_path}: expected 'data_subtype' to be a name such as train2014, got {shown(subset)}"
        )
    answers = dict(_parsed_items(annotations_path, "annotations", annotations["annotations"], _parse_annotation))

    def parse_question(value: Any) -> tuple[tuple[str, ...], ListedTexts]:
        value = object_with(value, {"question_id": "integer", "image_id": "integer", "question": "text"})
        key = (_whole("question_id", value), _whole("image_id", value))
        if key not in answers:
            raise InputError(f"no answers to question_id {key[0]} about image_id {key[1]} in {annotations_path}")
        given, answer_type = answers.pop(key)
        image = f"{subset}/COCO_{subset}_{key[1]:012d}.jpg"
        return (image,), ListedTexts(Texts(parsed_text("question", value["question"]), given), answer_type)

    entries = list(_entries(questions_path, "questions", questions["questions"], parse_question))
    if answers:
        question_id, image_id = next(iter(answers))
        raise InputError(
            f"{annotations_path}: expected answers to the questions of {questions_path}, got some to question_id "
            f"{question_id} about image_id {image_id}, which is not there"
        )
    return ListedSequenceSource(ListedExamples(questions_path, entries, image_root=root, images_hint=_images_hint(VQA)))


def nlvr2_source(
    path: PathLike, *, image_root: PathLike, missing_images: MissingImages = "refuse"
) -> ListedClassSource:
    """NLVR2's statements about two images, false or true.

    Args:
        path: train.json, dev.json or test1.json, one object a line.
        image_root: folder of the split's images; those of example train-1-0-1 are train-1-0-img0.png and
            train-1-0-img1.png, in the folder's subfolder that the line calls `directory`, or in the folder itself.
        missing_images: "refuse" raises if an image is missing; "leave_out" goes on without its examples, because some
            of the published URLs lead nowhere any more.

    Returns:
        The source, in the order of the file, with the classes "false" and "true".

    Raises:
        InputError: missing file, with where it is published; malformed line, image path that leads out of the folder,
            missing image (each with the line's number).

    References:
        Suhr et al., "A Corpus for Reasoning About Natural Language Grounded in Photographs", ACL 2019.
    """
    root = Path(image_root)
    labels = {name.capitalize(): label for label, name in enumerate(STATEMENT_CLASSES)}

    def parse(value: Mapping[str, Any]) -> tuple[tuple[str, ...], LabelledText]:
        identifier = parsed_text("identifier", value["identifier"])
        stem, _, sentence = identifier.rpartition("-")
        if not stem or not sentence.isdecimal():
            raise InputError(f"expected 'identifier' such as 'train-1-0-1', got {shown(identifier)}")
        names = [checked_path(f"{stem}-img{side}.png", root) for side in (0, 1)]
        if "directory" in value:
            nested = [checked_path(f"{value['directory']}/{name}", root) for name in names]
            names = nested if (root / nested[0]).is_file() or not (root / names[0]).is_file() else names
        text = parsed_text("sentence", value["sentence"])
        return tuple(names), LabelledText(text, _label(value["label"], labels))

    keys = {"identifier": "text", "sentence": "text", "label": '"True" or "False"'}
    examples = ListedExamples(
        path,
        json_lines(path, _read(path, NLVR2), keys, parse),
        image_root=root,
        images_hint=_images_hint(NLVR2),
        missing_images=missing_images,
    )
    return ListedClassSource(examples, class_names=STATEMENT_CLASSES)


def snli_ve_source(path: PathLike, *, image_root: PathLike) -> ListedClassSource:
    """SNLI-VE's hypotheses about images of Flickr30k: entailed, neutral or contradicted.

    Args:
        path: snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl.
        image_root: the folder with Flickr30k's images; that of Flickr30K_ID 4705552913 is 4705552913.jpg.

    Returns:
        The source, in the order of the file, with the classes "entailment", "neutral" and "contradiction".

    Raises:
        InputError: missing file, with where it is published; malformed line, image path that leads out of the folder,
            missing image (each with the line's number).

    References:
        Xie et al., "Visual Entailment: A Novel Task for Fine-Grained Image Understanding", arXiv 1901.06706.
    """
    root = Path(image_root)
    labels = {name: label for label, name in enumerate(ENTAILMENT_CLASSES)}

    def parse(value: Mapping[str, Any]) -> tuple[tuple[str, ...], LabelledText]:
        image = checked_path(f"{parsed_text('Flickr30K_ID', value['Flickr30K_ID'])}.jpg", root)
        return (image,), LabelledText(parsed_text("sentence2", value["sentence2"]), _label(value["gold_label"], labels))

    keys = {"Flickr30K_ID": "text", "gold_label": "text", "sentence2": "text"}
    entries = json_lines(path, _read(path, SNLI_VE), keys, parse)
    examples = ListedExamples(path, entries, image_root=root, images_hint=_images_hint(SNLI_VE))
    return ListedClassSource(examples, class_names=ENTAILMENT_CLASSES)


def multi30k_source(
    source_path: PathLike, target_path: PathLike, images_path: PathLike, *, image_root: PathLike
) -> ListedSequenceSource:
    """Multi30K's sentences about images of Flickr30k, with a translation each.

    Args:
        source_path: the sentences to be translated, one a line, such as train.en or train.en.gz.
        target_path: their translations, line by line, such as train.de or train.de.gz.
        images_path: the names of their images, line by line, such as image_splits/train.txt. What follows a "#" in a
            line, as in the list of COCO's images, is left out.
        image_root: the folder with the images.

    Returns:
        The source, in the order of the files.

    Raises:
        InputError: missing file, with where it is published; files of different lengths; empty line, image path that
            leads out of the folder, missing image (each with the line's number).

    References:
        Elliott et al., "Multi30K: Multilingual English-German Image Descriptions", 2016.
    """
    root = Path(image_root)
    paths = (source_path, target_path, images_path)
    files = [_lines(path, MULTI30K) for path in paths]
    if len({len(lines) for lines in files}) > 1:
        counts = ", ".join(f"{path} has {len(lines)}" for path, lines in zip(paths, files, strict=True))
        raise InputError(f"expected files with one line for each image: {counts}")

    def entries() -> Iterator[Entry[ListedTexts]]:
        for number, texts in enumerate(zip(*files, strict=True), start=1):
            for path, text in zip(paths, texts, strict=True):
                if not text.strip():
                    raise InputError(f"{place_in(path, number)}: the line is empty")
            source, target, image = (text.strip() for text in texts)
            name = _at(images_path, number, lambda image=image: checked_path(image.partition("#")[0], root))
            yield Entry(number, (name,), ListedTexts(Texts(source, [target]), None))

    return ListedSequenceSource(
        ListedExamples(images_path, entries(), image_root=root, images_hint=_images_hint(MULTI30K))
    )


def cc3m_source(
    path: PathLike,
    *,
    image_root: PathLike,
    image_names: Mapping[str, str] | None = None,
    missing_images: MissingImages = "leave_out",
) -> ListedSource:
    """Captions with images of the web, from a file of two columns such as those of Conceptual Captions (CC3M).

    Args:
        path: Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv, or another one: in each line a caption, a
            tab, and the URL or the path of its image.
        image_root: folder with the downloaded images.
        image_names: URL -> name of the image in the folder, as whatever downloaded it has named it. None: the second
            column holds paths in the folder.
        missing_images: "leave_out" goes on without the examples whose images are missing, or have no name, because
            many URLs lead nowhere any more; the source's `left_out` counts them. "refuse" raises.

    Returns:
        The source, in the order of the file.

    Raises:
        InputError: missing file, with where it is published; malformed line, image path that leads out of the folder,
            URLs without `image_names` (each with the line's number); no image is there.

    References:
        Sharma et al., "Conceptual Captions", ACL 2018.
    """
    root = Path(image_root)

    def parse(line: str) -> tuple[tuple[str, ...], Pair]:
        caption, _, image = line.partition("\t")
        if not caption.strip() or not image.strip() or "\t" in image:
            raise InputError(f"expected a caption, a tab, and the URL or the path of an image, got {shown(line)}")
        image = image.strip()
        if image_names is None and "://" in image:
            raise InputError(f"expected the path of an image, got {shown(image)}; give image_names, from URL to path")
        # Without a name it must be no file's path, whatever it says, so that the image counts as missing.
        name = image if image_names is None else image_names.get(image, urllib.parse.quote(image, safe=""))
        return (checked_path(name, root),), Pair([caption.strip()], None)

    entries = (
        Entry(number, *_at(path, number, lambda line=line: parse(line)))
        for number, line in enumerate(_lines(path, CC3M), start=1)
        if line.strip()
    )
    return ListedSource(
        ListedExamples(path, entries, image_root=root, images_hint=_images_hint(CC3M), missing_images=missing_images)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the formats share


def _karpathy_source(path: PathLike, split: str, root: Path, published: Published) -> ListedSource:
    images = _json_object(path, {"images": "[image, ...]"}, published)["images"]
    wanted = split.split("+")

    def parse(value: Any) -> tuple[str, tuple[tuple[str, ...], Pair]]:
        value = object_with(value, {"filename": "text", "split": "text", "sentences": "[sentence, ...]"})
        folder = "" if "filepath" not in value else parsed_text("filepath", value["filepath"])
        image = checked_path(os.path.join(folder, parsed_text("filename", value["filename"])), root)
        sentences = value["sentences"]
        if not isinstance(sentences, list) or not sentences:
            raise InputError(f"expected 'sentences' to be a list, not empty, got {shown(sentences)}")
        captions = [parsed_text("raw", object_with(sentence, {"raw": "text"})["raw"]) for sentence in sentences]
        return parsed_text("split", value["split"]), ((image,), Pair(captions, None))

    parsed = list(_parsed_items(path, "images", images, parse))
    known = {name for name, _ in parsed}
    for name in wanted:
        if name not in known:
            raise unknown_name(f"split of {path}", name, known)
    entries = [Entry(f"images[{index}]", *example) for index, (name, example) in enumerate(parsed) if name in wanted]
    return ListedSource(ListedExamples(path, entries, image_root=root, images_hint=_images_hint(published)))


def _parse_annotation(value: Any) -> tuple[tuple[int, int], tuple[list[str], str | None]]:
    """Question and image -> the answers, and their type where it is said."""
    value = object_with(value, {"question_id": "integer", "image_id": "integer", "answers": "[answer, ...]"})
    answers = value["answers"]
    if not isinstance(answers, list) or not answers:
        raise InputError(f"expected 'answers' to be a list, not empty, got {shown(answers)}")
    texts = [object_with(answer, {"answer": "text"})["answer"] for answer in answers]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"expected every 'answer' to be a text, got {shown(texts)}")
    answer_type = value.get("answer_type")
    key = (_whole("question_id", value), _whole("image_id", value))
    return key, (texts, None if answer_type is None else parsed_text("answer_type", answer_type))


def _whole(key: str, value: Mapping[str, Any]) -> int:
    number = value[key]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise InputError(f"expected '{key}' to be an integer from 0, got {shown(number)}")
    return number


def _label(name: Any, labels: Mapping[str, int]) -> int:
    if not isinstance(name, str) or name not in labels:
        raise InputError(f"expected the label to be one of {', '.join(labels)}, got {shown(name)}")
    return labels[name]


def _read(path: PathLike, published: Published) -> bytes:
    try:
        if Path(path).suffix != ".gz":
            return Path(path).read_bytes()
        with gzip.open(path) as file:
            data = file.read(MOST_UNPACKED_BYTES + 1)
        if len(data) > MOST_UNPACKED_BYTES:
            raise InputError(f"{path} holds more than {MOST_UNPACKED_BYTES} bytes when it is unpacked")
        return data
    except FileNotFoundError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected {published.files}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _lines(path: PathLike, published: Published) -> list[str]:
    try:
        return _read(path, published).decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8: {error.reason} at byte {error.start}") from error


def _json_object(path: PathLike, keys: Mapping[str, str], published: Published) -> Mapping[str, Any]:
    data = _read(path, published)
    try:
        return object_with(json.loads(data), keys)
    except json.JSONDecodeError as error:
        raise InputError(f"{place_in(path, error.lineno)}: expected a JSON object: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8: {error.reason} at byte {error.start}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object: {error}") from error


def _entries(
    path: PathLike, key: str, values: Any, parse: Callable[[Any], tuple[tuple[str, ...], Value]]
) -> Iterator[Entry[Value]]:
    for index, (images, content) in enumerate(_parsed_items(path, key, values, parse)):
        yield Entry(f"{key}[{index}]", images, content)


def _parsed_items(path: PathLike, key: str, values: Any, parse: Callable[[Any], Value]) -> Iterator[Value]:
    """What each element of a list is, an error with its place."""
    if not isinstance(values, list):
        raise InputError(f"{path}: expected '{key}' to be a list, got {type(values).__name__}")
    for index, value in enumerate(values):
        yield _at(path, f"{key}[{index}]", lambda value=value: parse(value))


def _at(path: PathLike, place: str | int, parse: Callable[[], Value]) -> Value:
    try:
        return parse()
    except InputError as error:
        raise InputError(f"{place_in(path, place)}: {error}") from error


def _images_hint(published: Published) -> str:
    return f"expected: {published.images}"
