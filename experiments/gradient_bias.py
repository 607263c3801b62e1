"""Study: does the gradient of a contrastive loss depend on the batch size, and what does it cost to prevent that?

    python -m experiments.gradient_bias            the whole study: hours; what is finished is not made again
    python -m experiments.gradient_bias --smoke    all of its parts, tiny: under a minute
    python -m experiments.gradient_bias --report   the tables and figures of what is finished

Three parts (`--part` takes one): `optimum`, a parameter whose best value is known; `gradient`, the mean gradient of an
encoder that stands still; `scenes`, two towers trained on digit scenes in batches of 16 to 512. The results go to
experiments/results/gradient_bias/: every run as a JSON line, the tables, and the figures.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from experiments import figures, mean_gradient, paired_seeds, scalar_problem, two_tower
from experiments.mean_gradient import Encoders, Estimator
from experiments.scalar_problem import Lane, Training
from experiments.study import Interval, Program, Runs, interval, markdown_table, paired_difference, run_programs
from repkit.config import override

RESULTS = Path(__file__).parent / "results" / "gradient_bias"
PARTS = ("optimum", "gradient", "scenes")

VARIANTS: dict[str, Training] = {
    "plain": Training(),
    "shape 16": Training(shape=16.0),
    "long memory": Training(memory_rate=0.001),
    "small steps": Training(rate=0.001, decay=50_000.0),
    "all three": Training(shape=16.0, memory_rate=0.001, rate=0.001, decay=50_000.0),
    "bounded scores": Training(largest_score=2.0),
}
"""Ways to train the parameter; all but the first are tried where the first fails."""


@dataclass(frozen=True)
class Optimum:
    """Part `optimum`: every method with every number of negatives, spread and initial value."""

    methods: tuple[scalar_problem.Method, ...] = get_args(scalar_problem.Method)
    sigmas: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5)
    negatives: tuple[int, ...] = (2, 4, 8, 16)
    starts: tuple[float, ...] = tuple(round(float(x), 3) for x in np.linspace(0, 3, 10))
    steps: int = 100_000
    variants: tuple[str, ...] = tuple(VARIANTS)[1:]
    variant_methods: tuple[scalar_problem.Method, ...] = ("gamma_sampled", "gamma_expected")
    shown: tuple[float, int] = (1.0, 4)
    """sigma and m whose trajectories are kept and drawn."""
    seed: int = 0


@dataclass(frozen=True)
class Gradient:
    """Part `gradient`: the estimators by number of negatives, over several encoders."""

    encoders: Encoders = dataclasses.field(default_factory=Encoders)
    estimators: tuple[Estimator, ...] = get_args(Estimator)
    negatives: tuple[int, ...] = (4, 16, 64)
    seeds: tuple[int, ...] = (0, 1, 2)


SCENE_METHODS: dict[str, tuple[str, ...]] = {
    "info_nce": ("loss=info_nce",),
    "scaled": ("loss=scaled_info_nce",),
    "decoupled": ("loss=decoupled_contrastive",),
    "global": ("loss=global_contrastive",),
    "gamma_sampled": ("loss=gamma_contrastive", "gamma.draw=sampled"),
    "gamma_expected": ("loss=gamma_contrastive", "gamma.draw=expected"),
}
"""Settings of the recipe by method."""


@dataclass(frozen=True)
class Scenes:
    """Part `scenes`: two towers, every method with every batch size, all with the same number of examples seen.

    Attributes:
        methods: names of `SCENE_METHODS`.
        batch_sizes: of the training.
        seeds: those of one method and batch size are trained in one program.
        examples: seen in a training; 12 epochs.
        rate_at_128: learning rate at batch size 128; at B it is larger by sqrt(B / 128), for all methods.
        settings: of all runs, NAME=VALUE of `experiments/two_tower.py`.
    """

    methods: tuple[str, ...] = tuple(SCENE_METHODS)
    batch_sizes: tuple[int, ...] = (512, 256, 128, 64, 32, 16)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    examples: int = 98_304
    rate_at_128: float = 2e-3
    settings: tuple[str, ...] = ("evaluations=retrieval,zero_shot",)


@dataclass(frozen=True)
class Study:
    """What is run, and where it goes.

    Attributes:
        results: folder of the results.
        work: folder of what may be deleted afterwards.
        optimum: the part of this name.
        gradient: the part of this name.
        scenes: the part of this name.
    """

    results: Path = RESULTS
    work: Path = Path("runs/gradient_bias")
    optimum: Optimum = Optimum()
    gradient: Gradient = dataclasses.field(default_factory=Gradient)
    scenes: Scenes = Scenes()


def smoke(study: Study) -> Study:
    """All parts, tiny."""
    return Study(
        results=study.work / "smoke" / "results",
        work=study.work / "smoke",
        optimum=Optimum(
            methods=("decoupled", "gamma_sampled"),
            sigmas=(0.5, 1.0),
            negatives=(4,),
            starts=(0.0, 3.0),
            steps=2_000,
            variants=(),
            variant_methods=("gamma_sampled",),
        ),
        gradient=Gradient(
            encoders=Encoders(pairs=64, features=16, dim=8, rows=2_000, warm_up=0.0),
            estimators=("info_nce", "gamma_expected_exact"),
            negatives=(4,),
            seeds=(0, 1),
        ),
        scenes=Scenes(
            methods=("info_nce", "gamma_sampled"),
            batch_sizes=(16,),
            seeds=(0, 1),
            examples=128,
            settings=(*study.scenes.settings, "model.width=16", "model.depth=1", "model.heads=2", "model.embed_dim=16"),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def run_all(study: Study, parts: Sequence[str], minutes: float) -> bool:
    """Makes the runs that are missing, as many as begin within the minutes; whether all are there."""
    return run_programs(Runs(study.results / "runs.jsonl"), programs(study, parts), minutes)


def programs(study: Study, parts: Sequence[str]) -> Iterator[Program]:
    """The programs of these parts."""
    if "optimum" in parts:
        yield from _optimum_programs(study.optimum)
    if "gradient" in parts:
        yield from _gradient_programs(study.gradient)
    if "scenes" in parts:
        yield from _scene_programs(study.scenes, study.work)


def _optimum_programs(part: Optimum) -> Iterator[Program]:
    for method in part.methods:
        yield _optimum_program(part, method, part.shown[1], "plain")
    for variant in part.variants:
        for method in part.variant_methods:
            yield _optimum_program(part, method, part.shown[1], variant)
    for negatives in part.negatives:
        for method in part.methods:
            yield _optimum_program(part, method, negatives, "plain")


def _optimum_program(part: Optimum, method: scalar_problem.Method, negatives: int, variant: str) -> Program:
    training = dataclasses.replace(VARIANTS[variant], negatives=negatives, steps=part.steps)
    lanes = [Lane(sigma, start) for sigma in part.sigmas for start in part.starts]
    named = {"part": "optimum", "method": method, "negatives": negatives, "variant": variant}

    def make() -> list[Mapping[str, float]]:
        courses = scalar_problem.train(method, training, lanes, seed=part.seed)
        return [
            _course(training, course) if (lane.sigma, negatives, variant) == (*part.shown, "plain") else _end(course)
            for lane, course in zip(lanes, courses, strict=True)
        ]

    return Program([named | lane._asdict() for lane in lanes], make)


def _end(course: np.ndarray) -> dict[str, float]:
    return {"theta": round(float(course[-1]), 4)}


def _course(training: Training, course: np.ndarray) -> dict[str, float]:
    """Where it ends and, by the number of steps, where it was; more often at the beginning."""
    records = np.unique(np.geomspace(1, len(course), 60).round().astype(int))
    recorded = {f"step_{record * training.record_every}": round(float(course[record - 1]), 4) for record in records}
    return _end(course) | recorded


def _gradient_programs(part: Gradient) -> Iterator[Program]:
    for seed in part.seeds:
        for negatives in part.negatives:
            for estimator in part.estimators:
                settings = {"part": "gradient", "estimator": estimator, "negatives": negatives, "seed": seed}

                def make(
                    estimator: Estimator = estimator, negatives: int = negatives, seed: int = seed
                ) -> list[Mapping[str, float]]:
                    return [mean_gradient.measure(estimator, part.encoders, negatives=negatives, seed=seed)._asdict()]

                yield Program([settings], make)


def _scene_programs(part: Scenes, work: Path) -> Iterator[Program]:
    for batch_size in part.batch_sizes:
        for method in part.methods:
            config = scene_config(part, method, batch_size)
            named = {"part": "scenes", "method": method, "batch_size": batch_size}

            def make(config=config) -> list[dict[str, float]]:
                return paired_seeds.train_and_evaluate(config, part.seeds, work / "scenes")

            yield Program([named | {"seed": seed} for seed in part.seeds], make)


def scene_config(part: Scenes, method: str, batch_size: int) -> two_tower.Config:
    """The recipe's configuration of a run."""
    steps = part.examples // batch_size
    train = (
        f"train.batch_size={batch_size}",
        f"train.steps={steps}",
        f"train.warmup_steps={steps // 12}",
        f"train.learning_rate={part.rate_at_128 * math.sqrt(batch_size / 128)}",
    )
    return override(two_tower.Config(), (*SCENE_METHODS[method], *train, *part.settings))


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures

