"""Figures of a run: loss curves, image-text similarities, retrieved and answered examples, both modalities in the
plane, attention heads beside those of a teacher; and of a study: methods with their intervals.

Every function writes one PNG and returns the figure. Figures are made without pyplot, so that neither a window nor
matplotlib's global state is touched. Colours are those of Okabe and Ito and of Tol, which colour-blind people tell
apart; right and wrong also differ in a sign.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, UInt8

from repkit.checks import InputError, unknown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, GREY, PALE = "#222222", "#777777", "#DDDDDD"
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
RIGHT, WRONG = BLUE, VERMILION
MARKERS = {"image": "o", "text": "^"}
CLASSES = ("#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677", "#44AA99", "#AA4499", "#999933", "#882255", "#5D5D5D")

SMOOTHED_FROM = 20
"""Finite values below which a curve is drawn as it is."""

NOT_DRAWN = ("step", "examples_per_second", "seconds_left", "corrupt_examples")


# ---------------------------------------------------------------------------------------------------------------------
# Loss curves


def loss_curves(rows: Sequence[Mapping[str, float]], path: str | Path) -> "Figure":
    """One panel per logged quantity: total and terms, gradient norms, learning rate, diagnostics, validation.

    A faint line is what was logged, a strong one its smoothed course, the number above a panel the last value. Names
    that differ only in a number at their end (R@1, R@5) share a panel, and so do all gradient norms. A red cross on the
    axis marks a value that is not finite.

    Args:
        rows: of metrics.jsonl; each has `step` and some of the quantities.
        path: of the PNG.

    Returns:
        The figure, with one axes per panel.

    Raises:
        InputError: no row has anything to draw, or matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> rows = [{"step": step, "loss": 1 / step} for step in range(1, 50)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = loss_curves(rows, f"{folder}/loss_curves.png")
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['loss']
    """
    panels = _panels(rows)
    if not panels:
        raise InputError("loss curves: the metrics hold nothing to draw; was the run stopped before its first log?")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(3.9 * columns, 2.35 * lines + 0.25)
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.07)
    steps = [row["step"] for row in rows if "step" in row]
    for number, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        _draw_curves(axes, title, {name: _series(rows, name) for name in names})
        axes.set_xlim(*_limits(steps))
        if number + columns >= len(panels):
            axes.set_xlabel("step", fontsize=8, color=GREY)
    return _save(figure, path)


def _panels(rows: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """Title -> names drawn together, the important ones first."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in NOT_DRAWN]

    def panel(name: str) -> str:
        if name.rpartition("/")[2] == "gradient_norm":
            return "gradient_norm"
        return re.sub(r"\d+$", "k", name)

    def importance(name: str) -> int:
        if "/" not in panel(name):
            known = {"loss": 0, "gradient_norm": 2, "learning_rate": 3}
            return known.get(panel(name), 1)
        return 5 if name.startswith(("validation/", "evaluation/")) else 4

    panels: dict[str, list[str]] = {}
    for name in sorted(names, key=importance):
        panels.setdefault(panel(name), []).append(name)
    return {members[0] if len(members) == 1 else title: members for title, members in panels.items()}


def _series(rows: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if name in row and "step" in row]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _draw_curves(axes: "Axes", title: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    finite = np.concatenate([values[np.isfinite(values)] for _, values in series.values()])
    for colour, (name, (steps, values)) in zip(_cycle(LINES, len(series)), series.items(), strict=True):
        label = _distinct_part(name, title) if len(series) > 1 else None
        smoothed = np.isfinite(values).sum() >= SMOOTHED_FROM and name != "learning_rate"
        marker = "o" if len(steps) < SMOOTHED_FROM else ""
        if smoothed:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, _smooth(values), color=colour, linewidth=1.7, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3, label=label)
        lost = steps[np.isnan(values)]
        if len(lost):
            axes.plot(
                lost,
                np.full(len(lost), 0.03),
                linestyle="",
                marker="x",
                markersize=5,
                color="#CC0000",
                transform=axes.get_xaxis_transform(),
                label=f"{len(lost)} not finite",
                zorder=5,
            )
    if not len(finite):
        place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no finite value", color=GREY, fontsize=9, **place)
        axes.set_yticks([])
    elif title == "gradient_norm" and finite.min() > 0 and finite.max() > 20 * finite.min():
        _log_scale(axes)
    _style(axes)
    axes.set_title(_shorten(title, 42), loc="left", fontsize=9, color=INK, parse_math=False)
    if len(series) == 1 and len(finite):
        axes.set_title(f"{finite[-1]:.4g}", loc="right", fontsize=8.5, color=GREY)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7.5, frameon=True, framealpha=0.85, edgecolor="none", labelcolor=INK, handlelength=1.4)


