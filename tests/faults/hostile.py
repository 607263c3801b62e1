"""Files that somebody else wrote, in ill will or by accident: what reads them must refuse them in one clear line.

Each case writes files into a folder and returns what reads them.
"""

import gzip
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from repkit.checks import InputError
from repkit.data.images import CorruptExampleError, load_image
from repkit.data.published import coco_captions_source
from repkit.data.sources import jsonl_source
from repkit.data.tokenizer import load_tokenizer
from repkit.evaluate.results import read_results
from repkit.recipe import RunDirectory
from repkit.train.checkpoint import Checkpointer, CheckpointReader
from repkit.train.logging import read_metrics
from repkit.train.safetensors import read_safetensors
from repkit.train.teacher_cache import open_cache

Case = Callable[[Path], Callable[[], Any]]

CASES: dict[str, Case] = {}
REFUSALS = (InputError, CorruptExampleError)


def refusal(case: Case, folder: Path) -> str:
    """The message with which a case is refused; raises `AssertionError` if it is not, or not in one line."""
    read = case(folder)
    before = _listing(folder.parent)
    try:
        read()
    except REFUSALS as error:
        message = str(error)
    else:
        raise AssertionError("it was not refused")
    if not message.strip() or "\n" in message or len(message) > 2000:
        raise AssertionError(f"not one clear line: {message!r}")
    if _listing(folder.parent) != before:
        raise AssertionError("something was written")
    return message


def _listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_size) for path in folder.rglob("*") if path.is_file())


def _add(name: str, case: Case) -> None:
    assert name not in CASES
    CASES[name] = case


# ---------------------------------------------------------------------------------------------------------------------
# Image-caption pairs

