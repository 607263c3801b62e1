"""Study: does structure beside the contrast of two modalities help, and what does exact alignment cost?

    python -m experiments.modality_structure                  the whole study: hours; a second call goes on
    python -m experiments.modality_structure --workers 2      the same, two runs at a time
    python -m experiments.modality_structure --part fusion    only this part
    python -m experiments.modality_structure --smoke          all parts, tiny: about a minute
    python -m experiments.modality_structure --report         the tables and figures of what is finished

Parts: `price`, features that must be equal, in a world whose information is known; `two_tower`, image and text towers
on digit scenes with each structure, and the picture of the structures; `fusion`, a fusion model pre-trained with each
structure, and its tasks. The results go to experiments/results/modality_structure/: every run as a JSON line, the
tables, the figures, and the features that the picture is drawn from.
"""

import sys
from collections.abc import Sequence

from experiments.modality_structure.fusion_tasks import FusionTasks
from experiments.modality_structure.known_world import Training
from experiments.modality_structure.price import Price
from experiments.modality_structure.two_towers import TwoTowers
from experiments.parts import Study, study_command
from experiments.recipe_runs import SMALLEST_TWO_TOWER

STUDY = Study(
    name="modality_structure",
    title="Modality structure",
    parts={"price": Price(), "two_tower": TwoTowers(), "fusion": FusionTasks()},
    smoke={
        # The longest first, so that both workers end together.
        "fusion": FusionTasks(
            methods=("geometric",),
            seeds=(0,),
            steps={"pretrain": 2, "questions": 2},
            recipe_settings=("reranked=0",),
            smoke=True,
        ),
        "two_tower": TwoTowers(
            methods=("separation",),
            variations=(),
            seeds=(0,),
            recipe_settings=(
                *SMALLEST_TWO_TOWER,
                "train.batch_size=16",
                "train.steps=4",
                "train.warmup_steps=1",
            ),
        ),
        "price": Price(second_bits=("shared",), noises=(0.1, 0.3), seeds=(0, 1), training=Training(steps=300)),
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes the report, and returns 0."""
    return study_command(STUDY, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
