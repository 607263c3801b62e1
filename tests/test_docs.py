"""The code in the documentation runs, and gives what the page says it gives."""

import re
from pathlib import Path

import pytest

from repkit import losses


@pytest.mark.slow
def test_the_code_of_the_page_on_losses_gives_one_value_on_eight_devices_and_on_one():
    page = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()
    values = []
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
        values += [float(names.pop("value"))] if "value" in names else []
    expected = losses.info_nce(names["image"], names["text"], logit_scale=10.0, form="plain")
    assert values == pytest.approx([float(expected)] * 2)
