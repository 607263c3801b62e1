"""Time, compile time and temporary memory of the losses, value and gradient, beside a peer where one exists.

    python -m benchmarks.losses [--smoke] [--output FILE.jsonl]

Every case is compiled once and run in turns with the others of its shape, so that a change of the machine's speed meets
all of them alike; read the ratios, not the times.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from repkit import losses
from repkit.numerics import normalize

SHAPES = ((256, 128), (1024, 512), (4096, 512))
SMOKE_SHAPES = ((128, 64),)
MOST_PEER_ROWS = 256
"""optax's ntxent holds an array of rows x rows x features."""


class Case(NamedTuple):
    """A loss of two arrays of embeddings, differentiated with respect to both; it may return its memory beside."""

    name: str
    loss: Callable[[jax.Array, jax.Array], Any]


def cases(rows: int, width: int) -> Iterator[Case]:
    """The losses at a shape, InfoNCE first."""
    yield Case("info_nce", functools.partial(losses.info_nce, logit_scale=14.3))
    yield Case(
        "gamma_contrastive",
        functools.partial(
            losses.gamma_contrastive,
            logit_scale=14.3,
            memory=losses.init_memory(4 * rows),
            example_id=jnp.arange(rows),
            memory_rate=0.9,
            key=jax.random.key(0),
        ),
    )
    yield Case("geometric_consistency", losses.geometric_consistency)
    # Shifted rows stand in for augmented views: their values do not change the cost.
    yield Case("brownian_bridge", lambda image, text: losses.brownian_bridge(image, text, jnp.roll(image, 1, 0)))
    yield Case(
        "feature_separation",
        lambda image, text: losses.feature_separation(
            image, text, *(jnp.roll(x, 1, 0) for x in (image, text, image, text)), logit_scale=14.3
        ),
    )
    if rows <= MOST_PEER_ROWS:
        yield Case("optax ntxent (2 x rows)", _optax_ntxent)


def _optax_ntxent(image: jax.Array, text: jax.Array) -> jax.Array:
    labels = jnp.tile(jnp.arange(len(image)), 2)
    return optax.losses.ntxent(jnp.concatenate([image, text]), labels, temperature=0.07)


def _with_memory(loss: Callable[..., Any]) -> Callable[..., tuple[jax.Array, Any]]:
    """A returned memory stays an output, so that the compiler cannot leave out its update."""

    def both(image: jax.Array, text: jax.Array) -> tuple[jax.Array, Any]:
        result = loss(image, text)
        return result if isinstance(result, tuple) else (result, None)

    return both


def measure(rows: int, width: int, repetitions: int) -> list[dict[str, Any]]:
    """Runs all cases of a shape in turns; one row of results each."""
    keys = jax.random.split(jax.random.key(0))
    inputs = [normalize(jax.random.normal(key, (rows, width), jnp.float32)) for key in keys]
    results, programs = [], []
    for case in cases(rows, width):
        lowered = jax.jit(jax.value_and_grad(_with_memory(case.loss), argnums=(0, 1), has_aux=True)).lower(*inputs)
        start = time.perf_counter()
        program = lowered.compile()
        compile_seconds = time.perf_counter() - start
        memory = program.memory_analysis()
        programs.append(program)
        results.append(
            {
                "loss": case.name,
                "rows": rows,
                "width": width,
                "compile_seconds": compile_seconds,
                "temporary_mib": memory.temp_size_in_bytes / 2**20 if memory is not None else None,
            }
        )
    seconds: list[list[float]] = [[] for _ in programs]
    for repetition in range(repetitions + 1):
        for program, times in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            if repetition:  # the first is a warm-up
                times.append(time.perf_counter() - start)
    for result, times in zip(results, seconds, strict=True):
        quartiles = statistics.quantiles(times, n=4)
        result |= {"median_ms": 1e3 * quartiles[1], "spread_ms": 1e3 * (quartiles[2] - quartiles[0])}
        result["ratio_to_info_nce"] = result["median_ms"] / results[0]["median_ms"]
    return results


def main() -> None:
    """Prints the table and writes the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small shape, few repetitions")
    parser.add_argument("--output", type=Path, help="append the results to this file as JSON lines")
    options = parser.parse_args()
    device = jax.devices()[0]
    about = {"device": device.device_kind, "jax": jax.__version__, "python": platform.python_version()}
    print(f"{device.device_kind}, jax {jax.__version__}; float32, value and gradient")
    print(
        f"{'loss':<26}{'rows':>6}{'width':>7}{'median ms':>11}{'spread':>9}{'ratio':>8}"
        f"{'temp MiB':>10}{'compile s':>11}"
    )
    for rows, width in SMOKE_SHAPES if options.smoke else SHAPES:
        for result in measure(rows, width, 3 if options.smoke else 15):
            memory = "-" if result["temporary_mib"] is None else f"{result['temporary_mib']:.1f}"
            print(
                f"{result['loss']:<26}{rows:>6}{width:>7}{result['median_ms']:>11.2f}{result['spread_ms']:>9.2f}"
                f"{result['ratio_to_info_nce']:>8.2f}{memory:>10}{result['compile_seconds']:>11.2f}"
            )
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(about | result) + "\n")


if __name__ == "__main__":
    main()
