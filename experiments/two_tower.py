"""Recipe: an image and a text tower, trained with a contrastive loss and any of the structure regularisers.

    repkit train experiments/two_tower.py
    repkit train experiments/two_tower.py --set loss=info_nce --set regularizers=brownian_bridge,geometric_consistency
    repkit train experiments/two_tower.py --set data.source=jsonl --set data.train=pairs.jsonl ...

`repkit train experiments/two_tower.py --show` lists all settings.
"""

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from repkit import losses, plots
from repkit.checks import InputError
from repkit.data.augment import Augmentation, TextAugmentation
from repkit.data.images import load_image
from repkit.data.pipeline import Batches, caption_table, make_batches
from repkit.data.scenes import IMAGE_SIZES, zero_shot_prompts
from repkit.data.sources import Source, TfdsSource, all_captions, digit_scenes_source, jsonl_source, tfds_source
from repkit.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from repkit.evaluate.embed import embed, token_batches
from repkit.evaluate.linear_probe import evaluate_few_shot, evaluate_linear_probe
from repkit.evaluate.results import Result
from repkit.evaluate.retrieval import evaluate_retrieval
from repkit.evaluate.zero_shot import class_scores, evaluate_zero_shot, prompt_embeddings
from repkit.metrics.geometry import alignment, effective_rank, modality_gap, uniformity
from repkit.models.encoders import CLIP_TEXT_B, CLIP_TEXT_L, VIT_B_16, VIT_L_14, TextConfig, VisionConfig
from repkit.models.functional import Model
from repkit.models.sharding import TRANSFORMER_RULES
from repkit.models.two_tower import TwoTowerConfig, two_tower
from repkit.objective import Objective, Term
from repkit.recipe import Experiment
from repkit.train.config import TrainConfig, data_share
from repkit.train.mesh import WHOLE_BATCH

Loss = Literal["gamma_contrastive", "info_nce", "scaled_info_nce", "decoupled_contrastive", "global_contrastive"]
Regularizer = Literal[
    "in_modal_info_nce", "cyclic_consistency", "feature_separation", "brownian_bridge", "geometric_consistency"
]
Evaluation = Literal["retrieval", "zero_shot", "linear_probe", "few_shot", "geometry"]
TOKENIZER_FILE = "tokenizer.json"
EVALUATION_BATCH = 256
FIGURE_EXAMPLES = 512


@dataclass(frozen=True)
class DataConfig:
    """Where the examples come from.

    Attributes:
        source: `digit_scenes`, a TFDS data set by name (`tfds`), or JSONL image-caption pairs (`jsonl`).
        name: configuration of digit_scenes (`single`, `pairs`), or name of the TFDS data set.
        train: split to train on, or JSONL file.
        validation: split or file by which the best checkpoint is chosen.
        test: split or file for `repkit evaluate`.
        directory: where TFDS keeps prepared data; none for its own default.
        image_key: feature of the image in a TFDS data set.
        caption_key: feature of the captions; none to take the names of the labels.
        label_key: feature of the class label; none if there is none.
        tokenizer: tokenizer file; none to train one on the training captions.
        vocabulary_size: tokens of a tokenizer that is trained here.
        max_length: tokens of a caption that are kept; none for those of the longest training caption, 77 at most.
        image_size: height and width that images are brought to; none for the size of the digit scenes.
        max_corrupt_share: share of examples that may be unreadable before training stops.
    """

    source: Literal["digit_scenes", "tfds", "jsonl"] = "digit_scenes"
    name: str = "single"
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    directory: str | None = None
    image_key: str = "image"
    caption_key: str | None = None
    label_key: str | None = None
    tokenizer: str | None = None
    vocabulary_size: int = 512
    max_length: int | None = None
    image_size: int | None = None
    max_corrupt_share: float = 0.01


@dataclass(frozen=True)
class ModelConfig:
    """The towers.

    Attributes:
        size: `custom`, of equal width, depth and heads for image and text as given below; or `clip_b_16`, `clip_l_14`,
            the published ones of ViT-B/16 and ViT-L/14, with their vocabulary.
    """

    size: Literal["custom", "clip_b_16", "clip_l_14"] = "custom"
    patch_size: int = 4
    width: int = 64
    depth: int = 2
    heads: int = 4
    embed_dim: int = 64
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False


