"""One gradient of every loss, however a step is placed: devices, mesh axes, `pmap`, exchange of rows, micro-batches.

Each program compares all losses at once, whose towers are their own.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from repkit import losses
from repkit.train.mesh import MeshConfig, batch_axes
from repkit.train.state import init_state
from repkit.train.step import PMAP_AXIS, jit_placement, make_update, pmap_placement
from tests.reference import every_loss

SGD = optax.sgd(1.0)  # the gradient is read off an update at rate 1
MASKS = ("even", "uneven")
FAST = ("global_contrastive",)  # it is between all rows, and keeps a memory


class Way(NamedTuple):
    """One way of placing a step.

    Attributes:
        mesh: sizes of the axes but `data`; None for `pmap`.
        exchange: how losses that are split over the mesh exchange rows; None leaves the loss to the compiler.
        micro_batches: parts in which the rows go through the model.
    """

    mesh: dict[str, int] | None
    exchange: losses.form.Exchange | None = None
    micro_batches: int = 1


WAYS = {
    "jit, data": Way({}),
    "jit, data and fsdp": Way({"fsdp": 2}),
    "jit, data and tensor": Way({"tensor": 2}),
    "jit, fsdp and tensor, ring": Way({"fsdp": 2, "tensor": 2}, "ring"),
    "pmap": Way(None),
    "ring": Way({}, "ring"),
    "gather": Way({}, "gather"),
    "2 micro-batches": Way({}, "ring", 2),
    "8 micro-batches": Way({}, "ring", 8),
    "8 micro-batches, pmap": Way(None, None, 8),
    "2 micro-batches, fsdp and tensor": Way({"fsdp": 2, "tensor": 2}, "ring", 2),
}
RULES = (
    ("/(image|text|maps|query|key|states)$", P("fsdp", "tensor")),
    ("/(image|text)_independent$", P("tensor", "fsdp")),
)


def losses_and_gradients(way: Way, devices: int, names: Any) -> dict[str, Any]:
    """By mask and by loss: the value and the gradient of the loss's own towers."""
    form = None if way.exchange is None else losses.Blocks(exchange=way.exchange)
    objective, init = every_loss.objective(names, form), functools.partial(every_loss.init, names)

    def make_state(key):
        return init_state(init, SGD, objective, key=key)

    make = functools.partial(make_update, every_loss.forward, optimizer=SGD, micro_batches=way.micro_batches)
    if way.mesh is None:
        update = make(objective=objective, axis_name=PMAP_AXIS)
        placement = pmap_placement(update, make_state, jax.devices()[:devices])
    else:
        mesh = MeshConfig(**way.mesh).make(jax.devices()[:devices])
        placed = objective if way.exchange is None else objective.over_mesh(mesh, batch_axes(mesh))
        placement = jit_placement(make(objective=placed), make_state, mesh, rules=RULES)
    found = {}
    for mask in MASKS:
        state = placement.init(jax.random.key(1))
        before = jax.device_get(placement.get_state(state).params)
        state, metrics = placement.update(state, placement.put_batch(every_loss.batch(mask)))
        after, metrics = jax.device_get((placement.get_state(state).params, metrics))
        found[mask] = {name: (metrics[name], jax.tree.map(np.subtract, before[name], after[name])) for name in before}
    return found


@functools.cache
def expected(names: tuple[str, ...]) -> dict[str, Any]:
    """All of it on one device."""
    return losses_and_gradients(Way({}), 1, names)


def assert_equal(found: dict[str, Any], names: tuple[str, ...]) -> None:
    for mask in MASKS:
        for name, (value, gradient) in expected(names)[mask].items():
            norm = optax.tree.norm(gradient)
            assert norm > 1e-4, f"{name} has no gradient to compare"
            np.testing.assert_allclose(found[mask][name][0], value, rtol=1e-4, atol=1e-6, err_msg=f"{name}, {mask}")
            error = optax.tree.norm(jax.tree.map(np.subtract, found[mask][name][1], gradient)) / norm
            assert error < 1e-5, f"{name} with an {mask} mask: the gradient is off by {error:.1e}"


@pytest.mark.parametrize(
    "devices",
    [*(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 2, 4)), pytest.param(8, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("way", WAYS)
def test_every_loss_has_one_gradient(way, devices):
    needed = np.prod(list((WAYS[way].mesh or {}).values()))
    if devices < needed:
        pytest.skip(f"the mesh has {needed} devices at least")
    names = tuple(every_loss.TERMS)
    assert_equal(losses_and_gradients(WAYS[way], devices, names), names)


@pytest.mark.slow
def test_a_loss_with_a_memory_has_one_gradient():
    assert_equal(losses_and_gradients(WAYS["2 micro-batches, fsdp and tensor"], 8, FAST), FAST)


def test_no_loss_is_left_out():
    tested = {term.loss.__name__ for term in every_loss.TERMS.values()}
    others = {"hard_negatives", "init_memory", "init_queue", "over_mesh", "sample_rates"}
    functions = {name for name in losses.__all__ if name[0].islower()}
    assert functions - tested == others
