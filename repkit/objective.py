"""From named loss terms to one scalar and its metrics.

A `Term` says which loss, where its arguments are (dotted paths into the batch, the model's outputs and a teacher's
outputs) and how much it counts; an `Objective` is a dict of terms. Neither knows a model or an optimizer.
"""

import difflib
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from repkit.checks import InputError, unknown_name
from repkit.losses.mesh import over_mesh
from repkit.numerics import AxisName, WeightedMean

Schedule = Callable[[Array], Array]
"""A function from the step to a weight, such as any optax schedule."""


@dataclass(frozen=True)
class Term:
    """One loss of an objective.

    Attributes:
        loss: any function with the signature of `repkit.losses`.
        inputs: the paths of its positional arguments, such as `"outputs.image.embeds"`. A path starts with `batch`,
            `outputs` or `teacher` and follows dictionary keys, which may themselves hold dots:
            `"teacher.attention.encoder.blocks.0.attention"` finds `outputs["attention"]["encoder.blocks.0.attention"]`
            of the teacher.
        keywords: keyword argument to path, for arguments that are arrays, such as
            `{"logit_scale": "outputs.logit_scale"}`.
        options: keyword argument to constant, for hyper-parameters.
        weight: the factor of this term in the total; a number, or a function of the step.
        memory: makes the initial memory of a loss that takes one and returns `(loss, memory)`.
        where: path of the row mask; it must lie in the batch.
        weights: path of the row weights, also in the batch; None weighs every row alike.

    Raises:
        InputError: if the loss has no such argument.

    Example:
        >>> from repkit import losses
        >>> term = Term(
        ...     losses.info_nce,
        ...     inputs=("outputs.image.embeds", "outputs.text.embeds"),
        ...     keywords={"logit_scale": "outputs.logit_scale", "labels": "batch.caption_id"},
        ... )
        >>> term.weight
        1.0
    """

    loss: Callable[..., Any]
    inputs: tuple[str, ...]
    keywords: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float | Schedule = 1.0
    memory: Callable[[], Any] | None = None
    where: str = "batch.where"
    weights: str | None = None

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.loss).parameters
        for name in (*self.keywords, *self.options):
            if name not in parameters:
                raise unknown_name(f"argument of {self.loss.__name__}", name, parameters)
        for path in filter(None, (self.where, self.weights)):
            if not path.startswith("batch."):
                raise InputError(f"where and weights are taken from the batch, got the path '{path}'")


RESERVED_NAMES = frozenset(
    {"loss", "gradient_norm", "learning_rate", "step", "skipped", "skipped_steps", "corrupt_examples"}
)
"""What a row of logged metrics holds beside the terms."""


class Report(NamedTuple):
    """What an evaluation of an objective leaves beside its scalar.

    Attributes:
        memories: the new memories, by term.
        means: each term's sum over this call's rows and the weight it is to be divided by.
        diagnostics: scalars by `term/name`, as the losses with a memory report them.
    """

    memories: dict[str, Any]
    means: dict[str, WeightedMean]
    diagnostics: dict[str, Array]


