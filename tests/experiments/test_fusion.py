"""The recipe of the fusion model: every stage from pre-training on, and settings that do not fit together."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.fusion import Config, build, smoke
from repkit.checks import InputError
from repkit.cli import main
from repkit.train.logging import read_metrics
from repkit.trained import load_run

RECIPE = str(Path(__file__).parent.parent.parent / "experiments" / "fusion.py")
SMALLEST = ["--smoke", "--set", "train.steps=2", "--set", "train.checkpoint_every=2", "--set", "train.log_every=1"]


def train(run, *settings):
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", RECIPE, "--run", str(run), *SMALLEST, *words]) == 0
    return run


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    regularizers = "regularizers=feature_separation,brownian_bridge,geometric_consistency"
    return train(tmp_path_factory.mktemp("runs") / "pretrained", regularizers, "contrast.target_share=0.4")


@pytest.mark.slow
def test_pretraining_learns_all_its_terms_and_is_measured_with_and_without_matching(pretrained):
    rows = [row for row in read_metrics(pretrained / "metrics.jsonl") if "loss" in row]
    terms = {"contrast", "matching", "masked", "feature_separation", "brownian_bridge", "geometric_consistency"}
    assert terms <= set(rows[-1])
    assert rows[-1]["contrast/filled"] == 1.0
    assert main(["evaluate", str(pretrained)]) == 0
    results = [json.loads(line) for line in (pretrained / "results.jsonl").read_text().splitlines()]
    assert [result["task"] for result in results] == ["retrieval", "reranked_retrieval"]
    assert all(0 <= result["metrics"]["text_to_image/R@1"] <= 1 for result in results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "task", "metric", "figure"),
    [
        (["stage=retrieval"], "reranked_retrieval", "image_to_text/R@1", "retrieval"),
        (["stage=questions"], "questions", "vqa_accuracy", "answers"),
        (["stage=questions", "answers=classified"], "questions", "vqa_accuracy", "answers"),
        (["stage=captions"], "captions", "bleu4", "answers"),
        (["stage=entailment"], "entailment", "accuracy", "answers"),
    ],
)
def test_tasks_start_from_the_pretrained_model(pretrained, tmp_path, settings, task, metric, figure):
    run = train(tmp_path / "run", f"start={pretrained}", *settings)
    assert main(["evaluate", str(run)]) == 0
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert results[-1]["task"] == task
    assert 0 <= results[-1]["metrics"][metric] <= 1
    assert main(["plot", str(run)]) == 0
    assert (run / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_statements_start_from_the_assignment_of_texts(pretrained, tmp_path):
    assigned = train(tmp_path / "assigned", f"start={pretrained}", "stage=assignment")
    run = train(tmp_path / "statements", f"start={assigned}", "stage=statements")
    before, after = (load_run(path) for path in (assigned, run))
    initial = build(dataclasses.replace(after.config), tmp_path / "new").init(jax.random.key(0))
    for part in ("image", "multimodal", "comparison"):
        jax.tree.map(np.testing.assert_array_equal, initial[part], before.params[part])
    assert before.params["class_head"]["bias"].shape == (3,)
    assert after.params["class_head"]["bias"].shape == (2,)
    for changes, message in (({"width": 32}, "has model.width=16, here it is 32"),):
        model = dataclasses.replace(after.config.model, **changes)
        with pytest.raises(InputError, match=message):
            build(dataclasses.replace(after.config, model=model), tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": dataclasses.replace(Config().train, ema_decay=None)}, "set train.ema_decay, such as 0.995"),
        ({"stage": "questions", "regularizers": ("brownian_bridge",)}, "terms of stage=pretrain and stage=retrieval"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build(dataclasses.replace(smoke(Config()), **changes), tmp_path)
