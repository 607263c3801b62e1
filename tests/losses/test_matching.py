"""Hard negatives: the distribution that they are drawn from, and that blocks and devices do not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from repkit.checks import InputError
from repkit.losses import Blocks, hard_negatives

B, D = 24, 5
LABELS = np.arange(B, dtype=np.int32) % 20
WHERE = np.arange(B) % 7 != 3


def make_pair():
    rng = np.random.default_rng(0)
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, B, D)).astype(np.float32)]


def probabilities(pair):
    """Of text j for image i, in float64."""
    weights = np.exp(3.0 * pair[0].astype(np.float64) @ pair[1].T.astype(np.float64))
    weights *= (LABELS[:, None] != LABELS[None, :]) & WHERE[:, None] & WHERE[None, :]
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)


@functools.partial(jax.jit, static_argnames="form")
def draw(key, pair, form=Blocks()):
    return hard_negatives(*pair, logit_scale=3.0, labels=LABELS, where=WHERE, form=form, key=key)


def test_draws_follow_the_scores():
    """Over 4000 draws, every pair within 5 standard errors of its probability."""
    pair, count = make_pair(), 4000
    drawn = jax.device_get(jax.jit(jax.vmap(lambda key: draw(key, pair)))(jax.random.split(jax.random.key(1), count)))
    for indices, expected in ((drawn.text_of_image, probabilities(pair)), (drawn.image_of_text, None)):
        wanted = probabilities(pair[::-1]) if expected is None else expected
        for i in range(B):
            if not WHERE[i]:
                assert np.all(indices[:, i] == -1)
                continue
            share = np.bincount(indices[:, i], minlength=B) / count
            error = np.sqrt(wanted[i] * (1 - wanted[i]) / count)
            assert np.all(np.abs(share - wanted[i]) <= 5 * error + 1e-12)


@pytest.mark.slow
def test_blocks_and_devices_do_not_change_what_is_drawn():
    pair, key = make_pair(), jax.random.key(2)
    expected = jax.device_get(draw(key, pair))
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    axes = ("data", "fsdp")
    for form in (Blocks(5), Blocks(2, exchange="gather"), Blocks(2)):
        got = jax.device_get(draw(key, pair, form))
        np.testing.assert_array_equal(got.text_of_image, expected.text_of_image)
        np.testing.assert_array_equal(got.image_of_text, expected.image_of_text)

        def local(images, texts, labels, where, form=form):
            options = {"labels": labels, "where": where, "form": form, "key": key, "axis_name": axes}
            return hard_negatives(images, texts, logit_scale=3.0, **options)

        mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P(axes)))
        got = jax.device_get(mapped(*pair, LABELS, WHERE))
        np.testing.assert_array_equal(got.text_of_image, expected.text_of_image)
        np.testing.assert_array_equal(got.image_of_text, expected.image_of_text)


def test_a_row_without_negatives_has_none():
    pair = make_pair()
    drawn = hard_negatives(*pair, logit_scale=1.0, labels=jnp.zeros(B, jnp.int32), key=jax.random.key(0))
    assert np.all(np.asarray(drawn.text_of_image) == -1)


def test_the_plain_form_is_refused():
    with pytest.raises(InputError, match=r"expected form to be losses.Blocks"):
        hard_negatives(*make_pair(), logit_scale=1.0, form="plain", key=jax.random.key(0))
