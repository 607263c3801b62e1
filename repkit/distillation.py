"""Which layer of a student learns from which layer of a teacher, by which loss: the list of matches, and its terms.

    pairs = match_layers(student_layers, teacher_layers)
    matches = [Match(*pair, losses.attention_map_alignment, options={"variant": "kl"}) for pair in pairs]
    objective = Objective({"answer": task} | layer_terms("attention", matches, weight=10.0))

`required_captures` says what the two models have to give out for it, and `describe` what is going to happen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from repkit.checks import InputError, require_choice, unknown_name
from repkit.objective import Schedule, Term, value_at

# From a group of a model's outputs to the argument of the models' `Capture` that asks for it.
_CAPTURED_BY = {"attention": "maps", "queries": "queries_keys", "keys": "queries_keys", "hidden": "hidden"}
_SIZED_BY = {"attention": "heads", "queries": "heads", "keys": "heads", "hidden": "features"}


@dataclass(frozen=True)
class Match:
    """One layer of the student that learns from one layer of the teacher.

    Attributes:
        student: path of the student's layer, such as "encoder.blocks.0.attention".
        teacher: path of the teacher's layer.
        loss: any function with the signature of `repkit.losses` whose first arguments are the student's arrays, then
            the teacher's.
        takes: the groups of captured outputs that these arrays are from, for each model in this order: `("attention",)`
            for attention maps, `("queries", "keys")`, `("queries",)`, `("keys",)` or `("hidden",)`.
        weight: of this pair beside the others of its list; a number, or a function of the step.
        options: keyword arguments of the loss that are constants, such as `{"variant": "kl"}`.
        keywords: keyword arguments of the loss that are arrays, by path: masks, such as
            `{"query_where": "outputs.masks.decoder", "key_where": "outputs.masks.encoder"}`, or parameters that the
            loss learns, such as `{"mixer": "outputs.learned.mixer"}`.

    Raises:
        InputError: if a model has no such group of outputs.

    Example:
        >>> from repkit import losses
        >>> Match("blocks.0.attention", "blocks.3.attention", losses.attention_map_alignment).inputs
        ('outputs.attention.blocks.0.attention', 'teacher.attention.blocks.3.attention')
    """

    student: str
    teacher: str
    loss: Callable[..., Any]
    takes: tuple[str, ...] = ("attention",)
    weight: float | Schedule = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.takes or isinstance(self.takes, str):
            raise InputError(f"a match takes a tuple of groups of outputs, such as ('attention',); got {self.takes!r}")
        for group in self.takes:
            require_choice("group of captured outputs", group, _CAPTURED_BY)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The paths of the loss's positional arguments."""
        student = (f"outputs.{group}.{self.student}" for group in self.takes)
        return (*student, *(f"teacher.{group}.{self.teacher}" for group in self.takes))