def _distinct_part(name: str, title: str) -> str:
    """What a line is called in the legend of a panel that holds several."""
    if title == "gradient_norm":
        return name.removesuffix("/gradient_norm") if "/" in name else "total"
    return name.rpartition("/")[2]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Local straight lines, which at the ends neither lag nor bend, through the finite values of a window, twice."""
    count = len(values)
    index = np.arange(count)
    half = max(1, count // 40)
    first, last = np.maximum(index - half, 0), np.minimum(index + half, count - 1) + 1
    x = index / count

    def window_sum(terms: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(terms)])
        return sums[last] - sums[first]

    for _ in range(2):
        finite = np.isfinite(values)
        y = np.where(finite, values, 0.0)
        number = window_sum(finite)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_x, mean_y = window_sum(finite * x) / number, window_sum(y) / number
            spread = window_sum(finite * x**2) / number - mean_x**2
            slope = np.where(number > 1, (window_sum(x * y) / number - mean_x * mean_y) / spread, 0.0)
            values = mean_y + slope * (x - mean_x)
    return values


def _log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _limits(steps: Sequence[float]) -> tuple[float, float]:
    low, high = min(steps), max(steps)
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def _style(axes: "Axes") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)
    axes.grid(color=PALE, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=GREY, labelcolor=INK, length=2)


# ---------------------------------------------------------------------------------------------------------------------
# Images and captions. These figures are laid out in inches on one axes that spans the page, because text and thumbnails
# have sizes of their own.


def similarity_heatmap(
    image_embeds: Float[np.ndarray, "n d"],
    text_embeds: Float[np.ndarray, "n d"],
    images: Sequence[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "n h w 3"],
    captions: Sequence[str],
    path: str | Path,
    *,
    rows: int = 16,
) -> "Figure":
    """The similarity of the first captions (down) and images (across); row i of all arguments is one pair.

    A frame marks what belongs together (equal captions do, too), a dot the image that a caption finds among these.

    Args:
        image_embeds: one row per image, of length 1 for the cosine.
        text_embeds: one row per caption.
        images: the images.
        captions: their captions.
        path: of the PNG.
        rows: how many pairs are shown.

    Returns:
        The figure.

    Raises:
        InputError: arguments of different length, no rows, or matplotlib is not installed.
    """
    _check_pairs("similarity heat map", image_embeds, text_embeds, images, captions)
    shown = min(rows, len(captions))
    captions = captions[:shown]
    scores = text_embeds[:shown].astype(float) @ image_embeds[:shown].astype(float).T

    cell = 0.42
    texts = [_wrap(caption, 40, lines=2) for caption in captions]
    left = 0.3 + max(map(_width, texts))
    top, bottom, right = 0.62, 0.5, 0.95
    figure, page = _page(left + shown * cell + right, top + shown * cell + bottom)
    grid = (left, left + shown * cell, top + shown * cell, top)
    mesh = page.imshow(np.ma.masked_invalid(scores), extent=grid, cmap=_colour_map("viridis"), aspect="auto")
    for i, text in enumerate(texts):
        _thumbnail(page, images[i], left + (i + 0.06) * cell, top - cell, 0.88 * cell)
        _text(page, left - 0.1, top + (i + 0.5) * cell, text, ha="right", va="center")
        for j in range(shown):
            if captions[i] == captions[j]:
                # White on ink can be seen on every colour of the map.
                _frame(page, left + (j + 0.06) * cell, top + (i + 0.06) * cell, 0.88 * cell, INK, width=2.8)
                _frame(page, left + (j + 0.06) * cell, top + (i + 0.06) * cell, 0.88 * cell, "white", width=1.3)
        if np.isfinite(scores[i]).any():
            x, y = left + (np.nanargmax(scores[i]) + 0.5) * cell, top + (i + 0.5) * cell
            page.plot(x, y, "o", color=VERMILION, markersize=6, markeredgecolor="white", markeredgewidth=0.9)
    legend = "frame: belong together      dot: the image that the caption finds"
    _text(page, left, top + shown * cell + 0.27, legend, colour=GREY)
    width, height = figure.get_size_inches()
    bar = figure.add_axes(((left + shown * cell + 0.15) / width, bottom / height, 0.13 / width, shown * cell / height))
    figure.colorbar(mesh, cax=bar).outline.set_visible(False)
    bar.tick_params(labelsize=8, colors=GREY, labelcolor=INK, length=2)
    bar.set_ylabel("similarity", fontsize=8, color=GREY)
    return _save(figure, path)


def retrieved_examples(
    image_embeds: Float[np.ndarray, "n d"],
    text_embeds: Float[np.ndarray, "n d"],
    images: Sequence[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "n h w 3"],
    captions: Sequence[str],
    path: str | Path,
    *,
    queries: int = 6,
    best: int = 5,
) -> "Figure":
    """The images found by some captions (left) and the captions found by their images (right).

    Row i of all arguments is one pair; the first rows are the queries, and all rows are searched. An image is right for
    a caption equal to its own. Equal captions are found once.

    Args:
        image_embeds: one row per image, of length 1 for the cosine.
        text_embeds: one row per caption.
        images: the images.
        captions: their captions.
        path: of the PNG.
        queries: how many rows ask.
        best: how many answers are shown.

    Returns:
        The figure.

    Raises:
        InputError: arguments of different length, no rows, or matplotlib is not installed.
    """
    _check_pairs("retrieved examples", image_embeds, text_embeds, images, captions)
    queries = min(queries, len(captions))
    unique = np.array([i for i, caption in enumerate(captions) if caption not in captions[:i]])
    found_images, image_scores = _best(text_embeds[:queries], image_embeds, best)
    found_captions, caption_scores = _best(image_embeds[:queries], text_embeds[unique], best)
    found_captions = unique[found_captions]

    size, line = 0.78, 0.19
    height = max(size + 0.42, best * line + 0.25)
    query_width, answers_width, gap = 1.95, found_images.shape[1] * (size + 0.12), 0.45
    image_left = 0.2 + query_width + answers_width + gap
    caption_left = image_left + size + 0.25
    answers = [[_wrap(captions[int(j)], 60, lines=1) for j in row] for row in found_captions]
    width = caption_left + 0.62 + max(_width(text) for row in answers for text in row) + 0.2
    figure, page = _page(width, 0.55 + queries * height + 0.35)

    _text(page, 0.2, 0.28, "caption finds image", size=10, weight="bold")
    _text(page, image_left, 0.28, "image finds caption", size=10, weight="bold")
    for i in range(queries):
        y = 0.55 + i * height
        page.plot([0.2, width - 0.2], [y, y], color=PALE, linewidth=0.7)
        _text(page, 0.2, y + 0.16 + size / 2, _wrap(captions[i], 27, lines=5), va="center", size=8.5)
        for place, (j, score) in enumerate(zip(found_images[i].tolist(), image_scores[i], strict=True)):
            x, is_right = 0.2 + query_width + place * (size + 0.12), captions[j] == captions[i]
            colour, below = RIGHT if is_right else WRONG, y + 0.13 + size + 0.13
            _thumbnail(page, images[j], x, y + 0.13, size)
            _frame(page, x, y + 0.13, size, colour, width=2.2)
            _text(
                page, x + size / 2, below, _verdict(is_right, score), ha="center", va="center", size=7.5, colour=colour
            )
        _thumbnail(page, images[i], image_left, y + 0.13, size)
        for place, (j, score) in enumerate(zip(found_captions[i].tolist(), caption_scores[i], strict=True)):
            is_right, at = captions[j] == captions[i], y + 0.25 + place * line
            colour = RIGHT if is_right else WRONG
            _text(page, caption_left, at, _verdict(is_right, score), va="center", size=7.5, colour=colour)
            text_colour = RIGHT if is_right else INK
            _text(page, caption_left + 0.62, at, answers[i][place], va="center", colour=text_colour)
    legend = f"{_verdict(True)} equal caption    {_verdict(False)} another caption    "
    legend += f"searched: {len(images)} images, {len(unique)} different captions"
    _text(page, 0.2, 0.55 + queries * height + 0.15, legend, colour=GREY, va="center")
    return _save(figure, path)


def answered_examples(
    images: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    texts: Sequence[str],
    expected: Sequence[Sequence[str]],
    answers: Sequence[str],
    path: str | Path,
    *,
    rows: int = 12,
) -> "Figure":
    """What a model said about images and texts, such as answers to questions; row i of all arguments is one example.

    Args:
        images: those of each example, one or more.
        texts: what was asked, stated or translated.
        expected: what would have been right, the first of it is shown beside a wrong answer; empty where nobody knows.
        answers: what the model said.
        path: of the PNG.
        rows: how many examples are shown.

    Returns:
        The figure.

    Raises:
        InputError: arguments of different length, no rows, or matplotlib is not installed.
    """
    lengths = [len(images), len(texts), len(expected), len(answers)]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise InputError(
            "answered examples: expected images, texts, expected and answers with one row per example, got "
            f"{', '.join(map(str, lengths))} rows"
        )
    shown = range(min(rows, len(texts)))
    size, height, line = 0.78, 1.02, 0.19
    asked = [_wrap(texts[i], 44, lines=4) for i in shown]
    said = [_wrap(answers[i] or "(nothing)", 44, lines=2) for i in shown]
    right = [_wrap(f"expected: {expected[i][0]}", 44, lines=2) if expected[i] else "" for i in shown]
    pictures = max(len(images[i]) for i in shown)
    asked_left = 0.2 + pictures * (size + 0.12) + 0.1
    said_left = asked_left + max(1.0, *(_width(text) for text in asked)) + 0.3
    width = said_left + 0.25 + max(1.0, *(_width(text) for text in (*said, *right))) + 0.2
    figure, page = _page(width, 0.2 + len(shown) * height + 0.35)
    for i in shown:
        y = 0.2 + i * height
        middle = y + height / 2
        page.plot([0.2, width - 0.2], [y, y], color=PALE, linewidth=0.7)
        for place, image in enumerate(images[i]):
            _thumbnail(page, image, 0.2 + place * (size + 0.12), y + 0.12, size)
        _text(page, asked_left, middle, asked[i], va="center")
        is_right = answers[i] in expected[i]
        colour = GREY if not expected[i] else RIGHT if is_right else WRONG
        _text(page, said_left + 0.25, middle - line / 2, said[i], va="center", colour=colour)
        if expected[i]:
            _text(page, said_left, middle - line / 2, _verdict(is_right), va="center", colour=colour)
        if expected[i] and not is_right:
            _text(page, said_left + 0.25, middle + line, right[i], va="center", colour=GREY)
    legend = f"{_verdict(True)} as expected    {_verdict(False)} otherwise"
    _text(page, 0.2, 0.2 + len(shown) * height + 0.17, legend, colour=GREY, va="center")
    return _save(figure, path)


def _best(queries: np.ndarray, candidates: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and scores [queries number] of the best candidates, best first; a score that is NaN comes last."""
    scores = queries.astype(float) @ candidates.astype(float).T
    indices = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=1, kind="stable")[:, :number]
    return indices, np.take_along_axis(scores, indices, axis=1)


