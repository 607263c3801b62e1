"""Results as JSON lines and as a table for the terminal."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from repkit.checks import InputError


@dataclass(frozen=True)
class Result:
    """What one model reached on one data set and task.

    Attributes:
        model: the name of the model or run.
        data: the data set and split.
        task: "retrieval", "zero_shot", "linear_probe", "few_shot", "answers", "captions", "translations".
        metrics: name -> value; shares are in [0, 1]. `<name>_interval` is half the width of the 95 % interval of
            `<name>`.
        step: the training step of the checkpoint; None where there is none, or it was not noted.
    """

    model: str
    data: str
    task: str
    metrics: dict[str, float]
    step: int | None = None


def append_results(results: Iterable[Result], path: str | Path) -> None:
    """Adds one JSON line per result to a file, which is made if it is not there; a last line that is cut off goes.

    Raises:
        ValueError: a metric is NaN or infinite, which JSON cannot hold; nothing is written.
    """
    lines = "".join(json.dumps(asdict(result), allow_nan=False) + "\n" for result in results)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        # What a process that was killed here left of a line would spoil the next one.
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(lines.encode())


def read_results(path: str | Path) -> list[Result]:
    """The results of a file; of several for one model, data set and task the last, in the place of the first.

    Raises:
        InputError: no such file, or a line that is no result (its number is named).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"results: no file {path}")
    results: dict[tuple[str, str, str], Result] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            result = _parsed(line)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"results: {path} line {number} is not a result: {error}") from error
        results[result.model, result.data, result.task] = result
    return list(results.values())


def _parsed(line: str) -> Result:
    result = Result(**json.loads(line))
    if not all(isinstance(name, str) for name in (result.model, result.data, result.task)):
        raise TypeError("model, data and task must be texts")
    if not isinstance(result.metrics, dict) or not all(isinstance(x, int | float) for x in result.metrics.values()):
        raise TypeError("metrics must be numbers by name")
    return result


def format_table(results: Iterable[Result]) -> str:
    """A plain-text table: a row per data set, task and metric, a column per model.

    Shares are shown in percent, intervals behind their metric. Repeated names of data sets and tasks are left blank.

    Example:
        >>> retrieval = Result(
        ...     "gamma", "scenes/test", "retrieval", {"text_to_image/R@1": 0.974, "text_to_image/R@5": 1.0}
        ... )
        >>> baseline = Result("info_nce", "scenes/test", "retrieval", {"text_to_image/R@1": 0.968})
        >>> few_shot = Result(
        ...     "gamma", "scenes/test", "few_shot", {"4_shot/accuracy": 0.81, "4_shot/accuracy_interval": 0.023}
        ... )
        >>> print(format_table([retrieval, baseline, few_shot]))
        data         task       metric                    gamma  info_nce
        -----------  ---------  -----------------  ------------  --------
        scenes/test  retrieval  text_to_image/R@1        97.4 %    96.8 %
                                text_to_image/R@5       100.0 %         -
                     few_shot   4_shot/accuracy    81.0 ± 2.3 %         -
        ± is half the width of a 95 % interval.
    """
    results = list(results)
    models = list(dict.fromkeys(result.model for result in results))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        for name in result.metrics:
            if not _is_interval(name, result.metrics):
                row = cells.setdefault((result.data, result.task, name), {})
                row[result.model] = _format_metric(name, result.metrics)
    keys = sorted(cells, key=_order_of_first(cells))

    table = [["data", "task", "metric", *models]]
    last = ("", "")
    for data, task, name in keys:
        shown_data = "" if data == last[0] else data
        shown_task = "" if (data, task) == last else task
        table.append([shown_data, shown_task, name, *(cells[data, task, name].get(model, "-") for model in models)])
        last = (data, task)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = ["  ".join(_align(row, widths)).rstrip() for row in table]
    if any("±" in line for line in lines):
        lines.append("± is half the width of a 95 % interval.")
    return "\n".join(lines)


_SHARE = re.compile(r"(^|/)(R@\d+|top_\d+|(vqa_)?accuracy|mean_per_class|exact_match|bleu4)$")


def _is_interval(name: str, metrics: dict[str, float]) -> bool:
    return name.endswith("_interval") and name.removesuffix("_interval") in metrics


def _format_metric(name: str, metrics: dict[str, float]) -> str:
    values = [metrics[key] for key in (name, f"{name}_interval") if key in metrics]
    if _SHARE.search(name):
        return " ± ".join(f"{100 * value:.1f}" for value in values) + " %"
    return " ± ".join(f"{value:.4g}" for value in values)


def _order_of_first(cells: Iterable[tuple[str, str, str]]):
    """Keeps data sets, tasks and metrics in the order they first came in, and the rows of one task together."""
    first: dict[tuple[str, ...], int] = {}
    for key in cells:
        for length in (1, 2, 3):
            first.setdefault(key[:length], len(first))
    return lambda key: (first[key[:1]], first[key[:2]], first[key])


def _align(row: list[str], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if column < 3 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
