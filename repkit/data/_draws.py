"""Random numbers by position: whatever is random about an example follows from the seed and its position alone."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

NUMBERS_PER_COUNT = 4
"""Numbers that a Philox generator makes at each count of its counter."""

# What random numbers are drawn for; each purpose has a stream of its own.
_SHUFFLE, TEXT_CHOICE, IMAGE_AUGMENTATION, TEXT_AUGMENTATION = range(4)


def shuffled_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Eight bytes an example; Grain's shuffle needs no table, but milliseconds an index for a small source."""
    return np.random.default_rng([seed, _SHUFFLE, epoch]).permutation(examples)


def generator_at(seed: int, purpose: int, position: int, draws: int) -> np.random.Generator:
    """The generator that stands before the numbers of a position, of which there are `draws` for each."""
    counter = position * draws // NUMBERS_PER_COUNT
    key = np.random.SeedSequence([seed, purpose]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def drawn_texts(groups: Sequence[Sequence[str]], seed: int, position: int) -> list[str]:
    """One text of each group, the first of which stands at a position; of an empty group the empty text."""
    if all(len(group) <= 1 for group in groups):
        return first_texts(groups)
    draws = generator_at(seed, TEXT_CHOICE, position, NUMBERS_PER_COUNT).random((len(groups), NUMBERS_PER_COUNT))
    return [group[int(draw * len(group))] if group else "" for group, draw in zip(groups, draws[:, 0], strict=True)]


def first_texts(groups: Sequence[Sequence[str]]) -> list[str]:
    """The first text of each group; of an empty group the empty text."""
    return [group[0] if group else "" for group in groups]


def commonest_texts(groups: Sequence[Sequence[str]]) -> list[str]:
    """The most frequent text of each group, the first of those that are; of an empty group the empty text.

    >>> commonest_texts([["a", "b", "b"], ["c", "d"], []])
    ['b', 'c', '']
    """
    # Counter keeps the order in which texts came, and the sort behind most_common is stable.
    return [Counter(group).most_common(1)[0][0] if group else "" for group in groups]