@dataclass(frozen=True)
class GammaConfig:
    """Settings of `gamma_contrastive`, see its documentation; `global_contrastive` has the same memory.

    The default takes the auxiliary variable at its mean, which learns fastest in a short run; `draw=sampled` draws it.
    """

    draw: Literal["sampled", "expected"] = "expected"
    positive: Literal["sampled", "expected"] = "expected"
    shape: float = 1.0
    memory_rate: float = 0.9


@dataclass(frozen=True)
class Config:
    """The run.

    Attributes:
        loss: the contrastive loss. `scaled_info_nce` counts the negatives of a batch for all of the data set.
        regularizers: what is added to it: contrast within the modalities (`in_modal_info_nce`), CyCLIP's consistency
            (`cyclic_consistency`), and the structure regularisers. With most of them the batches hold augmented views.
        regularizer_weight: weight of each regulariser; none for its own default. Contrast within the modalities always
            has 0.5.
        evaluations: what `repkit evaluate` does, as far as the data allow it.
    """

    loss: Loss = "gamma_contrastive"
    regularizers: tuple[Regularizer, ...] = ()
    regularizer_weight: float | None = None
    evaluations: tuple[Evaluation, ...] = get_args(Evaluation)
    gamma: GammaConfig = GammaConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=2400, learning_rate=2e-3, weight_decay=0.1, log_every=100, checkpoint_every=800
        )
    )


def smoke(config: Config) -> Config:
    """The same run in seconds."""
    return replace(
        config,
        model=replace(config.model, width=32, depth=1, embed_dim=32),
        train=replace(config.train, steps=20, batch_size=32, log_every=5, checkpoint_every=10, warmup_steps=5),
    )


def build(config: Config, directory: Path) -> Experiment:
    """Assembles the run; reads the tokenizer from the run directory where an earlier call left it."""
    train, validation, test = (_open(config.data, name) for name in ("train", "validation", "test"))
    tokenizer = _tokenizer(config.data, train, directory)
    max_length = config.data.max_length
    if max_length is None:
        max_length = _longest(_captions(config.data, train), tokenizer)
    image_size = _image_size(config.data)
    model = two_tower(_model_config(config, tokenizer, max_length, image_size))

    def batches(source: Source, *, training: bool) -> Batches:
        # Every process evaluates all examples, on its own.
        share = data_share(config.train) if training else WHOLE_BATCH
        return make_batches(
            source,
            tokenizer=tokenizer,
            batch_size=config.train.batch_size if training else EVALUATION_BATCH,
            image_size=image_size,
            max_length=max_length,
            shuffle=training,
            repeat=training,
            seed=config.train.seed,
            augmentation=_augmentation(config.data) if training and _needs_views(config) else None,
            max_corrupt_share=config.data.max_corrupt_share,
            process_index=share.index,
            process_count=share.count,
        )

    def embedded(params: Any, source: Source) -> dict[str, np.ndarray]:
        with batches(source, training=False) as rows:
            return embed(model.forward, params, rows)

    encode = functools.partial(_encode_texts, model, tokenizer, max_length)
    retrieval = functools.partial(_retrieval, model, tokenizer, max_length)

    def validate(params: Any) -> dict[str, float]:
        metrics = retrieval(params, validation, embedded(params, validation))
        return {f"validation/{name}": value for name, value in metrics.items()}

    def evaluate(params: Any) -> list[Result]:
        test_rows = embedded(params, test)
        metrics = {}
        if "retrieval" in config.evaluations:
            metrics["retrieval"] = retrieval(params, test, test_rows)
        if "zero_shot" in config.evaluations and test.has_labels and (prompts := _prompts(config.data, test)):
            metrics["zero_shot"] = _zero_shot(
                test_rows, prompt_embeddings(functools.partial(encode, params), prompts), _logit_scale(model, params)
            )
        if "geometry" in config.evaluations:
            metrics["geometry"] = _geometry(test_rows)
        if {"linear_probe", "few_shot"} & set(config.evaluations) and all(
            source.has_labels for source in (train, validation, test)
        ):
            splits = embedded(params, train), embedded(params, validation), test_rows
            probes = [(rows["image_embeds"], rows["label"]) for rows in splits]
            if "linear_probe" in config.evaluations:
                metrics["linear_probe"] = evaluate_linear_probe(*probes)
            if "few_shot" in config.evaluations:
                smallest = np.unique(probes[0][1], return_counts=True)[1].min()
                shots = [k for k in (1, 2, 4, 8, 16) if k <= smallest]
                metrics["few_shot"] = evaluate_few_shot(*probes, seed=config.train.seed, shots=shots)
        name = " + ".join(["two_tower", config.loss, *config.regularizers])
        data = f"{_data_name(config.data)} {config.data.test}"
        return [Result(name, data, task, values) for task, values in metrics.items()]

    return Experiment(
        init=model.init,
        forward=model.forward,
        objective=_objective(config, dataset_size=len(train)),
        batches=functools.partial(batches, train, training=True),
        validate=validate,
        best_metric="validation/text_to_image/R@1",
        evaluate=evaluate,
        figures=lambda params, folder: _figures(embedded(params, test), test, image_size, folder),
        save=lambda folder: tokenizer.save(folder / TOKENIZER_FILE),
        sharding_rules=TRANSFORMER_RULES,
    )


