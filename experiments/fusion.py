"""Recipe: a fusion model (ALBEF's shape) on digit scenes, pre-trained on captions and fine-tuned on tasks from there.

    repkit train experiments/fusion.py --run runs/pretrained
    repkit train experiments/fusion.py --run runs/answers --set stage=questions --set start=runs/pretrained
    repkit train experiments/fusion.py --run runs/retrieval --set stage=retrieval --set start=runs/pretrained
    repkit train experiments/fusion.py --set regularizers=geometric_consistency ...

`repkit train experiments/fusion.py --show` lists all settings.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from repkit import losses, plots
from repkit.checks import InputError, require_range
from repkit.data.class_sources import (
    IMAGE_NAMES,
    ClassSource,
    all_class_texts,
    common_answers,
    questions_as_classes,
    scene_class_source,
)
from repkit.data.images import load_image
from repkit.data.pipeline import Batches, caption_table, make_batches, make_class_batches, make_sequence_batches
from repkit.data.scene_classes import CLASS_TASKS
from repkit.data.scene_demands import TASK_IMAGE_SIZE
from repkit.data.scenes import IMAGE_SIZES
from repkit.data.sequence_sources import AsTokenized, SequenceSource, scene_task_source
from repkit.data.sources import Record, Source, digit_scenes_source
from repkit.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from repkit.evaluate.classification import ClassLogits, class_logits, evaluate_classes
from repkit.evaluate.embed import embed, token_batches
from repkit.evaluate.generation import Records, evaluate_answers, evaluate_captions, generate_texts
from repkit.evaluate.reranking import evaluate_reranked_retrieval, matching_judge
from repkit.evaluate.results import Result
from repkit.evaluate.retrieval import evaluate_retrieval
from repkit.models.encoders import TextConfig, VisionConfig
from repkit.models.fusion import FusionConfig, FusionModel, fusion
from repkit.models.sharding import TRANSFORMER_RULES
from repkit.objective import Objective, Term
from repkit.recipe import Experiment, RunDirectory
from repkit.train.checkpoint import CheckpointReader
from repkit.train.config import TrainConfig, data_share
from repkit.train.mesh import WHOLE_BATCH
from repkit.train.start import started_from
from repkit.train.teacher import MomentumTeacher
from repkit.trained import load_parameters

Stage = Literal["pretrain", "retrieval", "questions", "captions", "assignment", "statements", "entailment"]
Scenes = Literal["captions", "pairs"]
Regularizer = Literal["feature_separation", "brownian_bridge", "geometric_consistency"]

TOKENIZER_FILE, INPUTS_FILE = "tokenizer.json", "inputs.json"
VOCABULARY_SIZE = 512
MOST_TOKENS = 64
"""Rows of the position tables: the same for all stages, so that one can start from another."""

EVALUATION_BATCH = 256
MATCHED = ("pretrain", "retrieval")
"""Stages that learn from pairs of images and captions."""

GENERATED = {"questions": evaluate_answers, "captions": evaluate_captions}
MAIN_METRIC: dict[str, str] = {
    "pretrain": "retrieval/text_to_image/R@1",
    "retrieval": "retrieval/text_to_image/R@1",
    "questions": "questions/vqa_accuracy",
    "captions": "captions/cider_d",
} | {stage: f"{stage}/accuracy" for stage in CLASS_TASKS}
MOST_ANSWERS = 256
FIGURE_EXAMPLES = 12
REPLACED = ("class_head",)
"""Parts whose parameters are new where those to start from differ."""


@dataclass(frozen=True)
class ModelConfig:
    """The model; all transformers in it are of one width."""

    patch_size: int = 8
    width: int = 96
    heads: int = 4
    image_depth: int = 3
    text_depth: int = 2
    fusion_depth: int = 2
    decoder_depth: int = 2
    embed_dim: int = 64
    dropout: float = 0.0
    mask_rate: float = 0.3
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class ContrastConfig:
    """Settings of `queue_contrastive`, see its documentation.

    Attributes:
        queue: places of the queue; a multiple of the number of devices is split over them.
        target_share: of the momentum teacher's scores in the targets.
        weight: of the term.
    """

    queue: int = 2048
    target_share: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class Config:
    """The run.

    Attributes:
        stage: `pretrain` (contrast, matching, masked tokens), or what is learned from there: `retrieval` (contrast and
            matching), `questions`, `captions`, `assignment` (which of two images a text belongs to, or neither; from
            which the next one may start), `statements` (about two images, true or false) and `entailment`.
        start: run directory of a model of the same shapes whose parameters are the initial ones; none for random ones.
        answers: whether the answers of `questions` are generated, or are classes.
        scenes: whose captions `pretrain` and `retrieval` learn: those of the caption task, of 24 x 24 pixels as the
            other tasks have them, or the pairs of 32 x 32 that the two-tower recipe knows.
        image_size: height and width that images are brought to; none for their own, or that of the start.
        regularizers: structure regularisers of `pretrain` and `retrieval`; the augmented features are the momentum
            teacher's, as in the paper.
        regularizer_weight: weight of each regulariser; none for its own default.
        examples: of each split that are used; none for all.
        directory: where TFDS keeps prepared data; none for its own default.
        beams: hypotheses that decoding keeps.
        reranked: candidates of each query that the matching head puts into order.
    """

    stage: Stage = "pretrain"
    start: str | None = None
    answers: Literal["generated", "classified"] = "generated"
    scenes: Scenes = "captions"
    image_size: int | None = None
    regularizers: tuple[Regularizer, ...] = ()
    regularizer_weight: float | None = None
    examples: int | None = None
    directory: str | None = None
    beams: int = 1
    reranked: int = 16
    model: ModelConfig = ModelConfig()
    contrast: ContrastConfig = ContrastConfig()
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=4000,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=200,
            weight_decay=0.05,
            ema_decay=0.995,
            log_every=100,
            checkpoint_every=2000,
        )
    )


def smoke(config: Config) -> Config:
    """The same run in seconds."""
    return replace(
        config,
        examples=64,
        reranked=4,
        model=replace(
            config.model, width=16, heads=2, image_depth=1, text_depth=1, fusion_depth=1, decoder_depth=1, embed_dim=8
        ),
        contrast=replace(config.contrast, queue=32),
        train=replace(config.train, steps=6, batch_size=16, log_every=2, checkpoint_every=3, warmup_steps=2),
    )


def build(config: Config, directory: Path) -> Experiment:
    """Assembles the run; reads the tokenizer from the run directory, or from that of the start."""
    _check(config)
    inputs = _inputs(config, directory)
    model = _model(config, inputs)
    make_stage = _matched if config.stage in MATCHED else _generated if _is_generated(config) else _classified
    stage = make_stage(config, inputs, model)

    def validate(params: Any) -> dict[str, float]:
        metrics = stage.validate(params)
        return {f"validation/{task}/{name}": value for task, of in metrics.items() for name, value in of.items()}

    def evaluate(params: Any) -> list[Result]:
        name = " + ".join(["fusion", *config.regularizers])
        data = f"digit_scenes/{config.scenes} test" if config.stage in MATCHED else "digit_scenes test"
        return [Result(name, data, task, values) for task, values in stage.evaluate(params).items()]

    return Experiment(
        init=_initial(config, model, directory),
        forward=model.forward,
        objective=_objective(config),
        batches=stage.batches,
        validate=validate,
        best_metric=f"validation/{MAIN_METRIC[config.stage]}",
        evaluate=evaluate,
        figures=stage.figures,
        save=inputs.save,
        sharding_rules=TRANSFORMER_RULES,
        teacher=(lambda: MomentumTeacher(model.forward)) if config.stage in MATCHED else None,
    )


def _is_generated(config: Config) -> bool:
    return config.stage == "captions" or (config.stage == "questions" and config.answers == "generated")


def _check(config: Config) -> None:
    """What can be told from the settings alone."""
    if config.stage in MATCHED and config.train.ema_decay is None:
        raise InputError(f"stage={config.stage} learns from a momentum teacher; set train.ema_decay, such as 0.995")
    if config.stage not in MATCHED and config.regularizers:
        raise InputError(f"regularizers are terms of stage={' and stage='.join(MATCHED)}, got stage={config.stage}")
    for name, at_least in (("examples", 1), ("beams", 1), ("reranked", 0), ("regularizer_weight", 0)):
        require_range("fusion", name, getattr(config, name), at_least=at_least)
    require_range("fusion", "contrast.queue", config.contrast.queue, at_least=1)


# ---------------------------------------------------------------------------------------------------------------------
# Data


class _CaptionedScenes:
    """The scenes of the caption task with all their captions, as pairs."""

    has_labels = False

    def __init__(self, source: SequenceSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return Record(image=record["image"], captions=record["target_texts"], example_id=index, origin=record["origin"])

    def captions(self, index: int) -> list[str]:
        return self._source.texts(index).targets


def _split(config: Config, split: str) -> str:
    return split if config.examples is None else f"{split}[:{config.examples}]"


def _pairs(config: Config, split: str) -> Source:
    if config.scenes == "pairs":
        return digit_scenes_source("pairs", _split(config, split), config.directory)
    return _CaptionedScenes(_task_source("captions", _split(config, split), config.directory))


def _sequences(config: Config, split: str) -> SequenceSource:
    return _task_source(config.stage, _split(config, split), config.directory)


# Sources keep what they have parsed, and every stage is read for the language: a study's later runs read nothing again.
_task_source = functools.cache(scene_task_source)
_class_source = functools.cache(scene_class_source)


@functools.cache
def _answers(split: str, directory: str | None) -> list[str]:
    return common_answers(_task_source("questions", split, directory), count=MOST_ANSWERS)


def _classes(config: Config, split: str, *, shown: bool = False) -> ClassSource:
    """Examples of a split, or as many as figures show; their classes are those of training either way."""
    examples = _shown(config) if shown else config
    if config.stage == "questions":
        return questions_as_classes(_sequences(examples, split), _answers(_split(config, "train"), config.directory))
    return _class_source(config.stage, _split(examples, split), config.directory)


class _Inputs(NamedTuple):
    """What texts and images become for the model; the same for all stages that start from one another.

    Attributes:
        tokenizer: of the texts of all stages.
        longest: stage -> tokens of the longest text that is read, and of the longest that is generated.
        image_size: height and width of the images.
    """

    tokenizer: Tokenizer
    longest: Mapping[str, tuple[int, int]]
    image_size: int

    def save(self, folder: Path) -> None:
        """Writes what `load` reads."""
        self.tokenizer.save(folder / TOKENIZER_FILE)
        written = {"image_size": self.image_size, "longest_texts": self.longest}
        (folder / INPUTS_FILE).write_text(json.dumps(written) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "_Inputs":
        """Those of the run in this folder."""
        if not (folder / INPUTS_FILE).exists():
            raise InputError(f"there is no {INPUTS_FILE} in '{folder}': its training has not begun")
        stored = json.loads((folder / INPUTS_FILE).read_text())
        longest = {stage: (read, generated) for stage, (read, generated) in stored["longest_texts"].items()}
        return cls(load_tokenizer(folder / TOKENIZER_FILE), longest, stored["image_size"])


def _inputs(config: Config, directory: Path) -> _Inputs:
    """The run's own, for which its start need no longer be there; else those of the start, or new ones."""
    if (directory / INPUTS_FILE).exists():
        return _Inputs.load(directory)
    if config.start is not None:
        return _start_inputs(config, Path(config.start))
    own_size = IMAGE_SIZES["pairs"] if config.stage in MATCHED and config.scenes == "pairs" else TASK_IMAGE_SIZE
    # Of those settings alone that the texts depend on.
    texts = Config(scenes=config.scenes, examples=config.examples, directory=config.directory)
    return _Inputs(*_language(texts), own_size if config.image_size is None else config.image_size)


