import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repkit.checks import InputError
from repkit.models import (
    Capture,
    SequenceConfig,
    SequenceToSequence,
    attention_paths,
    sequence_to_sequence,
    with_learned,
)

PAD, BEGIN, END = 0, 1, 2
CONFIG = SequenceConfig(
    image_size=8,
    patch_size=4,
    vocabulary_size=7,
    max_source_length=5,
    max_target_length=6,
    width=16,
    encoder_depth=1,
    decoder_depth=2,
    heads=2,
    begin_id=BEGIN,
    end_id=END,
    pad_id=PAD,
)
ROWS = 3
RANDOM = np.random.default_rng(0)


def masked(ids, lengths):
    mask = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
    return np.where(mask, ids, PAD).astype(np.int32), mask


SOURCE_IDS, SOURCE_MASK = masked(RANDOM.integers(3, 7, (ROWS, 5)), [5, 1, 3])
TARGET_IDS, TARGET_MASK = masked(RANDOM.integers(3, 7, (ROWS, 6)), [6, 2, 4])
BATCH = {
    "image": RANDOM.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8),
    "source_ids": SOURCE_IDS,
    "source_mask": SOURCE_MASK,
    "target_ids": TARGET_IDS,
    "target_mask": TARGET_MASK,
}
SELF = [f"decoder.blocks.{i}.self_attention" for i in (0, 1)]
CROSS = [f"decoder.blocks.{i}.cross_attention" for i in (0, 1)]
ENCODER = "encoder.blocks.0.attention"


@functools.cache
def compiled(**changes):
    model = sequence_to_sequence(dataclasses.replace(CONFIG, **changes))
    return model._replace(init=jax.jit(model.init), forward=jax.jit(model.forward))


@pytest.fixture(scope="module")
def params():
    """Random parameters under which sequences differ by row, some end early, and a wider search finds others."""
    random = np.random.default_rng(25)

    def draw(leaf):
        inputs = leaf.shape[0] if leaf.ndim == 2 and leaf.shape[0] > 7 else 1
        return (random.normal(size=leaf.shape) * 0.5 / np.sqrt(inputs)).astype(np.float32)

    return jax.tree.map(draw, compiled().init(jax.random.key(0)))


def logits(params, batch=BATCH, key=None, **changes):
    return np.asarray(compiled(**changes).forward(params, batch, key)["logits"])


def log_probs(params, sequences, row):
    """log p of each sequence for one row's source, from `forward`."""
    ids, mask = masked(np.array([s + [PAD] * (6 - len(s)) for s in sequences]), [len(s) for s in sequences])
    batch = {name: np.repeat(values[row : row + 1], len(ids), axis=0) for name, values in BATCH.items()}
    tokens = jax.nn.log_softmax(logits(params, batch | {"target_ids": ids, "target_mask": mask}))
    return (np.take_along_axis(np.asarray(tokens), ids[..., None], axis=2)[..., 0] * mask).sum(1)


def sequence_of(token_ids):
    token_ids = token_ids.tolist()
    return token_ids[: token_ids.index(END) + 1] if END in token_ids else token_ids


def test_outputs_have_the_shapes_promised(params):
    outputs = compiled().forward(params, BATCH, None)
    assert outputs["logits"].shape == (ROWS, 6, 7)
    assert outputs["logits"].dtype == jnp.float32
    np.testing.assert_array_equal(outputs["masks"]["decoder"], TARGET_MASK)
    np.testing.assert_array_equal(
        outputs["masks"]["encoder"], np.pad(SOURCE_MASK, ((0, 0), (4, 0)), constant_values=True)
    )


def test_a_target_token_sees_only_those_before_it(params):
    changed = TARGET_IDS.copy()
    changed[:, 3] = 3 + (changed[:, 3] - 2) % 4
    before, after = logits(params), logits(params, BATCH | {"target_ids": changed})
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert np.abs(before[:, 4:] - after[:, 4:]).max(axis=(1, 2)).min() > 1e-2


def test_each_part_of_the_source_counts(params):
    image = BATCH["image"].copy()
    image[:, :4, :4] = 255 - image[:, :4, :4]
    swapped = SOURCE_IDS[:, [1, 0, 2, 3, 4]]
    for changed, rows in (({"image": image}, [0, 1, 2]), ({"source_ids": swapped}, [0, 2])):
        assert np.abs(logits(params, BATCH | changed) - logits(params))[rows].max(axis=(1, 2)).min() > 5e-4


