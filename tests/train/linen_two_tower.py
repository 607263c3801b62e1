"""A small two-tower model in Flax Linen, with the outputs of repkit's own."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Tower(nn.Module):
    """A two-layer perceptron, dropout between its layers, and a projection to the unit sphere."""

    hidden: int
    embed_dim: int
    dropout: float

    @nn.compact
    def __call__(self, features, *, deterministic):
        hidden = nn.gelu(nn.Dense(self.hidden, name="hidden_layer")(features))
        hidden = nn.Dropout(self.dropout, deterministic=deterministic)(hidden)
        embeds = nn.Dense(self.embed_dim, name="projection")(hidden)
        return {"embeds": embeds * jax.lax.rsqrt(jnp.sum(embeds**2, axis=-1, keepdims=True) + 1e-12)}


class LinenTwoTower(nn.Module):
    """Image and text towers over flattened pixels and the mean of the token embeddings."""

    vocabulary_size: int
    hidden: int
    embed_dim: int
    dropout: float

    @nn.compact
    def __call__(self, batch, *, deterministic):
        outputs: dict[str, Any] = {}
        image_tower = Tower(self.hidden, self.embed_dim, self.dropout, name="image")
        text_tower = Tower(self.hidden, self.embed_dim, self.dropout, name="text")
        embedding = nn.Embed(self.vocabulary_size, self.hidden, name="token_embedding")
        for prefix in ("", "augmented_"):
            if f"{prefix}image" in batch:
                image = batch[f"{prefix}image"]
                pixels = image.reshape(len(image), -1).astype(jnp.float32) / 127.5 - 1.0
                outputs[f"{prefix}image"] = image_tower(pixels, deterministic=deterministic)
            if f"{prefix}token_ids" in batch:
                mask = batch[f"{prefix}token_mask"][..., None].astype(jnp.float32)
                words = embedding(batch[f"{prefix}token_ids"]) * mask
                mean = words.sum(1) / jnp.maximum(mask.sum(1), 1.0)
                outputs[f"{prefix}text"] = text_tower(mean, deterministic=deterministic)
        log_scale = self.param("log_logit_scale", lambda _: jnp.array(math.log(1 / 0.07), jnp.float32))
        return outputs | {"logit_scale": jnp.exp(log_scale)}


def linen_two_tower(
    *, image_size: int, vocabulary_size: int, hidden: int = 32, embed_dim: int = 16, dropout: float = 0.0
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions `init(key) -> params` and `forward(params, batch, key) -> outputs` of the model."""
    module = LinenTwoTower(vocabulary_size, hidden, embed_dim, dropout)

    def init(key):
        example = {
            "image": jnp.zeros((1, image_size, image_size, 3), jnp.uint8),
            "token_ids": jnp.zeros((1, 1), jnp.int32),
            "token_mask": jnp.ones((1, 1), bool),
        }
        return module.init(key, example, deterministic=True)["params"]

    def forward(params, batch, key):
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, batch, deterministic=key is None, rngs=rngs)

    return init, forward
