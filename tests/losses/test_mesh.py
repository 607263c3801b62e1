"""over_mesh: what it refuses. That its values and gradients are right is tested for every loss in test_contract.py."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from repkit.checks import InputError
from repkit.losses import info_nce, over_mesh


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_an_axis_that_is_not_there_is_refused(mesh):
    with pytest.raises(InputError, match="did you mean 'data'"):
        over_mesh(info_nce, mesh, "dta")


def test_a_function_without_axis_name_is_refused(mesh):
    with pytest.raises(InputError, match="takes no axis_name"):
        over_mesh(lambda x: x, mesh)


@pytest.mark.parametrize("loss", [info_nce, functools.partial(info_nce, direction="image_to_text")])
def test_rows_that_do_not_divide_are_refused(mesh, loss):
    embeds = jnp.ones((6, 2))
    with pytest.raises(InputError, match="6 rows cannot be split over 4 devices"):
        over_mesh(loss, mesh)(embeds, embeds, logit_scale=1.0)


def test_an_axis_name_is_refused(mesh):
    with pytest.raises(InputError, match="axis_name must be None"):
        over_mesh(info_nce, mesh)(jnp.ones((8, 2)), jnp.ones((8, 2)), logit_scale=1.0, axis_name="data")


def test_rows_come_back_split_over_the_data_axis_alone(mesh):
    embeds = jnp.eye(8)
    split = jax.jit(functools.partial(over_mesh(info_nce, mesh), logit_scale=2.0, reduction="none"))
    rows = split(embeds, embeds)
    assert rows.sharding.spec == jax.sharding.PartitionSpec("data")
    assert jnp.allclose(rows, jnp.log1p(7 * jnp.exp(-2.0)))
