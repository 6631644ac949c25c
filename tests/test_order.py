"""order: every text is parsed to a permutation, and sorting by the scores of an order gives the same order."""

from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit.order import complete, parse, scores


@given(st.lists(st.integers(-5, 60)), st.integers(0, 50))
def test_complete_is_a_permutation_that_begins_with_the_valid_mentions(positions, n):
    order = complete(positions, n)
    assert sorted(order) == list(range(n))
    mentioned = [position for position in dict.fromkeys(positions) if 0 <= position < n]
    assert order[: len(mentioned)] == mentioned
    assert order[len(mentioned) :] == sorted(order[len(mentioned) :])


@given(st.text(), st.integers(0, 50))
def test_any_text_parses_to_a_permutation(text, n):
    assert sorted(parse(text, n)) == list(range(n))


def test_parse_reads_every_spelling_of_an_order():
    assert parse("3 1 2", 3) == [2, 0, 1]
    assert parse("[3] > [1] > [3]", 4) == [2, 0, 1, 3]
    assert parse("Sure! 2, then 9 and 02.", 3) == [1, 0, 2]
    assert parse("²3٣", 3) == [2, 0, 1]  # only 0-9 are digits
    assert parse("", 2) == [0, 1]
    assert parse("1" * 5_000, 2) == [0, 1]


@given(st.permutations(range(30)))
def test_scores_fall_strictly_along_the_order(order):
    values = scores(order)
    assert sorted(range(len(order)), key=lambda position: -values[position]) == list(order)
    assert len(set(values)) == len(order)
