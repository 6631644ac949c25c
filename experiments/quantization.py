"""Compares the rankings of cross-encoders in int8 with their rankings in float32. Run by hand.

    python experiments/quantization.py [--models tiny MiniLM] [--data dl19 nfcorpus] [--queries 43] [--record]

tiny      the project's small cross-encoder
MiniLM    all-MiniLM-L6-v2 as a cross-encoder (`towers.py`), without any training

The two models rerank BM25's first 100 passages. int8 is calibrated on query-passage pairs of queries that are not
evaluated. The script needs ../shared/data.
"""

import argparse
import sys
import time
from pathlib import Path

import encoders
import measured
import pandas as pd
import pyterrier as pt
import towers
from ir_measures import nDCG
from papers import SHARED

sys.path += [str(SHARED)]
import load as shared

from pyterrier_lit import CrossEncoder

QUESTION = "What does int8 do to the order of a trained cross-encoder?"
TINY = Path(__file__).parent / "tiny" / "cross-encoder"
CALIBRATION = "dl22"  # the collection that calibrates int8 if all queries of a collection are evaluated
DEPTH, TOP = 100, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["tiny", "MiniLM"], default=["tiny", "MiniLM"])
    parser.add_argument("--data", nargs="+", default=["dl19", "nfcorpus"])
    parser.add_argument("--queries", type=int, default=43, help="the number of queries that are evaluated, at most")
    measured.add_option(parser)
    arguments = parser.parse_args()
    for name in arguments.models:
        exact = CrossEncoder(str(TINY), device="cpu") if name == "tiny" else minilm()
        for collection in arguments.data:
            evaluated, others = candidates(collection, arguments.queries)
            rows = compare(exact, exact.quantize(others), evaluated, shared.qrels(collection))
            rows = rows.assign(setting=f"{name}, {collection}", n=evaluated["qid"].nunique())
            print(rows.to_string(index=False, float_format="{:.4f}".format), flush=True)
            if arguments.record:
                measured.record(QUESTION, rows)


def minilm() -> CrossEncoder:
    passages = shared.docs("dl22")["text"].sample(320, random_state=0).tolist()
    return towers.begin(encoders.minilm(), passages, query_length=32, doc_length=128)


def candidates(collection: str, queries: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two frames of BM25's passages: one for the queries that are evaluated, and one for the queries that calibrate
    int8. The second frame has the other queries of the collection. If the collection has no other queries, the second
    frame has the queries of CALIBRATION."""
    found = shared.res(collection, "run.txt", DEPTH)
    qids = found["qid"].drop_duplicates().sample(frac=1, random_state=0)
    evaluated = found[found["qid"].isin(qids[:queries])]
    others = found[~found["qid"].isin(qids[:queries])]
    return evaluated, shared.res(CALIBRATION, "run.bm25.txt", DEPTH) if others.empty else others


def compare(exact: CrossEncoder, int8: CrossEncoder, frame: pd.DataFrame, qrels: pd.DataFrame) -> pd.DataFrame:
    """A row for each measure: measure, value and p. p is the p-value of a paired t-test of nDCG@10 against float32.
    Measures that compare the two orders leave out queries with a single passage."""
    results, seconds = zip(*(timed(reranker, frame) for reranker in (exact, int8)), strict=True)
    topics = frame[["qid", "query"]].drop_duplicates()
    table = pt.Experiment(
        [pt.Transformer.from_df(result) for result in results],
        topics,
        qrels[qrels["qid"].isin(topics["qid"])],
        [nDCG @ TOP],
        names=["float32", "int8"],
        baseline=0,
    )
    both = results[0].merge(results[1], on=["qid", "docno"], suffixes=("", " int8"))
    queries = [ranking for _, ranking in both.groupby("qid") if len(ranking) > 1]
    values = {f"nDCG@{TOP}, {name}": value for name, value in zip(table["name"], table[f"nDCG@{TOP}"], strict=True)}
    taus = [ranking["score"].corr(ranking["score int8"], method="kendall") for ranking in queries]
    values["share of pairs of passages in another order"] = (1 - sum(taus) / len(taus)) / 2
    values[f"passages of the first {TOP} that stay"] = sum(map(stay, queries)) / len(queries)
    values |= {
        f"seconds a query, {name}": each / len(topics) for name, each in zip(table["name"], seconds, strict=True)
    }
    rows = pd.DataFrame({"measure": values.keys(), "value": values.values()})
    rows.loc[rows["measure"] == f"nDCG@{TOP}, int8", "p"] = table[f"nDCG@{TOP} p-value"].iloc[1]
    return rows


def timed(reranker: CrossEncoder, frame: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    reranker(frame.head(20))
    started = time.perf_counter()
    return reranker(frame), time.perf_counter() - started


def stay(ranking: pd.DataFrame) -> int:
    return len(set(ranking.nsmallest(TOP, "rank")["docno"]) & set(ranking.nsmallest(TOP, "rank int8")["docno"]))


if __name__ == "__main__":
    main()
