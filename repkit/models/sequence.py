"""Image and text to text: an encoder over patches and tokens together, and a decoder that attends to both."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from repkit.checks import InputError
from repkit.models.capture import NOTHING, Capture
from repkit.models.decoder import Decoder
from repkit.models.embeddings import Dtype, embed, embedding, patches, token_logits
from repkit.models.encoders import Transformer, TransformerConfig, VisionConfig, require_positive
from repkit.models.functional import Batch, Outputs, Params, functional, require_in_batch, restorer
from repkit.models.generation import Generated, make_generate
from repkit.models.layers import Dense, LayerNorm, fold, padding_mask

_SOURCE = ("image", "source_ids", "source_mask")
_TARGET = ("target_ids", "target_mask")
_IMAGE, _TEXT = 0, 1


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """An encoder-decoder from an image and a text to a text.

    Attributes:
        image_size: height and width of the images, in pixels.
        patch_size: height and width of a patch; divides `image_size`.
        vocabulary_size: number of token ids, of source and target alike.
        max_source_length: longest source text, in tokens.
        max_target_length: longest target text, in tokens, the end token included.
        width: features of a token; a multiple of `heads`.
        encoder_depth: number of encoder blocks.
        decoder_depth: number of decoder blocks.
        heads: attention heads of a block.
        mlp_ratio: width of the MLP's hidden layer over `width`.
        dropout: share of values dropped from the embedded tokens and from each residual branch, in [0, 1).
        dtype: of the arithmetic; parameters, softmax, norm statistics and logits are float32 always.
        remat: recompute each block in the backward pass: about a third more time, activations of one block at a time.
        begin_id: the token before a target's first.
        end_id: the token that ends a target.
        pad_id: the token behind it.

    Raises:
        InputError: for a value outside these ranges.
    """

    image_size: int
    patch_size: int
    vocabulary_size: int
    max_source_length: int
    max_target_length: int
    width: int
    encoder_depth: int
    decoder_depth: int
    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    dtype: Dtype = "float32"
    remat: bool = False
    begin_id: int
    end_id: int
    pad_id: int

    def __post_init__(self) -> None:
        require_positive(self, "max_source_length", "max_target_length", "encoder_depth", "decoder_depth")
        if self.vocabulary_size < 3:
            raise InputError(f"vocabulary_size must be at least 3, got {self.vocabulary_size}")
        for name in ("begin_id", "end_id", "pad_id"):
            if not 0 <= getattr(self, name) < self.vocabulary_size:
                raise InputError(
                    f"{name} must be in [0, vocabulary_size={self.vocabulary_size}), got {getattr(self, name)}"
                )
        if self.begin_id == self.end_id:
            raise InputError(f"begin_id and end_id must differ, got {self.begin_id} for both")
        _ = self.encoder, self.decoder

    @property
    def encoder(self) -> VisionConfig:
        """The encoder's blocks and the patches of its image."""
        return VisionConfig(
            image_size=self.image_size, patch_size=self.patch_size, depth=self.encoder_depth, **self._blocks
        )

    @property
    def decoder(self) -> TransformerConfig:
        """The decoder's blocks."""
        return TransformerConfig(depth=self.decoder_depth, **self._blocks)

    @property
    def _blocks(self) -> dict[str, Any]:
        names = ("width", "heads", "mlp_ratio", "dropout", "dtype", "remat")
        return {name: getattr(self, name) for name in names}