def test_padding_has_no_influence(params):
    source = np.where(SOURCE_MASK, SOURCE_IDS, 6)
    target = np.where(TARGET_MASK, TARGET_IDS, 6)
    found = logits(params, BATCH | {"source_ids": source, "target_ids": target})
    np.testing.assert_allclose(found[TARGET_MASK], logits(params)[TARGET_MASK], atol=1e-5)
    short = {name: values[1:2] for name, values in BATCH.items()}
    short |= {name: short[name][:, :2] for name in ("source_ids", "source_mask", "target_ids", "target_mask")}
    np.testing.assert_allclose(logits(params, short), logits(params)[1:2, :2], atol=1e-5)
    generate = compiled().generate
    one, other = generate(params, BATCH, beams=2), generate(params, BATCH | {"source_ids": source}, beams=2)
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_greedy_decoding_with_a_cache_is_forward_token_by_token(params):
    found = compiled().generate(params, BATCH)
    target, mask = np.full((ROWS, 6), PAD, np.int32), np.ones((ROWS, 6), bool)
    for position in range(6):
        scores = logits(params, BATCH | {"target_ids": target, "target_mask": mask})[:, position].copy()
        scores[:, [PAD, BEGIN]] = -np.inf
        ended = (target == END).any(axis=1)
        target[:, position] = np.where(ended, PAD, scores.argmax(axis=1))
    np.testing.assert_array_equal(found.token_ids, target)
    assert found.token_ids.dtype == jnp.int32
    assert len(np.unique(found.token_ids, axis=0)) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_scores_are_those_of_forward(params, beams):
    for penalty in (0.0, 0.8):
        found = compiled().generate(params, BATCH, beams=beams, length_penalty=penalty)
        for row in range(ROWS):
            sequence = sequence_of(np.asarray(found.token_ids[row]))
            (expected,) = log_probs(params, [sequence], row) / len(sequence) ** penalty
            np.testing.assert_allclose(found.scores[row], expected, rtol=1e-4)


def test_full_width_finds_the_most_probable_sequence(params):
    words = (3, 4, 5, 6)
    sequences = [[*some, END] for length in range(3) for some in itertools.product(words, repeat=length)]
    sequences += [list(some) for some in itertools.product(words, repeat=3)]
    found = compiled().generate(params, BATCH, beams=64, max_length=3)
    assert found.token_ids.shape == (ROWS, 3)
    for row in range(ROWS):
        scores = log_probs(params, sequences, row)
        assert sequence_of(np.asarray(found.token_ids[row])) == sequences[scores.argmax()]
        np.testing.assert_allclose(found.scores[row], scores.max(), rtol=1e-4)


def test_generation_needs_a_source_only_and_repeats_itself(params):
    source = {name: BATCH[name] for name in ("image", "source_ids", "source_mask")}
    one, other = (compiled().generate(params, batch, beams=3) for batch in (BATCH, source))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_bfloat16_is_close_to_float32(params):
    single, half = logits(params), logits(params, dtype="bfloat16")
    assert half.dtype == np.float32
    assert 0 < np.linalg.norm(half - single) / np.linalg.norm(single) < 0.03
    found = compiled(dtype="bfloat16").generate(params, BATCH, beams=2)
    for row in range(ROWS):
        (expected,) = log_probs(params, [sequence_of(np.asarray(found.token_ids[row]))], row)
        np.testing.assert_allclose(found.scores[row], expected, rtol=0.1)


@pytest.mark.slow
def test_remat_gives_equal_gradients_and_keeps_less(params):
    def gradient_and_residuals(remat):
        model = compiled(remat=remat, dropout=0.1)

        def total(params):
            return (model.forward(params, BATCH, jax.random.key(0))["logits"] ** 2).sum()

        _, pull_back = jax.eval_shape(lambda params: jax.vjp(total, params), params)
        return jax.jit(jax.grad(total))(params), sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    (plain, kept), (recomputed, kept_by_remat) = gradient_and_residuals(False), gradient_and_residuals(True)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5 * size), plain, recomputed)
    assert kept_by_remat < 0.6 * kept


def test_gradients_reach_all_parameters(params):
    @jax.jit
    @jax.grad
    def gradient(params):
        tokens = jax.nn.log_softmax(compiled().forward(params, BATCH, None)["logits"])
        return (jnp.take_along_axis(tokens, TARGET_IDS[..., None], axis=2)[..., 0] * TARGET_MASK).sum()

    for keys, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        # What is added to all keys alike changes no attention.
        assert np.abs(leaf).max() > 1e-4 or path.endswith("attention/key/bias"), path


