"""Settings that every test runs under; set before jax is imported."""

import os

from repkit.simulation import simulated_devices

# Set before JAX is imported, below. The parity tests place one program on 8 devices; all other tests use the first.
os.environ.update(simulated_devices(8) | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")})

import numpy as np
import pytest

from experiments.recipe_runs import compile_quickly

# Most of the tests' time is compilation, and a third of that is LLVM's optimisation of small programs.
compile_quickly()


@pytest.fixture(autouse=True)
def same_draws_in_any_order(request):
    """A test that draws from its module's generator draws the same whichever tests ran before it in its process."""
    generator = getattr(request.module, "RANDOM", None)
    if generator is not None:
        generator.bit_generator.state = np.random.default_rng(0).bit_generator.state


def pytest_collection_modifyitems(items):
    """Tests of one loss's case follow one another, so that one worker compiles its programs and reuses them."""
    places = [i for i, item in enumerate(items) if item.path.name == "test_contract.py"]
    contract = [items[i] for i in places]

    def case(item):
        return item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""

    for i, item in zip(places, sorted(contract, key=case), strict=True):
        items[i] = item
