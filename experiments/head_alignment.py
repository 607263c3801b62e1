"""Recipe: an encoder-decoder on tasks of digit scenes, alone (a teacher) or with what a teacher of more heads shows.

    repkit train experiments/head_alignment.py --run runs/teacher
    repkit train experiments/head_alignment.py --run runs/student --set role=student --set teacher=runs/teacher \\
        --set method=amad_kl
    repkit train experiments/head_alignment.py --set task=translation ...

`repkit train experiments/head_alignment.py --show` lists all settings; `python -m experiments.compare_heads` runs the
comparison of the methods.
"""

import fcntl
import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from repkit import losses, plots
from repkit.checks import InputError
from repkit.data.digit_scenes import TASK_SPLIT_SIZES
from repkit.data.pipeline import Batches, Targets, make_sequence_batches
from repkit.data.scene_demands import TASK_IMAGE_SIZE
from repkit.data.sequence_sources import AsTokenized, SequenceSource, scene_task_source
from repkit.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from repkit.distillation import Match, describe, layer_terms, match_layers, required_captures
from repkit.evaluate.generation import (
    evaluate_answers,
    evaluate_captions,
    evaluate_translations,
    generate_texts,
)
from repkit.evaluate.results import Result
from repkit.metrics.attention import head_cosines
from repkit.models.capture import Capture
from repkit.models.functional import with_learned
from repkit.models.sequence import SequenceConfig, SequenceModel, sequence_to_sequence
from repkit.models.sharding import TRANSFORMER_RULES
from repkit.objective import Objective, Term
from repkit.recipe import Experiment, RunDirectory
from repkit.train.checkpoint import CheckpointReader
from repkit.train.config import TrainConfig, data_share
from repkit.train.mesh import WHOLE_BATCH
from repkit.train.start import started_from
from repkit.train.teacher import FrozenTeacher
from repkit.train.teacher_cache import TeacherBatches, TeacherCache, data_identity, open_cache, write_cache
from repkit.trained import load_parameters, load_run

Task = Literal["questions", "captions", "translation", "grounding"]
Method = Literal[
    "none",
    "logits",
    "one_to_one_mse",
    "one_to_one_kl",
    "mean_head",
    "mixed_head",
    "merged_head",
    "relations",
    "hidden",
    "amad_mse",
    "amad_kl",
    "amad_token_kl",
    "amad_kl_from_queries_keys",
]
Kind = Literal["encoder", "decoder", "cross"]

TOKENIZER_FILE, LONGEST_FILE = "tokenizer.json", "longest_texts.json"
HEADS_FILE = "head_alignment.json"
"""Among the figures: the numbers of the picture, see `HeadCosines`."""
EVALUATION_BATCH = 256
EVALUATE = {
    "questions": evaluate_answers,
    "captions": evaluate_captions,
    "translation": evaluate_translations,
    "grounding": evaluate_translations,
}
MAIN_METRIC: dict[str, str] = {
    "questions": "vqa_accuracy",
    "captions": "cider_d",
    "translation": "bleu4",
    "grounding": "exact_match",
}
VOCABULARY_SIZE = 512
MOST_SOURCE_TOKENS, MOST_TARGET_TOKENS = 32, 64
"""Rows of the position tables: the same for all tasks, so that a model of one task can start from one of another."""

