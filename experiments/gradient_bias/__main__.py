"""Study: does the gradient of a contrastive loss depend on the batch size, and what does it cost to prevent that?

    python -m experiments.gradient_bias                      the whole study: hours; a second call goes on
    python -m experiments.gradient_bias --workers 2          the same, two runs at a time
    python -m experiments.gradient_bias --part real_input    only this part
    python -m experiments.gradient_bias --smoke              all parts, tiny: under a minute
    python -m experiments.gradient_bias --report             the tables and figures of what is finished

Parts: `optimum`, a parameter whose best value is known; `mean_gradient`, of fixed encoders; `real_input`, two towers
trained on digit scenes in batches of 16 to 512; `real_input_longer`, some of these on three times as many examples. The
results go to experiments/results/gradient_bias/: every run as a JSON line, the tables, and the figures.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from experiments.gradient_bias.fixed_encoder import Encoders
from experiments.gradient_bias.mean_gradient import MeanGradient
from experiments.gradient_bias.optimum import Optimum
from experiments.gradient_bias.real_input import RealInput
from experiments.parts import Study, study_command
from experiments.recipe_runs import SMALLEST_TWO_TOWER

LONGER = RealInput(
    methods=("info_nce", "gamma_expected"),
    batch_sizes=(64, 128, 256, 512),
    seeds=(0, 1, 2),
    examples=307_200,
    title="Digit scenes, longer trainings",
    figure="real_input_longer.png",
)
"""As many examples as the recipe sees by default: 600 steps of 512, with which InfoNCE learns too."""

STUDY = Study(
    name="gradient_bias",
    title="Gradient bias",
    parts={
        "optimum": Optimum(),
        "mean_gradient": MeanGradient(),
        "real_input": RealInput(),
        "real_input_longer": LONGER,
    },
    smoke={
        "optimum": Optimum(
            methods=("decoupled", "gamma_sampled"),
            sigmas=(0.5, 1.0),
            negatives=(4,),
            starts=(0.0, 3.0),
            steps=2_000,
            variants=("bounded scores",),
        ),
        "mean_gradient": MeanGradient(
            encoders=Encoders(pairs=64, features=16, dim=8, rows=2_000, warm_up=0.0),
            estimators=("info_nce", "gamma_expected_exact"),
            negatives=(4,),
            seeds=(0, 1),
        ),
        "real_input": RealInput(
            methods=("gamma_sampled",),
            batch_sizes=(16,),
            seeds=(0,),
            examples=64,
            recipe_settings=SMALLEST_TWO_TOWER,
        ),
        "real_input_longer": replace(
            LONGER,
            methods=("gamma_expected",),
            batch_sizes=(32,),
            seeds=(0,),
            examples=64,
            recipe_settings=SMALLEST_TWO_TOWER,
        ),
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes the report, and returns 0."""
    return study_command(STUDY, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
