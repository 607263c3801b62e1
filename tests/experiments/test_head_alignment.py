"""The recipe of teachers and students: every way to learn from a teacher, and settings that do not fit together."""

import dataclasses
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from experiments.head_alignment import Config, Method, build, smoke
from repkit.checks import InputError
from repkit.cli import main
from repkit.train.logging import read_metrics

RECIPE = str(Path(__file__).parents[2] / "experiments" / "head_alignment.py")
SMALLEST = ("examples=32", "train.steps=2", "train.checkpoint_every=2", "train.log_every=1", "train.batch_size=8")


def train(run, *settings):
    words = [word for setting in (*SMALLEST, *settings) for word in ("--set", setting)]
    assert main(["train", RECIPE, "--run", str(run), "--smoke", *words]) == 0
    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "teacher")


@pytest.mark.slow
@pytest.mark.parametrize("method", get_args(Method))
def test_a_student_learns_from_every_kind_of_attention_by_every_method(teacher, tmp_path, method):
    kinds = "distillation.kinds=encoder,decoder,cross"
    run = train(tmp_path / "run", "role=student", f"teacher={teacher}", f"method={method}", kinds, "model.heads=2")
    row = next(row for row in read_metrics(run / "metrics.jsonl") if "loss" in row)
    assert ("logits" in row) == (method != "none")
    of_layers = [value for name, value in row.items() if name.startswith(f"{method}/")]
    # Two layers of the encoder, the decoder's own attention and that to the encoder, which are one block.
    assert len(of_layers) == {"none": 0, "logits": 0, "hidden": 3}.get(method, 4)
    assert np.all(np.isfinite(of_layers))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 2}, "has model.heads=4, here it is 2"),
        ({"width": 32}, "does not fit"),
        ({"encoder_depth": 1}, "does not fit"),
    ],
)
def test_a_start_of_another_shape_is_refused(teacher, tmp_path, changes, message):
    config = dataclasses.replace(smoke(Config()), start=str(teacher), examples=32)
    build(config, tmp_path / "run")
    model = dataclasses.replace(config.model, **changes)
    with pytest.raises(InputError, match=message):
        build(dataclasses.replace(config, model=model), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "student"}, "role=student needs teacher=RUN"),
        ({"method": "amad_kl"}, "add role=student"),
        ({"teacher": "runs/teacher"}, "add role=student"),
        ({"role": "student", "teacher": "no/such/run"}, "no run in 'no/such/run'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build(dataclasses.replace(smoke(Config()), **changes), tmp_path)
