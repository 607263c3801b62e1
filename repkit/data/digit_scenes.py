"""TFDS builder of `digit_scenes`: scenes of real handwritten digits with texts, made in seconds and without TensorFlow.

Importing this module registers the data set, so `tfds.builder("digit_scenes/single")` finds it too. What the scenes
hold is decided in `repkit.data.scenes`, and what is asked and said about them in `repkit.data.scene_tasks` and
`repkit.data.scene_classes`.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from repkit.checks import InputError
from repkit.data import scenes
from repkit.data.scene_classes import CLASS_TASKS
from repkit.data.scene_demands import TASK_IMAGE_SIZE
from repkit.data.scene_tasks import TASKS

try:
    import tensorflow_datasets as tfds
    from PIL import Image
except ImportError as error:
    raise InputError('digit_scenes needs tensorflow-datasets and Pillow: pip install "repkit[data]"') from error

SPLIT_SIZES: Mapping[str, int] = {"train": 8192, "validation": 512, "test": 512}
"""Examples of `single` and of `pairs`."""

TASK_SPLIT_SIZES: Mapping[str, int] = {"train": 16384, "validation": 512, "test": 1024}
"""Examples of every task. The classes are balanced over four or three of them at a time; a split may end within."""

TRAINING_FACTORS: Mapping[str, int] = {"questions": 4, "statements": 4}
"""Tasks with more training examples than others: both are of six forms, and each has to be learned."""

SCENE_SEED = 20

# Of the features of an example's first picture and of its second one.
_PREFIXES = ("", "second_")


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes of one digit (config `single`, 16 x 16) or of two to four digits (`pairs`, 32 x 32; the tasks, 24 x 24).

    An example holds `image` (PNG), its texts and `ground_truth`, a JSON object with the `background` and, for every
    digit, `digits`: digit, colour, row and column of the 3 x 3 grid, the pixel where its 8 x 8 box begins (top, left),
    and `stroke_id`, the row of the handwriting in scikit-learn's set.

    The texts of `single` and `pairs` are `captions`, the first of which names the digits in the order of `digits`;
    `single` adds `label`, its digit. Those of the tasks `questions`, `captions`, `translation` and `grounding` are
    `source_text` and `target_texts`; `questions` adds `question_type` and the true `answer`. The tasks `statements`,
    `assignment` and `entailment` have a `text`, its `form` and a `label`; the first two of them also `second_image` and
    `second_ground_truth`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release.", "1.1.0": "A configuration that has changed."}  # noqa: RUF012 (the base class declares it as a dict)
    # The place of a configuration is part of its seed: new ones come last.
    BUILDER_CONFIGS = [  # noqa: RUF012 (the base class declares it as a list)
        tfds.core.BuilderConfig(name="single", description="One digit: digit, colour, background and place."),
        tfds.core.BuilderConfig(name="pairs", description="Two to four digits and their relations."),
        tfds.core.BuilderConfig(name="questions", description="Questions with ten answers each."),
        tfds.core.BuilderConfig(name="captions", description="A prompt, and four captions."),
        tfds.core.BuilderConfig(name="translation", description="English, and German that says what is to be seen."),
        tfds.core.BuilderConfig(
            name="statements",
            description="Two pictures, and a statement about both: true or not.",
            version="1.1.0",  # with four times as many training examples
        ),
        tfds.core.BuilderConfig(
            name="assignment",
            description="Two pictures, and a caption or a detail of one or of neither.",
            version="1.1.0",  # with details
        ),
        tfds.core.BuilderConfig(name="entailment", description="A text that the picture entails, contradicts or not."),
        tfds.core.BuilderConfig(name="grounding", description="What is at a place, and where something is."),
    ]

    def __init__(self, *, file_format: str | None = "array_record", **kwargs: Any):
        # The stock default, tfrecord, can be read through TensorFlow only.
        super().__init__(file_format=file_format, **kwargs)

    @property
    def _config_name(self) -> str:
        assert self.builder_config is not None  # TFDS takes the first of BUILDER_CONFIGS if none is named.
        return self.builder_config.name

    def _info(self) -> tfds.core.DatasetInfo:
        config = self._config_name
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        pictures = 1
        if config in TASKS:
            size = TASK_IMAGE_SIZE
            features: dict[str, Any] = {"source_text": text, "target_texts": texts}
        elif config in CLASS_TASKS:
            size = TASK_IMAGE_SIZE
            _, class_names, pictures = CLASS_TASKS[config]
            label = tfds.features.ClassLabel(names=list(class_names))
            features = {"text": text, "form": text, "label": label}
        else:
            size = scenes.IMAGE_SIZES[config]
            features = {"captions": texts}
        if config == "single":
            features["label"] = tfds.features.ClassLabel(names=list(scenes.DIGIT_NAMES))
        if config == "questions":
            features |= {"question_type": text, "answer": text}
        for prefix in _PREFIXES[:pictures]:
            features[f"{prefix}image"] = tfds.features.Image(shape=(size, size, 3), encoding_format="png")
            # One text, because TFDS spends more time on a sequence of structures than on all the rest of an example.
            features[f"{prefix}ground_truth"] = text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Coloured scenes of handwritten digits with texts and full ground truth.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            # Written in the order of generation, so that an example's index is its place in the random sequence.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # Nothing is downloaded.
        strokes = scenes.split_strokes(scenes.load_strokes())
        sizes = dict(SPLIT_SIZES if self._config_name in scenes.SCENES else TASK_SPLIT_SIZES)
        sizes["train"] *= TRAINING_FACTORS.get(self._config_name, 1)
        return {split: self._generate_examples(split, strokes[split], count) for split, count in sizes.items()}

    def _generate_examples(self, split: str, strokes: scenes.Strokes, count: int) -> Iterator[tuple[int, Any]]:
        config = self._config_name
        place = [each.name for each in self.BUILDER_CONFIGS].index(config)
        rng = np.random.default_rng([SCENE_SEED, place, list(SPLIT_SIZES).index(split)])
        compose = _task_examples if config in TASKS else _class_examples if config in CLASS_TASKS else _scene_examples
        yield from enumerate(compose(config, strokes, count, rng))


def _scene_examples(
    config: str, strokes: scenes.Strokes, count: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    for scene in scenes.SCENES[config](strokes, count=count, rng=rng):
        label = {"label": scene.digits[0].digit} if config == "single" else {}
        yield {**_seen(scene), "captions": list(scene.captions), **label}


def _task_examples(
    config: str, strokes: scenes.Strokes, count: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    for example in TASKS[config](strokes, count=count, rng=rng):
        texts = {"source_text": example.source_text, "target_texts": list(example.target_texts)}
        asked = {} if config != "questions" else {"question_type": example.question_type, "answer": example.answer}
        yield {**_seen(example.scene), **texts, **asked}


def _class_examples(
    config: str, strokes: scenes.Strokes, count: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    for example in CLASS_TASKS[config].compose(strokes, count=count, rng=rng):
        seen = {
            f"{prefix}{name}": value
            for prefix, scene in zip(_PREFIXES, example.scenes, strict=False)
            for name, value in _seen(scene).items()
        }
        yield {**seen, "text": example.text, "form": example.form, "label": example.class_name}


def _seen(scene: scenes.Scene) -> dict[str, Any]:
    return {"image": _png(scene.image), "ground_truth": scene.ground_truth}


def _png(image: np.ndarray) -> io.BytesIO:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="png")
    encoded.seek(0)
    return encoded
