"""The fusion model: its outputs, what they depend on, and where gradients go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from repkit import losses
from repkit.checks import InputError
from repkit.models import Capture, FusionConfig, TextConfig, VisionConfig, fusion
from repkit.models.capture import NOTHING
from repkit.models.masking import mask_tokens
from repkit.objective import Objective, Term

PAD, BEGIN, END, MASK, VOCABULARY = 0, 1, 2, 11, 12
TEXT = TextConfig(vocabulary_size=VOCABULARY, max_length=6, width=16, depth=1, heads=2, tokens="normalized")
PRETRAINING = FusionConfig(
    image=VisionConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, patches="normalized"),
    text=TEXT,
    embed_dim=8,
    independent=True,
    depth=2,
    mask_rate=0.4,
    begin_id=BEGIN,
    end_id=END,
    pad_id=PAD,
    mask_id=MASK,
)
STATEMENTS = dataclasses.replace(PRETRAINING, matching=False, mask_rate=0.0, classes=3, images=2)
ANSWERS = dataclasses.replace(PRETRAINING, matching=False, mask_rate=0.0, decoder_depth=1, max_target_length=5)
ROWS = 8
RANDOM = np.random.default_rng(0)


def texts(name, length):
    lengths = RANDOM.integers(2, length + 1, (ROWS, 1))
    ids = RANDOM.integers(3, MASK, (ROWS, length))
    places = np.arange(length)
    ids = np.where(places == 0, BEGIN, np.where(places == lengths - 1, END, ids))
    mask = places < lengths
    return {f"{name}_ids": np.where(mask, ids, PAD).astype(np.int32), f"{name}_mask": mask}


IMAGES = {name: RANDOM.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8) for name in ("image", "second_image")}
IMAGE = {"image": IMAGES["image"]}
# The first two rows have equal captions, and the last one does not count.
IDENTITY = {"caption_id": np.array([7, 7, 1, 2, 3, 4, 5, 6], np.int32), "where": np.arange(ROWS) < ROWS - 1}
PAIRS = IMAGE | texts("token", 6) | IDENTITY
IMAGE_OF = {name: {"image": images} for name, images in IMAGES.items()}
TEXTS = texts("token", 6)
TWO = IMAGES | TEXTS
SEQUENCES = IMAGE | texts("source", 6) | texts("target", 5)
CASES = {"pretraining": (PRETRAINING, PAIRS), "statements": (STATEMENTS, TWO), "answers": (ANSWERS, SEQUENCES)}


# These programs run a few times on tiny arrays: compiling is all they cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(config, capture=NOTHING):
    model = fusion(config, negatives=losses.hard_negatives, capture=capture)
    return model._replace(forward=jit(model.forward))


@functools.cache
def params(config):
    """Random ones, larger than at the start, so that all parts count."""
    random = np.random.default_rng(1)

    def draw(path, leaf):
        return (path[-1].key == "scale") + 0.3 * random.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(compiled(config).init, jax.random.key(0)))


def forward(name, batch=None, key=None, **keywords):
    config, own = CASES[name]
    return compiled(config, **keywords).forward(params(config), own if batch is None else batch, key)


def test_outputs_have_the_shapes_promised():
    outputs = forward("pretraining", key=jax.random.key(0))
    assert {"image", "text", "logit_scale", "matching", "masked"} == set(outputs)
    for view in ("image", "text"):
        for kind in ("embeds", "independent"):
            np.testing.assert_allclose(np.linalg.norm(outputs[view][kind], axis=1), np.ones(ROWS), rtol=1e-5)
    assert outputs["matching"]["logits"].shape == (ROWS, 3, 2)
    np.testing.assert_array_equal(outputs["matching"]["labels"], np.tile([1, 0, 0], (ROWS, 1)))
    assert outputs["masked"]["logits"].shape == (ROWS, 6, VOCABULARY)
    np.testing.assert_array_equal(outputs["masked"]["token_ids"], PAIRS["token_ids"])
    assert forward("statements")["classes"]["logits"].shape == (ROWS, 3)
    answers = forward("answers")
    assert answers["logits"].shape == (ROWS, 5, VOCABULARY)
    assert answers["masks"]["encoder"].shape == (ROWS, 4 + 6)


def test_without_a_key_the_own_pair_is_judged_and_nothing_is_masked():
    outputs = forward("pretraining")
    assert "masked" not in outputs
    assert outputs["matching"]["logits"].shape == (ROWS, 1, 2)
    drawn = forward("pretraining", key=jax.random.key(0))
    np.testing.assert_allclose(outputs["matching"]["logits"][:, 0], drawn["matching"]["logits"][:, 0], atol=1e-5)
    seen = jax.eval_shape(compiled(PRETRAINING).forward, params(PRETRAINING), IMAGE, jax.random.key(0))
    assert set(seen) == {"image", "logit_scale"}


def test_hard_pairs_are_judged_as_pairs_of_their_own():
    outputs = forward("pretraining", key=jax.random.key(0))
    drawn = losses.hard_negatives(
        outputs["image"]["embeds"],
        outputs["text"]["embeds"],
        logit_scale=outputs["logit_scale"],
        labels=PAIRS["caption_id"],
        where=PAIRS["where"],
        key=jax.random.fold_in(jax.random.key(0), 2),
    )
    logits = outputs["matching"]["logits"]
    hard_texts = {name: PAIRS[name][drawn.text_of_image] for name in ("token_ids", "token_mask")}
    hard_images = {"image": PAIRS["image"][drawn.image_of_text]}
    for index, changed in ((1, hard_texts), (2, hard_images)):
        alone = forward("pretraining", PAIRS | changed)["matching"]["logits"][:, 0]
        valid = PAIRS["where"]
        np.testing.assert_allclose(logits[valid, index], alone[valid], atol=1e-4)
        assert np.abs(logits[valid, index] - logits[valid, 0]).max() > 1e-2


def test_rows_without_a_negative_are_masked():
    mask = forward("pretraining", key=jax.random.key(0))["matching"]["mask"]
    np.testing.assert_array_equal(mask, np.stack([np.ones(ROWS, bool), PAIRS["where"], PAIRS["where"]], axis=1))
    equal = forward("pretraining", PAIRS | {"caption_id": np.zeros(ROWS, np.int32)}, jax.random.key(0))
    np.testing.assert_array_equal(equal["matching"]["mask"], np.tile([True, False, False], (ROWS, 1)))


def test_masking_chooses_its_share_and_never_a_special_token():
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 40, (512, 1))
    places = np.arange(40)
    ids = np.where(places == 0, BEGIN, np.where(places == lengths - 1, END, rng.integers(3, MASK, (512, 40))))
    ids = np.where(places < lengths, ids, PAD).astype(np.int32)
    masked = mask_tokens(
        jnp.asarray(ids),
        jnp.asarray(places < lengths),
        rate=0.15,
        mask_id=MASK,
        special_ids=(PAD, BEGIN, END),
        vocabulary_size=VOCABULARY,
        key=jax.random.key(0),
    )
    read, chosen = np.asarray(masked.token_ids), np.asarray(masked.chosen)
    ordinary = (ids != PAD) & (ids != BEGIN) & (ids != END)
    assert not chosen[~ordinary].any()
    np.testing.assert_array_equal(read[~chosen], ids[~chosen])
    total = chosen.sum()
    assert total / ordinary.sum() == pytest.approx(0.15, abs=5 * np.sqrt(0.15 * 0.85 / ordinary.sum()))
    # An eighth of the replacements is the token itself.
    for share, expected in (((read == MASK)[chosen].mean(), 0.8), ((read == ids)[chosen].mean(), 0.1 + 0.1 / 8)):
        assert share == pytest.approx(expected, abs=5 * np.sqrt(expected * (1 - expected) / total))
    assert not np.isin(read[chosen], [PAD, BEGIN, END]).any()


def test_each_input_counts():
    for name, inputs, output in (
        ("pretraining", ("image", "token_ids"), lambda outputs: outputs["matching"]["logits"]),
        ("statements", ("image", "second_image", "token_ids"), lambda outputs: outputs["classes"]["logits"]),
        ("answers", ("image", "source_ids", "target_ids"), lambda outputs: outputs["logits"]),
    ):
        batch, before = CASES[name][1], output(forward(name))
        for array in inputs:
            rolled = np.roll(batch[array], 1, axis=0)
            after = output(forward(name, batch | {array: np.where(rolled == PAD, 5, rolled).astype(rolled.dtype)}))
            assert np.abs(after - before).max() > 1e-2, (name, array)
    statements = forward("statements")["classes"]["logits"]
    swapped = forward("statements", TWO | {"image": TWO["second_image"], "second_image": TWO["image"]})
    assert np.abs(swapped["classes"]["logits"] - statements).max() > 1e-2, "which image is the first counts"


def test_two_images_are_compared_as_one_image_is_read():
    """With all of the comparison's inputs but one zero, what is left is the head of one image, or is symmetric."""
    one = dataclasses.replace(STATEMENTS, images=1)
    whole = params(STATEMENTS)
    kernel = np.asarray(whole["comparison"]["kernel"])
    width = kernel.shape[0] // 4
    shared = {name: part for name, part in whole.items() if name != "comparison"}
    hidden = {"kernel": kernel[:width], "bias": whole["comparison"]["bias"]}
    swapped = TWO | {"image": TWO["second_image"], "second_image": TWO["image"]}
    equal = TWO | {"second_image": TWO["image"]}
    by_one = {
        place: compiled(one).forward(shared | {"class_hidden": hidden}, IMAGE_OF[place] | TEXTS, None)
        for place in ("image", "second_image")
    }

    def logits(place, batch):
        masked = np.zeros_like(kernel)
        masked[place * width : (place + 1) * width] = kernel[:width]
        parameters = whole | {"comparison": whole["comparison"] | {"kernel": masked}}
        return np.asarray(compiled(STATEMENTS).forward(parameters, batch, None)["classes"]["logits"])

    for place, name in enumerate(("image", "second_image")):
        np.testing.assert_allclose(logits(place, TWO), by_one[name]["classes"]["logits"], atol=1e-5)
    for place in (2, 3):
        np.testing.assert_allclose(logits(place, TWO), logits(place, swapped), atol=1e-5)
        assert np.ptp(logits(place, TWO), axis=0).max() > 1e-2
    np.testing.assert_allclose(np.ptp(logits(2, equal), axis=0), 0, atol=1e-5)
    assert np.ptp(logits(3, equal), axis=0).max() > 1e-2


