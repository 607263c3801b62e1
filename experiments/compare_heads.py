"""Study: how to distil a teacher of many heads into students of few, on three tasks of digit scenes.

    python -m experiments.compare_heads            the whole study: hours; what is finished is not made again
    python -m experiments.compare_heads --workers 2    the same, two students at a time
    python -m experiments.compare_heads --smoke    all of its parts, tiny: some minutes
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import recipe_runs
from experiments.head_alignment import HEADS_FILE, MAIN_METRIC
from experiments.study import Run, Runs, interval, markdown_table, paired_difference, run_missing
from repkit import plots
from repkit.cli import main as repkit_command

RECIPE = Path(__file__).with_name("head_alignment.py")
RESULTS = Path(__file__).parent / "results" / "head_alignment"
METRIC_TITLES = {
    "questions": "questions: VQA accuracy",
    "captions": "captions: CIDEr-D x 100",
    "translation": "translation: BLEU-4",
}
PRETRAINING_TASK = "grounding"
"""What a teacher with multimodal pre-training has learned before its task."""

OURS = ("amad_mse", "amad_kl", "amad_token_kl", "amad_kl@0.1")
"""A number behind @ is the temperature of the alignment, which is 1 in the paper."""

BASELINES = ("none", "logits", "one_to_one_kl", "mean_head", "merged_head")
LOOKED_AT = ("none", "one_to_one_kl", "amad_kl", "amad_kl@0.1")
"""Methods whose students' heads are compared with the teacher's."""

TITLES = {
    "none": "no distillation",
    "logits": "logits only",
    "one_to_one_kl": "one to one, KL",
    "mean_head": "mean over heads",
    "merged_head": "merged heads (SHD)",
    "amad_mse": "AMAD V1",
    "amad_kl": "AMAD V2",
    "amad_token_kl": "AMAD V4",
    "amad_kl@0.1": "AMAD V2, temperature 0.1",
}


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        results: folder of the results.
        work: folder of the runs, which may be deleted afterwards.
        tasks: tasks of `experiments/head_alignment.py`.
        heads: sizes of student, by number of heads; the largest last.
        methods: ways to learn from the teacher.
        without_pretraining: methods that the largest students also run with a teacher that had no pre-training.
        seeds: of the students.
        common: settings of all runs, NAME=VALUE.
        pretraining: settings of the model that the pre-trained teachers start from.
        teacher: settings of the teachers.
        teacher_steps: training steps of the teachers, by task; questions take longest.
        student: settings of the students.
        workers: how many students are trained at a time.
        smoke: whether the recipe's smallest setting is taken.
    """

    results: Path = RESULTS
    work: Path = Path("runs/head_alignment")
    tasks: tuple[str, ...] = ("questions", "captions", "translation")
    heads: tuple[int, ...] = (2, 4)
    methods: tuple[str, ...] = (*BASELINES, *OURS)
    without_pretraining: tuple[str, ...] = ("logits", "amad_kl")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    common: tuple[str, ...] = ()
    pretraining: tuple[str, ...] = ("train.steps=3000", "train.checkpoint_every=3000")
    teacher: tuple[str, ...] = ("targets=commonest", "train.checkpoint_every=1500")
    teacher_steps: Mapping[str, int] = field(
        default_factory=lambda: {"questions": 7000, "captions": 1500, "translation": 1500}
    )
    student: tuple[str, ...] = (
        "model.encoder_depth=2",
        "model.decoder_depth=1",
        "model.width=64",
        "examples=4096",
        "train.steps=400",
        "train.checkpoint_every=400",
        "train.learning_rate=2e-3",
    )
    workers: int = 1
    smoke: bool = False


def smoke(study: Study) -> Study:
    """All parts of the study, tiny."""
    return dataclasses.replace(
        study,
        results=study.work / "smoke" / "results",
        work=study.work / "smoke",
        tasks=("questions",),
        heads=(2,),
        methods=("one_to_one_kl", "amad_kl"),
        without_pretraining=(),
        seeds=(0, 1),
        common=("model.encoder_depth=1", "examples=64"),
        pretraining=(),
        teacher=(),
        teacher_steps={},
        student=(),
        smoke=True,
    )


def student_settings(study: Study, *, pretrained: bool) -> Iterator[dict[str, Any]]:
    """The students of teachers with or without pre-training, those of one seed after those of another, so that a part
    of the study is a study too."""
    for seed in study.seeds:
        for task in study.tasks:
            for heads in study.heads if pretrained else study.heads[-1:]:
                for method in study.methods if pretrained else study.without_pretraining:
                    yield {"task": task, "heads": heads, "pretrained": pretrained, "method": method, "seed": seed}


