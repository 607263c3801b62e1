"""What the figures of the studies share: panels, curves with intervals, and style."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.study import Interval
from repkit.plots import BLUE, DPI, GREEN, GREY, INK, ORANGE, PURPLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALE_BLUE = "#88CCEE"
COLOURS = (VERMILION, ORANGE, GREEN, BLUE, PURPLE, GREY, PALE_BLUE, INK)
MARKERS = "os^Dvx*P"


class Line(NamedTuple):
    """One line of a panel.

    Attributes:
        x: places.
        y: means with their intervals.
    """

    x: Sequence[float]
    y: Sequence[Interval]


def panels(count: int, *, width: float = 4.2, height: float = 3.4) -> "tuple[Figure, list[Axes]]":
    """A figure with panels in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), dpi=DPI, facecolor="white", layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def lines(axes: "Axes", series: Mapping[str, Line]) -> None:
    """Draws each series with its intervals; series that coincide stay visible by their markers."""
    for index, (name, line) in enumerate(series.items()):
        widths = [each.half_width if np.isfinite(each.half_width) else 0.0 for each in line.y]
        axes.errorbar(
            line.x,
            [each.mean for each in line.y],
            yerr=widths,
            label=name,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            alpha=0.9,
        )


def finish(axes: "Axes", *, title: str, x: str, y: str) -> None:
    """Titles and style of a panel."""
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=8, color=GREY)
    axes.set_ylabel(y, fontsize=8, color=GREY)
    axes.tick_params(labelsize=7, colors=GREY, labelcolor=INK, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def ticks(axes: "Axes", values: Sequence[float]) -> None:
    """Marks these places of the horizontal axis, in logarithmic distances of base 2."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def save(figure: "Figure", path: Path) -> None:
    """Writes the PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
