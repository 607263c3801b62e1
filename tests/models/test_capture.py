import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repkit.checks import InputError
from repkit.models import Capture, functional, two_tower

RANDOM = np.random.default_rng(0)
BATCH = {
    "x": RANDOM.normal(size=(3, 5, 8)).astype(np.float32),
    "context": RANDOM.normal(size=(3, 4, 6)).astype(np.float32),
    "mask": np.arange(4) < np.array([4, 1, 2])[:, None],
}
EVERYTHING = Capture(maps=["*"], queries_keys=["*"], hidden=["blocks.*"])
GROUPS = ("attention", "queries", "keys", "hidden")


class Block(nnx.Module):
    """Of a user: flax's own attention layers, one of which is causal, and one looks at a context."""

    def __init__(self, rngs, **options):
        self.own = nnx.MultiHeadAttention(num_heads=4, in_features=8, decode=False, rngs=rngs, **options)
        self.cross = nnx.MultiHeadAttention(
            num_heads=4, in_features=8, in_kv_features=6, decode=False, rngs=rngs, **options
        )

    def __call__(self, batch, x, *, weights=False):
        x = x + self.own(x, is_causal=True, sow_weights=weights)
        mask = batch["mask"][:, None, None, :]
        return x + self.cross(x, batch["context"], mask=mask, sow_weights=weights)


class User(nnx.Module):
    def __init__(self, rngs, *, remat=False, weights=False, sow=False, **options):
        self.blocks = nnx.List([Block(rngs, **options) for _ in range(2)])
        self.remat, self.weights, self.sows = remat, weights, sow

    def __call__(self, batch, *, key=None):
        x = batch["x"]
        for block in self.blocks:

            def run(block, batch, x):
                return block(batch, x, weights=self.weights)

            x = (nnx.remat(run) if self.remat else run)(block, batch, x)
            if self.sows:
                block.sow(nnx.Intermediate, "hidden", x + 1)
        return {"y": x}


def user(capture=None, **options):
    return functional(lambda rngs: User(rngs, **options), capture=capture or Capture())


def weights_of_flax(params, **options):
    """The maps that flax itself sows when the user asks for them, by path."""
    structure = nnx.split(nnx.eval_shape(lambda: User(nnx.Rngs(0), weights=True, **options)))[0]
    module = nnx.merge(structure, nnx.restore_int_paths(params))
    _, sown = nnx.capture(module, nnx.Intermediate)(BATCH)
    flat = nnx.to_flat_state(sown)
    return {
        ".".join(map(str, path[:-1])): values.get_value()[0] for path, values in flat if path[-1] == "attention_weights"
    }


@pytest.fixture(scope="module")
def params():
    return user().init(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"normalize_qk": True}], ids=str)
