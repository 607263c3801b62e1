"""What the studies share: runs that are kept as they finish, and comparisons of methods over paired seeds.

A study is a list of runs, each named by its settings. A finished run is a line of a JSON file; a second call makes the
runs that are missing. Methods are compared seed by seed, because runs of one seed share their data order and initial
values, so that their difference varies less than either.
"""

import concurrent.futures
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from repkit.checks import InputError
from repkit.train.memory import share_one_heap

Settings = Mapping[str, Any]


class Run(NamedTuple):
    """A finished run.

    Attributes:
        settings: what distinguishes it, such as task, method and seed; JSON values.
        metrics: what came out; numbers.
    """

    settings: dict[str, Any]
    metrics: dict[str, float]


class Runs:
    """The finished runs of a study, in a file of JSON lines.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> runs = Runs(Path(folder.name) / "runs.jsonl")
        >>> runs.run({"method": "ours", "seed": 0}, lambda: {"accuracy": 0.5})
        Run(settings={'method': 'ours', 'seed': 0}, metrics={'accuracy': 0.5})
        >>> runs.run({"method": "ours", "seed": 0}, lambda: 1 / 0)  # already there
        Run(settings={'method': 'ours', 'seed': 0}, metrics={'accuracy': 0.5})
        >>> folder.cleanup()
    """

    def __init__(self, path: Path):
        self._path = path
        self._by_name: dict[str, Run] = {}
        for run in _read(path) if path.exists() else ():
            self._by_name[_name(run.settings)] = run

    def __iter__(self):
        return iter(self._by_name.values())

    def __contains__(self, settings: Settings) -> bool:
        return _name(settings) in self._by_name

    def run(self, settings: Settings, make: Callable[[], Mapping[str, float]]) -> Run:
        """The run of these settings: the one that is kept, or a new one, which is kept before it is returned."""
        name = _name(settings)
        if name not in self._by_name:
            run = Run(dict(settings), {metric: float(value) for metric, value in make().items()})
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(run._asdict()) + "\n")
            self._by_name[name] = run
        return self._by_name[name]

    def select(self, **settings: Any) -> list[Run]:
        """The runs whose settings include these."""
        return [run for run in self if all(run.settings.get(name) == value for name, value in settings.items())]


def run_missing(
    runs: Runs,
    settings: Iterable[Settings],
    make: Callable[[Settings], Mapping[str, float]],
    *,
    workers: int = 1,
    minutes: float = float("inf"),
    tell: Callable[[Run], None] = lambda run: None,
) -> bool:
    """Makes the runs that are missing, some at a time, each in a process with a share of the processors of its own.

    Several small models at once use the processors better than one after the other on all of them.

    Args:
        runs: the finished ones; each new one is kept as soon as it is finished.
        settings: all runs, in the order in which they are to begin.
        make: from settings to metrics; with several workers a function of a module, or a `functools.partial` of one.
        workers: how many runs there are at a time; one runs in this process.
        minutes: no run begins after this time.
        tell: is called with each run as it is finished.

    Returns:
        Whether all runs are there.

    Raises:
        Exception: what `make` raised first; no run begins after it, and those under way are kept.
    """
    end = time.monotonic() + 60 * minutes
    missing = iter([each for each in settings if each not in runs])
    if workers == 1:
        for each in missing:
            if time.monotonic() > end:
                return False
            tell(runs.run(each, lambda each=each: make(each)))
        return True
    context = multiprocessing.get_context("spawn")  # a fork of a process whose JAX has threads hangs
    places = context.Queue()
    for worker in range(workers):
        places.put(worker)
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_begin_worker, initargs=(places, workers, os.getpid())
    ) as pool:
        running: dict[concurrent.futures.Future[Mapping[str, float]], Settings] = {}
        failure: BaseException | None = None
        while True:
            while failure is None and len(running) < workers and time.monotonic() < end:
                if (each := next(missing, None)) is None:
                    break
                running[pool.submit(make, each)] = each
            if not running:
                break
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                each = running.pop(future)
                if (error := future.exception()) is None:
                    tell(runs.run(each, future.result))
                else:
                    failure = failure or error
        if failure is not None:
            raise failure
        return next(missing, None) is None


def _begin_worker(places: "multiprocessing.Queue[int]", workers: int, parent: int) -> None:
    """Leaves a worker the processors that are its own (XLA makes as many threads), and lets it end with its parent.

    Its threads share a heap from the start: what is freed in a heap of a thread's own goes back to the operating
    system, and clearing fresh pages took a seventh of the training of small models.
    """
    share_one_heap()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        share = max(len(processors) // workers, 1)
        start = places.get() * share % len(processors)
        os.sched_setaffinity(0, processors[start : start + share])


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, however that came to its end."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _read(path: Path) -> Iterable[Run]:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield Run(**json.loads(line))
        except (ValueError, TypeError) as error:
            # A program that was killed while it wrote leaves half of its last line; that run is made again.
            if number < len(lines):
                raise InputError(f"{path}, line {number}: expected a run as JSON, got '{line[:60]}'") from error
            path.write_text("".join(f"{kept}\n" for kept in lines[:-1]))


def _name(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


class Interval(NamedTuple):
    """A mean with its 95 % interval.

    Attributes:
        mean: of the values.
        half_width: the interval is mean +- half_width; infinite for one value.
        values: how many there are.
    """

    mean: float
    half_width: float
    values: int

    def __str__(self) -> str:
        """The mean with its interval; one value has none."""
        return f"{self.mean:.3g}" if self.values == 1 else f"{self.mean:.3g} ± {self.half_width:.2g}"

    def percent(self) -> str:
        """A share as a percentage; one value has no interval.

        >>> Interval(0.8512, 0.0123, 5).percent(), interval([0.8512]).percent()
        ('85.1 ± 1.2', '85.1')
        """
        if self.values == 1:
            return f"{100 * self.mean:.1f}"
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval by Student's t.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half_width=2.484..., values=3)
    """
    x = np.asarray(values, float)
    if x.size == 0:
        raise InputError("an interval needs at least one value, got none")
    if x.size == 1:
        return Interval(float(x[0]), float("inf"), 1)
    half_width = stats.t.ppf(0.975, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size)
    return Interval(float(x.mean()), float(half_width), int(x.size))


def metric_interval(runs: Iterable[Run], metric: str) -> Interval:
    """The mean of a metric over runs, with its interval."""
    return interval([run.metrics[metric] for run in runs])


def paired_difference(ours: Sequence[Run], baseline: Sequence[Run], metric: str) -> Interval:
    """The mean difference `ours - baseline` of a metric over the runs with the same seed.

    Raises:
        InputError: if no seed has a run on both sides.

    Example:
        >>> ours = [Run({"seed": seed}, {"accuracy": 0.5 + seed}) for seed in range(3)]
        >>> baseline = [Run({"seed": seed}, {"accuracy": 0.4 + seed}) for seed in range(2)]
        >>> print(paired_difference(ours, baseline, "accuracy"))
        0.1 ± 0
    """
    first, second = ({run.settings["seed"]: run.metrics[metric] for run in runs} for runs in (ours, baseline))
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise InputError(f"no seed with a run on both sides: {sorted(first)} and {sorted(second)}")
    # Differences of equal size leave a spread of the size of rounding, which is none.
    return interval([round(first[value] - second[value], 12) for value in shared])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown_table(["method", "accuracy"], [["ours", "0.5"]]))
    | method | accuracy |
    |---|---|
    | ours | 0.5 |
    """
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("|---" * len(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)
