"""How a loss over many pairs, or many cells of a map, is computed: in blocks, or as its formula reads."""

from typing import Literal, NamedTuple, TypeAlias, get_args

from repkit.checks import InputError, require_choice, require_range

Exchange: TypeAlias = Literal["ring", "gather"]


class Blocks(NamedTuple):
    """In blocks, with a backward rule of its own: memory of the inputs' size. No forward-mode or second derivatives.

    Attributes:
        size: rows of a block; None chooses from the shape.
        exchange: how the rows of other devices arrive, inside `pmap` and `shard_map`. "ring" passes them from device to
            device and holds those of one other device at a time; "gather" holds all of them, in fewer and larger
            transfers. Losses that exchange no rows ignore it.
    """

    size: int | None = None
    exchange: Exchange = "ring"


Form: TypeAlias = Blocks | Literal["plain"]
"""`Blocks`, or "plain": the formula in JAX's own operations, which every transformation of JAX works on, with
intermediate results of the size of the pair matrix or the maps."""


def require_form(caller: str, form: Form) -> None:
    """Raises `InputError` unless `form` is one of the two."""
    if isinstance(form, Blocks):
        require_range(caller, "form.size", form.size, at_least=1)
        require_choice("form.exchange", form.exchange, get_args(Exchange))
    elif form != "plain":
        raise InputError(f"{caller}: expected form to be losses.Blocks(...) or 'plain', got {form!r}")
