"""From a source to batches: shuffled, decoded, tokenised, augmented, and resumable at the exact next batch.

All examples of a run stand in one endless order: epoch after epoch, each shuffled in its own way. The global batch g
covers the positions [g B, (g + 1) B) of this order, and a process reads its contiguous share of them. Whatever is
random about an example follows from the seed and its position alone. So batches depend neither on threads nor on the
number of processes, and one number, the position, says where a run stands.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, Self, get_args

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from repkit.checks import InputError, require_choice
from repkit.data._draws import shuffled_order
from repkit.data._rows import ClassRows, Content, PairRows, Rows, SequenceRows, Targets, caption_hash, filled_column
from repkit.data.augment import Augmentation
from repkit.data.class_sources import ClassSource
from repkit.data.images import CorruptExampleError, load_image
from repkit.data.sequence_sources import SequenceSource
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
    tokenizer.encode([""], max_length)  # Refuses a length that is too short before any thread starts.
    rows = PairRows(
        source, tokenizer=tokenizer, max_length=max_length, seed=seed, repeat=repeat, augmentation=augmentation
    )
    return _batches(
        rows,
        batch_size=batch_size,
        image_size=image_size,
        shuffle=shuffle,
        seed=seed,
        repeat=repeat,
        process_index=process_index,
        process_count=process_count,
        max_corrupt_share=max_corrupt_share,
        num_threads=num_threads,
        prefetch=prefetch,
    )


def make_sequence_batches(
    source: SequenceSource,
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    image_size: int,
    max_source_length: int,
    max_target_length: int,
    shuffle: bool,
    seed: int,
    repeat: bool,
    targets: Targets = "drawn",
    process_index: int | None = None,
    process_count: int | None = None,
    max_corrupt_share: float = 0.01,
    num_threads: int = 1,
    prefetch: int = 4,
) -> "Batches":
    """The batches of a generation task, with the guarantees of `make_batches`, whose arguments the others are.

    Args:
        source: the examples.
        tokenizer: encodes source and target texts.
        batch_size: as for `make_batches`.
        image_size: as for `make_batches`.
        max_source_length: s, tokens of a source text, begin and end included.
        max_target_length: t, tokens of a target text, the end included; the begin token, which a decoder is given and
            does not generate, is left out.
        shuffle: as for `make_batches`.
        seed: of the order and of the choice among several target texts; from 0.
        repeat: True, for training: endless. False, for evaluation: one epoch, each example once, the last batch filled
            up (the source has all target texts).
        targets: "drawn" gives a random one of an example's target texts each time, so that it meets answers as often as
            they were given, and without `repeat` the first. "commonest" always gives the most frequent one, the first
            of those: then an example is the same in every epoch, as a cache of a teacher's outputs needs it.
        process_index: as for `make_batches`.
        process_count: as for `make_batches`.
        max_corrupt_share: as for `make_batches`.
        num_threads: as for `make_batches`.
        prefetch: as for `make_batches`.

    Returns:
        An iterator of dicts of numpy arrays, b = B / process_count rows each: `image` uint8 [b h w 3], `source_ids`
        int32 [b s], `source_mask` bool [b s], `target_ids` int32 [b t], `target_mask` bool [b t], `example_id` int32
        [b], `where` bool [b]. Corrupt examples and rows that fill up the last batch are as those of `make_batches`.

    Raises:
        InputError: as `make_batches` does.
    """
    if max_source_length < 3:
        raise InputError(f"expected max_source_length of at least 3 (begin, one token, end), got {max_source_length}")
    if max_target_length < 2:
        raise InputError(f"expected max_target_length of at least 2 (one token, end), got {max_target_length}")
    require_choice("targets", targets, get_args(Targets))
    rows = SequenceRows(
        source,
        tokenizer=tokenizer,
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        targets=targets,
        seed=seed,
        repeat=repeat,
    )
    return _batches(
        rows,
        batch_size=batch_size,
        image_size=image_size,
        shuffle=shuffle,
        seed=seed,
        repeat=repeat,
        process_index=process_index,
        process_count=process_count,
        max_corrupt_share=max_corrupt_share,
        num_threads=num_threads,
        prefetch=prefetch,
    )


def make_class_batches(
    source: ClassSource,
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    image_size: int,
    max_length: int,
    shuffle: bool,
    seed: int,
    repeat: bool,
    process_index: int | None = None,
    process_count: int | None = None,
    max_corrupt_share: float = 0.01,
    num_threads: int = 1,
    prefetch: int = 4,
) -> "Batches":
    """The batches of a classification task, with the guarantees of `make_batches`, whose arguments the others are.

    Args:
        source: the examples.
        tokenizer: encodes the texts.
        batch_size: as for `make_batches`.
        image_size: as for `make_batches`.
        max_length: l, tokens of a text, begin and end included.
        shuffle: as for `make_batches`.
        seed: of the order; from 0.
        repeat: True, for training: endless. False, for evaluation: one epoch, each example once, the last batch filled
            up.
        process_index: as for `make_batches`.
        process_count: as for `make_batches`.
        max_corrupt_share: as for `make_batches`.
        num_threads: as for `make_batches`.
        prefetch: as for `make_batches`.

    Returns:
        An iterator of dicts of numpy arrays, b = B / process_count rows each: `image` uint8 [b s s 3], `second_image`
        uint8 [b s s 3] if the task has two, `token_ids` int32 [b l], `token_mask` bool [b l], `label` int32 [b],
        `example_id` int32 [b], `where` bool [b]. Corrupt examples and rows that fill up the last batch are as those of
        `make_batches`; one image that cannot be read makes the example corrupt. A question whose answer is none of the
        classes has label -1 and is an example like the others: `where` is True.

    Raises:
        InputError: as `make_batches` does.
    """
    tokenizer.encode([""], max_length)  # Refuses a length that is too short before any thread starts.
    rows = ClassRows(source, tokenizer=tokenizer, max_length=max_length)
    return _batches(
        rows,
        batch_size=batch_size,
        image_size=image_size,
        shuffle=shuffle,
        seed=seed,
        repeat=repeat,
        process_index=process_index,
        process_count=process_count,
        max_corrupt_share=max_corrupt_share,
        num_threads=num_threads,
        prefetch=prefetch,
    )


class Batches:
    """An iterator of host batches that can say where it stands and be put there again; made by `make_batches`,
    `make_sequence_batches` or `make_class_batches`.

    `corrupt` counts the corrupt rows that this process has read.
    """

    corrupt: int

    def __init__(self, reader: "_BatchReader[Any]", options: grain.ReadOptions, max_corrupt_share: float):
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
        """Where the next batch begins, and in what order; JSON-able.

        Returns:
            {"position": examples before the next batch, over all processes and epochs; "batch_size", "examples",
            "seed", "shuffle": what the order depends on; "corrupt", "rows_read", "corrupt_examples": what this process
            has met so far. All but the last three are equal on all processes}.
        """
        return {
            "position": self._next_batch * self._reader.batch_size,
            **self._reader.order_state(),
            "corrupt": self.corrupt,
            "rows_read": self._rows_read,
            "corrupt_examples": sorted(self._corrupt_examples),
        }

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
        # Checkpoints from before what was corrupt was kept do without.
        met = state.get("corrupt_examples", [])
        counts = [state.get("position"), state.get("corrupt", 0), state.get("rows_read", 0)]
        if not isinstance(met, list) or not all(type(number) is int and number >= 0 for number in [*counts, *met]):
            raise InputError(f"cannot resume the data: expected a position and counts from 0, got {counts}")
        self.close()
        position, self.corrupt, self._rows_read = counts
        self._next_batch = position // self._reader.batch_size
        self._corrupt_examples = set(met)

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


class _Example(NamedTuple, Generic[Content]):
    """A decoded example. `images` is empty where `defect` says what is wrong with it."""

    images: Mapping[str, UInt8[np.ndarray, "s s 3"]]
    content: Content
    defect: str | None


class _BatchReader(Generic[Content]):
    """Global batch number -> this process's rows of the batch, and what is wrong with its corrupt examples."""

    def __init__(
        self,
        rows: Rows[Content],
        *,
        batch_size: int,
        image_size: int,
        shuffle: bool,
        seed: int,
        repeat: bool,
        process_index: int,
        process_count: int,
    ):
        self._rows = rows
        self.batch_size = batch_size
        self._image_size = image_size
        self._shuffle = shuffle
        self._seed = seed
        self._repeat = repeat
        self._row_count = batch_size // process_count
        self._first_row = process_index * self._row_count
        self.examples = len(rows)
        # A batch may lie in two epochs.
        self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffled_order)
        self._cached: dict[int, _Example[Content]] = {}
        self._caches = self.examples * len(rows.image_names) * image_size**2 * 3 <= MOST_CACHED_BYTES

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
        stop = start + self._row_count if self._repeat else min(start + self._row_count, self.examples)
        indices = [self._index_at(position) for position in range(start, stop)]
        examples = [self._example(index) for index in indices]
        images = self._images(examples)
        batch = {**images, "where": self._where(examples), "example_id": filled_column(indices, self._row_count)}
        batch |= self._rows.columns([example.content for example in examples], images, start)
        pairs = zip(indices, examples, strict=True)
        return batch, [(index, example.defect) for index, example in pairs if example.defect is not None]

    def _index_at(self, position: int) -> int:
        epoch, index = divmod(position, self.examples)
        if not self._shuffle:
            return index
        return int(self._epoch_order(epoch)[index])

    def _shuffled_order(self, epoch: int) -> np.ndarray:
        return shuffled_order(self._seed, epoch, self.examples)

    def _example(self, index: int) -> _Example[Content]:
        # Two threads may both decode an example; they store the same value.
        example = self._cached.get(index) or self._read_example(index)
        if self._caches:
            self._cached[index] = example
        return example

    def _read_example(self, index: int) -> _Example[Content]:
        try:
            read, content = self._rows.read(index)
        except CorruptExampleError as error:
            return _Example({}, self._rows.content(index), str(error))
        try:
            loaded = {name: load_image(image, image_size=self._image_size) for name, image in read.images.items()}
            return _Example(loaded, content, None)
        except CorruptExampleError as error:
            return _Example({}, content, f"{read.origin}: {error}")

    def _images(self, examples: Sequence[_Example[Content]]) -> dict[str, np.ndarray]:
        """The images of every row, black where there is none."""
        shape = (self._row_count, self._image_size, self._image_size, 3)
        columns = {name: np.zeros(shape, np.uint8) for name in self._rows.image_names}
        for row, example in enumerate(examples):
            for name, image in example.images.items():
                columns[name][row] = image
        return columns

    def _where(self, examples: Sequence[_Example[Content]]) -> Bool[np.ndarray, " b"]:
        where = np.zeros(self._row_count, bool)
        where[: len(examples)] = [example.defect is None for example in examples]
        return where


def _batches(
    rows: Rows[Any],
    *,
    batch_size: int,
    image_size: int,
    shuffle: bool,
    seed: int,
    repeat: bool,
    process_index: int | None,
    process_count: int | None,
    max_corrupt_share: float,
    num_threads: int,
    prefetch: int,
) -> Batches:
    if process_index is None or process_count is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    _check_arguments(len(rows), batch_size, image_size, seed, process_index, process_count, max_corrupt_share)
    reader = _BatchReader(
        rows,
        batch_size=batch_size,
        image_size=image_size,
        shuffle=shuffle,
        seed=seed,
        repeat=repeat,
        process_index=process_index,
        process_count=process_count,
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    return Batches(reader, options, max_corrupt_share)


def _check_arguments(
    examples: int,
    batch_size: int,
    image_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    max_corrupt_share: float,
) -> None:
    if not examples:
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
