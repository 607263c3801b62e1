"""Two towers and a multimodal encoder on top of them, in which the text attends to the image (ALBEF's shape)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from repkit.checks import InputError, require_range
from repkit.models.capture import NOTHING, Capture
from repkit.models.decoder import Decoder, DecoderBlock
from repkit.models.embeddings import token_logits
from repkit.models.encoders import Transformer, TransformerConfig, pool, require_positive
from repkit.models.functional import Batch, Outputs, Params, functional, require_in_batch, restorer
from repkit.models.generation import Generated, make_generate
from repkit.models.layers import Dense, LayerNorm, fold, padding_mask
from repkit.models.masking import MaskedTokens, mask_tokens
from repkit.models.two_tower import IMAGE_VIEWS, TEXT_VIEWS, TwoTower, TwoTowerConfig, Views

_IMAGES: Views = {**IMAGE_VIEWS, "second_image": ("second_image",)}
_MASKED: Views = {"masked_text": ("masked_token_ids", "token_mask")}
_SOURCE: Views = {"text": ("source_ids", "source_mask")}
_SOURCE_ARRAYS = ("image", "source_ids", "source_mask")


class Negatives(Protocol):
    """Places of negatives among all rows, -1 where there is none."""

    @property
    def text_of_image(self) -> Int[Array, " b"]: ...

    @property
    def image_of_text(self) -> Int[Array, " b"]: ...


DrawNegatives = Callable[..., Negatives]
"""`draw(image_embeds, text_embeds, *, logit_scale, labels, key, where)`, such as `repkit.losses.hard_negatives`."""


@dataclass(frozen=True, kw_only=True)
class FusionConfig(TwoTowerConfig):
    """A fusion model: two towers, whose widths are equal, and what is on top of them.

    Attributes:
        depth: blocks of the multimodal encoder; all else of them is as in the text tower.
        matching: whether there is a head that tells whether text and image belong together.
        mask_rate: share of the tokens that the model has to name from the rest and the image; 0 for no such head.
        classes: classes of the classification head; 0 for none.
        images: images of an example, 1 or 2 (`image` and `second_image`); two are for the classification head only.
        decoder_depth: blocks of the decoder that generates text; 0 for none.
        max_target_length: longest generated text, in tokens, the end token included; only with a decoder.
        begin_id: the token before a text's first.
        end_id: the token that ends a text.
        pad_id: the token behind it.
        mask_id: the token that stands for one to be named.

    Raises:
        InputError: for a value outside these ranges, for towers of two widths, for a causal text tower, and for two
            images with a head that reads one.
    """

    depth: int
    matching: bool = True
    mask_rate: float = 0.15
    classes: int = 0
    images: int = 1
    decoder_depth: int = 0
    max_target_length: int = 0
    begin_id: int
    end_id: int
    pad_id: int
    mask_id: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "depth", *(("max_target_length",) if self.decoder_depth else ()))
        for name, most in (("mask_rate", 1), ("classes", None), ("decoder_depth", None)):
            require_range("FusionConfig", name, getattr(self, name), at_least=0, at_most=most)
        require_range("FusionConfig", "images", self.images, at_least=1, at_most=2)
        if self.images > 1 and (self.matching or self.mask_rate or self.decoder_depth):
            raise InputError(
                "images=2 is for classification: set matching=False, mask_rate=0 and decoder_depth=0, got "
                f"matching={self.matching}, mask_rate={self.mask_rate}, decoder_depth={self.decoder_depth}"
            )
        if self.image.width != self.text.width:
            raise InputError(
                "image.width and text.width of a fusion model must be equal, "
                f"got {self.image.width} and {self.text.width}"
            )
        if self.text.causal:
            raise InputError("the text tower of a fusion model must not be causal: a token reads the whole text")
        for name in ("begin_id", "end_id", "pad_id", "mask_id"):
            if not 0 <= getattr(self, name) < self.text.vocabulary_size:
                raise InputError(
                    f"{name} must be in [0, text.vocabulary_size={self.text.vocabulary_size}), "
                    f"got {getattr(self, name)}"
                )
        if self.mask_id in (self.begin_id, self.end_id, self.pad_id):
            raise InputError(f"mask_id must be a token of its own, got {self.mask_id}")

    def blocks(self, depth: int) -> TransformerConfig:
        """Blocks as those of the text tower."""
        names = ("width", "heads", "mlp_ratio", "dropout", "dtype", "remat")
        return TransformerConfig(depth=depth, **{name: getattr(self.text, name) for name in names})


class Fusion(TwoTower):
    """Two towers that meet on the unit sphere, and a multimodal encoder whose text tokens attend to the image's.

    As in ALBEF, the towers' contrastive scores choose the hard negatives on which the multimodal encoder learns to
    match, and it fills in masked tokens. Ours are pre-norm blocks, one pass of the multimodal encoder for all pairs of
    an example, a decoder that attends to the image's tokens beside the multimodal ones, and pooling as in the text
    tower. Two images are each read with the text, as one image is, and the classification head compares what comes of
    them: it takes u, v, |u - v| and u v. (In ALBEF every block is doubled, to attend to both images; ours keeps what
    the encoder has learned of one image. Reading each by itself is UNITER's "Pair", the comparison InferSent's.)

    References:
        Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", arXiv
        2107.07651, sections 3.1, 3.2 and 5.
        Chen et al., "UNITER: UNiversal Image-TExt Representation Learning", arXiv 1909.11740.
        Conneau et al., "Supervised Learning of Universal Sentence Representations from Natural Language Inference
        Data", arXiv 1705.02364.
    """

    def __init__(self, config: FusionConfig, *, negatives: DrawNegatives | None, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.config = config
        self.negatives = negatives
        width, dtype = config.text.width, config.text.dtype
        self.multimodal = Transformer(config.blocks(config.depth), block=DecoderBlock, rngs=rngs)
        if config.matching:
            self.matching_head = Dense(width, 2, dtype=jnp.float32, rngs=rngs)
        if config.mask_rate:
            self.mask_hidden = Dense(width, width, dtype=dtype, rngs=rngs)
            self.mask_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
            self.mask_bias = nnx.Param(jnp.zeros(config.text.vocabulary_size, jnp.float32))
        if config.classes:
            # Of another name where it reads two images, so that it is new where the start read one.
            if config.images == 1:
                self.class_hidden = Dense(width, width, dtype=jnp.float32, rngs=rngs)
            else:
                self.comparison = Dense(4 * width, width, dtype=jnp.float32, rngs=rngs)
            self.class_head = Dense(width, config.classes, dtype=jnp.float32, rngs=rngs)
        if config.decoder_depth:
            self.target_positions = self.text.table(config.max_target_length, rngs)
            self.decoder = Decoder(config.blocks(config.decoder_depth), rngs=rngs)

    def __call__(self, batch: Batch, *, key: Key[Array, ""] | None = None) -> Outputs:
        """What the heads say of whatever is in the batch.

        Args:
            batch: as for `TwoTower`; a model of two images also needs `second_image`, a model with a decoder takes
                `source_ids` with `source_mask` in the place of `token_ids` with `token_mask`, and `target_ids` with
                `target_mask`, the end token included and the begin token not. `caption_id` says which texts are equal,
                so that they are no negatives, `where` which rows count.
            key: for dropout, masked tokens and negatives; None means none of them.

        Returns:
            The outputs of `TwoTower`, with `second_image`, and for images with texts, as far as there is the head,

            - `matching`: `logits` [b m 2] float32, no and yes, of the own pair and, with a key, of the image with a
              hard text and of the text with a hard image; `labels` int32 [b m]; `mask` [b m], False where an example
              has no such negative;
            - `masked`, with a key: `logits` [b l v] float32 and the right `token_ids` [b l], of which those of
              `token_mask` [b l] were to be named;
            - `classes`: `logits` [b classes] float32;
            - `logits` [b t v] float32 of the next target tokens, and `masks` with `encoder` [b n], image tokens first,
              and `decoder` [b t].

        Raises:
            InputError: if the batch has none of them, a part of one, or arrays of a wrong shape.
        """
        if "second_image" in batch and self.config.images < 2:
            raise InputError("the batch has a second_image, but the model is one of images=1")
        masked = self._masked(batch, fold(key, 0))
        texts = _SOURCE if "source_ids" in batch else TEXT_VIEWS
        if masked is not None:
            batch, texts = {**batch, "masked_token_ids": masked.token_ids}, {**texts, **_MASKED}
        outputs, tokens = self.towers(batch, _IMAGES, texts, key=fold(key, 1))
        outputs.pop("masked_text", None)
        outputs["logit_scale"] = self.logit_scale()
        if "image" not in tokens or "text" not in tokens:
            return outputs

        text_mask = batch[texts["text"][1]]
        own = _Pair(tokens["text"], text_mask, tokens["image"])
        pairs = {"own": own}
        if self.config.images > 1:
            require_in_batch(batch, ("second_image",))
            pairs["second_image"] = own._replace(seen=tokens["second_image"])
        labels, mask = jnp.ones((len(text_mask), 1), jnp.int32), jnp.ones((len(text_mask), 1), bool)
        if self.config.matching and self.negatives is not None and key is not None:
            drawn = self._negatives(batch, outputs, key)
            texts_of_images, images_of_texts = (jnp.maximum(places, 0) for places in drawn)
            pairs["hard_text"] = _Pair(own.tokens[texts_of_images], own.mask[texts_of_images], own.seen)
            pairs["hard_image"] = own._replace(seen=own.seen[images_of_texts])
            labels = jnp.broadcast_to(jnp.array([1, 0, 0], jnp.int32), (len(text_mask), 3))
            mask = jnp.stack([jnp.ones(len(text_mask), bool), *(places >= 0 for places in drawn)], axis=1)
        if masked is not None:
            pairs["masked"] = own._replace(tokens=tokens["masked_text"])
        fused = self._fuse(pairs, fold(key, 3))
        pooled = {name: pool(fused[name], pair.mask, self.config.text.pooling) for name, pair in pairs.items()}
        if self.config.matching:
            judged = [pooled[name] for name in ("own", "hard_text", "hard_image") if name in pooled]
            logits = self.matching_head(jnp.stack(judged, axis=1))
            outputs["matching"] = {"logits": logits, "labels": labels, "mask": mask}
        if masked is not None:
            logits = self._named(fused["masked"])
            outputs["masked"] = {"logits": logits, "token_ids": batch["token_ids"], "token_mask": masked.chosen}
        if self.config.classes:
            outputs["classes"] = {"logits": self._class_logits(pooled)}
        if self.config.decoder_depth and "target_ids" in batch:
            outputs |= self._decoded(batch, *_context(own, fused["own"]), fold(key, 4))
        return outputs

    def generate(
        self, batch: Batch, *, beams: int, max_length: int, length_penalty: float | Float[Array, ""]
    ) -> Generated:
        """The targets that beam search finds for the sources of a batch; see `beam_search`."""
        _, tokens = self.towers(batch, _IMAGES, _SOURCE, key=None)
        own = _Pair(tokens["text"], batch["source_mask"], tokens["image"])

        def embed_at(token_ids: Int[Array, "b beams"], position: Int[Array, ""]) -> Float[Array, "b beams width"]:
            return self.text.embed(token_ids, jax.lax.dynamic_slice_in_dim(self.target_positions[...], position, 1))

        return self.decoder.search(
            *_context(own, self._fuse({"own": own}, None)["own"]),
            embed=embed_at,
            predict=self._token_logits,
            beams=beams,
            max_length=max_length,
            begin_id=self.config.begin_id,
            end_id=self.config.end_id,
            pad_id=self.config.pad_id,
            length_penalty=length_penalty,
        )

    def _masked(self, batch: Batch, key: Key[Array, ""] | None) -> MaskedTokens | None:
        if not self.config.mask_rate or key is None or "image" not in batch or "token_ids" not in batch:
            return None
        require_in_batch(batch, ("token_mask",))
        return mask_tokens(
            batch["token_ids"],
            batch["token_mask"],
            rate=self.config.mask_rate,
            mask_id=self.config.mask_id,
            special_ids=(self.config.begin_id, self.config.end_id, self.config.pad_id),
            vocabulary_size=self.config.text.vocabulary_size,
            key=key,
        )

    def _negatives(
        self, batch: Batch, outputs: Outputs, key: Key[Array, ""]
    ) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
        assert self.negatives is not None
        drawn = self.negatives(
            outputs["image"]["embeds"],
            outputs["text"]["embeds"],
            logit_scale=outputs["logit_scale"],
            labels=batch.get("caption_id"),
            key=jax.random.fold_in(key, 2),
            where=batch.get("where"),
        )
        return drawn.text_of_image, drawn.image_of_text

    def _fuse(self, pairs: "dict[str, _Pair]", key: Key[Array, ""] | None) -> dict[str, Float[Array, "b l width"]]:
        """The multimodal tokens of each pair, of all pairs of an example as consecutive rows in one pass."""
        number = len(pairs)
        tokens, mask, seen = (
            jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:]) for arrays in zip(*pairs.values(), strict=True)
        )
        fused = self.multimodal.transform(tokens, seen, padding_mask(mask), None, key=key)
        split = fused.reshape(-1, number, *fused.shape[1:])
        return {name: split[:, index] for index, name in enumerate(pairs)}

    def _named(self, tokens: Float[Array, "b l width"]) -> Float[Array, "b l v"]:
        hidden = self.mask_norm(jax.nn.gelu(self.mask_hidden(tokens), approximate=True))
        return self._token_logits(hidden) + self.mask_bias[...]

    def _class_logits(self, pooled: dict[str, Float[Array, "b width"]]) -> Float[Array, "b classes"]:
        first = pooled["own"]
        if self.config.images == 1:
            hidden = self.class_hidden(first)
        else:
            second = pooled["second_image"]
            hidden = self.comparison(jnp.concatenate([first, second, jnp.abs(first - second), first * second], axis=1))
        return self.class_head(jax.nn.gelu(hidden, approximate=True))

    def _decoded(
        self, batch: Batch, context: Float[Array, "b n width"], mask: Bool[Array, "b n"], key: Key[Array, ""] | None
    ) -> Outputs:
        require_in_batch(batch, ("target_ids", "target_mask"))
        target_ids = batch["target_ids"]
        if target_ids.shape != batch["target_mask"].shape or target_ids.shape[1] > self.config.max_target_length:
            raise InputError(
                "target_ids and target_mask must have one shape [b t] with t at most "
                f"max_target_length={self.config.max_target_length}, got {list(target_ids.shape)} and "
                f"{list(batch['target_mask'].shape)}"
            )
        begin = jnp.full((len(target_ids), 1), self.config.begin_id, jnp.int32)
        shifted = jnp.concatenate([begin, target_ids[:, :-1]], axis=1)
        tokens = self.text.embed(shifted, self.target_positions[: shifted.shape[1]])
        logits = self._token_logits(self.decoder(tokens, context, mask, key))
        return {"logits": logits, "masks": {"encoder": mask, "decoder": batch["target_mask"]}}

    def _token_logits(self, tokens: Float[Array, "b l width"]) -> Float[Array, "b l v"]:
        return token_logits(tokens, self.text.token_embedding[...])


class _Pair(NamedTuple):
    """A text and the image that it is read with."""

    tokens: Float[Array, "b l width"]
    mask: Bool[Array, "b l"]
    seen: Float[Array, "b n width"]


def _context(pair: _Pair, fused: Float[Array, "b l width"]) -> tuple[Float[Array, "b k width"], Bool[Array, "b k"]]:
    """What the decoder attends to: the image's tokens, and the text's after they have met."""
    mask = jnp.concatenate([jnp.ones(pair.seen.shape[:2], bool), pair.mask], axis=1)
    return jnp.concatenate([pair.seen, fused], axis=1), mask


class FusionModel(NamedTuple):
    """A fusion model as pure functions.

    Attributes:
        init: from a typed key to parameters.
        forward: `forward(params, batch, key) -> outputs`; those of `Fusion`.
        generate: `generate(params, batch, *, beams=1, max_length=None, length_penalty=0.0) -> Generated`, as that of
            `repkit.models.sequence.SequenceModel`; it needs a decoder.
    """

    init: Callable[[Key[Array, ""]], Params]
    forward: Callable[[Params, Batch, Key[Array, ""] | None], Outputs]
    generate: Callable[..., Generated]


def fusion(config: FusionConfig, *, negatives: DrawNegatives | None, capture: Capture = NOTHING) -> FusionModel:
    """The fusion model as pure functions.

    Args:
        config: the model.
        negatives: draws for each row a text and an image that do not belong to it, for the matching head: usually
            `repkit.losses.hard_negatives`. Under `jit` they come from the whole batch, inside `pmap` from the device's
            own rows, as in ALBEF. None judges the own pairs only.
        capture: what its layers show beside the outputs of `forward`. Attention layers are
            `image.blocks.I.attention`, `text.blocks.I.attention`, `multimodal.blocks.I.self_attention` and
            `multimodal.blocks.I.cross_attention`, of which the own pair (that of the first image) is shown, and those
            of `decoder.blocks.I`.

    Raises:
        InputError: if a path of `capture` matches nothing.

    Example:
        >>> from repkit.models.encoders import TextConfig, VisionConfig
        >>> config = FusionConfig(
        ...     image=VisionConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2),
        ...     text=TextConfig(vocabulary_size=9, max_length=5, width=16, depth=1, heads=2),
        ...     embed_dim=8, depth=1, begin_id=1, end_id=2, pad_id=0, mask_id=8,
        ... )
        >>> model = fusion(config, negatives=None)
        >>> params = jax.jit(model.init)(jax.random.key(0))
        >>> batch = {
        ...     "image": jnp.zeros((3, 8, 8, 3), jnp.uint8),
        ...     "token_ids": jnp.ones((3, 5), jnp.int32), "token_mask": jnp.ones((3, 5), bool),
        ... }
        >>> outputs = jax.jit(model.forward)(params, batch, jax.random.key(1))
        >>> outputs["matching"]["logits"].shape, outputs["masked"]["logits"].shape
        ((3, 1, 2), (3, 5, 9))
    """

    def build(rngs: nnx.Rngs) -> Fusion:
        return Fusion(config, negatives=negatives, rngs=rngs)

    model = functional(build, capture=capture)
    generate = make_generate(restorer(build), source=_SOURCE_ARRAYS, longest=config.max_target_length)
    return FusionModel(model.init, model.forward, generate)
