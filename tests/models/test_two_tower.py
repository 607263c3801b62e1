import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.models import two_tower


def only(batch, *names):
    return {name: batch[name] for name in names}


@pytest.fixture
def tiny(tiny_config, tiny_params, compiled):
    return compiled(tiny_config).forward, tiny_params


def test_every_view_becomes_unit_vectors(tiny_config, tiny_batch, compiled):
    model = compiled(dataclasses.replace(tiny_config, independent=True))
    outputs = model.forward(model.init(jax.random.key(1)), tiny_batch, None)
    assert set(outputs) == {"image", "text", "augmented_image", "augmented_text", "logit_scale"}
    for view in ("image", "text", "augmented_image", "augmented_text"):
        assert set(outputs[view]) == {"embeds", "independent"}
        for values in outputs[view].values():
            assert values.shape == (3, 8)
            assert values.dtype == jnp.float32
            np.testing.assert_allclose(jnp.linalg.norm(values, axis=-1), 1, atol=1e-6)
        assert np.abs(outputs[view]["embeds"] - outputs[view]["independent"]).max() > 0.1


def test_a_view_goes_through_the_encoder_of_its_modality(tiny, tiny_batch):
    forward, params = tiny
    twice = tiny_batch | {f"augmented_{name}": tiny_batch[name] for name in ("image", "token_ids", "token_mask")}
    outputs = forward(params, twice, None)
    for modality in ("image", "text"):
        np.testing.assert_array_equal(outputs[modality]["embeds"], outputs[f"augmented_{modality}"]["embeds"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("image",), {"image"}),
        (("token_ids", "token_mask"), {"text"}),
        (("augmented_image",), {"augmented_image"}),
        (("image", "token_ids", "token_mask"), {"image", "text"}),
    ],
)
def test_it_embeds_what_is_there_as_it_does_in_company(tiny, tiny_batch, names, expected):
    forward, params = tiny
    outputs, everything = forward(params, only(tiny_batch, *names), None), forward(params, tiny_batch, None)
    assert set(outputs) == expected | {"logit_scale"}
    for view in expected:
        np.testing.assert_allclose(outputs[view]["embeds"], everything[view]["embeds"], atol=1e-6)


def test_a_row_does_not_depend_on_the_other_rows(tiny, tiny_batch):
    forward, params = tiny
    batch = only(tiny_batch, "image", "token_ids", "token_mask")
    whole = forward(params, batch, None)
    row = forward(params, {name: values[1:2] for name, values in batch.items()}, None)
    for view in ("image", "text"):
        np.testing.assert_allclose(whole[view]["embeds"][1:2], row[view]["embeds"], atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("where",), "must have image or token_ids, got only: where"),
        (("token_ids",), "the batch lacks token_mask; it has token_ids"),
        (("image", "augmented_token_ids"), "the batch lacks augmented_token_mask"),
    ],
)
def test_a_batch_that_lacks_something_is_refused(tiny, tiny_batch, names, message):
    forward, params = tiny
    with pytest.raises(InputError, match=message):
        forward(params, only(tiny_batch, *names), None)


def test_views_of_different_shapes_are_refused(tiny, tiny_batch):
    forward, params = tiny
    shorter = tiny_batch | {"augmented_token_ids": tiny_batch["augmented_token_ids"][:, :4]}
    with pytest.raises(InputError, match="token_ids and augmented_token_ids must have one shape"):
        forward(params, shorter, None)


def test_gradients_flow_through_augmented_views(tiny, tiny_batch):
    forward, params = tiny
    images = only(tiny_batch, "augmented_image")
    differentiate = jax.jit(jax.grad(lambda params: forward(params, images, None)["augmented_image"]["embeds"].sum()))
    gradient = differentiate(params)
    assert np.abs(gradient["image_projection"]["kernel"]).max() > 0
    assert np.abs(gradient["image"]["patch_embedding"]["kernel"]).max() > 0


def test_views_of_one_pass_drop_different_values(tiny_config, tiny_params, tiny_batch, compiled):
    config = dataclasses.replace(tiny_config, image=dataclasses.replace(tiny_config.image, dropout=0.5))
    batch = {"image": tiny_batch["image"], "augmented_image": tiny_batch["image"]}
    outputs = compiled(config).forward(tiny_params, batch, jax.random.key(0))
    assert np.abs(outputs["image"]["embeds"] - outputs["augmented_image"]["embeds"]).max() > 0.01


def test_the_logit_scale_starts_as_configured_and_is_bounded(tiny, tiny_batch):
    forward, params = tiny
    image = only(tiny_batch, "image")

    @jax.jit
    def scale(log_scale):
        return forward(params | {"log_logit_scale": log_scale}, image, None)["logit_scale"]

    outputs = forward(params, image, None)
    assert outputs["logit_scale"].dtype == jnp.float32
    assert outputs["logit_scale"].shape == ()
    np.testing.assert_allclose(outputs["logit_scale"], 1 / 0.07, rtol=1e-6)
    np.testing.assert_allclose(scale(jnp.float32(math.log(99.0))), 99.0, rtol=1e-5)
    np.testing.assert_allclose(scale(jnp.float32(9.0)), 100.0, rtol=1e-5)
    # Beyond the bound the gradient is that at the bound, so that the scale can come back.
    np.testing.assert_allclose(jax.grad(scale)(jnp.float32(9.0)), 100.0, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(scale)(jnp.float32(2.0)), math.exp(2.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"initial_logit_scale": 0.0}, "initial_logit_scale must be positive"),
        ({"initial_logit_scale": 200.0}, "at most max_logit_scale, got 200.0 and 100.0"),
    ],
)
def test_impossible_configurations_are_refused(tiny_config, changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny_config, **changes)


def test_bfloat16_embeddings_are_close_to_float32(tiny_config, tiny_params, tiny_batch, compiled):
    half = dataclasses.replace(
        tiny_config,
        image=dataclasses.replace(tiny_config.image, dtype="bfloat16"),
        text=dataclasses.replace(tiny_config.text, dtype="bfloat16"),
    )
    single, low = (compiled(config).forward(tiny_params, tiny_batch, None) for config in (tiny_config, half))
    for view in ("image", "text"):
        assert low[view]["embeds"].dtype == jnp.float32
        assert (low[view]["embeds"] * single[view]["embeds"]).sum(-1).min() > 0.999


def test_the_demo_model_has_215_thousand_parameters(demo_config):
    params = jax.eval_shape(two_tower(demo_config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(215_000, rel=0.02)
