import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.checks import InputError
from repkit.models import Capture, linen_model

RANDOM = np.random.default_rng(0)
BATCH = {
    "token_ids": RANDOM.integers(0, 9, (3, 5), dtype=np.int32),
    "token_mask": np.arange(5) < np.array([5, 1, 3])[:, None],
    "context": RANDOM.normal(size=(3, 4, 6)).astype(np.float32),
}
EXAMPLE = {name: values[:1] for name, values in BATCH.items()}
EVERYTHING = Capture(maps=["*"], queries_keys=["*"], hidden=["block_*"])
GROUPS = ("attention", "queries", "keys", "hidden")


class Block(nn.Module):
    dropout: float = 0.0
    weights: bool = False

    @nn.compact
    def __call__(self, x, batch, deterministic):
        mask = batch["token_mask"][:, None, None, :]
        common = {"num_heads": 2, "qkv_features": 8, "dropout_rate": self.dropout, "deterministic": deterministic}
        own = nn.MultiHeadDotProductAttention(**common, normalize_qk=True, name="own")
        cross = nn.MultiHeadAttention(**common, name="cross")
        x = x + own(x, mask=mask, sow_weights=self.weights)
        return x + cross(x, batch["context"], sow_weights=self.weights)


class Encoder(nn.Module):
    """Of a user: blocks of flax's own attention layers, and something of its own in `intermediates`."""

    remat: bool = False
    dropout: float = 0.0
    weights: bool = False

    @nn.compact
    def __call__(self, batch, *, deterministic):
        x = nn.Embed(9, 8, name="embedding")(batch["token_ids"])
        kind = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for index in range(2):
            x = kind(self.dropout, self.weights, name=f"block_{index}")(x, batch, deterministic)
            self.sow("intermediates", "hidden", x)
        return {"tokens": x}


def encoder(capture=None, **options):
    return linen_model(Encoder(**options), EXAMPLE, capture=capture or Capture())


@pytest.fixture(scope="module")
def params():
    return jax.jit(encoder().init)(jax.random.key(0))


@pytest.mark.parametrize("remat", [False, True])
def test_capturing_changes_no_bit_of_the_outputs(params, remat):
    outputs = encoder(EVERYTHING, remat=remat).forward(params, BATCH, None)
    assert set(outputs) == {"tokens", *GROUPS}
    assert set(outputs["attention"]) == {f"block_{i}.{name}" for i in (0, 1) for name in ("own", "cross")}
    assert set(outputs["hidden"]) == {"block_0", "block_1"}
    np.testing.assert_array_equal(outputs["tokens"], encoder(remat=remat).forward(params, BATCH, None)["tokens"])
    np.testing.assert_array_equal(outputs["tokens"], outputs["hidden"]["block_1"])


@pytest.mark.parametrize("remat", [False, True])
def test_maps_are_those_that_flax_sows(params, remat):
    maps = jax.jit(encoder(Capture(maps=["*"]), remat=remat).forward)(params, BATCH, None)["attention"]
    module = Encoder(weights=True)
    _, sown = module.apply({"params": params}, BATCH, deterministic=True, mutable=["intermediates"])
    for path, values in maps.items():
        block, layer = path.split(".")
        (expected,) = sown["intermediates"][block][layer]["attention_weights"]
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, expected, atol=1e-5, err_msg=path)


def test_queries_and_keys_make_the_maps(params):
    outputs = encoder(EVERYTHING).forward(params, BATCH, None)
    hidden = {"own": ~BATCH["token_mask"][:, None, None, :], "cross": np.zeros(4, bool)}
    for path, maps in outputs["attention"].items():
        queries, keys = (np.asarray(outputs[name][path]) for name in ("queries", "keys"))
        assert queries.shape == (3, 2, 5, 4)
        scores = np.where(hidden[path.split(".")[1]], -np.inf, queries @ keys.swapaxes(-1, -2) / 2)
        np.testing.assert_allclose(jax.nn.softmax(scores), maps, atol=1e-6, err_msg=path)


