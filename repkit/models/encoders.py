"""Encoders of one modality: a vision transformer over image patches and a text transformer over tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from repkit.checks import InputError, require_choice, unknown_name
from repkit.models.embeddings import Dtype, embed, embedding, patches
from repkit.models.layers import Block, Dense, LayerNorm, call, causal_mask, dropout, fold, padding_mask


class Encoded(NamedTuple):
    """What an encoder makes of its input.

    Attributes:
        pooled: [b width] float32, one vector for each example.
        tokens: [b n width] in the compute dtype, after the final norm.
    """

    pooled: Float[Array, "b width"]
    tokens: Float[Array, "b n width"]


def require_positive(config: object, *names: str) -> None:
    """Raises `InputError` unless these fields of a configuration are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What vision and text transformers have in common.

    Attributes:
        width: features of a token; a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads of a block.
        mlp_ratio: width of the MLP's hidden layer over `width`.
        dropout: share of values dropped from the embedded tokens and from each residual branch, in [0, 1).
        dtype: of the arithmetic; parameters, softmax and norm statistics are float32 always.
        remat: recompute each block in the backward pass: about a third more time, activations of one block at a time.

    Raises:
        InputError: for a value outside these ranges.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    dtype: Dtype = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "width", "depth", "heads", "mlp_ratio")
        if self.width % self.heads:
            raise InputError(f"width must be a multiple of heads, got width={self.width}, heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.dtype not in get_args(Dtype):
            raise unknown_name("dtype", self.dtype, get_args(Dtype))


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerConfig):
    """A vision transformer.

    Attributes:
        image_size: height and width of the images, in pixels.
        patch_size: height and width of a patch; divides `image_size`.
        pooling: "mean" over the patches, or "cls", a learned token put in front of them.
        patches: "projected" linearly, as in the reference; or "normalized", with a layer norm after the projection and
            positions of the same size at the start (standard deviation 1), because beside projected pixels those of
            the usual 0.02 are not seen for thousands of steps [ours].

    Raises:
        InputError: for a value outside these ranges.

    Example:
        >>> VisionConfig(image_size=30, patch_size=4, width=64, depth=2, heads=4)
        Traceback (most recent call last):
        ...
        repkit.checks.InputError: image_size must be a multiple of patch_size, got image_size=30, patch_size=4
    """

    image_size: int
    patch_size: int
    pooling: Literal["mean", "cls"] = "mean"
    patches: Literal["projected", "normalized"] = "projected"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "image_size", "patch_size")
        if self.image_size % self.patch_size:
            raise InputError(
                "image_size must be a multiple of patch_size, "
                f"got image_size={self.image_size}, patch_size={self.patch_size}"
            )
        require_choice("pooling", self.pooling, ("mean", "cls"))
        require_choice("patches", self.patches, ("projected", "normalized"))


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A text transformer.

    Attributes:
        vocabulary_size: number of token ids.
        max_length: longest text, in tokens.
        causal: whether a token sees only itself and the tokens before it.
        pooling: "mean" over the real tokens, "eos", the last real token, or "cls", the first token.
        tokens: "embedded" with vectors that are small at the start (standard deviation 0.02); or "normalized", with
            vectors of unit length and a layer norm after them: where the token embedding is an output layer too, its
            logits then have unit size from the first step on [ours].

    Raises:
        InputError: for a value outside these ranges, and for "cls" with `causal`, where the first token sees nothing
            of the text.
    """

    vocabulary_size: int
    max_length: int
    causal: bool = False
    pooling: Literal["mean", "eos", "cls"] = "mean"
    tokens: Literal["embedded", "normalized"] = "embedded"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "vocabulary_size", "max_length")
        require_choice("tokens", self.tokens, ("embedded", "normalized"))
        if self.pooling not in ("mean", "eos", "cls"):
            raise unknown_name("pooling", self.pooling, ("mean", "eos", "cls"))
        if self.causal and self.pooling == "cls":
            raise InputError("pooling 'cls' takes the first token, which sees no other one when causal=True; use 'eos'")


VIT_B_16 = VisionConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12, pooling="cls")
"""ViT-B/16 of Dosovitskiy et al., arXiv 2010.11929 (85.8 million parameters)."""

CLIP_TEXT_B = TextConfig(vocabulary_size=49408, max_length=77, width=512, depth=12, heads=8, causal=True, pooling="eos")
"""The text transformer beside it in CLIP, Radford et al., arXiv 2103.00020 (63.2 million parameters)."""

VIT_L_14 = VisionConfig(image_size=224, patch_size=14, width=1024, depth=24, heads=16, pooling="cls")
"""ViT-L/14 of CLIP (303.2 million parameters)."""

CLIP_TEXT_L = TextConfig(
    vocabulary_size=49408, max_length=77, width=768, depth=12, heads=12, causal=True, pooling="eos"
)
"""The text transformer beside it (123.1 million parameters)."""


class Transformer(nnx.Module):
    """Dropout, `depth` pre-norm blocks and a final norm over embedded tokens.

    Args:
        config: the blocks.
        block: their class, `repkit.models.layers.Block` or one that is made alike.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: TransformerConfig, *, block: Callable[..., nnx.Module] = Block, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.remat = config.remat
        sizes = config.width, config.heads, config.mlp_ratio * config.width
        self.blocks: nnx.List[Any] = nnx.List(
            [block(*sizes, dropout=config.dropout, dtype=config.dtype, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = LayerNorm(config.width, dtype=config.dtype, rngs=rngs)

    def transform(
        self, tokens: Float[Array, "b n width"], *given: Array | None, key: Key[Array, ""] | None
    ) -> Float[Array, "b n width"]:
        """The tokens after all blocks, each of which is called with them, what is `given`, and a key of its own."""
        tokens = dropout(tokens, self.dropout, fold(key, len(self.blocks)))
        run = nnx.remat(call) if self.remat else call
        for index, block in enumerate(self.blocks):
            tokens = run(block, tokens, *given, fold(key, index))
        return self.norm(tokens)


class VisionTransformer(Transformer):
    """Images to tokens, one for each patch, and a pooled vector.

    Example:
        >>> config = VisionConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2)
        >>> encoder = VisionTransformer(config, rngs=nnx.Rngs(0))
        >>> encoder(jnp.zeros((3, 8, 8, 3), jnp.uint8)).tokens.shape
        (3, 4, 16)
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.config = config
        patch_count, pixels = (config.image_size // config.patch_size) ** 2, 3 * config.patch_size**2
        self.patch_embedding = Dense(pixels, config.width, dtype=config.dtype, rngs=rngs)
        position_std = 0.02
        if config.patches == "normalized":
            self.patch_norm = LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
            position_std = 1.0
        self.positions = embedding(rngs, patch_count + (config.pooling == "cls"), config.width, std=position_std)
        if config.pooling == "cls":
            self.cls = embedding(rngs, 1, config.width)

    def __call__(self, image: UInt8[Array, "b h w 3"], *, key: Key[Array, ""] | None = None) -> Encoded:
        """Encodes images.

        Args:
            image: [b image_size image_size 3], 0 to 255; scaled to [-1, 1] here.
            key: for dropout; None means none.

        Raises:
            InputError: for images of another shape or dtype.
        """
        pixels = patches(image, self.config.image_size, self.config.patch_size, self.config.dtype)
        tokens = self.patch_embedding(pixels)
        if self.config.patches == "normalized":
            tokens = self.patch_norm(tokens)
        if self.config.pooling == "cls":
            cls = jnp.broadcast_to(self.cls[...].astype(tokens.dtype), (len(tokens), 1, self.config.width))
            tokens = jnp.concatenate([cls, tokens], axis=1)
        tokens = self.transform(tokens + self.positions[...].astype(tokens.dtype), None, key=key)
        pooled = tokens[:, 0].astype(jnp.float32) if self.config.pooling == "cls" else tokens.mean(1, dtype=jnp.float32)
        return Encoded(pooled, tokens)


class TextTransformer(Transformer):
    """Token ids to contextual tokens and a pooled vector, which padding does not change.

    Example:
        >>> config = TextConfig(vocabulary_size=9, max_length=5, width=16, depth=1, heads=2)
        >>> encoder = TextTransformer(config, rngs=nnx.Rngs(0))
        >>> encoder(jnp.ones((3, 5), jnp.int32), jnp.ones((3, 5), bool)).pooled.shape
        (3, 16)
    """

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.config = config
        self.token_embedding = self.table(config.vocabulary_size, rngs)
        self.positions = self.table(config.max_length, rngs)
        if config.tokens == "normalized":
            self.token_norm = LayerNorm(config.width, dtype=config.dtype, rngs=rngs)

    def __call__(
        self, token_ids: Int[Array, "b l"], token_mask: Bool[Array, "b l"], *, key: Key[Array, ""] | None = None
    ) -> Encoded:
        """Encodes texts.

        Args:
            token_ids: [b l], l at most `max_length`. An id outside the vocabulary gives NaN, so that it is noticed.
            token_mask: True for real tokens. The pooled vector of a row without any is zero.
            key: for dropout; None means none.

        Raises:
            InputError: for texts that are too long, or a mask of another shape.
        """
        if token_ids.shape != token_mask.shape or token_ids.ndim != 2:
            raise InputError(
                "token_ids and token_mask must have one shape [b l], "
                f"got {list(token_ids.shape)} and {list(token_mask.shape)}"
            )
        length = token_ids.shape[1]
        if length > self.config.max_length:
            raise InputError(f"a text has at most max_length={self.config.max_length} tokens, got {length}")
        tokens = self.embed(token_ids, self.positions[:length])
        mask = padding_mask(token_mask)
        if self.config.causal:
            mask = mask & causal_mask(length)
        tokens = self.transform(tokens, mask, key=key)
        return Encoded(pool(tokens, token_mask, self.config.pooling), tokens)

    def table(self, rows: int, rngs: nnx.Rngs) -> nnx.Param[Array]:
        """A table of vectors of the size that this encoder's have at the start."""
        std = self.config.width**-0.5 if self.config.tokens == "normalized" else 0.02
        return embedding(rngs, rows, self.config.width, std=std)

    def embed(self, token_ids: Int[Array, "b l"], positions: Float[Array, "#l width"]) -> Float[Array, "b l width"]:
        """Tokens at their positions, before any block."""
        tokens = embed(self.token_embedding[...], token_ids) + positions
        return self.token_norm(tokens) if self.config.tokens == "normalized" else tokens.astype(self.config.dtype)


def pool(
    tokens: Float[Array, "b l width"], token_mask: Bool[Array, "b l"], pooling: Literal["mean", "eos", "cls"]
) -> Float[Array, "b width"]:
    """One float32 vector for each text; zero for one without any real token."""
    if pooling == "mean":
        pooled = token_mask
    elif pooling == "cls":
        pooled = token_mask & (jnp.arange(token_mask.shape[1]) == 0)
    else:
        real_from_here = jnp.cumsum(token_mask[:, ::-1], axis=1)[:, ::-1]
        pooled = token_mask & (real_from_here == 1)
    weights = pooled / jnp.maximum(pooled.sum(1, keepdims=True), 1)
    return jnp.einsum("bl,bld->bd", weights.astype(jnp.float32), tokens.astype(jnp.float32))
