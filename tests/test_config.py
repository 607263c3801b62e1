"""Typed configurations: overriding by name, reading back from JSON, comparing."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from repkit.checks import InputError
from repkit.config import differences, flatten, from_json, override, to_json
from repkit.train.config import TrainConfig


@dataclass(frozen=True)
class Inner:
    steps: int = 100
    rate: float = 0.1
    clip: float | None = 1.0
    mesh: dict[str, int] = field(default_factory=lambda: {"data": -1})


@dataclass(frozen=True)
class Outer:
    loss: Literal["info_nce", "gamma_contrastive"] = "info_nce"
    regularizers: tuple[Literal["bridge", "separation"], ...] = ()
    augment: bool = False
    name: str = "x"
    train: Inner = Inner()


@pytest.mark.parametrize(
    ("setting", "name", "expected"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.rate=2", "train.rate", 2.0),
        ("train.rate=1e-3", "train.rate", 1e-3),
        ("train.clip=none", "train.clip", None),
        ("train.clip=0.5", "train.clip", 0.5),
        ("train.mesh=data=2,tensor=4", "train.mesh", {"data": 2, "tensor": 4}),
        ("loss=gamma_contrastive", "loss", "gamma_contrastive"),
        ("regularizers=bridge,separation", "regularizers", ("bridge", "separation")),
        ("regularizers=", "regularizers", ()),
        ("augment=true", "augment", True),
        ("name=a=b", "name", "a=b"),
    ],
)
def test_override_reads_the_value_by_the_fields_type(setting, name, expected):
    before, after = flatten(Outer()), flatten(override(Outer(), [setting]))
    assert after[name] == expected
    assert type(after[name]) is type(expected)
    assert {key: value for key, value in after.items() if key != name} == {
        key: value for key, value in before.items() if key != name
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stepz=7", "unknown setting 'train.stepz'; did you mean 'train.steps'?"),
        ("loss=info_nse", "unknown value of loss 'info_nse'; did you mean 'info_nce'?"),
        ("regularizers=brigde", "did you mean 'bridge'?"),
        ("train.steps=many", "train.steps takes a whole number, got 'many'"),
        ("train.steps=1.5", "train.steps takes a whole number, got '1.5'"),
        ("train.clip=high", "train.clip takes a number, got 'high'"),
        ("augment=yes", "augment takes true or false, got 'yes'"),
        ("train.steps", "a setting has the form name=value, got 'train.steps'"),
        ("train=7", "unknown setting 'train'"),
    ],
)
def test_override_refuses_in_one_line(setting, message):
    with pytest.raises(InputError) as error:
        override(Outer(), [setting])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_json_round_trip_keeps_values_and_types():
    config = override(Outer(), ["regularizers=bridge", "train.clip=none", "train.mesh=data=2", "train.rate=3"])
    assert from_json(Outer, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lossy": "info_nce"}, "unknown setting 'lossy'"),
        ({"train": {"step": 1}}, "did you mean 'train.steps'?"),
        ({"train": {"steps": "many"}}, "train.steps takes a whole number, got 'many'"),
        ({"train": {"steps": True}}, "train.steps takes a whole number"),
        ({"loss": "other"}, "loss takes one of"),
        ({"train": []}, "expected the settings train. by name"),
        ({"loss": "info_nce"}, "settings are missing: regularizers, augment, name, train"),
    ],
)
def test_json_of_another_shape_is_refused(data, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        from_json(Outer, data)


def test_differences_name_what_changed():
    assert differences(Outer(), override(Outer(), ["train.steps=5", "augment=true"])) == [
        "augment: False -> True",
        "train.steps: 100 -> 5",
    ]
    assert differences(Outer(), Outer()) == []


def test_runs_from_before_a_setting_keep_what_they_did():
    stored = to_json(TrainConfig()) | {"mesh": {"data": -1}}
    for name in ("micro_batches", "non_finite", "hang_seconds"):
        del stored[name]
    config = from_json(TrainConfig, stored)
    assert (config.micro_batches, config.non_finite, config.hang_seconds) == (1, "stop", None)
    assert config.mesh == TrainConfig().mesh
    del stored["steps"]
    with pytest.raises(InputError, match="settings are missing: steps"):
        from_json(TrainConfig, stored)
