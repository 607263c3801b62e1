"""What every public loss promises, tested alike for all of them.

A new loss needs a float64 reference in tests/reference and one entry, or one per variant, in CASES.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import beartype
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import jaxtyped

from repkit import losses
from repkit.checks import InputError
from repkit.losses.bridge import SAMPLED_TIMES
from tests.reference import attention as attention_reference
from tests.reference import distillation as distillation_reference
from tests.reference import losses as reference

B, D = 16, 6


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss with one choice of options.

    Attributes:
        loss: the public function.
        arrays: name of each positional array to the axes between the first and the last, such as (2,) for [b 2 d].
        constants: the arrays among them that get no gradient.
        domain: makes the loss's kind of array of any array.
        reference: of keyword arguments and those at which what the loss holds fixed is computed, to losses [b].
        scalars: differentiable scalar arguments and their values.
        rows: integer and boolean arguments with one entry, or one vector, per row.
        positional_rows: those among them that are positional, after the arrays.
        own_widths: each array has its own length of the last axis.
        options: all other arguments; read from a function because they may hold arrays.
        mistakes: pairs of wrong options and a phrase of the message that they must raise.
    """

    loss: Callable[..., Any]
    arrays: Mapping[str, tuple[int, ...]]
    reference: Callable[[dict[str, Any], dict[str, Any]], np.ndarray]
    constants: tuple[str, ...] = ()
    domain: Callable[[np.ndarray], np.ndarray] = np.asarray
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    positional_rows: tuple[str, ...] = ()
    own_widths: bool = False
    options: Callable[[], dict[str, Any]] = dict
    mistakes: tuple[tuple[dict[str, Any], str], ...] = ()


# These programs run a few times on tiny arrays: compiling is all they cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_key() -> jax.Array:
    return jax.random.key(7)


LABELS = np.array([0, 1, 2, 3, 1, 5, 2, 7, 8, 9, 1, 11, 12, 13, 14, 9], np.int32)
# Twice the same example, and ids outside the memory on both sides.
EXAMPLE_IDS = np.array([3, 30, 7, 12, 3, 39, 0, 22, 40, -1, 17, 5, 28, 31, 9, 14], np.int32)
PAIR = {"image_embeds": (), "text_embeds": ()}
VIEWS = {"embeds": (), "augmented_embeds": ()}
SEPARATION = PAIR | dict.fromkeys(
    ("image_independent", "text_independent", "augmented_image_independent", "augmented_text_independent"), ()
)
MEMORY_VALUES = np.random.default_rng(5).normal(4.0, 0.5, (2, 40))
MEMORY_VISITED = np.random.default_rng(6).random(40) < 0.6


def memory() -> losses.LogPartitionMemory:
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return losses.init_memory(40, dtype)._replace(
        image_to_text=jnp.asarray(MEMORY_VALUES[0], dtype),
        text_to_image=jnp.asarray(MEMORY_VALUES[1], dtype),
        visited=jnp.asarray(MEMORY_VISITED),
    )


def gamma_reference(**options) -> Callable[[dict[str, Any], dict[str, Any]], np.ndarray]:
    def evaluate(now: dict[str, Any], held: dict[str, Any]) -> np.ndarray:
        held = {name: held[name] for name in ("image_embeds", "text_embeds", "logit_scale")}
        noise = None
        if options.get("draw") != "expected":
            # The draws themselves are tested in test_gamma.py; here they are taken as they are.
            zeros = jnp.zeros((B, 2), jnp.float64)
            noise = np.exp(losses.sample_rates(zeros, key=make_key(), shape=options.get("shape", 1.0))).T
        kept = {name: value for name, value in options.items() if name != "shape"}
        return reference.gamma_contrastive(**now, **kept, noise=noise, held=held)

    return evaluate


def bridge_times() -> np.ndarray:
    return np.asarray(jax.random.uniform(make_key(), (B,), jnp.float64, *SAMPLED_TIMES))


QUEUE = np.random.default_rng(17).normal(size=(2, 24, D))
QUEUE_LABELS = np.random.default_rng(18).integers(0, 20, 24).astype(np.int32)
QUEUE_FILLED = np.arange(24) >= 5
TEACHER_PAIR = {"teacher_image_embeds": (), "teacher_text_embeds": ()}


def queue(size: int) -> losses.FeatureQueue:
    """The last `size` places of the queue."""
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return losses.init_queue(size, D, dtype)._replace(
        image_embeds=jnp.asarray(QUEUE[0, 24 - size :], dtype),
        text_embeds=jnp.asarray(QUEUE[1, 24 - size :], dtype),
        labels=jnp.asarray(QUEUE_LABELS[24 - size :]),
        filled=jnp.asarray(QUEUE_FILLED[24 - size :]),
        position=jnp.int32(size - 2),
    )


def queue_case(size: int = 24, target_share: float = 0.4, **options) -> dict[str, Any]:
    """The fields of a case of queue_contrastive."""
    kept = slice(24 - size, None)
    stored = {"image_embeds": QUEUE[0, kept], "text_embeds": QUEUE[1, kept]}
    stored |= {"labels": QUEUE_LABELS[kept], "filled": QUEUE_FILLED[kept]}

    def evaluate(now: dict[str, Any], held: dict[str, Any]) -> np.ndarray:
        return reference.queue_contrastive(**now, queue=stored, target_share=target_share, held=held)

    return {
        "loss": losses.queue_contrastive,
        "arrays": PAIR | TEACHER_PAIR,
        "constants": tuple(TEACHER_PAIR),
        "reference": evaluate,
        "scalars": {"logit_scale": 3.0},
        "options": lambda: {"memory": queue(size), "target_share": target_share, **options},
    }


MEMORY_REFERENCE = {
    "image_to_text": MEMORY_VALUES[0],
    "text_to_image": MEMORY_VALUES[1],
    "visited": MEMORY_VISITED,
}
MAPS = {"student_maps": (2, 3), "teacher_maps": (3, 3)}
QUERIES_KEYS = {"student_query": (2, 3), "student_key": (2, 4), "teacher_query": (3, 3), "teacher_key": (3, 4)}
# An example without a query that counts, and one without a key.
QUERY_WHERE = np.random.default_rng(8).random((B, 3)) < 0.8
QUERY_WHERE[3] = False
KEY_WHERE = np.random.default_rng(9).random((B, D)) < 0.8
KEY_WHERE[4] = False