def test_maps_of_flax_layers_are_those_that_flax_sows(options):
    params = user(**options).init(jax.random.key(0))
    maps = user(Capture(maps=["*"]), **options).forward(params, BATCH, None)["attention"]
    expected = weights_of_flax(params, **options)
    assert set(maps) == set(expected) == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("own", "cross")}
    for path, values in maps.items():
        assert values.dtype == jnp.float32
        # Between its own two ways to attend, flax rounds differently, which the next layer's norms enlarge.
        np.testing.assert_allclose(values, expected[path], atol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"num_kv_heads": 2}, marks=pytest.mark.slow),
        pytest.param({"normalize_qk": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_queries_and_keys_of_flax_layers_make_their_maps(options):
    params = user(**options).init(jax.random.key(0))
    outputs = user(Capture(maps=["*"], queries_keys=["*"]), **options).forward(params, BATCH, None)
    hidden = {"own": ~np.tril(np.ones((5, 5), bool)), "cross": ~BATCH["mask"][:, None, None, :]}
    for path, maps in outputs["attention"].items():
        queries, keys = (np.asarray(outputs[name][path]) for name in ("queries", "keys"))
        assert queries.shape == (3, 4, 5, 2)
        scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(2)
        scores = np.where(hidden[path.split(".")[-1]], -np.inf, scores)
        np.testing.assert_allclose(jax.nn.softmax(scores), maps, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_capturing_from_flax_layers_changes_no_bit_of_the_outputs(params, remat):
    outputs = user(EVERYTHING, remat=remat).forward(params, BATCH, None)
    assert set(outputs) == {"y", *GROUPS}
    assert set(outputs["hidden"]) == {"blocks.0", "blocks.1"}
    np.testing.assert_array_equal(outputs["y"], user(remat=remat).forward(params, BATCH, None)["y"])
    np.testing.assert_array_equal(outputs["y"], outputs["hidden"]["blocks.1"])
    again = jax.jit(user(EVERYTHING, remat=remat).forward)(params, BATCH, None)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), outputs, again)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_capturing_from_our_layers_changes_no_bit_of_the_outputs(tiny_config, tiny_params, tiny_batch, remat):
    config = dataclasses.replace(tiny_config, text=dataclasses.replace(tiny_config.text, remat=remat))
    batch = {name: tiny_batch[name] for name in ("image", "token_ids", "token_mask")}
    capture = Capture(maps=["*"], queries_keys=["text.*"], hidden=["text.blocks.*"])
    outputs = two_tower(config, capture=capture).forward(tiny_params, batch, None)
    plain = two_tower(config).forward(tiny_params, batch, None)
    for name in GROUPS:
        assert set(outputs.pop(name)) >= {"text.blocks.0" + (".attention" if name != "hidden" else "")}
    jax.tree.map(np.testing.assert_array_equal, outputs, plain)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_queries_and_keys_of_our_layers_make_their_maps(tiny_config, tiny_params, tiny_batch, dtype):
    config = dataclasses.replace(tiny_config, image=dataclasses.replace(tiny_config.image, dtype=dtype))
    capture = Capture(maps=["image.*"], queries_keys=["image.*"])
    outputs = two_tower(config, capture=capture).forward(tiny_params, {"image": tiny_batch["image"]}, None)
    path = "image.blocks.0.attention"
    queries, keys = (outputs[name][path] for name in ("queries", "keys"))
    assert queries.dtype == keys.dtype == dtype
    scores = np.float64(queries) @ np.float64(keys).swapaxes(-1, -2) / np.sqrt(8)
    np.testing.assert_allclose(jax.nn.softmax(scores), outputs["attention"][path], atol=1e-6)


def test_no_map_leaves_the_model_for_queries_and_keys(tiny_config, tiny_params, tiny_batch):
    capture = Capture(queries_keys=["text.blocks.1.*"], hidden=["image.blocks.0"])
    forward = two_tower(tiny_config, capture=capture).forward
    batch = {name: tiny_batch[name] for name in ("image", "token_ids", "token_mask")}
    outputs = jax.eval_shape(forward, tiny_params, batch, None)
    assert "attention" not in outputs
    shapes = {name: {path: leaf.shape for path, leaf in outputs[name].items()} for name in GROUPS[1:]}
    assert shapes == {
        "queries": {"text.blocks.1.attention": (3, 2, 6, 4)},
        "keys": {"text.blocks.1.attention": (3, 2, 6, 4)},
        "hidden": {"image.blocks.0": (3, 4, 16)},
    }


def test_what_is_captured_is_of_the_unaugmented_view(tiny_config, tiny_params, tiny_batch):
    capture = Capture(queries_keys=["image.*"], hidden=["image.blocks.*"])
    forward = jax.jit(two_tower(tiny_config, capture=capture).forward)
    image, augmented_image = tiny_batch["image"], tiny_batch["augmented_image"]
    both = forward(tiny_params, {"image": image, "augmented_image": augmented_image}, None)
    one = forward(tiny_params, {"image": image}, None)
    for name in GROUPS[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), both[name], one[name])


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_flow_through_all_that_is_captured(params, remat):
    forward = user(EVERYTHING, remat=remat).forward

    @jax.jit
    @jax.grad
    def gradient(params):
        outputs = forward(params, BATCH, None)
        return sum((outputs[name][f"blocks.1{layer}"] ** 2).sum() for name, layer in zip(GROUPS, LAYERS, strict=True))

    LAYERS = (".own", ".cross", ".cross", "")
    for layer in ("own", "cross"):
        assert np.abs(gradient(params)["blocks"]["1"][layer]["query"]["kernel"]).max() > 0


