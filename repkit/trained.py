"""What a finished or running training left: its recipe, configuration and parameters, found again from its folder."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from repkit.checks import require_choice
from repkit.recipe import Experiment, RunDirectory
from repkit.train.checkpoint import CheckpointReader
from repkit.train.config import make_placement
from repkit.train.mesh import MeshConfig


class TrainedRun(NamedTuple):
    """A run with the parameters of one of its checkpoints.

    Attributes:
        directory: the run's folder.
        config: its configuration.
        experiment: what its recipe builds from it.
        params: the parameters to evaluate, the moving average where one is kept; over the data axis of all devices.
        step: the step that they are of.
    """

    directory: RunDirectory
    config: Any
    experiment: Experiment
    params: Any
    step: int


def load_run(
    path: str | Path, *, recipe: Path | None = None, checkpoint: Literal["newest", "best"] = "newest"
) -> TrainedRun:
    """Loads a run that `repkit train` made, for an evaluation, as a teacher, or to start from.

    Args:
        path: the run directory.
        recipe: the recipe file, if it has moved since the run.
        checkpoint: the newest one, or the best by the recipe's validation metric.

    Raises:
        InputError: there is no run, or no checkpoint in it, or its recipe is not to be found.
    """
    require_choice("checkpoint", checkpoint, ["newest", "best"])
    directory = RunDirectory(Path(path))
    module, config = directory.load(recipe)
    experiment = module.build(config, directory.path)
    # The devices need not be those of the training.
    train = dataclasses.replace(config.train, placement="jit", mesh=MeshConfig())
    # Nothing of a teacher is in the state, so that none is needed to read it.
    placement = make_placement(train, experiment.init, experiment.forward, experiment.objective)
    checkpoints = CheckpointReader(
        directory.checkpoints, best_metric=experiment.best_metric, config_hash=directory.config_hash()
    )
    step = checkpoints.best_step() if checkpoint == "best" else None
    restored = checkpoints.restore(placement.abstract, step)
    return TrainedRun(directory, config, experiment, restored.state.evaluation_params, restored.step)


def load_parameters(path: str | Path) -> dict[str, np.ndarray]:
    """The parameters to evaluate of a run's newest good checkpoint, by path and on the host, without its recipe.

    They are for `repkit.train.start.started_from`.

    Args:
        path: the run directory.

    Raises:
        InputError: there is no run, or no good checkpoint in it.
    """
    directory = RunDirectory(Path(path))
    reader = CheckpointReader(directory.checkpoints, config_hash=directory.config_hash())
    return reader.read("ema/", "params/").state