def match_layers(
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    *,
    how: Literal["even", "last"] | Sequence[tuple[str, str]] = "even",
) -> tuple[tuple[str, str], ...]:
    """Pairs of a student's layer and the teacher's layer that it learns from.

    Of Ls and Lt layers, both from the input on and counted from 0, the student's layer i takes the teacher's layer

        "even"   round(i (Lt - 1) / (Ls - 1)): the first takes the first and the last the last; Ls = 1 takes the last
        "last"   Lt - Ls + i: the last ones in their order

    For the last layer alone, as in MiniLM, hand in `student_layers[-1:]`.

    Args:
        student_layers: paths of the student's layers of one kind, in their order.
        teacher_layers: those of the teacher.
        how: "even", "last", or the pairs themselves, (student's path, teacher's path); a path may come more than once.

    Returns:
        The pairs, (student's path, teacher's path).

    Raises:
        InputError: no layers; "last" with fewer layers in the teacher than in the student; a path of an explicit pair
            that is not among the layers, with the nearest that is.

    Example:
        >>> match_layers(["s.0", "s.1"], ["t.0", "t.1", "t.2"])
        (('s.0', 't.0'), ('s.1', 't.2'))
        >>> match_layers(["s.0", "s.1"], ["t.0", "t.1", "t.2"], how="last")
        (('s.0', 't.1'), ('s.1', 't.2'))

    References:
        Which layers are matched when the depths differ is ours; Zhao et al., AAAI 2024, doi 10.1609/aaai.v38i7.28583,
        do not settle it. `round` takes a tie to the even number, as Python's does.
    """
    for side, layers in (("student", student_layers), ("teacher", teacher_layers)):
        if not layers or isinstance(layers, str):
            raise InputError(f"match_layers: expected the paths of at least one layer of the {side}, got {layers!r}")
    ours, theirs = len(student_layers), len(teacher_layers)
    if not isinstance(how, str):
        return _explicit(student_layers, teacher_layers, how)
    require_choice("how", how, ["even", "last"])
    if how == "last":
        if ours > theirs:
            raise InputError(
                f'match_layers: how="last" needs as many layers in the teacher as in the student, got {theirs} for '
                f'{ours}; use how="even" or pairs'
            )
        chosen = range(theirs - ours, theirs)
    else:
        chosen = [theirs - 1] if ours == 1 else [round(i * (theirs - 1) / (ours - 1)) for i in range(ours)]
    return tuple((student, teacher_layers[i]) for student, i in zip(student_layers, chosen, strict=True))


