"""Checkpoints: what is saved comes back bit-equal, strictly, on any number of devices, and the right steps stay."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from repkit.checks import InputError, RunWarning
from repkit.train.checkpoint import Checkpointer, CheckpointReader, SaveFailedError


class Memory(NamedTuple):
    log_partition: Any
    diagnostics: dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: Any
    optimizer: Any
    memory: Any
    ema: Any
    step: Any
    key: Any
    host: Any


def make_state(seed: int = 0) -> State:
    numbers = np.random.default_rng(seed)
    params = {
        "image": {"blocks": [{"kernel": jnp.asarray(numbers.normal(size=(8, 3)), jnp.float32)}]},
        "text": {"bias": jnp.asarray(numbers.normal(size=5), jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(
        params=params,
        optimizer=optimizer.init(params),
        memory={"gamma": Memory(jnp.full(4, -jnp.inf), {"ess": jnp.float32(seed)}), "info_nce": None},
        ema=jax.tree.map(jnp.copy, params),
        step=jnp.int32(seed),
        key=jax.random.key(seed),
        host={
            "count": np.int64(2**40 + seed),
            "ids": np.arange(6, dtype=np.uint8).reshape(2, 3),
            "empty": jnp.zeros((0, 4)),
            "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
            "python": [seed, 0.1 + seed, True, "warm"],
        },
    )


def assert_equal(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for path, a in jax.tree_util.tree_leaves_with_path(first):
        b = jax.tree_util.tree_leaves_with_path(second)[0][1] if not path else _at(second, path)
        assert type(a) is type(b), (path, type(a), type(b))
        if isinstance(a, bool | int | float | str):
            assert a == b
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def _at(tree: Any, path: Any) -> Any:
    return dict(jax.tree_util.tree_leaves_with_path(tree))[path]


def save_steps(directory: Path, scores: dict[int, float | None], **options: Any) -> None:
    with Checkpointer(directory, **options) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, {"w": jnp.full(3, float(step))}, {}, None if score is None else {"recall": score})


LIKE = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}


def test_every_kind_of_leaf_comes_back_bit_equal(tmp_path: Path) -> None:
    state = make_state(1)
    position = {"example": 4096, "epoch": 2, "files": ["a", "b"]}
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(3, state, position, {"loss": np.float32(0.5), "recall": jnp.float32(0.25)})
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpoints:
        restored = checkpoints.restore(like=make_state(2))
        assert checkpoints.metrics(3) == {"loss": 0.5, "recall": 0.25}
    assert restored.step == 3
    assert restored.data_position == position
    assert_equal(restored.state, state)


def test_abstract_target_restores_jax_arrays_and_typed_keys(tmp_path: Path) -> None:
    state = {"key": jax.random.key(4), "w": jnp.arange(3.0)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        restored = checkpoints.restore(like=jax.eval_shape(lambda: state)).state
    assert_equal(restored, state)
    assert jax.random.uniform(restored["key"]) == jax.random.uniform(state["key"])


def test_the_position_is_readable_json_and_the_arrays_are_named_by_path(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(), {"example": 12}, {"loss": 0.5})
    about = json.loads((tmp_path / "3" / "about" / "about.json").read_text())
    assert about["data_position"] == {"example": 12}
    assert about["leaves"]["params/image/blocks/0/kernel"] == {"dtype": "float32", "shape": [8, 3]}
    assert '"params/image/blocks/0/kernel"' in (tmp_path / "3" / "state" / "_METADATA").read_text()


def test_restores_8_to_1_to_8_devices(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = {"w": NamedSharding(mesh, PartitionSpec("data")), "b": NamedSharding(mesh, PartitionSpec())}
    split |= {"key": split["b"], "none": NamedSharding(mesh, PartitionSpec("data"))}
    one = dict.fromkeys(split, SingleDeviceSharding(jax.devices()[3]))
    values = {
        "w": jnp.arange(48.0).reshape(16, 3),
        "b": jnp.float32(2),
        "key": jax.random.key(5),
        "none": jnp.ones((8, 0)),
    }

    def placed(shardings: dict[str, Any]) -> dict[str, Any]:
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in values.items()}

    state = jax.device_put(values, split)
    for step, shardings in ((1, one), (2, split)):
        with Checkpointer(tmp_path) as checkpoints:
            if checkpoints.steps():
                checkpoints.restore(placed(shardings))
            checkpoints.save(step, state, {})
            checkpoints.wait()
            state = checkpoints.restore(placed(shardings)).state
        assert {name: x.sharding for name, x in state.items()} == shardings
        assert_equal(jax.device_get(state), jax.device_get(values))


def test_a_donated_step_does_not_reach_into_a_running_save(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    size = 1 << 20  # 4 MB: long enough to be still on its way when the next steps run
    state = jax.device_put(
        {"split": jnp.zeros(size), "everywhere": jnp.zeros(size)},
        {"split": NamedSharding(mesh, PartitionSpec("data")), "everywhere": NamedSharding(mesh, PartitionSpec())},
    )
    host = np.zeros(size, np.float32)
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path, keep_last=10) as checkpoints:
        for step in range(0, 15, 5):
            checkpoints.save(step, {"device": state, "host": host}, {})
            host += 5
            for _ in range(4):
                state = advance(state)
            last, state = state, advance(state)
            assert last["split"].is_deleted()
        checkpoints.wait()
        for step in range(0, 15, 5):
            restored = checkpoints.restore({"device": state, "host": host}, step).state
            for saved in jax.tree.leaves(restored):
                np.testing.assert_array_equal(saved, np.full(size, step, np.float32))


def test_a_donated_state_on_one_device_does_not_reach_into_a_running_save(tmp_path: Path) -> None:
    state = jnp.zeros(1 << 20)
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpointer(tmp_path, keep_last=10) as checkpoints:
        for step in range(0, 15, 5):
            checkpoints.save(step, {"w": state}, {})
            for _ in range(5):
                state = advance(state)
        checkpoints.wait()
        for step in range(0, 15, 5):
            np.testing.assert_array_equal(checkpoints.restore({"w": state}, step).state["w"], np.full(1 << 20, step))


def test_strict_restore_names_what_differs(tmp_path: Path) -> None:
    state = {"kept": jnp.ones(2), "dtype": jnp.ones(2), "shape": jnp.ones((2, 3)), "gone": jnp.ones(1), "kind": 3}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        wanted = {
            "kept": jnp.ones(2),
            "dtype": jnp.ones(2, jnp.bfloat16),
            "shape": jnp.ones((3, 2)),
            "new": {"layer": jnp.ones(1)},
            "kind": jnp.int32(3),
        }
        with pytest.raises(InputError) as caught:
            checkpoints.restore(wanted)
    message = str(caught.value)
    assert "\n" not in message
    assert "not in the checkpoint: new/layer" in message
    assert "only in the checkpoint: gone" in message
    assert "dtype (saved float32[2], expected bfloat16[2])" in message
    assert "shape (saved float32[2,3], expected float32[3,2])" in message
    assert "kind (saved int, expected int32[])" in message
    assert "kept" not in message


def test_a_state_without_the_loss_memory_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(1), "memory": None}, {})
        checkpoints.wait()
        with pytest.raises(InputError, match="not in the checkpoint: memory/log_partition"):
            checkpoints.restore({"w": jnp.ones(1), "memory": Memory(jnp.ones(2), {})})


def test_a_64_bit_target_is_not_cut_down_silently(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"n": np.int64(2**40)}, {})
        checkpoints.wait()
        assert checkpoints.restore({"n": np.int64(0)}).state["n"] == 2**40
        with pytest.raises(InputError, match="jax_enable_x64"):
            checkpoints.restore({"n": jax.ShapeDtypeStruct((), np.int64)})


def test_keep_last_and_keep_best_together(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: None, 5: float("nan"), 6: 0.3, 7: 0.4}
    save_steps(tmp_path, scores, keep_last=2, keep_best=1, best_metric="recall")
    reader = CheckpointReader(tmp_path, best_metric="recall")
    assert reader.steps() == [2, 6, 7]
    assert reader.best_step() == 2
    assert reader.latest_step() == 7
    assert CheckpointReader(tmp_path, best_metric="recall", best_mode="min").best_step() == 6
    assert not (tmp_path / "todelete").exists()


def test_the_best_survives_a_restart_and_a_better_one_replaces_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep_last": 1, "keep_best": 1, "best_metric": "recall", "best_mode": "min"}
    save_steps(tmp_path, {1: 0.1, 2: 0.5}, **options)
    with Checkpointer(tmp_path, **options) as checkpoints:
        checkpoints.restore(LIKE)
        checkpoints.save(3, {"w": jnp.zeros(3)}, {}, {"recall": 0.4})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]
        checkpoints.save(4, {"w": jnp.zeros(3)}, {}, {"recall": 0.1})
        checkpoints.wait()
        assert checkpoints.steps() == [4]


def test_without_a_metric_only_the_last_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: 0.9, 2: 0.8, 3: 0.7}, keep_last=2)
    assert CheckpointReader(tmp_path).steps() == [2, 3]
    assert CheckpointReader(tmp_path).best_step() is None


def test_saving_a_step_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, best_metric="recall") as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})
        checkpoints.save(1, {"w": jnp.ones(3)}, {}, {"recall": 0.5})
        checkpoints.wait()
        assert checkpoints.metrics(1) == {"recall": 0.5}
        assert checkpoints.restore(LIKE).state["w"].sum() == 3
    with Checkpointer(tmp_path, best_metric="recall") as checkpoints:
        checkpoints.restore(LIKE)
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})
        checkpoints.save(1, {"w": jnp.zeros(3)}, {}, {"recall": 0.5})
        checkpoints.wait()
        assert checkpoints.restore(LIKE).state["w"].sum() == 3


def test_going_on_from_an_earlier_step_removes_the_later_ones(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None, 2: None, 3: None})
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.restore(LIKE, step=1)
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(2, {"w": jnp.full(3, 20.0)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(LIKE).state["w"][0] == 20


@pytest.mark.parametrize("step", [1, 2])
def test_another_run_s_checkpoints_are_not_overwritten(tmp_path: Path, step: int) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(InputError, match="already holds step 2"):
        checkpoints.save(step, {"w": jnp.zeros(3)}, {})
    assert CheckpointReader(tmp_path).restore(LIKE).state["w"][0] == 2


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None})
    for leftover in ("2.orbax-checkpoint-tmp-17", "unfinished/2", "todelete/0"):
        (tmp_path / leftover / "state").mkdir(parents=True)
    assert CheckpointReader(tmp_path).steps() == [1]
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.restore(LIKE)
        checkpoints.save(2, {"w": jnp.zeros(3)}, {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "1", "2"]


def _data_file(step: Path) -> Path:
    return max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def _change(path: Path, change: Any) -> str:
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content)))
    return path.name


def _flip(content: bytearray) -> bytearray:
    content[len(content) // 2] ^= 4
    return content


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "about" / "about.json").unlink() or "about.json: is missing",
        lambda step: _change(step / "about" / "about.json", lambda content: content[:20]),
        lambda step: _change(step / "about" / "about.json", lambda content: content.replace(b"[3]", b"[4]")),
        lambda step: _change(step / "state" / "manifest.ocdbt", lambda content: b""),
        lambda step: _change(_data_file(step), lambda content: content[:7]) + ": has 7 bytes",
        lambda step: _change(_data_file(step), _flip) + ": its sha256",
        lambda step: _change(_data_file(step), lambda content: bytes(len(content))) + ": its sha256",
        lambda step: _data_file(step).unlink() or ": is missing",
        lambda step: (step / "manifest.json").unlink() or "manifest.json: is missing",
        lambda step: _change(step / "manifest.json", _flip),
    ],
    ids=[
        *("no about", "half an about", "other about", "empty Orbax manifest", "cut data", "flipped bit", "zeros"),
        *("no data", "no manifest", "other manifest"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, damage: Any) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    named = damage(tmp_path / "2")
    reader = CheckpointReader(tmp_path)
    with pytest.raises(InputError, match=r"checkpoint .*/2 is damaged: ") as caught:
        reader.restore(LIKE, step=2)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.warns(RunWarning) as warned:
        restored = reader.restore(LIKE)
    assert [str(warning.message) for warning in warned] == [f"{caught.value}; step 1 is taken instead"]
    assert (restored.step, restored.state["w"][0]) == (1, 1)


def test_a_run_goes_on_from_the_good_step_and_the_damaged_ones_go(tmp_path: Path) -> None:
    save_steps(tmp_path, {10: None, 20: None, 30: None}, keep_last=3)
    for step in (20, 30):
        _change(_data_file(tmp_path / str(step)), _flip)
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.warns(RunWarning) as warned:
            assert checkpoints.restore(LIKE).step == 10
        assert len(warned) == 2
        checkpoints.save(15, {"w": jnp.full(3, 15.0)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 15]


def test_where_all_are_damaged_nothing_is_restored(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    names = [_change(_data_file(tmp_path / step), _flip) for step in "12"]
    with pytest.raises(InputError, match=r"no checkpoint in .* is good") as caught:
        CheckpointReader(tmp_path).restore(LIKE)
    assert all(name in str(caught.value) for name in names)
    assert CheckpointReader(tmp_path).steps() == [1, 2]


def test_the_comparison_can_be_left_out(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None})
    (tmp_path / "1" / "manifest.json").unlink()
    assert CheckpointReader(tmp_path, verify="nothing").restore(LIKE).state["w"][0] == 1
    with pytest.raises(InputError, match="unknown verify 'off'"):
        CheckpointReader(tmp_path, verify="off")  # type: ignore[arg-type]


def test_the_manifest_says_what_wrote_it_and_the_configuration_must_be_that_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, config_hash="a" * 64) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)}, {})
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert (manifest["config"], manifest["jax"], manifest["step"]) == ("a" * 64, jax.__version__, 1)
    files = {path.relative_to(tmp_path / "1").as_posix() for path in (tmp_path / "1").rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files - {"manifest.json"}
    assert CheckpointReader(tmp_path).restore(LIKE).step == 1
    with pytest.raises(InputError, match=r"another configuration \(aaaaaaaaaaaa…, here it is bbbbbbbbbbbb…\)"):
        CheckpointReader(tmp_path, config_hash="b" * 64).restore(LIKE)


def test_a_checkpoint_from_before_the_manifests_is_read(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None})
    (tmp_path / "1" / "manifest.json").unlink()
    _change(tmp_path / "1" / "about" / "about.json", lambda content: content.replace(b'"format": 2', b'"format": 1'))
    assert CheckpointReader(tmp_path).restore(LIKE).state["w"][0] == 1


def test_a_part_is_read_by_its_path_whatever_the_rest_is(tmp_path: Path) -> None:
    state = make_state(1)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"example": 12})
    reader = CheckpointReader(tmp_path)
    step, params, position = reader.read("params/")
    assert (step, position, sorted(params)) == (
        3,
        {"example": 12},
        ["params/image/blocks/0/kernel", "params/text/bias"],
    )
    np.testing.assert_array_equal(params["params/image/blocks/0/kernel"], state.params["image"]["blocks"][0]["kernel"])
    assert isinstance(params["params/text/bias"], np.ndarray)
    assert params["params/text/bias"].dtype == jnp.bfloat16
    host = reader.read("host/").state
    assert_equal([host["host/keys"], host["host/python/3"]], [state.host["keys"], "warm"])
    with pytest.raises(InputError, match=r"nothing under 'parms/'; there: ema, host, key, memory, optimizer, params"):
        reader.read("parms/")


def test_a_directory_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with Checkpointer(tmp_path), pytest.raises(InputError, match=rf"in use by process {os.getpid()} on "):
        Checkpointer(tmp_path)
    with Checkpointer(tmp_path):
        pass


def test_a_directory_that_was_removed_and_made_anew_is_not_written_into(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Checkpointer(run) as old:
        old.save(1, {"w": jnp.ones(3)}, {})
        old.wait()
        shutil.rmtree(run)
        with Checkpointer(run) as new:
            (run / "unfinished" / "7").mkdir(parents=True)  # The new run is saving.
            with pytest.raises(InputError, match="was removed or replaced"):
                old.save(2, {"w": jnp.ones(3)}, {})
            assert new.steps() == []
            assert (run / "unfinished" / "7").exists()


def test_a_format_of_another_version_is_named(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None})
    file = tmp_path / "1" / "about" / "about.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 99'))
    (tmp_path / "1" / "manifest.json").unlink()
    with pytest.raises(InputError, match="has format 99, this version of repkit reads 1 and 2"):
        CheckpointReader(tmp_path).restore(LIKE)


def test_bad_directories_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"):
        Checkpointer(file)
    with pytest.raises(InputError, match="cannot write to checkpoint directory"):
        Checkpointer(file / "below")
    with pytest.raises(InputError, match="cannot write to checkpoint directory"):
        Checkpointer("/proc/checkpoints")
    with pytest.raises(InputError, match="no checkpoint in"):
        CheckpointReader(tmp_path / "none").restore(LIKE)
    assert not (tmp_path / "none").exists()


def test_a_missing_step_is_refused_and_the_others_named(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    with pytest.raises(InputError, match=r"no checkpoint of step 7 .* there: 1, 2"):
        CheckpointReader(tmp_path).restore(LIKE, step=7)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep_last"):
        Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(InputError, match="unknown best_mode 'maximum'"):
        Checkpointer(tmp_path, best_mode="maximum")  # type: ignore[arg-type]
    with Checkpointer(tmp_path, best_metric="recal") as checkpoints:
        with pytest.raises(InputError, match="unknown best_metric 'recal'; did you mean 'recall'"):
            checkpoints.save(1, {}, {}, {"recall": 1.0})
        with pytest.raises(InputError, match=r"model/fn is function"):
            checkpoints.save(1, {"model": {"fn": print_nothing}}, {})
        with pytest.raises(InputError, match="data position"):
            checkpoints.save(1, {"w": jnp.ones(1)}, {"position": object()})
    assert CheckpointReader(tmp_path).steps() == []


def print_nothing() -> None: ...


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Stands in for a full disk: the operating system refuses to write more into a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_failed_write_comes_out_and_the_next_save_succeeds(tmp_path: Path) -> None:
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with files_of_at_most(1 << 16), pytest.raises(SaveFailedError, match=r"step 2 .*\(File too large\).* step 1"):  # noqa: PT012
            checkpoints.save(2, state, {})
            checkpoints.wait()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "1"]
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_equal(checkpoints.restore(state).state, state)


def test_nothing_is_printed_in_a_fresh_process(tmp_path: Path) -> None:
    script = """
import sys
import jax.numpy as jnp
from repkit.train.checkpoint import Checkpointer
with Checkpointer(sys.argv[1], keep_last=1, best_metric="recall") as checkpoints:
    for step in range(3):
        checkpoints.save(step, {"w": jnp.ones(2)}, {}, {"recall": float(step == 0)})
    checkpoints.wait()
    checkpoints.restore({"w": jnp.ones(2)})
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout + done.stderr == ""
    assert CheckpointReader(tmp_path).steps() == [0, 2]