def _open(data: DataConfig, which: Literal["train", "validation", "test"]) -> Source:
    split = getattr(data, which)
    match data.source:
        case "digit_scenes":
            return digit_scenes_source(data.name, split, data.directory)
        case "tfds":
            return tfds_source(
                data.name,
                split,
                data.directory,
                image_key=data.image_key,
                caption_key=data.caption_key,
                label_key=data.label_key,
            )
        case "jsonl":
            return jsonl_source(split)


def _augmentation(data: DataConfig) -> Augmentation:
    """The synonyms are those of the digit scenes; other captions keep their words."""
    return Augmentation() if data.source == "digit_scenes" else Augmentation(text=TextAugmentation(synonyms={}))


def _image_size(data: DataConfig) -> int:
    if data.image_size is not None:
        return data.image_size
    if data.source == "digit_scenes":
        return IMAGE_SIZES[data.name]
    raise InputError(f"data.source={data.source} needs data.image_size, a multiple of model.patch_size")


def _tokenizer(data: DataConfig, train: Source, directory: Path) -> Tokenizer:
    if (directory / TOKENIZER_FILE).exists():
        return load_tokenizer(directory / TOKENIZER_FILE)
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    # Augmented captions use the synonyms, whether or not a caption does.
    synonyms = [word for words in _augmentation(data).text.synonyms.values() for word in words]
    return train_tokenizer([*_captions(data, train), *synonyms], vocab_size=data.vocabulary_size)


def _captions(data: DataConfig, train: Source) -> list[str]:
    """All that the training examples have; those of the digit scenes, which never change, are read once."""
    if data.source == "digit_scenes":
        return _scene_captions(data.name, data.train, data.directory)
    return all_captions(train)


@functools.cache
def _scene_captions(name: str, split: str, directory: str | None) -> list[str]:
    return all_captions(digit_scenes_source(name, split, directory))


def _longest(captions: list[str], tokenizer: Tokenizer) -> int:
    """Tokens of the longest caption, begin and end included, up to CLIP's 77."""
    _, token_mask = tokenizer.encode(captions, 77)
    return int(token_mask.sum(axis=1).max())


