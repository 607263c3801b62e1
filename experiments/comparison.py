"""Methods beside one another: means over seeds, and differences from a baseline seed by seed."""

from collections.abc import Iterator, Mapping, Sequence

from experiments.study import Interval, Run, markdown_table, metric_interval, paired_difference


def mean(runs: Sequence[Run], metric: str) -> str:
    """A share's mean in percent with its interval; empty before there is a run.

    >>> mean([Run({"seed": seed}, {"R@1": value}) for seed, value in enumerate((0.5, 0.51))], "R@1")
    '50.5 ± 6.4'
    """
    return metric_interval(runs, metric).percent() if runs else ""


def difference(runs: Sequence[Run], baseline: Sequence[Run], metric: str) -> Interval | None:
    """`runs - baseline` by seed; None before both have two seeds in common."""
    if len({run.settings["seed"] for run in runs} & {run.settings["seed"] for run in baseline}) < 2:
        return None
    return paired_difference(runs, baseline, metric)


def difference_tables(
    found: Mapping[str, Sequence[Run]], baselines: Sequence[str], titles: Mapping[str, str], metrics: Mapping[str, str]
) -> Iterator[str]:
    """For each baseline a table of the other methods minus it, in points.

    Args:
        found: runs by method.
        baselines: names of methods.
        titles: of the methods.
        metrics: name -> title.
    """
    for baseline in baselines:
        rows = []
        for method, runs in found.items():
            differences = [difference(runs, found.get(baseline, ()), metric) for metric in metrics]
            if method != baseline and any(differences):
                rows.append([titles[method], *("" if each is None else each.percent() for each in differences)])
        if rows:
            table = markdown_table(["method", *metrics.values()], rows)
            yield f"### Minus {titles[baseline]}, seed by seed, in points\n\n{table}"
