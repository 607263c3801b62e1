"""Part `fusion`: a fusion model (ALBEF's shape) pre-trained with each structure, and the tasks learned from there."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import recipe_runs
from experiments.comparison import difference_tables, mean
from experiments.modality_structure.structures import STRUCTURES, TITLES
from experiments.parts import Finished, Setup, work_folder
from experiments.study import Settings, markdown_table

RECIPE = Path(__file__).parents[1] / "fusion.py"
REGULARIZERS: dict[str, tuple[str, ...]] = {"none": (), **STRUCTURES}
STAGES: dict[str, tuple[str, ...]] = {
    # At this rate the narrower model learns as much in a step as the recipe's model does at the recipe's rate.
    "pretrain": ("train.learning_rate=2e-3",),
    "questions": ("answers=classified",),
    # At the recipe's rate the loss of some models stays at chance.
    "statements": ("train.learning_rate=5e-4", "train.warmup_steps=100"),
    "entailment": (),
}
"""Settings of the recipe by stage."""

STARTS = {"statements": "questions"}
"""What a task starts from where that is not the pre-trained model: statements compare what questions ask for."""

METRICS = {
    "questions/vqa_accuracy": "questions: VQA accuracy",
    "statements/accuracy": "two-image statements",
    "entailment/accuracy": "entailment",
    "retrieval/image_to_text/R@1": "image to text R@1",
    "retrieval/text_to_image/R@1": "text to image R@1",
}


@dataclass(frozen=True)
class FusionTasks:
    """Every method with every seed; a run is a pre-training and all tasks from there.

    Attributes:
        methods: names of `REGULARIZERS`, in the pre-training.
        seeds: of all its trainings.
        steps: of the pre-training (`pretrain`) and of each task; a task comes after the one that it starts from.
        recipe_settings: of all trainings, where a stage has none of its own.
        smoke: whether the recipe's smallest setting is taken.
    """

    methods: tuple[str, ...] = tuple(REGULARIZERS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: dict[str, int] = field(
        default_factory=lambda: {
            "pretrain": 2000,
            "questions": 1200,
            "statements": 1200,
            "entailment": 800,
        }
    )
    recipe_settings: tuple[str, ...] = (
        "model.width=64",
        "model.heads=4",
        "model.image_depth=2",
        "reranked=0",
    )
    smoke: bool = False

    def all_settings(self) -> Iterator[dict[str, Any]]:
        """Seed by seed, so that a part of the runs is a study too."""
        for seed in self.seeds:
            for method in self.methods:
                yield {"method": method, "seed": seed}

    def make(self, settings: Settings, setup: Setup) -> dict[str, float]:
        """The test metrics of the pre-trained model and of each task, as `<task>/<metric>`."""
        folder = work_folder(setup, settings)
        with recipe_runs.logged(folder):
            metrics = dict(self._trained(folder, settings, setup))
        shutil.rmtree(folder)
        return metrics

    def _trained(self, folder: Path, settings: Settings, setup: Setup) -> Iterator[tuple[str, float]]:
        regularizers = f"regularizers={','.join(REGULARIZERS[settings['method']])}"
        for stage, steps in self.steps.items():
            start = f"start={folder / STARTS.get(stage, 'pretrain')}"
            own = (f"stage={stage}", regularizers if stage == "pretrain" else start, f"train.seed={settings['seed']}")
            schedule = (f"train.steps={steps}", f"train.checkpoint_every={steps}")
            defaults = (*self.recipe_settings, *STAGES[stage], *schedule)
            recipe_runs.train(
                RECIPE, folder / stage, recipe_runs.run_settings(own, defaults, setup.changes), smoke=self.smoke
            )
            yield from recipe_runs.named_metrics(recipe_runs.evaluate(folder / stage)).items()

    def tables(self, finished: Finished) -> Iterator[str]:
        """What comes of the tasks, and the differences from no structure."""
        found = {method: runs for method in self.methods if (runs := finished(method=method))}
        if not found:
            return
        shown = {name: title for name, title in METRICS.items() if all(name in run.metrics for run in finished())}
        rows = [[TITLES[method], *(mean(runs, name) for name in shown)] for method, runs in found.items()]
        yield f"## Fusion model (percent)\n\n{markdown_table(['structure', *shown.values()], rows)}"
        yield from difference_tables(found, ("none",), TITLES, shown)

    def draw(self, finished: Finished, setup: Setup) -> None:
        """Nothing; the tables say it."""
