"""Studies of several parts: one command makes the runs that are missing and reports those that are finished."""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from experiments.recipe_runs import compile_quickly, keep_programs
from experiments.study import Run, Runs, Settings, run_missing
from repkit.checks import InputError

RESULTS = Path(__file__).parent / "results"

Finished = Callable[..., list[Run]]
"""From keyword arguments to the finished runs of a part whose settings include them."""


class Setup(NamedTuple):
    """Where a study's files go, and what is changed in it.

    Attributes:
        results: folder of the runs that are finished, the tables and the figures.
        work: folder of what may be deleted afterwards.
        changes: settings of all trainings by a recipe, NAME=VALUE.
    """

    results: Path
    work: Path
    changes: tuple[str, ...] = ()


class Part(Protocol):
    """A part of a study; it goes to other processes, so that it holds nothing but its settings."""

    def all_settings(self) -> Iterable[dict[str, Any]]:
        """The settings of its runs, in the order in which they are made."""
        ...

    def make(self, settings: Settings, setup: Setup) -> Mapping[str, float]:
        """The metrics of a run."""
        ...

    def tables(self, finished: Finished) -> Iterator[str]:
        """Markdown sections of what is finished."""
        ...

    def draw(self, finished: Finished, setup: Setup) -> None:
        """Writes the figures of what is finished."""
        ...


class Study(NamedTuple):
    """A study.

    Attributes:
        name: folder of its results.
        title: of its tables.
        parts: name -> part.
        smoke: the same parts, tiny.
    """

    name: str
    title: str
    parts: Mapping[str, Part]
    smoke: Mapping[str, Part]


def study_command(study: Study, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing, writes tables and figures, and returns 0; 2 after a message of what is wrong.

    Args:
        study: what is run.
        description: what `--help` says of it.
        arguments: of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_options(parser)
    parser.add_argument("--part", choices=study.parts, action="append", help="make runs of this part; may be repeated")
    options = parser.parse_args(arguments)
    return exit_code(functools.partial(_make_and_report, study, options))


def exit_code(command: Callable[[], None]) -> int:
    """Runs the command; 0, or 2 after one line on what it could not read, write or do."""
    try:
        command()
    except (InputError, OSError) as error:
        print(f"repkit: {error}", file=sys.stderr)
        return 2
    return 0


def _make_and_report(study: Study, options: argparse.Namespace) -> None:
    setup = _setup(study, smoke=options.smoke, changes=tuple(options.set))
    parts = study.smoke if options.smoke else study.parts
    runs = Runs(setup.results / "runs.jsonl")
    is_complete = options.report or run_missing(
        runs,
        [{"part": name, **each} for name in options.part or parts for each in parts[name].all_settings()],
        functools.partial(_make, parts, setup),
        # Tiny runs are tracing and compilation, most of which has one thread.
        workers=options.workers or (2 if options.smoke else 1),
        minutes=options.minutes,
        tell=_tell,
    )
    print(report(study.title, parts, runs, setup))
    if not is_complete:
        print("Not complete; call again to go on.")


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """What the commands of all studies take."""
    parser.add_argument("--smoke", action="store_true", help="the whole study, tiny")
    parser.add_argument("--report", action="store_true", help="only tables and figures of what is finished")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--workers", type=_count, help="runs that are made at a time; 1 by default, 2 with --smoke")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of every training by a recipe, such as model.width=128; may be repeated; "
        "the results go to a folder of this name in runs/",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def changed_folder(work: Path, changes: Sequence[str]) -> Path:
    """The work folder of a study whose trainings have these settings; it has results of its own."""
    return work / ",".join(changes).replace("/", "_")


def _setup(study: Study, *, smoke: bool, changes: tuple[str, ...]) -> Setup:
    work = Path("runs") / study.name
    keep_programs(work / "programs")
    if smoke:
        compile_quickly()
        work /= "smoke"
    if changes:
        work = changed_folder(work, changes)
    return Setup(work / "results" if smoke or changes else RESULTS / study.name, work, changes)


def _make(parts: Mapping[str, Part], setup: Setup, settings: Settings) -> Mapping[str, float]:
    return parts[settings["part"]].make(settings, setup)


def _tell(run: Run) -> None:
    print(", ".join(f"{name} {value}" for name, value in run.settings.items()), flush=True)


def report(title: str, parts: Mapping[str, Part], runs: Runs, setup: Setup) -> str:
    """Writes the tables and the figures of what is finished; returns the tables."""
    setup.results.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, part in parts.items():
        finished = functools.partial(runs.select, part=name)
        sections += part.tables(finished)
        part.draw(finished, setup)
    text = "\n\n".join(sections) + "\n"
    (setup.results / "RESULTS.md").write_text(f"# {title}\n\n{text}")
    return text


def work_folder(setup: Setup, settings: Settings) -> Path:
    """The folder for the files of one run while it is made."""
    return setup.work / "_".join(f"{value}" for value in settings.values())