# For each kind of attention its layers, of `depth` blocks, and which tokens are its queries and its keys.
LAYERS: dict[Kind, tuple[str, str, str]] = {
    "encoder": ("encoder.blocks.{}.attention", "encoder", "encoder"),
    "decoder": ("decoder.blocks.{}.self_attention", "decoder", "decoder"),
    "cross": ("decoder.blocks.{}.cross_attention", "decoder", "encoder"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The encoder-decoder."""

    patch_size: int = 8
    width: int = 96
    encoder_depth: int = 3
    decoder_depth: int = 2
    heads: int = 8
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DistillationConfig:
    """What a student learns from its teacher.

    Attributes:
        kinds: kinds of attention whose maps are aligned.
        layers: which layer of the teacher a student's layer takes, see `repkit.distillation.match_layers`.
        logit_weight: of the divergence from the teacher's logits; every method but `none` has it.
        logit_temperature: of this divergence.
        attention_weight: of the term that the method adds to it, beside the task's loss; none for the method's own.
        alignment_temperature: of the softmax over student heads.
        cache: folder where the teacher's outputs on the training examples are kept; the first run that takes an output
            writes it, and the teacher does not run in the step. None lets it run there. Needs `targets=commonest`.
    """

    kinds: tuple[Kind, ...] = ("encoder", "cross")
    layers: Literal["even", "last"] = "even"
    logit_weight: float = 1.0
    logit_temperature: float = 2.0
    attention_weight: float | None = None
    alignment_temperature: float = 1.0
    cache: str | None = None


@dataclass(frozen=True)
class Config:
    """The run.

    Attributes:
        task: what is generated: answers, captions, translations, or what is where, which a model is pre-trained on.
        role: `teacher` trains a model alone; `student` one that has a teacher, also with `method=none`.
        teacher: run directory of the teacher; its tokenizer is the student's.
        method: what the student learns from it.
        start: run directory of a model of the same shapes whose parameters are the initial ones; none for random ones.
        examples: of each split that are used at most; none for all.
        targets: which of an example's target texts is trained on, see `repkit.data.pipeline.make_sequence_batches`.
        directory: where TFDS keeps prepared data; none for its own default.
        beams: hypotheses that decoding keeps.
    """

    task: Task = "questions"
    role: Literal["teacher", "student"] = "teacher"
    teacher: str | None = None
    method: Method = "none"
    start: str | None = None
    examples: int | None = None
    targets: Targets = "drawn"
    directory: str | None = None
    beams: int = 1
    model: ModelConfig = ModelConfig()
    distillation: DistillationConfig = DistillationConfig()
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=3000, batch_size=64, learning_rate=1e-3, weight_decay=0.05, log_every=100, checkpoint_every=1500
        )
    )


def smoke(config: Config) -> Config:
    """The same run in seconds."""
    return replace(
        config,
        examples=128,
        model=replace(config.model, patch_size=8, width=16, encoder_depth=2, decoder_depth=1, heads=4),
        train=replace(config.train, steps=6, batch_size=16, log_every=2, checkpoint_every=3, warmup_steps=2),
    )


def build(config: Config, directory: Path) -> Experiment:
    """Assembles the run; reads the tokenizer from the run directory, or from the teacher's."""
    _check(config)
    train = _source(config, "train")
    validation, test = _source(config, "validation"), _source(config, "test")
    language = _language(config, directory)
    tokenizer, lengths = language.tokenizer, language.longest[config.task]
    matches = _matches(config)
    model = _model(config, tokenizer, Capture(**required_captures(matches).student) if matches else Capture())
    model = with_learned(model, _learned(config, matches))
    objective = _objective(config, matches)
    is_cached = config.method != "none" and config.distillation.cache is not None

    def batches(source: SequenceSource, *, training: bool) -> Batches:
        share = data_share(config.train) if training else WHOLE_BATCH
        return make_sequence_batches(
            source,
            tokenizer=tokenizer,
            batch_size=config.train.batch_size if training else EVALUATION_BATCH,
            image_size=TASK_IMAGE_SIZE,
            max_source_length=lengths[0],
            max_target_length=lengths[1],
            shuffle=training,
            repeat=training,
            targets=config.targets,
            seed=config.train.seed,
            process_index=share.index,
            process_count=share.count,
        )

    def training_batches() -> Batches | TeacherBatches:
        if not is_cached:
            return batches(train, training=True)
        cache = _teacher_cache(config, load_teacher(), objective.teacher_paths(), train, batches)
        return TeacherBatches(batches(train, training=True), cache)

    def generated(params: Any, source: SequenceSource) -> dict[int, str]:
        def generate(params: Any, batch: Any) -> Any:
            return model.generate(params, batch, beams=config.beams, max_length=lengths[1]).token_ids

        with batches(source, training=False) as rows:
            return generate_texts(generate, params, rows, decode=tokenizer.decode)

    def scores(params: Any, source: SequenceSource) -> dict[str, float]:
        written = AsTokenized(source, tokenizer, max_length=MOST_TARGET_TOKENS)
        return EVALUATE[config.task](generated(params, source), source if config.task == "questions" else written)

    def validate(params: Any) -> dict[str, float]:
        metrics = scores(params, validation)
        return {f"validation/{name}": value for name, value in metrics.items()}

    def evaluate(params: Any) -> list[Result]:
        metrics = scores(params, test)
        name = config.role if config.role == "teacher" else f"student, {config.method}"
        return [Result(f"{name}, {config.model.heads} heads", "digit_scenes test", config.task, metrics)]

    def load_teacher() -> FrozenTeacher:
        assert config.teacher is not None
        return _load_teacher(config.teacher, Capture(**required_captures(matches).teacher) if matches else Capture())

    def summary() -> str:
        with batches(train, training=True) as rows:
            batch = {name: jnp.asarray(value) for name, value in next(rows).items()}
        shapes = jax.eval_shape(lambda key: model.forward(model.init(key), batch, None), jax.random.key(0))
        teacher = load_teacher()
        shown = jax.eval_shape(lambda params: teacher.forward(params, batch, None), teacher.abstract_params())
        return describe(matches, outputs=shapes, teacher=shown)

    def figures(params: Any, folder: Path) -> list[Path]:
        if config.teacher is None:
            return []
        with batches(test, training=False) as rows:
            batch = {name: jnp.asarray(value) for name, value in next(rows).items()}
        cosines = compare_with_teacher(config, params, batch, tokenizer)
        picture, numbers = folder / "head_alignment.png", folder / HEADS_FILE
        plots.head_alignment(cosines.student, picture)
        values = {
            of: {name: each.tolist() for name, each in layers.items()} for of, layers in cosines._asdict().items()
        }
        numbers.write_text(json.dumps(values) + "\n")
        return [picture, numbers]

    return Experiment(
        init=_initial(config, model, directory),
        forward=model.forward,
        objective=objective,
        batches=training_batches,
        validate=validate,
        best_metric=f"validation/{MAIN_METRIC[config.task]}",
        evaluate=evaluate,
        figures=figures,
        save=language.save,
        sharding_rules=TRANSFORMER_RULES,
        teacher=load_teacher if config.method != "none" and not is_cached else None,
        summary=summary if matches else None,
    )


def _check(config: Config) -> None:
    """What can be told from the settings alone."""
    if config.role == "student" and config.teacher is None:
        raise InputError("role=student needs teacher=RUN, the run directory of a teacher that is trained on the task")
    if config.role == "teacher" and (config.teacher or config.method != "none"):
        raise InputError("teacher and method are settings of a student; add role=student")
    if config.teacher is not None and _teacher_config(config).task != config.task:
        task = _teacher_config(config).task
        raise InputError(f"the teacher in '{config.teacher}' is for task={task}, got task={config.task}")
    if config.distillation.cache is not None and config.targets != "commonest":
        raise InputError(
            "distillation.cache keeps what the teacher says of an example with one target text; add targets=commonest"
        )


@functools.cache
def _run_config(path: str) -> Config:
    _, config = RunDirectory(Path(path)).load()
    return config


def _teacher_config(config: Config) -> Config:
    assert config.teacher is not None
    return _run_config(config.teacher)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def _source(config: Config, split: str) -> SequenceSource:
    size = TASK_SPLIT_SIZES[split]
    part = "" if config.examples is None else f"[:{min(config.examples, size)}]"
    return _opened(config.task, split + part, config.directory)


# One source for all runs of a process: it keeps what it has read.
_opened = functools.cache(scene_task_source)


class _Language(NamedTuple):
    """How texts become tokens; the same for a teacher and its students.

    Attributes:
        tokenizer: of sources and targets of all tasks.
        longest: task -> tokens of the longest source and of the longest target.
    """

    tokenizer: Tokenizer
    longest: Mapping[str, tuple[int, int]]

    def save(self, folder: Path) -> None:
        """Writes what `_language` reads."""
        self.tokenizer.save(folder / TOKENIZER_FILE)
        (folder / LONGEST_FILE).write_text(json.dumps(self.longest) + "\n")


def _language(config: Config, directory: Path) -> _Language:
    """The run's own, the teacher's, or that of the run to start from; else a new one, from the texts of all tasks."""
    for path in (directory, config.teacher, config.start):
        if path is not None and (Path(path) / LONGEST_FILE).exists():
            stored = json.loads((Path(path) / LONGEST_FILE).read_text())
            longest = {task: (source, target) for task, (source, target) in stored.items()}
            return _Language(load_tokenizer(Path(path) / TOKENIZER_FILE), longest)
    texts = {task: _texts(replace(config, task=task)) for task in get_args(Task)}
    everything = sorted({text for sides in texts.values() for side in sides for text in side})
    tokenizer = train_tokenizer(everything, vocab_size=VOCABULARY_SIZE)

    def tokens_of_longest(texts: set[str], most: int) -> int:
        return int(tokenizer.encode(sorted(texts), most + 1)[1].sum(axis=1).max())

    return _Language(
        tokenizer,
        {
            # A target's begin token is not generated.
            task: (tokens_of_longest(sources, MOST_SOURCE_TOKENS), tokens_of_longest(targets, MOST_TARGET_TOKENS) - 1)
            for task, (sources, targets) in texts.items()
        },
    )


def _texts(config: Config) -> tuple[set[str], set[str]]:
    """The sources and the targets of a task."""
    source = _source(config, "train")
    texts = [source.texts(index) for index in range(len(source))]
    return {text.source for text in texts}, {target for text in texts for target in text.targets}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def _model(config: Config, tokenizer: Tokenizer, capture: Capture) -> SequenceModel:
    model = config.model
    return sequence_to_sequence(
        SequenceConfig(
            image_size=TASK_IMAGE_SIZE,
            patch_size=model.patch_size,
            vocabulary_size=tokenizer.vocab_size,
            max_source_length=MOST_SOURCE_TOKENS,
            max_target_length=MOST_TARGET_TOKENS,
            width=model.width,
            encoder_depth=model.encoder_depth,
            decoder_depth=model.decoder_depth,
            heads=model.heads,
            dropout=model.dropout,
            dtype=model.dtype,
            begin_id=tokenizer.bos_id,
            end_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        ),
        capture=capture,
    )


def _initial(config: Config, model: SequenceModel, directory: Path) -> Callable[[Any], Any]:
    has_begun = CheckpointReader(RunDirectory(directory).checkpoints).latest_step() is not None
    if config.start is None or has_begun:
        return model.init
    origin = f"start={config.start}"
    there = _run_config(config.start).model.heads
    if there != config.model.heads:  # the one setting that the shapes do not tell
        raise InputError(f"{origin} has model.heads={there}, here it is {config.model.heads}")
    return started_from(load_parameters(config.start), model.init, origin=origin, replaced=("learned",))


def _own_params(params: Any) -> Any:
    """The model's parameters without those that its losses learned."""
    return {name: value for name, value in params.items() if name != "learned"}


@functools.cache
def _load_teacher(path: str, capture: Capture) -> FrozenTeacher:
    run = load_run(path)
    model = _model(run.config, load_tokenizer(run.directory.path / TOKENIZER_FILE), capture)
    return FrozenTeacher(model.forward, jax.device_get(_own_params(run.params)))


def _teacher_cache(
    config: Config,
    teacher: FrozenTeacher,
    paths: Sequence[str],
    source: SequenceSource,
    batches: Callable[..., Batches],
) -> TeacherCache:
    """Opens the folder of these outputs, and writes it first where it is not there."""
    assert config.distillation.cache is not None
    folder = Path(config.distillation.cache) / f"{zlib.crc32(' '.join(paths).encode()):08x}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = data_identity(source)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Runs that begin together wait for the one that writes.
        if not folder.exists():
            with batches(source, training=False) as rows:
                write_cache(folder, teacher, rows, paths=paths, examples=len(source), data=data)
    return open_cache(folder, teacher=teacher.identity, data=data)


# ---------------------------------------------------------------------------------------------------------------------
# What a student learns


class _Way(NamedTuple):
    """One way to learn from a teacher's layers.

    Attributes:
        loss: of one pair of layers.
        weight: of its mean over the pairs, beside the task's loss; of the order that makes the terms alike in size.
        takes: see `repkit.distillation.Match`.
        options: constants of the loss.
    """

    loss: Callable[..., Any]
    weight: float
    takes: tuple[str, ...] = ("attention",)
    options: Mapping[str, Any] = MappingProxyType({})


def _way(config: Config) -> _Way | None:
    temperature = {"temperature": config.distillation.alignment_temperature}
    ways = {
        "one_to_one_mse": _Way(losses.one_to_one_attention, 1.0, options={"variant": "mse"}),
        "one_to_one_kl": _Way(losses.one_to_one_attention, 1.0, options={"variant": "kl"}),
        "mean_head": _Way(losses.mean_head_attention, 1.0, options={"variant": "kl"}),
        "mixed_head": _Way(losses.mixed_head_attention, 1.0, options={"variant": "kl"}),
        "merged_head": _Way(losses.merged_head_attention, 1.0, options={"variant": "kl"}),
        "relations": _Way(losses.attention_relation_distillation, 1.0, ("queries",), {"relation_heads": 4}),
        "hidden": _Way(losses.hidden_state_distillation, 1.0, ("hidden",)),
        "amad_mse": _Way(losses.attention_map_alignment, 1.0, options={"variant": "mse"} | temperature),
        "amad_kl": _Way(losses.attention_map_alignment, 1.0, options={"variant": "kl"} | temperature),
        "amad_token_kl": _Way(losses.attention_map_alignment, 0.05, options={"variant": "token_kl"} | temperature),
        "amad_kl_from_queries_keys": _Way(
            losses.attention_alignment_from_queries_keys, 1.0, ("queries", "keys"), {"variant": "kl"} | temperature
        ),
    }
    return ways.get(config.method)


def _matches(config: Config) -> list[Match]:
    way = _way(config)
    if way is None:
        return []
    student, teacher = config.model, _teacher_config(config).model
    matches: dict[tuple[str, str], Match] = {}
    for kind in config.distillation.kinds:
        _, queries, keys = LAYERS[kind]
        layers = [_layers(kind, model) for model in (student, teacher)]
        if way.takes == ("hidden",):
            layers = [[layer.rpartition(".")[0] for layer in each] for each in layers]
        for pair in match_layers(*layers, how=config.distillation.layers):
            if pair in matches:  # hidden states of a decoder's block are those of both its kinds of attention
                continue
            keywords = _masks(way, queries, keys)
            learned = LEARNED.get(config.method)
            if learned is not None:
                keywords[learned] = f"outputs.learned.{learned}_{len(matches)}"
            matches[pair] = Match(*pair, way.loss, way.takes, options=_options(way, kind), keywords=keywords)
    return list(matches.values())


# The argument of a loss that is learned, by method.
LEARNED = {"mixed_head": "mixer", "hidden": "projection"}


def _options(way: _Way, kind: Kind) -> Mapping[str, Any]:
    if way.loss is losses.attention_alignment_from_queries_keys and kind == "decoder":
        return {**way.options, "visible": "causal"}
    return way.options


def _masks(way: _Way, queries: str, keys: str) -> dict[str, str]:
    if way.takes in (("queries",), ("hidden",)):
        return {"token_mask": f"outputs.masks.{queries}"}
    return {"query_where": f"outputs.masks.{queries}", "key_where": f"outputs.masks.{keys}"}


def _learned(config: Config, matches: list[Match]) -> dict[str, Callable[[Any], Any]]:
    name = LEARNED.get(config.method)
    if name is None:
        return {}
    student, teacher = config.model, _teacher_config(config).model

    def mixer(key: Any) -> Any:
        return jax.random.uniform(key, (teacher.heads, student.heads), jnp.float32, 0.0, 2.0 / student.heads)

    def projection(key: Any) -> Any:
        return jax.random.normal(key, (student.width, teacher.width), jnp.float32) * student.width**-0.5

    init = {"mixer": mixer, "projection": projection}[name]
    return {f"{name}_{index}": init for index in range(len(matches))}


def _objective(config: Config, matches: list[Match]) -> Objective:
    terms = {
        "task": Term(
            losses.caption_cross_entropy,
            ("outputs.logits", "batch.target_ids"),
            keywords={"token_mask": "batch.target_mask"},
        )
    }
    settings = config.distillation
    if config.method != "none":
        terms["logits"] = Term(
            losses.logit_distillation,
            ("outputs.logits", "teacher.logits"),
            keywords={"token_mask": "batch.target_mask"},
            options={"temperature": settings.logit_temperature},
            weight=settings.logit_weight,
        )
    way = _way(config)
    if way is not None:
        weight = way.weight if settings.attention_weight is None else settings.attention_weight
        terms |= layer_terms(config.method, matches, weight=weight)
    return Objective(terms)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


class HeadCosines(NamedTuple):
    """How the heads of matched layers resemble one another on a batch, by "kind: layers", see `head_cosines`.

    Attributes:
        student: of a teacher's layer and the student's layer that may learn from it [teacher heads, student heads].
        teacher: of the teacher's layer and itself [teacher heads, teacher heads].
    """

    student: dict[str, np.ndarray]
    teacher: dict[str, np.ndarray]


def compare_with_teacher(config: Config, params: Any, batch: Any, tokenizer: Tokenizer) -> HeadCosines:
    """The heads of a student of these settings and parameters beside those of its teacher."""
    teacher = load_run(cast(str, config.teacher))
    pairs: dict[Kind, tuple[tuple[str, str], ...]] = {
        kind: match_layers(*(_layers(kind, model) for model in (config.model, teacher.config.model)))
        for kind in config.distillation.kinds
    }
    of_student, of_teacher = (
        list(dict.fromkeys(pair[side] for of_kind in pairs.values() for pair in of_kind)) for side in (0, 1)
    )
    student_maps, masks = _maps(config, params, of_student, batch, tokenizer)
    teacher_maps, _ = _maps(teacher.config, teacher.params, of_teacher, batch, tokenizer)
    cosines = HeadCosines({}, {})
    for kind, of_kind in pairs.items():
        _, queries, keys = LAYERS[kind]
        valid = {"query_where": masks[queries], "key_where": masks[keys], "where": jnp.asarray(batch["where"])}
        for index, (student_layer, teacher_layer) in enumerate(of_kind):
            place = _layers(kind, teacher.config.model).index(teacher_layer)
            student, own = student_maps[student_layer], teacher_maps[teacher_layer]
            cosines.student[f"{kind}: layer {place} and {index}"] = np.asarray(_head_cosines(student, own, **valid))
            cosines.teacher[f"{kind}: layer {place}"] = np.asarray(_head_cosines(own, own, **valid))
    return cosines


_head_cosines = jax.jit(head_cosines)


def _layers(kind: Kind, model: ModelConfig) -> list[str]:
    depth = model.encoder_depth if kind == "encoder" else model.decoder_depth
    return [LAYERS[kind][0].format(index) for index in range(depth)]


def _maps(
    config: Config, params: Any, layers: list[str], batch: Any, tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    model = _model(config, tokenizer, Capture(maps=tuple(layers)))
    outputs = jax.jit(model.forward)(_own_params(params), batch, None)
    return outputs["attention"], outputs["masks"]