def run_all(study: Study, minutes: float) -> bool:
    """Makes the runs that are missing, as many as begin within the minutes; whether all are there."""
    recipe_runs.keep_programs(study.work / "programs")
    end = time.monotonic() + 60 * minutes
    runs = Runs(study.results / "runs.jsonl")
    make = functools.partial(train_student, study)
    # The students of plain teachers task by task, because their teachers take longest.
    for pretrained, tasks in [(True, study.tasks), *((False, (task,)) for task in study.tasks)]:
        students = list(student_settings(dataclasses.replace(study, tasks=tasks), pretrained=pretrained))
        for task in dict.fromkeys(each["task"] for each in students if each not in runs):
            if time.monotonic() > end:
                return False
            train_teacher(study, runs, task, pretrained=pretrained)
        left = (end - time.monotonic()) / 60
        if not run_missing(runs, students, make, workers=study.workers, minutes=left, tell=_tell):
            return False
    for settings in student_settings(study, pretrained=True):
        if settings["method"] in LOOKED_AT and settings["heads"] == study.heads[-1]:
            runs.run(_heads_of(settings), functools.partial(measure_heads, student_folder(study, settings)))
    return True


def _tell(run: Run) -> None:
    metric = MAIN_METRIC[run.settings["task"]]
    print(", ".join(f"{name} {value}" for name, value in run.settings.items()), f"{metric} {run.metrics[metric]:.4f}")


def train_teacher(study: Study, runs: Runs, task: str, *, pretrained: bool) -> Path:
    """The run directory of the teacher of a task, trained if it is not there; it needs the captions' for a start."""
    folder = teacher_folder(study, task, pretrained=pretrained)
    start = [f"start={train_teacher(study, runs, PRETRAINING_TASK, pretrained=False)}"] if pretrained else []
    settings = {"task": task, "role": "teacher", "pretrained": pretrained}
    if settings not in runs or not (folder / "results.jsonl").exists():
        own = study.pretraining if task == PRETRAINING_TASK else study.teacher
        steps = [f"train.steps={study.teacher_steps[task]}"] if task in study.teacher_steps else []
        train(study, folder, [f"task={task}", *start, *own, *steps])
        runs.run(settings, lambda: evaluate(folder))
    return folder


def teacher_folder(study: Study, task: str, *, pretrained: bool) -> Path:
    """Where the teacher of a task is."""
    return study.work / f"teacher_{task}{'_pretrained' if pretrained else ''}"


def train_student(study: Study, settings: Mapping[str, Any]) -> dict[str, float]:
    """Trains and evaluates a student."""
    folder = student_folder(study, settings)
    teacher = teacher_folder(study, settings["task"], pretrained=settings["pretrained"])
    method, _, temperature = settings["method"].partition("@")
    own = [f"task={settings['task']}", "role=student", f"teacher={teacher}", f"method={method}"]
    own += [f"distillation.alignment_temperature={temperature}"] if temperature else []
    own += [f"model.heads={settings['heads']}", f"train.seed={settings['seed']}"]
    own += [f"distillation.cache={teacher / 'said'}", "targets=commonest"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lines of several students at a time would be mixed up.
    with folder.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log):
        train(study, folder, [*own, *study.student])
        return evaluate(folder)


def student_folder(study: Study, settings: Mapping[str, Any]) -> Path:
    """Where a student is."""
    return study.work / "_".join(f"{name}-{value}" for name, value in settings.items())


def _heads_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of what is measured of a student's heads."""
    return {name: settings[name] for name in ("task", "heads", "method", "seed")} | {"measured": "heads"}


def measure_heads(folder: Path) -> dict[str, float]:
    """How the heads of a student resemble its teacher's, and those one another; means over matched layers.

    Returns:
        For encoder and cross-attention: `kept`, for a head of the teacher that has a student head of its number the
        largest cosine with any head of the student, the mean over such heads; `dropped`, the same for the teacher's
        other heads, from which one-to-one distillation does not learn; `teacher`, the cosine of two different heads
        of the teacher.
    """
    code = repkit_command(["plot", str(folder)])
    if code:
        raise SystemExit(code)
    cosines = json.loads((folder / "figures" / HEADS_FILE).read_text())
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


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures


def report(study: Study) -> str:
    """Writes the tables and the figures of what is finished; returns the tables."""
    runs = Runs(study.results / "runs.jsonl")
    sections = [_teachers(study, runs)]
    for task in study.tasks:
        sections += [_accuracies(study, runs, task), _differences(study, runs, task)]
    sections += [_heads(study, runs)]
    text = "\n\n".join(filter(None, sections)) + "\n"
    study.results.mkdir(parents=True, exist_ok=True)
    (study.results / "RESULTS.md").write_text(f"# Many heads into few\n\n{text}")
    panels = {METRIC_TITLES[task]: panel for task in study.tasks if (panel := _panel(study, runs, task))}
    if panels:
        plots.intervals(panels, study.results / "accuracy.png", label="mean and 95 % interval over seeds")
    _draw_alignment(study, runs)
    return text


def _teachers(study: Study, runs: Runs) -> str:
    rows = [
        [task, "yes" if run.settings["pretrained"] else "no", f"{run.metrics[MAIN_METRIC[task]]:.3f}"]
        for task in study.tasks
        for run in runs.select(role="teacher", task=task)
    ]
    return "## Teachers\n\n" + markdown_table(["task", "pre-trained", "test"], rows) if rows else ""