def _verdict(is_right: bool, score: float | None = None) -> str:
    sign = "✓" if is_right else "✗"
    return sign if score is None else f"{sign} {score:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# Projection


def projection(
    image_embeds: Float[np.ndarray, "n d"],
    text_embeds: Float[np.ndarray, "n d"],
    labels: Sequence[int] | Sequence[str] | np.ndarray | None,
    path: str | Path,
    *,
    method: Literal["pca", "tsne"] = "pca",
    rows: int = 500,
    lines: int = 40,
) -> "Figure":
    """Both modalities in one plane: colour for the class, marker for the modality, lines between some pairs.

    PCA is linear and keeps the gap between the modalities; t-SNE shows neighbourhoods, and its distances mean little.
    Both are fitted on images and texts together.

    Args:
        image_embeds: one row per image.
        text_embeds: row i belongs to row i of the images.
        labels: the class of each pair; None colours by modality. Of more than ten classes the nine largest get colours.
        path: of the PNG.
        method: "pca" or "tsne", which needs scikit-learn.
        rows: how many pairs are drawn, the first ones.
        lines: how many of the pairs are joined, evenly chosen.

    Returns:
        The figure.

    Raises:
        InputError: arguments of different length, no pair of finite rows, an unknown method, or matplotlib or
            scikit-learn is not installed.
    """
    if method not in ("pca", "tsne"):
        raise unknown_name("projection method", method, ("pca", "tsne"))
    if len(image_embeds) != len(text_embeds) or (labels is not None and len(labels) != len(image_embeds)):
        raise InputError(
            f"projection: expected as many images as texts and labels, got {len(image_embeds)}, {len(text_embeds)} and "
            f"{'no labels' if labels is None else len(labels)}"
        )
    image, text = (np.asarray(embeds[:rows], float) for embeds in (image_embeds, text_embeds))
    finite = np.isfinite(image).all(axis=1) & np.isfinite(text).all(axis=1)
    if not finite.any():
        raise InputError("projection: no pair of embeddings without NaN or infinity; did the training diverge?")
    points, axis_labels = (_pca if method == "pca" else _tsne)(np.concatenate([image[finite], text[finite]]))
    image, text = np.split(points, 2)

    figure = _figure(7.4, 5.6)
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.07)
    axes = figure.add_subplot()
    for i in np.unique(np.linspace(0, len(image) - 1, lines).astype(int)):
        axes.plot(*np.stack([image[i], text[i]]).T, color=GREY, linewidth=0.6, alpha=0.35, zorder=1)
    groups = _class_groups(None if labels is None else np.asarray(labels)[:rows][finite], len(image))
    for _, chosen, colour in groups:
        for modality, points in (("image", image), ("text", text)):
            axes.scatter(
                *points[chosen].T,
                s=24,
                marker=MARKERS[modality],
                color=colour or _modality_colour(modality),
                alpha=0.8,
                linewidths=0.4,
                edgecolors="white",
                zorder=2,
            )
    _projection_legend(figure, groups)
    _style(axes)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(axis_labels[0], fontsize=8.5, color=INK)
    axes.set_ylabel(axis_labels[1], fontsize=8.5, color=INK)
    left_out = int(np.sum(~finite))
    note = f", {left_out} left out as not finite" if left_out else ""
    axes.set_title(f"{len(image)} images and their captions{note}", loc="left", fontsize=10, color=INK)
    return _save(figure, path)


