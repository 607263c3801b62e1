"""TFDS builder of `digit_scenes`: captioned scenes of real handwritten digits, made in seconds and without TensorFlow.

Importing this module registers the data set, so `tfds.builder("digit_scenes/single")` finds it too. What the scenes
hold is decided in `repkit.data.scenes`.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from repkit.checks import InputError
from repkit.data import scenes

try:
    import tensorflow_datasets as tfds
    from PIL import Image
except ImportError as error:
    raise InputError('digit_scenes needs tensorflow-datasets and Pillow: pip install "repkit[data]"') from error

SPLIT_SIZES: Mapping[str, int] = {"train": 8192, "validation": 512, "test": 512}
SCENE_SEED = 20


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes of one digit (config `single`, 16 x 16) or of two to four related digits (config `pairs`, 32 x 32).

    An example holds `image` (PNG), `captions` and `ground_truth`, a JSON object with the `background` and, for every
    digit in the order in which the first caption names them, `digits`: digit, colour, row and column of the 3 x 3
    grid, the pixel where its 8 x 8 box begins (top, left), and `stroke_id`, the row of the handwriting in
    scikit-learn's set. `single` adds `label`, its digit.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (the base class declares it as a dict)
    BUILDER_CONFIGS = [  # noqa: RUF012 (the base class declares it as a list)
        tfds.core.BuilderConfig(name="single", description="One digit: digit, colour, background and place."),
        tfds.core.BuilderConfig(name="pairs", description="Two to four digits and their relations."),
    ]

    def __init__(self, *, file_format: str | None = "array_record", **kwargs: Any):
        # The stock default, tfrecord, can be read through TensorFlow only.
        super().__init__(file_format=file_format, **kwargs)

    @property
    def _config_name(self) -> str:
        assert self.builder_config is not None  # TFDS takes the first of BUILDER_CONFIGS if none is named.
        return self.builder_config.name

    def _info(self) -> tfds.core.DatasetInfo:
        size = scenes.IMAGE_SIZES[self._config_name]
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            # One text, because TFDS spends more time on a sequence of structures than on all the rest of an example.
            "ground_truth": tfds.features.Text(),
        }
        if self._config_name == "single":
            features["label"] = tfds.features.ClassLabel(names=list(scenes.DIGIT_NAMES))
        return tfds.core.DatasetInfo(
            builder=self,
            description="Coloured scenes of handwritten digits with English captions and full ground truth.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            # Written in the order of generation, so that an example's index is its place in the random sequence.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # Nothing is downloaded.
        strokes = scenes.split_strokes(scenes.load_strokes())
        return {split: self._generate_examples(split, strokes[split]) for split in SPLIT_SIZES}

    def _generate_examples(self, split: str, strokes: scenes.Strokes) -> Iterator[tuple[int, Any]]:
        config = self._config_name
        rng = np.random.default_rng([SCENE_SEED, list(scenes.SCENES).index(config), list(SPLIT_SIZES).index(split)])
        compose = scenes.SCENES[config]
        for index, scene in enumerate(compose(strokes, count=SPLIT_SIZES[split], rng=rng)):
            example = {
                "image": _png(scene.image),
                "captions": list(scene.captions),
                "ground_truth": scene.ground_truth,
            }
            if config == "single":
                example["label"] = scene.digits[0].digit
            yield index, example


def _png(image: np.ndarray) -> io.BytesIO:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="png")
    encoded.seek(0)
    return encoded
