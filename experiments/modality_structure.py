"""Study: does structure beside the contrast of two modalities help, and what does exact alignment cost?

    python -m experiments.modality_structure            the whole study: hours; what is finished is not made again
    python -m experiments.modality_structure --smoke    all of its parts, tiny: under a minute
    python -m experiments.modality_structure --report   the tables and figures of what is finished

Parts (`--part` takes one): `price`, features that must be equal, in a world whose information is known; `two_tower`,
image and text towers on digit scenes with each structure. The results go to experiments/results/modality_structure/:
every run as a JSON line, the tables, and the figures.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import alignment_price, figures, paired_seeds, two_tower
from experiments.alignment_price import World, informations, joint_distribution
from experiments.study import Program, Run, Runs, interval, markdown_table, paired_difference, run_programs
from repkit.config import override
from repkit.recipe import Experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results" / "modality_structure"
EXACT = "exact"

STRUCTURES: dict[str, tuple[str, ...]] = {
    "clip": (),
    "in_modal": ("in_modal_info_nce",),
    "cyclip": ("cyclic_consistency",),
    "separation": ("in_modal_info_nce", "feature_separation"),
    "bridge": ("in_modal_info_nce", "brownian_bridge"),
    "geometric": ("in_modal_info_nce", "geometric_consistency"),
}
"""Regularisers of the recipe by method. The structures are added to the contrast between and within modalities."""

TITLES = {
    "clip": "CLIP",
    "in_modal": "CLIP + within modalities",
    "cyclip": "CyCLIP",
    "separation": "+ separation",
    "bridge": "+ bridge",
    "geometric": "+ geometric consistency",
}
PICTURED = 64
"""Test scenes whose features are kept for the picture."""


@dataclass(frozen=True)
class Price:
    """Part `price`: worlds, penalties on the distance of the features, and seeds.

    Attributes:
        second_bits: kinds of world.
        noises: of the image's second bit beside a text of `text_noise`; of the text's where the text alone shows it.
        text_noise: see `noises`.
        penalties: factors of the mean squared distance.
        seeds: of initial values.
        training: of every run.
    """

    second_bits: tuple[alignment_price.SecondBit, ...] = ("shared", "own", "text")
    noises: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    text_noise: float = 0.05
    penalties: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    training: alignment_price.Training = dataclasses.field(default_factory=alignment_price.Training)


@dataclass(frozen=True)
class TwoTower:
    """Part `two_tower`: every structure with every seed.

    Attributes:
        methods: names of `STRUCTURES`.
        seeds: those of one method are trained in one program.
        settings: of all runs, NAME=VALUE of `experiments/two_tower.py`.
    """

    methods: tuple[str, ...] = tuple(STRUCTURES)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    settings: tuple[str, ...] = (
        "loss=info_nce",
        "train.batch_size=128",
        "train.steps=768",
        "train.warmup_steps=64",
        "train.learning_rate=2e-3",
    )


@dataclass(frozen=True)
class Study:
    """What is run, and where it goes.

    Attributes:
        results: folder of the results.
        work: folder of what may be deleted afterwards.
        price: the part of this name.
        two_tower: the part of this name.
    """

    results: Path = RESULTS
    work: Path = Path("runs/modality_structure")
    price: Price = dataclasses.field(default_factory=Price)
    two_tower: TwoTower = TwoTower()


def smoke(study: Study) -> Study:
    """All parts, tiny."""
    tiny = (
        "model.width=16",
        "model.depth=1",
        "model.heads=2",
        "model.embed_dim=16",
        "evaluations=retrieval,zero_shot,geometry",
    )
    return Study(
        results=study.work / "smoke" / "results",
        work=study.work / "smoke",
        price=dataclasses.replace(
            study.price,
            noises=(0.1, 0.3),
            penalties=(0.0, 1000.0),
            seeds=(0, 1),
            training=alignment_price.Training(steps=300),
        ),
        two_tower=TwoTower(
            methods=("clip", "bridge", "separation"),
            seeds=(0, 1),
            settings=(*study.two_tower.settings, "train.batch_size=16", "train.steps=4", *tiny),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def price_programs(study: Study) -> Iterator[Program]:
    """The features with each penalty, and those that are equal, one program for each kind of world."""
    part = study.price
    for second_bit in part.second_bits:
        worlds = [_world(part, second_bit, noise) for noise in part.noises]
        joints = [joint_distribution(world) for world in worlds]
        known = [_known(joint) for joint in joints]
        places = [(world, penalty, seed) for world in worlds for penalty in part.penalties for seed in part.seeds]
        yield Program(
            [_price_settings(*place) for place in places],
            lambda joints=joints, known=known: _flat(
                alignment_price.train(joints, part.penalties, part.seeds, part.training), known
            ),
        )
        yield Program(
            [_price_settings(world, EXACT, seed) for world in worlds for seed in part.seeds],
            lambda joints=joints, known=known: _flat(
                alignment_price.train_aligned(joints, part.seeds, part.training), known
            ),
        )


def _world(part: Price, second_bit: alignment_price.SecondBit, noise: float) -> World:
    return World("text", noise, 0.5) if second_bit == "text" else World(second_bit, part.text_noise, noise)


def _price_settings(world: World, penalty: float | str, seed: int) -> dict[str, Any]:
    return {"part": "price", **dataclasses.asdict(world), "penalty": penalty, "seed": seed}


def _known(joint: alignment_price.Joint) -> dict[str, float]:
    information = informations(joint)
    return {"delta": information.delta, "smallest_aligned_excess": information.both - information.aligned}


def _flat(outcome: alignment_price.Outcome, known: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The metrics in the order of the settings: by world, then by what else there is."""
    excess, misalignment = (np.asarray(values).reshape(len(known), -1) for values in outcome)
    return [
        {"excess": float(excess[world, other]), "misalignment": float(misalignment[world, other]), **known[world]}
        for world, other in np.ndindex(excess.shape)
    ]


