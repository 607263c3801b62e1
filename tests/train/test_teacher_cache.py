"""The cache of a teacher: what is written comes back by example, and nothing else is taken for it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.train.mesh import make_mesh
from repkit.train.teacher import FrozenTeacher
from repkit.train.teacher_cache import TeacherBatches, data_identity, open_cache, write_cache

EXAMPLES = 10
CORRUPT = 6
LAYER = "encoder.blocks.0.attention"
PATHS = ("logits", f"attention.{LAYER}", "masks.encoder")
INPUTS = np.random.default_rng(0).standard_normal((EXAMPLES, 4)).astype(np.float32)
TEACHER = FrozenTeacher(
    lambda params, batch, key: {
        "logits": batch["x"] @ params["w"],
        "attention": {LAYER: jnp.einsum("bi,bj->bij", batch["x"], batch["x"])},
        "masks": {"encoder": batch["x"] > 0},
        "scale": jnp.ones(()),
    },
    {"w": np.arange(12, dtype=np.float32).reshape(4, 3)},
)


def _rows(ids, *, where=None):
    ids = np.asarray(ids, np.int32)
    x = np.where((ids == CORRUPT)[:, None], np.float32(0), INPUTS[ids])
    where = ids != CORRUPT if where is None else np.asarray(where)
    return {"x": x, "token_ids": np.stack([ids, ids + 1], 1), "example_id": ids, "where": where}


def _pass(*, batch_size=4):
    """In example order; one example is corrupt, and the last batch is filled up."""
    for start in range(0, EXAMPLES, batch_size):
        ids = np.arange(start, start + batch_size)
        yield _rows(np.where(ids < EXAMPLES, ids, 0), where=(ids < EXAMPLES) & (ids != CORRUPT))


def _write(folder, batches=None, *, teacher=TEACHER, paths=PATHS, **options):
    write_cache(folder, teacher, batches or _pass(), paths=paths, examples=EXAMPLES, data="ten rows", **options)
    return open_cache(folder, teacher=teacher.identity, data="ten rows")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("caches") / "cache")


def test_rows_come_back_by_example_in_half_precision_and_masked_rows_are_zero(written):
    batch = _rows([9, 0, CORRUPT, 3, 3], where=[True, True, False, True, False])
    targets = written.rows(batch)
    expected = {
        "teacher/logits": INPUTS @ TEACHER.params["w"],
        f"teacher/attention.{LAYER}": INPUTS[:, :, None] * INPUTS[:, None],
    }
    assert targets.keys() == {*expected, "teacher/masks.encoder"}
    for name, values in expected.items():
        assert targets[name].dtype == np.float16
        np.testing.assert_allclose(targets[name][[0, 1, 3]], values[[9, 0, 3]], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(targets[name][[2, 4]], 0)
    np.testing.assert_array_equal(targets["teacher/masks.encoder"][0], INPUTS[9] > 0)
    assert targets["teacher/masks.encoder"].dtype == bool


def test_it_is_written_in_float32_and_on_a_mesh_as_well(tmp_path, written):
    teacher = FrozenTeacher(TEACHER.forward, TEACHER.params)
    whole = _write(tmp_path / "cache", _pass(batch_size=8), teacher=teacher, dtype="float32", mesh=make_mesh())
    rows = whole.rows(_rows([1]))["teacher/logits"]
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[0], INPUTS[1] @ TEACHER.params["w"], rtol=1e-6)
    np.testing.assert_allclose(rows, written.rows(_rows([1]))["teacher/logits"], rtol=1e-3)


def test_the_manifest_says_what_it_holds(written):
    about = json.loads((written.directory / "manifest.json").read_text())
    assert about["teacher"] == TEACHER.identity
    assert (about["data"], about["examples"], about["inputs"]) == ("ten rows", EXAMPLES, ["x", "token_ids"])
    assert about["arrays"][f"attention.{LAYER}"] == {"file": "000.npy", "shape": [EXAMPLES, 4, 4], "dtype": "float16"}


def test_another_teacher_and_other_data_are_refused(written):
    other = FrozenTeacher(TEACHER.forward, {"w": TEACHER.params["w"] + 1})
    with pytest.raises(
        InputError, match=rf"belongs to the teacher '{TEACHER.identity[:12]}…', expected '{other.identity[:12]}…'"
    ):
        open_cache(written.directory, teacher=other.identity, data="ten rows")
    with pytest.raises(InputError, match="belongs to the data 'ten rows', expected 'eleven rows'"):
        open_cache(written.directory, teacher=TEACHER.identity, data="eleven rows")
    with pytest.raises(InputError, match=r"the teacher .*; it belongs to the data"):
        open_cache(written.directory, teacher=other.identity, data="eleven rows")


def test_inputs_that_the_teacher_did_not_see_are_refused(written, tmp_path):
    batch = _rows([2, 3])
    changed = batch | {"token_ids": batch["token_ids"] + np.array([[0, 0], [0, 1]], np.int32)}
    with pytest.raises(InputError, match="does not fit the batch: example 3 has other token_ids than the teacher saw"):
        written.rows(changed)
    with pytest.raises(InputError, match="belongs to inputs x, token_ids; the batch has no token_ids"):
        written.rows({name: array for name, array in batch.items() if name != "token_ids"})
    # A masked row may hold anything.
    written.rows(changed | {"where": np.array([True, False])})
    of_x = _write(tmp_path / "cache", inputs=["x"])
    assert of_x.rows(changed)["teacher/logits"].any()
    with pytest.raises(InputError, match="unknown input of the batch 'images'"):
        _write(tmp_path / "other", inputs=["images"])


def test_examples_that_it_does_not_have_are_refused(written):
    with pytest.raises(InputError, match=f"has no example {CORRUPT}"):
        written.rows(_rows([1, CORRUPT], where=[True, True]))
    with pytest.raises(InputError, match="has no example 10"):
        written.rows(_rows([1, 1]) | {"example_id": np.array([1, EXAMPLES], np.int32)})
    with pytest.raises(InputError, match="needs batches with example_id"):
        written.rows({"where": np.ones(2, bool)})


def _broken_off():
    yield next(_pass())
    raise OSError("the disk with the images is gone")


def test_an_interrupted_writing_leaves_nothing_that_opens_and_begins_anew(tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(OSError, match="is gone"):
        _write(folder, _broken_off())
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"no teacher's cache in .*write_cache makes one"):
        open_cache(folder, teacher=TEACHER.identity, data="ten rows")
    # What a killed process leaves.
    (tmp_path / "cache.partial").mkdir()
    (tmp_path / "cache.partial" / "000.npy").write_bytes(b"half of it")
    with pytest.raises(InputError, match="has not come to its end; write it again"):
        open_cache(folder, teacher=TEACHER.identity, data="ten rows")
    assert _write(folder).rows(_rows([1]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(InputError, match="is already there"):
        _write(folder)


@pytest.mark.parametrize("name", ["manifest.json", "000.npy", "inputs.npy"])
def test_a_damaged_cache_is_refused(tmp_path, name):
    folder = _write(tmp_path / "cache").directory
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) - 5])
    with pytest.raises(InputError, match="is damaged"):
        open_cache(folder, teacher=TEACHER.identity, data="ten rows")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "at least one path"),
        ({"paths": ("logit",)}, r"nothing at the path 'teacher\.logit'; near: teacher\.logits"),
        ({"paths": ("scale",)}, r"expected 4 rows at 'scale', got float32\[\]"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"batches": [_rows([0, 1]), _rows([3, 4])]}, "6 of 10 examples never came, such as 2, 5, 6, 7, 8 and 1 more"),
        ({"batches": [_rows([0]) | {"example_id": np.array([77])}]}, r"example_id in \[0, 10\), got 77"),
        ({"batches": [_rows([0], where=[False])]}, "no batch brought a valid row"),
        ({"batches": []}, "no batch brought a valid row"),
        ({"batches": _pass(batch_size=5), "mesh": make_mesh}, "5 rows cannot be split over 8 devices"),
    ],
)
def test_what_cannot_be_cached_is_refused_and_leaves_nothing(tmp_path, options, message):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    batches = options.pop("batches", None)
    with pytest.raises(InputError, match=message):
        _write(tmp_path / "cache", iter(batches) if batches is not None else None, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "paths"), [(np.nan, PATHS), (1e5, PATHS[1:])])
def test_a_teacher_that_is_not_finite_is_refused_but_for_masked_rows(tmp_path, value, paths):
    def batches(where):
        batch = _rows(np.arange(EXAMPLES))
        batch["x"][4] = value
        batch["where"][4] = where
        yield batch

    with pytest.raises(InputError, match=f"the teacher's '{PATHS[1]}' is not finite in float16 for example 4"):
        _write(tmp_path / "cache", batches(True), paths=paths)
    _write(tmp_path / "cache", batches(False), paths=paths)


class _Stream:
    corrupt = 3

    def __init__(self):
        self.position, self.is_closed = 0, False

    def __next__(self):
        self.position += 1
        return _rows([self.position % CORRUPT, (self.position + 1) % CORRUPT])

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        assert state.keys() == {"position"}
        self.position = state["position"]

    def close(self):
        self.is_closed = True


def test_a_stream_with_the_cache_goes_on_where_it_was(written):
    stream = _Stream()
    batches = TeacherBatches(stream, written)
    next(batches)
    position = json.loads(json.dumps(batches.get_state()))
    assert position == {"position": 1, "teacher": TEACHER.identity}
    second = next(batches)
    again = TeacherBatches(_Stream(), written)
    again.set_state(position)
    repeated = next(iter(again))
    assert {"x", "teacher/logits"} <= second.keys() == repeated.keys()
    for name in second:
        np.testing.assert_array_equal(second[name], repeated[name])
    assert batches.corrupt == 3
    batches.close()
    assert stream.is_closed


def _records(count, *, folder="a", changed=None):
    return [
        {
            "image": np.full((2, 2, 3), index % 256, np.uint8),
            "texts": [f"number {index if index != changed else 'changed'}"],
            "label": np.int64(index),
            "origin": f"{folder}/{index}",
        }
        for index in range(count)
    ]


class _Unreadable(list):
    def __getitem__(self, index):
        if index == 1:
            raise ValueError("no such image")
        return super().__getitem__(index)


def test_the_identity_of_data_is_of_their_number_and_content():
    identity = data_identity(_records(5))
    assert data_identity(_records(5, folder="elsewhere")) == identity
    plain = [record | {"label": int(record["label"]), "texts": tuple(record["texts"])} for record in _records(5)]
    assert data_identity(plain) == identity
    others = [_records(6), _records(5, changed=2), _records(5)[::-1], _Unreadable(_records(5))]
    assert len({identity, *map(data_identity, others)}) == 5
    assert data_identity(_Unreadable(_records(5))) == data_identity(_Unreadable(_records(5)))
    assert data_identity(_records(1000), sample=4) == data_identity(_records(1000, changed=5), sample=4)
    with pytest.raises(InputError, match="got none"):
        data_identity([])
    with pytest.raises(InputError, match="got a object"):
        data_identity([object()])
