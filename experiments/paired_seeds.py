"""Two towers of several seeds, trained in one program.

Small models keep a processor busy with the start of operations more than with arithmetic; several at once share it.
Seeds differ in parameters, data order, augmentation and draws, as in runs of their own: the batches, the update and
the evaluation are those of `experiments/two_tower.py`.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import two_tower
from repkit.recipe import Experiment
from repkit.train.config import make_optimizer
from repkit.train.state import init_state
from repkit.train.step import make_update

LONGEST_CHUNK = 64
"""Steps of one call at most; their batches are in memory together."""


def train_and_evaluate(config: two_tower.Config, seeds: Sequence[int], folder: Path) -> list[dict[str, float]]:
    """The test metrics of each seed, as `<task>/<metric>`.

    Args:
        config: the run, whose own seed decides the draws of few-shot evaluations only.
        seeds: of the trainings.
        folder: where the tokenizer is kept.
    """
    experiment, params = train(config, seeds, folder)
    return [evaluate(experiment, each) for each in params]


def train(config: two_tower.Config, seeds: Sequence[int], folder: Path) -> tuple[Experiment, list[Any]]:
    """The parts of the run, and the parameters of each seed."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = two_tower.build(config, folder)
    experiment.save(folder)
    optimizer = make_optimizer(config.train)
    update = make_update(experiment.forward, experiment.objective, optimizer)

    def step(states: Any, batch: Any) -> tuple[Any, None]:
        return jax.vmap(update)(states, batch)[0], None

    @partial(jax.jit, donate_argnums=0)
    def advance(states: Any, batches: Any) -> Any:
        return jax.lax.scan(step, states, batches)[0]

    make_state = partial(init_state, experiment.init, optimizer, experiment.objective)
    states = jax.jit(jax.vmap(lambda seed: make_state(key=jax.random.key(seed))))(np.asarray(seeds))
    chunk = max(size for size in range(1, LONGEST_CHUNK + 1) if config.train.steps % size == 0)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(_of_seed(config, seed, folder).batches()) for seed in seeds]
        for _ in range(config.train.steps // chunk):
            batches = [_stack([next(stream) for stream in streams]) for _ in range(chunk)]
            states = advance(states, _stack(batches))
    return experiment, [jax.tree.map(lambda x, at=at: x[at], states.params) for at in range(len(seeds))]


def _of_seed(config: two_tower.Config, seed: int, folder: Path) -> Experiment:
    return two_tower.build(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)), folder)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def evaluate(experiment: Experiment, params: Any) -> dict[str, float]:
    """The test metrics, as `<task>/<metric>`."""
    results = experiment.evaluate(params)
    return {f"{result.task}/{name}": value for result in results for name, value in result.metrics.items()}
