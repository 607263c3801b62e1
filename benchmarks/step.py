"""What a training step of two towers costs, as a whole and in its parts.

    python -m benchmarks.step time        examples per second, shares of towers, loss and optimizer, of the matrix rate
    python -m benchmarks.step memory      memory of a step by the number of micro-batches; compiled, not run
    python -m benchmarks.step scaling     operations and bytes exchanged per device on 1, 2, 4, 8 simulated devices
    python -m benchmarks.step data        examples per second of the input pipeline alone
    python -m benchmarks.step pod --topology v5e-256 --size clip_b_16 --batch 262144 --parts 16
                                          what a loss adds to the memory and the exchanges of a step on a pod, in blocks
                                          and in the plain form; compiled for it, not run; minutes for each program

Each takes `--size small|clip_b_16|clip_l_14`, `--batch N`, `--output F.jsonl`, and prints a table. `time --trace DIR`
leaves a trace of the profiler. Simulated devices share one processor, so that `scaling` has no times.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from repkit import losses
from repkit.checks import InputError
from repkit.models.encoders import CLIP_TEXT_B, CLIP_TEXT_L, VIT_B_16, VIT_L_14, TextConfig, VisionConfig
from repkit.models.sharding import TRANSFORMER_RULES
from repkit.models.two_tower import TwoTowerConfig, two_tower
from repkit.numerics import reduce_loss
from repkit.objective import Objective, Term
from repkit.plan.chips import topology
from repkit.plan.program import Exchange, program_costs, traced_flops
from repkit.plan.step import plan_step
from repkit.simulation import simulated_devices
from repkit.train.config import TracedUpdate, TrainConfig, make_optimizer, make_placement, trace_update
from repkit.train.mesh import MeshConfig
from repkit.train.step import make_update

Row = dict[str, Any]

SIZES = {
    "small": TwoTowerConfig(
        image=VisionConfig(image_size=32, patch_size=4, width=64, depth=2, heads=4),
        text=TextConfig(vocabulary_size=256, max_length=16, width=64, depth=2, heads=4),
        embed_dim=64,
    ),
    "clip_b_16": TwoTowerConfig(image=VIT_B_16, text=CLIP_TEXT_B, embed_dim=512),
    "clip_l_14": TwoTowerConfig(image=VIT_L_14, text=CLIP_TEXT_L, embed_dim=768),
}
EMBEDS = ("outputs.image.embeds", "outputs.text.embeds")
OBJECTIVE = Objective(
    {
        "info_nce": Term(
            losses.info_nce,
            EMBEDS,
            keywords={"logit_scale": "outputs.logit_scale"},
        )
    }
)


def own_pairs(image_embeds: Any, text_embeds: Any, *, where: Any = None, weights: Any = None, reduction: Any) -> Any:
    """`-<image_i, text_i>`: a loss that costs nothing beside the towers."""
    products = jnp.sum(image_embeds * text_embeds, axis=-1)
    return reduce_loss(-products, where=where, weights=weights, axis_name=None, reduction=reduction)


POD_TERMS = {
    "own pairs alone": Term(own_pairs, EMBEDS),
    "info_nce": OBJECTIVE.terms["info_nce"],
    "info_nce, plain": dataclasses.replace(OBJECTIVE.terms["info_nce"], options={"form": "plain"}),
    "geometric_consistency": Term(losses.geometric_consistency, EMBEDS),
}
SCALED_MESHES = {"data": {}, "data and fsdp": {"fsdp": 2}, "data and tensor": {"tensor": 2}}


def model_config(options: argparse.Namespace, dtype: str | None = None) -> TwoTowerConfig:
    """The towers of a size, in bfloat16 where that is fast if nothing else is asked for."""
    config = SIZES[options.size]
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    image, text = (dataclasses.replace(tower, dtype=dtype) for tower in (config.image, config.text))
    return dataclasses.replace(config, image=image, text=text)


def batch_of(config: TwoTowerConfig, rows: int) -> dict[str, np.ndarray]:
    """Rows of noise."""
    rng = np.random.default_rng(0)
    size, length = config.image.image_size, config.text.max_length
    return {
        "image": rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8),
        "token_ids": rng.integers(0, config.text.vocabulary_size, (rows, length), dtype=np.int32),
        "token_mask": np.ones((rows, length), bool),
        "where": np.ones(rows, bool),
    }


def timed(options: argparse.Namespace) -> Iterator[Row]:
    """A step, and the parts of it alone, in turns; a product of matrices beside them is the machine's rate."""
    config = model_config(options)
    model, train = two_tower(config), TrainConfig(batch_size=options.batch)
    placement = make_placement(train, model.init, model.forward, OBJECTIVE, rules=TRANSFORMER_RULES)
    host = batch_of(config, options.batch)
    rows, state = placement.put_batch(host), placement.init(jax.random.key(0))
    params = jax.tree.map(jnp.copy, state.params)

    def embeds_sum(params: Any) -> jax.Array:
        outputs = model.forward(params, rows, None)
        return outputs["image"]["embeds"].sum() + outputs["text"]["embeds"].sum()

    optimizer = make_optimizer(train)
    optimizer_state = jax.tree.map(jnp.copy, state.optimizer_state)
    unit = jax.random.normal(jax.random.key(1), (2, options.batch, config.embed_dim))
    loss = jax.jit(jax.grad(lambda pair: losses.info_nce(*pair, logit_scale=14.3)))
    towers, step_optimizer = jax.jit(jax.grad(embeds_sum)), jax.jit(optimizer.update)
    kept = {"state": state}

    def whole() -> Any:
        kept["state"], metrics = placement.update(kept["state"], rows)
        return metrics["loss"]

    edge = 1024 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((edge, edge), config.image.dtype)
    product = jax.jit(jnp.matmul)
    programs: dict[str, Callable[[], Any]] = {
        "step": whole,
        "towers": lambda: towers(params),
        "loss": lambda: loss(unit),
        "optimizer": lambda: step_optimizer(params, optimizer_state, params),
        "batch to the devices": lambda: placement.put_batch(host),
        "matrix product": lambda: product(square, square),
    }
    warm = {name: measure.warm_up(functools.partial(_finished, run), options.seconds) for name, run in programs.items()}
    seconds = {name: row["median_seconds"] for name, row in measure.in_turns(warm, seconds=options.seconds).items()}
    if options.trace:
        with jax.profiler.trace(str(options.trace)):
            jax.block_until_ready(whole())

    # One forward and one backward pass of the model, whatever a step computes again.
    update = make_update(model.forward, OBJECTIVE, optimizer)
    flops = traced_flops(jax.make_jaxpr(update)(kept["state"], host))
    rate = 2 * edge**3 / seconds["matrix product"]
    devices = jax.device_count()
    for name in ("step", "towers", "loss", "optimizer", "batch to the devices"):
        row: Row = {"part": name, "seconds": seconds[name], "share of the step": seconds[name] / seconds["step"]}
        if name == "step":
            row |= {
                "examples per second and device": options.batch / seconds["step"] / devices,
                "model TFLOP": flops / 1e12,
                "share of the matrix rate": flops / seconds["step"] / devices / rate,
                "device": jax.devices()[0].device_kind,
                "devices": devices,
            }
        yield row


