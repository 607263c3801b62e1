"""What the rows of a batch hold: one class for image-caption pairs, one for the sequences of generation tasks, and
one for classification tasks.

Images, index and `where` are the same for all and belong to the pipeline.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from repkit.data._draws import (
    IMAGE_AUGMENTATION,
    TEXT_AUGMENTATION,
    commonest_texts,
    drawn_texts,
    first_texts,
    generator_at,
)
from repkit.data.augment import IMAGE_DRAWS, TEXT_DRAWS, Augmentation, augment_images, augment_texts
from repkit.data.class_sources import IMAGE_NAMES, ClassSource, LabelledText
from repkit.data.images import CorruptExampleError
from repkit.data.sequence_sources import SequenceSource, Texts
from repkit.data.sources import Source
from repkit.data.tokenizer import Tokenizer

Content = TypeVar("Content")

Targets = Literal["drawn", "commonest"]
"""Which of an example's target texts is trained on: another one each time, or always the most frequent."""


class Read(NamedTuple):
    """An example as it was read: its encoded images by the names of their columns, and where it comes from in words."""

    images: Mapping[str, bytes | np.ndarray]
    origin: str


class Rows(Protocol[Content]):
    """How the examples of a source become columns of a batch. `Content` is what an example holds beside its images."""

    @property
    def image_names(self) -> Sequence[str]:
        """The columns that hold images."""
        ...

    def __len__(self) -> int:
        """Examples of the source."""
        ...

    def read(self, index: int) -> tuple[Read, Content]:
        """An example; raises `CorruptExampleError` if it cannot be used."""
        ...

    def content(self, index: int) -> Content:
        """What an example holds beside its images, which are not read."""
        ...

    def columns(
        self, contents: Sequence[Content], images: Mapping[str, UInt8[np.ndarray, "b s s 3"]], position: int
    ) -> dict[str, np.ndarray]:
        """The columns, of as many rows as the images', of which the first stands at `position` in the run."""
        ...


class Pair(NamedTuple):
    """What an image-caption pair holds beside its image. The label is 0 where there is none."""

    captions: Sequence[str]
    label: int


class PairRows:
    """Rows of image-caption pairs: one caption each, and what augmentation adds."""

    image_names = ("image",)

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Tokenizer,
        max_length: int,
        seed: int,
        repeat: bool,
        augmentation: Augmentation | None,
    ):
        self._source = source
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._seed = seed
        self._repeat = repeat
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Read, Pair]:
        record = self._source[index]
        if not record["captions"]:
            raise CorruptExampleError(f"{record['origin']}: there is no caption")
        return Read({"image": record["image"]}, record["origin"]), Pair(record["captions"], record.get("label", 0))

    def content(self, index: int) -> Pair:
        return Pair(self._source.captions(index), 0)

    def columns(
        self, contents: Sequence[Pair], images: Mapping[str, UInt8[np.ndarray, "b s s 3"]], position: int
    ) -> dict[str, np.ndarray]:
        image = images["image"]
        groups = [pair.captions for pair in contents]
        captions = drawn_texts(groups, self._seed, position) if self._repeat else first_texts(groups)
        columns = {
            "caption_id": filled_column([caption_hash(caption) for caption in captions], len(image)),
            **self._encoded("", captions, len(image)),
        }
        if self._source.has_labels:
            columns["label"] = filled_column([pair.label for pair in contents], len(image))
        if self._augmentation is not None:
            columns |= self._augmented(image, captions, position, self._augmentation)
        return columns

    def _augmented(
        self, images: UInt8[np.ndarray, "b s s 3"], captions: Sequence[str], position: int, augmentation: Augmentation
    ) -> dict[str, np.ndarray]:
        for_text = generator_at(self._seed, TEXT_AUGMENTATION, position, TEXT_DRAWS)
        for_image = generator_at(self._seed, IMAGE_AUGMENTATION, position, IMAGE_DRAWS)
        texts = augment_texts(captions, for_text, augmentation.text)
        return {
            "augmented_image": augment_images(images, for_image, augmentation.image),
            **self._encoded("augmented_", texts, len(images)),
        }

    def _encoded(self, prefix: str, texts: Sequence[str], rows: int) -> dict[str, np.ndarray]:
        token_ids, token_mask = self._tokenizer.encode(_filled_texts(texts, rows), self._max_length)
        return {f"{prefix}token_ids": token_ids, f"{prefix}token_mask": token_mask}


