"""Draft and verify on real networks: the order of one token a pass, in fewer passes; near ties may fall otherwise."""

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

# How near to each other, relative to their range, two logits are that another kernel may put in another order
NEAR = {"float32": 1e-5, "bfloat16": 2e-2}
FREE = (1.0,) * 4  # costs of passes: further tokens for nothing
LINES = (ROOT / "experiments" / "python_docs" / "queries.tsv").read_text(encoding="utf-8").splitlines()
QUERIES = [line.split("\t")[1] for line in LINES]


class Watched:
    """A reader, the logits that it gave and the widths of its passes."""

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
    """`in_turn` with drafts, after a comparison with one token a pass from the same start.

    costs: None leaves the reader's own; with FREE each draft is as long as can be.
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
    """So the test above would see it."""
    case = "T5 random, one window" if network is PieceReader else "PE-Rank random"
    monkeypatch.setattr(network, "keep", lambda self, counts: None)
    monkeypatch.setattr(lit5_distill, "in_turn", Twice("float32", FREE))
    monkeypatch.setattr(pe_rank, "in_turn", Twice("float32", FREE))
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        quietly(CASES[case](device="cpu").order, QUERIES[:1], [QUERIES[:20]])