def as_maps(x: np.ndarray) -> np.ndarray:
    """Positive cells, far enough from 0 for a finite difference of their logarithms."""
    return np.abs(x) + 0.1


def map_projection() -> losses.MapProjection:
    rng, cells = np.random.default_rng(10), 3 * D
    weight, bias = rng.normal(size=(cells, cells)), rng.uniform(0.5, 1.0, cells)
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return losses.MapProjection(jnp.asarray(weight, dtype), jnp.asarray(bias, dtype))


def alignment_case(scalars: Mapping[str, float] | None = None, **options) -> dict[str, Any]:
    """The fields of a case of attention_map_alignment."""

    def evaluate(now: dict[str, Any], held: dict[str, Any]) -> np.ndarray:
        now = now | {"teacher_maps": held["teacher_maps"]}
        if options.get("alignment_gradient") == "stopped":
            now = now | {"temperature": held["temperature"], "held_student_maps": held["student_maps"]}
        more = {"projection": map_projection()} if options["variant"] == "projected_kl" else {}
        return attention_reference.attention_map_alignment(**now, **options, **more)

    def arguments() -> dict[str, Any]:
        return options | ({"projection": map_projection()} if options["variant"] == "projected_kl" else {})

    return {
        "loss": losses.attention_map_alignment,
        "arrays": MAPS,
        "constants": ("teacher_maps",),
        "domain": as_maps,
        "reference": evaluate,
        "scalars": {"temperature": 0.4} if scalars is None else scalars,
        "options": arguments,
    }


def queries_keys_case(**options) -> dict[str, Any]:
    """The fields of a case of attention_alignment_from_queries_keys."""
    constants = ("teacher_query", "teacher_key")

    def evaluate(now: dict[str, Any], held: dict[str, Any]) -> np.ndarray:
        now = now | {name: held[name] for name in constants}
        return attention_reference.attention_alignment_from_queries_keys(**now, **options)

    return {
        "loss": losses.attention_alignment_from_queries_keys,
        "arrays": QUERIES_KEYS,
        "constants": constants,
        "reference": evaluate,
        "scalars": {"temperature": 0.4, "student_logit_scale": 3.0},
        "options": lambda: options,
    }


def head_case(loss: Callable[..., Any], match: str, **options) -> dict[str, Any]:
    """The fields of a case of the losses that match heads otherwise."""

    def evaluate(now: dict[str, Any], held: dict[str, Any]) -> np.ndarray:
        now = now | {"teacher_maps": held["teacher_maps"]}
        arrays = {name: np.asarray(value()) for name, value in options.items() if callable(value)}
        return attention_reference.matched_heads(**now, **{**options, **arrays}, match=match)

    return {
        "loss": loss,
        "arrays": MAPS,
        "constants": ("teacher_maps",),
        "domain": as_maps,
        "reference": evaluate,
        "rows": {"query_where": QUERY_WHERE, "key_where": KEY_WHERE},
        "options": lambda: {name: value() if callable(value) else value for name, value in options.items()},
    }


# An example without a token that counts, and one with a single token.
TOKEN_MASK = np.random.default_rng(13).random((B, 3)) < 0.7
TOKEN_MASK[3] = False
TOKEN_MASK[4] = [False, True, False]
TOKEN_IDS = np.random.default_rng(14).integers(0, D, (B, D)).astype(np.int32)
CAPTION_MASK = np.arange(D) < np.random.default_rng(15).integers(0, D + 1, (B, 1))


def distillation_case(
    loss: Callable[..., Any], arrays: dict[str, tuple[int, ...]], *, has_mask: bool = True, **options
) -> dict[str, Any]:
    """The fields of a case of a loss of a student's and a teacher's array."""
    _, teacher = arrays

    def evaluate(now: dict[str, Any], held: dict[str, Any]) -> np.ndarray:
        given = {name: value() if callable(value) else value for name, value in options.items()}
        return getattr(distillation_reference, loss.__name__)(**now | {teacher: held[teacher]}, **given)

    return {
        "loss": loss,
        "arrays": arrays,
        "constants": (teacher,),
        "reference": evaluate,
        "rows": {"token_mask": TOKEN_MASK} if has_mask else {},
        "options": lambda: {name: value() if callable(value) else value for name, value in options.items()},
    }


def caption_reference(now: dict[str, Any], held: dict[str, Any]) -> np.ndarray:
    return distillation_reference.caption_cross_entropy(**now)


# One class is unknown.
CLASSES = np.where(np.arange(B) == 4, -1, TOKEN_IDS[:, 0]).astype(np.int32)


def class_reference(now: dict[str, Any], held: dict[str, Any]) -> np.ndarray:
    labels = np.asarray(now["labels"])
    texts = {"logits": now["logits"][:, None], "token_ids": labels[:, None], "token_mask": labels[:, None] >= 0}
    others = {name: value for name, value in now.items() if name not in ("logits", "labels")}
    return distillation_reference.caption_cross_entropy(**texts, **others)


def state_projection() -> jax.Array:
    return jnp.asarray(np.random.default_rng(16).normal(size=(D, D)))


def mixer() -> jax.Array:
    return jnp.asarray(np.random.default_rng(11).uniform(0.1, 1.0, (3, 2)))


def merging() -> jax.Array:
    return jnp.asarray(np.random.default_rng(12).uniform(0.1, 1.0, (2, 3)))


