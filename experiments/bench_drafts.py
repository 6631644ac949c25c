"""Compares draft and verify with decoding one token per pass: passes, seconds, equality of orders. Run by hand.

    python experiments/bench_drafts.py [--queries 8] [--only small base costs] [--record]

Draft and verify is speculative decoding without a draft model. A pass is a forward pass of the decoder. The logits of a
pass rank the passages that are not yet in the order. The tokens of the first passages in this ranking are the draft.
The next pass verifies the draft: it keeps the drafted tokens before the first one that constrained greedy decoding
would not choose. There are three benchmarks:

small           the project's small checkpoints on Python's documentation, one query at a time, in float32
base            a decoder of T5-base's size with random weights. It attends to random states of the encoder, as many as
                the prompts of a window have tokens: 12,363 for 100 passages of DL19, or 2,400 for 20 passages. First,
                the decoder follows its own logits. Then, the logits of tiny/lit5-distill replace them, so that drafts
                are right as often as with this trained checkpoint
costs           the time of one pass over 1 to 8 tokens, with the decoder of `base`

The ways to decode take turns, so that other jobs on the machine slow down all ways alike. Each way is measured several
times, and the shortest time counts.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import corpora
import first_stages
import measured
import pandas as pd
import torch

from pyterrier_lit import LiT5Distill, PERank, decoding, lit5_distill, pe_rank
from pyterrier_lit.decoding import Choices
from pyterrier_lit.listwise import ListwiseReranker
from pyterrier_lit.models.t5 import FiD, PieceReader

TINY = Path(__file__).parent / "tiny"
QUESTION = "How many passes and seconds does draft and verify save?"
SMALL = {
    "tiny/lit5-distill, a window of 100": lambda: LiT5Distill(str(TINY / "lit5-distill"), window_size=100),
    "tiny/lit5-distill, windows of 20": lambda: LiT5Distill(str(TINY / "lit5-distill"), window_size=20),
    "tiny/pe-rank, windows of 20": lambda: PERank(str(TINY / "pe-rank")),
    "tiny/pe-rank, windows of 20, top_k=10": lambda: PERank(str(TINY / "pe-rank"), top_k=10),
}
WAYS: dict[str, tuple[float, ...] | None] = {  # way to decode -> the argument `costs` of `Counted`
    "one token a pass": (1.0,),
    "draft and verify": None,
    "drafts of three at each pass": (1.0,) * 4,
}
TOKENS = {100: 12_363, 20: 2_400}  # number of passages in a window -> number of tokens of its prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--only", nargs="+", choices=["small", "base", "costs"], default=["small", "base", "costs"])
    measured.add_option(parser)
    arguments = parser.parse_args()
    frame = candidates(arguments.queries)
    rows = []
    if "small" in arguments.only:
        for name, make in SMALL.items():
            rows += of_reranker(f"{name}, float32", make(), frame, arguments.repeat)
    for dtype in arguments.dtype if set(arguments.only) != {"small"} else []:
        fid = base(dtype)
        if "base" in arguments.only:
            for size in TOKENS:
                rows += of_base_size(fid, size, frame, dtype, arguments.repeat)
        if "costs" in arguments.only:
            rows += [row for size in TOKENS for row in costs(fid, size, dtype)]
    for row in rows:
        print(f"{row['setting']:75} {row['measure']:65} {row['value']:9.3f}")
    if arguments.record:
        measured.record(QUESTION, rows)


def candidates(n: int) -> pd.DataFrame:
    collection = corpora.load("python-docs")
    with tempfile.TemporaryDirectory() as folder:
        bm25 = first_stages.bm25(collection, Path(folder) / "index.pisa", 100, overwrite=True)
        return (bm25 % 100 >> collection.text_loader())(collection.get_topics().iloc[:n])


class Counted:
    """A wrapper of a `decoding.Drafting`. It counts passes and their seconds, and keeps the returned logits, each of
    shape (B, R). B is the number of prompts, and R the number of tokens that may be generated.

    costs: the cost of a pass over 1, 2, ... tokens, relative to a pass over one token. Decoding chooses the length of a
    draft by these costs. By default, the costs are those of the wrapped `Drafting`.
    """

    def __init__(self, reader: decoding.Drafting, costs: tuple[float, ...] | None = None):
        self.reader, self.said, self.device = reader, costs, reader.device
        self.passes, self.seconds, self.logits = 0, 0.0, []

    @property
    def costs(self) -> tuple[float, ...]:
        return self.reader.costs if self.said is None else self.said

    def start(self) -> torch.Tensor:
        self.logits.append(self.reader.start())
        return self.logits[-1]

    def read(self, symbols: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        logits = self.reader.read(symbols)
        self.passes, self.seconds = self.passes + 1, self.seconds + time.perf_counter() - started
        self.logits += logits.unbind(1)
        return logits

    def keep(self, counts: Any) -> None:
        self.reader.keep(counts)


@contextlib.contextmanager
def counted(costs: tuple[float, ...] | None = None) -> Iterator[list[tuple[Counted, Any, Any, Any]]]:
    """In this context, the passes of each call of `in_turn` by LiT5Distill and PERank are counted and timed. The
    context yields a list, which gets a tuple for each call: the reader of the call, wrapped in a `Counted`, and the
    arguments words, counts and tops of the call."""
    readers: list[tuple[Counted, Any, Any, Any]] = []

    def in_turn(reader, words, counts, tops) -> Choices:
        readers.append((Counted(reader, costs), words, counts, tops))
        return decoding.in_turn(*readers[-1])

    for module in (lit5_distill, pe_rank):
        module.in_turn = in_turn
    try:
        yield readers
    finally:
        for module in (lit5_distill, pe_rank):
            module.in_turn = decoding.in_turn


def of_reranker(setting: str, reranker: ListwiseReranker, frame: pd.DataFrame, repeat: int = 1) -> list[dict]:
    lists = [ranking for _, ranking in frame.groupby("qid")]

    def decode(costs):
        with counted(costs) as readers:
            orders = [reranker(ranking).sort_values("rank")["docno"].tolist() for ranking in lists]
        return orders, [reader for reader, *_ in readers]

    return compared(setting, len(lists), decode, WAYS, repeat)


def of_base_size(fid: FiD, size: int, frame: pd.DataFrame, dtype: str, repeat: int) -> list[dict]:
    """The rows of `compared` for one window and a decoder of T5-base's size. The decoder follows its own logits, and
    then those of tiny/lit5-distill, each with and without top_k=10."""
    reranker = LiT5Distill(str(TINY / "lit5-distill"), window_size=size)
    with counted(WAYS["one token a pass"]) as readers:
        reranker(frame[(frame["qid"] == frame["qid"].iloc[0]) & (frame["rank"] < size)])
    ((reader, words, counts, tops),) = readers
    rows = []
    answers = {"an answer of random weights": None, "an answer of tiny/lit5-distill": reader.logits}
    for name, logits in answers.items():
        for top, asked in ((tops, ""), ([10], ", top_k=10")):

            def decode(costs, logits=logits, top=top):
                reader = Counted(Replayed(fid, TOKENS[size], words, logits), costs)
                return decoding.in_turn(reader, words, counts, top)[0], [reader]

            setting = f"T5-base's decoder, a window of {size}{asked}, {name}, {dtype}"
            turns = repeat if size == 100 and not asked else 3 * repeat  # short decodings are repeated more often
            rows += compared(setting, 1, decode, list(WAYS)[:2], turns)
    return rows


class Replayed(PieceReader):
    """A decoder over random encoder states of `tokens` tokens. If `logits` are given, the decoder returns these logits,
    position by position, instead of its own."""

    def __init__(self, fid: FiD, tokens: int, words: Any, logits: list[torch.Tensor] | None):
        states = torch.randn(tokens, fid.network.config.d_model, generator=torch.Generator().manual_seed(0))
        self.fid, self.rows, self.pieces = fid, 1, torch.arange(1 + max(map(max, words)))
        self.memory = fid.memory([[states.to(fid.network.dtype)]], sum(map(len, words)) + 8)
        self.logits = logits

    def _after(self, ids):
        own = super()._after(ids)
        if self.logits is None:
            return own
        (read,) = self.memory.read
        return torch.stack(
            [self.logits[min(place, len(self.logits) - 1)] for place in range(read - ids.shape[1], read)], 1
        )


def compared(setting: str, n: int, decode: Any, ways: Iterable[str], repeat: int) -> list[dict]:
    """Rows of measured.csv with the passes and seconds of each way to decode. Each further way is compared with "one
    token a pass", which must be the first way. The ways take turns.

    decode: a function that takes the argument `costs` of `Counted`, and returns the orders and the `Counted` readers.
    repeat: how often each way is measured.
    """
    with torch.inference_mode():
        turns = [{way: decode(WAYS[way]) for way in ways} for _ in range(repeat)]
    values: dict[str, float] = {}
    plain, *_ = turns[0].values()
    for way, (orders, readers) in turns[0].items():
        values[f"passes, {way}"] = sum(reader.passes for reader in readers)
        values[f"decoder seconds, {way}"] = min(sum(reader.seconds for reader in turn[way][1]) for turn in turns)
        if orders is not plain[0]:
            for what in ("passes", "decoder seconds"):
                values[f"times fewer {what}, {way}"] = values[f"{what}, one token a pass"] / values[f"{what}, {way}"]
            same = [left == right for left, right in zip(plain[0], orders, strict=True)]
            values[f"share of orders that are the same, {way}"] = sum(same) / len(same)
    return [{"setting": setting, "n": n, "measure": measure, "value": value} for measure, value in values.items()]


def costs(fid: FiD, size: int, dtype: str, repeat: int = 4) -> list[dict]:
    """Rows of measured.csv with the milliseconds of one pass over 1, 2, 3, 4, 5 and 8 tokens. Each pass is repeated
    `repeat` times, and the shortest time counts."""
    widths, least = (1, 2, 3, 4, 5, 8), {}
    reader = Replayed(fid, TOKENS[size], [[99]] * 99, None)
    with torch.inference_mode():
        reader.read(torch.zeros(1, 40, dtype=torch.long))
        for _ in range(repeat):
            for width in widths:
                started = time.perf_counter()
                reader.read(torch.zeros(1, width, dtype=torch.long))
                least[width] = min(least.get(width, float("inf")), time.perf_counter() - started)
                reader.keep([0])
    setting = f"T5-base's decoder, a window of {size}, a pass, {dtype}"
    return [
        {"setting": setting, "n": repeat, "measure": f"ms, {width} tokens", "value": 1000 * seconds}
        for width, seconds in least.items()
    ]


def base(dtype: str) -> FiD:
    from bench_work import T5_BASE
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    network = T5ForConditionalGeneration(T5Config(**T5_BASE))
    return FiD(network.to(getattr(torch, dtype)).eval())


if __name__ == "__main__":
    main()
