"""Examples that a file lists, with their images in a folder: all checked when it is opened."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from repkit.checks import InputError, require_choice, shown
from repkit.data.images import CorruptExampleError, load_image

Content = TypeVar("Content")

MissingImages = Literal["refuse", "leave_out"]
"""What to do with examples whose images are not there."""


MOST_IMAGE_BYTES = 256 * 2**20
"""An encoded image that is larger is refused before it is read."""


class Entry(NamedTuple, Generic[Content]):
    """One checked example: where it stands in the file, the paths of its images, and what else is said of it."""

    place: str | int
    images: tuple[str, ...]
    content: Content


class ListedExamples(Generic[Content]):
    """Random access to the examples of a file and to their images.

    `left_out` is how many of them were left out because images are missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Iterable[Entry[Content]],
        *,
        image_root: Path,
        images_hint: str = "",
        missing_images: MissingImages = "refuse",
    ):
        """Takes checked examples; checks that their images are there, and that the first one is an image.

        Args:
            path: the file that lists them, to be named in messages.
            entries: the examples, with image paths that `checked_path` returned.
            image_root: folder that the image paths are relative to.
            images_hint: which images belong there and where they are published, to be said if one is missing.
            missing_images: "refuse" raises if an image is missing; "leave_out" goes on without its example.

        Raises:
            InputError: no examples; a missing image (with its place); first image is no image.
        """
        require_choice("missing_images", missing_images, ("refuse", "leave_out"))
        self._path = Path(path)
        self._root = image_root
        self.entries = list(entries)
        if not self.entries:
            raise InputError(f"{path}: the data set is empty")
        listed = len(self.entries)
        names = {image for entry in self.entries for image in entry.images}
        there = {image for image in names if os.path.isfile(image_root / image)}
        if len(there) < len(names):
            entry, image = next((e, image) for e in self.entries for image in e.images if image not in there)
            absent = f"{self._at(entry)}: cannot read image {shown(image)}: No such file"
            self.entries = [entry for entry in self.entries if there.issuperset(entry.images)]
            if missing_images == "refuse" or not self.entries:
                raise InputError(absent + (f" in {image_root}; {images_hint}" if images_hint else ""))
        self.left_out = listed - len(self.entries)
        try:
            for image in self.images(0):
                load_image(image, image_size=1)
        except CorruptExampleError as error:
            raise InputError(f"{self.origin(0)}: {error}") from error

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, index: int) -> tuple[bytes, ...]:
        """The encoded images of an example; raises `CorruptExampleError` where one is there no more."""
        return tuple(self._read(self.entries[index], image) for image in self.entries[index].images)

    def origin(self, index: int) -> str:
        """File, place and images of an example, in words."""
        entry = self.entries[index]
        return f"{self._at(entry)} ({', '.join(entry.images)})"

    def _read(self, entry: Entry[Content], image: str) -> bytes:
        try:
            size = (self._root / image).stat().st_size
            if size > MOST_IMAGE_BYTES:
                raise CorruptExampleError(
                    f"{self._at(entry)}: image {shown(image)} has {size} bytes, more than {MOST_IMAGE_BYTES}"
                )
            return (self._root / image).read_bytes()
        except OSError as error:
            raise CorruptExampleError(
                f"{self._at(entry)}: cannot read image {shown(image)}: {error.strerror}"
            ) from error

    def _at(self, entry: Entry[Content]) -> str:
        return place_in(self._path, entry.place)


def place_in(path: str | os.PathLike[str], place: str | int) -> str:
    """A line of a file, or another place in it, in words.

    >>> place_in("pairs.jsonl", 3), place_in("dataset_coco.json", "images[3]")
    ('pairs.jsonl:3', 'dataset_coco.json: images[3]')
    """
    return f"{os.fspath(path)}:{'' if isinstance(place, int) else ' '}{place}"


def checked_path(image: Any, root: Path, *, image_root_given: bool = True) -> str:
    """The path of an image, if it leads into the folder of the images; raises `InputError` otherwise.

    Args:
        image: the path, relative to `root`, or absolute and in `root` where somebody named that folder.
        root: the folder of the images.
        image_root_given: whether somebody named the folder.
    """
    if not isinstance(image, str) or not image or "\0" in image:
        raise InputError(f"expected 'image' to be a path, got {shown(image)}")
    if os.path.isabs(image) and not image_root_given:
        raise InputError(
            f"expected 'image' to be relative, got {shown(image)}; give image_root to allow absolute paths in it"
        )
    base = os.path.abspath(root)
    # Compared by name: a link inside the folder was put there by its owner and may lead to another disk.
    if os.path.commonpath([base, os.path.abspath(os.path.join(base, image))]) != base:
        raise InputError(f"image {shown(image)} leads out of {root}")
    return image
