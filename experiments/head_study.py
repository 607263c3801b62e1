"""What the comparison of heads consists of: its sizes, methods and students, and where they are kept."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "head_alignment"
METRIC_TITLES = {
    "questions": "questions: VQA accuracy",
    "captions": "captions: CIDEr-D x 100",
    "translation": "translation: BLEU-4",
}
PRETRAINING_TASK = "grounding"
"""What a teacher with multimodal pre-training has learned before its task."""

CLAIMED = ("amad_mse", "amad_kl", "amad_token_kl", "amad_kl alignment_temperature=0.1")
"""The paper's. Behind a method are settings of its distillation; the temperature of the alignment is 1 in the paper."""

BASELINES = ("none", "logits", "one_to_one_kl", "mean_head", "merged_head")
LOOKED_AT = ("none", "one_to_one_kl", "amad_kl", "amad_kl alignment_temperature=0.1")
"""Methods whose students' heads are compared with the teacher's."""

VARIATIONS = {
    "amad_kl": (
        "amad_kl alignment_temperature=0.03",
        "amad_kl attention_weight=3",
        "amad_kl alignment_temperature=0.1 attention_weight=3",
        "amad_kl alignment_temperature=0.1 layers=last",
    ),
    "one_to_one_kl": ("one_to_one_kl attention_weight=3",),
}

TITLES = {
    "none": "no distillation",
    "logits": "logits only",
    "one_to_one_kl": "one to one, KL",
    "mean_head": "mean over heads",
    "merged_head": "merged heads (SHD)",
    "amad_mse": "AMAD V1",
    "amad_kl": "AMAD V2",
    "amad_token_kl": "AMAD V4",
    "amad_kl alignment_temperature=0.1": "AMAD V2, temperature 0.1",
    "amad_kl alignment_temperature=0.03": "AMAD V2, temperature 0.03",
    "amad_kl attention_weight=3": "AMAD V2, weight 3",
    "amad_kl alignment_temperature=0.1 attention_weight=3": "AMAD V2, temperature 0.1, weight 3",
    "amad_kl alignment_temperature=0.1 layers=last": "AMAD V2, temperature 0.1, last layers",
    "one_to_one_kl attention_weight=3": "one to one, KL, weight 3",
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
        common: settings of all trainings, NAME=VALUE, which those of teachers and students override.
        changes: settings of all trainings that override every other.
        pretraining: settings of the model that the pre-trained teachers start from.
        teacher: settings of the teachers.
        teacher_steps: training steps of the teachers, by task; questions take longest.
        student: settings of the students.
        variations: what else the largest students of the first task try, by the method that it varies: whether another
            setting would turn the result.
        workers: how many students are trained at a time.
        smoke: whether the recipe's smallest setting is taken.
    """

    results: Path = RESULTS
    work: Path = Path("runs/head_alignment")
    tasks: tuple[str, ...] = ("questions", "captions", "translation")
    heads: tuple[int, ...] = (2, 4)
    methods: tuple[str, ...] = (*BASELINES, *CLAIMED)
    without_pretraining: tuple[str, ...] = ("logits", "amad_kl")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    common: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
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
    variations: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: VARIATIONS)
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
        # One validation, after the last of the smoke run's 6 steps.
        common=("model.encoder_depth=1", "examples=64", "train.checkpoint_every=6"),
        pretraining=(),
        teacher=(),
        teacher_steps={},
        student=(),
        variations={},
        workers=2,  # tiny runs are tracing and compilation, most of which has one thread
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


def variation_settings(study: Study) -> Iterator[dict[str, Any]]:
    """The largest students of the first task with other settings of their methods."""
    for seed in study.seeds:
        for variations in study.variations.values():
            for variation in variations:
                student = {"heads": study.heads[-1], "pretrained": True, "method": variation, "seed": seed}
                yield {"task": study.tasks[0], **student}


def phases(study: Study) -> Iterator[list[dict[str, Any]]]:
    """Students by phase: those of one are trained, after the teachers that they need, before the next begins."""
    yield list(student_settings(study, pretrained=True))
    yield list(variation_settings(study))
    # Task by task, because the teachers without pre-training take longest.
    for task in study.tasks:
        yield list(student_settings(dataclasses.replace(study, tasks=(task,)), pretrained=False))


def teacher_folder(study: Study, task: str, *, pretrained: bool) -> Path:
    """Where the teacher of a task is."""
    return study.work / f"teacher_{task}{'_pretrained' if pretrained else ''}"


def student_folder(study: Study, settings: Mapping[str, Any]) -> Path:
    """Where a student is."""
    return study.work / "_".join(f"{name}-{value}" for name, value in settings.items()).replace(" ", "_")


def looked_at(study: Study) -> Iterator[dict[str, Any]]:
    """The largest students whose heads are compared with their teachers'."""
    for settings in student_settings(study, pretrained=True):
        if settings["method"] in LOOKED_AT and settings["heads"] == study.heads[-1]:
            yield heads_of(settings)


def heads_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of what is measured of a student's heads."""
    return {name: settings[name] for name in ("task", "heads", "method", "seed")} | {"measured": "heads"}


def student_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The student whose heads were measured; its settings in the order of those of all students."""
    names = ("task", "heads", "pretrained", "method", "seed")
    return {name: {"pretrained": True, **settings}[name] for name in names}
