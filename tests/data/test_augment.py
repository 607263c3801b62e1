import dataclasses

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.data.augment import (
    IMAGE_DRAWS,
    SCENE_SYNONYMS,
    TEXT_DRAWS,
    ImageAugmentation,
    TextAugmentation,
    augment_images,
    augment_texts,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 16, 20, 3), dtype=np.uint8)
NO_IMAGE_CHANGE = ImageAugmentation(crop=0, shift=0, brightness=0, contrast=0, colour=0, erase=0, erase_size=0)
NO_TEXT_CHANGE = TextAugmentation(synonym=0, order=0, drop=0)
CAPTION = "a red seven on yellow, top left"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_nothing_to_change_changes_nothing():
    np.testing.assert_array_equal(augment_images(IMAGES, rng(), NO_IMAGE_CHANGE), IMAGES)
    assert augment_texts([CAPTION, ""], rng(), NO_TEXT_CHANGE) == [CAPTION, ""]


def test_the_random_state_decides():
    config = ImageAugmentation()
    np.testing.assert_array_equal(augment_images(IMAGES, rng(1), config), augment_images(IMAGES, rng(1), config))
    assert (augment_images(IMAGES, rng(1), config) != augment_images(IMAGES, rng(2), config)).any()
    texts = [CAPTION] * 50
    config = TextAugmentation()
    assert augment_texts(texts, rng(1), config) == augment_texts(texts, rng(1), config)
    assert augment_texts(texts, rng(1), config) != augment_texts(texts, rng(2), config)


def test_a_batch_in_pieces_is_the_batch_at_once():
    """What a process's share of a batch rests on: each row takes a fixed number of draws."""
    config, state = ImageAugmentation(), rng()
    pieces = [augment_images(part, state, config) for part in (IMAGES[:5], IMAGES[5:6], IMAGES[6:])]
    np.testing.assert_array_equal(np.concatenate(pieces), augment_images(IMAGES, rng(), config))
    assert state.random() == np.random.default_rng(0).random(64 * IMAGE_DRAWS + 1)[-1]

    texts, config, state = [CAPTION, "", "a " * 100, "two"], TextAugmentation(drop=0.5), rng()
    assert augment_texts(texts[:1], state, config) + augment_texts(texts[1:], state, config) == augment_texts(
        texts, rng(), config
    )
    assert state.random() == np.random.default_rng(0).random(4 * TEXT_DRAWS + 1)[-1]


def test_input_is_left_as_it_is():
    images = IMAGES.copy()
    augment_images(images, rng(), ImageAugmentation(erase=1))
    np.testing.assert_array_equal(images, IMAGES)


def test_shift_moves_by_whole_and_partial_pixels_and_repeats_the_border():
    ramp = np.tile((np.arange(16, dtype=np.uint8) * 10)[:, None, None], (200, 1, 16, 3)).astype(np.uint8)
    shifted = augment_images(ramp, rng(), dataclasses.replace(NO_IMAGE_CHANGE, shift=2 / 16)).astype(float)
    moves = (shifted - ramp)[:, 5:11]
    np.testing.assert_allclose(moves, moves[:, :1, :1, :1] * np.ones_like(moves), atol=1)
    assert -20 <= moves.min() < -15
    assert 15 < moves.max() <= 20
    assert shifted.min() >= 0
    assert shifted.max() <= 150


def test_crop_enlarges_by_at_most_its_share():
    ramp = np.tile((np.arange(20, dtype=np.uint8) * 10)[None, :, None], (200, 20, 1, 3)).astype(np.uint8)
    cropped = augment_images(ramp, rng(), dataclasses.replace(NO_IMAGE_CHANGE, crop=0.5)).astype(float)
    slope = (cropped[:, :, 12] - cropped[:, :, 7]) / 50
    assert 0.48 <= slope.min() < 0.55
    assert 0.95 < slope.max() <= 1.02


