"""Meshes and where the leaves of a state go."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from repkit.checks import InputError
from repkit.train.mesh import batch_devices, make_mesh, put_batch, state_shardings


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


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("nothing/here", P("tensor")), "match no leaf of the state: nothing/here"),
        (("bias", P(None, "tensor")), "has more axes than 'bias'"),
        (("kernel", P("tensor")), "splits 7 in 'kernel'"),
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
