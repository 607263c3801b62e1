"""Hostile files are refused in one clear line, and nothing of ours can run what came as data."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from repkit.train.safetensors import read_safetensors
from tests.faults.hostile import CASES, refusal

ROOT = Path(__file__).parent.parent.parent
SOURCES = [path for folder in ("repkit", "experiments", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused(tmp_path, monkeypatch, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    refusal(CASES[name], folder)
    assert not list(tmp_path.rglob("pwned"))


def test_there_are_many_of_them():
    assert len(CASES) >= 50


def test_nothing_runs_code_that_came_as_data():
    """No module that makes objects of bytes, no text that is run, and no array file that may hold objects."""
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|cloudpickle|dill|joblib|marshal|shelve|yaml)\b", text, re.M), (
            path
        )
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), path
        assert text.count("np.load(") == len(re.findall(r"np\.load\([^()]*allow_pickle=False\)", text)), path


def test_a_good_safetensors_file_is_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]},
        "w": {"dtype": "F64", "shape": [], "data_offsets": [4, 12]},
        "e": {"dtype": "I8", "shape": [0, 3], "data_offsets": [4, 4]},
    }
    text = json.dumps(header).encode()
    content = b"\x80\x3f\x00\x40" + struct.pack("<d", 2.5)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    arrays = read_safetensors(path)
    np.testing.assert_array_equal(arrays["b"].astype(np.float32), [[1], [2]])
    assert (float(arrays["w"]), arrays["e"].shape) == (2.5, (0, 3))
    with pytest.raises(ValueError):
        arrays["b"][0] = 0