def _start_inputs(config: Config, start: Path) -> _Inputs:
    # Read as a run of this recipe, so that one of another is refused.
    _, there = RunDirectory(start).load(Path(__file__))
    for name in ("patch_size", "width", "heads", "image_depth", "text_depth", "fusion_depth", "embed_dim"):
        if getattr(config.model, name) != getattr(there.model, name):
            raise InputError(
                f"start={start} has model.{name}={getattr(there.model, name)}, here it is {getattr(config.model, name)}"
            )
    inputs = _Inputs.load(start)
    if config.image_size not in (None, inputs.image_size):
        raise InputError(
            f"start={start} has images of {inputs.image_size} pixels, here they have {config.image_size}; "
            f"set image_size={inputs.image_size}"
        )
    return inputs


@functools.cache
def _language(config: Config) -> tuple[Tokenizer, Mapping[str, tuple[int, int]]]:
    """Tokenizer and longest texts of all stages: what takes longest before a training, and a study has many."""
    texts = {stage: _texts(replace(config, stage=stage)) for stage in get_args(Stage)}
    everything = sorted({text for sides in texts.values() for side in sides for text in side})
    tokenizer = train_tokenizer(everything, vocab_size=VOCABULARY_SIZE)

    def tokens_of_longest(texts: set[str]) -> int:
        return int(tokenizer.encode(sorted(texts), MOST_TOKENS)[1].sum(axis=1).max(initial=0))

    longest = {stage: (tokens_of_longest(read), tokens_of_longest(written)) for stage, (read, written) in texts.items()}
    return tokenizer, longest


