"""TFDS data sets on disk, read without TensorFlow."""

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from repkit.checks import InputError, unknown_name

MOST_KEPT_BYTES = 128 * 2**20
"""TFDS data sets up to this size are kept in memory once read, still encoded."""


class TfdsSplit:
    """Random access to the examples of a split, images still encoded. `name` is that of data set and split."""

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | os.PathLike[str] | None,
        *,
        image_keys: Sequence[str],
        keys: Iterable[str],
    ):
        """Opens a split; the data set is prepared first where `data_dir` lacks it.

        Args:
            name: as TFDS writes it.
            split: as TFDS writes it.
            data_dir: folder of prepared data sets; None is TFDS's own.
            image_keys: features with the images.
            keys: other features that must be there.

        Raises:
            InputError: unknown data set, split or feature; the data set is on disk in a format that only TensorFlow
                reads; it cannot be prepared; it is empty.
        """
        builder = _prepared_builder(name, data_dir)
        import tensorflow_datasets as tfds

        for key in (*image_keys, *keys):
            if key not in builder.info.features:
                raise unknown_name(f"feature of {name}", key, builder.info.features)
        for part in re.findall(r"(?:^|\+)\s*([\w-]+)", split):
            if part not in builder.info.splits:
                raise unknown_name(f"split of {name}", part, builder.info.splits)
        self.features = builder.info.features
        # Encoded images stay encoded: their decoding belongs to the pipeline, which counts what cannot be decoded.
        encoded = [key for key in image_keys if isinstance(self.features[key], tfds.features.Image)]
        decoders = {key: tfds.decode.SkipDecoding() for key in encoded} or None
        self.name = f"{builder.info.full_name} {split}"
        try:
            if not builder.info.splits[split].num_examples:
                raise InputError("the data set is empty")
            self._examples = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise InputError(
                f"{builder.info.full_name} lies in {builder.data_path} as {builder.info.file_format}, which only "
                'TensorFlow reads; give another data_dir, or prepare it anew with file_format="array_record"'
            ) from error
        except ValueError as error:
            raise InputError(f"{self.name}: {error}") from error
        # Parsing costs more than a small data set's memory, and training and evaluation read it again and again.
        keep = builder.info.dataset_size <= MOST_KEPT_BYTES
        self._read = functools.cache(self._examples.__getitem__) if keep else self._examples.__getitem__

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Any:
        return self._read(index)


def decoded_text(text: bytes | str) -> str:
    """TFDS gives texts as bytes, and its test doubles as str."""
    return text.decode(errors="replace") if isinstance(text, bytes) else text


def decoded_texts(value: Any) -> list[str]:
    """The texts of a feature that holds one text or a sequence of them."""
    return [decoded_text(text) for text in ([value] if isinstance(value, bytes | str) else value)]


def _prepared_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The builder of a data set that is completely on disk; several processes may ask at once.

    TFDS writes into a folder of its own and renames it when it is complete. So an interrupted build leaves nothing that
    could be taken for data, and of two builds at the same time the second one finds its name taken and is dropped.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError('TFDS data sets need tensorflow-datasets: pip install "repkit[data]"') from error
    from repkit.data import digit_scenes  # registers its name with TFDS

    def make_builder() -> Any:
        return tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir))

    try:
        builder = make_builder()
    except tfds.core.DatasetNotFoundError as error:
        raise unknown_name("TFDS data set", name, tfds.list_builders(with_community_datasets=False)) from error
    # TFDS says with an AssertionError that it has no such version.
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"TFDS data set {name}: {str(error).splitlines()[0]}") from error
    if builder.data_path.exists():
        return builder
    quiet = isinstance(builder, digit_scenes.DigitScenes)
    try:
        with _without_output() if quiet else contextlib.nullcontext():
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        if not builder.data_path.exists():
            raise InputError(f"cannot prepare {name} in {builder.data_path}: {error}; give another data_dir") from error
    except ImportError as error:
        raise InputError(f"cannot prepare {name}: its builder needs what is not installed: {error}") from error
    # A new one, because the information of a builder that lost the race is incomplete.
    return make_builder()


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Swallows TFDS's greeting and its progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