TITLES = {
    "info_nce": "InfoNCE",
    "scaled": "InfoNCE, counts scaled M/m",
    "decoupled": "InfoNCE without the positive (DCL)",
    "global": "global (SogCLR)",
    "gamma_sampled": "gamma, sampled",
    "gamma_expected": "gamma, expected",
    "gamma_sampled_exact": "gamma, sampled, exact S",
    "gamma_expected_exact": "gamma, expected, exact S",
}
OURS = ("gamma_sampled", "gamma_expected")
SCENE_METRICS = {
    "retrieval/image_to_text/R@1": "image to text R@1",
    "retrieval/text_to_image/R@1": "text to image R@1",
    "zero_shot/top_1": "zero-shot digit",
}
BASELINE = "info_nce"


def report(study: Study) -> str:
    """Writes the tables and the figures of what is finished; returns the tables."""
    runs = Runs(study.results / "runs.jsonl")
    sections = [*_optimum_tables(study, runs), *_gradient_tables(study, runs), *_scene_tables(study, runs)]
    text = "\n\n".join(sections) + "\n"
    study.results.mkdir(parents=True, exist_ok=True)
    (study.results / "RESULTS.md").write_text(f"# Gradient bias\n\n{text}")
    _draw_courses(study, runs)
    _draw_sweep(study, runs)
    _draw_gradient(study, runs)
    _draw_scenes(study, runs)
    return text