def _texts(config: Config) -> tuple[set[str], set[str]]:
    """The texts that are read, and those that are generated, in a stage's training."""
    if config.stage in MATCHED:
        pairs = _pairs(config, "train")
        return {caption for index in range(len(pairs)) for caption in pairs.captions(index)}, set()
    if config.stage in CLASS_TASKS:
        return set(all_class_texts(_classes(config, "train"))), set()
    source = _sequences(config, "train")
    texts = [source.texts(index) for index in range(len(source))]
    return {text.source for text in texts}, {target for text in texts for target in text.targets}


# ---------------------------------------------------------------------------------------------------------------------
# Model


def _model(config: Config, inputs: _Inputs) -> FusionModel:
    model, tokenizer, generates = config.model, inputs.tokenizer, _is_generated(config)
    task = None if generates or config.stage in MATCHED else _classes(config, "train")
    shared = {"width": model.width, "heads": model.heads, "dropout": model.dropout, "dtype": model.dtype}
    return fusion(
        FusionConfig(
            image=VisionConfig(
                image_size=inputs.image_size,
                patch_size=model.patch_size,
                depth=model.image_depth,
                patches="normalized",
                **shared,
            ),
            text=TextConfig(
                # One more for the token that stands for a masked one.
                vocabulary_size=tokenizer.vocab_size + 1,
                max_length=MOST_TOKENS,
                depth=model.text_depth,
                tokens="normalized",
                **shared,
            ),
            embed_dim=model.embed_dim,
            independent="feature_separation" in config.regularizers,
            depth=model.fusion_depth,
            matching=config.stage in MATCHED,
            mask_rate=model.mask_rate if config.stage == "pretrain" else 0.0,
            classes=0 if task is None else len(task.class_names),
            images=1 if task is None else task.pictures,
            decoder_depth=model.decoder_depth if generates else 0,
            max_target_length=MOST_TOKENS if generates else 0,
            begin_id=tokenizer.bos_id,
            end_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            mask_id=tokenizer.vocab_size,
        ),
        negatives=losses.hard_negatives,
    )


