"""A model that compiles fast and gives out what any loss takes, and one term for every loss.

Each term has towers of its own, so that the gradient of one step, by term, is the gradient of each loss alone.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repkit import losses
from repkit.numerics import normalize
from repkit.objective import Objective, Term

ROWS, LENGTH, VOCABULARY, DIM, HEADS, CLASSES = 64, 3, 12, 8, 2, 5
EXAMPLES = 96
VIEWS = ("image", "text", "augmented_image", "augmented_text")

_PAIR = ("image.embeds", "text.embeds")
_AUGMENTED = ("augmented_image.embeds", "augmented_text.embeds")
_INDEPENDENT = tuple(f"{view}.independent" for view in VIEWS)
_SCALE = {"logit_scale": "outputs.logit_scale"}
_LABELS = {"labels": "batch.caption_id"}
_TOKENS = {"token_mask": "batch.token_mask"}
_MAPS = ("maps", "teacher.maps")


def _term(loss: Any, *inputs: str, keywords: Mapping[str, str] | None = None, **others: Any) -> Term:
    paths = tuple(path if path.startswith(("batch.", "teacher.")) else f"outputs.{path}" for path in inputs)
    return Term(loss, paths, keywords=keywords or {}, **others)


def _memory() -> losses.LogPartitionMemory:
    rng = np.random.default_rng(1)
    empty = losses.init_memory(EXAMPLES)
    visited = rng.random(EXAMPLES) < 0.6
    values = rng.normal(4.0, 0.5, (2, EXAMPLES)).astype(np.float32)
    return empty._replace(
        image_to_text=jnp.asarray(values[0]), text_to_image=jnp.asarray(values[1]), visited=jnp.asarray(visited)
    )


def _queue() -> losses.FeatureQueue:
    rng = np.random.default_rng(2)
    stored = rng.normal(size=(2, 24, DIM)).astype(np.float32)
    return losses.init_queue(24, DIM)._replace(
        image_embeds=normalize(jnp.asarray(stored[0])),
        text_embeds=normalize(jnp.asarray(stored[1])),
        labels=jnp.asarray(rng.integers(0, 40, 24), jnp.int32),
        filled=jnp.asarray(np.arange(24) >= 5),
    )


def _terms() -> dict[str, Term]:
    memory = {"options": {"memory_rate": 0.3}, "memory": _memory}
    visited = _SCALE | _LABELS | {"example_id": "batch.example_id"}
    queue = {"options": {"target_share": 0.4}, "memory": _queue}
    projected = {"options": {"variant": "projected_kl"}}
    return {
        "info_nce": _term(losses.info_nce, *_PAIR, keywords=_SCALE | _LABELS, weights="batch.weight"),
        "in_modal_info_nce": _term(losses.in_modal_info_nce, "image.embeds", _AUGMENTED[0], keywords=_SCALE),
        "decoupled_contrastive": _term(losses.decoupled_contrastive, *_PAIR, keywords=_SCALE | _LABELS),
        "sigmoid_contrastive": _term(
            losses.sigmoid_contrastive, *_PAIR, keywords=_SCALE | {"logit_bias": "outputs.logit_bias"}
        ),
        "global_contrastive": _term(losses.global_contrastive, *_PAIR, keywords=visited, **memory),
        "gamma_contrastive": _term(losses.gamma_contrastive, *_PAIR, keywords=visited, **memory),
        "queue_contrastive": _term(
            losses.queue_contrastive,
            *_PAIR,
            "teacher.image_embeds",
            "teacher.text_embeds",
            keywords=_SCALE | _LABELS,
            **queue,
        ),
        "feature_separation": _term(losses.feature_separation, *_PAIR, *_INDEPENDENT, keywords=_SCALE),
        "uniformity": _term(losses.uniformity, *_PAIR),
        "brownian_bridge": _term(losses.brownian_bridge, *_PAIR, _AUGMENTED[0], options={"time": "sampled"}),
        "brownian_bridge_path": _term(losses.brownian_bridge_path, *_PAIR, "path", options={"times": (0.25, 0.75)}),
        "geometric_consistency": _term(losses.geometric_consistency, *_PAIR, *_AUGMENTED),
        "attention_map_alignment": _term(losses.attention_map_alignment, *_MAPS),
        "attention_map_alignment, projected": _term(
            losses.attention_map_alignment, *_MAPS, keywords={"projection": "outputs.projection"}, **projected
        ),
        "attention_alignment_from_queries_keys": _term(
            losses.attention_alignment_from_queries_keys, "query", "key", "teacher.query", "teacher.key"
        ),
        "one_to_one_attention": _term(losses.one_to_one_attention, *_MAPS),
        "mean_head_attention": _term(losses.mean_head_attention, *_MAPS),
        "merged_head_attention": _term(losses.merged_head_attention, *_MAPS),
        "mixed_head_attention": _term(losses.mixed_head_attention, *_MAPS, keywords={"mixer": "outputs.mixer"}),
        "attention_relation_distillation": _term(
            losses.attention_relation_distillation,
            "query",
            "teacher.query",
            keywords=_TOKENS,
            options={"relation_heads": 2},
        ),
        "hidden_state_distillation": _term(
            losses.hidden_state_distillation, "states", "teacher.states", keywords=_TOKENS
        ),
        "logit_distillation": _term(
            losses.logit_distillation, "logits", "teacher.logits", keywords=_TOKENS, options={"temperature": 2.0}
        ),
        "caption_cross_entropy": _term(losses.caption_cross_entropy, "logits", "batch.token_ids", keywords=_TOKENS),
        "classification_cross_entropy": _term(losses.classification_cross_entropy, "classes", "batch.label"),
    }


def _own(term: Term, name: str) -> Term:
    """The term with the outputs of its own towers."""

    def own(path: str) -> str:
        return path.replace("outputs.", f"outputs.{name}.")

    keywords = {argument: own(path) for argument, path in term.keywords.items()}
    return replace(term, inputs=tuple(map(own, term.inputs)), keywords=keywords)


TERMS = {name: _own(term, name) for name, term in _terms().items()}


def objective(names: Iterable[str] = TERMS, form: losses.Form | None = None) -> Objective:
    """The terms of these names; those that take a form have this one."""

    def with_form(term: Term) -> Term:
        has_form = "form" in inspect.signature(term.loss).parameters
        return replace(term, options={**term.options, "form": form}) if has_form and form is not None else term

    return Objective({name: with_form(TERMS[name]) for name in names})


_SHAPES = {
    **{view: (48 if "image" in view else LENGTH * VOCABULARY, DIM) for view in ("image", "text")},
    "image_independent": (48, DIM),
    "text_independent": (LENGTH * VOCABULARY, DIM),
    "maps": (48, HEADS * LENGTH * LENGTH),
    "query": (48, HEADS * LENGTH * 4),
    "key": (48, HEADS * LENGTH * 4),
    "states": (48, LENGTH * DIM),
    "logits": (48, LENGTH * VOCABULARY),
    "classes": (48, CLASSES),
}


def init(names: Iterable[str], key: jax.Array) -> dict[str, Any]:
    """Parameters by term."""

    names = tuple(names)
    sizes = [rows * columns for rows, columns in _SHAPES.values()]
    # One draw for all of them compiles faster than many.
    drawn = jax.random.normal(key, (len(names), sum(sizes)), jnp.float32)

    def one(values: jax.Array) -> dict[str, Any]:
        arrays = {
            name: value.reshape(shape) * shape[0] ** -0.5
            for value, (name, shape) in zip(jnp.split(values, np.cumsum(sizes)[:-1]), _SHAPES.items(), strict=True)
        }
        cells = LENGTH * LENGTH
        projection = losses.MapProjection(jnp.eye(cells) + 0.01, jnp.full(cells, 0.05))
        scalars = {"log_scale": jnp.asarray(1.0, jnp.float32), "bias": jnp.asarray(-2.0, jnp.float32)}
        return arrays | scalars | {"mixer": jnp.full((3, HEADS), 0.4), "projection": projection}

    return {name: one(values) for name, values in zip(names, drawn, strict=True)}


def forward(params: dict[str, Any], batch: Mapping[str, Any], key: jax.Array | None) -> dict[str, Any]:
    """Every kind of output, by term."""
    rows = len(batch["image"])
    inputs = {
        view: batch[view].reshape(rows, -1) / 255.0 - 0.5
        if "image" in view
        else _one_hot(batch[f"{view.removesuffix('text')}token_ids"])
        for view in VIEWS
    }

    def one(weights: dict[str, Any]) -> dict[str, Any]:
        def shaped(name: str, *shape: int) -> jax.Array:
            return (inputs["image"] @ weights[name]).reshape(rows, *shape)

        outputs: dict[str, Any] = {
            view: {
                "embeds": normalize(rows_ @ weights[view.removeprefix("augmented_")]),
                "independent": normalize(rows_ @ weights[f"{view.removeprefix('augmented_')}_independent"]),
            }
            for view, rows_ in inputs.items()
        }
        path = [outputs["augmented_image"]["embeds"], outputs["augmented_text"]["embeds"]]
        return outputs | {
            "path": jnp.stack(path, axis=1),
            "maps": jax.nn.softmax(shaped("maps", HEADS, LENGTH, LENGTH)),
            "query": shaped("query", HEADS, LENGTH, 4),
            "key": shaped("key", HEADS, LENGTH, 4),
            "states": shaped("states", LENGTH, DIM),
            "logits": shaped("logits", LENGTH, VOCABULARY),
            "classes": shaped("classes", CLASSES),
            "logit_scale": jnp.exp(weights["log_scale"]),
            "logit_bias": weights["bias"],
            "mixer": weights["mixer"],
            "projection": weights["projection"],
        }

    return {name: one(weights) for name, weights in params.items()}


def _one_hot(token_ids: jax.Array) -> jax.Array:
    return jax.nn.one_hot(token_ids, VOCABULARY).reshape(len(token_ids), -1)


def batch(mask: str) -> dict[str, np.ndarray]:
    """Rows with an even mask, or with an uneven one, of which a quarter of eight devices has no valid row."""
    rng = np.random.default_rng(0)
    where = np.ones(ROWS, bool)
    if mask == "uneven":
        where[:16] = False
        where[rng.permutation(np.arange(16, ROWS))[:11]] = False

    def teacher(*shape: int) -> np.ndarray:
        return rng.normal(size=(ROWS, *shape)).astype(np.float32)

    maps = np.exp(teacher(3, LENGTH, LENGTH))
    embeds = teacher(2, DIM)
    embeds /= np.linalg.norm(embeds, axis=-1, keepdims=True)
    return {
        "image": rng.integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8),
        "augmented_image": rng.integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8),
        "token_ids": rng.integers(0, VOCABULARY, (ROWS, LENGTH), dtype=np.int32),
        "augmented_token_ids": rng.integers(0, VOCABULARY, (ROWS, LENGTH), dtype=np.int32),
        "token_mask": np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (ROWS, 1)),
        "example_id": rng.permutation(EXAMPLES)[:ROWS].astype(np.int32),
        "caption_id": rng.integers(0, 40, ROWS, dtype=np.int32),
        "label": rng.integers(0, CLASSES, ROWS, dtype=np.int32),
        "weight": rng.uniform(0.5, 2.0, ROWS).astype(np.float32),
        "where": where,
        "teacher/maps": maps / maps.sum(-1, keepdims=True),
        "teacher/query": teacher(3, LENGTH, 4),
        "teacher/key": teacher(3, LENGTH, 4),
        "teacher/states": teacher(LENGTH, DIM),
        "teacher/logits": teacher(LENGTH, VOCABULARY),
        "teacher/image_embeds": embeds[:, 0],
        "teacher/text_embeds": embeds[:, 1],
    }
