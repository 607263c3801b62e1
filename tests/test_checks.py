"""The messages of argument checks: what was expected, what came, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError, require_arrays, require_choice, require_key, require_range, unknown_name


def message_of(function, *arguments, **keywords) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


def test_unknown_names_offer_the_nearest_only_if_one_is_near():
    assert "did you mean 'info_nce'" in str(unknown_name("loss", "infonce", ["info_nce", "bridge"]))
    assert "did you mean" not in str(unknown_name("loss", "zzz", ["info_nce", "bridge"]))
    assert "Valid: both, neither" in message_of(require_choice, "mode", "bath", ["neither", "both"])


def test_matching_arrays_pass():
    require_arrays(
        "f",
        {
            "x": (np.ones((3, 2)), "float b d"),
            "y": (jnp.ones((3, 2), jnp.bfloat16), "float b d"),
            "ids": (np.arange(3), "int b"),
            "mask": (np.ones(3, bool), "bool b"),
            "missing": (None, "float b"),
            "scale": (2, "number"),
            "traced": (jnp.float32(2), "number"),
        },
    )


@pytest.mark.parametrize(
    ("value", "specification", "message"),
    [
        (np.ones((4, 2)), "float b d", "expected b = 3, as in x, got b = 4 in y"),
        (np.ones((3, 5)), "float b d", "expected d = 2, as in x, got d = 5 in y"),
        (np.ones(3), "float b d", "expected y to have 2 axes, got 1"),
        (np.ones(3, int), "bool b", "expected y to hold bool values, got int64"),
        (np.ones(3), "int b", "expected y to hold int values, got float64"),
        ([[1.0, 2.0]], "float b d", "expected y to be an array, got list"),
        (True, "number", "expected y to be an array, got bool"),
        (1.0, "float", "expected y to be an array, got float"),
    ],
)
def test_arrays_that_do_not_fit(value, specification, message):
    text = message_of(require_arrays, "f", {"x": (np.ones((3, 2)), "float b d"), "y": (value, specification)})
    assert text.startswith(f"f: {message}. Expected x: float[b, d], y: ")
    assert "; got x: float64[3, 2], y: " in text


def test_keys():
    assert require_key("f", jax.random.key(0), "drawing") is not None
    assert "f: drawing needs a random key; pass key=" in message_of(require_key, "f", None, "drawing")
    assert "got uint32[2]" in message_of(require_key, "f", np.zeros(2, np.uint32), "drawing")
    assert "got key<fry>[2]" in message_of(require_key, "f", jax.random.split(jax.random.key(0)), "drawing")


def test_ranges_of_python_numbers():
    require_range("f", "x", 1, above=0, at_most=1)
    require_range("f", "x", 0.0, at_least=0)
    require_range("f", "x", jnp.float32(5), at_most=1)
    assert message_of(require_range, "f", "x", 0, above=0, at_most=1) == "f: expected x > 0 and <= 1, got 0"
    assert message_of(require_range, "f", "x", -1.0, at_least=0) == "f: expected x >= 0, got -1.0"
    assert "got nan" in message_of(require_range, "f", "x", float("nan"), at_least=0)