def two_tower_programs(study: Study) -> Iterator[Program]:
    """Each structure, all seeds in one program."""
    part = study.two_tower
    for method in part.methods:
        config = override(two_tower.Config(), (f"regularizers={','.join(STRUCTURES[method])}", *part.settings))

        def make(config=config, method=method) -> list[dict[str, float]]:
            experiment, params = paired_seeds.train(config, part.seeds, study.work / "two_tower")
            keep_features(experiment, params[0], _features_file(study, method))
            return [paired_seeds.evaluate(experiment, each) for each in params]

        named = {"part": "two_tower", "method": method}
        yield Program([named | {"seed": seed} for seed in part.seeds], make)


def keep_features(experiment: Experiment, params: Any, path: Path) -> None:
    """Writes the features of some training scenes and of their augmented views, for the picture."""
    with experiment.batches() as batches:
        outputs = experiment.forward(params, next(batches), None)
    views = {
        f"{view}.{name}": np.asarray(values[:PICTURED], np.float16)
        for view, features in outputs.items()
        if isinstance(features, dict)
        for name, values in features.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **views)


def _features_file(study: Study, method: str) -> Path:
    return study.results / f"features_{method}.npz"


PARTS: dict[str, Callable[[Study], Iterator[Program]]] = {"price": price_programs, "two_tower": two_tower_programs}
"""What makes the runs of each part."""


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures

METRICS: dict[str, dict[str, str]] = {
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
    "Geometry": {
        "geometry/modality_gap": "modality gap",
        "geometry/alignment": "alignment",
        "geometry/image/uniformity": "image uniformity",
        "geometry/text/uniformity": "text uniformity",
        "geometry/image/effective_rank": "image effective rank",
        "geometry/text/effective_rank": "text effective rank",
    },
}
COMPARED = ("zero_shot/top_1", "linear_probe/accuracy", "retrieval/image_to_text/R@1", "retrieval/text_to_image/R@1")
BASELINES = ("clip", "in_modal")


def report(study: Study) -> str:
    """Writes the tables and the figures of what is finished; returns the tables."""
    runs = Runs(study.results / "runs.jsonl")
    text = "\n\n".join([*_price_tables(study, runs), *_two_tower_tables(study, runs)]) + "\n"
    study.results.mkdir(parents=True, exist_ok=True)
    (study.results / "RESULTS.md").write_text(f"# Modality structure\n\n{text}")
    _draw_price(study, runs)
    _draw_structures(study)
    return text


def _price_runs(
    part: Price, runs: Runs, second_bit: alignment_price.SecondBit, noise: float, penalty: float | str
) -> list[Run]:
    world = dataclasses.asdict(_world(part, second_bit, noise))
    return runs.select(part="price", penalty=penalty, **world)