class Objective:
    """The weighted sum of named terms:  Σ_t weight_t(step) · Σ_i w_i ℓ_ti / Σ_i w_i.

    Each term's random key is folded from the step's key and the term's *name*, so that adding or reordering terms
    leaves the draws of the others as they were.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from repkit import losses
        >>> embeds = jnp.eye(4)
        >>> term = Term(
        ...     losses.info_nce,
        ...     inputs=("outputs.image.embeds", "outputs.text.embeds"),
        ...     keywords={"logit_scale": "outputs.logit_scale"},
        ... )
        >>> objective = Objective({"contrastive": term})
        >>> outputs = {"image": {"embeds": embeds}, "text": {"embeds": embeds}, "logit_scale": jnp.float32(10.0)}
        >>> batch = {"where": jnp.ones(4, bool)}
        >>> scalar, report = objective(batch, outputs, objective.init_memories(), step=0, key=jax.random.key(0))
        >>> print(f"{scalar:.6f}")
        0.000136
    """

    def __init__(self, terms: Mapping[str, Term]):
        if not terms:
            raise InputError("an objective needs at least one term, got none")
        for name in RESERVED_NAMES & terms.keys():
            raise InputError(f"a term cannot be named '{name}': the logs use this name for something else")
        self.terms = dict(terms)

    def init_memories(self) -> dict[str, Any]:
        """The initial memory of every term that keeps one, by term name."""
        return {name: term.memory() for name, term in self.terms.items() if term.memory is not None}

    def only(self, name: str) -> "Objective":
        """The objective that consists of one of the terms."""
        if name not in self.terms:
            raise unknown_name("term", name, self.terms)
        return Objective({name: self.terms[name]})

    def teacher_paths(self) -> tuple[str, ...]:
        """The outputs of the teacher that the terms take, without the leading `teacher.`, each of them once.

        >>> from repkit import losses
        >>> layer = "attention.encoder.blocks.0.attention"
        >>> term = Term(losses.attention_map_alignment, (f"outputs.{layer}", f"teacher.{layer}"))
        >>> Objective({"attention": term}).teacher_paths()
        ('attention.encoder.blocks.0.attention',)
        """
        taken = (path for term in self.terms.values() for path in (*term.inputs, *term.keywords.values()))
        return tuple(dict.fromkeys(path.removeprefix("teacher.") for path in taken if path.startswith("teacher.")))

    def over_mesh(self, mesh: Mesh, axis_name: AxisName) -> "Objective":
        """The objective whose losses between rows are split over axes of a mesh; see `repkit.losses.over_mesh`."""

        def split(term: Term) -> Term:
            if "axis_name" not in inspect.signature(term.loss).parameters:
                return term
            return replace(term, loss=over_mesh(term.loss, mesh, axis_name))

        return Objective({name: split(term) for name, term in self.terms.items()})

    def normalizers(self, batch: Mapping[str, Array], axis_name: AxisName | None = None) -> dict[str, Float[Array, ""]]:
        """The weight Σ_i w_i by which each term's sum is to be divided, over all rows of all devices.

        It depends on the batch alone, so that a batch walked in parts is divided by the weight of the whole.
        """
        sources = {"batch": batch}
        weights = {}
        for name, term in self.terms.items():
            where = value_at(sources, term.where, f"term '{name}'")
            row_weights = None if term.weights is None else value_at(sources, term.weights, f"term '{name}'")
            mean = WeightedMean.of(jnp.zeros(where.shape), where=where, weights=row_weights)
            weights[name] = mean.sum_over(axis_name).weight
        return weights

    def __call__(
        self,
        batch: Mapping[str, Array],
        outputs: Mapping[str, Any],
        memories: Mapping[str, Any],
        *,
        step: Array | int,
        key: Array,
        teacher: Mapping[str, Any] | None = None,
        normalizers: Mapping[str, Array] | None = None,
        axis_name: AxisName | None = None,
    ) -> tuple[Float[Array, ""], Report]:
        """Evaluates every term on these rows.

        Args:
            batch: the rows' inputs; must hold the mask and weights of every term.
            outputs: the model's named outputs for the batch.
            memories: the losses' memories, as `init_memories` or an earlier report gave them.
            step: the training step; it enters the weight schedules.
            key: typed random key of this step, the same on every device.
            teacher: the teacher's named outputs for the batch; no gradient flows into them. None without a teacher.
            normalizers: what `normalizers` gave for the whole batch, when these rows are only a part of it.
            axis_name: the mapped axis when called inside `pmap` or `shard_map` with one device's rows.

        Returns:
            The scalar to differentiate and the `Report`. With an `axis_name` the scalar is *this device's share* of the
            total: differentiate it, then sum gradients over the axis.

        Raises:
            InputError: if a path of a term leads nowhere, or a loss refuses what it finds there.
        """
        normalizers = self.normalizers(batch, axis_name) if normalizers is None else normalizers
        sources = {"batch": batch, "outputs": outputs, "teacher": jax.lax.stop_gradient(dict(teacher or {}))}
        scalar = jnp.zeros((), jnp.float32)
        new_memories, means, diagnostics = {}, {}, {}
        for name, term in self.terms.items():
            values, memory = _evaluate(term, name, sources, memories.get(name), key, axis_name)
            where = value_at(sources, term.where, f"term '{name}'")
            weights = None if term.weights is None else value_at(sources, term.weights, f"term '{name}'")
            mean = WeightedMean(WeightedMean.of(values, where=where, weights=weights).total, normalizers[name])
            scalar = scalar + _weight_at(term, step) * mean.value()
            means[name] = mean
            if memory is not None:
                new_memories[name] = memory
                diagnostics |= {f"{name}/{label}": value for label, value in memory.diagnostics.items()}
        return scalar, Report(new_memories, means, diagnostics)

    def weights_at(self, step: Array | int) -> dict[str, Float[Array, ""]]:
        """Every term's weight at a step."""
        return {name: _weight_at(term, step) for name, term in self.terms.items()}