def _explicit(
    student_layers: Sequence[str], teacher_layers: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> tuple[tuple[str, str], ...]:
    if not pairs:
        raise InputError("match_layers: expected at least one pair of layers, got none")
    for student, teacher in pairs:
        if student not in student_layers:
            raise unknown_name("layer of the student", student, student_layers)
        if teacher not in teacher_layers:
            raise unknown_name("layer of the teacher", teacher, teacher_layers)
    return tuple((student, teacher) for student, teacher in pairs)


def layer_terms(name: str, matches: Sequence[Match], *, weight: float | Schedule = 1.0) -> dict[str, Term]:
    """The terms of a list of matches, whose sum is a mean over the pairs of layers:

        weight · 1/n Σ_m weight_m · loss_m        m = 1 ... n

    Args:
        name: what the terms' names begin with; they are `name/student's layer/teacher's layer`.
        matches: the pairs, all of one kind: each kind of loss is a list of its own, with a mean of its own.
        weight: of the mean in the objective; a number, or a function of the step.

    Returns:
        Terms by name, for an `Objective`.

    Raises:
        InputError: no matches, or two of the same pair; or a loss without the argument that a match gives it.

    Example:
        >>> from repkit import losses
        >>> pairs = match_layers(["blocks.0", "blocks.1"], ["blocks.0", "blocks.1", "blocks.2"])
        >>> terms = layer_terms("heads", [Match(*pair, losses.one_to_one_attention) for pair in pairs], weight=3.0)
        >>> {name: term.weight for name, term in terms.items()}
        {'heads/blocks.0/blocks.0': 1.5, 'heads/blocks.1/blocks.2': 1.5}
    """
    if not matches:
        raise InputError(f"'{name}': expected at least one pair of layers, got none")
    terms: dict[str, Term] = {}
    for match in matches:
        term_name = f"{name}/{match.student}/{match.teacher}"
        if term_name in terms:
            raise InputError(f"two matches are called '{term_name}'; give a second loss of a pair a list of its own")
        terms[term_name] = Term(
            match.loss,
            match.inputs,
            keywords=match.keywords,
            options=match.options,
            weight=_product(1 / len(matches), weight, match.weight),
        )
    return terms


def _product(*factors: float | Schedule) -> float | Schedule:
    constant, schedules = 1.0, []
    for factor in factors:
        if callable(factor):
            schedules.append(factor)
        else:
            constant *= factor
    if not schedules:
        return constant

    def scheduled(step: Array) -> Array:
        return constant * jnp.prod(jnp.stack([jnp.asarray(schedule(step)) for schedule in schedules]))

    return scheduled


class RequiredCaptures(NamedTuple):
    """What the models have to give out, as the keyword arguments of `repkit.models.Capture`.

    Attributes:
        student: paths of the student's layers by `maps`, `queries_keys` and `hidden`.
        teacher: those of the teacher's.
    """

    student: dict[str, tuple[str, ...]]
    teacher: dict[str, tuple[str, ...]]


def required_captures(matches: Sequence[Match]) -> RequiredCaptures:
    """The layers that the matches take, and nothing else: `Capture(**required_captures(matches).student)`.

    Example:
        >>> from repkit import losses
        >>> loss = losses.attention_alignment_from_queries_keys
        >>> required_captures([Match("blocks.0.attention", "blocks.3.attention", loss, ("queries", "keys"))]).teacher
        {'maps': (), 'queries_keys': ('blocks.3.attention',), 'hidden': ()}
    """

    def captures(layer: Callable[[Match], str]) -> dict[str, tuple[str, ...]]:
        taken = [(_CAPTURED_BY[group], layer(match)) for match in matches for group in match.takes]
        arguments = dict.fromkeys(_CAPTURED_BY.values())
        return {name: tuple(dict.fromkeys(path for by, path in taken if by == name)) for name in arguments}

    return RequiredCaptures(captures(lambda match: match.student), captures(lambda match: match.teacher))


def describe(
    matches: Sequence[Match],
    *,
    outputs: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
) -> str:
    """A table of the matching, to be read before the training begins.

    Args:
        matches: the pairs of layers.
        outputs: the student's outputs or their shapes, as `jax.eval_shape` of its `forward` gives them; with None their
            sizes are shown as "?".
        teacher: the teacher's outputs or their shapes, or the `arrays` of a cache.

    Returns:
        One line for each match, with a heading: student's layer, teacher's layer, what the loss takes, sizes (heads or
        features, those of the teacher first), the loss with its options, the weight in the list.

    Raises:
        InputError: an output that a match takes is not there; the message names near ones.

    Example:
        >>> from repkit import losses
        >>> match = Match("blocks.0", "blocks.2", losses.attention_map_alignment, options={"variant": "mse"})
        >>> outputs = {"attention": {"blocks.0": jnp.ones((1, 4, 9, 9))}}
        >>> teacher = {"attention": {"blocks.2": jnp.ones((1, 12, 9, 9))}}
        >>> print(describe([match], outputs=outputs, teacher=teacher))
        student   teacher   takes      sizes          loss                                    weight
        blocks.0  blocks.2  attention  12 -> 4 heads  attention_map_alignment(variant='mse')  1
    """
    sources = {name: tree for name, tree in (("outputs", outputs), ("teacher", teacher)) if tree is not None}

    def line(match: Match) -> tuple[str, ...]:
        options = ", ".join(f"{name}={value!r}" for name, value in match.options.items())
        loss = getattr(match.loss, "__name__", str(match.loss))
        weight = "scheduled" if callable(match.weight) else f"{match.weight:g}"
        return (
            match.student,
            match.teacher,
            ", ".join(match.takes),
            _sizes(match, sources),
            f"{loss}({options})",
            weight,
        )

    rows = [("student", "teacher", "takes", "sizes", "loss", "weight"), *map(line, matches)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _sizes(match: Match, sources: Mapping[str, Any]) -> str:
    """Heads or features, teacher -> student, as far as they are known."""
    group = match.takes[0]
    axis = 1 if _SIZED_BY[group] == "heads" else -1
    student, teacher = match.inputs[0], match.inputs[len(match.takes)]
    sizes = [
        str(value_at(sources, path, "describe").shape[axis]) if path.split(".")[0] in sources else "?"
        for path in (teacher, student)
    ]
    return f"{' -> '.join(sizes)} {_SIZED_BY[group]}"
