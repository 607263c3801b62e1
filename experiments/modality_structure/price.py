"""Part `price`: what features cost that are drawn to one another, or must be equal, where all information is known."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments import figures
from experiments.modality_structure import known_world
from experiments.modality_structure.known_world import SecondBit, Training, World, informations, joint_distribution
from experiments.parts import Finished, Setup
from experiments.study import Interval, Run, Settings, markdown_table, metric_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXACT = "exact"
"""The penalty of features that are equal by construction."""

COLOURS: dict[SecondBit, str] = {"shared": figures.VERMILION, "own": figures.BLUE, "text": figures.GREEN}


@dataclass(frozen=True)
class Price:
    """Every world with every penalty and seed.

    Attributes:
        second_bits: kinds of world.
        noises: of the image's second bit beside a text of `text_noise`; of the text's where the text alone shows it.
        text_noise: see `noises`.
        penalties: factors of the mean squared distance.
        seeds: of initial values.
        training: of every run.
    """

    second_bits: tuple[SecondBit, ...] = ("shared", "own", "text")
    noises: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    text_noise: float = 0.05
    penalties: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    training: Training = dataclasses.field(default_factory=Training)

    def all_settings(self) -> Iterator[dict[str, Any]]:
        """World by world."""
        for second_bit in self.second_bits:
            for noise in self.noises:
                for penalty in (*self.penalties, EXACT):
                    for seed in self.seeds:
                        world = dataclasses.asdict(self._world(second_bit, noise))
                        yield {**world, "penalty": penalty, "seed": seed}

    def make(self, settings: Settings, setup: Setup) -> dict[str, float]:
        """The excess in nats, and what is known of it before."""
        world = World(settings["second_bit"], settings["text_noise"], settings["image_noise"])
        joint, seed = joint_distribution(world), settings["seed"]
        known = informations(joint)
        if settings["penalty"] == EXACT:
            outcome = known_world.train_aligned(joint, seed, self.training)
        else:
            outcome = known_world.train(joint, settings["penalty"], seed, self.training)
        return {
            **outcome._asdict(),
            "delta": known.delta,
            "smallest_aligned_excess": known.both - known.aligned,
        }

    def tables(self, finished: Finished) -> Iterator[str]:
        """The mean excess by world and penalty."""
        for second_bit in self.second_bits:
            rows = []
            for noise in self.noises:
                exact = self._runs(finished, second_bit, noise, EXACT)
                if exact:
                    known = [f"{exact[0].metrics[name]:.3f}" for name in ("delta", "smallest_aligned_excess")]
                    penalized = [self._runs(finished, second_bit, noise, penalty) for penalty in self.penalties]
                    cells = [f"{max(_excess(runs).mean, 0.0):.3f}" if runs else "" for runs in (*penalized, exact)]
                    rows.append([f"{noise:g}", *known, *cells])
            if rows:
                penalties = [f"penalty {penalty:g}" for penalty in self.penalties]
                header = ["noise", "Delta", "least when aligned", *penalties, "exactly aligned"]
                yield f"## Excess cross-entropy in nats, second bit {second_bit}\n\n{markdown_table(header, rows)}"

    def draw(self, finished: Finished, setup: Setup) -> None:
        """Excess by penalty in the first kind of world, and excess against Delta in all."""
        is_complete = all(
            self._runs(finished, second_bit, noise, penalty)
            for second_bit in self.second_bits
            for noise in self.noises
            for penalty in (*self.penalties, EXACT)
        )
        if not is_complete:
            return
        figure, (left, right) = figures.panels(2, width=4.8, height=3.8)
        self._draw_penalties(left, finished)
        self._draw_bound(right, finished)
        figures.save(figure, setup.results / "price.png")

    def _world(self, second_bit: SecondBit, noise: float) -> World:
        return World("text", noise, 0.5) if second_bit == "text" else World(second_bit, self.text_noise, noise)

    def _runs(self, finished: Finished, second_bit: SecondBit, noise: float, penalty: float | str) -> list[Run]:
        return finished(penalty=penalty, **dataclasses.asdict(self._world(second_bit, noise)))

    def _draw_penalties(self, axes: "Axes", finished: Finished) -> None:
        penalties = (*self.penalties, EXACT)
        series = {}
        for index, noise in enumerate(self.noises):
            runs = [self._runs(finished, self.second_bits[0], noise, penalty) for penalty in penalties]
            delta = runs[0][0].metrics["delta"]
            series[f"Delta = {delta:.2f}"] = figures.Line(range(len(runs)), [_excess(each) for each in runs])
            axes.axhline(delta, color=figures.COLOURS[index], linewidth=0.7, linestyle=":")
        figures.lines(axes, series)
        axes.set_xticks(range(len(penalties)), [*(f"{penalty:g}" for penalty in self.penalties), EXACT])
        axes.set_ylim(-0.03, 1.25 * max(each.mean for line in series.values() for each in line.y))
        axes.legend(fontsize=6.5, frameon=False, loc="upper left", ncols=2)
        title = f"second bit {self.second_bits[0]}; dotted: the bound"
        figures.finish(axes, title=title, x="penalty on the distance of the features", y="excess cross-entropy (nats)")

    def _draw_bound(self, axes: "Axes", finished: Finished) -> None:
        """Exactly aligned, and trained without any penalty."""
        largest = 0.0
        for second_bit in self.second_bits:
            colour = COLOURS[second_bit]
            for penalty, name, face in ((EXACT, "exactly aligned", colour), (self.penalties[0], "no penalty", "none")):
                runs = [run for noise in self.noises for run in self._runs(finished, second_bit, noise, penalty)]
                deltas, excesses = ([run.metrics[metric] for run in runs] for metric in ("delta", "excess"))
                largest = max([largest, *deltas])
                label = f"second bit {second_bit}, {name}"
                axes.scatter(deltas, excesses, s=22, edgecolors=colour, facecolors=face, label=label)
        ends = (0.0, 1.1 * largest)
        axes.plot(ends, ends, color=figures.INK, linewidth=0.9, linestyle="--", label="bound: excess = Delta")
        axes.fill_between(ends, ends, color=figures.GREY, alpha=0.12, linewidth=0)
        axes.legend(fontsize=6.5, frameon=False)
        title = "shaded: ruled out for aligned features"
        figures.finish(axes, title=title, x="Delta (nats)", y="excess cross-entropy (nats)")


def _excess(runs: Sequence[Run]) -> Interval:
    return metric_interval(runs, "excess")
