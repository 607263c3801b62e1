"""Time, compile time and temporary memory of the losses, value and gradient, beside their peers and limits.

    python -m benchmarks.losses                            the usual shapes; some minutes
    python -m benchmarks.losses --only 'info_nce/4096*'    some of them; --list prints the names
    python -m benchmarks.losses --targets                  the figures that the losses are to reach; up to hours
    python -m benchmarks.losses --smoke                    every loss once, tiny; under a minute

It ends with status 1 if anything failed. Results go to --output as JSON lines, which `benchmarks.report` makes a
table of and `benchmarks.plots` draws.
"""

import argparse
import fnmatch
import functools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks import measure, targets
from benchmarks.cases import FAMILIES, Family, Shape
from benchmarks.measure import Budget, Row
from benchmarks.report import print_about, print_figures, print_times

MACHINE_SIZE, SMOKE_MACHINE_SIZE = 2048, 128
SMOKE_SECONDS = 0.0
SMOKE_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
"""Compiling is nearly all that tiny programs cost."""


class Job(NamedTuple):
    """Something that can be run by its name and gives rows of results."""

    name: str
    run: Callable[[], list[Row]]


def jobs(options: argparse.Namespace) -> list[Job]:
    """All jobs that the options leave."""
    found = list(_target_jobs(options) if options.targets else _shape_jobs(options))
    wanted = options.only.split(",") if options.only else ["*"]
    patterns = [pattern if "/" in pattern or pattern == "*" else f"{pattern}/*" for pattern in wanted]
    for pattern in patterns:
        if not any(fnmatch.fnmatch(job.name, pattern) for job in found):
            names = ", ".join(dict.fromkeys(job.name.partition("/")[0] for job in found))
            raise SystemExit(f"--only: nothing is called '{pattern}'; --list prints the names of all ({names})")
    return [job for job in found if any(fnmatch.fnmatch(job.name, pattern) for pattern in patterns)]


def _shape_jobs(options: argparse.Namespace) -> list[Job]:
    found = []
    for loss, family in FAMILIES.items():
        shapes = family.usual + (family.large if options.full else ())
        for shape in (family.smallest,) if options.smoke else sorted(shapes):
            found.append(Job(_name(loss, shape), functools.partial(_compare, family, shape, options)))
    return found


def _target_jobs(options: argparse.Namespace) -> list[Job]:
    found = []
    for target in targets.TARGETS:

        def run(target: targets.Target = target) -> list[Row]:
            rows = _compare(FAMILIES[target.loss], target.shape, options)
            rows[0]["figures"] = [figure.judged(rows[0]) for figure in target.figures]
            print_figures(rows[0])
            return rows

        found.append(Job(_name(target.loss, target.shape), run))
    for sharded in targets.SHARDED_TARGETS:

        def run_sharded(sharded: targets.ShardedTarget = sharded) -> list[Row]:
            row = sharded.judged(smoke=options.smoke)
            print_figures(row)
            return [row]

        found.append(Job(_name(f"{sharded.loss}_{sharded.placement}", sharded.shape), run_sharded))
    return found


def _name(loss: str, shape: Shape) -> str:
    return f"{loss}/{'x'.join(map(str, shape))}"


def _compare(family: Family, shape: Shape, options: argparse.Namespace) -> list[Row]:
    problem = family.at(shape, smoke=options.smoke)
    budget = Budget(
        seconds=SMOKE_SECONDS if options.smoke else options.seconds,
        memory=None if options.memory is None else options.memory * 2**30,
        compiler_options=SMOKE_COMPILER_OPTIONS if options.smoke else {},
    )
    machine = measure.machine(SMOKE_MACHINE_SIZE if options.smoke else MACHINE_SIZE)
    rows = measure.compare(problem, machine, options.dtype, budget)
    print_times(rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables, writes the JSON lines, and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and few repetitions, in place of all shapes")
    parser.add_argument("--full", action="store_true", help="the large shapes too")
    parser.add_argument("--targets", action="store_true", help="the figures asked for, beside what is measured")
    parser.add_argument("--only", metavar="NAMES", help="losses or names, with * and separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--seconds", type=float, default=2.0, help="of samples per program; at least 3 are taken")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="skip programs that need more; default: 0.8 of free"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the inputs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the results as JSON lines")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw time and memory against the number of rows")
    options = parser.parse_args(arguments)
    chosen = jobs(options)
    if options.list:
        print("\n".join(job.name for job in chosen))
        return 0
    # A compiled program from a cache would say nothing of the time to compile it.
    jax.config.update("jax_enable_compilation_cache", False)
    # The losses of repkit ask for full precision; on accelerators the peers would get less.
    jax.config.update("jax_default_matmul_precision", "highest")
    about = measure.about()
    print_about(about)
    results: list[Row] = []
    for job in chosen:
        try:
            rows = job.run()
        except Exception as error:
            print(f"{job.name}: FAILED", file=sys.stderr)
            traceback.print_exc()
            rows = [{"kind": "failure", "name": job.name, "error": f"{type(error).__name__}: {error}"}]
        results += rows
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in rows)
    if options.plot:
        from benchmarks import plots

        plots.draw_all(results, options.plot)
    failed = [row for row in results if "error" in row]
    if failed:
        print(f"{len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
