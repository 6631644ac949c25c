"""Sliding windows over rankings, bottom to top, all queries in parallel. This module deals with positions, not with
texts or models."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple


class Span(NamedTuple):
    """The positions of a window in a ranking: start, start + 1, ... stop - 1."""

    start: int
    stop: int
    top: int  # how many ranks of the window's new order are needed; the other passages may keep their order


class Window(NamedTuple):
    """The passages of one query that are ordered together."""

    query: int  # the index of the query
    passages: list[int]  # the indices of the window's passages in the list of the query
    top: int  # how many ranks of the window's new order are needed


def sliding_windows(n: int, size: int, stride: int, k: int | None = None) -> list[Span]:
    """The windows of one pass over a list of n positions, from bottom to top.

    Args:
        n: the number of passages in the list.
        size: number of passages per window. The last window, at the top, is shorter if the strides do not end exactly
            at the top of the list.
        stride: number of passages by which the window moves up the list.
        k: how many ranks of the final order are needed; None is all ranks. With k, a window orders only the ranks that
            are still needed. The next window needs all ranks except the last `stride`. The final order needs the first
            k positions of the list. With size=20, stride=10 and k=5, the window at the top must order 5 ranks, and each
            other window 10.

    Raises ValueError if the stride is not between 1 and `size`, or if k is less than 1.
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
    """Order the lists of all queries by sliding windows. Returns for each query the indices of its passages, best
    first.

    Round r orders the r-th window of each query that has at least r windows.

    Args:
        counts: the number of passages of each query.
        size: number of passages per window.
        stride: number of passages by which the window moves up the list.
        order_windows: a function that is called once per round. It takes the list of windows of this round, and returns
            for each window a permutation of the positions in the window (from 0), best first.
        passes: number of times that the windows slide over each list.
        k: how many ranks of the final order are needed; None is all ranks. Only the last pass uses k.

    Raises ValueError if `passes` is less than 1, and the same errors as `sliding_windows`.
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
