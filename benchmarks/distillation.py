"""What a step of distillation costs: attention maps, queries and keys, or logits alone.

    python -m benchmarks.distillation                     encoders of 64 and of 1,024 image tokens; some minutes
    python -m benchmarks.distillation --smoke             tiny, under a minute
    python -m benchmarks.distillation --output F.jsonl    appends the results as JSON lines

A step is the student's loss and its gradient in the student's parameters, the frozen teacher's forward pass included.
All programs of a length are timed in one run, in turns. `map MiB` is the size of one teacher layer's attention map; a
program holds no map if no array of its compiled text has as many elements as the map of one head of either model.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import measure
from repkit import losses
from repkit.distillation import Match, layer_terms, match_layers, required_captures
from repkit.models.capture import Capture
from repkit.models.sequence import SequenceConfig, sequence_to_sequence
from repkit.objective import Objective, Term

MIB = 2**20
PATCH, VOCABULARY, SOURCE, TARGET = 4, 64, 8, 8
WAYS: dict[str, tuple[Any, tuple[str, ...]] | None] = {
    "from queries and keys": (losses.attention_alignment_from_queries_keys, ("queries", "keys")),
    "from maps": (losses.attention_map_alignment, ("attention",)),
    "logits alone": None,
}


class Size(NamedTuple):
    """One comparison.

    Attributes:
        tokens: image tokens of the encoders; a square.
        examples: rows of the batch.
        width: features of both models.
        teacher_heads: attention heads of a teacher's block.
        student_heads: those of a student's block.
        teacher_depth: encoder blocks of the teacher.
        student_depth: those of the student.
    """

    tokens: int
    examples: int
    width: int = 256
    teacher_heads: int = 8
    student_heads: int = 4
    teacher_depth: int = 4
    student_depth: int = 2


SIZES = (Size(64, 32), Size(1024, 2))
SMOKE_SIZES = (Size(16, 2, 16, 4, 2, 2, 1),)


def compare(size: Size, variant: str, seconds: float) -> list[measure.Row]:
    """A row for each way of learning from the teacher."""
    programs, rows = {}, []
    for name, way in WAYS.items():
        program, arguments = _step(size, variant, way)
        memory = program.memory_analysis()
        length = size.tokens + SOURCE
        text = program.as_text()
        row = {
            "kind": "distillation",
            "name": name,
            "variant": variant,
            **size._asdict(),
            "temporary_bytes": memory.temp_size_in_bytes,
            "map_bytes": 4 * size.examples * size.teacher_heads * length**2,
            "holds_a_map": _largest_array(text, length) >= length**2,
        }
        programs[name] = measure.warm_up(
            lambda program=program, arguments=arguments: jax.block_until_ready(program(*arguments)), min(1.0, seconds)
        )
        rows.append(row)
    for row, timing in zip(rows, measure.in_turns(programs, seconds=seconds).values(), strict=True):
        row |= timing
    return rows


def _step(size: Size, variant: str, way: tuple[Any, tuple[str, ...]] | None) -> tuple[Any, tuple[Any, ...]]:
    """The compiled program of one step, and its arguments."""
    pairs = match_layers(*(_layers(depth) for depth in (size.student_depth, size.teacher_depth)))
    masks = {"query_where": "outputs.masks.encoder", "key_where": "outputs.masks.encoder"}
    matches = (
        []
        if way is None
        else [Match(*pair, way[0], way[1], options={"variant": variant}, keywords=masks) for pair in pairs]
    )
    captures = [Capture(**each) for each in required_captures(matches)] if matches else [Capture(), Capture()]
    student, teacher = (
        sequence_to_sequence(_config(size, heads, depth), capture=capture)
        for heads, depth, capture in (
            (size.student_heads, size.student_depth, captures[0]),
            (size.teacher_heads, size.teacher_depth, captures[1]),
        )
    )
    task = Term(losses.caption_cross_entropy, ("outputs.logits", "batch.target_ids"))
    logits = Term(losses.logit_distillation, ("outputs.logits", "teacher.logits"), options={"temperature": 2.0})
    objective = Objective({"task": task, "logits": logits} | (layer_terms("heads", matches) if matches else {}))

    def loss(params: Any, teacher_params: Any, batch: Any) -> Any:
        shown = teacher.forward(teacher_params, batch, None)
        outputs = student.forward(params, batch, None)
        return objective(batch, outputs, {}, step=0, key=jax.random.key(0), teacher=shown)[0]

    batch = _batch(size)
    arguments = (student.init(jax.random.key(0)), teacher.init(jax.random.key(1)), batch)
    return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile(), arguments


def _layers(depth: int) -> list[str]:
    return [f"encoder.blocks.{index}.attention" for index in range(depth)]


def _config(size: Size, heads: int, depth: int) -> SequenceConfig:
    return SequenceConfig(
        image_size=PATCH * round(size.tokens**0.5),
        patch_size=PATCH,
        vocabulary_size=VOCABULARY,
        max_source_length=SOURCE,
        max_target_length=TARGET,
        width=size.width,
        encoder_depth=depth,
        decoder_depth=1,
        heads=heads,
        begin_id=1,
        end_id=2,
        pad_id=0,
    )


def _batch(size: Size) -> dict[str, jax.Array]:
    edge = PATCH * round(size.tokens**0.5)
    keys = jax.random.split(jax.random.key(2), 3)
    return {
        "image": jax.random.randint(keys[0], (size.examples, edge, edge, 3), 0, 256).astype(jnp.uint8),
        "source_ids": jax.random.randint(keys[1], (size.examples, SOURCE), 3, VOCABULARY),
        "source_mask": jnp.ones((size.examples, SOURCE), bool),
        "target_ids": jax.random.randint(keys[2], (size.examples, TARGET), 3, VOCABULARY),
        "target_mask": jnp.ones((size.examples, TARGET), bool),
        "where": jnp.ones(size.examples, bool),
    }


def _largest_array(text: str, length: int) -> int:
    """Elements of the largest array in a compiled program that has the queries and the keys among its axes."""
    largest = 0
    for shape in set(re.findall(r"(?:f32|bf16|pred)\[([\d,]+)\]", text)):
        axes = [int(axis) for axis in shape.split(",")]
        elements = 1
        for axis in axes:
            elements *= axis
        if axes.count(length) >= 2 or any(axis % length**2 == 0 for axis in axes):
            largest = max(largest, elements)
    return largest


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table, writes the JSON lines, and returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny")
    parser.add_argument("--seconds", type=float, default=5.0, help="of samples per program; at least 3 are taken")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the results as JSON lines")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_compilation_cache", False)
    about = measure.about()
    for size in SMOKE_SIZES if options.smoke else SIZES:
        for variant in ("mse", "kl"):
            rows = compare(size, variant, 0.0 if options.smoke else options.seconds)
            print(f"\n{size.tokens} image tokens, {size.examples} examples, '{variant}'")
            print(f"  {'':<24}{'median ms':>11}{'quartiles':>21}{'temp MiB':>10}{'map MiB':>9}{'holds a map':>13}")
            for row in rows:
                quartiles = "-".join(f"{1e3 * each:.1f}" for each in row["quartiles_seconds"])
                print(
                    f"  {row['name']:<24}{1e3 * row['median_seconds']:>11.1f}{quartiles:>21}"
                    f"{row['temporary_bytes'] / MIB:>10.1f}{row['map_bytes'] / MIB:>9.1f}"
                    f"{'yes' if row['holds_a_map'] else 'no':>13}",
                    flush=True,
                )
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                with options.output.open("a") as file:
                    file.writelines(json.dumps(about | row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
