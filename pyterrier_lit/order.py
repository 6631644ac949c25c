"""Permutations of positions: read from text, completed, turned into scores. Knows no passages and no models."""

import re
from collections.abc import Iterable


def complete(positions: Iterable[int], n: int) -> list[int]:
    """A permutation of 0..n-1: the given positions, each where it is first mentioned, then the rest in order."""
    return list(dict.fromkeys([position for position in positions if 0 <= position < n] + list(range(n))))


def parse(text: str, n: int) -> list[int]:
    """The permutation of 0..n-1 that a text of 1-based identifiers names: "3 1 3" or "[3] > [1]" -> [2, 0, 1, ...].

    Every run of the digits 0-9 is a number and everything else a separator, as in LiT5's clean-up.
    """
    numbers = [
        int(digits) for digits in re.findall(r"[0-9]+", text) if len(digits) < 19
    ]  # Python refuses to read thousands
    return complete([number - 1 for number in numbers], n)


def scores(order: list[int]) -> list[float]:
    """n for the first position of an order, n - 1 for the second, ... 1 for the last; listed by position."""
    by_position = [0.0] * len(order)
    for rank, position in enumerate(order):
        by_position[position] = float(len(order) - rank)
    return by_position
