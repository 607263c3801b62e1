"""Part `two_tower`: image and text towers on digit scenes with each structure, and a picture of the structures."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import recipe_runs
from experiments.comparison import difference_tables, mean
from experiments.modality_structure import picture
from experiments.modality_structure.structures import STRUCTURES, TITLES
from experiments.parts import Finished, Setup, work_folder
from experiments.study import Settings, markdown_table, metric_interval

RECIPE = Path(__file__).parents[1] / "two_tower.py"
REGULARIZERS: dict[str, tuple[str, ...]] = {
    "clip": (),
    "in_modal": ("in_modal_info_nce",),
    "cyclip": ("cyclic_consistency",),
    # The structures are added to the contrast between and within modalities, as in the paper.
    **{method: ("in_modal_info_nce", *names) for method, names in STRUCTURES.items()},
}
VARIATIONS = ("separation 0.1", "bridge 0.1", "separation 0.3", "bridge 0.3")
"""Structures that do not help with their default weight of 1, with smaller ones."""

BASELINES = ("clip", "in_modal")
SHARES: dict[str, dict[str, str]] = {
    "Zero-shot and probes (percent)": {
        "zero_shot/top_1": "zero-shot top 1",
        "zero_shot/top_5": "top 5",
        **{f"few_shot/{k}_shot/accuracy": f"{k} shots" for k in (1, 2, 4, 8, 16)},
        "linear_probe/accuracy": "linear probe",
    },
    "Retrieval (percent)": {
        f"retrieval/{direction}/R@{k}": f"{direction.replace('_', ' ')} R@{k}"
        for direction in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    },
}
GEOMETRY = {
    "geometry/modality_gap": "modality gap",
    "geometry/alignment": "alignment",
    "geometry/image/uniformity": "image uniformity",
    "geometry/text/uniformity": "text uniformity",
    "geometry/image/effective_rank": "image effective rank",
    "geometry/text/effective_rank": "text effective rank",
}
COMPARED = {
    "zero_shot/top_1": "zero-shot top 1",
    "zero_shot/top_5": "top 5",
    "few_shot/1_shot/accuracy": "1 shot",
    "few_shot/2_shot/accuracy": "2 shots",
    "few_shot/4_shot/accuracy": "4 shots",
    "few_shot/8_shot/accuracy": "8 shots",
    "few_shot/16_shot/accuracy": "16 shots",
    "linear_probe/accuracy": "linear probe",
    "retrieval/image_to_text/R@1": "image to text R@1",
    "retrieval/text_to_image/R@1": "text to image R@1",
}


@dataclass(frozen=True)
class TwoTowers:
    """Every method with every seed.

    Attributes:
        methods: names of `REGULARIZERS`.
        variations: names of `STRUCTURES`, each with another weight.
        seeds: of the training; the first one's features are kept for the picture.
        variation_seeds: of the variations; some of `seeds`, to be compared with.
        recipe_settings: of all runs.
    """

    methods: tuple[str, ...] = tuple(REGULARIZERS)
    variations: tuple[str, ...] = VARIATIONS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variation_seeds: tuple[int, ...] = (0, 1, 2)
    recipe_settings: tuple[str, ...] = (
        "train.batch_size=128",
        "train.steps=1024",
        "train.checkpoint_every=1024",
        "train.warmup_steps=64",
        "train.learning_rate=2e-3",
    )

    def all_settings(self) -> Iterator[dict[str, Any]]:
        """Seed by seed, so that a part of the runs is a study too; the variations last."""
        for methods, seeds in ((self.methods, self.seeds), (self.variations, self.variation_seeds)):
            for seed in seeds:
                for method in methods:
                    yield {"method": method, "seed": seed}

    def make(self, settings: Settings, setup: Setup) -> dict[str, float]:
        """The test metrics, as `<task>/<metric>`."""
        folder = work_folder(setup, settings)
        with recipe_runs.logged(folder):
            recipe_runs.train(RECIPE, folder, self.train_settings(settings, setup.changes))
            metrics = recipe_runs.named_metrics(recipe_runs.evaluate(folder))
        if settings["method"] in STRUCTURES and settings["seed"] == self.seeds[0]:
            picture.keep_features(folder, picture.features_file(setup, settings["method"]))
        shutil.rmtree(folder)
        return metrics

    def train_settings(self, settings: Settings, changes: Sequence[str] = ()) -> tuple[str, ...]:
        """The recipe's settings of a run, with those that the user changes."""
        method, *weight = settings["method"].split()
        own = (f"regularizers={','.join(REGULARIZERS[method])}", f"train.seed={settings['seed']}")
        own += tuple(f"regularizer_weight={each}" for each in weight)
        return recipe_runs.run_settings(own, ("loss=info_nce", *self.recipe_settings), changes)

    def tables(self, finished: Finished) -> Iterator[str]:
        """All metrics, and the differences from the contrast alone."""
        methods = (*self.methods, *self.variations)
        found = {method: runs for method in methods if (runs := finished(method=method))}
        if not found:
            return
        titles = {method: _title(method) for method in found}
        for title, names in SHARES.items():
            rows = [[titles[method], *(mean(runs, name) for name in names)] for method, runs in found.items()]
            yield f"## Two towers: {title}\n\n{markdown_table(['method', *names.values()], rows)}"
        rows = [
            [titles[method], *(str(metric_interval(runs, name)) for name in GEOMETRY)] for method, runs in found.items()
        ]
        yield f"## Two towers: geometry\n\n{markdown_table(['method', *GEOMETRY.values()], rows)}"
        yield from difference_tables(found, BASELINES, titles, COMPARED)

    def draw(self, finished: Finished, setup: Setup) -> None:
        """The structures in the plane, from the kept features."""
        picture.draw(setup)


def _title(method: str) -> str:
    structure, *weight = method.split()
    return ", weight ".join((TITLES[structure], *weight))