def test_of_nested_modules_that_match_the_outermost_is_meant(params):
    def hidden(*patterns):
        return set(user(Capture(hidden=patterns)).forward(params, BATCH, None)["hidden"])

    assert hidden("blocks.*") == {"blocks.0", "blocks.1"}
    assert hidden("blocks.*", "blocks.1.own.out") == {"blocks.0", "blocks.1", "blocks.1.own.out"}


def test_what_the_user_sows_is_not_taken_for_ours(params):
    capture = Capture(hidden=["blocks.1"])
    outputs = user(capture, sow=True).forward(params, BATCH, None)
    assert set(outputs) == {"y", "hidden"}
    np.testing.assert_array_equal(outputs["y"], outputs["hidden"]["blocks.1"])


def test_capturing_leaves_other_modules_of_the_class_alone(params):
    block = Block(nnx.Rngs(0))
    user(EVERYTHING).forward(params, BATCH, None)
    assert "__captures__" not in vars(block)
    assert type(block) is Block
    assert Block.__call__.__qualname__ == "Block.__call__"


def test_a_function_of_the_user_keeps_its_map_to_itself():
    def attend(query, key, value, **keywords):
        return nnx.dot_product_attention(2.0 * query, key, value, mask=keywords["mask"])

    with pytest.raises(InputError, match=r"map of 'blocks\.0\.own'.* its own attention_fn.*use queries_keys"):
        user(Capture(maps=["blocks.0.own"]), attention_fn=attend)
    model = user(Capture(queries_keys=["blocks.0.own"]), attention_fn=attend)
    params = model.init(jax.random.key(0))
    query = params["blocks"]["0"]["own"]["query"]
    expected = np.einsum("blw,whd->bhld", BATCH["x"], query["kernel"]) + query["bias"][:, None]
    outputs = model.forward(params, BATCH, None)
    np.testing.assert_allclose(outputs["queries"]["blocks.0.own"], expected, atol=1e-6)
    np.testing.assert_array_equal(outputs["y"], user(attention_fn=attend).forward(params, BATCH, None)["y"])


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ({"maps": ["blocks.*.attention"]}, r"'blocks\.\*\.attention' matches no attention layer; near ones: blocks\."),
        ({"queries_keys": ["own"]}, r"'own' matches no attention layer; near ones: .*own"),
        ({"hidden": ["blocks.0", "blocks.9"]}, r"'blocks\.9' matches no module; near ones: blocks\.[01]"),
    ],
)
def test_a_path_that_matches_nothing_is_refused_with_near_ones(capture, message):
    with pytest.raises(InputError, match=message):
        user(Capture(**capture))


def test_a_single_string_is_refused():
    with pytest.raises(InputError, match=r"hidden of Capture must be a list of paths, got the string 'blocks\.0'"):
        Capture(hidden="blocks.0")


def test_outputs_without_an_axis_of_examples_are_refused():
    class Pair(nnx.Module):
        def __call__(self, x):
            return x, x

    class Mean(nnx.Module):
        def __call__(self, x):
            return x.mean()

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.pair, self.mean = Pair(), Mean()

        def __call__(self, batch, *, key=None):
            return {"y": self.mean(self.pair(batch["x"])[0])}

    with pytest.raises(InputError, match=r"'pair': its hidden must be an array .* got tuple"):
        functional(Model, capture=Capture(hidden=["pair"])).forward({}, BATCH, None)
    with pytest.raises(InputError, match=r"'mean': its hidden must be an array .* got shape \[\]"):
        functional(Model, capture=Capture(hidden=["mean"])).forward({}, BATCH, None)