CASES = {
    "info_nce": Case(
        losses.info_nce,
        PAIR,
        lambda now, held: reference.info_nce(**now),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS},
        mistakes=(
            ({"direction": "image_to_txt"}, "did you mean 'image_to_text'"),
            ({"labels": np.zeros(B, np.float32)}, "expected labels to hold int values"),
        ),
    ),
    "info_nce, without labels, from the text": Case(
        losses.info_nce,
        PAIR,
        lambda now, held: reference.info_nce(**now, direction="text_to_image"),
        scalars={"logit_scale": 3.0},
        options=lambda: {"direction": "text_to_image"},
    ),
    "info_nce, in odd blocks": Case(
        losses.info_nce,
        PAIR,
        lambda now, held: reference.info_nce(**now),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS},
        options=lambda: {"form": losses.Blocks(5, exchange="gather")},
        mistakes=(
            ({"form": "blocks"}, "expected form to be losses.Blocks(...) or 'plain', got 'blocks'"),
            ({"form": losses.Blocks(0)}, "expected form.size >= 1"),
            ({"form": losses.Blocks(exchange="rng")}, "did you mean 'ring'"),
        ),
    ),
    "info_nce, large scores": Case(
        losses.info_nce,
        PAIR,
        lambda now, held: reference.info_nce(**now),
        scalars={"logit_scale": 300.0},
        rows={"labels": LABELS},
        options=lambda: {"form": losses.Blocks(5)},
    ),
    "info_nce, plain": Case(
        losses.info_nce,
        PAIR,
        lambda now, held: reference.info_nce(**now),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS},
        options=lambda: {"form": "plain"},
    ),
    "in_modal_info_nce": Case(
        losses.in_modal_info_nce,
        VIEWS,
        lambda now, held: reference.in_modal_info_nce(**now, original=False),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS},
        mistakes=(({"candidates": "augmentd"}, "did you mean 'augmented'"),),
    ),
    "in_modal_info_nce, original candidates": Case(
        losses.in_modal_info_nce,
        VIEWS,
        lambda now, held: reference.in_modal_info_nce(**now, original=True),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS},
        options=lambda: {"candidates": "original"},
    ),
    "decoupled_contrastive": Case(
        losses.decoupled_contrastive,
        PAIR,
        lambda now, held: reference.decoupled_contrastive(**now),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS},
        mistakes=(({"direction": "text_to_img"}, "did you mean 'text_to_image'"),),
    ),
    "sigmoid_contrastive": Case(
        losses.sigmoid_contrastive,
        PAIR,
        lambda now, held: reference.sigmoid_contrastive(**now),
        scalars={"logit_scale": 3.0, "logit_bias": -2.0},
        rows={"labels": LABELS},
        options=lambda: {"form": losses.Blocks(5)},
    ),
    "sigmoid_contrastive, plain": Case(
        losses.sigmoid_contrastive,
        PAIR,
        lambda now, held: reference.sigmoid_contrastive(**now),
        scalars={"logit_scale": 3.0, "logit_bias": -2.0},
        options=lambda: {"form": "plain"},
    ),
    "global_contrastive": Case(
        losses.global_contrastive,
        PAIR,
        lambda now, held: reference.global_contrastive(**now, memory=MEMORY_REFERENCE, memory_rate=0.3, held=held),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS, "example_id": EXAMPLE_IDS},
        options=lambda: {"memory": memory(), "memory_rate": 0.3},
        mistakes=(({"memory_rate": None}, "a memory needs memory_rate"),),
    ),
    "queue_contrastive": Case(
        **queue_case(),
        rows={"labels": LABELS},
        mistakes=(
            ({"target_share": 1.5}, "expected target_share >= 0 and <= 1"),
            (
                {"memory": losses.init_queue(4, D + 1)},
                f"expected d = {D}, as in image_embeds, got d = {D + 1} in memory",
            ),
            ({"memory_axis_name": "data"}, "expected memory_axis_name to be None or axis_name=None, got 'data'"),
        ),
    ),
    "queue_contrastive, hard targets, without labels, in odd blocks": Case(
        **queue_case(size=21, target_share=0.0, form=losses.Blocks(5, exchange="gather"))
    ),
    "queue_contrastive, plain": Case(**queue_case(size=21, form="plain"), rows={"labels": LABELS}),
    "gamma_contrastive": Case(
        losses.gamma_contrastive,
        PAIR,
        gamma_reference(memory=MEMORY_REFERENCE, memory_rate=0.3),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS, "example_id": EXAMPLE_IDS},
        options=lambda: {"memory": memory(), "memory_rate": 0.3, "key": make_key()},
        mistakes=(
            ({"key": None}, "needs a random key"),
            ({"key": np.zeros(2, np.uint32)}, "typed random key"),
            ({"example_id": None}, "a memory needs example_id"),
            ({"memory_rate": None}, "a memory needs memory_rate"),
            ({"memory_rate": 1.5}, "expected memory_rate > 0 and <= 1"),
            ({"draw": "sample"}, "did you mean 'sampled'"),
            ({"positive": "mean"}, "unknown positive 'mean'"),
            ({"shape": 0.0}, "expected shape > 0"),
            ({"dataset_size": 1}, "expected dataset_size >= 2"),
        ),
    ),
    "gamma_contrastive, sampled positives, weighted": Case(
        losses.gamma_contrastive,
        PAIR,
        gamma_reference(dataset_size=100, positive="sampled", positive_weight=0.5, shape=2.0),
        scalars={"logit_scale": 3.0},
        options=lambda: {
            "memory": None,
            "dataset_size": 100,
            "positive": "sampled",
            "positive_weight": 0.5,
            "shape": 2.0,
            "key": make_key(),
        },
    ),
    "gamma_contrastive, expected, without positives": Case(
        losses.gamma_contrastive,
        PAIR,
        gamma_reference(memory=MEMORY_REFERENCE, memory_rate=1.0, draw="expected", positive_weight=0.0),
        scalars={"logit_scale": 3.0},
        rows={"example_id": EXAMPLE_IDS},
        options=lambda: {"memory": memory(), "memory_rate": 1.0, "draw": "expected", "positive_weight": 0.0},
    ),
    "gamma_contrastive, previous rates": Case(
        losses.gamma_contrastive,
        PAIR,
        gamma_reference(memory=MEMORY_REFERENCE, memory_rate=0.3, rates_from="previous"),
        scalars={"logit_scale": 3.0},
        rows={"example_id": EXAMPLE_IDS},
        options=lambda: {
            "memory": memory(),
            "memory_rate": 0.3,
            "rates_from": "previous",
            "form": losses.Blocks(5),
            "key": make_key(),
        },
        mistakes=(({"rates_from": "update"}, "did you mean 'updated'"),),
    ),
    "gamma_contrastive, previous rates of known examples": Case(
        losses.gamma_contrastive,
        PAIR,
        gamma_reference(memory=MEMORY_REFERENCE, memory_rate=0.3, rates_from="previous", draw="expected"),
        scalars={"logit_scale": 3.0},
        rows={"example_id": np.flatnonzero(MEMORY_VISITED)[:B].astype(np.int32)},
        options=lambda: {"memory": memory(), "memory_rate": 0.3, "rates_from": "previous", "draw": "expected"},
    ),
    "feature_separation": Case(
        losses.feature_separation,
        SEPARATION,
        lambda now, held: reference.feature_separation(**now),
        scalars={"logit_scale": 3.0},
        rows={"labels": LABELS},
    ),
    "feature_separation, weighted parts": Case(
        losses.feature_separation,
        SEPARATION,
        lambda now, held: reference.feature_separation(**now),
        scalars={
            "logit_scale": 3.0,
            "orthogonality_weight": 0.5,
            "contrastive_weight": 2.0,
            "uniformity_weight": 3.0,
        },
    ),
    "feature_separation, plain": Case(
        losses.feature_separation,
        SEPARATION,
        lambda now, held: reference.feature_separation(**now),
        scalars={"logit_scale": 3.0},
        options=lambda: {"form": "plain"},
    ),
    "uniformity": Case(
        losses.uniformity,
        PAIR,
        lambda now, held: reference.uniformity(**now),
        options=lambda: {"form": losses.Blocks(size=3)},
        mistakes=(({"form": "blocks"}, "expected form to be losses.Blocks(...) or 'plain'"),),
    ),
    "uniformity, gathered": Case(
        losses.uniformity,
        PAIR,
        lambda now, held: reference.uniformity(**now),
        options=lambda: {"form": losses.Blocks(exchange="gather")},
    ),
    "uniformity, plain": Case(
        losses.uniformity,
        PAIR,
        lambda now, held: reference.uniformity(**now),
        options=lambda: {"form": "plain"},
    ),
    "brownian_bridge": Case(
        losses.brownian_bridge,
        PAIR | {"augmented_embeds": ()},
        lambda now, held: reference.brownian_bridge(**now, time=bridge_times(), is_sampled=True),
        options=lambda: {"time": "sampled", "key": make_key()},
    ),
    "brownian_bridge, fixed time": Case(
        losses.brownian_bridge,
        PAIR | {"augmented_embeds": ()},
        lambda now, held: reference.brownian_bridge(**now, time=0.25),
        mistakes=(
            ({"time": "sample"}, "did you mean 'sampled'"),
            ({"time": "sampled"}, "needs a random key"),
            ({"time": 1.5}, "expected time >= 0 and <= 1"),
            ({"time": np.zeros(3, np.float32)}, "a number or one per row"),
        ),
    ),
    "brownian_bridge_path": Case(
        losses.brownian_bridge_path,
        PAIR | {"path_embeds": (3,)},
        lambda now, held: reference.brownian_bridge_path(**now, times=(0.2, 0.3, 0.8)),
        options=lambda: {"times": (0.2, 0.3, 0.8)},
        mistakes=(
            ({"times": (0.2, 0.8)}, "expected 3 increasing times"),
            ({"times": (0.2, 0.9, 0.8)}, "expected 3 increasing times"),
            ({"times": (0.0, 0.2, 0.8)}, "strictly between 0 and 1"),
        ),
    ),
    "geometric_consistency": Case(
        losses.geometric_consistency,
        PAIR | {"augmented_image_embeds": (), "augmented_text_embeds": ()},
        lambda now, held: reference.geometric_consistency(**now),
        scalars={"cross_modal_weight": 0.25, "in_modal_weight": 0.5},
        mistakes=(({"augmented_text_embeds": None}, "pass both or neither"),),
    ),
    "geometric_consistency, plain": Case(
        losses.geometric_consistency,
        PAIR | {"augmented_image_embeds": (), "augmented_text_embeds": ()},
        lambda now, held: reference.geometric_consistency(**now),
        scalars={"cross_modal_weight": 0.25, "in_modal_weight": 0.5},
        options=lambda: {"form": "plain"},
    ),
    "geometric_consistency, not augmented": Case(
        losses.geometric_consistency,
        PAIR,
        lambda now, held: reference.geometric_consistency(**now),
    ),
    "attention_map_alignment": Case(
        **alignment_case(variant="kl"),
        rows={"query_where": QUERY_WHERE, "key_where": KEY_WHERE},
        mistakes=(
            ({"variant": "kld"}, "did you mean 'kl'"),
            ({"alignment_gradient": "stop"}, "did you mean 'stopped'"),
            ({"temperature": 0.0}, "expected temperature > 0"),
            ({"form": "blocks"}, "or 'plain', got 'blocks'"),
            ({"variant": "projected_kl"}, "expected a projection"),
            ({"projection": losses.MapProjection(np.eye(18), np.ones(18))}, "and for no other, got one"),
            (
                {"variant": "projected_kl", "projection": losses.MapProjection(np.eye(3), np.ones(3))},
                "n = q k = 18 cells, got one of 3",
            ),
            ({"key_where": np.ones((B, 3), bool)}, "expected k = 6, as in student_maps, got k = 3 in key_where"),
        ),
    ),
    "attention_map_alignment, squared": Case(
        **alignment_case(variant="mse"), rows={"query_where": QUERY_WHERE, "key_where": KEY_WHERE}
    ),
    "attention_map_alignment, squared, weights held": Case(
        **alignment_case(variant="mse", alignment_gradient="stopped")
    ),
    "attention_map_alignment, weights held": Case(
        **alignment_case(variant="kl", alignment_gradient="stopped"), rows={"key_where": KEY_WHERE}
    ),
    "attention_map_alignment, by row": Case(
        **alignment_case(variant="token_kl"), rows={"query_where": QUERY_WHERE, "key_where": KEY_WHERE}
    ),
    "attention_map_alignment, projected": Case(**alignment_case(variant="projected_kl")),
    "attention_map_alignment, plain": Case(
        **alignment_case(variant="kl") | {"options": lambda: {"variant": "kl", "form": "plain"}},
        rows={"query_where": QUERY_WHERE, "key_where": KEY_WHERE},
    ),
    "attention_map_alignment, blocks of rows": Case(
        **alignment_case(variant="kl") | {"options": lambda: {"variant": "kl", "form": losses.Blocks(size=2)}},
        rows={"query_where": QUERY_WHERE, "key_where": KEY_WHERE},
    ),
    "attention_alignment_from_queries_keys": Case(
        **queries_keys_case(variant="kl"),
        rows={"query_where": QUERY_WHERE, "key_where": KEY_WHERE[:, :4]},
        mistakes=(
            ({"variant": "projected_kl"}, "unknown variant 'projected_kl'"),
            ({"visible": "past"}, "unknown visible 'past'"),
        ),
    ),
    "attention_alignment_from_queries_keys, squared, causal": Case(
        **queries_keys_case(variant="mse", visible="causal"), rows={"key_where": KEY_WHERE[:, :4]}
    ),
    "attention_alignment_from_queries_keys, by row, causal": Case(
        **queries_keys_case(variant="token_kl", visible="causal")
    ),
    "one_to_one_attention": Case(
        **head_case(losses.one_to_one_attention, "one_to_one", variant="kl"),
        mistakes=(({"variant": "token_kl"}, "unknown variant 'token_kl'"),),
    ),
    "one_to_one_attention, squared": Case(**head_case(losses.one_to_one_attention, "one_to_one", variant="mse")),
    "mean_head_attention": Case(**head_case(losses.mean_head_attention, "mean", variant="kl")),
    "mixed_head_attention": Case(
        **head_case(losses.mixed_head_attention, "mixed", variant="kl", mixer=mixer),
        mistakes=(({"mixer": np.ones((2, 3), np.float32)}, "expected mixer of shape [3, 2], got [2, 3]"),),
    ),
    "merged_head_attention": Case(
        **head_case(losses.merged_head_attention, "merged", variant="kl", merging=merging),
        mistakes=(({"merging": np.ones((3, 2), np.float32)}, "expected merging of shape [2, 3], got [3, 2]"),),
    ),
    "merged_head_attention, squared": Case(
        **head_case(losses.merged_head_attention, "merged", variant="mse", merging=merging)
    ),
    "logit_distillation": Case(
        **distillation_case(losses.logit_distillation, {"student_logits": (3,), "teacher_logits": (3,)}),
        scalars={"temperature": 0.3},
        mistakes=(
            ({"temperature": 0}, "expected temperature > 0"),
            ({"token_mask": np.ones((B, 2), bool)}, "expected l = 3, as in student_logits, got l = 2 in token_mask"),
        ),
    ),
    "logit_distillation, of whole examples": Case(
        **distillation_case(losses.logit_distillation, {"student_logits": (), "teacher_logits": ()}, has_mask=False),
        scalars={"temperature": 2.0},
        mistakes=(({"token_mask": np.ones((B, 2), bool)}, "expected token_mask to have 1 axes, got 2"),),
    ),
    "hidden_state_distillation": Case(
        **distillation_case(losses.hidden_state_distillation, {"student_states": (3,), "teacher_states": (3,)}),
        mistakes=(
            ({"teacher_states": np.ones((B, 3, 9), np.float32)}, "states of two widths need a projection [6, 9]"),
            ({"projection": np.ones((5, 6), np.float32)}, "expected d = 6, as in student_states, got d = 5 in proj"),
        ),
    ),
    "hidden_state_distillation, projected": Case(
        **distillation_case(
            losses.hidden_state_distillation,
            {"student_states": (3,), "teacher_states": (3,)},
            projection=state_projection,
        ),
    ),
    "attention_relation_distillation": Case(
        **distillation_case(
            losses.attention_relation_distillation,
            {"student_vectors": (2, 3), "teacher_vectors": (4, 3)},
            relation_heads=3,
        ),
        own_widths=True,
        mistakes=(
            ({"relation_heads": 0}, "expected relation_heads >= 1"),
            ({"relation_heads": 8}, "expected relation_heads to divide the 2 x 6 = 12 features of student_vectors"),
            (
                {"teacher_vectors": np.ones((B, 4, 2, D), np.float32)},
                "expected l = 3, as in student_vectors, got l = 2 in teacher_vectors",
            ),
        ),
    ),
    "attention_relation_distillation, not masked": Case(
        **distillation_case(
            losses.attention_relation_distillation,
            {"student_vectors": (2, 3), "teacher_vectors": (1, 3)},
            has_mask=False,
            relation_heads=1,
        ),
    ),
    "caption_cross_entropy": Case(
        losses.caption_cross_entropy,
        {"logits": (D,)},
        caption_reference,
        rows={"token_ids": TOKEN_IDS, "token_mask": CAPTION_MASK},
        positional_rows=("token_ids",),
        mistakes=(({"label_smoothing": 1.5}, "expected label_smoothing >= 0 and <= 1"),),
    ),
    "caption_cross_entropy, smoothed": Case(
        losses.caption_cross_entropy,
        {"logits": (D,)},
        caption_reference,
        scalars={"label_smoothing": 0.2},
        rows={"token_ids": TOKEN_IDS},
        positional_rows=("token_ids",),
    ),
    "classification_cross_entropy": Case(
        losses.classification_cross_entropy,
        {"logits": ()},
        class_reference,
        scalars={"label_smoothing": 0.2},
        rows={"labels": CLASSES},
        positional_rows=("labels",),
        own_widths=True,
        mistakes=(({"label_smoothing": -0.5}, "expected label_smoothing >= 0 and <= 1"),),
    ),
}
# Where a test is about a loss and not about its options, the first case of each loss stands for it: one that draws, if
# the loss can.
LOSSES = {case.loss.__name__: case for case in reversed(CASES.values())}

