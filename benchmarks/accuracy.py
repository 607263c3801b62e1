"""Relative errors of the losses' values and gradients against float64, in the regimes where digits get lost.

    python -m benchmarks.accuracy [--smoke] [--only info_nce] [--output FILE.jsonl]

The reference is computed in float64 from the same rounded inputs, by formulas that do not cancel. An error is the
length of the difference over the length of the reference; the gradient's is the worst of those in each argument. Peers
stand beside ours: the plain form, and the expansions into Gram matrices that other implementations use.
"""

import argparse
import fnmatch
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, peers
from benchmarks.measure import Row
from benchmarks.report import print_about
from repkit import losses


@dataclass(frozen=True)
class Situation:
    """Inputs of a loss, and the forms that are held against its float64 reference.

    Attributes:
        loss: its name.
        name: what is hard about the inputs.
        arrays: float64; they are rounded before anything is computed from them.
        learned: how many of them, from the first, the gradient is taken in.
        scalars: how many of them, from the last, are not rounded to bfloat16: parameters are kept in float32.
        reference: of the arrays, in float64.
        forms: name to function of the arrays.
    """

    loss: str
    name: str
    arrays: tuple[np.ndarray, ...]
    learned: int
    scalars: int
    reference: Callable[..., Any]
    forms: dict[str, Callable[..., Any]]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """|got - expected| / |expected|, in float64."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


def errors(situation: Situation, dtype: str) -> Iterator[Row]:
    """A row per form."""
    low = len(situation.arrays) - situation.scalars
    rounded = [
        jnp.asarray(array, dtype if place < low else jnp.float32) for place, array in enumerate(situation.arrays)
    ]
    learned = tuple(range(situation.learned))
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(array, np.float64)) for array in rounded]
        value, gradients = jax.tree.map(
            np.asarray, jax.jit(jax.value_and_grad(situation.reference, argnums=learned))(*exact)
        )
    for name, form in situation.forms.items():
        got, got_gradients = jax.jit(jax.value_and_grad(form, argnums=learned))(*rounded)
        yield {
            "kind": "accuracy",
            "loss": situation.loss,
            "situation": situation.name,
            "dtype": dtype,
            "form": name,
            "value": float(value),
            "value_error": relative_error(np.asarray(got), value),
            "gradient_error": max(
                relative_error(np.asarray(array.astype(jnp.float32)), expected)
                for array, expected in zip(got_gradients, gradients, strict=True)
            ),
        }


# ---------------------------------------------------------------------------------------------------------------------
# InfoNCE: the loss tends to 0


def info_nce_reference(image: Any, text: Any, logit_scale: Any) -> Any:
    """`log(1 + sum over negatives of exp(difference))`, which keeps its digits when the loss is small."""
    scores = image @ text.T
    positive = jnp.diagonal(scores)
    is_negative = ~jnp.eye(len(image), dtype=bool)

    def direction(scores: Any) -> Any:
        differences = jnp.where(is_negative, logit_scale * (scores - positive[:, None]), -jnp.inf)
        return jax.nn.softplus(jax.nn.logsumexp(differences, axis=1))

    return jnp.mean(direction(scores) + direction(scores.T)) / 2


def info_nce_situations(rows: int, width: int) -> Iterator[Situation]:
    """From a common loss to one near 0, at a common and at the largest usual logit scale."""
    for scale, wanted in ((14.3, 0.26), (100.0, 2.0), (100.0, 1e-3), (100.0, 1e-11)):
        yield Situation(
            loss="info_nce",
            name=f"logit scale {scale:g}, loss near {wanted:g}",
            arrays=(*pairs_with_loss(rows, width, scale, wanted), np.asarray(scale)),
            learned=3,
            scalars=1,
            reference=info_nce_reference,
            forms={
                "repkit": lambda image, text, scale: losses.info_nce(image, text, logit_scale=scale),
                "plain": peers.info_nce,
            },
        )


def pairs_with_loss(rows: int, width: int, scale: float, wanted: float) -> tuple[np.ndarray, np.ndarray]:
    """Images, and texts that lean on them by as much as gives the wanted loss."""
    random = np.random.default_rng(0)
    image, noise = unit(random.normal(size=(rows, width))), unit(random.normal(size=(rows, width)))

    def texts(share: float) -> np.ndarray:
        return unit(share * image + (1 - share) * noise)

    def loss(share: float) -> float:
        scores = scale * image @ texts(share).T
        differences = scores - np.diagonal(scores)[:, None]
        others = scores.T - np.diagonal(scores)[:, None]
        for each in (differences, others):
            np.fill_diagonal(each, -np.inf)
        return float(np.mean([np.log1p(np.exp(each).sum(1)).mean() for each in (differences, others)]))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) > wanted else (low, middle)
    return image, texts(high)


# ---------------------------------------------------------------------------------------------------------------------
# Geometric consistency: the texts approach the images, or a rotation of them


def geometric_situations(rows: int, width: int) -> Iterator[Situation]:
    """With CyCLIP's weights, and the in-modal term alone, which is small although the texts are far from the images."""
    random = np.random.default_rng(1)
    image, noise = unit(random.normal(size=(rows, width))), unit(random.normal(size=(rows, width)))
    rotated = image @ np.linalg.qr(random.normal(size=(width, width)))[0]
    equal, in_modal = (0.25, 0.25), (0.0, 1.0)
    for size in (1.0, 1e-2, 1e-3, 1e-4):
        yield _geometric_situation(f"T = I + {size:g} noise", image, image + size * noise, equal)
    yield _geometric_situation("T = I Q", image, rotated, equal)
    for size in (1e-1, 1e-2, 1e-3):
        yield _geometric_situation(f"in-modal, T = I + {size:g} noise", image, image + size * noise, in_modal)
        yield _geometric_situation(f"in-modal, T = I Q + {size:g} noise", image, rotated + size * noise, in_modal)


