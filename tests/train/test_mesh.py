"""Meshes and where the leaves of a state go."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from repkit.checks import InputError
from repkit.losses import init_memory
from repkit.train.mesh import MeshConfig, batch_devices, batch_share, make_mesh, put_batch, state_shardings


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (None, {"data": 8}),
        ({"data": -1, "tensor": 2}, {"data": 4, "tensor": 2}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_mesh_sizes(axes, expected):
    mesh = make_mesh(axes)
    assert dict(mesh.shape) == expected
    assert batch_devices(mesh) == 8 // expected.get("tensor", 1)


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": -1, "tensor": -1}, {"data": -1, "tensor": 3}, {"data": 0}])
def test_mesh_refuses_sizes_that_do_not_fit(axes):
    with pytest.raises(InputError, match="mesh axes"):
        make_mesh(axes)


def test_a_rule_places_a_parameter_and_everything_that_follows_it():
    params = {"mlp": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)}}
    state = {"params": params, "optimizer_state": optax.adam(1.0).init(params), "ema": params}
    shardings = state_shardings(state, make_mesh({"data": 4, "tensor": 2}), [("mlp/kernel", P(None, "tensor"))])
    for tree in (shardings["params"], shardings["optimizer_state"][0].mu, shardings["ema"]):
        assert tree["mlp"]["kernel"].spec == P(None, "tensor")
        assert tree["mlp"]["bias"].spec == P()
    assert shardings["optimizer_state"][0].count.spec == P()


def test_large_leaves_without_a_rule_are_split_over_fsdp():
    params = {"table": jnp.zeros((500, 256)), "odd": jnp.zeros((257, 257)), "small": jnp.zeros((8, 8))}
    memory = init_memory(64)
    state = {"params": params, "ema": params, "memories": {"gamma": memory}, "step": jnp.zeros(())}
    mesh = MeshConfig(fsdp=4).make()
    shardings = state_shardings(state, mesh, [("ema/table", P())])
    assert shardings["params"]["table"].spec == P("fsdp")
    assert shardings["ema"]["table"].spec == P()
    assert shardings["params"]["odd"].spec == shardings["params"]["small"].spec == shardings["step"].spec == P()
    assert shardings["memories"]["gamma"].visited.spec == P(("data", "fsdp"))


def test_no_device_ever_holds_the_whole_of_a_new_state():
    shape = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    mesh = MeshConfig(fsdp=4, tensor=2).make()
    shardings = state_shardings({"kernel": shape}, mesh, [("kernel", P("fsdp", "tensor"))])
    init = jax.jit(lambda key: {"kernel": jax.random.normal(key, shape.shape)}, out_shardings=shardings)
    memory = init.lower(jax.random.key(0)).compile().memory_analysis()
    whole = 4 * 256 * 128
    assert memory.output_size_in_bytes <= whole / 8 + 64
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 1.5


@dataclass(frozen=True)
class _Device:
    """A device of a process that need not be there."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def _mesh_of_processes(axes, processes):
    devices = np.empty(len(processes), object)
    devices[:] = [_Device(index, process) for index, process in enumerate(processes)]
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


@pytest.mark.parametrize(
    ("axes", "processes", "expected"),
    [
        ({"data": 8}, [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        ({"data": 2, "fsdp": 4}, [0, 0, 1, 1, 2, 2, 3, 3], [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 4, "tensor": 2}, [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        ({"data": 1, "tensor": 8}, [0, 0, 0, 0, 1, 1, 1, 1], [(0, 1), (0, 1)]),
        ({"data": 2, "tensor": 4}, [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        # Rows need not follow one another.
        ({"data": 8}, [0, 1, 0, 1, 0, 1, 0, 1], [(0, 2), (1, 2)]),
    ],
)
def test_the_rows_that_a_process_feeds_follow_from_the_mesh(axes, processes, expected):
    mesh = _mesh_of_processes(axes, processes)
    shares = [batch_share(mesh, process) for process in range(len(expected))]
    assert [(share.index, share.count) for share in shares] == expected


def test_a_mesh_that_cuts_through_the_rows_of_a_process_is_refused():
    with pytest.raises(InputError, match="cuts through the rows of a process"):
        batch_share(_mesh_of_processes({"data": 4, "tensor": 2}, [0, 0, 0, 1, 1, 1, 2, 2]))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("nothing/here", P("tensor")), "match no leaf of the state: nothing/here"),
        (("bias", P(None, "tensor")), "has more axes than 'bias'"),
        (("kernel", P("tensor")), "splits 7 in 'kernel'"),
        (("kernel", P("tensr")), "unknown mesh axis .* did you mean 'tensor'"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, message):
    state = {"kernel": jnp.zeros((7, 16)), "bias": jnp.zeros(16)}
    with pytest.raises(InputError, match=message):
        state_shardings(state, make_mesh({"data": 4, "tensor": 2}), [rule])


def test_batches_are_split_over_the_batch_axes():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = put_batch({"x": jnp.arange(8.0).reshape(8, 1)}, mesh)["x"]
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 1)}
    assert jnp.array_equal(jax.device_get(rows)[:, 0], jnp.arange(8.0))