# One loss of each way over devices: around the ring, with a memory, by sums of matrices, and row by row. The placements
# of all others are slow tests.
EACH_WAY = ("info_nce", "gamma_contrastive", "geometric_consistency", "attention_map_alignment")
# The first case of each loss, and those whose form makes their placements over devices another program.
PLACED = [
    name
    if case.loss.__name__ in EACH_WAY and case is LOSSES[case.loss.__name__]
    else pytest.param(name, marks=pytest.mark.slow)
    for name, case in CASES.items()
    if "form" in case.options() or case is LOSSES[case.loss.__name__]
]

every_case = pytest.mark.parametrize("name", CASES)
every_loss = pytest.mark.parametrize("name", sorted(LOSSES))
# The first case of each loss among the fast tests, its others among the slow ones.
every_case_the_first_fast = pytest.mark.parametrize(
    "name",
    [
        name if case is LOSSES[case.loss.__name__] else pytest.param(name, marks=pytest.mark.slow)
        for name, case in CASES.items()
    ],
)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and calls


def make_inputs(case: Case, seed: int = 0, rows: int = B) -> dict[str, Any]:
    """Unit vectors that are alike within a row, and the scalars: everything that a gradient is taken of."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(rows, D))
    inputs: dict[str, Any] = {}
    for name, axes in case.arrays.items():
        x = common.reshape(rows, *(1,) * len(axes), D) + rng.normal(size=(rows, *axes, D))
        inputs[name] = case.domain(x / np.linalg.norm(x, axis=-1, keepdims=True))
    return inputs | {name: np.float64(value) for name, value in case.scalars.items()}


def make_mask() -> np.ndarray:
    """On 8 devices of two rows: devices without, with one and with two valid rows."""
    where = np.ones(B, bool)
    where[[0, 1, 5, 6, 14]] = False
    return where


def make_weights() -> np.ndarray:
    weights = np.random.default_rng(3).uniform(0.5, 2.0, B)
    weights[[2, 9]] = 0.0
    return weights


def call(case: Case, inputs: Mapping[str, Any], rows: Mapping[str, Any] | None = None, **keywords) -> Any:
    """The loss, as (loss, memory) where it has a memory and as (loss, None) where it has none."""
    scalars = {name: inputs[name] for name in case.scalars}
    given = {**scalars, **(rows or case.rows), **case.options()} | keywords
    arrays = [inputs[name] for name in case.arrays] + [given.pop(name) for name in case.positional_rows]
    result = case.loss(*arrays, **given)
    return result if isinstance(result, tuple) else (result, None)


def cast(tree: Any, dtype: Any) -> Any:
    """The arrays as JAX arrays, rounded by NumPy: no program is compiled for it."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype)), tree)


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """(inputs, rows, where, weights) -> (mean loss, memory), gradient; compiled once per case and dtype."""

    def mean(inputs: dict[str, Any], rows: dict[str, Any], where: Any, weights: Any) -> Any:
        return call(CASES[name], inputs, rows, where=where, weights=weights)

    return jit(jax.value_and_grad(mean, has_aux=True))


