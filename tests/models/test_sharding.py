"""What a step of two transformers exchanges over a mesh, read from the compiled program."""

import jax
import numpy as np
import pytest

from repkit import losses
from repkit.models.encoders import TextConfig, VisionConfig
from repkit.models.sharding import TRANSFORMER_RULES
from repkit.models.two_tower import TwoTowerConfig, two_tower
from repkit.objective import Objective, Term
from repkit.plan.program import program_costs
from repkit.train.config import TrainConfig, trace_update
from repkit.train.mesh import MeshConfig

ROWS, TOKENS, WIDTH = 256, 64, 64
CONFIG = TwoTowerConfig(
    image=VisionConfig(image_size=32, patch_size=4, width=WIDTH, depth=2, heads=4),
    text=TextConfig(vocabulary_size=256, max_length=16, width=WIDTH, depth=1, heads=4),
    embed_dim=WIDTH,
)
OBJECTIVE = Objective(
    {
        "info_nce": Term(
            losses.info_nce,
            ("outputs.image.embeds", "outputs.text.embeds"),
            keywords={"logit_scale": "outputs.logit_scale"},
        )
    }
)


def exchanges(**axes):
    batch = {
        "image": np.zeros((ROWS, 32, 32, 3), np.uint8),
        "token_ids": np.zeros((ROWS, 16), np.int32),
        "token_mask": np.ones((ROWS, 16), bool),
        "where": np.ones(ROWS, bool),
    }
    model, config = two_tower(CONFIG), TrainConfig(batch_size=ROWS, mesh=MeshConfig(**axes))
    traced = trace_update(
        config, model.init, model.forward, OBJECTIVE, batch, jax.devices()[:4], rules=TRANSFORMER_RULES
    )
    parameters = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    found = program_costs(traced.program.lower().compile().as_text() or "").exchanges
    return found, sum(4 * leaf.size for leaf in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 4}])
def test_a_device_sends_parameters_and_no_activations(axes):
    found, parameter_bytes = exchanges(**axes)
    embedding_bytes = 4 * ROWS * WIDTH
    # Each parameter is gathered for the forward and for the backward pass, and its gradient summed, which counts twice.
    # Of the pairs, the ring sends the rows of both modalities and their gradients.
    assert sum(each.sent for each in found) < 4 * parameter_bytes + 8 * embedding_bytes
    # All of it is less than the activations of one layer would be.
    assert 4 * parameter_bytes + 8 * embedding_bytes < 4 * ROWS * TOKENS * WIDTH


@pytest.mark.slow
def test_a_tensor_axis_sums_activations_six_times_a_layer():
    found, _ = exchanges(data=1, tensor=4)
    tokens = 4 * ROWS * WIDTH * np.array([TOKENS, TOKENS, 16])  # of the layers of both towers
    activations = sum(each.bytes * each.times for each in found if each.bytes >= tokens.min())
    # Forward two sums a layer; backward one for the MLP, and one each for queries, keys and values.
    assert activations == pytest.approx(6 * tokens.sum(), rel=0.01)
