"""decoding: each row spells its candidates, each once, always the best that is allowed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit.decoding import Speller, at_once, in_turn


def spell(speller, logits):
    """The candidates that each row completes; `logits` is a list of (B, S)."""
    completed = [[] for _ in range(len(logits[0]))]
    for step in logits:
        _, candidates = speller.step(torch.as_tensor(step))
        for row, candidate in enumerate(candidates.tolist()):
            if candidate >= 0:
                completed[row].append(candidate)
    return completed


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 10_000))
def test_passages_as_symbols_come_best_first_each_once(counts, seed):
    logits = torch.rand(8, len(counts), 7, generator=torch.Generator().manual_seed(seed))
    rows = spell(Speller([[symbol] for symbol in range(7)], counts), list(logits))
    for row, n in enumerate(counts):
        left, expected = list(range(n)), []
        for step in range(n):
            expected.append(max(left, key=lambda symbol: logits[step, row, symbol].item()))
            left.remove(expected[-1])
        assert rows[row] == expected


WORDS = [[1], [2], [0, 3], [0, 4], [0, 5, 6]]  # 0 begins three words


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 10_000))
def test_words_of_several_symbols_are_completed_each_once(counts, seed):
    logits = torch.rand(9, len(counts), 7, generator=torch.Generator().manual_seed(seed))
    for row, n in zip(spell(Speller(WORDS, counts), list(logits)), counts, strict=True):
        assert sorted(row) == list(range(n))


def test_a_symbol_is_allowed_only_while_an_unused_word_goes_on_with_it():
    speller = Speller(WORDS, [4])
    best = torch.tensor([[9.0, 1, 2, 7, 6, 8, 8]])  # 5 and 6 spell only the fifth word, which the row may not use
    assert [tuple(map(int, speller.step(best))) for _ in range(6)] == [(0, -1), (3, 2), (0, -1), (4, 3), (2, 1), (1, 0)]
    assert speller.step(best)[1].tolist() == [-1]


def test_of_equal_logits_the_lowest_symbol_wins_as_in_the_references_argmax():
    speller = Speller(WORDS, [5])
    assert [speller.step(torch.zeros(1, 7))[0].item() for _ in range(3)] == [0, 3, 0]


def test_words_that_begin_each_other_are_refused():
    for words in ([[1], [1, 2]], [[1], [1]], [[1], []]):
        with pytest.raises(ValueError, match="told apart"):
            Speller(words, [1])


def test_nan_counts_only_where_a_choice_was_made_from_it():
    speller = Speller([[0], [1], [2]], [2])
    speller.step(torch.tensor([[0.0, 1.0, float("nan")]]))
    assert speller.broken.tolist() == [False]
    speller.step(torch.tensor([[float("nan"), 1.0, 0.0]]))
    assert speller.broken.isnan().tolist() == [True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_told_and_decoding_ends(value):
    """Of two rows the second has such logits: that is told, and the first is decoded as ever."""

    class Reader:
        device = torch.device("cpu")

        def start(self):
            return torch.tensor([[1.0, 3, 2, 0], [value] * 4])

        def read(self, symbols):
            return self.start()[:, None]

    words = [[0], [1], [2], [3]]
    for chosen, broken in (in_turn(Reader(), words, [4, 4], [4, 4]), at_once(Reader(), words, [4, 4])):
        assert chosen[0][:3] == [1, 2, 0] and broken[0] == 0
        assert not math.isfinite(broken[1])