def test_only_what_is_asked_for_leaves_the_model(params):
    outputs = jax.eval_shape(encoder(Capture(queries_keys=["block_1.cross"])).forward, params, BATCH, None)
    assert set(outputs) == {"tokens", "queries", "keys"}
    assert {path: leaf.shape for path, leaf in outputs["keys"].items()} == {"block_1.cross": (3, 2, 4, 4)}


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_flow_through_what_is_captured(params, remat):
    forward = encoder(EVERYTHING, remat=remat).forward

    @jax.jit
    @jax.grad
    def gradient(params):
        outputs = forward(params, BATCH, None)
        return sum((outputs[name]["block_1.cross"] ** 2).sum() for name in GROUPS[:3])

    found = gradient(params)
    assert np.abs(found["block_1"]["cross"]["query"]["kernel"]).max() > 0
    assert np.abs(found["block_0"]["own"]["value"]["kernel"]).max() > 0
    assert np.abs(found["block_1"]["cross"]["value"]["kernel"]).max() == 0


def test_maps_are_those_before_dropout(params):
    model = encoder(Capture(maps=["block_0.own"]), dropout=0.5)
    dropped, other, whole = (model.forward(params, BATCH, key) for key in (*jax.random.split(jax.random.key(0)), None))
    assert np.abs(dropped["tokens"] - other["tokens"]).max() > 1e-3
    np.testing.assert_array_equal(dropped["attention"]["block_0.own"], whole["attention"]["block_0.own"])


def test_a_module_with_another_call_and_flat_outputs():
    def call(module, batch, *, deterministic):
        return {"embeds": module(batch["context"], deterministic=deterministic)}

    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x, *, deterministic):
            return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4, name="projection")(x))

    model = linen_model(Tower(), EXAMPLE, call=call, capture=Capture(hidden=["projection"]))
    params = model.init(jax.random.key(0))
    outputs = model.forward(params, BATCH, None)
    np.testing.assert_array_equal(outputs["embeds"], outputs["hidden"]["projection"])
    assert (model.forward(params, BATCH, jax.random.key(0))["embeds"] == 0).any()


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ({"maps": ["block_0.attention"]}, r"'block_0\.attention' matches no attention layer; near ones: block_"),
        ({"hidden": ["blocks.0"]}, r"'blocks\.0' matches no module; near ones: block_"),
    ],
)
def test_a_path_that_matches_nothing_is_refused_with_near_ones(capture, message):
    with pytest.raises(InputError, match=message):
        encoder(Capture(**capture))


def test_a_module_with_other_state_is_refused():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, batch, *, deterministic):
            return {"y": nn.BatchNorm(use_running_average=deterministic)(batch["context"])}

    with pytest.raises(InputError, match="it has batch_stats"):
        linen_model(Normalised(), EXAMPLE)


def test_layers_under_scan_are_refused():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, batch, *, deterministic):
            axes = {"params": 0, "intermediates": 0}
            layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)(name="layers")
            return {"y": layers(batch["context"], None)[0]}

    model = linen_model(Scanned(), EXAMPLE, capture=Capture(maps=["layers.attention"]))
    params = model.init(jax.random.key(0))
    with pytest.raises(
        InputError, match=r"'layers\.attention': its attention must be an array of 4 axes .*\[2, 3, 2, 4"
    ):
        model.forward(params, BATCH, None)


def test_a_function_of_the_user_keeps_its_map_to_itself():
    def attend(query, key, value, mask=None):
        return nn.dot_product_attention(2.0 * query, key, value, mask=mask)

    class Own(nn.Module):
        @nn.compact
        def __call__(self, batch, *, deterministic):
            layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attend, name="attention")
            return {"y": layer(batch["context"])}

    with pytest.raises(InputError, match=r"map of 'attention'.*use queries_keys"):
        linen_model(Own(), EXAMPLE, capture=Capture(maps=["attention"]))
    model = linen_model(Own(), EXAMPLE, capture=Capture(queries_keys=["attention"]))
    params = model.init(jax.random.key(0))
    outputs = model.forward(params, BATCH, None)
    assert outputs["queries"]["attention"].shape == (3, 2, 4, 3)
    np.testing.assert_array_equal(outputs["y"], linen_model(Own(), EXAMPLE).forward(params, BATCH, None)["y"])