def _weight_at(term: Term, step: Array | int) -> Array:
    weight = term.weight(jnp.asarray(step)) if callable(term.weight) else term.weight
    return jnp.asarray(weight, jnp.float32)


def _evaluate(
    term: Term, name: str, sources: Mapping[str, Any], memory: Any, key: Array, axis_name: AxisName | None
) -> tuple[Array, Any]:
    parameters = inspect.signature(term.loss).parameters
    arguments = [value_at(sources, path, f"term '{name}'") for path in term.inputs]
    keywords = {argument: value_at(sources, path, f"term '{name}'") for argument, path in term.keywords.items()}
    keywords |= term.options
    if "key" in parameters:
        keywords["key"] = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if "axis_name" in parameters:
        keywords["axis_name"] = axis_name
    if "memory" in parameters:
        keywords["memory"] = memory
    if term.weights is not None:
        # Per-row values come back unweighted; but a loss may also weigh rows against one another inside.
        keywords["weights"] = value_at(sources, term.weights, f"term '{name}'")
    try:
        result = term.loss(
            *arguments, **keywords, where=value_at(sources, term.where, f"term '{name}'"), reduction="none"
        )
    except InputError as error:
        # Many terms may share one loss, so that its own message does not say which of them cannot work.
        raise InputError(f"term '{name}' of {', '.join(term.inputs)}: {error}") from error
    return result if isinstance(result, tuple) else (result, None)


def value_at(sources: Mapping[str, Any], path: str, reader: str) -> Any:
    """What lies at a dotted path through nested dicts, whose keys may hold dots as well.

    Args:
        sources: the nested dicts, by the first part of a path.
        path: such as `"outputs.image.embeds"`. Where keys allow for several readings, the longest key counts first.
        reader: who asks, for the message.

    Raises:
        InputError: nothing is there; the message names near paths.

    Example:
        >>> value_at({"outputs": {"hidden": {"blocks.0": "here"}}}, "outputs.hidden.blocks.0", "term 'hidden'")
        'here'
    """
    found = list(_values_at(sources, path))
    if found:
        return found[0]
    if path.startswith("teacher.") and not sources.get("teacher"):
        raise InputError(
            f"{reader} takes '{path}', but there is no teacher; "
            "give the update one, or the batches the arrays of a teacher's cache"
        )
    known = list(_paths(sources))
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    raise InputError(
        f"{reader}: nothing at the path '{path}'; "
        f"{'near: ' + ', '.join(near) if near else 'there are: ' + ', '.join(known)}"
    )


def _values_at(tree: Any, path: str) -> Iterator[Any]:
    """What the path may mean, as keys can hold dots too: the longest key first."""
    if not path:
        yield tree
    elif isinstance(tree, Mapping):
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            key = ".".join(parts[:count])
            if key in tree:
                yield from _values_at(tree[key], ".".join(parts[count:]))


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