def _accuracies(study: Study, runs: Runs, task: str) -> str:
    """Each method's mean with its interval, by size of student."""
    columns = list(_columns(study, runs, task))
    if not columns:
        return ""
    rows = []
    for method in study.methods:
        cells = [_select(runs, task, method, *column) for column in columns]
        if any(cells):
            rows.append([TITLES[method], *(_cell(cell, MAIN_METRIC[task]) for cell in cells)])
    header = ["method", *(_column_title(*column) for column in columns)]
    return f"## {METRIC_TITLES[task]}\n\n{markdown_table(header, rows)}"


def _differences(study: Study, runs: Runs, task: str) -> str:
    """Each variant of AMAD against each baseline, seed by seed."""
    rows = []
    for column in _columns(study, runs, task):
        for ours in OURS:
            for baseline in BASELINES:
                first, second = (_select(runs, task, method, *column) for method in (ours, baseline))
                if len({run.settings["seed"] for run in first} & {run.settings["seed"] for run in second}) < 2:
                    continue
                difference = paired_difference(first, second, MAIN_METRIC[task])
                sign = "+" if difference.mean > difference.half_width else ""
                sign = "-" if difference.mean < -difference.half_width else sign
                rows.append([_column_title(*column), TITLES[ours], TITLES[baseline], difference.percent(), sign])
    if not rows:
        return ""
    header = ["student", "ours", "minus", "difference (points) and 95 % interval", "beyond it"]
    return f"### Paired differences, {task}\n\n{markdown_table(header, rows)}"


def _heads(study: Study, runs: Runs) -> str:
    """What the students' heads took from the teacher's."""
    rows = []
    for task in study.tasks:
        for method in LOOKED_AT:
            found = runs.select(task=task, method=method, measured="heads")
            if not found:
                continue
            for kind in ("encoder", "cross"):
                cells = [[run.metrics[f"{kind}/{name}"] for run in found] for name in ("teacher", "kept", "dropped")]
                rows.append([task, kind, TITLES[method], *(interval(cell).percent() for cell in cells)])
    if not rows:
        return ""
    header = ["task", "attention", "method", "two heads of the teacher", "kept heads", "dropped heads"]
    return f"""## Heads of teacher and student

Cosine x 100 of attention maps on test scenes, students of {study.heads[-1]} heads. Of two different heads of the
teacher; and the largest of a teacher's head with any head of the student: kept heads have a student head of their
number, from the others one-to-one distillation does not learn.

{markdown_table(header, rows)}"""


def _columns(study: Study, runs: Runs, task: str) -> Iterator[tuple[int, bool]]:
    for heads in study.heads:
        for pretrained in (True, False):
            if runs.select(task=task, heads=heads, pretrained=pretrained):
                yield heads, pretrained


def _column_title(heads: int, pretrained: bool) -> str:
    return f"{heads} heads, {'pre-trained' if pretrained else 'plain'} teacher"


def _select(runs: Runs, task: str, method: str, heads: int, pretrained: bool) -> list[Run]:
    # Without distillation it is all one which teacher there is, and no student of the plain one was trained for it.
    return runs.select(task=task, method=method, heads=heads, pretrained=pretrained or method == "none")


def _cell(runs: Sequence[Run], metric: str) -> str:
    if not runs:
        return ""
    return f"{interval([run.metrics[metric] for run in runs]).percent()} ({len(runs)})"


def _panel(study: Study, runs: Runs, task: str) -> dict[str, list[tuple[str, float, float]]]:
    panel = {}
    for column in _columns(study, runs, task):
        rows = []
        for method in study.methods:
            found = _select(runs, task, method, *column)
            if found:
                mean, half_width, _ = interval([run.metrics[MAIN_METRIC[task]] for run in found])
                rows.append((TITLES[method], mean, half_width))
        panel[_column_title(*column)] = rows
    return panel


def _draw_alignment(study: Study, runs: Runs) -> None:
    """Draws the heads of the first seed's students beside the teacher's, without and with alignment."""
    for method in LOOKED_AT:
        for settings in student_settings(study, pretrained=True):
            picture = student_folder(study, settings) / "figures" / "head_alignment.png"
            if settings["method"] == method and _heads_of(settings) in runs and picture.exists():
                (study.results / f"heads_{method.replace('@', '_at_')}.png").write_bytes(picture.read_bytes())
                break


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes the report, and returns 0 when the study is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="all parts, tiny")
    parser.add_argument("--report", action="store_true", help="only tables and figures of what is finished")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--workers", type=int, default=1, help="students that are trained at a time")
    parser.add_argument("--task", choices=MAIN_METRIC, help="only this task")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all runs")
    options = parser.parse_args(arguments)
    study = smoke(Study()) if options.smoke else Study()
    if options.task:
        study = dataclasses.replace(study, tasks=(options.task,))
    study = dataclasses.replace(study, common=(*study.common, *options.set), workers=options.workers)
    is_complete = options.report or run_all(study, options.minutes)
    print(report(study))
    if not is_complete:
        print("Not complete; call again to go on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
