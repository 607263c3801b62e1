"""A picture of the three structures in the plane, from features that were trained with them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from experiments import figures
from experiments.modality_structure.structures import TITLES
from experiments.parts import Setup
from repkit.trained import load_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Features = Mapping[str, np.ndarray]

KEPT = 64
"""Scenes whose features are kept."""


def features_file(setup: Setup, method: str) -> Path:
    """Where the features of a method are kept."""
    return setup.results / f"features_{method}.npz"


def keep_features(run: Path, path: Path) -> None:
    """Writes a run's features of some training scenes and of their augmented views."""
    trained = load_run(run)
    with trained.experiment.batches() as batches:
        outputs = jax.jit(trained.experiment.forward)(trained.params, next(batches), None)
    views = {
        f"{view}.{name}": np.asarray(values[:KEPT], np.float16)
        for view, features in outputs.items()
        if isinstance(features, dict)
        for name, values in features.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **views)


def draw(setup: Setup) -> None:
    """Writes the picture of the structures whose features are kept."""
    drawings: dict[str, Callable[[Axes, Features], None]] = {
        "separation": _draw_separation,
        "bridge": _draw_bridge,
        "geometric": _draw_parallelograms,
    }
    files = {method: features_file(setup, method) for method in drawings if features_file(setup, method).exists()}
    if not files:
        return
    figure, row = figures.panels(len(files), width=3.8, height=3.9)
    for axes, (method, path) in zip(row, files.items(), strict=True):
        with np.load(path, allow_pickle=False) as features:
            drawings[method](axes, {name: features[name].astype(np.float32) for name in features.files})
        axes.set_aspect("equal", adjustable="datalim")
        axes.legend(fontsize=6.5, frameon=False)
        figures.finish(axes, title=TITLES[method].removeprefix("+ "), x="first axis", y="second axis")
    figures.save(figure, setup.results / "structures.png")


def _plane(*groups: np.ndarray) -> list[np.ndarray]:
    """The groups of points, on the plane of the two principal axes of all."""
    points = np.concatenate(groups)
    centred = points - points.mean(axis=0)
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    return np.split(plane, np.cumsum([len(group) for group in groups])[:-1])


def _draw_separation(axes: "Axes", features: Features) -> None:
    """Shared features, and the independent ones of each modality away from them."""
    names = ("image.embeds", "text.embeds", "image.independent", "text.independent")
    for index, (name, points) in enumerate(zip(names, _plane(*(features[name] for name in names)), strict=True)):
        modality, kind = name.split(".")
        colour = figures.BLUE if modality == "image" else figures.VERMILION
        label = f"{modality}, {'shared' if kind == 'embeds' else 'independent'}"
        axes.scatter(*points.T, s=16, marker=figures.MARKERS[index], color=colour, alpha=0.7, label=label, linewidths=0)


def _draw_bridge(axes: "Axes", features: Features, pairs: int = 6) -> None:
    """The augmented image between text and image of each pair."""
    names = ("image.embeds", "text.embeds", "augmented_image.embeds")
    image, text, view = _plane(*(features[name][:pairs] for name in names))
    for ends in zip(text, view, image, strict=True):
        axes.plot(*np.stack(ends).T, color=figures.GREY, linewidth=0.8, zorder=1)
    for points, colour, marker, label in (
        (image, figures.BLUE, "o", "image"),
        (view, figures.GREEN, "D", "augmented image"),
        (text, figures.VERMILION, "^", "text"),
    ):
        axes.scatter(*points.T, s=22, color=colour, marker=marker, label=label, zorder=2)


def _draw_parallelograms(axes: "Axes", features: Features, pairs: int = 4) -> None:
    """The same polygon of pairs in both modalities."""
    image, text = _plane(*(features[f"{name}.embeds"][:pairs] for name in ("image", "text")))
    for points, colour, marker, label in ((image, figures.BLUE, "o", "image"), (text, figures.VERMILION, "^", "text")):
        axes.plot(*np.concatenate([points, points[:1]]).T, color=colour, linewidth=1, marker=marker, label=label)
    for ends in zip(image, text, strict=True):
        axes.plot(*np.stack(ends).T, color=figures.GREY, linewidth=0.7, linestyle="--", zorder=1)
