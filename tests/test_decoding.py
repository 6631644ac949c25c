"""decoding: each row names each of its candidates once, and each token is the best that is allowed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit.decoding import Pace, Speller, at_once, in_turn
from pyterrier_lit.models import t5, vector_lm


def spell(speller, logits):
    """Return the candidates that each row completes. `logits` has a tensor (B, S) for each step."""
    completed = [[] for _ in range(len(logits[0]))]
    for step in logits:
        _, candidates = speller.step(torch.as_tensor(step))
        for row, candidate in enumerate(candidates.tolist()):
            if candidate >= 0:
                completed[row].append(candidate)
    return completed


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 10_000))
def test_passages_as_tokens_come_best_first_each_once(counts, seed):
    logits = torch.rand(8, len(counts), 7, generator=torch.Generator().manual_seed(seed))
    rows = spell(Speller([[token] for token in range(7)], counts), list(logits))
    for row, n in enumerate(counts):
        left, expected = list(range(n)), []
        for step in range(n):
            expected.append(max(left, key=lambda token: logits[step, row, token].item()))
            left.remove(expected[-1])
        assert rows[row] == expected


WORDS = [[1], [2], [0, 3], [0, 4], [0, 5, 6]]  # three words begin with 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 10_000))
def test_words_of_several_tokens_are_completed_each_once(counts, seed):
    logits = torch.rand(9, len(counts), 7, generator=torch.Generator().manual_seed(seed))
    for row, n in zip(spell(Speller(WORDS, counts), list(logits)), counts, strict=True):
        assert sorted(row) == list(range(n))


def test_a_token_is_allowed_only_while_an_unused_word_goes_on_with_it():
    speller = Speller(WORDS, [4])
    best = torch.tensor([[9.0, 1, 2, 7, 6, 8, 8]])  # 5 and 6 spell only the fifth word, which the row may not use
    assert [tuple(map(int, speller.step(best))) for _ in range(6)] == [(0, -1), (3, 2), (0, -1), (4, 3), (2, 1), (1, 0)]
    assert speller.step(best)[1].tolist() == [-1]


def test_of_equal_logits_the_lowest_token_wins_as_in_the_references_argmax():
    speller = Speller(WORDS, [5])
    assert [speller.step(torch.zeros(1, 7))[0].item() for _ in range(3)] == [0, 3, 0]


def test_words_that_begin_each_other_are_refused():
    for words in ([[1], [1, 2]], [[1], [1]], [[1], []], [[]]):
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
    """Only the second of two rows has such logits. The first row is decoded as usual."""

    class Reader:
        device = torch.device("cpu")
        costs = (1.0, 1.0)

        def start(self):
            return torch.tensor([[1.0, 3, 2, 0], [value] * 4])

        def read(self, tokens):
            return self.start()[:, None].expand(-1, tokens.shape[1], -1)

        def keep(self, counts):
            pass

    words = [[0], [1], [2], [3]]
    for chosen, broken in (in_turn(Reader(), words, [4, 4], [4, 4]), at_once(Reader(), words, [4, 4])):
        assert chosen[0][:3] == [1, 2, 0] and broken[0] == 0
        assert not math.isfinite(broken[1])


class Moody:
    """A reader with random logits: a part that stays the same, plus `mood` times a part that changes with each token
    read. With mood 0, each draft is right. With a large mood, hardly any draft is right.

    The logits are rounded to multiples of `grain`, so that some logits are equal.
    """

    device = torch.device("cpu")

    def __init__(self, rows, tokens, seed, mood=1.0, grain=0.0, costs=(1.0,) * 8):
        self.has_read = [[] for _ in range(rows)]
        self.tokens, self.seed, self.mood, self.grain, self.costs = tokens, seed, mood, grain, costs
        self.passes = []  # the number of tokens of each pass

    def logits(self, row, has_read):
        stays, mood = (
            torch.rand(self.tokens, generator=torch.Generator().manual_seed(hash((self.seed, row, *more)) % 2**31))
            for more in ((), tuple(has_read))
        )
        logits = stays + self.mood * mood
        return (logits / self.grain).round() * self.grain if self.grain else logits

    def start(self):
        return torch.stack([self.logits(row, has_read) for row, has_read in enumerate(self.has_read)])

    def read(self, tokens):
        self.passes.append(tokens.shape[1])
        after = []
        for at in range(tokens.shape[1]):
            self.has_read = [[*has_read, int(tokens[row, at])] for row, has_read in enumerate(self.has_read)]
            after.append(self.start())
        return torch.stack(after, 1)

    def keep(self, counts):
        back = [self.passes[-1] - count for count in counts]
        assert min(back) >= 0
        self.has_read = [row[: len(row) - each] for row, each in zip(self.has_read, back, strict=True)]


def one_by_one(reader, row, words, n, top):
    """Return the order by its definition: each token is the best one with which an unused candidate continues."""
    order, has_read = [], []
    while len(order) < min(top, n - 1):
        prefix = ()
        while prefix not in words[:n]:
            unused = [words[i] for i in range(n) if i not in order and words[i][: len(prefix)] == prefix]
            logits = reader.logits(row, has_read)
            best = max(sorted({word[len(prefix)] for word in unused}), key=lambda token: logits[token].item())
            prefix, has_read = (*prefix, best), [*has_read, best]
        order.append(words.index(prefix))
    return order


SPELLINGS = {
    "passages": [(i,) for i in range(12)],
    "identifiers": [*((i,) for i in range(1, 6)), *((0, i) for i in range(6, 13))],
    "of one to three": [
        (1,),
        (2,),
        (0, 3),
        (0, 4),
        (0, 5, 6),
        (0, 5, 7),
        (8, 1),
        (8, 2),
        (9,),
        (10,),
        (11, 0),
        (11, 9),
    ],
}


@pytest.mark.parametrize("words", SPELLINGS.values(), ids=SPELLINGS)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.1, 0.5, 5.0]),
    st.sampled_from([0.0, 0.25, 10.0]),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.integers(0, 9),
    st.integers(0, 10_000),
)
def test_drafts_change_nothing_but_the_number_of_passes(words, rows, mood, grain, cost, longest, seed):
    counts, tops = zip(*rows, strict=True)
    reader = Moody(len(rows), 13, seed, mood, grain, tuple(1 + cost * length for length in range(longest + 1)))
    orders, broken = in_turn(reader, words, counts, tops)
    assert orders == [one_by_one(reader, row, words, n, top) for row, (n, top) in enumerate(rows)]
    assert not any(broken)
    assert max(reader.passes, default=1) <= 1 + longest
    tokens = max(sum(len(words[candidate]) for candidate in order) for order in orders)
    assert len(reader.passes) <= max(tokens - 1, 0)


@given(st.integers(0, 10_000))
def test_where_no_draft_is_right_each_pass_still_gives_its_token(seed):
    """The reader reverses the order of its logits after each token, so each draft is wrong."""

    class Contrary(Moody):
        def logits(self, row, has_read):
            return super().logits(row, []) * (-1) ** len(has_read)

    reader, words = Contrary(2, 12, seed, mood=0.0), SPELLINGS["passages"]
    orders, _ = in_turn(reader, words, [12, 9], [12, 12])
    assert orders == [one_by_one(reader, row, words, n, 12) for row, n in enumerate((12, 9))]
    assert len(reader.passes) == 10 and reader.passes[-3:] == [3, 2, 1]  # only tokens that are still needed are drafted


def test_a_reader_that_is_predictable_is_read_in_few_passes():
    reader = Moody(3, 12, seed=1, mood=0.0)
    in_turn(reader, SPELLINGS["passages"], [12, 12, 5], [12, 12, 12])
    assert sum(reader.passes) == 10 and len(reader.passes) == 2
    alone = Moody(3, 12, seed=1, mood=0.0, costs=(1.0,))
    in_turn(alone, SPELLINGS["passages"], [12, 12, 5], [12, 12, 12])
    assert alone.passes == [1] * 10


def test_identifiers_of_two_pieces_are_drafted_by_the_probability_of_both():
    speller = Speller([[1], [2], [0, 3], [0, 4], [0, 5]], [5])
    assert speller.draft(3).tolist() == [[1, 2, 0]]  # before any logits: the incoming order
    tensor = lambda *values: torch.tensor([values]).float()  # noqa: E731
    speller.step(tensor(3.0, 1.5, 2.5, 9, 9, 9))
    assert speller.written.tolist() == [1]
    assert speller.draft(4).tolist() == [[3, 2, 0, 4]]
    speller.step(tensor(9, 9, 9, 0.0, 2.0, 0.1))  # this completes [0, 4]
    assert speller.draft(6).tolist() == [[2, 0, 5, 0, 3, 1]]


@given(st.floats(0.05, 1.0), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=20))
def test_a_draft_is_only_read_where_it_is_expected_to_pay(cost, passes):
    costs = [1 + cost * length for length in range(8)]
    pace = Pace(costs)
    for hits, misses in passes:
        pace.saw(hits, hits + misses)
    share = pace.hits / pace.trials
    gains = [sum(share**k for k in range(m + 1)) / costs[m] for m in range(8)]
    assert gains[pace.length(99)] == pytest.approx(max(gains))
    assert pace.length(2) <= 2 and pace.length(0) == 0


def test_a_reader_that_is_unpredictable_soon_goes_one_token_a_pass():
    for costs in (*t5.COSTS.values(), *vector_lm.COSTS.values()):
        for top in (10, 99):
            spent = 0.0
            for seed in range(20):
                reader = Moody(1, 100, seed, mood=1e6, costs=costs)
                in_turn(reader, [(i,) for i in range(100)], [100], [top])
                spent += sum(costs[tokens - 1] for tokens in reader.passes)
            assert spent < 1.1 * 20 * (top - 1)