def _model_config(config: Config, tokenizer: Tokenizer, max_length: int, image_size: int) -> TwoTowerConfig:
    model = config.model
    shared: dict[str, Any] = {"dropout": model.dropout, "dtype": model.dtype, "remat": model.remat}
    independent = "feature_separation" in config.regularizers
    if model.size != "custom":
        image, text, embed_dim = {
            "clip_b_16": (VIT_B_16, CLIP_TEXT_B, 512),
            "clip_l_14": (VIT_L_14, CLIP_TEXT_L, 768),
        }[model.size]
        vocabulary_size = max(text.vocabulary_size, tokenizer.vocab_size)
        return TwoTowerConfig(
            image=replace(image, image_size=image_size, **shared),
            text=replace(text, max_length=max_length, vocabulary_size=vocabulary_size, **shared),
            embed_dim=embed_dim,
            independent=independent,
        )
    shared |= {"width": model.width, "depth": model.depth, "heads": model.heads}
    return TwoTowerConfig(
        image=VisionConfig(image_size=image_size, patch_size=model.patch_size, **shared),
        text=TextConfig(vocabulary_size=tokenizer.vocab_size, max_length=max_length, **shared),
        embed_dim=model.embed_dim,
        independent=independent,
    )


def _objective(config: Config, *, dataset_size: int) -> Objective:
    terms = {config.loss: _contrastive_term(config, dataset_size)}
    for name in config.regularizers:
        terms |= _regularizer_terms(name, config.regularizer_weight)
    return Objective(terms)


PAIR = ("outputs.image.embeds", "outputs.text.embeds")
SCALE = {"logit_scale": "outputs.logit_scale"}
LABELS = {"labels": "batch.caption_id"}  # equal captions describe each other's images


def _contrastive_term(config: Config, dataset_size: int) -> Term:
    match config.loss:
        case "info_nce":
            return Term(losses.info_nce, PAIR, keywords=SCALE | LABELS)
        case "scaled_info_nce":
            options = {"dataset_size": dataset_size, "draw": "expected"}
            return Term(losses.gamma_contrastive, PAIR, keywords=SCALE | LABELS, options=options)
        case "decoupled_contrastive":
            return Term(losses.decoupled_contrastive, PAIR, keywords=SCALE | LABELS)
        case "global_contrastive":
            return Term(
                losses.global_contrastive,
                PAIR,
                keywords=SCALE | LABELS | {"example_id": "batch.example_id"},
                options={"memory_rate": config.gamma.memory_rate},
                memory=functools.partial(losses.init_memory, dataset_size),
            )
        case "gamma_contrastive":
            gamma = config.gamma
            return Term(
                losses.gamma_contrastive,
                PAIR,
                keywords=SCALE | LABELS | {"example_id": "batch.example_id"},
                options={
                    "draw": gamma.draw,
                    "positive": gamma.positive,
                    "shape": gamma.shape,
                    "memory_rate": gamma.memory_rate,
                },
                memory=functools.partial(losses.init_memory, dataset_size),
            )


def _regularizer_terms(name: Regularizer, weight: float | None) -> dict[str, Term]:
    augmented = ("outputs.augmented_image.embeds", "outputs.augmented_text.embeds")
    match name:
        case "in_modal_info_nce":
            keywords = {"image": SCALE, "text": SCALE | LABELS}  # equal texts do not make equal images
            return {
                # Half of each, so that with the two halves of `info_nce` all four directions count alike.
                f"in_modal_{modality}": Term(
                    losses.in_modal_info_nce, tuple(views), keywords=keywords[modality], weight=0.5
                )
                for modality, *views in zip(("image", "text"), PAIR, augmented, strict=True)
            }
        case "cyclic_consistency":
            return {name: Term(losses.geometric_consistency, PAIR, weight=0.25 if weight is None else weight)}
        case "feature_separation":
            independent = tuple(
                f"outputs.{view}.independent" for view in ("image", "text", "augmented_image", "augmented_text")
            )
            term = Term(
                losses.feature_separation,
                PAIR + independent,
                keywords=SCALE | LABELS,
                weight=1.0 if weight is None else weight,
            )
            return {name: term}
        case "brownian_bridge":
            term = Term(losses.brownian_bridge, (*PAIR, augmented[0]), weight=1.0 if weight is None else weight)
            return {name: term}
        case "geometric_consistency":
            term = Term(losses.geometric_consistency, PAIR + augmented, weight=0.25 if weight is None else weight)
            return {name: term}


def _needs_views(config: Config) -> bool:
    return bool(set(config.regularizers) - {"cyclic_consistency"})


