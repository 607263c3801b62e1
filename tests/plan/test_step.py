"""Plans of a step: what its parts add up to, and messages for what cannot be planned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit import losses
from repkit.checks import InputError
from repkit.numerics import normalize, target_platform, tracing_for
from repkit.objective import Objective, Term
from repkit.plan.chips import CHIPS, topology
from repkit.plan.step import describe, largest_batch, plan_step
from repkit.train.config import TrainConfig, trace_update
from repkit.train.mesh import MeshConfig

OBJECTIVE = Objective(
    {"info_nce": Term(losses.info_nce, ("outputs.x", "outputs.y"), keywords={"logit_scale": "outputs.scale"})}
)


def init(key):
    return {"x": jax.random.normal(key, (32, 512)), "y": jnp.ones((32, 512)), "scale": jnp.ones(())}


def forward(params, batch, key):
    return {name: normalize(batch[name] @ params[name]) for name in "xy"} | {"scale": params["scale"]}


def trace(devices, batch_size, config=None):
    config = config or TrainConfig(batch_size=batch_size, mesh=MeshConfig(fsdp=2))
    batch = {name: np.zeros((batch_size, 32), np.float32) for name in "xy"} | {"where": np.ones(batch_size, bool)}
    return trace_update(config, init, forward, OBJECTIVE, batch, devices)


@pytest.fixture(scope="module")
def plan():
    return plan_step(trace, topology("h100-4"), 64)


@pytest.mark.slow
def test_a_plan_of_simulated_devices(plan):
    assert (plan.compiler, plan.devices, plan.batch_size) == ("CPU", 4, 64)
    # Parameters and both moments, each of two matrices split over fsdp; scalars and the key aside.
    assert plan.state_bytes == pytest.approx(3 * 2 * 4 * 32 * 512, rel=0.01)
    assert plan.batch_bytes == 16 * (2 * 4 * 32 + 1)
    assert plan.memory_bytes >= plan.state_bytes + plan.batch_bytes
    assert plan.fits
    # Two towers forward and the gradient of their matrices. Products of the pairs: one forward, three backward, and two
    # that only logits out of the usual range need, since of a choice the dearest counts.
    assert plan.flops == pytest.approx((2 * 2 * 2 * 64 * 32 * 512 + 6 * 2 * 64 * 64 * 512) / 4, rel=0.01)
    assert "collective-permute" in {exchange.operation for exchange in plan.exchanges}
    text = describe(plan, 1024)
    assert "an estimate from the chip's peak rates" in text
    assert "not those of the chip" in text
    assert "1,024 rows fit" in text


def made_up(rows, memory, **others):
    from repkit.plan.step import StepPlan

    values = {
        "topology": "v5e-4", "compiler": "TPU", "devices": 4, "batch_size": rows, "state_bytes": 10, "batch_bytes": 5,
        "temporary_bytes": 20, "memory_bytes": memory, "capacity": 1000.0, "flops": 1e12, "traffic": 1e9,
        "exchanges": (), "least_seconds": {"operations": 0.1, "network": 0.2},
        "most_seconds": {"operations": 0.3, "network": 0.2}, "peak_seconds": 0.05,
    }  # fmt: skip
    return StepPlan(**{**values, **others})


def test_the_largest_batch_follows_from_two_sizes():
    small, large = made_up(32, 200), made_up(64, 300)
    assert largest_batch(small, large, 8) == 288  # 64 + (1000 - 300) / (100 / 32)
    assert largest_batch(small, large, 64) == 256
    assert largest_batch(made_up(32, 2000), made_up(64, 3000), 8) == 0
    with pytest.raises(InputError, match="does not grow"):
        largest_batch(small, made_up(64, 200), 8)


def test_a_step_that_does_not_fit_says_so():
    plan = made_up(64, 2 * 2**30, capacity=2.0**30, temporary_bytes=None)
    assert not plan.fits
    assert "2.000 GiB of    1.000 GiB: DOES NOT FIT" in describe(plan)


def test_the_time_of_a_step_is_a_range():
    plan = made_up(64, 100)
    assert plan.estimated_seconds == (0.2, pytest.approx(0.5))
    text = describe(plan)
    assert "200.0 to 500.0 ms, an estimate of the TPU compiler's, by operation" in text
    assert "operations 100.0 to 300.0, network 200.0" in text
    assert "50.0 ms at the chip's peak rate, of which the step reaches 10 to 25 %" in text


def test_topologies():
    assert topology("v6e-16").shape == "v6e:4x4"
    assert topology("v4-8").devices == 4
    for chip in CHIPS.values():
        assert all(dataclasses.astuple(chip) if dataclasses.is_dataclass(chip) else chip[:4])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "such as v5e-256"),
        ("v5ee-16", "such as v5e-256"),
        ("h10-8", "did you mean 'h100'"),
        ("v5e-7", "there is no slice 'v5e-7'; there are v5e-1, v5e-4"),
        ("h100-0", "at least 1"),
    ],
)
def test_topologies_that_there_are_not(name, message):
    with pytest.raises(InputError, match=message):
        topology(name)


def test_too_few_simulated_devices_are_refused():
    with pytest.raises(InputError, match=r"h100-16 needs 16 simulated devices, .* has 8; .*count=16"):
        plan_step(trace, topology("h100-16"), 64)


def test_programs_are_traced_for_the_platform_that_they_are_compiled_for():
    assert target_platform() == "cpu"
    with tracing_for("tpu"):
        assert target_platform() == "tpu"
        text = str(jax.make_jaxpr(lambda x: losses.info_nce(x, x, logit_scale=1.0))(jnp.ones((4, 8), jnp.bfloat16)))
        # Operands of products stay as they are where that is fast.
        assert "dot_general" in text
        assert "preferred_element_type=float32" in text
    assert target_platform() == "cpu"