class SequenceToSequence(nnx.Module):
    """Patches of an image and tokens of a text, in one encoder, to the tokens of a text.

    As in VL-T5, image and text attend to one another in every block of the encoder, each token carries a learned
    embedding of its position and of its kind, image or text, and the token embedding of source and target is also the
    output layer. Ours are the patches in place of detected objects, absolute positions, norms of the embedded patches
    and tokens, and pre-norm blocks with GELU.

    References:
        Cho et al., Unifying Vision-and-Language Tasks via Text Generation, arXiv 2102.02779, section 3.
    """

    def __init__(self, config: SequenceConfig, *, rngs: nnx.Rngs):
        self.config = config
        patch_count = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = Dense(3 * config.patch_size**2, config.width, dtype=config.dtype, rngs=rngs)
        # All tokens begin at unit size, and so do a patch and its place: beside pixels, places of the usual 0.02 are
        # not seen for thousands of steps, and neither are words of that size beside what attention adds to them.
        self.patch_norm = LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.text_norm = LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.image_positions = embedding(rngs, patch_count, config.width, std=1.0)
        # The token embedding is the output layer too: logits of unit size let a gradient reach the image from the first
        # step on, where 0.02 kept digits from being learned at all.
        text = functools.partial(embedding, rngs, width=config.width, std=config.width**-0.5)
        self.token_embedding = text(config.vocabulary_size)
        self.kinds = text(2)
        self.source_positions = text(config.max_source_length)
        self.target_positions = text(config.max_target_length)
        self.encoder = Transformer(config.encoder, rngs=rngs)
        self.decoder = Decoder(config.decoder, rngs=rngs)

    def __call__(self, batch: Batch, *, key: Key[Array, ""] | None = None) -> Outputs:
        """The logits of each target token, given the source and the target tokens before it.

        Args:
            batch: `image` uint8 [b h w 3], `source_ids` [b s] with `source_mask`, `target_ids` [b t] with
                `target_mask`, the end token included and the begin token not; padding follows the tokens. A token id
                outside the vocabulary gives NaN.
            key: for dropout; None means none.

        Returns:
            `logits` [b t vocabulary_size] float32, of which `logits[:, i]` is for `target_ids[:, i]`; `masks` with
            `encoder` [b n], image tokens first, and `decoder` [b t], True for real tokens.

        Raises:
            InputError: if the batch lacks one of them, or it has a wrong shape.
        """
        require_in_batch(batch, _SOURCE + _TARGET)
        _require_text(batch, "target", self.config.max_target_length)
        context, context_mask = self.encode(batch, key=fold(key, 0))
        begin = jnp.full((len(batch["target_ids"]), 1), self.config.begin_id, jnp.int32)
        shifted = jnp.concatenate([begin, batch["target_ids"][:, :-1]], axis=1)
        tokens = self._embed(shifted, self.target_positions[: shifted.shape[1]])
        logits = self._logits(self.decoder(tokens, context, context_mask, fold(key, 1)))
        return {"logits": logits, "masks": {"encoder": context_mask, "decoder": batch["target_mask"]}}

    def encode(
        self, batch: Batch, *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b n width"], Bool[Array, "b n"]]:
        """The encoder's tokens, image tokens first, and which of them are real."""
        _require_text(batch, "source", self.config.max_source_length)
        config, image, token_ids = self.config, batch["image"], batch["source_ids"]
        pixels = patches(image, config.image_size, config.patch_size, config.dtype)
        seen = self.patch_norm(self.patch_embedding(pixels))
        seen = seen + (self.image_positions[...] + self.kinds[_IMAGE]).astype(seen.dtype)
        read = self._embed(token_ids, self.source_positions[: token_ids.shape[1]] + self.kinds[_TEXT])
        mask = jnp.concatenate([jnp.ones(seen.shape[:2], bool), batch["source_mask"]], axis=1)
        tokens = self.encoder.transform(jnp.concatenate([seen, read], axis=1), padding_mask(mask), key=key)
        return tokens, mask

    def generate(
        self, batch: Batch, *, beams: int, max_length: int, length_penalty: float | Float[Array, ""]
    ) -> Generated:
        """The targets that beam search finds for the sources of a batch; see `beam_search`."""

        def embed_at(token_ids: Int[Array, "b beams"], position: Int[Array, ""]) -> Float[Array, "b beams width"]:
            return self._embed(token_ids, jax.lax.dynamic_slice_in_dim(self.target_positions[...], position, 1))

        return self.decoder.search(
            *self.encode(batch),
            embed=embed_at,
            predict=self._logits,
            beams=beams,
            max_length=max_length,
            begin_id=self.config.begin_id,
            end_id=self.config.end_id,
            pad_id=self.config.pad_id,
            length_penalty=length_penalty,
        )

    def _embed(self, token_ids: Int[Array, "b l"], added: Float[Array, "#l width"]) -> Float[Array, "b l width"]:
        return self.text_norm(embed(self.token_embedding[...], token_ids) + added)

    def _logits(self, tokens: Float[Array, "b l width"]) -> Float[Array, "b l v"]:
        return token_logits(tokens, self.token_embedding[...])


class SequenceModel(NamedTuple):
    """An encoder-decoder as pure functions.

    Attributes:
        init: from a typed key to parameters.
        forward: `forward(params, batch, key) -> outputs`, by teacher forcing; those of `SequenceToSequence`.
        generate: `generate(params, batch, *, beams=1, max_length=None, length_penalty=0.0) -> Generated`, one jitted
            program with a cache of keys and values. The batch needs a source only; `max_length` is at most, and by
            default, the configuration's `max_target_length`. See `repkit.models.generation.beam_search`.
    """

    init: Callable[[Key[Array, ""]], Params]
    forward: Callable[[Params, Batch, Key[Array, ""] | None], Outputs]
    generate: Callable[..., Generated]


@functools.cache
def sequence_to_sequence(config: SequenceConfig, *, capture: Capture = NOTHING) -> SequenceModel:
    """The encoder-decoder as pure functions; one and the same ones for equal arguments, so that JAX knows their traces.

    Args:
        config: the model.
        capture: what its layers show beside the outputs of `forward`; attention layers are
            `encoder.blocks.I.attention`, `decoder.blocks.I.self_attention` and `decoder.blocks.I.cross_attention`,
            hidden states `encoder.blocks.I` and `decoder.blocks.I`.

    Raises:
        InputError: if a path of `capture` matches nothing.

    Example:
        >>> config = SequenceConfig(
        ...     image_size=8, patch_size=4, vocabulary_size=9, max_source_length=5, max_target_length=6, width=16,
        ...     encoder_depth=1, decoder_depth=1, heads=2, begin_id=1, end_id=2, pad_id=0,
        ... )
        >>> model = sequence_to_sequence(config, capture=Capture(maps=["decoder.blocks.*.cross_attention"]))
        >>> params = jax.jit(model.init)(jax.random.key(0))
        >>> batch = {
        ...     "image": jnp.zeros((3, 8, 8, 3), jnp.uint8),
        ...     "source_ids": jnp.ones((3, 5), jnp.int32), "source_mask": jnp.ones((3, 5), bool),
        ...     "target_ids": jnp.ones((3, 6), jnp.int32), "target_mask": jnp.ones((3, 6), bool),
        ... }
        >>> outputs = jax.jit(model.forward)(params, batch, None)
        >>> outputs["logits"].shape, outputs["attention"]["decoder.blocks.0.cross_attention"].shape
        ((3, 6, 9), (3, 2, 6, 9))
        >>> model.generate(params, batch, beams=2).token_ids.shape
        (3, 6)
    """

    def build(rngs: nnx.Rngs) -> SequenceToSequence:
        return SequenceToSequence(config, rngs=rngs)

    model = functional(build, capture=capture)
    generate = make_generate(restorer(build), source=_SOURCE, longest=config.max_target_length)
    return SequenceModel(model.init, model.forward, generate)


def _require_text(batch: Batch, name: str, max_length: int) -> None:
    ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
    if ids.shape != mask.shape or ids.ndim != 2 or len(ids) != len(batch["image"]):
        raise InputError(
            f"{name}_ids and {name}_mask must have one shape [b l] with b={len(batch['image'])} as the images have, "
            f"got {list(ids.shape)} and {list(mask.shape)}"
        )
    if ids.shape[1] > max_length:
        raise InputError(f"a {name} text has at most max_{name}_length={max_length} tokens, got {ids.shape[1]}")
