"""Small real data that the tests of this folder share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repkit.data import digit_scenes
from repkit.data.class_sources import scene_class_source
from repkit.data.scene_classes import CLASS_TASKS
from repkit.data.scene_tasks import TASKS
from repkit.data.sequence_sources import scene_task_source
from repkit.data.sources import ListedSource, TfdsSource, digit_scenes_source, jsonl_source
from repkit.data.tokenizer import Tokenizer, train_tokenizer

COLOURS = {"red": (200, 30, 40), "green": (50, 160, 70), "blue": (50, 80, 210)}
PAIRS = 23


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder that fills up with the digit scenes that tests ask for."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with the tasks on digit scenes, with 60, 12 and 24 examples."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "TASK_SPLIT_SIZES", {"train": 60, "validation": 12, "test": 24})
        for task in TASKS:
            scene_task_source(task, "train", folder)
        for task in CLASS_TASKS:
            scene_class_source(task, "train", folder)
    return folder


@pytest.fixture(scope="session")
def single_scenes(scenes_dir: Path) -> Callable[[str], TfdsSource]:
    return lambda split: digit_scenes_source("single", split, scenes_dir)


@pytest.fixture(scope="session")
def pair_lines() -> list[dict[str, Any]]:
    """The lines of `pairs`: 23 images with one, two or three captions by turns, and labels."""
    colours = list(COLOURS)

    def line(index: int) -> dict[str, Any]:
        captions = [f"a {colours[(index + shift) % 3]} patch, number {index}" for shift in range(index % 3 + 1)]
        caption = captions[0] if len(captions) == 1 else captions
        return {"image": f"images/{index}.png", "caption": caption, "label": index % 4}

    return [line(index) for index in range(PAIRS)]


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines, given as objects or as raw text, to a JSONL file beside a folder `images` with 23 small PNGs."""
    folder = tmp_path / "pairs"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(PAIRS):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")

    def write(*lines: Any) -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / "pairs.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return folder / "pairs.jsonl"

    return write


@pytest.fixture
def pairs(write_pairs: Callable[..., Path], pair_lines: list[dict[str, Any]]) -> ListedSource:
    """23 images with one to three captions each, and labels."""
    return jsonl_source(write_pairs(*pair_lines))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [f"a {colour} patch, number {number}" for colour in COLOURS for number in range(PAIRS)]
    return train_tokenizer(texts, vocab_size=128)
