import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repkit.checks import InputError
from repkit.models import CLIP_TEXT_B, VIT_B_16, TextConfig, TextTransformer, VisionConfig, VisionTransformer

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)[:, :, :8]
VISION = VisionConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2)
TEXT = TextConfig(vocabulary_size=12, max_length=8, width=16, depth=2, heads=2)
TOKEN_IDS = RANDOM.integers(0, 12, (3, 5), dtype=np.int32)
TOKEN_MASK = np.arange(5) < np.array([5, 1, 3])[:, None]


@functools.cache
def encoder(base, **changes):
    """The encoder's parameters, and the encoder under jit as a function of them and of its input."""
    make = VisionTransformer if base is VISION else TextTransformer
    structure, params = nnx.split(make(dataclasses.replace(base, **changes), rngs=nnx.Rngs(0)))
    return params, jax.jit(lambda params, *inputs, key=None: nnx.merge(structure, params)(*inputs, key=key))


def encode(base, *inputs, key=None, **changes):
    params, run = encoder(base, **changes)
    return run(params, *inputs, key=key)


@pytest.mark.parametrize(("pooling", "tokens"), [("mean", 4), ("cls", 5)])
def test_an_image_becomes_one_token_for_each_patch(pooling, tokens):
    encoded = encode(VISION, IMAGE, pooling=pooling)
    assert encoded.tokens.shape == (3, tokens, 16)
    assert encoded.pooled.shape == (3, 16)
    expected = encoded.tokens.mean(1) if pooling == "mean" else encoded.tokens[:, 0]
    np.testing.assert_allclose(encoded.pooled, expected, atol=1e-6)


def test_patches_are_squares_of_pixels_scaled_to_one():
    module = VisionTransformer(VISION, rngs=nnx.Rngs(0))
    seen = []
    module.patch_embedding = lambda pixels: seen.append(pixels) or jnp.zeros((*pixels.shape[:2], 16))
    module(IMAGE)
    (pixels,) = seen
    expected = np.stack([IMAGE[:, r : r + 4, c : c + 4].reshape(3, 48) for r in (0, 4) for c in (0, 4)], 1)
    np.testing.assert_allclose(pixels, expected / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 8, 8, 3), np.float32), "float32"),
        (np.zeros((3, 8, 9, 3), np.uint8), r"\[3, 8, 9, 3\]"),
        (np.zeros((3, 8, 8, 1), np.uint8), r"uint8 of shape \[b 8 8 3\]"),
    ],
)
def test_images_of_another_kind_are_refused(image, message):
    with pytest.raises(InputError, match=message):
        encode(VISION, image)


@pytest.mark.parametrize(("pooling", "causal"), [("mean", False), ("eos", True), ("eos", False), ("cls", False)])
def test_padding_changes_nothing(pooling, causal):
    changes = {"pooling": pooling, "causal": causal}
    short = encode(TEXT, TOKEN_IDS, TOKEN_MASK, **changes)
    padding = ((0, 0), (0, 3))
    longer = encode(TEXT, np.pad(TOKEN_IDS, padding, constant_values=7), np.pad(TOKEN_MASK, padding), **changes)
    other = encode(TEXT, np.where(TOKEN_MASK, TOKEN_IDS, 11), TOKEN_MASK, **changes)
    np.testing.assert_allclose(short.pooled, longer.pooled, atol=1e-5)
    np.testing.assert_allclose(short.pooled, other.pooled, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(short.tokens)[TOKEN_MASK], np.asarray(longer.tokens[:, :5])[TOKEN_MASK], atol=1e-5
    )


def test_pooling_takes_the_tokens_it_is_named_after():
    last = [4, 0, 2]
    mean, eos, cls = (encode(TEXT, TOKEN_IDS, TOKEN_MASK, pooling=pooling) for pooling in ("mean", "eos", "cls"))
    for row in range(3):
        np.testing.assert_allclose(mean.pooled[row], mean.tokens[row, : last[row] + 1].mean(0), atol=1e-6)
        np.testing.assert_allclose(eos.pooled[row], eos.tokens[row, last[row]], atol=1e-6)
        np.testing.assert_allclose(cls.pooled[row], cls.tokens[row, 0], atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "eos", "cls"])