def _geometry(rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Where the embeddings of both modalities lie."""
    images, texts = jnp.asarray(rows["image_embeds"]), jnp.asarray(rows["text_embeds"])
    values = {"modality_gap": modality_gap(images, texts), "alignment": alignment(images, texts)}
    for modality, embeds in (("image", images), ("text", texts)):
        values |= {f"{modality}/uniformity": uniformity(embeds), f"{modality}/effective_rank": effective_rank(embeds)}
    return {name: float(value) for name, value in values.items()}


def _encode_texts(model: Model, tokenizer: Tokenizer, max_length: int, params: Any, texts: list[str]) -> np.ndarray:
    rows = token_batches(*tokenizer.encode(texts, max_length), batch_size=EVALUATION_BATCH)
    return embed(model.forward, params, rows)["text_embeds"]


def _retrieval(
    model: Model, tokenizer: Tokenizer, max_length: int, params: Any, source: Source, images: dict[str, np.ndarray]
) -> dict[str, float]:
    captions = caption_table(source, tokenizer=tokenizer, max_length=max_length)
    rows = token_batches(captions.token_ids, captions.token_mask, batch_size=EVALUATION_BATCH)
    # Captions of images that could not be read have nothing to be found.
    readable = np.isin(captions.example_id, images["example_id"])
    return evaluate_retrieval(
        images["image_embeds"],
        embed(model.forward, params, rows)["text_embeds"][readable],
        image_ids=images["example_id"],
        text_image_ids=captions.example_id[readable],
        caption_ids=captions.caption_id[readable],
    )


def _zero_shot(rows: dict[str, np.ndarray], prompt_embeds: list[np.ndarray], logit_scale: float) -> dict[str, float]:
    """Accuracies of the ensemble over embeddings, and for comparison of that over probabilities."""
    by_embeddings = class_scores(rows["image_embeds"], prompt_embeds, ensemble="embeddings")
    by_probabilities = class_scores(
        rows["image_embeds"], prompt_embeds, ensemble="probabilities", logit_scale=logit_scale
    )
    other = evaluate_zero_shot(by_probabilities, rows["label"])
    return evaluate_zero_shot(by_embeddings, rows["label"]) | {f"probabilities/{k}": v for k, v in other.items()}


def _logit_scale(model: Model, params: Any) -> float:
    tokens = {"token_ids": np.zeros((1, 2), np.int32), "token_mask": np.ones((1, 2), bool)}
    return float(model.forward(params, tokens, None)["logit_scale"])


def _prompts(data: DataConfig, source: Source) -> dict[str, list[str]]:
    """Zero-shot prompts by class: those of the digit scenes, or the class names that served as captions."""
    if (data.source, data.name) == ("digit_scenes", "single"):
        return zero_shot_prompts()
    if isinstance(source, TfdsSource) and data.caption_key is None:
        return {name: [name] for name in source.class_names or ()}
    return {}


def _data_name(data: DataConfig) -> str:
    return {"digit_scenes": f"digit_scenes/{data.name}", "tfds": data.name, "jsonl": "jsonl"}[data.source]


def _figures(rows: dict[str, np.ndarray], source: Source, image_size: int, folder: Path) -> list[Path]:
    ids = rows["example_id"][:FIGURE_EXAMPLES]
    records = [source[int(index)] for index in ids]
    pairs = {
        "image_embeds": rows["image_embeds"][: len(ids)],
        "text_embeds": rows["text_embeds"][: len(ids)],
        "images": [load_image(record["image"], image_size=image_size) for record in records],
        "captions": [record["captions"][0] for record in records],
    }
    paths = {name: folder / f"{name}.png" for name in ("similarity", "retrieval", "projection")}
    plots.similarity_heatmap(**pairs, path=paths["similarity"])
    plots.retrieved_examples(**pairs, path=paths["retrieval"])
    labels = rows["label"][: len(ids)] if source.has_labels else None
    plots.projection(pairs["image_embeds"], pairs["text_embeds"], labels, paths["projection"])
    return list(paths.values())
