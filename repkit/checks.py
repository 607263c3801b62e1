"""Checks of what a caller hands in, made at trace time, with messages that a user can act on.

Every check raises `InputError` (a `ValueError`) whose text says what was expected, what came and, where it is not obvious,
what to do. The command line turns an `InputError` into one line and exit code 2.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the caller handed in cannot be used; the message says what, and what would be right."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> InputError:
    """The error for a name that is not among the valid ones; it offers the nearest.

    >>> print(unknown_name("loss", "info_nse", ["info_nce", "gamma_contrastive"]))
    unknown loss 'info_nse'; did you mean 'info_nce'? Valid: gamma_contrastive, info_nce
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return InputError(f"unknown {kind} '{name}'; {hint}Valid: {', '.join(names)}")