DEEP = "[" * 200_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _png(width: int = 4, height: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _pairs(line: str | bytes) -> Case:
    def case(folder: Path) -> Callable[[], Any]:
        (folder / "0.png").write_bytes(_png())
        (folder.parent / "secret.png").write_bytes(_png())
        (folder / "link").symlink_to("/dev/zero")
        text = line.replace("{parent}", str(folder.parent)) if isinstance(line, str) else line
        (folder / "pairs.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        return lambda: jsonl_source(folder / "pairs.jsonl")

    return case


for _name, _line in {
    "path out of the folder": '{"image": "../secret.png", "caption": "x"}',
    "path out of the folder, roundabout": '{"image": "a/b/../../../secret.png", "caption": "x"}',
    "absolute path": '{"image": "{parent}/secret.png", "caption": "x"}',
    "absolute path of the system": '{"image": "/etc/passwd", "caption": "x"}',
    "path of a device": '{"image": "link", "caption": "x"}',
    "path with a null byte": '{"image": "0.png\\u0000.jpg", "caption": "x"}',
    "path that is a list": '{"image": ["0.png"], "caption": "x"}',
    "path that is a number": '{"image": 7, "caption": "x"}',
    "path that is a URL": '{"image": "file:///etc/passwd", "caption": "x"}',
    "path too long for the system": '{"image": "' + "a" * 5000 + '", "caption": "x"}',
    "empty path": '{"image": "", "caption": "x"}',
    "brackets without end": '{"image": "0.png", "caption": ' + DEEP,
    "number of 10,000 digits": '{"image": "0.png", "caption": "x", "label": ' + "9" * 10_000 + "}",
    "label that is not a number": '{"image": "0.png", "caption": "x", "label": NaN}',
    "half a character": '{"image": "0.png", "caption": "\\ud800"}',
    "caption that is an object": '{"image": "0.png", "caption": {"$ref": "x"}}',
    "no UTF-8": b'{"image": "0.png", "caption": "\xff\xfe"}',
    "binary": bytes(range(256)) * 16,
    "YAML with a tag": '!!python/object/apply:os.system ["touch pwned"]',
    "pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}.items():
    _add(f"pairs: {_name}", _pairs(_line))


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_of(width: int, height: int, pixels: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return PNG_SIGNATURE + header + _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")


def _image(content: Callable[[], bytes]) -> Case:
    return lambda folder: lambda: load_image(content(), image_size=8)


def _tiff_of(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(buffer, "TIFF")
    content = buffer.getvalue()
    for tag, size in ((256, width), (257, height)):
        old = struct.pack("<HHIHH", tag, 3, 1, 4, 0)
        assert old in content or struct.pack("<HHII", tag, 4, 1, 4) in content
        new = struct.pack("<HHII", tag, 4, 1, size)
        content = content.replace(old, new).replace(struct.pack("<HHII", tag, 4, 1, 4), new)
    return content


for _name, _content in {
    "4 billion pixels in 100 bytes": lambda: _png_of(65535, 65535, b""),
    "more pixels than are allowed": lambda: _png_of(10_000, 10_000, b""),
    "TIFF of a terabyte": lambda: _tiff_of(1_000_000, 1_000_000),
    "cut off": lambda: _png()[:-30],
    "half of its pixels": lambda: _png_of(64, 64, bytes(64 * 3 * 10)),
    "empty": lambda: b"",
    "text": lambda: b"this is no image",
    "PostScript, which would start another program": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "PDF": lambda: b"%PDF-1.7\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "no width": lambda: _png_of(0, 4, b""),
    "text chunk that unpacks to 100 MB": lambda: (
        _png()[:33] + _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000))) + _png()[33:]
    ),
}.items():
    _add(f"image: {_name}", _image(_content))


# ---------------------------------------------------------------------------------------------------------------------
# Published data sets


def _coco(content: bytes, name: str = "dataset_coco.json") -> Case:
    def case(folder: Path) -> Callable[[], Any]:
        (folder / name).write_bytes(content)
        return lambda: coco_captions_source(folder / name, "train", image_root=folder)

    return case


def _image_entry(**changes: Any) -> bytes:
    entry = {"filename": "0.png", "split": "train", "sentences": [{"raw": "x"}], **changes}
    return json.dumps({"images": [entry]}).encode()


for _name, _case in {
    "path out of the folder": _coco(_image_entry(filepath="..", filename="secret.png")),
    "absolute path": _coco(_image_entry(filename="/etc/passwd")),
    "brackets without end": _coco(b'{"images": ' + DEEP.encode()),
    "number of 10,000 digits": _coco(b'{"images": ' + b"9" * 10_000 + b"}"),
    "list that is an object": _coco(b'{"images": {"0": {}}}'),
    "sentences that are a text": _coco(_image_entry(sentences="x")),
    "gzip that is none": _coco(b"no gzip", "dataset_coco.json.gz"),
    "gzip cut off": _coco(gzip.compress(_image_entry())[:-9], "dataset_coco.json.gz"),
    "gzip with damaged content": _coco(gzip.compress(_image_entry())[:12] + b"\xff" * 40, "dataset_coco.json.gz"),
}.items():
    _add(f"published: {_name}", _case)


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def _tensors(header: Any, content: bytes = b"", length: int | None = None) -> Case:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def case(folder: Path) -> Callable[[], Any]:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
        return lambda: read_safetensors(path)

    return case


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


for _name, _case in {
    "header of exabytes": _tensors(_tensor(), bytes(8), length=2**62),
    "header longer than the file": _tensors(_tensor(), bytes(8), length=1000),
    "shorter than its first number": lambda folder: (
        (folder / "m.safetensors").write_bytes(b"123"),
        lambda: read_safetensors(folder / "m.safetensors"),
    )[1],
    "header that is no JSON": _tensors(b"\x80\x04pickle"),
    "header that is a list": _tensors([1, 2]),
    "header of brackets without end": _tensors(DEEP.encode()),
    "name twice": _tensors(b'{"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "w": 1}'),
    "unknown dtype": _tensors(_tensor(dtype="O"), bytes(8)),
    "dtype that is a list": _tensors(_tensor(dtype=["F32"]), bytes(8)),
    "shape of petabytes": _tensors(_tensor(shape=[2**50, 2**50]), bytes(8)),
    "negative shape": _tensors(_tensor(shape=[-2]), bytes(8)),
    "shape of fractions": _tensors(_tensor(shape=[2.0]), bytes(8)),
    "offsets behind the end": _tensors(_tensor(data_offsets=[100, 108]), bytes(8)),
    "offsets before the beginning": _tensors(_tensor(data_offsets=[-8, 0]), bytes(8)),
    "offsets the wrong way around": _tensors(_tensor(data_offsets=[8, 0]), bytes(8)),
    "arrays that overlap": _tensors({**_tensor(), "v": _tensor()["w"]}, bytes(16)),
    "gap between arrays": _tensors({**_tensor(), "v": {**_tensor()["w"], "data_offsets": [12, 20]}}, bytes(20)),
    "bytes that belong to no array": _tensors(_tensor(), bytes(9)),
    "truth values that are none": _tensors({"w": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x07"),
    "entry with something more": _tensors({"w": {**_tensor()["w"], "code": "x"}}, bytes(8)),
}.items():
    _add(f"safetensors: {_name}", _case)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, with manifests that agree with what was made of them

LIKE = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}


def _checkpoint(change: Callable[[Path, dict[str, Any]], Any]) -> Case:
    def case(folder: Path) -> Callable[[], Any]:
        directory = folder / "checkpoints"
        with Checkpointer(directory) as checkpoints:
            checkpoints.save(1, {"w": jnp.ones(3)}, {})
        step = directory / "1"
        about = json.loads((step / "about" / "about.json").read_text())
        changed = change(step, about)
        text = changed if isinstance(changed, str) else json.dumps(about)
        (step / "about" / "about.json").write_text(text)
        _sign(step)
        return lambda: CheckpointReader(directory).restore(LIKE)

    return case


def _sign(step: Path, extra: dict[str, Any] | None = None) -> None:
    """Makes the manifest fit the files, as whoever can change a file can."""
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        content = (step / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"] |= extra or {}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n"
    (step / "manifest.json").write_text(text)


def _with_file_outside(folder: Path) -> Callable[[], Any]:
    read = _checkpoint(lambda step, about: None)(folder)
    _sign(folder / "checkpoints" / "1", {"../../../secret": {"size": 1, "sha256": "0"}})
    return read


for _name, _case in {
    "leaves that are a list": _checkpoint(lambda step, about: about.update(leaves=[1])),
    "leaf without a dtype": _checkpoint(lambda step, about: about["leaves"].update(w={"shape": [3]})),
    "dtype of objects": _checkpoint(lambda step, about: about["leaves"].update(w={"dtype": "object", "shape": [3]})),
    "dtype that is none": _checkpoint(
        lambda step, about: about["leaves"].update(w={"dtype": "os.system", "shape": [3]})
    ),
    "negative shape": _checkpoint(lambda step, about: about["leaves"].update(w={"dtype": "float32", "shape": [-3]})),
    "unknown generator": _checkpoint(
        lambda step, about: about["leaves"].update(w={"dtype": "x", "shape": [3], "generator": "evil"})
    ),
    "Python value of another type": _checkpoint(
        lambda step, about: about["leaves"].update(n={"python": "int", "value": "1"})
    ),
    "metrics that are texts": _checkpoint(lambda step, about: about.update(metrics={"recall": "1e9"})),
    "position that is a list": _checkpoint(lambda step, about: about.update(data_position=[1])),
    "brackets without end": _checkpoint(lambda step, about: DEEP),
    "later format": _checkpoint(lambda step, about: about.update(format=99)),
    "format that is an object": _checkpoint(lambda step, about: about.update(format={"a": 1})),
    "Orbax's own files replaced": _checkpoint(lambda step, about: (step / "state" / "_METADATA").write_text("{}")),
    "Orbax's arrays replaced": _checkpoint(
        lambda step, about: [path.write_bytes(b"x" * 64) for path in (step / "state").rglob("manifest.ocdbt")]
    ),
    "manifest that names files outside": _with_file_outside,
}.items():
    _add(f"checkpoint: {_name}", _case)


# ---------------------------------------------------------------------------------------------------------------------
# Run directories, tokenizers, results, caches

RECIPE = 'import os\nos.system("touch pwned")\n'


def _run(stored: Any) -> Case:
    def case(folder: Path) -> Callable[[], Any]:
        (folder / "recipe.py").write_text(RECIPE)
        value = stored(folder) if callable(stored) else stored
        (folder / "config.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return lambda: RunDirectory(folder).load()

    return case


for _name, _stored in {
    "recipe that came with the run": lambda folder: {"recipe": str(folder / "recipe.py"), "config": {}},
    "recipe in the working directory": lambda folder: {
        "recipe": os.path.relpath(folder / "recipe.py"),
        "config": {},
    },
    "recipe that is a list": {"recipe": ["recipe.py"], "config": {}},
    "recipe that is a device": {"recipe": "/dev/null", "config": {}},
    "settings that are a list": {"recipe": "/recipe.py", "config": [1]},
    "brackets without end": DEEP,
    "Python": "__import__('os').system('touch pwned')",
}.items():
    _add(f"run: {_name}", _run(_stored))


def _file(name: str, content: bytes | str, read: Callable[[Path], Any]) -> Case:
    def case(folder: Path) -> Callable[[], Any]:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return lambda: read(path)

    return case


for _name, _content in {
    "brackets without end": DEEP,
    "empty": "",
    "no UTF-8": b"\xff\xfe\x00",
    "without a model": '{"version": "1.0"}',
    "merges of what is not there": json.dumps(
        {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}
    ),
    "ids beyond all bounds": json.dumps(
        {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}
    ),
}.items():
    _add(f"tokenizer: {_name}", _file("tokenizer.json", _content, load_tokenizer))

for _name, _content in {
    "a list": "[1]",
    "metrics that are a list": '{"model": "m", "data": "d", "task": "t", "metrics": [1]}',
    "something more": '{"model": "m", "data": "d", "task": "t", "metrics": {}, "__class__": "x"}',
    "brackets without end": DEEP,
}.items():
    _add(f"results: {_name}", _file("results.jsonl", _content, read_results))

_add("metrics: brackets without end", _file("metrics.jsonl", DEEP + '\n{"step": 1}\n', read_metrics))


def _cache(about: Any) -> Case:
    def case(folder: Path) -> Callable[[], Any]:
        np.save(folder.parent / "secret.npy", np.zeros((2, 2), np.float32))
        np.save(folder / "objects.npy", np.array([{}, {}], object), allow_pickle=True)
        (folder / "manifest.json").write_text(about if isinstance(about, str) else json.dumps(about))
        return lambda: open_cache(folder, teacher="t", data="d")

    return case


def _about_cache(file: str) -> dict[str, Any]:
    array = {"file": file, "shape": [2, 2], "dtype": "float32"}
    return {"format": 1, "teacher": "t", "data": "d", "examples": 2, "inputs": [], "arrays": {"embeds": array}}


for _name, _about in {
    "path out of the folder": _about_cache("../secret.npy"),
    "pickled array": _about_cache("objects.npy"),
    "arrays that are a list": {**_about_cache("x.npy"), "arrays": [1]},
    "brackets without end": DEEP,
}.items():
    _add(f"cache: {_name}", _cache(_about))