def _pca(points: np.ndarray) -> tuple[np.ndarray, list[str]]:
    centred = points - points.mean(axis=0)
    scores, singular, _ = np.linalg.svd(centred, full_matrices=False)
    shares = singular**2 / (np.sum(singular**2) or 1.0)
    plane = np.zeros((len(points), 2))
    plane[:, : len(singular)] = (scores * singular)[:, :2]
    names = [f"principal component {k + 1} ({share:.0%} of the variance)" for k, share in enumerate(shares[:2])]
    return plane, [*names, ""][:2]


def _tsne(points: np.ndarray) -> tuple[np.ndarray, list[str]]:
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise InputError('t-SNE needs scikit-learn: pip install "repkit[plot]"') from error
    perplexity = min(30.0, (len(points) - 1) / 3)
    with threadpool_limits(1):  # thousands of tiny steps, in which threads only wait for one another
        plane = TSNE(perplexity=perplexity, init="random", random_state=0).fit_transform(points)
    return plane, ["t-SNE 1", "t-SNE 2"]


def _class_groups(classes: np.ndarray | None, count: int) -> list[tuple[str, np.ndarray, str | None]]:
    """Name, rows and colour of the groups of pairs; without classes one, whose modalities have their own colours."""
    if classes is None:
        return [("", np.arange(count), None)]
    names, sizes = np.unique(classes, return_counts=True)
    if len(names) > len(CLASSES):
        names = np.sort(names[np.argsort(-sizes, kind="stable")[: len(CLASSES) - 1]])
    groups: list[tuple[str, np.ndarray, str | None]]
    groups = [(str(name), np.flatnonzero(classes == name), CLASSES[k]) for k, name in enumerate(names)]
    others = np.flatnonzero(~np.isin(classes, names))
    return [*groups, ("other", others, PALE)] if len(others) else groups


