"""Study: does the gradient of a contrastive loss depend on the batch size, and what does it cost to prevent that?

    python -m experiments.gradient_bias            the whole study: hours; what is finished is not made again
    python -m experiments.gradient_bias --smoke    all of its parts, tiny: under a minute
    python -m experiments.gradient_bias --report   the tables and figures of what is finished

Three parts (`--part` takes one): `optimum`, a parameter whose best value is known; `gradient`, the mean gradient of an
encoder that stands still; `scenes`, two towers trained on digit scenes in batches of 16 to 512. The results go to
experiments/results/gradient_bias/: every run as a JSON line, the tables, and the figures.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from experiments import mean_gradient, scalar_problem
from experiments.mean_gradient import Encoders, Estimator
from experiments.scalar_problem import Lane, Training
from experiments.study import Runs

RESULTS = Path(__file__).parent / "results" / "gradient_bias"
PARTS = ("optimum", "gradient", "scenes")

VARIANTS: dict[str, Training] = {
    "plain": Training(),
    "shape 16": Training(shape=16.0),
    "long memory": Training(memory_rate=0.001),
    "small steps": Training(rate=0.001, decay=50_000.0),
    "all three": Training(shape=16.0, memory_rate=0.001, rate=0.001, decay=50_000.0),
    "bounded scores": Training(largest_score=2.0),
}
"""Ways to train the parameter; all but the first are tried where the first fails."""


@dataclass(frozen=True)
class Optimum:
    """Part `optimum`: every method with every number of negatives, spread and initial value."""

    methods: tuple[scalar_problem.Method, ...] = get_args(scalar_problem.Method)
    sigmas: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5)
    negatives: tuple[int, ...] = (4, 2, 8, 16, 32)
    starts: tuple[float, ...] = tuple(round(float(x), 3) for x in np.linspace(0, 3, 10))
    steps: int = 100_000
    variants: tuple[str, ...] = tuple(VARIANTS)
    variant_methods: tuple[scalar_problem.Method, ...] = ("gamma_sampled", "gamma_expected")
    shown: tuple[float, int] = (1.0, 4)
    """sigma and m whose trajectories are kept and drawn."""
    seed: int = 0


@dataclass(frozen=True)
class Gradient:
    """Part `gradient`: the estimators by number of negatives, over several encoders."""

    encoders: Encoders = Encoders()
    estimators: tuple[Estimator, ...] = get_args(Estimator)
    negatives: tuple[int, ...] = (4, 16, 64, 255)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Study:
    """What is run, and where it goes.

    Attributes:
        results: folder of the results.
        work: folder of what may be deleted afterwards.
        optimum: the part of this name.
        gradient: the part of this name.
    """

    results: Path = RESULTS
    work: Path = Path("runs/gradient_bias")
    optimum: Optimum = Optimum()
    gradient: Gradient = Gradient()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Program:
    """Runs that are made together, because one compiled program makes them.

    Attributes:
        settings: of each run.
        make: the metrics of each run.
    """

    settings: list[dict[str, Any]]
    make: Callable[[], list[Mapping[str, float]]]


def run_all(study: Study, parts: Sequence[str], minutes: float) -> bool:
    """Makes the runs that are missing, as many as begin within the minutes; whether all are there."""
    runs = Runs(study.results / "runs.jsonl")
    start = time.monotonic()
    for program in programs(study, parts):
        if all(settings in runs for settings in program.settings):
            continue
        if time.monotonic() - start > 60 * minutes:
            return False
        for settings, metrics in zip(program.settings, program.make(), strict=True):
            runs.run(settings, lambda metrics=metrics: metrics)
    return True


def programs(study: Study, parts: Sequence[str]) -> Iterator[Program]:
    """The programs of these parts."""
    if "optimum" in parts:
        yield from _optimum_programs(study.optimum)
    if "gradient" in parts:
        yield from _gradient_programs(study.gradient)


def _optimum_programs(part: Optimum) -> Iterator[Program]:
    for negatives in part.negatives:
        for method in part.methods:
            yield _optimum_program(part, method, negatives, "plain")
    for variant in part.variants[1:]:
        for method in part.variant_methods:
            yield _optimum_program(part, method, part.shown[1], variant)


def _optimum_program(part: Optimum, method: scalar_problem.Method, negatives: int, variant: str) -> Program:
    training = dataclasses.replace(VARIANTS[variant], negatives=negatives, steps=part.steps)
    lanes = [Lane(sigma, start) for sigma in part.sigmas for start in part.starts]
    named = {"part": "optimum", "method": method, "negatives": negatives, "variant": variant}

    def make() -> list[Mapping[str, float]]:
        courses = scalar_problem.train(method, training, lanes, seed=part.seed)
        return [
            _course(training, course) if (lane.sigma, negatives, variant) == (*part.shown, "plain") else _end(course)
            for lane, course in zip(lanes, courses, strict=True)
        ]

    return Program([named | lane._asdict() for lane in lanes], make)


def _end(course: np.ndarray) -> dict[str, float]:
    return {"theta": round(float(course[-1]), 4)}


def _course(training: Training, course: np.ndarray) -> dict[str, float]:
    """Where it ends and, by the number of steps, where it was; more often at the beginning."""
    records = np.unique(np.geomspace(1, len(course), 60).round().astype(int))
    recorded = {f"step_{record * training.record_every}": round(float(course[record - 1]), 4) for record in records}
    return _end(course) | recorded


def _gradient_programs(part: Gradient) -> Iterator[Program]:
    for seed in part.seeds:
        for negatives in part.negatives:
            for estimator in part.estimators:
                settings = {"part": "gradient", "estimator": estimator, "negatives": negatives, "seed": seed}

                def make(estimator=estimator, negatives=negatives, seed=seed) -> list[Mapping[str, float]]:
                    return [mean_gradient.measure(estimator, part.encoders, negatives=negatives, seed=seed)._asdict()]

                yield Program([settings], make)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="all parts, tiny")
    parser.add_argument("--report", action="store_true", help="only tables and figures of what is finished")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    options = parser.parse_args(arguments)
    study = Study()
    run_all(study, options.part or PARTS, options.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
