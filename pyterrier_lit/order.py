"""Permutations of the positions in a list: parsed from text, completed, converted to scores. This module does not deal
with passages or models."""

import re
from collections.abc import Iterable


def complete(positions: Iterable[int], n: int) -> list[int]:
    """A permutation of 0..n-1: the given positions without repetitions, then the missing positions in ascending order.

    Positions outside 0..n-1 are ignored.
    """
    return list(dict.fromkeys([position for position in positions if 0 <= position < n] + list(range(n))))


def parse(text: str, n: int) -> list[int]:
    """Parse a text of identifiers, which count from 1, into a permutation of 0..n-1.

    With n = 4, both "3 1 3" and "[3] > [1]" become [2, 0, 1, 3]. Each sequence of the digits 0-9 is an identifier, and
    all other characters separate identifiers, as in LiT5's original code. Repeated, invalid and missing identifiers are
    treated as in `complete`.
    """
    numbers = [
        int(digits) for digits in re.findall(r"[0-9]+", text) if len(digits) < 19
    ]  # Python's int refuses thousands of digits
    return complete([number - 1 for number in numbers], n)


def scores(order: list[int]) -> list[float]:
    """The scores of the positions 0, 1, ... n-1. The first position in `order` has the score n, the second has n - 1,
    and the last has 1.

    order: a permutation of 0..n-1, best first.
    """
    by_position = [0.0] * len(order)
    for rank, position in enumerate(order):
        by_position[position] = float(len(order) - rank)
    return by_position
