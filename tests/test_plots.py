"""Figures: what they show, that it fits on the page, and that gaps in the data do not stop them."""

import builtins
import math
import sys

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.plots import (
    answered_examples,
    head_alignment,
    intervals,
    loss_curves,
    projection,
    retrieved_examples,
    similarity_heatmap,
)

NAN = math.nan


@pytest.fixture(autouse=True)
def without_pyplot(monkeypatch):
    """Importing pyplot fails, which would open windows and set global state."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figures" / "figure.png"


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def training_rows(count):
    return [
        {
            "step": 10 * i,
            "loss": 3 / i,
            "gamma": 2 / i,
            "brownian_bridge": 1 / i,
            "gradient_norm": 5 / i,
            "gamma/gradient_norm": 4 / i,
            "learning_rate": 1e-3,
            "gamma/drift": 0.1 / i,
            "examples_per_second": 4000.0,
        }
        for i in range(1, count + 1)
    ]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_every_quantity_has_a_panel_in_order(path):
    recalls = {f"validation/text_to_image/R@{k}": k / 20 for k in (1, 5, 10)}
    figure = loss_curves([*training_rows(30), {"step": 300, **recalls}], path)
    assert is_png(path)
    assert titles(figure) == [
        "loss",
        "gamma",
        "brownian_bridge",
        "gradient_norm",
        "learning_rate",
        "gamma/drift",
        "validation/text_to_image/R@k",
    ]
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes if axes.get_legend()]
    assert legends == [["total", "gamma"], ["R@1", "R@5", "R@10"]]
    assert figure.axes[0].get_title(loc="right") == "0.1"


def test_long_curves_are_smoothed_over_what_was_logged(path):
    rng = np.random.default_rng(0)
    noise = 0.2 * rng.normal(size=400)
    rows = [{"step": i, "loss": 2 - i / 400 + noise[i]} for i in range(400)]
    raw, smooth = loss_curves(rows, path).axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), [row["loss"] for row in rows])
    assert np.abs(smooth.get_ydata() - (2 - np.arange(400) / 400)).max() < 0.2
    assert np.abs(np.diff(smooth.get_ydata())).mean() < 0.1 * np.abs(np.diff(raw.get_ydata())).mean()


def test_a_straight_line_stays_as_it_is_up_to_its_ends(path):
    rows = [{"step": i, "loss": 5.0 - i / 100} for i in range(100) if i != 50] + [{"step": 100, "loss": NAN}]
    smooth = loss_curves(rows, path).axes[0].lines[1]
    expected = [row["loss"] for row in rows]
    np.testing.assert_allclose(smooth.get_ydata()[:40], expected[:40], rtol=1e-6)
    np.testing.assert_allclose(smooth.get_ydata()[60:97], expected[60:97], rtol=1e-6)


def test_values_that_are_not_finite_are_marked(path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": NAN}, {"step": 3, "loss": math.inf}, {"step": 4, "loss": 1.0}]
    axes = loss_curves(rows, path).axes[0]
    assert axes.lines[-1].get_xdata().tolist() == [2, 3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["2 not finite"]


def test_one_row_missing_terms_and_nothing_finite_are_drawn(path):
    assert titles(loss_curves([{"step": 1, "loss": 2.0}], path)) == ["loss"]
    late = [*training_rows(3), {"step": 40, "loss": 1.0, "new_term": 0.5}]
    assert "new_term" in titles(loss_curves(late, path))
    diverged = loss_curves([{"step": i, "loss": NAN} for i in range(30)], path).axes[0]
    assert [text.get_text() for text in diverged.texts] == ["no finite value"]


@pytest.mark.parametrize("rows", [[], [{"step": 1, "examples_per_second": 10.0}]])
def test_nothing_to_draw_is_said(rows, path):
    with pytest.raises(InputError, match="nothing to draw"):
        loss_curves(rows, path)
    assert not path.exists()


@pytest.fixture
def pairs():
    """Twelve pairs, of which 0 and 5 have an equal caption; captions long, with signs of formulas and umlauts."""
    rng = np.random.default_rng(0)
    embeds = np.eye(12, dtype=np.float32)
    images = rng.integers(0, 256, (12, 6, 9, 3), dtype=np.uint8)
    captions = [
        f"eine grüne Zahl für ${i} und $x_{i} auf " + "einem sehr bunten Hintergrund " * (i % 4) for i in range(12)
    ]
    captions[5] = captions[0]
    return embeds, embeds[[0, 2, 1, *range(3, 12)]], images, captions


def assert_everything_is_on_the_page(figure):
    width, height = figure.bbox.size
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text


def test_heatmap_shows_the_first_pairs_and_marks_equal_captions(pairs, path):
    figure = similarity_heatmap(*pairs, path, rows=8)
    page, colour_bar = figure.axes
    assert is_png(path)
    np.testing.assert_array_equal(page.images[0].get_array(), pairs[1][:8] @ pairs[0][:8].T)
    assert len(page.images) == 1 + 8
    assert len(page.patches) == 2 * (8 + 2)
    assert len(texts(figure)) == 8 + 1
    assert colour_bar.get_ylabel() == "similarity"
    assert_everything_is_on_the_page(figure)


def test_heatmap_dots_follow_the_scores(pairs, path):
    page = similarity_heatmap(*pairs, path, rows=4).axes[0]
    dots = [line.get_xdata()[0] for line in page.lines]
    # Captions 1 and 2 find each other's image.
    assert np.argsort(dots).tolist() == [0, 2, 1, 3]


def test_heatmap_with_few_or_broken_rows(pairs, path):
    image, text, images, captions = pairs
    assert len(similarity_heatmap(image[:1], text[:1], images[:1], captions[:1], path).axes[0].images) == 2
    broken = text.copy()
    broken[3] = NAN
    figure = similarity_heatmap(image, broken, images, captions, path)
    assert len(figure.axes[0].lines) == 11


def test_retrieved_examples_say_right_and_wrong(pairs, path):
    figure = retrieved_examples(*pairs, path, queries=3, best=2)
    assert is_png(path)
    shown = texts(figure)
    # Caption 0 finds its image first; captions 1 and 2 find each other's; the second best of all is a tie at 0.
    assert [text for text in shown if text[0] in "✓✗" and len(text) < 8] == [
        *("✓ 1.00", "✗ 0.00", "✓ 1.00", "✗ 0.00"),
        *("✗ 1.00", "✗ 0.00", "✗ 1.00", "✗ 0.00"),
        *("✗ 1.00", "✗ 0.00", "✗ 1.00", "✗ 0.00"),
    ]
    assert len(figure.axes[0].images) == 3 * (2 + 1)
    assert shown[-1].endswith("searched: 12 images, 11 different captions")
    assert_everything_is_on_the_page(figure)


def test_retrieved_examples_with_few_or_broken_rows(pairs, path):
    image, text, images, captions = pairs
    figure = retrieved_examples(image[:1], text[:1], images[:1], captions[:1], path)
    assert len(figure.axes[0].images) == 2
    broken = image.copy()
    broken[0] = NAN
    shown = texts(retrieved_examples(broken, text, images, captions, path, queries=1, best=12))
    assert shown[2 + 12].endswith("nan")  # the last of twelve images


@pytest.mark.parametrize("draw", [similarity_heatmap, retrieved_examples])
def test_rows_that_do_not_fit_are_named(pairs, path, draw):
    image, text, images, captions = pairs
    with pytest.raises(InputError, match="one row per pair, got 12, 12, 12, 11 rows"):
        draw(image, text, images, captions[:-1], path)
    with pytest.raises(InputError, match="got 0, 0, 0, 0 rows"):
        draw(image[:0], text[:0], images[:0], [], path)


def test_answered_examples_say_what_was_expected_where_it_was_not_said(path):
    picture = np.zeros((8, 8, 3), np.uint8)
    figure = answered_examples(
        [[picture], [picture, picture], [picture], [picture]],
        ["how many digits?", "both show a $3", "what is left of the red seven? " * 9, "which digit?"],
        [["two", "2"], ["true"], [], ["six"]],
        ["2", "false", "a blue one", ""],
        path,
    )
    assert is_png(path)
    shown = texts(figure)
    assert shown[:3] == ["how many digits?", "2", "✓"]
    assert shown[3:7] == ["both show a $3", "false", "✗", "expected: true"]
    assert shown[8] == "a blue one"  # nobody knows whether it is right
    assert shown[9:13] == ["which digit?", "(nothing)", "✗", "expected: six"]
    assert len(figure.axes[0].images) == 5
    assert_everything_is_on_the_page(figure)


def test_answered_examples_of_different_numbers_are_refused(path):
    with pytest.raises(InputError, match="one row per example, got 1, 1, 0, 1 rows"):
        answered_examples([[]], ["what?"], [], ["six"], path)
    with pytest.raises(InputError, match="got 0, 0, 0, 0 rows"):
        answered_examples([], [], [], [], path)


@pytest.fixture
def cloud():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(60, 8)).astype(np.float32)
    return image, image + 0.3 * rng.normal(size=(60, 8)).astype(np.float32) + 1.0, np.arange(60) % 4


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_projection_is_pca_of_both_modalities(cloud, path):
    from sklearn.decomposition import PCA

    image, text, labels = cloud
    figure = projection(image, text, labels, path, lines=7)
    axes = figure.axes[0]
    assert is_png(path)
    expected = np.abs(PCA(2).fit_transform(np.concatenate([image, text])))
    drawn = [np.asarray(collection.get_offsets()) for collection in axes.collections]
    for number, points in enumerate(drawn):
        rows = np.flatnonzero(labels == number // 2) + 60 * (number % 2)
        np.testing.assert_allclose(np.abs(points), expected[rows], atol=1e-4)
    assert len(drawn) == 8
    assert len(axes.lines) == 7
    assert legend(figure) == ["image", "text", "a pair", "0", "1", "2", "3"]
    assert "principal component 1" in axes.get_xlabel()


def test_projection_by_tsne(cloud, path):
    image, text, labels = cloud
    figure = projection(image[:12], text[:12], labels[:12], path, method="tsne")
    assert figure.axes[0].get_xlabel() == "t-SNE 1"


def test_projection_without_labels_and_with_many(cloud, path):
    image, text, _ = cloud
    assert legend(projection(image, text, None, path)) == ["image", "text", "a pair"]
    words = [f"class {i % 20:02}" if i < 40 else f"class {i % 9:02}" for i in range(60)]
    named = legend(projection(image, text, words, path))
    assert named[3:] == [f"class {i:02}" for i in range(9)] + ["other"]


def test_projection_with_few_collapsed_or_broken_rows(cloud, path):
    image, text, labels = cloud
    projection(image[:1], text[:1], labels[:1], path)
    projection(np.ones((5, 3)), np.ones((5, 3)), None, path)
    projection(image[:, :1], text[:, :1], labels, path)
    broken = image.copy()
    broken[3] = NAN
    figure = projection(broken, text, labels, path)
    assert titles(figure) == ["59 images and their captions, 1 left out as not finite"]
    with pytest.raises(InputError, match="did the training diverge"):
        projection(image * NAN, text, labels, path)


def test_projection_names_what_does_not_fit(cloud, path):
    image, text, labels = cloud
    with pytest.raises(InputError, match="got 60, 59 and 60"):
        projection(image, text[1:], labels, path)
    with pytest.raises(InputError, match="unknown projection method 'tsn'; did you mean 'tsne'"):
        projection(image, text, labels, path, method="tsn")


def test_each_pair_of_layers_has_a_heat_map_whose_dots_are_the_best_heads(path):
    cosines = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    figure = head_alignment({f"layer {i}": cosines for i in range(5)}, path)
    assert is_png(path)
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == [f"layer {i}" for i in range(5)]
    assert drawn[0].lines[0].get_xdata().tolist() == [1, 0, 1]
    assert drawn[0].lines[0].get_ydata().tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="at least one pair of layers"):
        head_alignment({}, path)


def test_intervals_stand_beside_their_method_in_its_order(path):
    rows = {"2 heads": [("ours", 0.5, 0.1), ("none", 0.2, math.inf)], "4 heads": [("none", 0.3, 0.1)]}
    figure = intervals({"questions": rows, "captions": rows}, path, label="accuracy")
    assert is_png(path)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["ours", "none"]
    first, second = axes.containers
    assert first.lines[0].get_xdata().tolist() == [0.5, 0.2]
    (segments,) = first.lines[2]
    assert segments.get_segments()[1][:, 0].tolist() == [0.2, 0.2], "an unknown interval is not drawn"
    assert abs(second.lines[0].get_ydata()[0] - 1) < 0.5
    with pytest.raises(InputError, match="at least one panel"):
        intervals({}, path, label="accuracy")


def test_missing_packages_name_the_extra(cloud, path, monkeypatch):
    import_module = builtins.__import__

    def without(package):
        def importing(name, *args, **kwargs):
            if name.startswith(package):
                raise ImportError(name)
            return import_module(name, *args, **kwargs)

        return importing

    monkeypatch.setattr(builtins, "__import__", without("matplotlib"))
    with pytest.raises(InputError, match=r'matplotlib: pip install "repkit\[plot\]"'):
        loss_curves([{"step": 1, "loss": 1.0}], path)
    monkeypatch.setattr(builtins, "__import__", without("sklearn"))
    with pytest.raises(InputError, match=r'scikit-learn: pip install "repkit\[plot\]"'):
        projection(*cloud, path, method="tsne")
