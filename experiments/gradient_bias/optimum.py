"""Part `optimum`: where mini-batches take a parameter whose best value is 1."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from experiments import figures
from experiments.gradient_bias import scalar_problem
from experiments.gradient_bias.scalar_problem import Lane, Method, Training
from experiments.gradient_bias.titles import TITLES
from experiments.parts import Finished, Setup
from experiments.study import Run, Settings, markdown_table

VARIANTS: dict[str, Training] = {
    "plain": Training(),
    "shape 16": Training(shape=16.0),
    "long memory": Training(memory_rate=0.001),
    "small steps": Training(rate=0.001, decay=50_000.0),
    "all three": Training(shape=16.0, memory_rate=0.001, rate=0.001, decay=50_000.0),
    "bounded scores": Training(largest_score=2.0),
}
"""Ways to train the parameter; all but the first are tried where the first fails."""

NEAR = 0.15
"""Distance from 1 at which a run has found it."""

RECORDS = 60
"""Places of a course that are kept, more of them at its beginning."""


@dataclass(frozen=True)
class Optimum:
    """Every method with every number of negatives, spread and initial value.

    A run is one program, which trains all spreads and initial values at once.

    Attributes:
        methods: losses.
        sigmas: spreads of the negatives.
        negatives: m of a step.
        starts: initial values.
        steps: of a training.
        tamed: the method that the variants are tried with.
        variants: names of `VARIANTS`, all with `shown[1]` negatives.
        shown: sigma and m whose courses are kept and drawn.
        seed: of the negatives, which are the same whatever the method.
    """

    methods: tuple[Method, ...] = get_args(Method)
    sigmas: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5)
    negatives: tuple[int, ...] = (2, 4, 8, 16)
    starts: tuple[float, ...] = tuple(round(float(x), 3) for x in np.linspace(0, 3, 10))
    steps: int = 100_000
    tamed: Method = "gamma_sampled"
    variants: tuple[str, ...] = tuple(VARIANTS)[1:]
    shown: tuple[float, int] = (1.0, 4)
    seed: int = 0

    def all_settings(self) -> Iterator[dict[str, Any]]:
        """What is shown first, then the variants, then the sweep."""
        sizes = [self.shown[1], *(m for m in self.negatives if m != self.shown[1])]
        yield from (_settings(method, sizes[0]) for method in self.methods)
        yield from (_settings(self.tamed, sizes[0], variant) for variant in self.variants)
        yield from (_settings(method, m) for m in sizes[1:] for method in self.methods)

    def make(self, settings: Settings, setup: Setup) -> dict[str, float]:
        """Where each lane ends, as `sigma/start`; with what is shown also its course, as `sigma/start/step`."""
        method, negatives, variant = (settings[name] for name in ("method", "negatives", "variant"))
        training = dataclasses.replace(VARIANTS[variant], negatives=negatives, steps=self.steps)
        lanes = [Lane(sigma, start) for sigma in self.sigmas for start in self.starts]
        courses = scalar_problem.train(method, training, lanes, seed=self.seed)
        metrics = {}
        for lane, course in zip(lanes, courses, strict=True):
            metrics[_name(lane)] = round(float(course[-1]), 4)
            if (lane.sigma, negatives, variant) == (*self.shown, "plain"):
                records = np.unique(np.geomspace(1, len(course), RECORDS).round().astype(int))
                for record in records:
                    step = record * training.record_every
                    metrics[f"{_name(lane)}/{step}"] = round(float(course[record - 1]), 4)
        return metrics

    def tables(self, finished: Finished) -> Iterator[str]:
        """Where the runs end: by number of negatives, and with the variants."""
        explanation = (
            "Median (range) over the initial values of where the parameter ends, "
            f"and how many end within {NEAR:g} of 1."
        )
        header = [f"sigma {sigma:g}" for sigma in self.sigmas]
        for negatives in self.negatives:
            rows = [
                [TITLES[run.settings["method"]], *self._cells(run)]
                for run in finished(negatives=negatives, variant="plain")
            ]
            if rows:
                table = markdown_table(["method", *header], rows)
                yield f"## The optimum at 1, {negatives} negatives\n\n{explanation}\n\n{table}"
        rows = [
            [run.settings["variant"], *self._cells(run)]
            for variant in ("plain", *self.variants)
            for run in finished(method=self.tamed, negatives=self.shown[1], variant=variant)
        ]
        if rows:
            title = f"What tames it: {TITLES[self.tamed]}, {self.shown[1]} negatives"
            yield f"## {title}\n\n{explanation}\n\n{markdown_table(['variant', *header], rows)}"

    def draw(self, finished: Finished, setup: Setup) -> None:
        """The courses of the runs that are shown, and the sweep over sigma and m."""
        self._draw_courses(finished, setup)
        self._draw_sweep(finished, setup)

    def _ends(self, run: Run, sigma: float) -> list[float]:
        return [run.metrics[_name(Lane(sigma, start))] for start in self.starts]

    def _cells(self, run: Run) -> list[str]:
        return [_cell(self._ends(run, sigma)) for sigma in self.sigmas]

    def _draw_courses(self, finished: Finished, setup: Setup) -> None:
        sigma, negatives = self.shown
        colours = {"decoupled": figures.BLUE, "info_nce": figures.PALE_BLUE, "gamma_sampled": figures.VERMILION}
        runs = {
            method: run
            for method in colours
            for run in finished(method=method, negatives=negatives, variant="plain")
            if method in self.methods
        }
        if not runs:
            return
        figure, (axes,) = figures.panels(1, width=5.4, height=3.8)
        for method, run in runs.items():
            for index, start in enumerate(self.starts):
                course = _course(run.metrics, Lane(sigma, start))
                label = TITLES[method] if index == 0 else None
                axes.plot([1, *course], [start, *course.values()], color=colours[method], linewidth=0.9, label=label)
        axes.axhline(1.0, color=figures.INK, linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.legend(fontsize=7, frameon=False)
        figures.finish(axes, title=f"sigma = {sigma:g}, {negatives} negatives a step", x="step", y="parameter")
        figures.save(figure, setup.results / "optimum.png")

    def _draw_sweep(self, finished: Finished, setup: Setup) -> None:
        sizes = [m for m in self.negatives if finished(negatives=m, variant="plain")]
        if not sizes:
            return
        figure, row = figures.panels(len(sizes), width=3.1)
        for axes, negatives in zip(row, sizes, strict=True):
            for run in finished(negatives=negatives, variant="plain"):
                index = self.methods.index(run.settings["method"])
                ends = np.array([self._ends(run, sigma) for sigma in self.sigmas])
                middle = np.median(ends, axis=1)
                axes.errorbar(
                    np.array(self.sigmas) + 0.03 * (index - 2),
                    middle,
                    yerr=(middle - ends.min(axis=1), ends.max(axis=1) - middle),
                    label=TITLES[run.settings["method"]],
                    color=figures.COLOURS[index],
                    marker=figures.MARKERS[index],
                    markersize=3.5,
                    linewidth=1,
                    capsize=2,
                )
            axes.axhline(1.0, color=figures.INK, linewidth=0.8, linestyle="--")
            axes.set_yscale("symlog", linthresh=2)
            axes.set_ylim(0, 2000)
            figures.finish(axes, title=f"{negatives} negatives", x="sigma", y="where it ends: median, range")
        row[0].legend(fontsize=6, frameon=False, loc="upper left")
        figures.save(figure, setup.results / "optimum_sweep.png")


def _settings(method: Method, negatives: int, variant: str = "plain") -> dict[str, Any]:
    return {"method": method, "negatives": negatives, "variant": variant}


def _name(lane: Lane) -> str:
    return f"{lane.sigma:g}/{lane.start:g}"


def _course(metrics: Mapping[str, float], lane: Lane) -> dict[int, float]:
    """The kept values of a lane by step."""
    prefix = f"{_name(lane)}/"
    return {int(name.removeprefix(prefix)): value for name, value in metrics.items() if name.startswith(prefix)}


def _cell(ends: Sequence[float]) -> str:
    near = sum(abs(end - 1) <= NEAR for end in ends)
    return f"{np.median(ends):.2f} ({min(ends):.2f} to {max(ends):.2f}), {near} of {len(ends)}"
