"""Small two-tower models, compiled once for all tests, and a batch for them."""

import functools

import jax
import numpy as np
import pytest

from repkit.models import Capture, Model, TextConfig, TwoTowerConfig, VisionConfig, two_tower


@pytest.fixture(scope="session")
def demo_config():
    return TwoTowerConfig(
        image=VisionConfig(image_size=16, patch_size=4, width=64, depth=2, heads=4),
        text=TextConfig(vocabulary_size=40, max_length=16, width=64, depth=2, heads=4),
        embed_dim=64,
    )


@pytest.fixture(scope="session")
def tiny_config():
    return TwoTowerConfig(
        image=VisionConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2),
        text=TextConfig(vocabulary_size=12, max_length=6, width=8, depth=2, heads=2),
        embed_dim=8,
    )


@functools.cache
def _compiled(config, maps):
    model = two_tower(config, capture=Capture(maps=maps))
    return Model(jax.jit(model.init), jax.jit(model.forward))


@pytest.fixture(scope="session")
def compiled():
    """`compiled(config, *maps)`: `two_tower` under jit; one object for a model, so that it compiles once."""
    return lambda config, *maps: _compiled(config, maps)


@pytest.fixture(scope="session")
def tiny_params(tiny_config, compiled):
    return compiled(tiny_config).init(jax.random.key(1))


@pytest.fixture
def tiny_batch():
    random = np.random.default_rng(0)
    lengths = np.array([6, 1, 4])
    return {
        "image": random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
        "token_ids": random.integers(0, 12, (3, 6), dtype=np.int32),
        "token_mask": np.arange(6) < lengths[:, None],
        "augmented_image": random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
        "augmented_token_ids": random.integers(0, 12, (3, 6), dtype=np.int32),
        "augmented_token_mask": np.arange(6) < lengths[::-1, None],
        "where": np.ones(3, bool),
    }
