import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repkit.checks import InputError
from repkit.models import Capture, Model, TwoTower, attention_paths, functional, parameters, two_tower, with_learned

TEXT_LAYERS = ("text.blocks.0.attention", "text.blocks.1.attention")


def path_of(keys):
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(tree):
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(first, second, atol=0.0):
    first, second = by_path(first), by_path(second)
    assert first.keys() == second.keys()
    for path, values in first.items():
        np.testing.assert_allclose(values, second[path], atol=atol, rtol=0, err_msg=path)


def with_text(config, **changes):
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))


def test_parameters_are_plain_dicts_with_readable_paths(tiny_params):
    leaves = by_path(tiny_params)
    for path in (
        "image/blocks/0/attention/query/kernel",
        "text/blocks/1/mlp/up/bias",
        "text/token_embedding",
        "image_projection/kernel",
        "log_logit_scale",
    ):
        assert path in leaves
    pending = [tiny_params]
    while pending:
        node = pending.pop()
        assert type(node) is dict
        assert all(type(name) is str for name in node)
        pending += [part for part in node.values() if not isinstance(part, jax.Array)]
    assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in leaves.values())


def test_init_gives_the_parameters_of_the_module_and_depends_on_the_key(tiny_config, tiny_params, compiled):
    module = TwoTower(tiny_config, rngs=nnx.Rngs(jax.random.key(1)))
    assert_close(tiny_params, parameters(module), atol=1e-6)
    other = compiled(tiny_config).init(jax.random.key(2))
    assert np.abs(tiny_params["image_projection"]["kernel"] - other["image_projection"]["kernel"]).max() > 0.1


def test_init_makes_parameters_where_they_belong(tiny_config, tiny_params):
    mesh = Mesh(np.array(jax.devices()), "fsdp")
    model = two_tower(tiny_config)
    abstract = jax.eval_shape(model.init, jax.random.key(1))

    def sharding(keys, leaf):
        return NamedSharding(mesh, PartitionSpec("fsdp") if path_of(keys).endswith("up/kernel") else PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(sharding, abstract)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(1))
    kernel = params["image"]["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * len(jax.devices()) == kernel.size
    assert_close(params, tiny_params, atol=1e-6)


def test_views_and_maps_stay_on_the_device_that_has_their_example(tiny_config, tiny_params):
    mesh = Mesh(np.array(jax.devices()), "data")
    by_row, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    images = jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.uint8, sharding=by_row)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), tiny_params)
    forward = jax.jit(two_tower(tiny_config, capture=Capture(maps=["image.*"])).forward)
    program = forward.lower(params, {"image": images, "augmented_image": images}, None).compile().as_text()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in program


def test_layers_beyond_the_tenth_keep_their_order():
    class Chain(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(1, 1, rngs=rngs) for _ in range(12)])

        def __call__(self, batch, *, key=None):
            return {"kernels": jnp.concatenate([layer.kernel[...] for layer in self.layers])}

    model = functional(Chain)
    params = model.init(jax.random.key(0))
    expected = [params["layers"][str(index)]["kernel"][0, 0] for index in range(12)]
    np.testing.assert_array_equal(model.forward(params, {}, None)["kernels"][:, 0], expected)


def test_a_training_step_compiles_once_and_leaves_its_input_alone(tiny_config, tiny_params, tiny_batch):
    model = two_tower(tiny_config)
    images = {"image": tiny_batch["image"]}

    def loss(params, key):
        outputs = model.forward(params, images, key)
        return outputs["logit_scale"] * outputs["image"]["embeds"].sum()

    @jax.jit
    def step(params, key):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, key))

    before = jax.tree.map(np.array, tiny_params)
    params = tiny_params
    for seed in range(3):
        params = step(params, jax.random.key(seed))
    assert step._cache_size() == 1
    assert_close(tiny_params, before)
    assert params["log_logit_scale"] != before["log_logit_scale"]


@pytest.mark.parametrize("remat", [False, True])
def test_capturing_adds_the_maps_asked_for_and_changes_nothing_else(
    tiny_config, tiny_params, tiny_batch, compiled, remat
):
    config = with_text(tiny_config, remat=remat)
    batch = {name: tiny_batch[name] for name in ("image", "token_ids", "token_mask")}
    outputs = compiled(config, "text.blocks.*.attention").forward(tiny_params, batch, None)
    maps = outputs.pop("attention")
    assert_close(outputs, compiled(config).forward(tiny_params, batch, None), atol=1e-6)
    assert tuple(maps) == TEXT_LAYERS
    hidden = ~np.broadcast_to(tiny_batch["token_mask"][:, None, None, :], (3, 2, 6, 6))
    for probabilities in maps.values():
        assert probabilities.shape == (3, 2, 6, 6)
        assert probabilities.dtype == jnp.float32
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
        assert not np.asarray(probabilities)[hidden].any()


def test_capturing_works_without_jit(tiny_config, tiny_params, tiny_batch, compiled):
    text = {name: tiny_batch[name] for name in ("token_ids", "token_mask")}
    maps = two_tower(tiny_config, capture=Capture(maps=TEXT_LAYERS)).forward(tiny_params, text, None)["attention"]
    expected = compiled(tiny_config, *TEXT_LAYERS).forward(tiny_params, text, None)["attention"]
    assert_close(maps, expected, atol=1e-6)


