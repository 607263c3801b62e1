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
    METRIC_TITLES,
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
from experiments.parts import add_study_options, changed_folder, exit_code
from experiments.study import Run, Runs, run_missing
from repkit.trained import load_run

RECIPE = Path(__file__).with_name("head_alignment.py")


def run_all(study: Study, *, minutes: float = float("inf"), task: str | None = None) -> bool:
    """Makes the runs that are missing, all or those of a task, as many as begin in time; whether all are there."""
    recipe_runs.keep_programs(study.work / "programs")
    if study.smoke:
        recipe_runs.compile_quickly()
    end = time.monotonic() + 60 * minutes
    runs = Runs(study.results / "runs.jsonl")
    make = functools.partial(train_student, study)
    for phase in phases(study):
        students = _of_task(phase, task)
        for settings in {(each["task"], each["pretrained"]): each for each in students if each not in runs}.values():
            if time.monotonic() > end:
                return False
            train_teacher(study, runs, settings["task"], pretrained=settings["pretrained"])
        left = (end - time.monotonic()) / 60
        if not run_missing(runs, students, make, workers=study.workers, minutes=left, tell=_tell):
            return False
    left = (end - time.monotonic()) / 60
    measure = functools.partial(measure_heads, study)
    # New workers take longer to start than the few measurements of a smoke run.
    workers = 1 if study.smoke else study.workers
    return run_missing(runs, _of_task(looked_at(study), task), measure, workers=workers, minutes=left)


def _of_task(settings: Iterable[dict[str, Any]], task: str | None) -> list[dict[str, Any]]:
    return [each for each in settings if task in (None, each["task"])]


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
        train(study, folder, [f"task={task}", *start], [*own, *steps])
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
    with recipe_runs.logged(folder):
        train(study, folder, own, [f"distillation.cache={teacher / 'said'}", "targets=commonest", *study.student])
        return evaluate(folder)


def measure_heads(study: Study, settings: Mapping[str, Any]) -> dict[str, float]:
    """How the heads of a student resemble its teacher's, and those one another; means over matched layers.

    Returns:
        For encoder and cross-attention: `kept`, for a head of the teacher that has a student head of its number the
        largest cosine with any head of the student, the mean over such heads; `dropped`, the same for the teacher's
        other heads, from which one-to-one distillation does not learn; `teacher`, the cosine of two different heads
        of the teacher.
    """
    run = load_run(student_folder(study, student_of(settings)))
    run.directory.figures.mkdir(exist_ok=True)
    run.experiment.figures(run.params, run.directory.figures)
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


def train(study: Study, folder: Path, own: Sequence[str], defaults: Sequence[str]) -> None:
    """Trains the recipe to the end; `own` and `defaults` as for `recipe_runs.run_settings`."""
    settings = recipe_runs.run_settings(own, (*study.common, *defaults), study.changes)
    recipe_runs.train(RECIPE, folder, settings, smoke=study.smoke)


def evaluate(folder: Path) -> dict[str, float]:
    """The metrics on the test scenes."""
    return recipe_runs.evaluate(folder)[-1].metrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing, writes the report, and returns 0; 2 after a message of what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_options(parser)
    parser.add_argument("--task", choices=METRIC_TITLES, help="make runs of this task only")
    options = parser.parse_args(arguments)
    return exit_code(functools.partial(_make_and_report, options))


def _make_and_report(options: argparse.Namespace) -> None:
    study = smoke(Study()) if options.smoke else Study()
    if options.set:
        work = changed_folder(study.work, options.set)
        study = dataclasses.replace(study, work=work, results=work / "results", changes=tuple(options.set))
    if options.workers:
        study = dataclasses.replace(study, workers=options.workers)
    is_complete = options.report or run_all(study, minutes=options.minutes, task=options.task)
    print(report(study))
    if not is_complete:
        print("Not complete; call again to go on.")


if __name__ == "__main__":
    sys.exit(main())
