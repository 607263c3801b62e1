"""A check of the installation: versions, devices, the mesh, and a tiny training step on each device."""

import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import repkit
from repkit.losses import info_nce
from repkit.numerics import normalize
from repkit.objective import Objective, Term
from repkit.train.mesh import make_mesh
from repkit.train.processes import barrier, described_processes
from repkit.train.state import init_state
from repkit.train.step import jit_placement, make_update

NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxtyping", "tensorboardX", "tqdm")
EXTRAS = {
    "data": ("grain", "tensorflow-datasets", "array_record", "tokenizers", "pillow", "scikit-learn"),
    "plot": ("matplotlib",),
}


def report() -> Iterator[tuple[str, bool]]:
    """Yields lines to print, each with whether what it says is good."""
    system = f"Python {platform.python_version()} on {platform.machine()} ({sys.platform})"
    yield f"repkit {repkit.__version__}, {system}", True
    for package in NEEDED:
        version = _version(package)
        yield f"  {package:<20} {version or 'MISSING'}", version is not None
    for extra, packages in EXTRAS.items():
        for package in packages:
            version = _version(package) or f'not installed (pip install "repkit[{extra}]")'
            yield f"  {package:<20} {version}", True
    devices = jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    yield f"{len(devices)} device(s): {kinds}; {jax.process_count()} process(es)", True
    if jax.process_count() > 1:
        yield from _cluster()
    for device in jax.local_devices():
        yield _try_step_on([device], f"step on {device}")
    if len(devices) > 1:
        yield _try_step_on(devices, f"step on the mesh {dict(make_mesh().shape)}")


def _cluster() -> Iterator[tuple[str, bool]]:
    """What the processes are, and how long they take to wait for one another."""
    lines = list(described_processes())
    yield from ((f"  process {number}: {line}", True) for number, line in enumerate(lines))
    versions = {line.partition("; ")[2] for line in lines}
    if len(versions) > 1:
        yield f"the processes have different versions: {' / '.join(sorted(versions))}", False
    barrier("doctor", seconds=60)
    began = time.perf_counter()
    for _ in range(10):
        barrier("doctor", seconds=60)
    yield f"all processes wait for one another in {100 * (time.perf_counter() - began):.1f} ms", True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try_step_on(devices: Sequence[Any], label: str) -> tuple[str, bool]:
    try:
        return _step_on(devices, label)
    except Exception as error:  # whatever a broken device raises is what the user came to see
        return f"{label}: FAILED {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", False


def _step_on(devices: Sequence[Any], label: str) -> tuple[str, bool]:
    """Trains a linear two-tower for a few steps; the loss must fall and stay finite."""
    rows, width = 4 * len(devices), 8
    term = Term(info_nce, ("outputs.image", "outputs.text"), options={"logit_scale": 10.0})
    objective, optimizer = Objective({"contrastive": term}), optax.sgd(0.5)

    def forward(params: Mapping[str, jax.Array], batch: Mapping[str, jax.Array], key: jax.Array | None) -> dict:
        return {tower: normalize(batch[tower] @ params[tower]) for tower in ("image", "text")}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        image_key, text_key = jax.random.split(key)
        shape = (width, width)
        return {
            "image": jax.random.normal(image_key, shape, jnp.float32),
            "text": jax.random.normal(text_key, shape, jnp.float32),
        }

    placement = jit_placement(
        make_update(forward, objective, optimizer),
        lambda key: init_state(init, optimizer, objective, key=key),
        make_mesh(devices=devices),
    )
    # Of a mesh of several processes, each feeds its share; of its own devices it feeds all.
    here = [device for device in devices if device.process_index == jax.process_index()]
    rows = rows * len(here) // len(devices)
    inputs = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
    batch = placement.put_batch({"image": inputs, "text": inputs, "where": np.ones(rows, bool)})
    state = placement.init(jax.random.key(0))
    losses = []
    for _ in range(5):
        state, metrics = placement.update(state, batch)
        losses.append(float(metrics["loss"]))
    is_good = bool(np.isfinite(losses).all() and losses[-1] < losses[0])
    return f"{label}: loss {losses[0]:.3f} -> {losses[-1]:.3f} {'ok' if is_good else 'WRONG'}", is_good
