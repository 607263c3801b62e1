"""Who may import whom: every import in repkit points down the layers, and heavy packages stay in their rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "repkit"

# From a room of the package to the rooms that it may import from.
FOUNDATION = {"checks", "numerics"}
ALLOWED = {
    "checks": set(),
    "numerics": {"checks"},
    "config": {"checks"},
    "losses": FOUNDATION,
    "metrics": FOUNDATION,
    "objective": FOUNDATION | {"losses"},
    "distillation": FOUNDATION | {"losses", "objective"},
    "models": FOUNDATION,
    "data": FOUNDATION,
    "train": FOUNDATION | {"losses", "metrics", "objective", "config", "lock", "__init__"},
    "evaluate": FOUNDATION | {"losses", "metrics"},
    "plots": FOUNDATION | {"metrics"},
    "lock": FOUNDATION,
    "recipe": FOUNDATION | {"config", "lock", "objective", "__init__"},
    "doctor": FOUNDATION | {"losses", "objective", "train", "__init__"},
    "trained": FOUNDATION | {"recipe", "train"},
    "simulation": set(),
    "plan": FOUNDATION | {"simulation", "train"},
    "cli": FOUNDATION | {"config", "recipe", "doctor", "plan", "simulation", "train", "trained", "evaluate", "plots"},
    "__init__": set(),
}
# The packages that only these rooms or files may import.
CONFINED = {
    "flax": {"models"},
    "optax": {"train", "doctor"},
    "orbax": {"train/checkpoint.py"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "tokenizers": {"data"},
    "PIL": {"data"},
    "sklearn": {"data", "evaluate", "plots"},
    "matplotlib": {"plots"},
    "sacrebleu": {"metrics"},
    "tensorboardX": {"train/logging.py"},
    "tqdm": {"train/logging.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = _room(path)
    for name in _imports(path):
        package, *parts = name.split(".")
        if package == "repkit":
            # `import repkit` and `from repkit import __version__` reach the package's own file only.
            target = (
                parts[0]
                if parts and ((PACKAGE / parts[0]).exists() or (PACKAGE / f"{parts[0]}.py").exists())
                else "__init__"
            )
            assert target == room or target in ALLOWED[room], f"{path.name} of {room} imports {name}"
        elif package in CONFINED:
            assert {room, path.relative_to(PACKAGE).as_posix()} & CONFINED[package], f"{path.name} imports {name}"


def test_device_mapping_stays_in_its_rooms():
    for path in FILES:
        if path.relative_to(PACKAGE).as_posix() in ("train/step.py", "losses/mesh.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            used = {getattr(node, "attr", None), getattr(node, "id", None)}
            used |= {alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
            assert not used & {"pmap", "shard_map"}, f"{path}: line {node.lineno}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("repkit", ["jax", "numpy"]),
        (
            "repkit.losses",
            ["flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "matplotlib", "sklearn"],
        ),
        ("repkit.cli", ["flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib"]),
        ("repkit.data", ["tensorflow", "flax", "optax"]),
        ("repkit.models", ["orbax", "grain", "tensorflow_datasets"]),
        ("repkit.train.loop", ["flax", "grain", "tensorflow_datasets", "matplotlib", "tensorflow"]),
    ],
)
def test_importing_brings_no_heavy_package(module, absent):
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