def value_and_gradient(name: str, inputs: dict[str, Any], where: Any, weights: Any) -> Any:
    """The mean loss and its gradient, in NumPy."""
    (value, _), gradient = jax.device_get(compiled(name)(inputs, dict(CASES[name].rows), where, weights))
    return value, gradient


def reference_rows(case: Case, inputs: dict[str, Any], held: dict[str, Any], where: Any, weights: Any) -> np.ndarray:
    arguments = {**inputs, **case.rows, "where": where, "weights": weights}
    return case.reference(arguments, held)


def reference_mean(case: Case, inputs: dict[str, Any], held: dict[str, Any], where: Any, weights: Any) -> float:
    rows = reference_rows(case, inputs, held, where, weights)
    total = sum(weights[i] * rows[i] for i in range(B) if where[i])
    return total / sum(weights[i] for i in range(B) if where[i])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Form


def test_every_public_loss_has_a_case():
    functions = {name: value for name, value in vars(losses).items() if name in losses.__all__}
    public = {
        name
        for name, value in functions.items()
        if inspect.isfunction(value) and "reduction" in inspect.signature(value).parameters
    }
    assert public == set(LOSSES)


@every_loss
def test_signature(name):
    parameters = inspect.signature(LOSSES[name].loss).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    positional = [each for each, kind in zip(parameters, kinds, strict=True) if kind != inspect.Parameter.KEYWORD_ONLY]
    keywords = list(parameters)[len(positional) :]
    assert positional == [*LOSSES[name].arrays, *LOSSES[name].positional_rows]
    assert keywords[-4:] == ["where", "weights", "axis_name", "reduction"]
    assert [parameters[each].default for each in keywords[-4:]] == [None, None, None, "mean"]
    assert "key" not in keywords or keywords[-5] == "key"
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())