def _geometric_situation(name: str, image: np.ndarray, text: np.ndarray, weights: tuple[float, float]) -> Situation:
    options = dict(zip(("cross_modal_weight", "in_modal_weight"), weights, strict=True))
    return Situation(
        loss="geometric_consistency",
        name=name,
        arrays=(image, text),
        learned=2,
        scalars=0,
        reference=functools.partial(peers.cyclip, **options),
        forms={
            "repkit": functools.partial(losses.geometric_consistency, **options),
            "plain": functools.partial(peers.cyclip, **options),
            "Gram": functools.partial(peers.gram_consistency, **options),
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Attention alignment: each teacher head approaches a student head


def attention_situations(examples: int, teacher_heads: int, student_heads: int, length: int) -> Iterator[Situation]:
    """At a temperature that picks one student head, so that the residual is what the teacher's head adds to it."""
    random = np.random.default_rng(2)
    logits = 2 * random.normal(size=(examples, student_heads, length, length))
    student = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nearest = student[:, np.arange(teacher_heads) % student_heads]
    noise = random.uniform(-np.sqrt(3), np.sqrt(3), size=nearest.shape)
    temperature = 0.02
    for residual in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
        yield Situation(
            loss="attention_maps_mse",
            name=f"relative residual near {residual:g}",
            arrays=(student, nearest * (1 + np.sqrt(residual) * noise)),
            learned=1,
            scalars=0,
            reference=functools.partial(peers.attention_maps, variant="mse", temperature=temperature),
            forms={
                "repkit": lambda student, teacher: losses.attention_map_alignment(
                    student, teacher, variant="mse", temperature=temperature
                ),
                "plain": functools.partial(peers.attention_maps, variant="mse", temperature=temperature),
                "Gram": functools.partial(peers.gram_attention_maps, temperature=temperature),
            },
        )


# ---------------------------------------------------------------------------------------------------------------------

SITUATIONS: dict[str, Callable[[bool], Iterator[Situation]]] = {
    "info_nce": lambda smoke: info_nce_situations(*((48, 16) if smoke else (512, 64))),
    "geometric_consistency": lambda smoke: geometric_situations(*((48, 16) if smoke else (1500, 64))),
    "attention_maps_mse": lambda smoke: attention_situations(*((2, 3, 2, 8) if smoke else (4, 12, 6, 64))),
}


def print_row(row: Row) -> None:
    """One line of the table."""
    print(
        f"{row['loss']:<24}{row['situation']:<36}{row['dtype']:<10}{row['form']:<8}{row['value']:>10.3g}"
        f"{row['value_error']:>10.1e}{row['gradient_error']:>10.1e}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows")
    parser.add_argument("--only", default="*", metavar="LOSS", help="a loss, or several with *")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the results as JSON lines")
    options = parser.parse_args(arguments)
    chosen = [make for loss, make in SITUATIONS.items() if fnmatch.fnmatch(loss, options.only)]
    if not chosen:
        parser.error(f"--only: no loss is called '{options.only}'; there are {', '.join(SITUATIONS)}")
    jax.config.update("jax_default_matmul_precision", "highest")
    about = measure.about()
    print_about(about)
    print(f"{'loss':<24}{'situation':<36}{'inputs':<10}{'form':<8}{'value':>10}{'value err':>10}{'grad err':>10}")
    for make in chosen:
        for situation in make(options.smoke):
            for dtype in ("float32", "bfloat16"):
                for row in errors(situation, dtype):
                    print_row(row)
                    if options.output:
                        options.output.parent.mkdir(parents=True, exist_ok=True)
                        with options.output.open("a") as file:
                            file.write(json.dumps(about | row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