def _modality_colour(modality: str) -> str:
    return {"image": BLUE, "text": VERMILION}[modality]


def _projection_legend(figure: "Figure", groups: Sequence[tuple[str, np.ndarray, str | None]]) -> None:
    from matplotlib.lines import Line2D

    def handle(marker: str, colour: str, label: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=6, label=label)

    has_classes = groups[0][2] is not None
    handles = [
        handle(marker, GREY if has_classes else _modality_colour(modality), modality)
        for modality, marker in MARKERS.items()
    ]
    handles.append(Line2D([], [], color=GREY, linewidth=0.8, alpha=0.6, label="a pair"))
    handles += [handle("s", colour, _shorten(name, 24)) for name, _, colour in groups if colour is not None]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8.5, frameon=False, labelcolor=INK)


# ---------------------------------------------------------------------------------------------------------------------
# Pages, texts and thumbnails


# ---------------------------------------------------------------------------------------------------------------------
# Attention heads, and methods


def head_alignment(cosines: Mapping[str, Float[np.ndarray, "ht hs"]], path: str | Path) -> "Figure":
    """Heat maps of the similarity of a teacher's heads (down) and a student's (across), one for each pair of layers.

    A dot marks the student head that each teacher head is most like.

    Args:
        cosines: title -> cosines in [0, 1], see `repkit.metrics.head_cosines`.
        path: of the PNG.

    Returns:
        The figure.

    Raises:
        InputError: nothing to draw, or matplotlib is not installed.
    """
    if not cosines:
        raise InputError("head alignment: expected at least one pair of layers, got none")
    columns = min(4, len(cosines))
    lines = math.ceil(len(cosines) / columns)
    figure = _figure(2.3 * columns + 0.9, 2.7 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (title, values) in zip(axes, cosines.items(), strict=False):
        axis.imshow(values, cmap=_colour_map("viridis"), vmin=0, vmax=1, aspect="auto")
        axis.plot(np.argmax(values, axis=1), np.arange(len(values)), "o", color=VERMILION, markersize=4, mec="white")
        axis.set_title(title, fontsize=8, color=INK)
        axis.set_xlabel("student head", fontsize=8, color=GREY)
        axis.set_ylabel("teacher head", fontsize=8, color=GREY)
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(values.shape[0]))
        axis.tick_params(labelsize=7, colors=GREY, labelcolor=INK, length=2)
    for axis in axes[len(cosines) :]:
        axis.set_axis_off()
    figure.subplots_adjust(left=0.09, right=0.88, top=0.9, bottom=0.17, wspace=0.45, hspace=0.6)
    bar = figure.add_axes((0.905, 0.2, 0.018, 0.65))
    figure.colorbar(axes[0].images[0], cax=bar).outline.set_visible(False)
    bar.tick_params(labelsize=7, colors=GREY, labelcolor=INK, length=2)
    bar.set_ylabel("cosine", fontsize=8, color=GREY)
    return _save(figure, path)


