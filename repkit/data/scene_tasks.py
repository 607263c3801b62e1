"""Generation tasks on digit scenes of 24 x 24 pixels: questions, captions, translation that needs the image, and
grounding, which models are pre-trained on.

| task | source text | target texts | grammar in |
|---|---|---|---|
| `questions` | "what is the sum of the red digit and the blue digit?" | ten annotators' answers | `scene_questions` |
| `captions` | `CAPTION_PROMPT` | four captions | here |
| `translation` | "a seven is left of the three" | one German sentence, with the colours | `scene_translation` |
| `grounding` | "what is at the top left?" | a cell's digit, a digit's cell, or all cells | `scene_grounding` |

Everything follows from the random state that a task is given.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from repkit.data.scene_demands import TASK_IMAGE_SIZE, Digits, TaskExample
from repkit.data.scene_grounding import grounding
from repkit.data.scene_questions import questions
from repkit.data.scene_translation import translations
from repkit.data.scenes import PLACES, PlacedDigit, Strokes, cell_relation, pairs_caption, pairs_scenes

CAPTION_PROMPT = "describe the picture"


def captions(strokes: Strokes, *, count: int, rng: np.random.Generator) -> Iterator[TaskExample]:
    """Examples of the caption task: scenes of `pairs_scenes`, captioned in reading order so that the image decides."""
    for scene in pairs_scenes(strokes, count=count, rng=rng, image_size=TASK_IMAGE_SIZE):
        yield TaskExample(scene, CAPTION_PROMPT, scene_captions(scene.digits, scene.background))


def scene_captions(digits: Digits, background: str) -> tuple[str, ...]:
    """Four captions: two with the places of the digits, two with their relations from one end and from the other.

    >>> two = [PlacedDigit(3, "blue", 0, 2, 9, 0, 24), PlacedDigit(7, "red", 0, 0, 5, 0, 0)]
    >>> for caption in scene_captions(two, "white"):
    ...     print(caption)
    a red seven at the top left and a blue three at the top right on white
    on white a red seven at the top left and a blue three at the top right
    a red seven left of a blue three on white
    a blue three right of a red seven on white
    """
    ordered = sorted(digits, key=lambda placed: placed.cell)
    *first, last = [f"a {placed.phrase} at the {PLACES[placed.cell]}" for placed in ordered]
    listed = f"{', '.join(first)} and {last}"
    chain = relation_chain(ordered)
    assert chain is not None, "the scene's digits are related to one another"
    return (
        f"{listed} on {background}",
        f"on {background} {listed}",
        pairs_caption(chain, background),
        pairs_caption(chain[::-1], background),
    )


def relation_chain(ordered: Sequence[PlacedDigit]) -> Sequence[PlacedDigit] | None:
    """The first order, counted from the given one, in which each digit shares a row or a column with the one before.

    None where there is no such order.
    """
    chains = (
        chain
        for chain in itertools.permutations(ordered)
        if all(cell_relation(a.cell, b.cell) is not None for a, b in itertools.pairwise(chain))
    )
    return next(chains, None)


TASKS: Mapping[str, Callable[..., Iterator[TaskExample]]] = {
    "questions": questions,
    "captions": captions,
    "translation": translations,
    "grounding": grounding,
}
"""Task -> composes its examples from strokes."""