def test_padding_has_no_influence():
    changed = {"token_ids": np.where(PAIRS["token_mask"], PAIRS["token_ids"], 5).astype(np.int32)}
    before, after = forward("pretraining"), forward("pretraining", PAIRS | changed)
    np.testing.assert_allclose(before["matching"]["logits"], after["matching"]["logits"], atol=1e-5)
    changed = {
        f"{name}_ids": np.where(SEQUENCES[f"{name}_mask"], SEQUENCES[f"{name}_ids"], 5).astype(np.int32)
        for name in ("source", "target")
    }
    before, after = forward("answers"), forward("answers", SEQUENCES | changed)
    counts = SEQUENCES["target_mask"]
    np.testing.assert_allclose(before["logits"][counts], after["logits"][counts], atol=1e-4)


def test_greedy_decoding_with_a_cache_is_forward_token_by_token():
    found = compiled(ANSWERS).generate(params(ANSWERS), SEQUENCES)
    target, mask = np.full((ROWS, 5), PAD, np.int32), np.ones((ROWS, 5), bool)
    for position in range(5):
        batch = SEQUENCES | {"target_ids": target, "target_mask": mask}
        scores = np.array(forward("answers", batch)["logits"][:, position])
        scores[:, [PAD, BEGIN]] = -np.inf
        ended = (target == END).any(axis=1)
        target[:, position] = np.where(ended, PAD, scores.argmax(axis=1))
    np.testing.assert_array_equal(found.token_ids, target)
    assert len(np.unique(found.token_ids, axis=0)) > 1


