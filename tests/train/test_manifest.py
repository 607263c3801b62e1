"""The manifest: every changed bit, missing, cut or added piece of a file is found and the file named."""

import hashlib
import json

import numpy as np
import pytest

from repkit.train.manifest import Damage, check_files, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "weights").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "about").write_bytes(b"{}")
    write_manifest(tmp_path, {"step": 3})
    return tmp_path


def check(folder):
    check_files(folder, read_manifest(folder))


def test_a_folder_as_it_was_written_is_good(folder):
    check(folder)
    assert read_manifest(folder)["files"].keys() == {"about", "state/weights"}


def test_flipped_bits_are_found(folder):
    rng = np.random.default_rng(1)
    for name, flips in (("state/weights", 20), ("manifest.json", 200)):
        path = folder / name
        content = path.read_bytes()
        positions = rng.choice(8 * len(content), flips, replace=False)
        for position in positions:
            changed = bytearray(content)
            changed[position // 8] ^= 1 << position % 8
            path.write_bytes(changed)
            with pytest.raises(Damage) as caught:
                check(folder)
            assert caught.value.file == name
        path.write_bytes(content)
    check(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 4999 bytes, 5000 were written"),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "has 5001 bytes"),
        (lambda path: path.write_bytes(bytes(512) + path.read_bytes()[512:]), "its sha256"),
    ],
)
def test_other_damage_is_found(folder, change, reason):
    change(folder / "state" / "weights")
    with pytest.raises(Damage, match=f"state/weights: {reason}"):
        check(folder)


def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path):
    write_manifest(tmp_path, {"files": {}})
    content = {"files": {"../secret": {"size": 1, "sha256": "0"}}}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n")
    with pytest.raises(Damage, match=r"names a file outside of the folder: \.\./secret"):
        read_manifest(tmp_path)
