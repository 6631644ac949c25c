"""Compares LiT5-Distill's order from the first decoder step with its full order, before and after training.

    python experiments/first_step.py [--output FOLDER] [--share 1.0] [--record]

The full order is decoded identifier by identifier. The order from the first step sorts the passages by the probability
that their identifiers are generated first (`decoding="first"`).

Two students begin as tiny/lit5-distill and are trained with the recipe `lit5-distill-first`, with different learning
rates. The teacher is tiny/lit5-distill itself. The students learn the teacher's full orders of BM25's first 20
passages, for queries that tiny/make.py generates. The student with the higher nDCG@10 on the development questions is
chosen. On the test questions, the full order of tiny/lit5-distill is compared with two orders from the first step: that
of tiny/lit5-distill and that of the chosen student. The students are kept in FOLDER. A second call does not train them
again.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import corpora
import first_stages
import measured
import pandas as pd
import pyterrier as pt
import torch
from ir_measures import nDCG

sys.path.append(str(Path(__file__).parent / "tiny"))
from make import GENTLE, SEED, questions

from pyterrier_lit import LiT5Distill
from pyterrier_lit.training import Distil

QUESTION = "What does one decoder step cost LiT5-Distill, and what does training for it change?"
TINY = str(Path(__file__).parent / "tiny" / "lit5-distill")
QUERIES, WINDOW, DEPTH = 320, 20, 100  # number of training queries; passages of each; passages to rerank
RATES, STEPS = (1e-5, 1e-4), 40
LEARNING = GENTLE | {
    "decay": 0.5, "clip": 1.0, "warmup": 5, "batch_size": 8, "micro_batch": 8, "precision": "float32", "verbose": False,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "first_step")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training steps, for a short trial")
    measured.add_option(parser)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = learned(arguments.output, int(STEPS * arguments.share))
    collection = corpora.load("python-docs")
    developed = {}
    for rate in RATES:
        student = {"": LiT5Distill(str(arguments.output / f"{rate}"), decoding="first")}
        quality, _ = compared(student, collection, "dev-")
        developed[rate] = quality["value"]
        rows.append(quality | {"setting": f"first step, trained at {rate:g}, development questions"})
    best = str(arguments.output / f"{max(RATES, key=lambda rate: developed[rate])}")
    ways = {
        "in full": LiT5Distill(TINY),
        "first step, untrained": LiT5Distill(TINY, decoding="first"),
        "first step, trained": LiT5Distill(best, decoding="first"),
    }
    rows += compared(ways, collection, "test-")
    for row in rows:
        print(f"{row['setting']:70} {row['measure']:16} {row['value']:9.4f} {row.get('p') or ''}")
    if arguments.record:
        measured.record(QUESTION, rows)


def found(collection: corpora.Collection, topics: pd.DataFrame, depth: int) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        bm25 = first_stages.bm25(collection, Path(folder) / "index.pisa", depth, overwrite=True)
        return (bm25 % depth >> collection.text_loader())(topics)


def learned(output: Path, steps: int) -> list[dict[str, Any]]:
    """Train a student at each learning rate for which the folder has no student. Returns rows of measured.csv: the CPU
    seconds that the teacher's ranking takes, and those of each training."""
    rows: list[dict[str, Any]] = []
    missing = [rate for rate in RATES if not (output / f"{rate}").exists()]
    if not missing:
        return rows
    collection = corpora.load("python-docs")
    asked = questions(pd.DataFrame(collection.get_corpus_iter()))[:QUERIES]
    candidates = found(collection, pd.DataFrame({"qid": map(str, range(len(asked))), "query": asked}), WINDOW)
    started = time.process_time()
    taught = LiT5Distill(TINY, device="cpu")(candidates)
    setting = f"the orders of {QUERIES} queries"
    rows.append({"setting": setting, "measure": "CPU seconds", "value": time.process_time() - started})
    for rate in missing:
        student, started = LiT5Distill(TINY, decoding="first", device="cpu"), time.process_time()
        settings = LEARNING | {"learning_rate": rate, "steps": steps}
        Distil(student, taught, recipe="lit5-distill-first", **settings).fit(candidates)
        student.save(output / f"{rate}")
        setting = f"trained at {rate:g}, {steps} steps of {settings['batch_size']} windows, seed {SEED}"
        rows.append({"setting": setting, "measure": "CPU seconds", "value": time.process_time() - started})
    return rows


def compared(ways: dict[str, LiT5Distill], collection: corpora.Collection, part: str) -> list[dict[str, Any]]:
    """Rows of measured.csv for each reranker: its nDCG@10 over BM25's first 100 passages, with the p-value against the
    first reranker, and its CPU seconds per query.

    part: the beginning of the questions' qids, "dev-" or "test-".
    """
    topics = collection.get_topics(part)
    candidates = found(collection, topics, DEPTH)
    runs, rows = [], []
    for name, reranker in ways.items():
        reranker(candidates.head(5))  # so that loading the weights does not count
        started = time.process_time()
        runs.append(reranker(candidates))
        seconds = (time.process_time() - started) / len(topics)
        rows.append({"setting": name, "n": len(topics), "measure": "CPU seconds a query", "value": seconds})
    baseline = 0 if len(ways) > 1 else None
    table = pt.Experiment(runs, topics, collection.get_qrels(part), [nDCG @ 10], names=list(ways), baseline=baseline)
    return [*measured.from_experiment(table, len(topics), [nDCG @ 10]), *rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
