"""Tables of benchmark results: on the terminal while they come in, and in Markdown from files of JSON lines.

python -m benchmarks.report FILE.jsonl ... [--figures]
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.measure import Row

MIB = 2**20


def print_about(about: Row) -> None:
    """One line on the machine and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['device']} ({about['processor']}), {about['threads']} threads; {versions}; commit {about['commit']}")


def print_times(rows: Sequence[Row]) -> None:
    """A block of one line per entrant of a problem."""
    print(f"\n{title(rows[0])}")
    print(
        f"  {'':<22}{'median ms':>11}{'quartiles':>19}{'n':>4}{'x ours':>9}{'temp MiB':>10}{'x ours':>9}"
        f"{'GFLOP/s':>9}{'GB/s':>7}{'compile s':>11}"
    )
    for row in rows:
        print(f"  {row['entrant']:<22}{_line(row, rows[0])}", flush=True)


def title(row: Row) -> str:
    """Such as `info_nce: rows 4096, width 512, float32`."""
    sizes = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in row["shape"].items())
    return f"{row['loss']}: {sizes}, {row.get('dtype', 'float32')}"


def _line(row: Row, ours: Row) -> str:
    memory = _number(row, "temporary_bytes", MIB, ".1f")
    compile_seconds = _number(row, "compile_seconds", 1, ".2f")
    memory_ratio = _ratio(row, ours, "temporary_bytes")
    if "median_seconds" not in row:
        reason = "failed" if "error" in row else f"skipped: {row['skipped']}"
        return (
            f"{'-':>11}{'':>19}{'':>4}{'':>9}{memory:>10}{memory_ratio:>9}{'':>9}{'':>7}{compile_seconds:>11}  {reason}"
        )
    lower, upper = (f"{1e3 * quartile:.2f}" for quartile in row["quartiles_seconds"])
    return (
        f"{1e3 * row['median_seconds']:>11.2f}{f'{lower}-{upper}':>19}{row['repetitions']:>4}"
        f"{_ratio(row, ours, 'median_seconds'):>9}{memory:>10}{memory_ratio:>9}"
        f"{_number(row, 'gflops_per_second', 1, '.0f'):>9}{_number(row, 'gbytes_per_second', 1, '.1f'):>7}"
        f"{compile_seconds:>11}"
    )


def _number(row: Row, name: str, unit: float, form: str) -> str:
    return "" if row.get(name) is None else format(row[name] / unit, form)


def _ratio(row: Row, ours: Row, name: str) -> str:
    return f"{row[name] / ours[name]:.3g}" if row.get(name) and ours.get(name) else ""


def print_figures(row: Row) -> None:
    """What was asked of a problem, and what was measured."""
    for line in figure_lines(row):
        print("  " + "  ".join(line))
    print(flush=True)


def figure_lines(row: Row) -> list[tuple[str, str, str, str]]:
    """Problem, figure asked for, figure measured, and yes or no."""
    verdict = {True: "yes", False: "NO", None: "not measured"}
    return [
        (
            title(row) if row["kind"] == "time" else f"{title(row)}, {row['devices']} devices, {row['placement']}",
            figure["asked"],
            "-" if figure["measured"] is None else f"{figure['measured']:.3g}",
            verdict[figure["met"]],
        )
        for figure in row["figures"]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(rows: Iterable[Row], *, figures: bool) -> str:
    """A table of our losses beside their peers and limits, or of the figures asked for."""
    rows = list(rows)
    origins = dict.fromkeys(
        f"{row['device']} ({row['processor']}), {row['threads']} threads, "
        + ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        + f", commit {row['commit']}"
        for row in rows
    )
    table = _figure_table(rows) if figures else _time_table(rows)
    return "\n".join([*(f"Measured on {origin}." for origin in origins), "", *table])


def _figure_table(rows: Sequence[Row]) -> list[str]:
    lines = [line for row in rows if "figures" in row for line in figure_lines(row)]
    return _table(("loss", "asked", "measured", "met"), lines)


def _time_table(rows: Sequence[Row]) -> list[str]:
    def ratios(values: Row) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in values.items())

    lines = [
        (
            title(row),
            f"{1e3 * row['median_seconds']:.3g}",
            _number(row, "temporary_bytes", MIB, ".3g"),
            ratios(row["times_faster_than"]),
            ratios(row["times_smaller_than"]),
            ratios(row["share_of_limit"] | row["share_of_machine"]),
        )
        for row in rows
        if row["kind"] == "time" and row["role"] == "ours" and "median_seconds" in row
    ]
    return _table(("loss", "ms", "MiB", "times faster than", "times smaller than", "share of"), lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def main() -> None:
    """Prints the table of the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--figures", action="store_true", help="the figures asked for, in place of times")
    options = parser.parse_args()
    print(markdown(read(options.files), figures=options.figures))


if __name__ == "__main__":
    main()