def _finished(run: Callable[[], Any]) -> Any:
    return jax.block_until_ready(run())


def memory(options: argparse.Namespace) -> Iterator[Row]:
    """The memory of a step by the number of micro-batches, as its compiler plans it."""
    config = model_config(options)
    model, batch = two_tower(config), batch_of(config, options.batch)
    for count in options.parts:
        train = TrainConfig(batch_size=options.batch, micro_batches=count)
        traced = trace_update(train, model.init, model.forward, OBJECTIVE, batch, jax.devices()[:1])
        analysis = traced.program.lower().compile().memory_analysis()
        yield {
            "micro-batches": count,
            "rows at a time": options.batch // count,
            "temporary MiB": analysis.temp_size_in_bytes / 2**20,
            "state and batch MiB": analysis.argument_size_in_bytes / 2**20,
            "GFLOP": traced_flops(traced.program.jaxpr) / 1e9,
        }


def scaling(options: argparse.Namespace) -> Iterator[Row]:
    """Operations, and bytes that a device sends, with as many rows per device."""
    if jax.device_count() < 8:
        yield from _in_subprocess(options)
        return
    config = model_config(options)
    model = two_tower(config)
    for count in (1, 2, 4, 8):
        for name, axes in SCALED_MESHES.items():
            if count == 1 and axes:
                continue
            batch = batch_of(config, options.batch * count)
            train = TrainConfig(batch_size=options.batch * count, mesh=MeshConfig(**axes))
            devices = jax.devices()[:count]
            traced = trace_update(train, model.init, model.forward, OBJECTIVE, batch, devices, rules=TRANSFORMER_RULES)
            compiled = traced.program.lower().compile()
            sent = megabytes_sent(program_costs(compiled.as_text() or "").exchanges)
            yield {
                "devices": count,
                "mesh": name,
                "GFLOP a device": traced_flops(traced.program.jaxpr) / count / 1e9,
                "MB sent a device": sum(sent.values()),
                "of them": {operation: round(size, 3) for operation, size in sent.items()},
                "temporary MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
            }


