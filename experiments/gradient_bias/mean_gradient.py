"""Part `mean_gradient`: the mean gradient of mini-batches beside the gradient of all pairs, for fixed encoders."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

from experiments import figures
from experiments.gradient_bias import fixed_encoder
from experiments.gradient_bias.fixed_encoder import Encoders, Estimator
from experiments.gradient_bias.titles import TITLES
from experiments.parts import Finished, Setup
from experiments.study import Settings, interval, markdown_table

METRICS = {
    "error": "Error of the mean gradient",
    "noise": "Error expected from the noise alone",
    "deviation": "Deviation of a single batch's gradient",
}


@dataclass(frozen=True)
class MeanGradient:
    """The estimators by number of negatives, over several encoders.

    Attributes:
        encoders: and how much is drawn.
        estimators: of the gradient.
        negatives: in a batch.
        seeds: of encoders, pairs and draws.
    """

    encoders: Encoders = field(default_factory=Encoders)
    estimators: tuple[Estimator, ...] = get_args(Estimator)
    negatives: tuple[int, ...] = (4, 16, 64)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def all_settings(self) -> Iterator[dict[str, Any]]:
        """The smallest batches first, and seed by seed."""
        for negatives in self.negatives:
            for seed in self.seeds:
                for estimator in self.estimators:
                    yield {"estimator": estimator, "negatives": negatives, "seed": seed}

    def make(self, settings: Settings, setup: Setup) -> dict[str, float]:
        """The errors of an estimator, relative to the norm of the gradient of all pairs."""
        estimator, negatives, seed = (settings[name] for name in ("estimator", "negatives", "seed"))
        return fixed_encoder.measure(estimator, self.encoders, negatives=negatives, seed=seed)._asdict()

    def tables(self, finished: Finished) -> Iterator[str]:
        """A table of each metric."""
        for metric, title in METRICS.items():
            values = self._values(finished, metric)
            rows = [
                [TITLES[estimator], *(str(interval(of[m])) if m in of else "" for m in self.negatives)]
                for estimator, of in values.items()
            ]
            if rows:
                table = markdown_table(["estimator", *(f"{m} negatives" for m in self.negatives)], rows)
                yield f"## {title}\n\nRelative to the norm of the gradient of all pairs.\n\n{table}"

    def draw(self, finished: Finished, setup: Setup) -> None:
        """Error, what of it is noise, and deviation by number of negatives."""
        if not finished():
            return
        figure, row = figures.panels(len(METRICS))
        row[1].sharey(row[0])
        for axes, metric in zip(row, METRICS, strict=True):
            series = {
                TITLES[estimator]: figures.Line(list(of), [interval(each) for each in of.values()])
                for estimator, of in self._values(finished, metric).items()
            }
            figures.lines(axes, series)
            figures.ticks(axes, self.negatives)
            axes.set_yscale("log")
            figures.finish(axes, title=METRICS[metric], x="negatives in a batch", y="relative to the full gradient")
        row[-1].legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
        figures.save(figure, setup.results / "mean_gradient.png")

    def _values(self, finished: Finished, metric: str) -> dict[Estimator, dict[int, list[float]]]:
        """What is finished of each estimator, by number of negatives."""
        values = {}
        for estimator in self.estimators:
            by_size = {m: finished(estimator=estimator, negatives=m) for m in self.negatives}
            values[estimator] = {m: [run.metrics[metric] for run in runs] for m, runs in by_size.items() if runs}
        return {estimator: of for estimator, of in values.items() if of}