def test_colour_jitter_stays_within_its_bounds():
    grey = np.full((500, 4, 4, 3), 100, np.uint8)
    bright = augment_images(grey, rng(), dataclasses.replace(NO_IMAGE_CHANGE, brightness=0.1)).astype(int)
    assert 74 <= bright.min() < 78
    assert 122 < bright.max() <= 126
    assert np.ptp(bright, axis=-1).max() == 0
    tinted = augment_images(grey, rng(), dataclasses.replace(NO_IMAGE_CHANGE, colour=0.1)).astype(int)
    assert 90 <= tinted.min() < 92
    assert 108 < tinted.max() <= 110
    assert np.ptp(tinted, axis=-1).max() > 10
    stark = augment_images(IMAGES, rng(), dataclasses.replace(NO_IMAGE_CHANGE, contrast=0.2)).astype(float)
    ratio = stark.std(axis=(1, 2, 3)) / IMAGES.std(axis=(1, 2, 3))
    assert 0.78 <= ratio.min() < 0.9
    assert 1.02 < ratio.max() <= 1.2


def test_erase_replaces_one_small_rectangle_in_its_share_of_the_images():
    images = np.concatenate([IMAGES] * 8)
    erased = augment_images(images, rng(), dataclasses.replace(NO_IMAGE_CHANGE, erase=0.5, erase_size=0.25))
    changed = (erased != images).any(axis=-1)
    assert 0.4 < changed.any(axis=(1, 2)).mean() < 0.6
    for mask, image in zip(changed, erased, strict=True):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.shape[0] <= 4
            assert box.shape[1] <= 5
            assert len(np.unique(box.reshape(-1, 3), axis=0)) == 1


def test_default_augmentation_keeps_a_scene_recognisable(single_scenes):
    """A view stays nearer to its own image than to those of other scenes."""
    from repkit.data.images import load_image

    source = single_scenes("test")
    images = np.stack([load_image(source[i]["image"], image_size=16) for i in range(100)])
    views = augment_images(images, rng(), ImageAugmentation())

    def without_brightness(pixels):
        pixels = pixels.reshape(len(pixels), -1, 3).astype(float)
        pixels -= pixels.mean(axis=(1, 2), keepdims=True)
        return (pixels / pixels.std(axis=(1, 2), keepdims=True)).reshape(len(pixels), -1)

    correlation = without_brightness(views) @ without_brightness(images).T
    assert (correlation.argmax(axis=1) == np.arange(100)).mean() > 0.85


def test_synonyms_replace_words_and_leave_punctuation():
    config = dataclasses.replace(NO_TEXT_CHANGE, synonym=1.0, synonyms={"red": ["crimson"], "yellow": ["golden"]})
    assert augment_texts([CAPTION], rng(), config) == ["a crimson seven on golden, top left"]


def test_order_turns_the_parts_between_commas():
    config = dataclasses.replace(NO_TEXT_CHANGE, order=1.0)
    assert augment_texts([CAPTION, "no comma"], rng(), config) == ["top left, a red seven on yellow", "no comma"]
    turned = set(augment_texts(["a, b, c"] * 50, rng(), config))
    assert turned == {"b, c, a", "c, a, b"}


def test_drop_keeps_at_least_half_of_the_words_in_order():
    config = dataclasses.replace(NO_TEXT_CHANGE, drop=0.9)
    words = CAPTION.split()
    for text in augment_texts([CAPTION] * 100, rng(), config):
        kept = text.split()
        assert len(kept) >= len(words) / 2
        remaining = iter(words)
        assert all(word in remaining for word in kept)
    assert augment_texts(["one"] * 20, rng(), config) == ["one"] * 20


def test_synonyms_name_one_thing_only():
    words = [word for others in SCENE_SYNONYMS.values() for word in others]
    assert len(words) == len(set(words))
    assert not set(words) & set(SCENE_SYNONYMS)


@pytest.mark.parametrize(("name", "value"), [("crop", 1.5), ("erase", -0.1), ("shift", float("nan"))])
def test_a_share_outside_its_range_is_refused(name, value):
    with pytest.raises(InputError, match=rf"expected ImageAugmentation.{name} in \[0, 1\], got {value}"):
        ImageAugmentation(**{name: value})
    with pytest.raises(InputError, match=r"expected TextAugmentation.drop in \[0, 1\], got 2"):
        TextAugmentation(drop=2)