def _price_tables(study: Study, runs: Runs) -> Iterator[str]:
    part = study.price
    for second_bit in part.second_bits:
        rows = []
        for noise in part.noises:
            exact = _price_runs(part, runs, second_bit, noise, EXACT)
            if not exact:
                continue
            penalized = [_price_runs(part, runs, second_bit, noise, penalty) for penalty in part.penalties]
            known = [f"{exact[0].metrics[name]:.3f}" for name in ("delta", "smallest_aligned_excess")]
            cells = [f"{max(_excess(each).mean, 0.0):.3f}" if each else "" for each in (*penalized, exact)]
            rows.append([f"{noise:g}", *known, *cells])
        if rows:
            penalties = [f"penalty {penalty:g}" for penalty in part.penalties]
            header = ["noise", "Delta", "least when aligned", *penalties, "exactly aligned"]
            yield f"## Excess cross-entropy in nats, second bit {second_bit}\n\n{markdown_table(header, rows)}"


def _excess(runs: Sequence[Run]):
    return interval([run.metrics["excess"] for run in runs])


def _two_tower_tables(study: Study, runs: Runs) -> Iterator[str]:
    found = {method: runs.select(part="two_tower", method=method) for method in study.two_tower.methods}
    found = {method: each for method, each in found.items() if each}
    for title, names in METRICS.items():
        here = [name for name in names if all(name in run.metrics for each in found.values() for run in each)]
        if found and here:
            rows = [[TITLES[method], *(_cell(each, name) for name in here)] for method, each in found.items()]
            yield f"## {title}\n\n{markdown_table(['method', *(names[name] for name in here)], rows)}"
    for baseline in BASELINES:
        rows = [
            [TITLES[method], *(paired_difference(each, found[baseline], name).percent() for name in COMPARED)]
            for method, each in found.items()
            if method != baseline
            and len(each) > 1
            and len(found.get(baseline, ())) > 1
            and all(name in run.metrics for run in (*each, *found[baseline]) for name in COMPARED)
        ]
        if rows:
            titles = {name: title for names in METRICS.values() for name, title in names.items()}
            table = markdown_table(["method", *(titles[name] for name in COMPARED)], rows)
            yield f"## Minus {TITLES[baseline]}, seed by seed, in points\n\n{table}"


def _cell(runs: Sequence[Run], name: str) -> str:
    values = interval([run.metrics[name] for run in runs])
    return str(values) if name.startswith("geometry/") else values.percent()


def _draw_price(study: Study, runs: Runs) -> None:
    part = study.price
    shown = part.second_bits[0]
    series, bounds = {}, []
    for noise in part.noises:
        exact = _price_runs(part, runs, shown, noise, EXACT)
        if not exact:
            return
        excesses = [_excess(_price_runs(part, runs, shown, noise, penalty)) for penalty in part.penalties]
        delta = exact[0].metrics["delta"]
        series[f"Delta = {delta:.2f}"] = figures.Line(range(len(excesses) + 1), [*excesses, _excess(exact)])
        bounds.append(delta)
    figure, (left, right) = figures.panels(2, width=4.8, height=3.8)
    figures.lines(left, series)
    for index, delta in enumerate(bounds):
        left.axhline(delta, color=figures.COLOURS[index], linewidth=0.7, linestyle=":")
    left.set_xticks(range(len(part.penalties) + 1), [*(f"{penalty:g}" for penalty in part.penalties), EXACT])
    left.legend(fontsize=6.5, frameon=False, loc="upper left", ncols=2)
    title = "both show the same second bit; dotted: the bound"
    left.set_ylim(-0.03, 1.25 * max(each.mean for line in series.values() for each in line.y))
    figures.finish(left, title=title, x="penalty on the distance of the features", y="excess cross-entropy (nats)")
    _draw_bound(right, part, runs)
    figures.save(figure, study.results / "price.png")


def _draw_bound(axes: "Axes", part: Price, runs: Runs) -> None:
    """Excess against Delta: exactly aligned, and trained without any penalty."""
    largest = 0.0
    for index, second_bit in enumerate(part.second_bits):
        for penalty, is_filled in ((EXACT, True), (part.penalties[0], False)):
            found = [run for noise in part.noises for run in _price_runs(part, runs, second_bit, noise, penalty)]
            deltas, excesses = ([run.metrics[name] for run in found] for name in ("delta", "excess"))
            largest = max([largest, *deltas])
            colour, kind = (
                (figures.VERMILION, figures.BLUE, figures.GREEN)[index],
                "exactly aligned" if is_filled else "no penalty",
            )
            axes.scatter(
                deltas,
                excesses,
                s=22,
                edgecolors=colour,
                facecolors=colour if is_filled else "none",
                marker=figures.MARKERS[index],
                label=f"second bit {second_bit}, {kind}",
            )
    ends = (0.0, 1.1 * largest)
    axes.plot(ends, ends, color=figures.INK, linewidth=0.9, linestyle="--", label="bound: excess = Delta")
    axes.fill_between(ends, ends, color=figures.GREY, alpha=0.12, linewidth=0)
    axes.legend(fontsize=6.5, frameon=False)
    title = "shaded: ruled out for aligned features"
    figures.finish(axes, title=title, x="Delta (nats)", y="excess cross-entropy (nats)")


