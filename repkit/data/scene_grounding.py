"""Grounding on digit scenes: which words belong to which place of the image, what a model is pre-trained on.

VL-T5 is pre-trained, beside other things, to name a region that the prompt points at (grounded captioning) and to point
at the region that the prompt names (visual grounding). Here regions are the cells of the grid, and two more prompts
ask for all of them in reading order, one word a cell: the place of a word in the target then says where to look, so
that a model learns to see before it has learned to find.

| prompt | target |
|---|---|
| list the digits | nothing seven nothing nothing three nothing nothing nothing nothing |
| list the colours | nothing red nothing nothing blue nothing nothing nothing nothing |
| what is at the top left? | a red seven |
| where is the red seven? | at the top left |

References:
    Cho et al., Unifying Vision-and-Language Tasks via Text Generation, arXiv 2102.02779, section 4.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from repkit.data.scene_demands import TASK_IMAGE_SIZE, Digits, TaskExample, pick
from repkit.data.scenes import DIGIT_NAMES, PLACES, Strokes, pairs_scenes

DIGITS_PROMPT, COLOURS_PROMPT = "list the digits", "list the colours"
EMPTY_CELL = "nothing"
EMPTY_RATE = 0.25
"""Share of the questions about a cell that are about an empty one."""


def grounding(strokes: Strokes, *, count: int, rng: np.random.Generator) -> Iterator[TaskExample]:
    """Examples of the grounding task: scenes of `pairs_scenes`, the four prompts by turns."""
    prompts = (_list_digits, _list_colours, _name_cell, _find_digit)
    for index, scene in enumerate(pairs_scenes(strokes, count=count, rng=rng, image_size=TASK_IMAGE_SIZE)):
        source, target = prompts[index % len(prompts)](scene.digits, rng)
        yield TaskExample(scene, source, (target,))


def _list_digits(digits: Digits, rng: np.random.Generator) -> tuple[str, str]:
    return DIGITS_PROMPT, _listed({placed.cell: DIGIT_NAMES[placed.digit] for placed in digits})


def _list_colours(digits: Digits, rng: np.random.Generator) -> tuple[str, str]:
    return COLOURS_PROMPT, _listed({placed.cell: placed.colour for placed in digits})


def _listed(words: Mapping[tuple[int, int], str]) -> str:
    return " ".join(words.get(cell, EMPTY_CELL) for cell in PLACES)


def _name_cell(digits: Digits, rng: np.random.Generator) -> tuple[str, str]:
    phrases = {placed.cell: f"a {placed.phrase}" for placed in digits}
    empty = [cell for cell in PLACES if cell not in phrases]
    cell = pick(empty if rng.random() < EMPTY_RATE else list(phrases), rng)
    return f"what is at the {PLACES[cell]}?", phrases.get(cell, EMPTY_CELL)


def _find_digit(digits: Digits, rng: np.random.Generator) -> tuple[str, str]:
    placed = pick(digits, rng)
    return f"where is the {placed.phrase}?", f"at the {PLACES[placed.cell]}"
