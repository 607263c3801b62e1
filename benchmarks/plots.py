"""Time and temporary memory against the number of rows, on logarithmic axes, one line per entrant.

    python -m benchmarks.plots FILE.jsonl ... DIR

Rows of one width are drawn, that of most shapes. A cross marks memory that a program was not given.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.measure import Row
from benchmarks.report import MIB, read
from repkit.plots import BLUE, DPI, GREEN, GREY, INK, ORANGE, PALE, PURPLE, VERMILION

FIGURES = {
    "pair_losses": ("info_nce", "gamma_contrastive_previous", "sigmoid_contrastive", "uniformity"),
    "geometric_consistency": ("geometric_consistency",),
}
"""File to the losses drawn in it, from left to right."""

STYLES = {
    "repkit": (BLUE, "o"),
    "plain": (VERMILION, "s"),
    "torch": (GREEN, "^"),
    "optax cross-entropy": (PURPLE, "v"),
    "optax ntxent": (ORANGE, "D"),
    "products alone": (GREY, ""),
}
"""Entrant to colour and marker; others are not drawn."""

QUANTITIES = (("median_seconds", "ms", 1e3), ("temporary_bytes", "temporary memory, MiB", 1 / MIB))


def draw_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draws each figure that the rows have results for; returns the files."""
    usable = [row for row in rows if row["kind"] == "time" and "rows" in row["shape"] and "error" not in row]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, losses in FIGURES.items():
        present = [loss for loss in losses if any(row["loss"] == loss for row in usable)]
        if present:
            paths.append(folder / f"{name}.png")
            draw([[row for row in usable if row["loss"] == loss] for loss in present], paths[-1])
    return paths


def draw(losses: Sequence[Sequence[Row]], path: Path) -> Figure:
    """One column per loss: time above, memory below."""
    figure = Figure(figsize=(3.6 * len(losses) + 0.6, 6.2), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, len(losses), squeeze=False, sharex="col", sharey="row")
    for column, rows in enumerate(losses):
        width = Counter(row["shape"]["width"] for row in rows).most_common(1)[0][0]
        rows = sorted((row for row in rows if row["shape"]["width"] == width), key=lambda row: row["shape"]["rows"])
        for axes, (quantity, label, unit) in zip(grid[:, column], QUANTITIES, strict=True):
            _draw_lines(axes, rows, quantity, unit)
            if column == 0:
                axes.set_ylabel(label, color=INK)
        grid[0, column].set_title(f"{rows[0]['loss']}, width {width}", fontsize=10, color=INK)
        grid[1, column].set_xlabel("rows of the batch", color=INK)
    entries = {}
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)
    return figure


def _draw_lines(axes: Axes, rows: Sequence[Row], quantity: str, unit: float) -> None:
    for entrant, (colour, marker) in STYLES.items():
        points = [
            (row["shape"]["rows"], unit * row[quantity], "skipped" in row)
            for row in rows
            if row["entrant"] == entrant and row.get(quantity)
        ]
        if not points:
            continue
        style = ":" if entrant == "products alone" else "-"
        axes.plot(
            *zip(*[point[:2] for point in points], strict=True),
            style,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            label=entrant,
        )
        refused = [point[:2] for point in points if point[2]]
        if refused:
            axes.plot(*zip(*refused, strict=True), "x", color=colour, markersize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color=PALE, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=GREY)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draws the figures of the files into the folder, and prints their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for path in draw_all(read(options.files), options.folder):
        print(path)


if __name__ == "__main__":
    main()