def _draw_structures(study: Study) -> None:
    """The three structures in the plane, without (above) and with the regulariser (below), from kept features."""
    files = {method: _features_file(study, method) for method in STRUCTURES}
    if not all(files[method].exists() for method in ("separation", "bridge")):
        return
    drawings: dict[str, Callable[[Axes, Mapping[str, np.ndarray]], None]] = {
        "separation": _draw_separation,
        "bridge": _draw_bridge,
        "geometric": _draw_parallelograms,
    }
    present = [method for method in drawings if files[method].exists()]
    figure, row = figures.panels(len(present), width=3.8, height=3.9)
    for axes, method in zip(row, present, strict=True):
        with np.load(files[method]) as features:
            drawings[method](axes, {name: features[name].astype(np.float32) for name in features.files})
        axes.set_aspect("equal", adjustable="datalim")
        axes.legend(fontsize=6.5, frameon=False)
        figures.finish(axes, title=TITLES[method].removeprefix("+ "), x="first axis", y="second axis")
    figures.save(figure, study.results / "structures.png")


def _plane(points: np.ndarray) -> np.ndarray:
    """Onto the plane of the two principal axes."""
    centred = points - points.mean(axis=0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T


def _draw_separation(axes: "Axes", features: Mapping[str, np.ndarray]) -> None:
    names = ("image.embeds", "text.embeds", "image.independent", "text.independent")
    plane = np.split(_plane(np.concatenate([features[name] for name in names])), len(names))
    for index, (name, points) in enumerate(zip(names, plane, strict=True)):
        modality, kind = name.split(".")
        colour = figures.BLUE if modality == "image" else figures.VERMILION
        label = f"{modality}, {'shared' if kind == 'embeds' else 'independent'}"
        axes.scatter(*points.T, s=16, marker=figures.MARKERS[index], color=colour, alpha=0.7, label=label, linewidths=0)


def _draw_bridge(axes: "Axes", features: Mapping[str, np.ndarray], pairs: int = 6) -> None:
    names = ("image.embeds", "text.embeds", "augmented_image.embeds")
    image, text, view = np.split(_plane(np.concatenate([features[name][:pairs] for name in names])), 3)
    for ends in zip(text, view, image, strict=True):
        axes.plot(*np.stack(ends).T, color=figures.GREY, linewidth=0.8, zorder=1)
    for points, colour, marker, label in (
        (image, figures.BLUE, "o", "image"),
        (view, figures.GREEN, "D", "augmented image"),
        (text, figures.VERMILION, "^", "text"),
    ):
        axes.scatter(*points.T, s=22, color=colour, marker=marker, label=label, zorder=2)


def _draw_parallelograms(axes: "Axes", features: Mapping[str, np.ndarray], pairs: int = 4) -> None:
    image, text = np.split(
        _plane(np.concatenate([features[f"{name}.embeds"][:pairs] for name in ("image", "text")])), 2
    )
    for points, colour, marker, label in ((image, figures.BLUE, "o", "image"), (text, figures.VERMILION, "^", "text")):
        axes.plot(*np.concatenate([points, points[:1]]).T, color=colour, linewidth=1, marker=marker, label=label)
    for ends in zip(image, text, strict=True):
        axes.plot(*np.stack(ends).T, color=figures.GREY, linewidth=0.7, linestyle="--", zorder=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes the report, and returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="all parts, tiny")
    parser.add_argument("--report", action="store_true", help="only tables and figures of what is finished")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all two towers")
    options = parser.parse_args(arguments)
    study = smoke(Study()) if options.smoke else Study()
    towers = dataclasses.replace(study.two_tower, settings=(*study.two_tower.settings, *options.set))
    study = dataclasses.replace(study, two_tower=towers)
    is_complete = True
    if not options.report:
        programs = (program for name in options.part or PARTS for program in PARTS[name](study))
        is_complete = run_programs(Runs(study.results / "runs.jsonl"), programs, options.minutes)
    print(report(study))
    if not is_complete:
        print("Not complete; call again to go on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
