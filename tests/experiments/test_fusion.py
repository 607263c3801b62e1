"""The recipe of the fusion model: every stage from pre-training on, and settings that do not fit together."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.fusion import Config, ContrastConfig, build, smoke
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
    initial = build(after.config, tmp_path / "new").init(jax.random.key(0))
    for part in ("image", "multimodal", "comparison"):
        jax.tree.map(np.testing.assert_array_equal, initial[part], before.params[part])
    assert before.params["class_head"]["bias"].shape == (3,)
    assert after.params["class_head"]["bias"].shape == (2,)
    wider = dataclasses.replace(after.config.model, width=32)
    with pytest.raises(InputError, match=r"has model\.width=16, here it is 32"):
        build(dataclasses.replace(after.config, model=wider), tmp_path / "new")
    with pytest.raises(InputError, match="has images of 24 pixels, here they have 32; set image_size=24"):
        build(dataclasses.replace(after.config, image_size=32), tmp_path / "new")


@pytest.mark.slow
def test_a_run_that_has_begun_no_longer_needs_its_start(pretrained, tmp_path, capsys):
    start = tmp_path / "start"
    shutil.copytree(pretrained, start)
    settings = ["--set", "stage=retrieval", "--set", f"start={start}", "--set", "image_size=24"]
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(["train", RECIPE, "--run", str(run), *SMALLEST, *settings]) == 0
    shutil.rmtree(start)
    assert main(["evaluate", str(run)]) == 0
    assert main(["train", RECIPE, "--run", str(other), *SMALLEST, *settings]) == 2
    assert f"no run in '{start}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": dataclasses.replace(Config().train, ema_decay=None)}, "set train.ema_decay, such as 0.995"),
        ({"stage": "questions", "regularizers": ("brownian_bridge",)}, "terms of stage=pretrain and stage=retrieval"),
        ({"beams": 0}, "expected beams >= 1, got 0"),
        ({"reranked": -1}, "expected reranked >= 0, got -1"),
        ({"examples": -5}, "expected examples >= 1, got -5"),
        ({"regularizer_weight": -0.5}, "expected regularizer_weight >= 0, got -0.5"),
        ({"contrast": ContrastConfig(queue=0)}, "expected contrast.queue >= 1, got 0"),
        ({"stage": "questions", "start": "no/such/run"}, "no run in 'no/such/run'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build(dataclasses.replace(smoke(Config()), **changes), tmp_path)


def test_a_start_of_another_recipe_is_refused(tmp_path):
    recipe = Path(RECIPE).with_name("two_tower.py")
    (tmp_path / "config.json").write_text(json.dumps({"recipe": str(recipe), "config": {"loss": "info_nce"}}))
    with pytest.raises(InputError, match="does not fit the recipe"):
        build(dataclasses.replace(smoke(Config()), stage="questions", start=str(tmp_path)), tmp_path / "new")