@pytest.mark.slow
def test_capture_shows_the_own_pair_and_changes_no_output():
    paths = ("image.blocks.0.attention", "text.blocks.0.attention", "multimodal.blocks.1.cross_attention")
    outputs = forward("pretraining", key=jax.random.key(0))
    shown = forward("pretraining", key=jax.random.key(0), capture=Capture(maps=paths, hidden=["multimodal.blocks.*"]))
    maps, hidden = shown.pop("attention"), shown.pop("hidden")
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), shown, outputs)
    assert maps[paths[2]].shape == (ROWS, 2, 6, 4)
    assert set(hidden) == {"multimodal.blocks.0", "multimodal.blocks.1"}
    alone = forward("pretraining", capture=Capture(maps=paths, hidden=["multimodal.blocks.*"]))
    for path in paths:
        np.testing.assert_allclose(maps[path], alone["attention"][path], atol=1e-5)


def token_term(head, targets, mask):
    return Term(
        losses.caption_cross_entropy,
        (f"outputs.{head}.logits", f"outputs.{head}.{targets}"),
        keywords={"token_mask": f"outputs.{head}.{mask}"},
    )


EMBEDS = ("outputs.image.embeds", "outputs.text.embeds")
INDEPENDENT = tuple(f"{source}.{view}.independent" for source in ("outputs", "teacher") for view in ("image", "text"))
SCALE = {"logit_scale": "outputs.logit_scale"}
OBJECTIVE = Objective(
    {
        "contrast": Term(
            losses.queue_contrastive,
            (*EMBEDS, "teacher.image.embeds", "teacher.text.embeds"),
            keywords=SCALE | {"labels": "batch.caption_id"},
            options={"target_share": 0.4},
            memory=functools.partial(losses.init_queue, 16, 8),
        ),
        "matching": token_term("matching", "labels", "mask"),
        "masked": token_term("masked", "token_ids", "token_mask"),
        "separation": Term(losses.feature_separation, EMBEDS + INDEPENDENT, keywords=SCALE),
    }
)


