"""Measures the seconds and the memory of each reranker as the number of passages, the number of queries and the length
of the passages grow. Fits the exponent with which the seconds grow. Run by hand.

    python experiments/growth.py [--only passages queries tokens] [--rerankers PERank]
        [--plot pyterrier_lit/pt_docs/growth.svg] [--record]

The rerankers are the project's small checkpoints on Python's documentation, in float32 on one thread. Seconds are CPU
seconds, on which other jobs on the machine have less influence than on wall-clock seconds. Memory is the peak memory of
the process, minus its peak memory after a first small call.
"""

import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import corpora
import measured
import numpy as np
import pandas as pd
import torch

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank

TINY = Path(__file__).parent / "tiny"
QUESTION = "How do seconds and memory grow with passages, queries and lengths?"
SIZES = {
    "passages": (10, 50, 100, 500, 1000, 5000),  # number of passages of one query
    "queries": (1, 4, 16, 64, 256),  # number of queries with 20 passages each
    "tokens": (16, 32, 64, 128),  # approximate number of tokens of each of 100 passages
}
RERANKERS = {
    "CrossEncoder": lambda: CrossEncoder(str(TINY / "cross-encoder"), query_length=32, doc_length=200),
    "LiT5Distill": lambda: LiT5Distill(str(TINY / "lit5-distill"), window_size=100, max_length=512),
    "LiT5Score": lambda: LiT5Score(str(TINY / "lit5-score"), n_passages=5000, max_length=512),
    "PERank": lambda: PERank(str(TINY / "pe-rank")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rerankers", nargs="+", choices=list(RERANKERS), default=list(RERANKERS))
    parser.add_argument("--plot", type=Path, help="draw a chart of the recorded values into this file")
    measured.add_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the processes that measure
    for name in arguments.rerankers:
        for what in arguments.only:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                points = pool.apply(measure, (name, what, SIZES[what]))
            rows = tidy(name, what, points)
            for row in rows:
                print(f"{row['setting']:40} {row['measure']:20} {row['value']:10.3f}", flush=True)
            if arguments.record:
                measured.record(QUESTION, rows)
    if arguments.plot:
        plot(measured.latest(measured.read(QUESTION))).savefig(arguments.plot, bbox_inches="tight")


def measure(name: str, what: str, sizes: tuple[int, ...]) -> list[tuple[int, float, float]]:
    """A tuple (size, CPU seconds, MB) for each of these ascending sizes. MB is the peak memory of the process so far,
    minus its peak memory after a first small call."""
    torch.set_num_threads(1)
    docs = corpora.python_docs()["text"].tolist()
    reranker = RERANKERS[name]()
    reranker(frame(docs, 1, 10, 32))
    before, points = held(), []
    for size in sizes:
        shape = {"passages": (1, size, 64), "queries": (size, 20, 64), "tokens": (1, 100, size)}[what]
        candidates = frame(docs, *shape)
        started = time.process_time()
        reranker(candidates)
        points.append((size, time.process_time() - started, held() - before))
    return points


def frame(docs: list[str], queries: int, passages: int, tokens: int) -> pd.DataFrame:
    """Candidates for this number of queries, with this number of passages per query. The texts differ, and have about
    this many tokens; a word has about 1.6 tokens here."""
    words = " ".join(docs).split()
    length = max(int(tokens / 1.6), 1)
    starts = np.random.default_rng(0).integers(0, len(words) - length, queries * passages)
    texts = [" ".join(words[start : start + length]) for start in starts]
    rows = [
        {"qid": str(query), "query": f"how to wait {query} seconds", "docno": f"{query}.{i}", "score": -i, "rank": i}
        for query in range(queries)
        for i in range(passages)
    ]
    return pd.DataFrame(rows).assign(text=texts)


def held() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tidy(name: str, what: str, points: list[tuple[int, float, float]]) -> list[dict[str, Any]]:
    """Rows of measured.csv: CPU seconds and MB for each size, and an exponent. The seconds grow approximately as the
    size to the power of this exponent, which is fitted to the larger sizes."""
    half = points[len(points) // 2 - 1 :]
    exponent = np.polyfit(np.log([size for size, *_ in half]), np.log([seconds for _, seconds, _ in half]), 1)[0]
    measures = [(size, {"CPU seconds": seconds, "MB more": memory}) for size, seconds, memory in points]
    return [
        {"setting": f"{name}, {what}", "n": size, "measure": measure, "value": value}
        for size, values in measures
        for measure, value in values.items()
    ] + [{"setting": f"{name}, {what}", "n": points[-1][0], "measure": "exponent of seconds", "value": float(exponent)}]


def plot(rows: pd.DataFrame) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(SIZES), figsize=(10, 5.5), sharex="col", sharey="row", layout="constrained")
    for column, what in enumerate(SIZES):
        for name in RERANKERS:
            of = rows[rows["setting"] == f"{name}, {what}"]
            if of.empty:
                continue
            (exponent,) = of.loc[of["measure"] == "exponent of seconds", "value"]
            for line, measure in zip(axes[:, column], ("CPU seconds", "MB more"), strict=True):
                points = of[of["measure"] == measure].sort_values("n")
                label = f"{name}, n^{round(exponent, 2) + 0:.2f}" if measure == "CPU seconds" else None
                line.plot(points["n"], points["value"].clip(lower=1e-2), marker="o", markersize=3, label=label)
        for line in axes[:, column]:
            line.set(xscale="log", yscale="log")
            line.minorticks_off()
            line.set_xticks(SIZES[what], [f"{size:,}" for size in SIZES[what]], fontsize=8)
            line.grid(alpha=0.3)
        axes[0, column].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        axes[1, column].set_xlabel({"passages": "passages of one query", "queries": "queries of 20 passages",
                                    "tokens": "tokens of each of 100 passages"}[what])  # fmt: skip
    axes[0, 0].set_ylabel("CPU seconds")
    axes[1, 0].set_ylabel("MB beyond a small call")
    return figure


if __name__ == "__main__":
    main()