def _initial(config: Config, model: FusionModel, directory: Path) -> Callable[[Any], Any]:
    has_begun = CheckpointReader(RunDirectory(directory).checkpoints).latest_step() is not None
    if config.start is None or has_begun:
        return model.init
    return started_from(load_parameters(config.start), model.init, origin=f"start={config.start}", replaced=REPLACED)


# ---------------------------------------------------------------------------------------------------------------------
# Objective

PAIR = ("outputs.image.embeds", "outputs.text.embeds")
MOMENTUM_PAIR = ("teacher.image.embeds", "teacher.text.embeds")
SCALE = {"logit_scale": "outputs.logit_scale"}
LABELS = {"labels": "batch.caption_id"}  # equal captions describe each other's images


def _objective(config: Config) -> Objective:
    if config.stage not in MATCHED and not _is_generated(config):
        head = ("outputs.classes.logits", "batch.label")
        return Objective({"task": Term(losses.classification_cross_entropy, head)})
    if config.stage not in MATCHED:
        mask = {"token_mask": "batch.target_mask"}
        return Objective(
            {"task": Term(losses.caption_cross_entropy, ("outputs.logits", "batch.target_ids"), keywords=mask)}
        )
    terms = {"contrast": _contrast_term(config), "matching": _token_term("matching", "labels", "mask")}
    if config.stage == "pretrain":
        terms["masked"] = _token_term("masked", "token_ids", "token_mask")
    return Objective(terms | {name: _regularizer_term(name, config.regularizer_weight) for name in config.regularizers})