@every_loss
def test_docstring_describes_every_argument(name):
    text = inspect.getdoc(LOSSES[name].loss) or ""
    for parameter in inspect.signature(LOSSES[name].loss).parameters:
        assert f"\n    {parameter}: " in text, parameter
    for section in ("Args:", "Returns:", "Raises:", "Example:", ">>>", "References:"):
        assert section in text, section


@every_case
def test_annotations_hold_and_no_dtype_or_rank_is_promoted(name):
    case = CASES[name]
    checked = dataclasses.replace(case, loss=jaxtyped(typechecker=beartype.beartype)(case.loss))
    inputs = cast(make_inputs(case), jnp.float32)
    rows = {each: cast(x, bool if x.dtype == bool else jnp.int32) for each, x in case.rows.items()}
    where, weights = jnp.asarray(make_mask()), jnp.asarray(make_weights(), jnp.float32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for reduction in ("mean", "sum", "none"):
            result = jax.eval_shape(
                lambda reduction=reduction: call(
                    checked, inputs, rows, where=where, weights=weights, reduction=reduction
                )[0]
            )
            assert result.dtype == jnp.float32
            assert result.shape == ((B,) if reduction == "none" else ())
            assert not result.weak_type


@every_loss
def test_shapes_that_do_not_fit_are_refused_by_name(name):
    case = LOSSES[name]
    inputs = cast(make_inputs(case), jnp.float32)
    first, second = [*case.arrays, *case.positional_rows][:2]
    x = jnp.asarray((inputs | case.rows)[second])
    other, kind = (jnp.int32, "float") if second in case.arrays else (jnp.float32, "int")
    width = (x[..., :-1], rf"expected \w+ = {D}, as in {first}, got \w+ = {D - 1} in {second}")
    for wrong, message in (
        *(() if case.own_widths else (width,)),
        (x[:-1], f"expected b = {B}, as in {first}, got b = {B - 1} in {second}"),
        (x[0], f"expected {second} to have {x.ndim} axes"),
        (x.astype(other), f"expected {second} to hold {kind} values"),
        (x.tolist(), f"expected {second} to be an array, got list"),
    ):
        with pytest.raises(InputError, match=f"^{name}: .*{message}") as caught:
            call(case, inputs | {second: wrong}, {**case.rows, second: wrong} if second in case.rows else case.rows)
        shape = ", ".join(map(str, inputs[first].shape))
        assert f"{first}: float32[{shape}]" in str(caught.value), "the message shows all arguments"
    for option, wrong, message in (
        ("where", jnp.ones(B), "expected where to hold bool values"),
        ("weights", jnp.ones(B + 1), f"got b = {B + 1} in weights"),
        ("reduction", "men", "did you mean 'mean'"),
    ):
        with pytest.raises(InputError) as caught:
            jax.eval_shape(lambda option=option, wrong=wrong: call(case, inputs, **{option: wrong})[0])
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [(name, options, message) for name, case in CASES.items() for options, message in case.mistakes],
)
def test_wrong_options_are_refused(name, options, message):
    inputs = cast(make_inputs(CASES[name]), jnp.float32)
    positional = {each: value for each, value in options.items() if each in CASES[name].arrays}
    keywords = {each: value for each, value in options.items() if each not in positional}
    with pytest.raises(InputError) as caught:
        jax.eval_shape(lambda: call(CASES[name], inputs | positional, **keywords)[0])
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Value and gradient