def total(params, teacher, batch, key, objective=OBJECTIVE):
    model = fusion(PRETRAINING, negatives=losses.hard_negatives)
    outputs, momentum = model.forward(params, batch, key), model.forward(teacher, batch, None)
    return objective(batch, outputs, objective.init_memories(), step=0, key=key, teacher=momentum)[0]


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_none_the_momentum_features():
    own = params(PRETRAINING)
    gradients, of_teacher = jit(jax.grad(total, argnums=(0, 1)))(own, own, PAIRS, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        # A key's bias moves all scores of a query alike.
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith("key/bias"):
            assert np.abs(leaf).max() > 1e-8, jax.tree_util.keystr(path)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    own, key = params(PRETRAINING), jax.random.key(0)
    value, gradient = jax.jit(jax.value_and_grad(total))(own, own, PAIRS, key)
    split = jax.device_put(PAIRS, NamedSharding(mesh, P("data")))
    whole = jax.device_put((own, key), NamedSharding(mesh, P()))
    over_mesh = functools.partial(total, objective=OBJECTIVE.over_mesh(mesh, "data"))
    got, got_gradient = jax.jit(jax.value_and_grad(over_mesh))(whole[0], whole[0], split, whole[1])
    np.testing.assert_allclose(got, value, rtol=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5 * largest), got_gradient, gradient)


def test_wrong_inputs_are_refused():
    for changes, message in (
        ({"text": dataclasses.replace(TEXT, width=8)}, "image.width and text.width of a fusion model must be equal"),
        ({"text": dataclasses.replace(TEXT, causal=True)}, "must not be causal"),
        ({"mask_id": PAD}, "mask_id must be a token of its own"),
        ({"mask_id": VOCABULARY}, "mask_id must be in"),
        ({"images": 3}, "expected images >= 1 and <= 2"),
        ({"images": 2, "matching": False}, "images=2 is for classification: .* got matching=False, mask_rate=0.4"),
        ({"decoder_depth": 1}, "max_target_length must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(PRETRAINING, **changes)
    with pytest.raises(InputError, match="the model is one of images=1"):
        forward("pretraining", TWO)
    with pytest.raises(InputError, match="the batch lacks second_image"):
        forward("statements", IMAGE | TEXTS)
    short = {name: value for name, value in PAIRS.items() if name != "token_mask"}
    with pytest.raises(InputError, match="lacks token_mask"):
        forward("pretraining", short, jax.random.key(0))