def _contrast_term(config: Config) -> Term:
    contrast = config.contrast
    return Term(
        losses.queue_contrastive,
        PAIR + MOMENTUM_PAIR,
        keywords=SCALE | LABELS,
        options={"target_share": contrast.target_share},
        weight=contrast.weight,
        memory=functools.partial(losses.init_queue, contrast.queue, config.model.embed_dim),
    )


def _token_term(head: str, targets: str, mask: str) -> Term:
    """The cross-entropy of a head with several targets for each example."""
    return Term(
        losses.caption_cross_entropy,
        (f"outputs.{head}.logits", f"outputs.{head}.{targets}"),
        keywords={"token_mask": f"outputs.{head}.{mask}"},
    )


def _regularizer_term(name: Regularizer, weight: float | None) -> Term:
    """With the momentum teacher's features as the augmented ones, which get no gradient."""
    match name:
        case "feature_separation":
            independent = tuple(
                f"{source}.{view}.independent" for source in ("outputs", "teacher") for view in ("image", "text")
            )
            return Term(
                losses.feature_separation,
                PAIR + independent,
                keywords=SCALE | LABELS,
                weight=1.0 if weight is None else weight,
            )
        case "brownian_bridge":
            return Term(losses.brownian_bridge, (*PAIR, MOMENTUM_PAIR[0]), weight=1.0 if weight is None else weight)
        case "geometric_consistency":
            return Term(losses.geometric_consistency, PAIR + MOMENTUM_PAIR, weight=0.25 if weight is None else weight)


# ---------------------------------------------------------------------------------------------------------------------
# Stages


class _StageParts(NamedTuple):
    """What a stage trains on, is measured by, and shows of test scenes; metrics are by task and name."""

    batches: Callable[[], Batches]
    validate: Callable[[Any], dict[str, dict[str, float]]]
    evaluate: Callable[[Any], dict[str, dict[str, float]]]
    figures: Callable[[Any, Path], list[Path]]