def _ends(runs: Runs, **settings: Any) -> list[float]:
    return [run.metrics["theta"] for run in runs.select(part="optimum", **settings)]


def _cell_of_ends(ends: Sequence[float]) -> str:
    """The median, the range and how many end near 1."""
    if not ends:
        return ""
    near = sum(abs(end - 1) <= 0.15 for end in ends)
    return f"{np.median(ends):.2f} ({min(ends):.2f} to {max(ends):.2f}), {near} of {len(ends)}"


def _optimum_tables(study: Study, runs: Runs) -> Iterator[str]:
    part = study.optimum
    header = ["method", *(f"sigma {sigma:g}" for sigma in part.sigmas)]
    explanation = (
        "Median (range) over the initial values of where the parameter ends, and how many end within 0.15 of 1."
    )
    for negatives in part.negatives:
        rows = [
            [TITLES[method], *(_cell_of_ends(_ends(runs, **key, sigma=sigma)) for sigma in part.sigmas)]
            for method in part.methods
            if _ends(runs, **(key := {"method": method, "negatives": negatives, "variant": "plain"}))
        ]
        if rows:
            yield f"## The optimum at 1, {negatives} negatives\n\n{explanation}\n\n{markdown_table(header, rows)}"
    rows = [
        [TITLES[method], variant, *(_cell_of_ends(_ends(runs, **key, sigma=sigma)) for sigma in part.sigmas)]
        for method in part.variant_methods
        for variant in ("plain", *part.variants)
        if _ends(runs, **(key := {"method": method, "negatives": part.shown[1], "variant": variant}))
    ]
    if rows:
        header = ["method", "variant", *header[1:]]
        yield f"## What tames it, {part.shown[1]} negatives\n\n{explanation}\n\n{markdown_table(header, rows)}"


def _gradient_tables(study: Study, runs: Runs) -> Iterator[str]:
    part = study.gradient
    for metric, title in (
        ("error", "Error of the mean gradient"),
        ("noise", "Error expected from the noise alone"),
        ("deviation", "Deviation of a single batch's gradient"),
    ):
        rows = []
        for estimator in part.estimators:
            cells = [
                _metric_of(runs, metric, part="gradient", estimator=estimator, negatives=m) for m in part.negatives
            ]
            if any(cells):
                rows.append([TITLES[estimator], *(str(interval(cell)) if cell else "" for cell in cells)])
        if rows:
            table = markdown_table(["estimator", *(f"{m} negatives" for m in part.negatives)], rows)
            yield f"## {title}\n\nRelative to the norm of the gradient of all pairs.\n\n{table}"