def test_dropout_acts_only_with_a_key_and_repeats_with_the_same(params):
    np.testing.assert_array_equal(logits(params, dropout=0.3), logits(params))
    one, again, other = (logits(params, key=jax.random.key(seed), dropout=0.3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2


def test_what_its_layers_show(params):
    assert set(attention_paths(lambda rngs: SequenceToSequence(CONFIG, rngs=rngs))) == {ENCODER, *SELF, *CROSS}
    capture = Capture(maps=["*"], queries_keys=["decoder.*.cross_attention"], hidden=["*coder.blocks.*"])
    outputs = jax.jit(sequence_to_sequence(CONFIG, capture=capture).forward)(params, BATCH, None)
    shapes = {path: values.shape[1:] for path, values in outputs["attention"].items()}
    assert shapes == {ENCODER: (2, 9, 9)} | dict.fromkeys(SELF, (2, 6, 6)) | dict.fromkeys(CROSS, (2, 6, 9))
    assert {path: values.shape for path, values in outputs["keys"].items()} == dict.fromkeys(CROSS, (ROWS, 2, 9, 8))
    hidden = {path: values.shape for path, values in outputs["hidden"].items()}
    assert hidden == {
        "encoder.blocks.0": (ROWS, 9, 16),
        "decoder.blocks.0": (ROWS, 6, 16),
        "decoder.blocks.1": (ROWS, 6, 16),
    }
    np.testing.assert_allclose(outputs["logits"], logits(params), atol=1e-5)
    padding = ~np.pad(SOURCE_MASK, ((0, 0), (4, 0)), constant_values=True)
    for path in (ENCODER, *CROSS):
        assert not np.asarray(outputs["attention"][path]).swapaxes(1, 3)[padding].any()
    assert not np.triu(outputs["attention"][SELF[0]], 1).any()


def test_it_generates_beside_learned_parameters(params):
    learning = with_learned(compiled(), {"projection": lambda key: jnp.eye(2)})
    found = learning.generate(params | {"learned": {"projection": jnp.eye(2)}}, BATCH, beams=3)
    jax.tree.map(np.testing.assert_array_equal, found, compiled().generate(params, BATCH, beams=3))


@pytest.mark.slow
def test_it_learns_to_copy():
    """The source's words backwards, and the quadrant of the image that is bright, as the last word."""
    random = np.random.default_rng(1)
    words, quadrant = random.integers(3, 5, (64, 3)), random.integers(0, 2, 64)
    image = np.zeros((64, 8, 8, 3), np.uint8)
    image[np.arange(64), 4 * quadrant] = 255
    end = np.full((64, 1), END)
    batch = {
        "image": image,
        "source_ids": words.astype(np.int32),
        "source_mask": np.ones((64, 3), bool),
        "target_ids": np.concatenate([words[:, ::-1], 5 + quadrant[:, None], end], axis=1).astype(np.int32),
        "target_mask": np.ones((64, 5), bool),
    }
    model, optimizer = compiled(), optax.adam(optax.cosine_decay_schedule(5e-3, 500))

    @jax.jit
    def train(params):
        def loss(params):
            scores = model.forward(params, batch, None)["logits"]
            return optax.softmax_cross_entropy_with_integer_labels(scores, batch["target_ids"]).mean()

        def step(state, _):
            value, gradient = jax.value_and_grad(loss)(state[0])
            updates, moments = optimizer.update(gradient, state[1])
            return (optax.apply_updates(state[0], updates), moments), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=500)
        return params, values

    params, values = train(model.init(jax.random.key(0)))
    assert values[-1] < 0.01
    for beams in (1, 3):
        np.testing.assert_array_equal(
            model.generate(params, batch, beams=beams, max_length=5).token_ids, batch["target_ids"]
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary_size": 2}, "vocabulary_size must be at least 3, got 2"),
        ({"end_id": 7}, r"end_id must be in \[0, vocabulary_size=7\), got 7"),
        ({"begin_id": END}, "begin_id and end_id must differ, got 2 for both"),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1, got 0"),
        ({"max_target_length": 0}, "max_target_length must be at least 1, got 0"),
        ({"width": 15}, "width must be a multiple of heads, got width=15, heads=2"),
        ({"patch_size": 3}, "image_size must be a multiple of patch_size"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_mask": None}, "the batch lacks source_mask; it has image, source_ids"),
        ({"source_ids": np.zeros((ROWS, 4), np.int32)}, r"source_ids and source_mask .* got \[3, 4\] and \[3, 5\]"),
        (
            {"source_ids": np.zeros((2, 5), np.int32), "source_mask": np.ones((2, 5), bool)},
            r"one shape \[b l\] with b=3 as the images have, got \[2, 5\]",
        ),
        (
            {"target_ids": np.zeros((ROWS, 7), np.int32), "target_mask": np.ones((ROWS, 7), bool)},
            "a target text has at most max_target_length=6 tokens, got 7",
        ),
        ({"image": np.zeros((ROWS, 9, 8, 3), np.uint8)}, r"uint8 of shape \[b 8 8 3\]"),
    ],
)
def test_a_batch_of_a_wrong_kind_is_refused(params, changes, message):
    batch = {name: values for name, values in (BATCH | changes).items() if values is not None}
    with pytest.raises(InputError, match=message):
        compiled().forward(params, batch, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams >= 1, got 0"),
        ({"max_length": 7}, "max_length >= 1 and <= 6, got 7"),
        ({"length_penalty": -0.5}, r"length_penalty >= 0, got -0\.5"),
    ],
)
def test_impossible_searches_are_refused(params, options, message):
    with pytest.raises(InputError, match=message):
        compiled().generate(params, BATCH, **options)
