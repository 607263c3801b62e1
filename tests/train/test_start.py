"""Starting from a trained model: common parts are taken whole or not at all, and what does not fit is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.train.start import started_from

SAVED = {
    "ema/tower/0/kernel": np.full((2, 2), 3.0, np.float32),
    "ema/tower/0/bias": np.full(2, 4.0, np.float32),
    "ema/head/kernel": np.ones((2, 5), np.float32),
    "ema/left_out/kernel": np.ones(1, np.float32),
}


def init(key):
    tower = {"kernel": jax.random.normal(key, (2, 2), jnp.float32), "bias": jnp.zeros(2)}
    return {"tower": [tower], "head": {"kernel": jnp.zeros((2, 3))}, "new": jnp.full(1, 7.0)}


def test_common_parts_are_taken_and_the_others_are_new():
    started = jax.jit(started_from(SAVED, init, origin="runs/a", replaced=["head"]))(jax.random.key(0))
    np.testing.assert_array_equal(started["tower"][0]["kernel"], SAVED["ema/tower/0/kernel"])
    np.testing.assert_array_equal(started["tower"][0]["bias"], SAVED["ema/tower/0/bias"])
    assert started["head"]["kernel"].shape == (2, 3)
    assert started["new"] == 7
    assert "left_out" not in started


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"runs/a does not fit: head/kernel \(there float32\[2,5\], here float32\[2,3\]\)"),
        (
            {"ema/tower/0/bias": np.zeros(2, np.float16)},
            r"head/kernel .*, tower/0/bias \(there float16\[2\], here float32\[2\]\)",
        ),
        ({"ema/tower/1/bias": np.zeros(2, np.float32)}, r"tower/1/bias \(there float32\[2\], here none\)"),
        ({"ema/tower/0/bias": None}, r"tower/0/bias \(there none, here float32\[2\]\)"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    saved = {path: leaf for path, leaf in {**SAVED, **changes}.items() if leaf is not None}
    with pytest.raises(InputError, match=message):
        started_from(saved, init, origin="runs/a")


def test_models_without_a_common_part_are_refused():
    with pytest.raises(InputError, match="runs/a and the model have no part in common; there: other; here: head, new"):
        started_from({"params/other": np.ones(1)}, init, origin="runs/a")