def test_a_text_without_tokens_is_zero_with_finite_gradient(pooling):
    params, run = encoder(TEXT, pooling=pooling)
    nothing = np.zeros_like(TOKEN_MASK)
    total, gradient = jax.jit(jax.value_and_grad(lambda params: run(params, TOKEN_IDS, nothing).pooled.sum()))(params)
    assert total == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_causal_token_does_not_see_what_follows():
    everything = np.ones_like(TOKEN_MASK)
    changed = TOKEN_IDS.copy()
    changed[:, 3:] = (changed[:, 3:] + 1) % 12
    before, after = (encode(TEXT, ids, everything, causal=True).tokens for ids in (TOKEN_IDS, changed))
    np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-6)
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 1e-2
    assert np.abs(encode(TEXT, TOKEN_IDS, everything).tokens[:, 0] - before[:, 0]).max() > 1e-2


def test_word_order_matters():
    swapped = TOKEN_IDS[:, [1, 0, 2, 3, 4]]
    everything = np.ones_like(TOKEN_MASK)
    one, other = (encode(TEXT, ids, everything).pooled for ids in (TOKEN_IDS, swapped))
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize(
    ("token_ids", "token_mask", "message"),
    [
        (np.zeros((2, 9), np.int32), np.ones((2, 9), bool), "at most max_length=8 tokens, got 9"),
        (np.zeros((2, 5), np.int32), np.ones((2, 4), bool), r"got \[2, 5\] and \[2, 4\]"),
    ],
)
def test_texts_of_a_wrong_shape_are_refused(token_ids, token_mask, message):
    with pytest.raises(InputError, match=message):
        encode(TEXT, token_ids, token_mask)


def test_an_id_outside_the_vocabulary_is_noticed():
    token_ids = TOKEN_IDS.copy()
    token_ids[0, 0] = 12
    pooled = encode(TEXT, token_ids, TOKEN_MASK).pooled
    assert np.isnan(pooled[0]).all()
    assert np.isfinite(pooled[1:]).all()


def test_bfloat16_is_close_to_float32():
    encoded = {dtype: encode(TEXT, TOKEN_IDS, TOKEN_MASK, dtype=dtype) for dtype in ("float32", "bfloat16")}
    assert encoded["bfloat16"].tokens.dtype == jnp.bfloat16
    assert encoded["bfloat16"].pooled.dtype == jnp.float32
    difference = encoded["bfloat16"].pooled - encoded["float32"].pooled
    assert 0 < np.linalg.norm(difference) / np.linalg.norm(encoded["float32"].pooled) < 0.02


def test_remat_gives_equal_gradients_and_keeps_less():
    def gradient_and_residuals(remat):
        params, run = encoder(TEXT, remat=remat, dropout=0.1)

        def total(params):
            return (run(params, TOKEN_IDS, TOKEN_MASK, key=jax.random.key(0)).pooled ** 3).sum()

        _, pull_back = jax.eval_shape(lambda params: jax.vjp(total, params), params)
        return jax.jit(jax.grad(total))(params), sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    (plain, kept), (recomputed, kept_by_remat) = gradient_and_residuals(False), gradient_and_residuals(True)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6 * size), plain, recomputed)
    assert kept_by_remat < 0.6 * kept


def test_dropout_acts_only_with_a_key_and_repeats_with_the_same():
    evaluated = encode(TEXT, TOKEN_IDS, TOKEN_MASK, dropout=0.3).pooled
    np.testing.assert_array_equal(evaluated, encode(TEXT, TOKEN_IDS, TOKEN_MASK).pooled)
    one, again, other = (
        encode(TEXT, TOKEN_IDS, TOKEN_MASK, dropout=0.3, key=jax.random.key(seed)).pooled for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - evaluated).max() > 1e-2
    assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize(
    ("config", "make"), [(VIT_B_16, VisionTransformer), (CLIP_TEXT_B, TextTransformer)], ids=["image", "text"]
)
def test_presets_have_the_published_sizes(config, make):
    published = {VIT_B_16: 85_798_656, CLIP_TEXT_B: 63_165_952}
    module = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module))) == published[config]


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (VISION, {"width": 15}, "width must be a multiple of heads, got width=15, heads=2"),
        (VISION, {"patch_size": 3}, "image_size must be a multiple of patch_size, got image_size=8, patch_size=3"),
        (VISION, {"depth": 0}, "depth must be at least 1, got 0"),
        (VISION, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (VISION, {"dtype": "float16"}, "unknown dtype 'float16'.*bfloat16"),
        (VISION, {"pooling": "eos"}, "unknown pooling 'eos'.*cls, mean"),
        (TEXT, {"vocabulary_size": 0}, "vocabulary_size must be at least 1, got 0"),
        (TEXT, {"pooling": "max"}, "unknown pooling 'max'"),
        (TEXT, {"pooling": "cls", "causal": True}, "use 'eos'"),
    ],
)
def test_impossible_configurations_are_refused(base, changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(base, **changes)