@every_case
@pytest.mark.usefixtures("float64")
def test_value_and_gradient_against_float64_loops(name):
    """With an uneven mask, uneven weights, and rows of weight 0 that are still candidates."""
    case, where, weights = CASES[name], make_mask(), make_weights()
    inputs = make_inputs(case)
    value, gradient = value_and_gradient(name, inputs, where, weights)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, reference_mean(case, inputs, inputs, where, weights), rtol=1e-12)

    rng, step = np.random.default_rng(2), 1e-5
    for argument in inputs:
        direction = rng.normal(size=np.shape(inputs[argument]))
        ahead = inputs | {argument: inputs[argument] + step * direction}
        behind = inputs | {argument: inputs[argument] - step * direction}
        difference = reference_mean(case, ahead, inputs, where, weights)
        difference -= reference_mean(case, behind, inputs, where, weights)
        got = float(np.sum(gradient[argument] * direction))
        assert got == pytest.approx(difference / (2 * step), rel=1e-7, abs=1e-9), argument


@every_loss
@pytest.mark.usefixtures("float64")
def test_reductions_agree_with_the_rows(name):
    case, where, weights = LOSSES[name], make_mask(), make_weights()
    inputs = make_inputs(case)

    def evaluate(inputs: dict[str, Any]) -> list[Any]:
        options = {"where": jnp.asarray(where), "weights": jnp.asarray(weights)}
        return [call(case, inputs, **options, reduction=reduction)[0] for reduction in ("mean", "sum", "none")]

    mean, total, rows = jax.device_get(jit(evaluate)(inputs))
    np.testing.assert_allclose(rows, reference_rows(case, inputs, inputs, where, weights), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total, np.sum(weights * rows), rtol=1e-12)
    np.testing.assert_allclose(mean, np.sum(weights * rows) / np.sum(weights[where]), rtol=1e-12)
    assert not np.any(rows[~where])


@every_case
@pytest.mark.usefixtures("float64")
def test_masked_rows_do_not_matter_even_if_they_hold_nan(name):
    case, where, weights = CASES[name], make_mask(), make_weights()
    inputs = make_inputs(case)
    expected, expected_gradient = value_and_gradient(name, inputs, where, weights)
    broken = dict(inputs)
    for array in case.arrays:
        broken[array] = np.where(where.reshape(-1, *(1,) * (inputs[array].ndim - 1)), inputs[array], np.nan)
    value, gradient = value_and_gradient(name, broken, where, np.where(where, weights, np.nan))
    np.testing.assert_array_equal(value, expected)
    for argument in inputs:
        np.testing.assert_array_equal(gradient[argument], expected_gradient[argument])
    for array in case.arrays:
        assert not np.any(gradient[array][~where])
        assert np.any(gradient[array][where]) == (array not in case.constants)


@every_case_the_first_fast
@pytest.mark.usefixtures("float64")
def test_masking_is_removing(name):
    case, where, weights = CASES[name], make_mask(), make_weights()
    if "key" in case.options():
        pytest.skip("draws belong to places in the batch; the masked draws are compared with the loops")
    inputs = make_inputs(case)
    kept = {each: value[where] if each in case.arrays else value for each, value in inputs.items()}
    rows = {each: value[where] for each, value in case.rows.items()}
    removed = jit(lambda: call(case, kept, rows, weights=jnp.asarray(weights[where]))[0])()
    np.testing.assert_allclose(value_and_gradient(name, inputs, where, weights)[0], removed, rtol=1e-12)


@every_case
@pytest.mark.usefixtures("float64")
def test_nothing_gives_zero_and_a_zero_gradient(name):
    inputs, nowhere, ones = make_inputs(CASES[name]), np.zeros(B, bool), np.ones(B)
    for where, weights in ((nowhere, ones), (~nowhere, 0 * ones)):
        value, gradient = value_and_gradient(name, inputs, where, weights)
        assert value == 0
        assert all(not np.any(each) for each in gradient.values())


@every_loss
def test_bfloat16_is_computed_in_float32(name):
    case = LOSSES[name]
    rounded = cast(make_inputs(case), jnp.bfloat16)
    where, weights = jnp.asarray(make_mask()), jnp.asarray(make_weights(), jnp.float32)
    value, gradient = value_and_gradient(_case_name(case), rounded, where, weights)
    expected, expected_gradient = value_and_gradient(_case_name(case), cast(rounded, jnp.float32), where, weights)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for argument in rounded:
        assert gradient[argument].dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient[argument].astype(np.float32), expected_gradient[argument], rtol=1e-2)


def _case_name(case: Case) -> str:
    return next(name for name, each in CASES.items() if each is case)


def _extremes(x: np.ndarray) -> dict[str, np.ndarray]:
    basis = np.zeros_like(x)
    basis[..., 0] = 1.0
    alternating = basis * (-1.0) ** np.arange(B).reshape(B, *(1,) * (x.ndim - 1))
    zero_rows = x.copy()
    zero_rows[:3] = 0.0
    return {"zero": 0 * x, "zero rows": zero_rows, "equal": basis, "antipodal rows": alternating, "long": 1e3 * x}


@every_loss
def test_extreme_inputs_stay_finite(name):
    case = LOSSES[name]
    inputs = make_inputs(case)
    if "logit_scale" in inputs:
        inputs["logit_scale"] = np.float64(100.0)
    where, weights = jnp.ones(B, bool), jnp.ones(B)
    first = next(iter(case.arrays))
    for kind, x in _extremes(inputs[first].reshape(B, -1, D)[:, 0]).items():
        for others in ("equal to it", "opposite", "random"):
            sign = {"equal to it": 1.0, "opposite": -1.0}.get(others)
            extreme = dict(inputs)
            for array in case.arrays:
                aligned = x.reshape(B, *(1,) * len(case.arrays[array]), D)
                if array == first:
                    extreme[array] = case.domain(np.broadcast_to(aligned, inputs[array].shape))
                elif sign is not None:
                    extreme[array] = case.domain(np.broadcast_to(sign * aligned, inputs[array].shape))
            if kind == "long" and "logit_scale" in extreme:
                extreme["logit_scale"] = np.float64(1e-3)
            value, gradient = value_and_gradient(_case_name(case), cast(extreme, jnp.float32), where, weights)
            assert np.isfinite(value), (kind, others)
            assert all(np.all(np.isfinite(each)) for each in gradient.values()), (kind, others)


