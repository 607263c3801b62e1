"""Embeddings of a data set: order, masked rows, devices, compilation."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repkit.checks import InputError
from repkit.evaluate import embed, token_batches

ROWS = 8


def forward(params, batch, key):
    """A linear two-tower that shows what it was given."""
    assert key is None
    outputs = {}
    for name in batch:
        assert name in ("image", "token_ids", "token_mask"), name
    if "image" in batch:
        outputs["image"] = {"embeds": batch["image"].reshape(len(batch["image"]), -1) @ params["image"]}
    if "token_ids" in batch:
        counts = jnp.where(batch["token_mask"], batch["token_ids"], 0)
        outputs["text"] = {"embeds": counts.astype(jnp.bfloat16)}
    return outputs


@pytest.fixture
def params():
    return {"image": jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)}


def host_batches(valid):
    """Batches of ROWS rows, of which the last `valid[i]` of batch i are valid."""
    rng = np.random.default_rng(1)
    for number, count in enumerate(valid):
        yield {
            "image": rng.integers(0, 256, (ROWS, 2, 2, 3), dtype=np.uint8),
            "augmented_image": np.zeros((ROWS, 2, 2, 3), np.uint8),
            "token_ids": rng.integers(0, 100, (ROWS, 4), dtype=np.int32),
            "token_mask": np.ones((ROWS, 4), bool),
            "example_id": np.arange(ROWS, dtype=np.int32) + ROWS * number,
            "caption_id": np.arange(ROWS, dtype=np.int32) % 3,
            "label": np.arange(ROWS, dtype=np.int32) % 2,
            "where": np.arange(ROWS) >= ROWS - count,
        }


def test_valid_rows_come_back_in_order(params):
    batches = list(host_batches([8, 0, 5]))
    found = embed(forward, params, batches)
    where = np.concatenate([batch["where"] for batch in batches])
    for name in ("example_id", "caption_id", "label"):
        np.testing.assert_array_equal(found[name], np.concatenate([batch[name] for batch in batches])[where])
    images = np.concatenate([batch["image"] for batch in batches])[where].reshape(13, 12)
    np.testing.assert_allclose(found["image_embeds"], images @ np.asarray(params["image"]), rtol=1e-5, atol=1e-3)
    tokens = np.concatenate([batch["token_ids"] for batch in batches])[where]
    np.testing.assert_array_equal(found["text_embeds"], tokens)
    assert found["text_embeds"].dtype == np.float32
    assert all(isinstance(value, np.ndarray) for value in found.values())


def test_batches_may_be_sharded_over_a_mesh(params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    placed = []

    def place(batch):
        placed.append(batch)
        return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sharded = embed(forward, everywhere, host_batches([8, 5]), place=place)
    plain = embed(forward, params, host_batches([8, 5]))
    assert len(placed) == 2
    assert sharded.keys() == plain.keys()
    for name in plain:
        np.testing.assert_allclose(sharded[name], plain[name], rtol=1e-6, atol=1e-3)


def test_the_model_is_traced_once_over_batches_and_calls(params):
    traces = []

    def counting_forward(params, batch, key):
        traces.append(1)
        return forward(params, batch, key)

    embed(counting_forward, params, host_batches([8, 8, 3]))
    embed(counting_forward, params, host_batches([8, 2]))
    assert len(traces) == 1


def test_images_alone(params):
    batches = [{"image": batch["image"], "where": batch["where"]} for batch in host_batches([2])]
    found = embed(forward, params, batches)
    assert found.keys() == {"image_embeds"}
    assert found["image_embeds"].shape == (2, 3)


def test_texts_in_token_batches_keep_their_order(params):
    token_ids = np.arange(44, dtype=np.int32).reshape(11, 4)
    batches = list(token_batches(token_ids, np.ones((11, 4), bool), batch_size=4))
    assert [batch["token_ids"].shape for batch in batches] == [(4, 4)] * 3
    np.testing.assert_array_equal(embed(forward, params, batches)["text_embeds"], token_ids)


@pytest.mark.parametrize(("valid", "said"), [([], "got none"), ([0, 0], "every row is masked out")])
def test_nothing_to_embed_is_said(params, valid, said):
    with pytest.raises(InputError, match=said):
        embed(forward, params, host_batches(valid))


TWO_PROCESSES = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from repkit.evaluate import embed

sharding = NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
rows = np.arange(2) + 2 * int(sys.argv[2])
batch = {"image": rows[:, None].astype(np.float32), "example_id": rows, "where": rows != 1}


def forward(params, batch, key):
    return {"image": {"embeds": params * batch["image"]}}


def place(batch):
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


found = embed(forward, 10.0, [batch], place=place)
print("found", found["image_embeds"].ravel().tolist(), found["example_id"].tolist())
"""


@pytest.mark.slow
def test_every_process_gets_the_rows_of_all():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, port, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for printed, errors in outputs:
        # The first row of process 0 is 0, its second is masked.
        assert "found [0.0, 20.0, 30.0] [0, 2, 3]" in printed, errors
