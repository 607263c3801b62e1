import itertools
import json

import numpy as np
import pytest

from repkit.data import scenes


@pytest.fixture(scope="module")
def strokes() -> dict[str, scenes.Strokes]:
    return scenes.split_strokes(scenes.load_strokes())


def test_split_strokes_are_disjoint_complete_and_stratified(strokes):
    ids = [set(split.ids.tolist()) for split in strokes.values()]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 1797
    for name, split in strokes.items():
        share = np.bincount(split.labels, minlength=10) / np.bincount(scenes.load_strokes().labels)
        np.testing.assert_allclose(share, scenes.SPLIT_SHARES[name], atol=0.01)


def test_split_strokes_keep_image_and_label_together(strokes):
    everything = scenes.load_strokes()
    for split in strokes.values():
        np.testing.assert_array_equal(split.images, everything.images[split.ids])
        np.testing.assert_array_equal(split.labels, everything.labels[split.ids])


@pytest.mark.parametrize("config", scenes.SCENES)
def test_scenes_depend_on_the_seed_alone(strokes, config):
    def images(seed):
        rng = np.random.default_rng(seed)
        return np.stack([scene.image for scene in scenes.SCENES[config](strokes["test"], count=5, rng=rng)])

    np.testing.assert_array_equal(images(1), images(1))
    assert (images(1) != images(2)).any()


def test_single_scene_shows_the_stroke_in_its_colour_on_its_background_at_its_place(strokes):
    everything = scenes.load_strokes()
    for scene in scenes.single_scenes(strokes["train"], count=50, rng=np.random.default_rng(0)):
        (placed,) = scene.digits
        assert scene.image.shape == (16, 16, 3)
        assert placed.digit == everything.labels[placed.stroke_id]
        rows, columns = slice(placed.top, placed.top + 8), slice(placed.left, placed.left + 8)
        outside = np.ones((16, 16), bool)
        outside[rows, columns] = False
        background = scene.image[outside].astype(int)
        assert np.ptp(background, axis=0).max() == 0
        assert np.abs(background[0] - scenes.COLOURS[scene.background]).max() <= scenes.COLOUR_JITTER
        full_ink = everything.images[placed.stroke_id] == 1
        ink = scene.image[rows, columns][full_ink].astype(int)
        assert np.abs(ink - scenes.COLOURS[placed.colour]).max() <= scenes.COLOUR_JITTER
        place = scenes.PLACES[placed.row, placed.column]
        article = f"a {placed.colour} {scenes.DIGIT_NAMES[placed.digit]}"
        assert scene.captions == (f"{article} on {scene.background}, {place}",)


def test_single_scenes_cover_all_classes_colours_and_places(strokes):
    seen = list(scenes.single_scenes(strokes["train"], count=2000, rng=np.random.default_rng(0)))
    contexts = {(s.digits[0].colour, s.background) for s in seen}
    assert contexts == set(scenes.contrasting_colours())
    assert {(s.digits[0].row, s.digits[0].column) for s in seen} == set(scenes.SINGLE_PLACES)
    assert np.bincount([s.digits[0].digit for s in seen], minlength=10).min() > 150


def test_pairs_scenes_state_relations_that_hold(strokes):
    words = {name: digit for digit, name in enumerate(scenes.DIGIT_NAMES)}
    holds = {
        "left of": lambda a, b: a.row == b.row and a.left + 8 <= b.left,
        "right of": lambda a, b: a.row == b.row and a.left >= b.left + 8,
        "above": lambda a, b: a.column == b.column and a.top + 8 <= b.top,
        "below": lambda a, b: a.column == b.column and a.top >= b.top + 8,
    }
    counts = set()
    for scene in scenes.pairs_scenes(strokes["train"], count=200, rng=np.random.default_rng(0)):
        counts.add(len(scene.digits))
        kinds = {(d.colour, d.digit): d for d in scene.digits}
        assert len(kinds) == len(scene.digits)
        assert len({(d.row, d.column) for d in scene.digits}) == len(scene.digits)
        for caption, digits in zip(scene.captions, (scene.digits, scene.digits[::-1]), strict=True):
            chain, background = caption.rsplit(" on ", 1)
            assert background == scene.background
            for clause, (first, second) in zip(chain.split(", "), itertools.pairwise(digits), strict=True):
                relation = next(r for r in holds if f" {r} " in clause)
                left, right = (part.split() for part in clause.split(f" {relation} "))
                assert kinds[left[1], words[left[2]]] == first
                assert kinds[right[1], words[right[2]]] == second
                assert holds[relation](first, second), caption
    assert counts == {2, 3, 4}


def test_ground_truth_is_the_whole_scene_as_json(strokes):
    (scene,) = scenes.pairs_scenes(strokes["test"], count=1, rng=np.random.default_rng(0))
    truth = json.loads(scene.ground_truth)
    assert truth["background"] == scene.background
    assert tuple(scenes.PlacedDigit(**digit) for digit in truth["digits"]) == scene.digits


def test_colours_of_a_scene_are_far_apart():
    for colour, background in scenes.contrasting_colours():
        difference = np.subtract(scenes.COLOURS[colour], scenes.COLOURS[background])
        assert np.sqrt((difference**2).sum()) >= scenes.LEAST_COLOUR_DISTANCE


def test_prompts_are_captions_that_differ_between_classes_in_the_digit_alone():
    prompts = scenes.zero_shot_prompts()
    assert list(prompts) == list(scenes.DIGIT_NAMES)
    without_name = {
        name: [prompt.replace(f" {name} ", " DIGIT ") for prompt in texts] for name, texts in prompts.items()
    }
    first = without_name["zero"]
    assert all(texts == first for texts in without_name.values())
    assert len(set(first)) == len(first) <= 64
    assert {prompt.split(", ")[1] for prompt in first} == {scenes.PLACES[cell] for cell in scenes.SINGLE_PLACES}