def _batch_options(config: Config, image_size: int, *, training: bool) -> dict[str, Any]:
    # Every process evaluates all examples, on its own.
    share = data_share(config.train) if training else WHOLE_BATCH
    return {
        "batch_size": config.train.batch_size if training else EVALUATION_BATCH,
        "image_size": image_size,
        "shuffle": training,
        "repeat": training,
        "seed": config.train.seed,
        "process_index": share.index,
        "process_count": share.count,
    }


def _matched(config: Config, inputs: _Inputs, model: FusionModel) -> _StageParts:
    """Pairs of images and captions, measured by retrieval, from the embeddings alone and put into order by matching."""
    tokenizer, (max_length, _) = inputs.tokenizer, inputs.longest[config.stage]

    def batches(source: Source, *, training: bool) -> Batches:
        options = _batch_options(config, inputs.image_size, training=training)
        return make_batches(source, tokenizer=tokenizer, max_length=max_length, **options)

    def metrics(params: Any, source: Source, *, reranked: int) -> dict[str, dict[str, float]]:
        with batches(source, training=False) as rows:
            images = embed(model.forward, params, rows)
        captions = caption_table(source, tokenizer=tokenizer, max_length=max_length)
        # Captions of images that could not be read have nothing to be found.
        readable = np.isin(captions.example_id, images["example_id"])
        rows = token_batches(captions.token_ids[readable], captions.token_mask[readable], batch_size=EVALUATION_BATCH)
        embeds = images["image_embeds"], embed(model.forward, params, rows)["text_embeds"]
        ids: dict[str, Any] = {
            "image_ids": images["example_id"],
            "text_image_ids": captions.example_id[readable],
            "caption_ids": captions.caption_id[readable],
        }
        found = {"retrieval": evaluate_retrieval(*embeds, **ids)}
        if reranked:
            pixels = [
                load_image(source[int(index)]["image"], image_size=inputs.image_size) for index in images["example_id"]
            ]
            texts = captions.token_ids[readable], captions.token_mask[readable]
            judge = matching_judge(model.forward, params, np.stack(pixels), *texts, batch_size=EVALUATION_BATCH)
            found["reranked_retrieval"] = evaluate_reranked_retrieval(*embeds, judge, **ids, candidates=reranked)
        return found

    def figures(params: Any, folder: Path) -> list[Path]:
        source = _pairs(_shown(config), "test")
        with batches(source, training=False) as rows:
            found = embed(model.forward, params, rows)
        return _draw_pairs(inputs.image_size, found, source, folder)

    return _StageParts(
        lambda: batches(_pairs(config, "train"), training=True),
        lambda params: metrics(params, _pairs(config, "validation"), reranked=0),
        lambda params: metrics(params, _pairs(config, "test"), reranked=config.reranked),
        figures,
    )


def _generated(config: Config, inputs: _Inputs, model: FusionModel) -> _StageParts:
    """Texts that are generated from an image and a text."""
    tokenizer, (source_length, target_length) = inputs.tokenizer, inputs.longest[config.stage]

    def batches(source: SequenceSource, *, training: bool) -> Batches:
        return make_sequence_batches(
            source,
            tokenizer=tokenizer,
            max_source_length=source_length,
            # A target's begin token is not generated.
            max_target_length=target_length - 1,
            **_batch_options(config, inputs.image_size, training=training),
        )

    def generated(params: Any, source: SequenceSource) -> dict[int, str]:
        def generate(params: Any, batch: Any) -> Any:
            return model.generate(params, batch, beams=config.beams, max_length=target_length - 1).token_ids

        with batches(source, training=False) as rows:
            return generate_texts(generate, params, rows, decode=tokenizer.decode)

    def references(source: SequenceSource) -> Records:
        return source if config.stage == "questions" else AsTokenized(source, tokenizer, max_length=MOST_TOKENS)

    def metrics(params: Any, split: str) -> dict[str, dict[str, float]]:
        source = _sequences(config, split)
        return {config.stage: GENERATED[config.stage](generated(params, source), references(source))}

    def figures(params: Any, folder: Path) -> list[Path]:
        source = _sequences(_shown(config), "test")
        answers, right = generated(params, source), references(source)
        expected = {id: right[id]["target_texts"] for id in answers}
        return [_draw_answers(inputs.image_size, source, answers, expected, folder)]

    return _StageParts(
        lambda: batches(_sequences(config, "train"), training=True),
        lambda params: metrics(params, "validation"),
        lambda params: metrics(params, "test"),
        figures,
    )


