"""Parts `real_input` and `real_input_longer`: two towers on digit scenes, by loss and batch size.

All trainings of a part see equally many examples.
"""

import functools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import figures, recipe_runs
from experiments.comparison import difference, mean
from experiments.gradient_bias.titles import TITLES
from experiments.parts import Finished, Setup, work_folder
from experiments.study import Run, Settings, markdown_table, metric_interval

RECIPE = Path(__file__).parents[1] / "two_tower.py"
LOSSES: dict[str, tuple[str, ...]] = {
    "info_nce": ("loss=info_nce",),
    "scaled": ("loss=scaled_info_nce",),
    "decoupled": ("loss=decoupled_contrastive",),
    "global": ("loss=global_contrastive",),
    "gamma_sampled": ("loss=gamma_contrastive", "gamma.draw=sampled"),
    "gamma_expected": ("loss=gamma_contrastive", "gamma.draw=expected"),
}
"""Settings of the recipe by method."""

BASELINE = "info_nce"
GAMMA = ("gamma_sampled", "gamma_expected")
METRICS = {
    "retrieval/image_to_text/R@1": "image to text R@1",
    "retrieval/text_to_image/R@1": "text to image R@1",
    "zero_shot/top_1": "zero-shot digit",
}


@dataclass(frozen=True)
class RealInput:
    """Every method with every batch size and seed.

    Attributes:
        methods: names of `LOSSES`.
        batch_sizes: of the training.
        seeds: of the training.
        examples: seen in a training; 12 epochs by default.
        rate_at_128: learning rate at batch size 128; at B it is larger by sqrt(B / 128), for all methods.
        recipe_settings: of all runs.
        title: of its tables.
        figure: file name of its picture.
    """

    methods: tuple[str, ...] = tuple(LOSSES)
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    examples: int = 98_304
    rate_at_128: float = 2e-3
    recipe_settings: tuple[str, ...] = ()
    title: str = "Digit scenes"
    figure: str = "real_input.png"

    def all_settings(self) -> Iterator[dict[str, Any]]:
        """Seed by seed, so that a part of the runs is a study too."""
        for seed in self.seeds:
            for batch_size in self.batch_sizes:
                for method in self.methods:
                    yield {"method": method, "batch_size": batch_size, "seed": seed}

    def make(self, settings: Settings, setup: Setup) -> dict[str, float]:
        """The test metrics, as `<task>/<metric>`."""
        folder = work_folder(setup, settings)
        with recipe_runs.logged(folder):
            recipe_runs.train(RECIPE, folder, self.train_settings(settings, setup.changes))
            metrics = recipe_runs.named_metrics(recipe_runs.evaluate(folder))
        shutil.rmtree(folder)
        return metrics

    def train_settings(self, settings: Settings, changes: Sequence[str] = ()) -> tuple[str, ...]:
        """The recipe's settings of a run, with those that the user changes."""
        batch_size = settings["batch_size"]
        steps = self.examples // batch_size
        own = (*LOSSES[settings["method"]], f"train.seed={settings['seed']}", f"train.batch_size={batch_size}")
        schedule = (
            f"train.steps={steps}",
            f"train.warmup_steps={steps // 12}",
            f"train.learning_rate={self.rate_at_128 * math.sqrt(batch_size / 128)}",
            f"train.checkpoint_every={steps}",
        )
        defaults = ("evaluations=retrieval,zero_shot", *schedule, *self.recipe_settings)
        return recipe_runs.run_settings(own, defaults, changes)

    def tables(self, finished: Finished) -> Iterator[str]:
        """For each metric the means, the differences at equal batch sizes, and those at half the batch."""
        sizes, methods = self._compared_sizes(finished), self.methods
        header = ["method", *(f"batch {size}" for size in sizes)]
        for metric, title in METRICS.items() if sizes else ():
            means = [
                [TITLES[each], *(mean(finished(method=each, batch_size=m), metric) for m in sizes)] for each in methods
            ]
            yield f"## {self.title}: {title}\n\n{markdown_table(header, means)}"
            differences = functools.partial(_differences, finished, metric)
            rows = [differences(each, [(size, size) for size in sizes]) for each in methods if each != BASELINE]
            if any(cell for row in rows for cell in row[1:]):
                yield f"Minus InfoNCE, seed by seed, in points:\n\n{markdown_table(header, rows)}"
            halves = [(size, 2 * size) for size in sizes if 2 * size in sizes]
            rows = [differences(each, halves) for each in GAMMA if each in methods]
            if any(cell for row in rows for cell in row[1:]):
                half_header = ["method", *(f"{size} minus InfoNCE at {twice}" for size, twice in halves)]
                yield f"At half the batch, in points:\n\n{markdown_table(half_header, rows)}"
            yield from self._smallest_batches(finished, metric)

    def _compared_sizes(self, finished: Finished) -> list[int]:
        """The batch sizes with more than one seed of every method, where more are asked for."""
        seeds = min(2, len(self.seeds))
        return [
            size
            for size in self.batch_sizes
            if all(len(finished(method=method, batch_size=size)) >= seeds for method in self.methods)
        ]

    def _smallest_batches(self, finished: Finished, metric: str) -> Iterator[str]:
        """The smallest batch at which gamma reaches InfoNCE at the largest: in the mean, and by the interval."""
        largest = max(self.batch_sizes)
        baseline = finished(method=BASELINE, batch_size=largest)
        for method in GAMMA:
            by_size = {m: difference(finished(method=method, batch_size=m), baseline, metric) for m in self.batch_sizes}
            found = {m: each for m, each in by_size.items() if each is not None}
            if len(found) < len(by_size):
                continue
            in_the_mean = min((m for m, each in found.items() if each.mean >= 0), default="none of these")
            within = min((m for m, each in found.items() if each.mean + each.half_width >= 0), default="none of these")
            yield (
                f"Smallest batch at which {TITLES[method]} reaches InfoNCE at {largest}: in the mean {in_the_mean}; "
                f"not to be told from it or better (upper end of the paired interval at or above 0) {within}."
            )

    def draw(self, finished: Finished, setup: Setup) -> None:
        """Each metric by batch size."""
        sizes = self._compared_sizes(finished)
        if not sizes:
            return
        figure, row = figures.panels(len(METRICS))
        for axes, (metric, title) in zip(row, METRICS.items(), strict=True):
            series = {}
            for method in self.methods:
                found = [metric_interval(finished(method=method, batch_size=m), metric) for m in sizes]
                series[TITLES[method]] = figures.Line(sizes, found)
            figures.lines(axes, series)
            figures.ticks(axes, self.batch_sizes)
            axes.set_ylim(0, 1)  # an interval of few seeds may reach beyond what a share can be
            figures.finish(axes, title=title, x="batch size", y="share right")
        row[0].legend(fontsize=6, frameon=False)
        figures.save(figure, setup.results / self.figure)


def _differences(finished: Finished, metric: str, method: str, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """A row: the method at the first batch size of each pair minus InfoNCE at the second."""

    def runs(of: str, size: int) -> list[Run]:
        return finished(method=of, batch_size=size)

    found = [difference(runs(method, size), runs(BASELINE, other), metric) for size, other in sizes]
    return [TITLES[method], *("" if each is None else each.percent() for each in found)]