def intervals(
    panels: Mapping[str, Mapping[str, Sequence[tuple[str, float, float]]]], path: str | Path, *, label: str
) -> "Figure":
    """Methods with their means and intervals, a panel for each task and a colour for each series.

    Args:
        panels: title -> series -> (method, mean, half the width of the interval); an infinite width is not drawn.
        path: of the PNG.
        label: what is measured, below the horizontal axes.

    Returns:
        The figure.

    Raises:
        InputError: nothing to draw, or matplotlib is not installed.
    """
    if not panels:
        raise InputError("intervals: expected at least one panel, got none")
    methods = [list(dict.fromkeys(name for rows in series.values() for name, *_ in rows)) for series in panels.values()]
    figure = _figure(3.6 * len(panels) + 1.2, 0.32 * max(map(len, methods)) + 1.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, series), names in zip(axes, panels.items(), methods, strict=True):
        for index, ((name, rows), colour) in enumerate(zip(series.items(), _cycle(LINES, len(series)), strict=True)):
            places = [names.index(method) + 0.22 * (index - (len(series) - 1) / 2) for method, *_ in rows]
            means = [mean for _, mean, _ in rows]
            widths = [width if math.isfinite(width) else 0.0 for *_, width in rows]
            axis.errorbar(means, places, xerr=widths, fmt="o", color=colour, markersize=4, linewidth=1.2, label=name)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, color=INK)
        axis.set_xlabel(label, fontsize=8, color=GREY)
        _style(axis)
        axis.tick_params(axis="y", labelsize=8)
    marks, names = axes[0].get_legend_handles_labels()
    figure.legend(marks, names, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('figures need matplotlib: pip install "repkit[plot]"') from error
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def _page(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure with one axes that spans it, in inches from the top left corner."""
    figure = _figure(width, height)
    page = figure.add_axes((0, 0, 1, 1))
    page.set_axis_off()
    page.set_xlim(0, width)
    page.set_ylim(height, 0)
    page.set_autoscale_on(False)
    return figure, page


def _save(figure: "Figure", path: str | Path) -> "Figure":
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
    return figure


def _colour_map(name: str):
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=PALE)


def _thumbnail(page: "Axes", image: np.ndarray, x: float, y: float, size: float) -> None:
    """An image in a square of `size` inches, its sides in proportion."""
    height, width = np.array(image.shape[:2]) * size / max(image.shape[:2])
    x, y = x + (size - width) / 2, y + (size - height) / 2
    page.imshow(image, extent=(x, x + width, y + height, y), aspect="auto", interpolation="nearest")


def _frame(page: "Axes", x: float, y: float, size: float, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    page.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor=colour, linewidth=width))


def _text(page: "Axes", x: float, y: float, text: str, *, colour: str = INK, size: float = 8.0, **settings) -> None:
    # Captions may hold a dollar sign, which would start a formula.
    page.text(x, y, text, color=colour, fontsize=size, parse_math=False, **settings)


def _wrap(text: str, width: int, *, lines: int) -> str:
    return "\n".join(textwrap.wrap(" ".join(text.split()), width, max_lines=lines, placeholder=" …"))


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


def _width(text: str) -> float:
    """Inches that a text of 8 points takes, with a little room for the rounding of letters to pixels."""
    from matplotlib.textpath import TextPath

    widths = [TextPath((0, 0), line.replace("$", "S"), size=8).get_extents().width for line in text.splitlines()]
    return 1.03 * max(widths, default=0.0) / 72


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def _check_pairs(name: str, *arguments: Sequence | np.ndarray) -> None:
    lengths = [len(argument) for argument in arguments]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise InputError(
            f"{name}: expected image_embeds, text_embeds, images and captions with one row per pair, got "
            f"{', '.join(map(str, lengths))} rows"
        )