def megabytes_sent(exchanges: Iterable[Exchange]) -> dict[str, float]:
    """What a device sends in one run, by operation."""
    sent: dict[str, float] = {}
    for exchange in exchanges:
        sent[exchange.operation] = sent.get(exchange.operation, 0.0) + exchange.sent / 1e6
    return sent


def _in_subprocess(options: argparse.Namespace) -> Iterator[Row]:
    """The same from a process that simulates the devices."""
    command = [sys.executable, "-m", "benchmarks.step", "scaling", "--size", options.size, "--rows"]
    run = subprocess.run(
        [*command, "--batch", str(options.batch)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | simulated_devices(8),
        check=True,
    )
    yield from (json.loads(line) for line in run.stdout.splitlines())


def data(options: argparse.Namespace) -> Iterator[Row]:
    """The input pipeline alone: digit scenes, decoded, tokenised and put together, by the number of threads."""
    from repkit.data.pipeline import make_batches
    from repkit.data.sources import all_captions, digit_scenes_source
    from repkit.data.tokenizer import train_tokenizer

    source = digit_scenes_source("pairs", "train", None)
    tokenizer = train_tokenizer(all_captions(source), vocab_size=512)
    for threads in (0, 1, 2, 4):
        with make_batches(
            source,
            tokenizer=tokenizer,
            batch_size=options.batch,
            image_size=32,
            max_length=32,
            shuffle=True,
            seed=0,
            repeat=True,
            num_threads=threads,
        ) as batches:
            next(batches)
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < options.seconds:
                count += len(next(batches)["where"])
            yield {"threads": threads, "examples per second": count / (time.perf_counter() - begin)}


def pod(options: argparse.Namespace) -> Iterator[Row]:
    """A step on devices that are not here, by its loss."""
    place = topology(options.topology)
    config = model_config(options, dtype="bfloat16")
    model, (parts, *_) = two_tower(config), options.parts
    train = TrainConfig(batch_size=options.batch, micro_batches=parts)
    for name in options.losses or POD_TERMS:
        objective = Objective({"pairs": POD_TERMS[name]})

        def trace(devices: Sequence[Any], rows: int, objective: Objective = objective) -> TracedUpdate:
            batch = {key: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for key, x in batch_of(config, 1).items()}
            return trace_update(train, model.init, model.forward, objective, batch, devices, rules=TRANSFORMER_RULES)

        plan = plan_step(trace, place, options.batch)
        sent = megabytes_sent(plan.exchanges)
        yield {
            "topology": place.name,
            "loss": name,
            "micro-batches": parts,
            "memory GiB": plan.memory_bytes / 2**30,
            "state GiB": plan.state_bytes / 2**30,
            "fits": plan.fits,
            "TFLOP a device": plan.flops / 1e12,
            "milliseconds (estimate)": [1e3 * each for each in plan.estimated_seconds],
            "MB sent a device": {operation: round(size, 3) for operation, size in sent.items()},
        }


WHAT = {"time": timed, "memory": memory, "scaling": scaling, "data": data, "pod": pod}


def main() -> None:
    """Prints a table of what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch; with scaling, of each device")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of micro-batches")
    parser.add_argument("--seconds", type=float, default=5.0, help="of samples, for what is timed")
    parser.add_argument("--topology", default="v5e-256", help="the devices of `pod`, as `repkit plan` takes them")
    parser.add_argument("--losses", nargs="+", choices=POD_TERMS, help="those of `pod`; all of them by default")
    parser.add_argument("--trace", type=Path, help="a folder for a trace of the profiler")
    parser.add_argument("--output", type=Path, help="appends the rows as JSON lines")
    parser.add_argument("--rows", action="store_true", help="print JSON lines instead of a table")
    options = parser.parse_args()
    rows = []
    try:
        for row in WHAT[options.what](options):
            rows.append(row)
            print(json.dumps(row) if options.rows else _line(row), flush=True)
    except InputError as error:
        sys.exit(str(error))
    if options.output:
        common = {"what": options.what, "size": options.size, "batch": options.batch, "jax": jax.__version__}
        with options.output.open("a") as file:
            file.writelines(json.dumps(common | row) + "\n" for row in rows)


def _line(row: Row) -> str:
    return "  ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


if __name__ == "__main__":
    main()
