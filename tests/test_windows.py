"""windows: the schedule of the windows is RankLLM's, for all queries in parallel, with and without a cutoff."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit.windows import Span, slide, sliding_windows

shapes = st.integers(1, 12).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


def spans(*arguments):
    return [(window.start, window.stop) for window in sliding_windows(*arguments)]


def test_the_schedule_is_that_of_the_specification():
    assert spans(100, 20, 10) == [(start, start + 20) for start in range(80, -1, -10)]
    assert spans(95, 20, 10)[-2:] == [(5, 25), (0, 15)]
    assert spans(57, 20, 10) == [(37, 57), (27, 47), (17, 37), (7, 27), (0, 17)]
    assert spans(45, 20, 10) == [(25, 45), (15, 35), (5, 25), (0, 15)]
    assert spans(10, 20, 10) == [(0, 10)]  # the published code of PE-Rank leaves this list unranked
    assert spans(45, 20, 20) == [(25, 45), (5, 25), (0, 5)]
    assert spans(100, 100, 50) == [(0, 100)]
    assert spans(0, 20, 10) == []


@pytest.mark.parametrize("size, stride", [(5, 0), (5, 6), (0, 0), (5, -1)])
def test_strides_that_skip_passages_or_stand_still_are_refused(size, stride):
    with pytest.raises(ValueError, match=f"window_size={size} with stride={stride}"):
        sliding_windows(10, size, stride)


def test_a_cutoff_below_one_is_refused():
    with pytest.raises(ValueError, match="top_k=0"):
        sliding_windows(10, 5, 2, 0)


def test_a_cutoff_asks_for_what_the_next_window_reads_and_for_its_own_ranks():
    assert sliding_windows(40, 20, 10, 5) == [Span(20, 40, 10), Span(10, 30, 10), Span(0, 20, 5)]
    assert sliding_windows(40, 20, 10, 15)[-2:] == [Span(10, 30, 10), Span(0, 20, 15)]
    assert sliding_windows(40, 20, 20, 25) == [Span(20, 40, 5), Span(0, 20, 20)]


def by_value(values, wanted_only):
    """A function that orders windows by `values`. With `wanted_only`, it orders only the ranks that are needed."""

    def order(tasks):
        orders = []
        for task in tasks:
            best = sorted(range(len(task.passages)), key=lambda position: values[task.query][task.passages[position]])
            head = best[: task.top] if wanted_only else best
            orders.append(head + [position for position in range(len(best)) if position not in head])
        return orders

    return order


lists = st.lists(st.integers(0, 40).flatmap(lambda n: st.permutations(range(n))), max_size=4)


@given(lists, shapes, st.integers(1, 3))
def test_every_list_stays_a_permutation_and_queries_do_not_meet(values, shape, passes):
    together = slide([len(value) for value in values], *shape, by_value(values, False), passes=passes)
    for ranking, value in zip(together, values, strict=True):
        assert sorted(ranking) == list(range(len(value)))
        assert [ranking] == slide([len(value)], *shape, by_value([value], False), passes=passes)


@given(lists, shapes, st.integers(1, 3), st.integers(1, 45))
def test_a_cutoff_leaves_the_first_k_as_they_are(values, shape, passes, k):
    counts = [len(value) for value in values]
    full = slide(counts, *shape, by_value(values, False), passes=passes)
    short = slide(counts, *shape, by_value(values, True), passes=passes, k=k)
    assert [ranking[:k] for ranking in short] == [ranking[:k] for ranking in full]
    assert [sorted(ranking) for ranking in short] == [sorted(ranking) for ranking in full]


def test_round_r_holds_the_rth_window_of_every_query():
    rounds = []

    def order(tasks):
        rounds.append([(task.query, len(task.passages)) for task in tasks])
        return [list(range(len(task.passages))) for task in tasks]

    slide([25, 0, 8, 40], 20, 10, order)
    assert rounds == [[(0, 20), (2, 8), (3, 20)], [(0, 15), (3, 20)], [(3, 20)]]
