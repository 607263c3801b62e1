"""From a source to batches: shuffled, decoded, tokenised, augmented, and resumable at the exact next batch.

All examples of a run stand in one endless order: epoch after epoch, each shuffled in its own way. The global batch g
covers the positions [g B, (g + 1) B) of this order, and a process reads its contiguous share of them. Whatever is
random about an example follows from the seed and its position alone. So batches depend neither on threads nor on the
number of processes, and one number, the position, says where a run stands.
"""

import functools
import hashlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from repkit.checks import InputError
from repkit.data.augment import IMAGE_DRAWS, TEXT_DRAWS, Augmentation, augment_images, augment_texts
from repkit.data.images import CorruptExampleError, load_image
from repkit.data.sources import Source
from repkit.data.tokenizer import Tokenizer

try:
    import grain
except ImportError as error:
    raise InputError('the data pipeline needs grain: pip install "repkit[data]"') from error

MOST_CACHED_BYTES = 256 * 2**20
"""Decoded images are kept when all of a source's fit into this."""

LEAST_READ_FOR_SHARE = 1000
"""The share of corrupt examples is taken of at least this many examples, or of the whole source if it is smaller: one
corrupt example among the first ten is no reason to stop."""

# What random numbers are drawn for; each purpose has a stream of its own.
_SHUFFLE, _CAPTION, _IMAGE, _TEXT = range(4)
_NUMBERS_PER_COUNT = 4
"""Numbers that a Philox generator makes at each count of its counter."""


class CaptionTable(NamedTuple):
    """Every caption of a source, a row each, in the order of its examples.

    Attributes:
        token_ids: int32 [c l].
        token_mask: bool [c l].
        caption_id: int32 [c], equal for equal captions.
        example_id: int32 [c], the example whose image the caption was written for.
    """

    token_ids: Int32[np.ndarray, "c l"]
    token_mask: Bool[np.ndarray, "c l"]
    caption_id: Int32[np.ndarray, " c"]
    example_id: Int32[np.ndarray, " c"]


def caption_table(source: Source, *, tokenizer: Tokenizer, max_length: int) -> CaptionTable:
    """All captions of a source: the text side of retrieval, where an image may have several captions.

    Args:
        source: the examples; their images are not read where the source can avoid it.
        tokenizer: as for the batches.
        max_length: as for the batches.

    Returns:
        The table. Its `example_id` refers to that of the batches, which hold every image once.
    """
    captions = [source.captions(index) for index in range(len(source))]
    texts = [text for group in captions for text in group]
    return CaptionTable(
        *tokenizer.encode(texts, max_length),
        np.array([caption_hash(text) for text in texts], np.int32),
        np.repeat(np.arange(len(source), dtype=np.int32), [len(group) for group in captions]),
    )


