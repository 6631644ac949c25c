"""Draft and verify on real networks: the order of one token per pass, except for near ties, in fewer passes."""

import copy
import random
from itertools import chain

import pytest
from conftest import PE_RANK, ROOT, T5, T5_TRAINED, TINY
from pe import quietly

from pyterrier_lit import LiT5Distill, PERank, lit5_distill, pe_rank
from pyterrier_lit.decoding import in_turn
from pyterrier_lit.models.t5 import PieceReader
from pyterrier_lit.models.vector_lm import VectorReader

# Another kernel may swap two logits if their difference, divided by the range of all logits, is at most this
NEAR = {"float32": 1e-5, "bfloat16": 2e-2}
FREE = (1.0,) * 4  # costs of passes over 1 to 4 tokens: further tokens cost nothing
LINES = (ROOT / "experiments" / "python_docs" / "queries.tsv").read_text(encoding="utf-8").splitlines()
QUERIES = [line.split("\t")[1] for line in LINES]


class Watched:
    """Wraps a reader. Records its logits, and the number of tokens of each pass."""

    def __init__(self, reader, costs):
        self.reader, self.device, self.fixed = reader, reader.device, costs
        self.logits, self.widths, self.kept = [], [], []

    @property
    def costs(self):
        return self.reader.costs if self.fixed is None else self.fixed

    def start(self):
        self.logits.append(self.reader.start())
        return self.logits[-1]

    def read(self, tokens):
        self.widths.append(tokens.shape[1])
        logits = self.reader.read(tokens)
        self.logits += logits.unbind(1)
        return logits

    def keep(self, counts):
        self.kept.append(counts)
        self.reader.keep(counts)


class Twice:
    """Replaces `in_turn`: decodes with drafts, and compares the order with that of one token per pass.

    costs: the costs of passes. None is the reader's own costs. With FREE, each draft is as long as possible.
    """

    def __init__(self, dtype, costs):
        self.near, self.costs = NEAR[dtype], costs
        self.passes, self.alone, self.rows, self.differ, self.uneven = 0, 0, 0, 0, False

    def __call__(self, reader, words, counts, tops):
        alone, drafted = Watched(copy.deepcopy(reader), FREE[:1]), Watched(reader, self.costs)
        expected, _ = in_turn(alone, words, counts, tops)
        orders, broken = in_turn(drafted, words, counts, tops)
        assert not any(broken) and set(alone.widths) <= {1}
        for row, (left, right) in enumerate(zip(expected, orders, strict=True)):
            assert len(set(right)) == len(right) == len(left)
            if left != right:
                spelt = [list(chain.from_iterable(words[candidate] for candidate in order)) for order in (left, right)]
                step, (a, b) = next((i, pair) for i, pair in enumerate(zip(*spelt, strict=False)) if len(set(pair)) > 1)
                logits = alone.logits[step][row].float()
                assert (logits[a] - logits[b]).abs() <= self.near * (logits.max() - logits.min())
                self.differ += 1
        self.passes, self.alone = self.passes + len(drafted.widths), self.alone + len(alone.widths)
        self.rows = max(self.rows, len(counts))
        self.uneven = self.uneven or any(len(set(filter(None, counts))) > 1 for counts in drafted.kept)
        return orders, broken


CASES = {
    "T5 random, one window": lambda **more: LiT5Distill(str(T5), window_size=100, **more),
    "T5 random, sliding": lambda **more: LiT5Distill(str(T5), window_size=20, **more),
    "T5 trained, one window": lambda **more: LiT5Distill(str(T5_TRAINED), window_size=100, **more),
    "tiny LiT5, one window": lambda **more: LiT5Distill(str(TINY / "lit5-distill"), window_size=100, **more),
    "tiny LiT5, sliding": lambda **more: LiT5Distill(str(TINY / "lit5-distill"), window_size=20, **more),
    "PE-Rank random": lambda **more: PERank(str(PE_RANK), **more),
    "tiny PE-Rank": lambda **more: PERank(str(TINY / "pe-rank"), **more),
    "tiny PE-Rank, top 10": lambda **more: PERank(str(TINY / "pe-rank"), top_k=10, **more),
}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(
    "case, costs", [*((case, FREE) for case in CASES), *((case, None) for case in CASES if "tiny" in case)]
)
def test_drafts_give_the_order_of_one_token_a_pass(case, dtype, costs, monkeypatch):
    """Three queries of 100, 45 and 7 passages in one batch."""
    twice = Twice(dtype, costs)
    for module in (lit5_distill, pe_rank):
        monkeypatch.setattr(module, "in_turn", twice)
    chance = random.Random(0)
    lists = [[" ".join(chance.sample(QUERIES, 2)) for _ in range(n)] for n in (100, 45, 7)]
    quietly(CASES[case](device="cpu", dtype=dtype, max_tokens=10**6).order, QUERIES[:3], lists)
    assert twice.rows == 3 and twice.uneven
    assert twice.passes * (1.1 if "random" in case or costs is None else 1.3) < twice.alone
    assert twice.differ == 0 if dtype == "float32" else twice.differ <= 3


@pytest.mark.parametrize("network", [PieceReader, VectorReader])
def test_a_pass_that_took_nothing_back_would_change_orders(network, monkeypatch):
    """These readers remove no rejected tokens. The test above would notice that."""
    case = "T5 random, one window" if network is PieceReader else "PE-Rank random"
    monkeypatch.setattr(network, "keep", lambda self, counts: None)
    monkeypatch.setattr(lit5_distill, "in_turn", Twice("float32", FREE))
    monkeypatch.setattr(pe_rank, "in_turn", Twice("float32", FREE))
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        quietly(CASES[case](device="cpu").order, QUERIES[:1], [QUERIES[:20]])