def _classified(config: Config, inputs: _Inputs, model: FusionModel) -> _StageParts:
    """Classes of one image or two with a text; answers are measured as texts."""
    tokenizer, (max_length, _) = inputs.tokenizer, inputs.longest[config.stage]

    def batches(source: ClassSource, *, training: bool) -> Batches:
        options = _batch_options(config, inputs.image_size, training=training)
        return make_class_batches(source, tokenizer=tokenizer, max_length=max_length, **options)

    def logits(params: Any, source: ClassSource) -> ClassLogits:
        with batches(source, training=False) as rows:
            return class_logits(model.forward, params, rows)

    def answers(classes: ClassLogits, source: ClassSource) -> dict[int, str]:
        names = [source.class_names[int(place)] for place in classes.logits.argmax(axis=1)]
        return dict(zip(classes.example_id.tolist(), names, strict=True))

    def metrics(params: Any, split: str) -> dict[str, dict[str, float]]:
        source = _classes(config, split)
        classes = logits(params, source)
        if config.stage == "questions":
            return {"questions": evaluate_answers(answers(classes, source), _sequences(config, split))}
        forms = [source[int(index)].get("form", "") for index in classes.example_id]
        return {config.stage: evaluate_classes(classes, forms)}

    def figures(params: Any, folder: Path) -> list[Path]:
        source = _classes(config, "test", shown=True)
        given = answers(logits(params, source), source)
        expected = {
            index: source[index].get("answers", [source.class_names[source[index]["label"]]]) for index in given
        }
        return [_draw_answers(inputs.image_size, source, given, expected, folder)]

    return _StageParts(
        lambda: batches(_classes(config, "train"), training=True),
        lambda params: metrics(params, "validation"),
        lambda params: metrics(params, "test"),
        figures,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def _shown(config: Config) -> Config:
    """The settings with as many examples as the figures are of."""
    return replace(config, examples=min(config.examples or FIGURE_EXAMPLES, FIGURE_EXAMPLES))


def _draw_pairs(image_size: int, rows: Mapping[str, np.ndarray], source: Source, folder: Path) -> list[Path]:
    """Draws what finds what, from embeddings of images and of their first captions."""
    records = [source[int(index)] for index in rows["example_id"]]
    pairs = {
        "image_embeds": rows["image_embeds"],
        "text_embeds": rows["text_embeds"],
        "images": [load_image(record["image"], image_size=image_size) for record in records],
        "captions": [record["captions"][0] for record in records],
    }
    paths = {name: folder / f"{name}.png" for name in ("similarity", "retrieval")}
    plots.similarity_heatmap(**pairs, path=paths["similarity"])
    plots.retrieved_examples(**pairs, path=paths["retrieval"])
    return list(paths.values())


def _draw_answers(
    image_size: int,
    source: SequenceSource | ClassSource,
    answers: Mapping[int, str],
    expected: Mapping[int, Sequence[str]],
    folder: Path,
) -> Path:
    """Draws what the model said of a source's examples; answers and expected ones by the example's index."""
    path = folder / "answers.png"
    records: list[Mapping[str, Any]] = [source[index] for index in answers]
    plots.answered_examples(
        [
            [load_image(record[name], image_size=image_size) for name in IMAGE_NAMES if name in record]
            for record in records
        ],
        [record["source_text"] if "source_text" in record else record["text"] for record in records],
        [expected[index] for index in answers],
        list(answers.values()),
        path,
    )
    return path
