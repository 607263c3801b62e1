"""Two towers, image and text, that meet on one unit sphere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from repkit.checks import InputError
from repkit.models.capture import NOTHING, Capture
from repkit.models.encoders import Encoded, TextConfig, TextTransformer, VisionConfig, VisionTransformer
from repkit.models.functional import Batch, Model, Outputs, functional, require_in_batch
from repkit.models.layers import Dense, fold
from repkit.numerics import normalize

Views = Mapping[str, tuple[str, ...]]
"""From the name of a view in the outputs to the names of its arrays in the batch."""

IMAGE_VIEWS: Views = {"image": ("image",), "augmented_image": ("augmented_image",)}
TEXT_VIEWS: Views = {
    "text": ("token_ids", "token_mask"),
    "augmented_text": ("augmented_token_ids", "augmented_token_mask"),
}


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """A two-tower model.

    Attributes:
        image: the vision transformer.
        text: the text transformer.
        embed_dim: dimensions of the space in which image and text meet.
        independent: give each modality a second projection, for what it does not share with the other.
        initial_logit_scale: factor of the similarities at the start, positive.
        max_logit_scale: its upper bound.

    Raises:
        InputError: for a value outside these ranges.
    """

    image: VisionConfig
    text: TextConfig
    embed_dim: int
    independent: bool = False
    initial_logit_scale: float = 1 / 0.07
    max_logit_scale: float = 100.0

    def __post_init__(self) -> None:
        if self.embed_dim < 1:
            raise InputError(f"embed_dim must be at least 1, got {self.embed_dim}")
        if not 0 < self.initial_logit_scale <= self.max_logit_scale:
            raise InputError(
                "initial_logit_scale must be positive and at most max_logit_scale, "
                f"got {self.initial_logit_scale} and {self.max_logit_scale}"
            )


class TwoTower(nnx.Module):
    """An image and a text encoder with projections to unit vectors of one space, and the scale of their similarities.

    The logit scale is learned as its logarithm, starts at 1/0.07 and is bounded by 100, as in CLIP. CLIP clips the
    parameter after each step; here the output is clipped and the gradient passes as if it were not [ours], so that
    the scale can leave the bound again, and the parameter's update stays linear in the loss's gradient.

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020,
        section 2.4.
    """

    def __init__(self, config: TwoTowerConfig, *, rngs: nnx.Rngs):
        self.max_logit_scale = config.max_logit_scale
        self.image = VisionTransformer(config.image, rngs=rngs)
        self.text = TextTransformer(config.text, rngs=rngs)
        self.image_projection = _projection(config.image.width, config.embed_dim, rngs)
        self.text_projection = _projection(config.text.width, config.embed_dim, rngs)
        self.independent = config.independent
        if config.independent:
            self.image_independent_projection = _projection(config.image.width, config.embed_dim, rngs)
            self.text_independent_projection = _projection(config.text.width, config.embed_dim, rngs)
        self.log_logit_scale = nnx.Param(jnp.array(math.log(config.initial_logit_scale), jnp.float32))

    def __call__(self, batch: Batch, *, key: Key[Array, ""] | None = None) -> Outputs:
        """Embeds whatever is in the batch.

        Args:
            batch: any of `image`, `augmented_image` [b h w 3] uint8, and `token_ids` with `token_mask`,
                `augmented_token_ids` with `augmented_token_mask` [b l].
            key: for dropout; None means none.

        Returns:
            `image`, `augmented_image`, `text`, `augmented_text`, as far as the batch has them, each with `embeds` and,
            if the model has independent projections, `independent`, unit vectors [b embed_dim] float32; and
            `logit_scale`, a float32 scalar.

        Raises:
            InputError: if the batch has none of them, token ids without a mask, or arrays of a wrong shape.
        """
        outputs, _ = self.towers(batch, IMAGE_VIEWS, TEXT_VIEWS, key=key)
        return outputs | {"logit_scale": self.logit_scale()}

    def towers(
        self, batch: Batch, images: Views, texts: Views, *, key: Key[Array, ""] | None
    ) -> tuple[Outputs, dict[str, Float[Array, "b n width"]]]:
        """The embeddings and the encoded tokens of the views that the batch has, by their names.

        Raises:
            InputError: if it has none of them, or a part of one.
        """
        outputs: Outputs = {}
        tokens: dict[str, Float[Array, "b n width"]] = {}
        towers = (("image", self.image, images), ("text", self.text, texts))
        for index, (modality, encoder, views) in enumerate(towers):
            present = {name: arrays for name, arrays in views.items() if arrays[0] in batch}
            if not present:
                continue
            rows = [_rows_of_views(batch, names) for names in zip(*present.values(), strict=True)]
            encoded: Encoded = encoder(*rows, key=fold(key, index))
            outputs |= self._embed(modality, encoded, tuple(present))
            split = encoded.tokens.reshape(-1, len(present), *encoded.tokens.shape[1:])
            tokens |= {name: split[:, index] for index, name in enumerate(present)}
        if not outputs:
            raise InputError(f"the batch must have image or token_ids, got only: {', '.join(sorted(batch))}")
        return outputs, tokens

    def logit_scale(self) -> Float[Array, ""]:
        """`min(exp(log_logit_scale), max_logit_scale)`."""
        log_scale = self.log_logit_scale[...]
        excess = jnp.maximum(log_scale - math.log(self.max_logit_scale), 0.0)
        return jnp.exp(log_scale - jax.lax.stop_gradient(excess))

    def _embed(self, modality: str, encoded: Encoded, views: Sequence[str]) -> Outputs:
        projections = {"embeds": getattr(self, f"{modality}_projection")}
        if self.independent:
            projections["independent"] = getattr(self, f"{modality}_independent_projection")
        shape = (len(encoded.pooled) // len(views), len(views), -1)
        rows = {name: normalize(projection(encoded.pooled)).reshape(shape) for name, projection in projections.items()}
        return {view: {name: values[:, index] for name, values in rows.items()} for index, view in enumerate(views)}


def two_tower(config: TwoTowerConfig, *, capture: Capture = NOTHING) -> Model:
    """The two-tower model as pure functions.

    Args:
        config: the model.
        capture: what its layers show beside the outputs, such as `Capture(maps=["text.blocks.*.attention"])`.

    Returns:
        `init(key) -> params` and `forward(params, batch, key) -> outputs`; the outputs are those of `TwoTower`.

    Raises:
        InputError: if a path of `capture` matches nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> image = VisionConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2)
        >>> text = TextConfig(vocabulary_size=9, max_length=5, width=16, depth=1, heads=2)
        >>> model = two_tower(TwoTowerConfig(image=image, text=text, embed_dim=8), capture=Capture(maps=["image.*"]))
        >>> params = model.init(jax.random.key(0))
        >>> outputs = model.forward(params, {"image": jnp.zeros((3, 8, 8, 3), jnp.uint8)}, None)
        >>> outputs["image"]["embeds"].shape, outputs["attention"]["image.blocks.0.attention"].shape
        ((3, 8), (3, 2, 4, 4))
        >>> print(f"{outputs['logit_scale']:.2f}")
        14.29
    """
    return functional(lambda rngs: TwoTower(config, rngs=rngs), capture=capture)


def _projection(width: int, embed_dim: int, rngs: nnx.Rngs) -> Dense:
    return Dense(width, embed_dim, use_bias=False, dtype=jnp.float32, rngs=rngs)


def _rows_of_views(batch: Batch, names: Sequence[str]) -> Array:
    """The views of each example as consecutive rows, [b * views ...].

    All views go through the encoder in one pass, as fast as in several and compiled in half the time. As consecutive
    rows, and not one view after the other, they stay on the device that has their example.
    """
    require_in_batch(batch, names)
    shape = batch[names[0]].shape
    if any(batch[name].shape != shape for name in names):
        given = ", ".join(str(list(batch[name].shape)) for name in names)
        raise InputError(f"{' and '.join(names)} must have one shape, got {given}")
    return jnp.stack([batch[name] for name in names], axis=1).reshape(len(names) * shape[0], *shape[1:])