class SequenceRows:
    """Rows of generation tasks: the source text, and one target text each."""

    image_names = ("image",)

    def __init__(
        self,
        source: SequenceSource,
        *,
        tokenizer: Tokenizer,
        max_source_length: int,
        max_target_length: int,
        targets: Targets,
        seed: int,
        repeat: bool,
    ):
        self._source = source
        self._tokenizer = tokenizer
        self._max_source_length = max_source_length
        self._max_target_length = max_target_length
        self._targets = targets
        self._seed = seed
        self._repeat = repeat

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Read, Texts]:
        record = self._source[index]
        if not record["target_texts"]:
            raise CorruptExampleError(f"{record['origin']}: there is no target text")
        return Read({"image": record["image"]}, record["origin"]), Texts(record["source_text"], record["target_texts"])

    def content(self, index: int) -> Texts:
        return self._source.texts(index)

    def columns(
        self, contents: Sequence[Texts], images: Mapping[str, UInt8[np.ndarray, "b s s 3"]], position: int
    ) -> dict[str, np.ndarray]:
        rows = len(images["image"])
        targets = self._chosen([texts.targets for texts in contents], position)
        sources = [texts.source for texts in contents]
        sources, targets = _filled_texts(sources, rows), _filled_texts(targets, rows)
        source_ids, source_mask = self._tokenizer.encode(sources, self._max_source_length)
        target_ids, target_mask = _encoded_targets(self._tokenizer, targets, self._max_target_length)
        return {
            "source_ids": source_ids,
            "source_mask": source_mask,
            "target_ids": target_ids,
            "target_mask": target_mask,
        }

    def _chosen(self, groups: Sequence[Sequence[str]], position: int) -> list[str]:
        if self._targets == "commonest":
            return commonest_texts(groups)
        return drawn_texts(groups, self._seed, position) if self._repeat else first_texts(groups)


class ClassRows:
    """Rows of classification tasks: a text and a label each, with one image or two."""

    def __init__(self, source: ClassSource, *, tokenizer: Tokenizer, max_length: int):
        self._source = source
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.image_names = IMAGE_NAMES[: source.pictures]

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Read, LabelledText]:
        record = self._source[index]
        images = {name: cast(Mapping[str, Any], record)[name] for name in self.image_names}
        return Read(images, record["origin"]), LabelledText(record["text"], record["label"])

    def content(self, index: int) -> LabelledText:
        return self._source.labelled_text(index)

    def columns(
        self, contents: Sequence[LabelledText], images: Mapping[str, UInt8[np.ndarray, "b s s 3"]], position: int
    ) -> dict[str, np.ndarray]:
        del position  # Nothing is drawn.
        rows = len(images["image"])
        texts = _filled_texts([text for text, _ in contents], rows)
        token_ids, token_mask = self._tokenizer.encode(texts, self._max_length)
        labels = filled_column([label for _, label in contents], rows)
        return {"token_ids": token_ids, "token_mask": token_mask, "label": labels}


def _encoded_targets(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int
) -> tuple[Int32[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """What a decoder is to generate: the tokens of a text and the end, but not the begin token, which it is given."""
    token_ids, token_mask = tokenizer.encode(texts, max_length + 1)
    return token_ids[:, 1:], token_mask[:, 1:]


def caption_hash(caption: str) -> int:
    """A number in [0, 2^31) for a caption, the same on every machine and in every run.

    Among c different captions about c^2 / 2^32 pairs share a number by chance: none among ten thousand, about two
    hundred among a million. Such a pair counts as equal captions.

    >>> caption_hash("a red seven on yellow, top left")
    1548029488
    """
    digest = hashlib.blake2b(caption.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def filled_column(values: Sequence[int], rows: int) -> Int32[np.ndarray, " b"]:
    """The values, and zeros for the rows after them."""
    column = np.zeros(rows, np.int32)
    column[: len(values)] = values
    return column


def _filled_texts(texts: Sequence[str], rows: int) -> list[str]:
    """The texts, and empty ones for the rows after them."""
    return [*texts, *[""] * (rows - len(texts))]