# ---------------------------------------------------------------------------------------------------------------------
# Transformations and placements


@pytest.mark.slow
@every_loss
@pytest.mark.usefixtures("float64")
def test_vmap_is_a_loop(name):
    case, where, weights = LOSSES[name], make_mask(), make_weights()
    batches = [make_inputs(case, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *batches)

    def mean(inputs: dict[str, Any]) -> Any:
        return call(case, inputs, where=jnp.asarray(where), weights=jnp.asarray(weights))[0]

    values, gradients = jax.device_get(jit(jax.vmap(jax.value_and_grad(mean)))(stacked))
    for i, batch in enumerate(batches):
        value, gradient = value_and_gradient(_case_name(case), batch, where, weights)
        np.testing.assert_allclose(values[i], value, rtol=1e-12)
        for argument in batch:
            np.testing.assert_allclose(gradients[argument][i], gradient[argument], rtol=1e-10, atol=1e-12)


AXIS = "data"


def _placements(case: Case) -> dict[str, Callable[..., Any]]:
    """Ways to split the rows over all devices, each of (inputs, rows, where, weights) -> (gradients, memory)."""
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))

    def sharded_jit(inputs, rows, where, weights):
        split, whole = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
        inputs = {name: jax.device_put(x, split if name in case.arrays else whole) for name, x in inputs.items()}
        rows, where, weights = jax.device_put((rows, where, weights), split)
        (_, memory), gradient = compiled(_case_name(case))(inputs, rows, where, weights)
        return gradient, memory

    def shard_map(inputs, rows, where, weights):
        """Differentiated outside of shard_map, with its default checks, over two axes of a mesh."""
        axes = ("data", "fsdp")
        grid = jax.make_mesh((jax.device_count() // 2, 2), axes, axis_types=(AxisType.Auto,) * 2)
        specs = {name: P(axes) if name in case.arrays else P() for name in inputs}

        def mean(inputs, rows, where, weights):
            return call(case, inputs, rows, where=where, weights=weights, axis_name=axes)

        mapped = jax.shard_map(mean, mesh=grid, in_specs=(specs, P(axes), P(axes), P(axes)), out_specs=(P(), P()))
        return jit(jax.grad(mapped, has_aux=True))(inputs, rows, where, weights)

    def over_mesh(inputs, rows, where, weights):
        split = dataclasses.replace(case, loss=losses.over_mesh(case.loss, mesh, AXIS))

        def mean(inputs):
            return call(split, inputs, rows, where=where, weights=weights)

        return jit(jax.grad(mean, has_aux=True))(inputs)

    return {"jit with sharded inputs": sharded_jit, "shard_map": shard_map, "over_mesh": over_mesh}


def _pmap_gradients(case: Case, inputs: Any, rows: Any, where: Any, weights: Any) -> dict[str, Any]:
    """Gradients by parameters that all devices share: a shift of each array's rows, and the scalars."""
    devices = jax.device_count()

    def device(inputs, rows, where, weights):
        def at(shift):
            return {name: x + shift[name] for name, x in inputs.items()}

        def share_of_total(shift):
            """What the training step differentiates before it adds the gradients over devices."""
            options = {"where": where, "weights": weights, "axis_name": AXIS, "reduction": "none"}
            values, memory = call(case, at(shift), rows, **options)
            return jnp.sum(jnp.where(where, weights * values, 0.0)), memory

        def mean(shift):
            """What a user differentiates before taking the mean of the gradients over devices."""
            return call(case, at(shift), rows, where=where, weights=weights, axis_name=AXIS)

        zero = {name: jnp.zeros(x.shape[1:] if name in case.arrays else (), x.dtype) for name, x in inputs.items()}
        gradient, memory = jax.grad(share_of_total, has_aux=True)(zero)
        total = jax.lax.psum(jnp.sum(jnp.where(where, weights, 0.0)), AXIS)
        shares = jax.tree.map(lambda x: x / total, jax.lax.psum(gradient, AXIS)), memory
        gradient, memory = jax.grad(mean, has_aux=True)(zero)
        return {"pmap, sum of shares": shares, "pmap, mean of gradients": (jax.lax.pmean(gradient, AXIS), memory)}

    def split(x):
        return x.reshape(devices, -1, *x.shape[1:])

    axes = {name: 0 if name in case.arrays else None for name in inputs}
    inputs = {name: split(x) if name in case.arrays else x for name, x in inputs.items()}
    results = jax.device_get(
        jax.pmap(device, axis_name=AXIS, in_axes=(axes, 0, 0, 0))(
            inputs, jax.tree.map(split, rows), split(where), split(weights)
        )
    )
    for each in jax.tree.leaves(results):
        np.testing.assert_array_equal(each, np.broadcast_to(each[:1], each.shape))
    return jax.tree.map(lambda x: x[0], results)


def _assert_same(got: Any, wanted: Any, placement: str, rtol: float) -> None:
    def compare(path, x, y):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12, err_msg=f"{placement}: {jax.tree_util.keystr(path)}")

    jax.tree.map_with_path(compare, got, wanted)


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.usefixtures("float64")
def test_gradient_and_memory_are_the_same_on_eight_devices(name):
    assert jax.device_count() == 8
    case, where, weights = CASES[name], make_mask(), make_weights()
    inputs, rows = make_inputs(case), dict(case.rows)
    (_, memory), gradient = jax.device_get(compiled(_case_name(case))(inputs, rows, where, weights))
    for placement, evaluate in _placements(case).items():
        got, got_memory = jax.device_get(evaluate(inputs, rows, where, weights))
        _assert_same(got, gradient, placement, rtol=1e-10)
        _assert_same(got_memory, memory, placement, rtol=1e-6)

    shared = {name: np.sum(x, axis=0) if name in case.arrays else x for name, x in gradient.items()}
    for placement, (got, got_memory) in _pmap_gradients(case, inputs, rows, where, weights).items():
        _assert_same(got, shared, placement, rtol=1e-10)
        _assert_same(got_memory, memory, placement, rtol=1e-6)