def test_captured_maps_are_those_of_the_unaugmented_view(tiny_config, tiny_params, tiny_batch, compiled):
    forward = compiled(tiny_config, "*").forward
    image, augmented_image = tiny_batch["image"], tiny_batch["augmented_image"]
    maps = forward(tiny_params, {"image": image, "augmented_image": augmented_image}, None)["attention"]
    expected = forward(tiny_params, {"image": image}, None)["attention"]
    assert len(maps) == 1
    assert_close(maps, expected, atol=1e-6)


def test_gradients_flow_through_captured_maps(tiny_config, tiny_params, tiny_batch):
    model = two_tower(with_text(tiny_config, remat=True, dtype="bfloat16"), capture=Capture(maps=[TEXT_LAYERS[1]]))
    text = {name: tiny_batch[name] for name in ("token_ids", "token_mask")}

    @jax.jit
    @jax.grad
    def gradient(params):
        return (model.forward(params, text, None)["attention"][TEXT_LAYERS[1]] ** 2).sum()

    first, second = (gradient(tiny_params)["text"]["blocks"][layer]["attention"] for layer in "01")
    assert np.abs(second["query"]["kernel"]).max() > 0
    assert np.abs(first["value"]["kernel"]).max() > 0
    assert np.abs(second["output"]["kernel"]).max() == 0


def test_only_the_layers_asked_for_leave_the_model(tiny_config, tiny_params, tiny_batch):
    def maps_out(*capture):
        traced = jax.make_jaxpr(two_tower(tiny_config, capture=Capture(maps=capture)).forward)(
            tiny_params, tiny_batch, None
        )
        return [aval.shape for aval in traced.out_avals if len(aval.shape) == 4]

    assert maps_out() == []
    assert maps_out(TEXT_LAYERS[1]) == [(3, 2, 6, 6)]
    assert maps_out("image.*", "text.blocks.0.*") == [(3, 2, 4, 4), (3, 2, 6, 6)]


def test_a_layer_that_takes_no_part_is_left_out(tiny_config, tiny_params, tiny_batch, compiled):
    outputs = compiled(tiny_config, "*").forward(tiny_params, {"image": tiny_batch["image"]}, None)
    assert set(outputs["attention"]) == {"image.blocks.0.attention"}


def test_attention_paths_lists_what_can_be_captured(tiny_config):
    found = attention_paths(lambda rngs: TwoTower(tiny_config, rngs=rngs))
    assert found == ("image.blocks.0.attention", *TEXT_LAYERS)


def test_a_path_that_matches_nothing_is_refused_with_near_ones(tiny_config):
    with pytest.raises(InputError, match=r"'text\.block\.0\.attention' matches no .*near ones: text\.blocks\.0\."):
        two_tower(tiny_config, capture=Capture(maps=["image.*", "text.block.0.attention"]))


def test_a_model_with_other_state_is_refused():
    class Normalised(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    with pytest.raises(InputError, match=r"norm\.(mean|var) is BatchStat"):
        functional(Normalised)


def test_learned_parameters_ride_along(tiny_config, tiny_params, tiny_batch):
    model = two_tower(tiny_config)
    projection = jax.nn.initializers.normal(1.0)
    learning = with_learned(model, {"projection": lambda key: projection(key, (4, 5)), "mixer": lambda key: jnp.eye(2)})
    init, forward = jax.jit(learning.init), jax.jit(learning.forward)
    params = init(jax.random.key(1))
    assert_close({name: part for name, part in params.items() if name != "learned"}, tiny_params, atol=1e-6)
    images = {"image": tiny_batch["image"]}
    outputs = forward(params, images, None)
    assert_close(outputs.pop("learned"), params["learned"])
    assert_close(outputs, jax.jit(model.forward)(tiny_params, images, None), atol=1e-5)
    other = init(jax.random.key(2))["learned"]["projection"]
    assert np.abs(params["learned"]["projection"] - other).max() > 0.1
    gradient = jax.grad(lambda params: (forward(params, images, None)["learned"]["mixer"] ** 2).sum())(params)
    np.testing.assert_array_equal(gradient["learned"]["mixer"], 2 * np.eye(2))


def test_a_model_learns_in_several_layers_of_names():
    base = Model(lambda key: {"w": jnp.ones(2)}, lambda params, batch, key: {"y": params["w"] * batch["x"]})
    first = with_learned(base, {"one": lambda key: jnp.ones(1)})
    second = with_learned(first, {"two": lambda key: jnp.full(1, 2.0)})
    params = second.init(jax.random.key(0))
    outputs = second.forward(params, {"x": jnp.ones(2)}, None)
    assert set(params) == {"w", "learned"}
    assert {name: float(value[0]) for name, value in outputs["learned"].items()} == {"one": 1.0, "two": 2.0}
    with pytest.raises(InputError, match="already learns one"):
        with_learned(first, {"one": lambda key: jnp.ones(1)}).init(jax.random.key(0))
