"""The study of modality structure, at its smallest, and the world of known information."""

import numpy as np
import pytest

from experiments.modality_structure import known_world
from experiments.modality_structure.__main__ import STUDY
from experiments.modality_structure.known_world import World, informations, joint_distribution
from experiments.two_tower import Config, build
from repkit.config import override


def entropy_of_a_bit(p):
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


def test_informations_are_those_of_binary_channels():
    known = informations(joint_distribution(World("own", 0.05, 0.3)))
    shared = np.log(2) - entropy_of_a_bit(known_world.LABEL_NOISE)
    text, image = (np.log(2) - entropy_of_a_bit(noise) for noise in (0.05, 0.3))
    assert known == pytest.approx((shared + text, shared + image, shared + text + image, shared))
    assert known.delta == pytest.approx(text - image)


@pytest.mark.parametrize("second_bit", ["shared", "own", "text"])
@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_no_aligned_feature_is_better_than_the_bound(second_bit, noise):
    known = informations(joint_distribution(World(second_bit, 0.05, noise)))
    assert known.both - known.aligned >= known.delta - 1e-12


def test_the_image_shows_nothing_of_a_bit_that_the_text_alone_shows():
    for noise in (0.0, 0.2):
        joint = joint_distribution(World("text", 0.05, noise))
        assert informations(joint).image == pytest.approx(np.log(2) - entropy_of_a_bit(known_world.LABEL_NOISE))
        np.testing.assert_array_equal(joint, joint_distribution(World("shared", 0.05, 0.5)))


def test_what_occurs_together_is_in_one_class():
    joint = np.zeros((3, 2, 2))
    joint[0, 0], joint[1, 0], joint[2, 1] = 0.2, 0.1, 0.2
    texts, images = known_world.components(joint)
    assert texts[0] == texts[1] == images[0] != texts[2] == images[1]


@pytest.mark.parametrize(("method", "weight"), [("bridge", 1.0), ("bridge 0.3", 0.3)])
def test_a_variation_changes_the_weight_of_its_structure_alone(method, weight, tmp_path):
    settings = STUDY.parts["two_tower"].train_settings({"method": method, "seed": 0})
    terms = build(override(Config(), settings), tmp_path).objective.terms
    weights = {"info_nce": 1.0, "in_modal_image": 0.5, "in_modal_text": 0.5, "brownian_bridge": weight}
    assert {name: term.weight for name, term in terms.items()} == weights


@pytest.mark.slow
def test_trained_features_pay_the_price_only_when_they_are_aligned():
    joint = joint_distribution(World("shared", 0.05, 0.5))
    training = known_world.Training(steps=1500)
    free = known_world.train(joint, 0.0, 0, training)
    aligned = known_world.train_aligned(joint, 0, training)
    delta = informations(joint).delta
    assert 0 <= free.excess + 1e-4 < 0.01
    assert aligned.misalignment == pytest.approx(0, abs=1e-9)
    assert aligned.excess == pytest.approx(delta, abs=0.01)
    assert aligned.excess > delta - 1e-4


@pytest.mark.slow
def test_the_smoke_study_makes_tables_and_figures_and_is_not_made_twice(tmp_path, run_study):
    run_study("modality_structure", "--smoke")
    results = tmp_path / "runs" / "modality_structure" / "smoke" / "results"
    tables = (results / "RESULTS.md").read_text()
    for heading in ("Excess cross-entropy in nats, second bit shared", "Retrieval", "geometry", "Fusion model"):
        assert heading in tables
    for name in ("price", "structures"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = (results / "runs.jsonl").read_text()
    assert len(lines.splitlines()) == sum(len(list(part.all_settings())) for part in STUDY.smoke.values())

    assert "Not complete" not in run_study("modality_structure", "--smoke", "--minutes", "0")
    assert (results / "runs.jsonl").read_text() == lines
