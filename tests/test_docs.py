"""The code in the documentation runs, and gives what the page says it gives."""

import re
from pathlib import Path

import jax
import pytest

from repkit import losses
from repkit.data import digit_scenes
from repkit.train.mesh import MeshConfig, state_shardings

PAGES = Path(__file__).parent.parent / "docs"


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_code_of_the_page_on_losses_gives_one_value_on_eight_devices_and_on_one():
    values = []
    names: dict = {}
    for code in code_of("losses.md"):
        exec(code, names)
        values += [float(names.pop("value"))] if "value" in names else []
    expected = losses.info_nce(names["image"], names["text"], logit_scale=10.0, form="plain")
    assert values == pytest.approx([float(expected)] * 2)


@pytest.mark.slow
def test_the_code_of_the_page_on_data_gives_the_batches_that_its_table_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for sizes in ("SPLIT_SIZES", "TASK_SPLIT_SIZES"):
        monkeypatch.setattr(digit_scenes, sizes, {"train": 60, "validation": 12, "test": 24})
    rows = {"example_id", "where"}
    tokens = {"image", "token_ids", "token_mask"} | rows
    expected = [
        tokens | {"caption_id"},
        {"image", "source_ids", "source_mask", "target_ids", "target_mask"} | rows,
        tokens | {"label"},
        tokens | {"label", "second_image"},
        tokens | {"label", "second_image"},
        tokens | {"label"},
    ]
    names: dict = {}
    found = []
    for code in code_of("data.md"):
        exec(code, names)
        found += [set(names.pop("batch"))] if "batch" in names else []
    assert found == expected


def test_the_code_of_the_page_on_reliability_starts_from_a_part_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in code_of("reliability.md"):
        exec(code, names)
    assert [names["params"]["tower"]["w"].tolist(), names["params"]["head"].tolist()] == [[1, 1, 1], [0, 0]]


def test_the_rules_of_the_page_on_scaling_go_before_those_of_the_transformers():
    names: dict = {}
    for code in code_of("scaling.md"):
        exec(code, names)
    paths = ("text/token_embedding", "image/positions", "image/blocks/0/mlp/up/kernel", "text/blocks/0/mlp/down/kernel")
    params = {
        path: jax.ShapeDtypeStruct((64, 64), "float32") for path in (*paths, "image/blocks/0/attention/key/kernel")
    }
    shardings = state_shardings(params, MeshConfig(fsdp=2, tensor=2).make(), names["rules"])
    expected = [("fsdp", "tensor"), (), ("fsdp", "tensor"), ("tensor", "fsdp")]
    assert [tuple(shardings[path].spec) for path in paths] == expected
