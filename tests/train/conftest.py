"""Loads what tests of this folder share; the import mode in use puts no folder on the path."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def linen_model():
    """`linen_two_tower(image_size=..., vocabulary_size=..., ...) -> (init, forward)`."""
    path = Path(__file__).with_name("linen_two_tower.py")
    spec = importlib.util.spec_from_file_location("repkit_tests_linen_two_tower", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.linen_two_tower