def caption_hash(caption: str) -> int:
    """A number in [0, 2^31) for a caption, the same on every machine and in every run.

    Among c different captions about c^2 / 2^32 pairs share a number by chance: none among ten thousand, about two
    hundred among a million. Such a pair counts as equal captions.

    >>> caption_hash("a red seven on yellow, top left")
    1548029488
    """
    digest = hashlib.blake2b(caption.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def make_batches(
    source: Source,
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    image_size: int,
    max_length: int,
    shuffle: bool,
    seed: int,
    repeat: bool,
    augmentation: Augmentation | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    max_corrupt_share: float = 0.01,
    num_threads: int = 1,
    prefetch: int = 4,
) -> "Batches":
    """The batches of a source, as this process is to feed them.

    Args:
        source: the examples.
        tokenizer: encodes the captions.
        batch_size: B, rows of the global batch, over all processes.
        image_size: edge length of the images in pixels.
        max_length: l, tokens of a caption, begin and end included.
        shuffle: whether each epoch has an order of its own (from the seed) or the source's.
        seed: of the order, the choice among several captions, and the augmentation; from 0.
        repeat: True, for training: endless, with a random one of an example's captions each time. False, for
            evaluation: one epoch, each example once with its first caption, the last batch filled up (`caption_table`
            has all captions).
        augmentation: adds a changed view of each modality.
        process_index: which share of the global batch to read; None is `jax.process_index()`. On a mesh whose data
            axis does not follow the processes, give the index and the number of the data shares instead.
        process_count: into how many shares the global batch is split; None is `jax.process_count()`.
        max_corrupt_share: most of the examples that may be corrupt, as a share of 1.
        num_threads: threads that prepare batches ahead; 0 prepares each when it is asked for. The batches are the same.
        prefetch: how many batches are prepared ahead.

    Returns:
        An iterator of dicts of numpy arrays, b = B / process_count rows each: `image` uint8 [b s s 3], `token_ids`
        int32 [b l], `token_mask` bool [b l], `example_id`, `caption_id` int32 [b], `where` bool [b]; `label` int32 [b]
        if the source has labels; with augmentation `augmented_image`, `augmented_token_ids`, `augmented_token_mask`.

        A corrupt example keeps its row and its ids, with a black image and `where` False. Rows that fill up the last
        batch are zero with `where` False. Every row has real tokens, so that no attention is over nothing.

    Raises:
        InputError: empty source; sizes that are not positive; a batch that does not divide by the processes. While
            reading: more than `max_corrupt_share` of the examples are corrupt.
    """
    if process_index is None or process_count is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    tokenizer.encode([""], max_length)  # Refuses a length that is too short before any thread starts.
    _check_arguments(source, batch_size, image_size, seed, process_index, process_count, max_corrupt_share)
    reader = _BatchReader(
        source,
        tokenizer=tokenizer,
        batch_size=batch_size,
        image_size=image_size,
        max_length=max_length,
        shuffle=shuffle,
        seed=seed,
        repeat=repeat,
        augmentation=augmentation,
        process_index=process_index,
        process_count=process_count,
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    return Batches(reader, options, max_corrupt_share)


class Batches:
    """An iterator of host batches that can say where it stands and be put there again; made by `make_batches`.

    `corrupt` counts the corrupt rows read since it was made.
    """

    corrupt: int

    def __init__(self, reader: "_BatchReader", options: grain.ReadOptions, max_corrupt_share: float):
        self._reader = reader
        self._options = options
        self._max_corrupt_share = max_corrupt_share
        self._rows_read = 0
        self._corrupt_examples: set[int] = set()
        self.corrupt = 0
        self._next_batch = 0
        self._iterator = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._start(self._next_batch)
        batch, defects = next(self._iterator)
        self._next_batch += 1
        self._count(batch, defects)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get_state(self) -> dict[str, Any]:
        """Where the next batch begins, and in what order; JSON-able, and equal on all processes.

        Returns:
            {"position": examples before the next batch, over all processes and epochs; "batch_size", "examples",
            "seed", "shuffle": what the order depends on}.
        """
        return {"position": self._next_batch * self._reader.batch_size, **self._reader.order_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, be it with another number of processes or threads.

        Raises:
            InputError: the state belongs to other data, another seed or another batch size, so that going on would
                repeat and leave out examples.
        """
        expected = self._reader.order_state()
        for name, value in expected.items():
            if state.get(name) != value:
                raise InputError(
                    f"cannot resume the data: it was saved with {name} {state.get(name)}, here it is {value}"
                )
        self.close()
        self._next_batch = state["position"] // self._reader.batch_size

    def close(self) -> None:
        """Ends the threads. A later `next` starts them anew."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self, first_batch: int) -> grain.DatasetIterator:
        indices = grain.MapDataset.range(first_batch, self._reader.batch_count)
        return iter(indices.map(self._reader).to_iter_dataset(self._options))

    def _count(self, batch: dict[str, np.ndarray], defects: Sequence[tuple[int, str]]) -> None:
        self.corrupt += len(defects)
        self._rows_read += int(batch["where"].sum()) + len(defects)
        self._corrupt_examples |= {index for index, _ in defects}
        # Each example counts once, however many epochs have been read.
        corrupt, read = len(self._corrupt_examples), min(self._rows_read, self._reader.examples)
        enough = min(LEAST_READ_FOR_SHARE, self._reader.examples)
        if defects and corrupt > self._max_corrupt_share * max(read, enough):
            raise InputError(
                f"{corrupt} of {read} examples read are corrupt, more than max_corrupt_share "
                f"{self._max_corrupt_share:g} allows; the last one: {defects[-1][1]}"
            )


class _Example(NamedTuple):
    """A decoded example. `image` is None where `defect` says what is wrong with it."""

    image: UInt8[np.ndarray, "s s 3"] | None
    captions: Sequence[str]
    label: int
    defect: str | None


class _BatchReader:
    """Global batch number -> this process's rows of the batch, and what is wrong with its corrupt examples."""

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Tokenizer,
        batch_size: int,
        image_size: int,
        max_length: int,
        shuffle: bool,
        seed: int,
        repeat: bool,
        augmentation: Augmentation | None,
        process_index: int,
        process_count: int,
    ):
        self._source = source
        self._tokenizer = tokenizer
        self.batch_size = batch_size
        self._image_size = image_size
        self._max_length = max_length
        self._shuffle = shuffle
        self._seed = seed
        self._repeat = repeat
        self._augmentation = augmentation
        self._rows = batch_size // process_count
        self._first_row = process_index * self._rows
        self.examples = len(source)
        # A batch may lie in two epochs.
        self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffled_order)
        self._cached: dict[int, _Example] = {}
        self._caches = self.examples * image_size**2 * 3 <= MOST_CACHED_BYTES

    @property
    def batch_count(self) -> int:
        if self._repeat:
            return sys.maxsize // self.batch_size
        return -(-self.examples // self.batch_size)

    def order_state(self) -> dict[str, Any]:
        """What the order of the examples depends on."""
        return {
            "batch_size": self.batch_size,
            "examples": self.examples,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def __call__(self, batch_index: int) -> tuple[dict[str, np.ndarray], list[tuple[int, str]]]:
        start = batch_index * self.batch_size + self._first_row
        stop = start + self._rows if self._repeat else min(start + self._rows, self.examples)
        indices = [self._index_at(position) for position in range(start, stop)]
        examples = [self._example(index) for index in indices]
        captions = self._chosen_captions(examples, start)
        batch = self._assemble(indices, examples, captions)
        if self._augmentation is not None:
            batch |= self._augmented(batch["image"], captions, start, self._augmentation)
        pairs = zip(indices, examples, strict=True)
        return batch, [(index, example.defect) for index, example in pairs if example.defect is not None]

    def _index_at(self, position: int) -> int:
        epoch, index = divmod(position, self.examples)
        if not self._shuffle:
            return index
        return int(self._epoch_order(epoch)[index])

    def _shuffled_order(self, epoch: int) -> np.ndarray:
        """Eight bytes an example; Grain's shuffle needs no table, but milliseconds an index for a small source."""
        return np.random.default_rng([self._seed, _SHUFFLE, epoch]).permutation(self.examples)

    def _example(self, index: int) -> _Example:
        # Two threads may both decode an example; they store the same value.
        example = self._cached.get(index) or self._read_example(index)
        if self._caches:
            self._cached[index] = example
        return example

    def _read_example(self, index: int) -> _Example:
        try:
            record = self._source[index]
        except CorruptExampleError as error:
            return _Example(None, self._source.captions(index), 0, str(error))
        captions, label = record["captions"], record.get("label", 0)
        try:
            if not captions:
                raise CorruptExampleError("there is no caption")
            image = load_image(record["image"], image_size=self._image_size)
        except CorruptExampleError as error:
            return _Example(None, captions, label, f"{record['origin']}: {error}")
        return _Example(image, captions, label, None)

    def _chosen_captions(self, examples: Sequence[_Example], start: int) -> list[str]:
        if not self._repeat or all(len(example.captions) <= 1 for example in examples):
            return [example.captions[0] if example.captions else "" for example in examples]
        draws = self._random(_CAPTION, start, _NUMBERS_PER_COUNT).random((len(examples), _NUMBERS_PER_COUNT))[:, 0]
        return [
            example.captions[int(draw * len(example.captions))] if example.captions else ""
            for example, draw in zip(examples, draws, strict=True)
        ]

    def _assemble(
        self, indices: Sequence[int], examples: Sequence[_Example], captions: Sequence[str]
    ) -> dict[str, np.ndarray]:
        batch = {
            "image": np.zeros((self._rows, self._image_size, self._image_size, 3), np.uint8),
            "example_id": self._column(indices),
            "caption_id": self._column([caption_hash(caption) for caption in captions]),
            "where": np.zeros(self._rows, bool),
            **self._encoded("", captions),
        }
        if self._source.has_labels:
            batch["label"] = self._column([example.label for example in examples])
        for row, example in enumerate(examples):
            if example.image is not None:
                batch["image"][row] = example.image
                batch["where"][row] = True
        return batch

    def _augmented(
        self, images: UInt8[np.ndarray, "b s s 3"], captions: Sequence[str], start: int, augmentation: Augmentation
    ) -> dict[str, np.ndarray]:
        texts = augment_texts(captions, self._random(_TEXT, start, TEXT_DRAWS), augmentation.text)
        return {
            "augmented_image": augment_images(images, self._random(_IMAGE, start, IMAGE_DRAWS), augmentation.image),
            **self._encoded("augmented_", texts),
        }

    def _encoded(self, prefix: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids and mask of the texts, and of empty texts for the rows after them."""
        filled = [*texts, *[""] * (self._rows - len(texts))]
        token_ids, token_mask = self._tokenizer.encode(filled, self._max_length)
        return {f"{prefix}token_ids": token_ids, f"{prefix}token_mask": token_mask}

    def _column(self, values: Sequence[int]) -> Int32[np.ndarray, " b"]:
        column = np.zeros(self._rows, np.int32)
        column[: len(values)] = values
        return column

    def _random(self, purpose: int, position: int, draws: int) -> np.random.Generator:
        """The generator that stands before the numbers of a position, of which there are `draws` for each."""
        counter = position * draws // _NUMBERS_PER_COUNT
        key = _stream_key(self._seed, purpose)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _stream_key(seed: int, purpose: int) -> np.ndarray:
    return np.random.SeedSequence([seed, purpose]).generate_state(2, np.uint64)


def _check_arguments(
    source: Source,
    batch_size: int,
    image_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    max_corrupt_share: float,
) -> None:
    if not len(source):
        raise InputError("the data set is empty")
    for name, value in (("batch_size", batch_size), ("image_size", image_size), ("process_count", process_count)):
        if value < 1:
            raise InputError(f"expected {name} of at least 1, got {value}")
    if batch_size % process_count:
        raise InputError(f"expected a batch_size that divides by the {process_count} processes, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise InputError(f"expected process_index from 0 to {process_count - 1}, got {process_index}")
    if seed < 0:
        raise InputError(f"expected seed of at least 0, got {seed}")
    if not 0 <= max_corrupt_share <= 1:
        raise InputError(f"expected max_corrupt_share in [0, 1], got {max_corrupt_share}")
