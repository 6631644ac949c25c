"""Sliding windows over rankings, bottom to top, all queries in parallel. Knows positions only: no text, no model."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple


class Span(NamedTuple):
    """Positions start..stop-1 of a ranking. Only the first `top` of their new order are needed; the rest may stay as
    they are."""

    start: int
    stop: int
    top: int


class Window(NamedTuple):
    """A window to order: the index of its query, the indices of its passages in that query's list, and how many ranks
    of their new order are needed."""

    query: int
    passages: list[int]
    top: int


def sliding_windows(n: int, size: int, stride: int, k: int | None = None) -> list[Span]:
    """The windows of one pass over n positions, from bottom to top. The top window is shorter if the strides do not end
    exactly at the top.

    k: how many final ranks are needed; None is all. Of a window's new order, only the ranks that the next window
    includes (the first len - stride) and those among the final k are then needed.
    """
    if not 1 <= stride <= size:
        raise ValueError(f"window_size={size!r} with stride={stride!r}; wanted 1 <= stride <= window_size")
    if k is not None and k < 1:
        raise ValueError(f"top_k={k!r}; wanted None or a positive number")
    spans, stop = [], n
    while stop > 0:
        start, length = max(stop - size, 0), min(size, stop)
        top = length if k is None else min(length, max(length - stride if start else 0, k - start))
        spans.append(Span(start, stop, top))
        if start == 0:
            break
        stop -= stride
    return spans


def slide(
    counts: Sequence[int],
    size: int,
    stride: int,
    order_windows: Callable[[list[Window]], list[list[int]]],
    *,
    passes: int = 1,
    k: int | None = None,
) -> list[list[int]]:
    """Order the lists of all queries by sliding windows. Round r orders the r-th window of every query that has one.

    counts: passages per query. order_windows: the windows of a round -> for each a permutation of its positions, best
    first. passes: how often the windows slide over each list; only the last pass may stop at rank k.

    Returns for each query the indices of its passages, best first.
    """
    if passes < 1:
        raise ValueError(f"passes={passes!r}; wanted a positive number")
    rankings = [list(range(n)) for n in counts]
    cutoffs = [k if sweep == passes - 1 else None for sweep in range(passes)]
    schedules = [[span for cutoff in cutoffs for span in sliding_windows(n, size, stride, cutoff)] for n in counts]
    for spans in zip_longest(*schedules):
        active = [(query, span) for query, span in enumerate(spans) if span is not None]
        windows = [Window(query, rankings[query][span.start : span.stop], span.top) for query, span in active]
        for window, (query, span), order in zip(windows, active, order_windows(windows), strict=True):
            rankings[query][span.start : span.stop] = [window.passages[position] for position in order]
    return rankings