def _metric_of(runs: Runs, metric: str, **settings: Any) -> list[float]:
    return [run.metrics[metric] for run in runs.select(**settings)]


def _scene_tables(study: Study, runs: Runs) -> Iterator[str]:
    part = study.scenes
    sizes = sorted(part.batch_sizes)
    header = ["method", *(f"batch {size}" for size in sizes)]
    for metric, title in SCENE_METRICS.items():
        rows, differences = [], []
        for method in part.methods:
            found = [runs.select(part="scenes", method=method, batch_size=size) for size in sizes]
            if not any(found):
                continue
            cells = [interval([run.metrics[metric] for run in each]).percent() if each else "" for each in found]
            rows.append([TITLES[method], *cells])
            if method != BASELINE:
                differences.append([TITLES[method], *(_difference(runs, method, size, size, metric) for size in sizes)])
        if rows:
            yield f"## Digit scenes: {title}\n\n{markdown_table(header, rows)}"
            yield f"Minus InfoNCE, seed by seed, in points:\n\n{markdown_table(header, differences)}"
            yield from _half_batches(part, runs, metric)


def _difference(runs: Runs, method: str, size: int, baseline_size: int, metric: str) -> str:
    difference = scene_difference(runs, method, size, baseline_size, metric)
    return "" if difference is None else difference.percent()


def scene_difference(runs: Runs, method: str, size: int, baseline_size: int, metric: str) -> Interval | None:
    """The method at one batch size minus InfoNCE at another, by seed; None before both have two seeds."""
    ours = runs.select(part="scenes", method=method, batch_size=size)
    baseline = runs.select(part="scenes", method=BASELINE, batch_size=baseline_size)
    if len({run.settings["seed"] for run in ours} & {run.settings["seed"] for run in baseline}) < 2:
        return None
    return paired_difference(ours, baseline, metric)


def _half_batches(part: Scenes, runs: Runs, metric: str) -> Iterator[str]:
    """Ours at half of InfoNCE's batch, and the smallest batch that is not below InfoNCE's result at the largest."""
    sizes = sorted(part.batch_sizes)
    pairs = [(size, 2 * size) for size in sizes if 2 * size in sizes]
    rows = [[TITLES[method], *(_difference(runs, method, *pair, metric) for pair in pairs)] for method in OURS]
    if any(cell for row in rows for cell in row[1:]):
        header = ["method", *(f"{size} minus InfoNCE at {twice}" for size, twice in pairs)]
        yield f"At half the batch, minus InfoNCE, in points:\n\n{markdown_table(header, rows)}"
    for method in OURS:
        differences = {size: scene_difference(runs, method, size, sizes[-1], metric) for size in sizes}
        reaching = [size for size, each in differences.items() if each and each.mean + each.half_width >= 0]
        if all(differences.values()):
            smallest = f"{min(reaching)}" if reaching else "none of these"
            yield (
                f"Smallest batch at which {TITLES[method]} is not below InfoNCE at {sizes[-1]} "
                f"(upper end of the paired interval at or above 0): {smallest}."
            )


