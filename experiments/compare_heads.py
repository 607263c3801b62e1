"""Study: how to distil a teacher of many heads into students of few, on three tasks of digit scenes.

    python -m experiments.compare_heads            the whole study: hours; what is finished is not made again
    python -m experiments.compare_heads --workers 2    the same, two students at a time
    python -m experiments.compare_heads --smoke    all of its parts, tiny: about a minute
    python -m experiments.compare_heads --report   the tables and figures of what is finished

Every run is a `repkit train experiments/head_alignment.py` and its evaluation on test scenes, whose strokes no training
saw. Runs of one seed share data order and initial values. The results go to experiments/results/head_alignment/:
every run as a JSON line, the tables, and the figures.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import recipe_runs
from experiments.head_alignment import HEADS_FILE, MAIN_METRIC
from experiments.head_study import (
    PRETRAINING_TASK,
    Study,
    looked_at,
    phases,
    smoke,
    student_folder,
    student_of,
    teacher_folder,
)
from experiments.head_tables import report
from experiments.study import Run, Runs, run_missing
from repkit.checks import InputError
from repkit.trained import load_run

RECIPE = Path(__file__).with_name("head_alignment.py")


def run_all(study: Study, minutes: float) -> bool:
    """Makes the runs that are missing, as many as begin within the minutes; whether all are there."""
    recipe_runs.keep_programs(study.work / "programs")
    if study.smoke:
        recipe_runs.compile_quickly()
    end = time.monotonic() + 60 * minutes
    runs = Runs(study.results / "runs.jsonl")
    make = functools.partial(train_student, study)
    for students in phases(study):
        for settings in {(each["task"], each["pretrained"]): each for each in students if each not in runs}.values():
            if time.monotonic() > end:
                return False
            train_teacher(study, runs, settings["task"], pretrained=settings["pretrained"])
        left = (end - time.monotonic()) / 60
        if not run_missing(runs, students, make, workers=study.workers, minutes=left, tell=_tell):
            return False
    left = (end - time.monotonic()) / 60
    measure = functools.partial(measure_heads, study)
    return run_missing(runs, list(looked_at(study)), measure, workers=study.workers, minutes=left)


def _tell(run: Run) -> None:
    metric = MAIN_METRIC[run.settings["task"]]
    print(", ".join(f"{name} {value}" for name, value in run.settings.items()), f"{metric} {run.metrics[metric]:.4f}")


def train_teacher(study: Study, runs: Runs, task: str, *, pretrained: bool) -> Path:
    """The run directory of the teacher of a task, trained if it is not there, with what it starts from."""
    folder = teacher_folder(study, task, pretrained=pretrained)
    start = [f"start={train_teacher(study, runs, PRETRAINING_TASK, pretrained=False)}"] if pretrained else []
    settings = {"task": task, "role": "teacher", "pretrained": pretrained}
    if settings not in runs or not (folder / "results.jsonl").exists():
        own = study.pretraining if task == PRETRAINING_TASK else study.teacher
        steps = [f"train.steps={study.teacher_steps[task]}"] if task in study.teacher_steps else []
        train(study, folder, [f"task={task}", *start, *own, *steps])
        runs.run(settings, lambda: evaluate(folder))
    return folder


def train_student(study: Study, settings: Mapping[str, Any]) -> dict[str, float]:
    """Trains and evaluates a student."""
    folder = student_folder(study, settings)
    teacher = teacher_folder(study, settings["task"], pretrained=settings["pretrained"])
    method, *distillation = settings["method"].split()
    own = [f"task={settings['task']}", "role=student", f"teacher={teacher}", f"method={method}"]
    own += [f"distillation.{setting}" for setting in distillation]
    own += [f"model.heads={settings['heads']}", f"train.seed={settings['seed']}"]
    own += [f"distillation.cache={teacher / 'said'}", "targets=commonest"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lines of several students at a time would be mixed up.
    with _log(folder).open("a") as log, contextlib.redirect_stdout(log):
        train(study, folder, [*own, *study.student])
        return evaluate(folder)


def _log(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"  # a name may hold a dot


def measure_heads(study: Study, settings: Mapping[str, Any]) -> dict[str, float]:
    """How the heads of a student resemble its teacher's, and those one another; means over matched layers.

    Returns:
        For encoder and cross-attention: `kept`, for a head of the teacher that has a student head of its number the
        largest cosine with any head of the student, the mean over such heads; `dropped`, the same for the teacher's
        other heads, from which one-to-one distillation does not learn; `teacher`, the cosine of two different heads
        of the teacher.
    """
    try:
        run = load_run(student_folder(study, student_of(settings)))
        run.directory.figures.mkdir(exist_ok=True)
        run.experiment.figures(run.params, run.directory.figures)
    except InputError as error:
        raise SystemExit(f"repkit: {error}") from error
    cosines = json.loads((run.directory.figures / HEADS_FILE).read_text())
    of: dict[str, list[float]] = {}
    for name, values in cosines["student"].items():
        best = np.max(values, axis=1)
        heads = np.shape(values)[1]
        of.setdefault(f"{_kind(name)}/kept", []).append(best[:heads].mean())
        of.setdefault(f"{_kind(name)}/dropped", []).append(best[heads:].mean())
    for name, values in cosines["teacher"].items():
        different = ~np.eye(len(values), dtype=bool)
        of.setdefault(f"{_kind(name)}/teacher", []).append(np.asarray(values)[different].mean())
    return {name: float(np.mean(values)) for name, values in of.items()}


def _kind(name: str) -> str:
    return name.partition(":")[0]


def train(study: Study, folder: Path, settings: Iterable[str]) -> None:
    """Trains the recipe with these settings, to the end."""
    recipe_runs.train(RECIPE, folder, (*study.common, *settings), smoke=study.smoke)


def evaluate(folder: Path) -> dict[str, float]:
    """The metrics on the test scenes."""
    return recipe_runs.evaluate(folder)[-1].metrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes the report, and returns 0 when the study is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="all parts, tiny")
    parser.add_argument("--report", action="store_true", help="only tables and figures of what is finished")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--workers", type=int, help="students that are trained at a time; 1 by default, 2 with --smoke")
    parser.add_argument("--task", choices=MAIN_METRIC, help="only this task")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all runs")
    options = parser.parse_args(arguments)
    study = smoke(Study()) if options.smoke else Study()
    if options.task:
        study = dataclasses.replace(study, tasks=(options.task,))
    study = dataclasses.replace(study, common=(*study.common, *options.set))
    if options.workers:
        study = dataclasses.replace(study, workers=options.workers)
    is_complete = options.report or run_all(study, options.minutes)
    print(report(study))
    if not is_complete:
        print("Not complete; call again to go on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
