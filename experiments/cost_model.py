"""What a reranking costs at scale: measure each stage once, then count workers and find the bottleneck.

    python experiments/cost_model.py [--model experiments/tiny/cross-encoder] [--queries 1000000] [--passages 100]
        [--rate PAIRS_PER_SECOND] [--workers 2] [--output cost]

Measures on this machine, one thread, with questions and docstrings of Python's documentation (texts cut by the model at 256
pieces): reading and ranking the frame, packing for another process, tokenising, the model. `--rate` is the model's rate as
measured elsewhere, on a GPU, say; the other stages stay measured. With --workers N it also runs `Distributed` on N workers.
"""

import argparse
import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpora
import pandas as pd
import torch

from pyterrier_lit import CrossEncoder
from pyterrier_lit.cross_encoder import DOC_LENGTH, QUERY_LENGTH
from pyterrier_lit.frames import rerank
from pyterrier_lit.scale import Distributed

DAY = 86_400


@dataclass
class Seconds:
    """What one pair of query and passage takes, by stage. The first two are the driver's, the others a worker's."""

    frame: float  # read, check, rank
    packing: float  # pickle and back
    tokenising: float
    model: float
    bytes: float  # that go to a worker

    @property
    def driver(self) -> float:
        return self.frame + self.packing

    @property
    def worker(self) -> float:
        return self.tokenising + self.model


def workers_for(pairs_per_second: float, seconds: Seconds) -> int:
    """How many workers keep up with so many pairs a second."""
    return math.ceil(pairs_per_second * seconds.worker)


def most_workers(seconds: Seconds) -> int:
    """How many workers one driver can feed; beyond it give each driver a part of the queries."""
    return int(seconds.worker / seconds.driver)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "tiny" / "cross-encoder")
    parser.add_argument("--queries", type=int, default=1_000_000, help="a day")
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--rate", type=float, help="pairs a second of the model, measured elsewhere")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("cost"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frame = pairs(10, arguments.passages)
    reranker = CrossEncoder(str(arguments.model), device="cpu")
    seconds = measure(reranker, frame)
    if arguments.rate:
        seconds.model = 1 / arguments.rate
    wanted = arguments.queries * arguments.passages / DAY
    for name, each in asdict(seconds).items():
        print(f"{name:11} {each:8.0f} bytes a pair" if name == "bytes" else f"{name:11} {each * 1e6:8.1f} us a pair")
    print(
        f"one worker  {1 / seconds.worker / arguments.passages:8.2f} queries a second of {arguments.passages} passages"
    )
    print(f"{arguments.queries:,} queries x {arguments.passages} passages a day are {wanted:,.0f} pairs a second:")
    print(f"  {workers_for(wanted, seconds)} workers; one driver feeds up to {most_workers(seconds)};")
    print(f"  {wanted * seconds.bytes / 1e6:.1f} MB a second over the network")
    measured = {"seconds_a_pair": asdict(seconds)}
    if arguments.workers:
        measured["distributed"] = distributed(reranker, frame, arguments.workers)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "cost.json").write_text(json.dumps(measured, indent=1) + "\n")


def pairs(queries: int, passages: int) -> pd.DataFrame:
    """Questions of the Python documentation, each with passages drawn from it."""
    collection = corpora.load("python-docs")
    docs = pd.DataFrame(collection.get_corpus_iter())
    topics = collection.get_topics().head(queries)
    drawn = [
        docs.sample(passages, random_state=i).assign(qid=qid, query=query)
        for i, (qid, query) in enumerate(topics.values)
    ]
    return pd.concat(drawn, ignore_index=True)


def measure(reranker: CrossEncoder, frame: pd.DataFrame) -> Seconds:
    encoder, n = reranker.loaded(), len(frame)
    layout, *_ = reranker._layout(encoder)
    texts, queries = frame.text.tolist(), frame["query"].unique().tolist()
    lists = [ranking.text.tolist() for _, ranking in frame.groupby("qid", sort=False)]

    def tokenise() -> Any:
        return layout.pieces(queries, QUERY_LENGTH), layout.pieces(texts, DOC_LENGTH)

    tokenising = best_of(tokenise)
    return Seconds(
        frame=best_of(lambda: rerank(frame, lambda _, found: [[0.0] * len(ranking) for ranking in found])) / n,
        packing=best_of(lambda: pickle.loads(pickle.dumps((queries, lists)))) / n,
        tokenising=tokenising / n,
        model=(best_of(lambda: reranker.score(queries, lists), times=2) - tokenising) / n,
        bytes=len(pickle.dumps((queries, lists))) / n,
    )


def best_of(function: Callable[[], Any], times: int = 5, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest of some runs; of this process alone by default, whatever else runs on the machine."""
    taken = []
    for _ in range(times):
        start = clock()
        function()
        taken.append(clock() - start)
    return min(taken)


def distributed(reranker: CrossEncoder, frame: pd.DataFrame, workers: int) -> dict[str, float]:
    """Pairs a second alone, on one worker of Ray and on several, without their start."""
    rates = {"alone": len(frame) / best_of(lambda: reranker(frame), times=2, clock=time.perf_counter)}
    for n in (1, workers):
        spread = Distributed(reranker, num_workers=n)
        spread(frame.head(10))
        rates[f"{n} workers"] = len(frame) / best_of(lambda: spread(frame), times=3, clock=time.perf_counter)  # noqa: B023
        spread.close()
    for name, rate in rates.items():
        print(f"{name:11} {rate:8.0f} pairs a second, {rate / rates['alone']:.2f} x alone")
    return rates


if __name__ == "__main__":
    main()