def _draw_courses(study: Study, runs: Runs) -> None:
    sigma, negatives = study.optimum.shown
    colours = {"decoupled": figures.BLUE, "info_nce": figures.PALE_BLUE, "gamma_sampled": figures.VERMILION}
    found = {
        method: runs.select(part="optimum", method=method, sigma=sigma, negatives=negatives, variant="plain")
        for method in colours
        if method in study.optimum.methods
    }
    if not all(found.values()):
        return
    figure, (axes,) = figures.panels(1, width=5.4, height=3.8)
    for method, courses in found.items():
        for index, run in enumerate(courses):
            steps = sorted(int(key.removeprefix("step_")) for key in run.metrics if key.startswith("step_"))
            values = [run.settings["start"], *(run.metrics[f"step_{step}"] for step in steps)]
            label = TITLES[method] if index == 0 else None
            axes.plot([1, *steps], values, color=colours[method], linewidth=0.9, alpha=0.8, label=label)
    axes.axhline(1.0, color=figures.INK, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.legend(fontsize=7, frameon=False)
    figures.finish(axes, title=f"sigma = {sigma:g}, {negatives} negatives a step", x="step", y="parameter")
    figures.save(figure, study.results / "optimum.png")


def _draw_sweep(study: Study, runs: Runs) -> None:
    part = study.optimum
    counts = [m for m in sorted(part.negatives) if _ends(runs, negatives=m, variant="plain")]
    if not counts:
        return
    figure, row = figures.panels(len(counts), width=3.1)
    for axes, negatives in zip(row, counts, strict=True):
        for index, method in enumerate(part.methods):
            places, middle, low, high = [], [], [], []
            for sigma in part.sigmas:
                ends = _ends(runs, method=method, negatives=negatives, variant="plain", sigma=sigma)
                if ends:
                    places.append(sigma + 0.03 * (index - 2))
                    middle.append(np.median(ends))
                    low.append(np.median(ends) - min(ends))
                    high.append(max(ends) - np.median(ends))
            axes.errorbar(
                places,
                middle,
                yerr=(low, high),
                label=TITLES[method],
                color=figures.COLOURS[index],
                marker=figures.MARKERS[index],
                markersize=3.5,
                linewidth=1,
                capsize=2,
            )
        axes.axhline(1.0, color=figures.INK, linewidth=0.8, linestyle="--")
        axes.set_yscale("symlog", linthresh=2)
        axes.set_ylim(0, 300)
        figures.finish(axes, title=f"{negatives} negatives", x="sigma", y="where it ends: median, range")
    row[0].legend(fontsize=6, frameon=False, loc="upper left")
    figures.save(figure, study.results / "optimum_sweep.png")


def _draw_gradient(study: Study, runs: Runs) -> None:
    part = study.gradient
    panels = {"error": "error of the mean gradient", "deviation": "deviation of a single gradient"}
    series = {metric: {} for metric in panels}
    for estimator in part.estimators:
        sizes = [m for m in part.negatives if runs.select(part="gradient", estimator=estimator, negatives=m)]
        for metric in panels:
            values = [_metric_of(runs, metric, part="gradient", estimator=estimator, negatives=m) for m in sizes]
            if sizes:
                series[metric][TITLES[estimator]] = figures.Line(sizes, [interval(each) for each in values])
    if not series["error"]:
        return
    figure, row = figures.panels(len(panels))
    for axes, (metric, title) in zip(row, panels.items(), strict=True):
        figures.lines(axes, series[metric])
        figures.ticks(axes, part.negatives)
        axes.set_yscale("log")
        figures.finish(axes, title=title, x="negatives in a batch", y="relative to the full gradient")
    row[0].legend(fontsize=6, frameon=False)
    figures.save(figure, study.results / "gradient.png")


def _draw_scenes(study: Study, runs: Runs) -> None:
    sizes = sorted(study.scenes.batch_sizes)
    series = {metric: {} for metric in SCENE_METRICS}
    for method in study.scenes.methods:
        here = [size for size in sizes if runs.select(part="scenes", method=method, batch_size=size)]
        for metric in SCENE_METRICS:
            values = [_metric_of(runs, metric, part="scenes", method=method, batch_size=size) for size in here]
            if here:
                series[metric][TITLES[method]] = figures.Line(here, [interval(each) for each in values])
    if not any(series.values()):
        return
    figure, row = figures.panels(len(SCENE_METRICS))
    for axes, (metric, title) in zip(row, SCENE_METRICS.items(), strict=True):
        figures.lines(axes, series[metric])
        figures.ticks(axes, sizes)
        figures.finish(axes, title=title, x="batch size", y="share right")
    row[0].legend(fontsize=6, frameon=False)
    figures.save(figure, study.results / "scenes.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes the report, and returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="all parts, tiny")
    parser.add_argument("--report", action="store_true", help="only tables and figures of what is finished")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all trainings on scenes"
    )
    options = parser.parse_args(arguments)
    study = smoke(Study()) if options.smoke else Study()
    scenes = dataclasses.replace(study.scenes, settings=(*study.scenes.settings, *options.set))
    study = dataclasses.replace(study, scenes=scenes)
    is_complete = options.report or run_all(study, options.part or PARTS, options.minutes)
    print(report(study))
    if not is_complete:
        print("Not complete; call again to go on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
