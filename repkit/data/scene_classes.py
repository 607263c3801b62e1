"""Classification tasks on digit scenes of 24 x 24 pixels: a class for one picture or two, and a text.

| task | pictures | classes | grammar in |
|---|---|---|---|
| `statements` | 2 | false, true | `scene_statements` |
| `assignment` | 2 | first, second, neither | `scene_assignment` |
| `entailment` | 1 | entailment, neutral, contradiction | `scene_entailment` |

Everything follows from the random state that a task is given.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from repkit.data.scene_assignment import ASSIGNMENT_CLASSES, assignments
from repkit.data.scene_demands import ClassExample
from repkit.data.scene_entailment import ENTAILMENT_CLASSES, entailments
from repkit.data.scene_statements import STATEMENT_CLASSES, statements


class ClassTask(NamedTuple):
    """A task: composes its examples from strokes, names its classes, and says how many pictures an example has."""

    compose: Callable[..., Iterator[ClassExample]]
    class_names: tuple[str, ...]
    pictures: int


CLASS_TASKS: Mapping[str, ClassTask] = {
    "statements": ClassTask(statements, STATEMENT_CLASSES, 2),
    "assignment": ClassTask(assignments, ASSIGNMENT_CLASSES, 2),
    "entailment": ClassTask(entailments, ENTAILMENT_CLASSES, 1),
}
"""The tasks by their names."""
