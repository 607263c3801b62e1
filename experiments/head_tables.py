"""Tables and figures of the comparison of heads."""

import itertools
from collections.abc import Iterator, Sequence

from experiments.comparison import difference
from experiments.head_alignment import MAIN_METRIC
from experiments.head_study import (
    BASELINES,
    CLAIMED,
    LOOKED_AT,
    METRIC_TITLES,
    TITLES,
    Study,
    heads_of,
    student_folder,
    student_settings,
)
from experiments.study import Run, Runs, markdown_table, metric_interval
from repkit import plots


def report(study: Study) -> str:
    """Writes the tables and the figures of what is finished; returns the tables."""
    runs = Runs(study.results / "runs.jsonl")
    sections = [_teachers(study, runs)]
    for task in study.tasks:
        sections += [_accuracies(study, runs, task), _differences(study, runs, task)]
    sections += [_variations(study, runs), _amad_with_itself(study, runs), _heads(study, runs)]
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
        for claimed, baseline in itertools.product(CLAIMED, BASELINES):
            first, second = (_select(runs, task, method, *column) for method in (claimed, baseline))
            found = difference(first, second, MAIN_METRIC[task])
            if found is None:
                continue
            sign = "+" if found.mean > found.half_width else ""
            sign = "-" if found.mean < -found.half_width else sign
            rows.append([_column_title(*column), TITLES[claimed], TITLES[baseline], found.percent(), sign])
    if not rows:
        return ""
    header = ["student", "method", "minus", "difference (points) and 95 % interval", "sign, if beyond the interval"]
    return f"### Paired differences, {task}\n\n{markdown_table(header, rows)}"


def _variations(study: Study, runs: Runs) -> str:
    """Other settings of a method beside its own, and beside one-to-one distillation."""
    task, heads = study.tasks[0], study.heads[-1]
    metric = MAIN_METRIC[task]
    rows = []
    for method, variations in study.variations.items():
        for variation in variations:
            found = _select(runs, task, variation, heads, True)
            beside = [_select(runs, task, other, heads, True) for other in (method, "one_to_one_kl")]
            differences = [each.percent() for other in beside if (each := difference(found, other, metric))]
            if len(differences) == len(beside):
                rows.append([TITLES[variation], _cell(found, metric), *differences])
    if not rows:
        return ""
    header = ["method", METRIC_TITLES[task], "minus the method with its own settings", "minus one to one, KL"]
    return f"## Other settings, {task}, {heads} heads\n\n{markdown_table(header, rows)}"


def _amad_with_itself(study: Study, runs: Runs) -> str:
    """AMAD V2 at another temperature, and from a teacher without pre-training, minus itself."""
    rows = []
    for task in study.tasks:
        for heads in study.heads:
            itself = _select(runs, task, "amad_kl", heads, True)
            changed = {
                "temperature 0.1": _select(runs, task, "amad_kl alignment_temperature=0.1", heads, True),
                "teacher without pre-training": _select(runs, task, "amad_kl", heads, False),
            }
            for title, found in changed.items():
                if (points := difference(found, itself, MAIN_METRIC[task])) is not None:
                    rows.append([task, f"{heads}", title, points.percent()])
    if not rows:
        return ""
    return f"## AMAD V2 minus itself, in points\n\n{markdown_table(['task', 'heads', 'with', 'difference'], rows)}"


def _heads(study: Study, runs: Runs) -> str:
    """What the students' heads took from the teacher's."""
    rows = []
    for task in study.tasks:
        for method in LOOKED_AT:
            found = runs.select(task=task, method=method, measured="heads")
            if not found:
                continue
            for kind in ("encoder", "cross"):
                cells = [metric_interval(found, f"{kind}/{name}") for name in ("teacher", "kept", "dropped")]
                rows.append([task, kind, TITLES[method], *(cell.percent() for cell in cells)])
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
    return f"{metric_interval(runs, metric).percent()} ({len(runs)})"


def _panel(study: Study, runs: Runs, task: str) -> dict[str, list[tuple[str, float, float]]]:
    panel = {}
    for column in _columns(study, runs, task):
        rows = []
        for method in study.methods:
            found = _select(runs, task, method, *column)
            if found:
                mean, half_width, _ = metric_interval(found, MAIN_METRIC[task])
                rows.append((TITLES[method], 100 * mean, 100 * half_width))
        panel[_column_title(*column)] = rows
    return panel


def _draw_alignment(study: Study, runs: Runs) -> None:
    """Draws the heads of the first seed's students beside the teacher's, without and with alignment."""
    for method in LOOKED_AT:
        for settings in student_settings(study, pretrained=True):
            picture = student_folder(study, settings) / "figures" / "head_alignment.png"
            if settings["method"] == method and heads_of(settings) in runs and picture.exists():
                (study.results / f"heads_{method.replace(' ', '_')}.png").write_bytes(picture.read_bytes())
                break
