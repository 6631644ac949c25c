"""What do 43 rankings of a large language model teach a cross-encoder that begins as all-MiniLM-L6-v2?

    python experiments/real_teachers.py [--output FOLDER] [--share 1.0]

A student learns MiniLM's own cosines on WikiQA's, TREC QA's and DL22's queries and on sentences of DL22's passages; then RankVicuna's
orders of DL19's first 100 of BM25, or DL19's labels; others learn these without the cosines before. They are tested on DL21 and
Vaswani, of which no query and no judgement was seen. Needs ../shared/data; writes table.csv and the students to FOLDER.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import corpora
import encoders
import first_stages
import pandas as pd
import pyterrier as pt
import torch
from ir_measures import RR, nDCG
from profiles import SHARED

sys.path += [str(Path(__file__).parent / "tiny"), str(SHARED)]
import load as shared
from make import encode, question

from pyterrier_lit import CrossEncoder
from pyterrier_lit.training import Distil, FineTune

SEED = 42
DEPTH = 100
TEACHER = SHARED / "dl19" / "teachers" / "rankvicuna7b.bm25.k100.r1.txt.gz"
LEARNING = {"batch_size": 8, "at_once": 8, "schedule": "cosine", "precision": "bfloat16", "seed": SEED}
COSINES = {"loss": "kl", "loss_options": {"temperature": 0.05}, "n_passages": 8, "learning_rate": 1e-4, "warmup": 50}
RANKINGS = {"n_passages": 16, "sampling": "log_random", "warmup": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/real_teachers"))
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to try it")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    def kept(name: str, begin: str | None, learn: Callable[[CrossEncoder], None]) -> None:
        """A student that begins as another, or as MiniLM, and learns; nothing is done where it was kept before."""
        if (arguments.output / name).exists():
            return
        student = CrossEncoder(str(arguments.output / begin)) if begin else untrained()
        started = time.monotonic()
        learn(student)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        student.save(arguments.output / name)

    def steps(number: int) -> int:
        return max(2, int(number * arguments.share))

    def from_cosines(student: CrossEncoder) -> None:
        ranked = cosines(arguments.output)
        Distil(student, ranked, steps=steps(600), **COSINES, **LEARNING).fit(ranked)

    def from_rankings(student: CrossEncoder, learning_rate: float) -> None:
        rankings = Distil(student, str(TEACHER), steps=steps(60), learning_rate=learning_rate, **RANKINGS, **LEARNING)
        rankings.fit(shared.res("dl19", "run.bm25.txt", DEPTH))

    def from_labels(student: CrossEncoder) -> None:
        labels = FineTune(student, steps=steps(60), learning_rate=2e-5, warmup=20, **LEARNING)
        labels.fit(shared.res("dl19", "run.bm25.txt", DEPTH), shared.qrels("dl19"))

    kept("cosines", None, from_cosines)
    kept("cosines, then RankVicuna", "cosines", lambda student: from_rankings(student, 2e-5))
    kept("cosines, then labels", "cosines", from_labels)
    kept("RankVicuna alone", None, lambda student: from_rankings(student, 5e-5))
    names = ["cosines", "cosines, then RankVicuna", "cosines, then labels", "RankVicuna alone"]
    students = [CrossEncoder(str(arguments.output / name), dtype="bfloat16", verbose=True) for name in names]
    tables = []
    for source in ("dl21", "vaswani"):
        first = pt.Transformer.from_df(shared.res(source, "run.txt", DEPTH))
        tables.append(
            pt.Experiment(
                [first, first >> bi_encoder(), *(first >> student for student in students)],
                shared.topics(source),
                shared.qrels(source),
                [nDCG @ 10, RR @ 10],
                names=["BM25", "MiniLM, bi-encoder", *names],
                baseline=0,
                correction="holm",
                verbose=False,
            ).assign(collection=source)
        )
    table = pd.concat(tables)[["collection", "name", "nDCG@10", "RR@10", "nDCG@10 p-value corrected"]]
    table.to_csv(arguments.output / "table.csv", index=False, float_format="%.4f")
    print(table.to_string(index=False, float_format="{:.3f}".format, na_rep=""))


def untrained() -> CrossEncoder:
    return CrossEncoder.from_backbone(encoders.minilm(), query_length=24, doc_length=80)


def cosines(folder: Path) -> pd.DataFrame:
    """BM25's first 30 of DL22's passages for other collections' queries and for sentences; scored by MiniLM's cosine."""
    docs, topics = shared.docs("dl22"), shared.topics("dl22")
    pool = corpora.in_memory("dl22", docs, topics, pd.DataFrame(columns=["qid", "docno", "label"]))
    chosen = random.Random(SEED)
    texts = chosen.sample(docs.text.tolist(), 6_000)
    sentences = {question(f"\n{text}", chosen, openings=("",)) for text in texts} - {None}
    others = [shared.topics(name)["query"] for name in ("wikiqa", "trecqa")]
    queries = pd.DataFrame({"query": [*pd.concat(others), *topics["query"], *sorted(sentences)]})
    queries["qid"] = queries.index.map(str)
    asked = queries.assign(query=queries["query"].map(lambda query: re.sub(r"[^\w\s]", " ", query)))
    run = first_stages.bm25(pool, folder / "dl22.pisa", 30)(asked).drop(columns="query").merge(queries, on="qid")
    run = run.merge(docs[["docno", "text"]], on="docno")
    return run.assign(score=similarity(run["query"], run["text"])).groupby("qid").filter(lambda rows: len(rows) > 7)


def similarity(queries: pd.Series, passages: pd.Series) -> list[float]:
    """MiniLM's cosine of each query with its passage."""
    texts = sorted({*queries, *passages})
    vectors, number = encode(Path(encoders.minilm()), texts), {text: i for i, text in enumerate(texts)}
    pairs = torch.tensor([(number[query], number[passage]) for query, passage in zip(queries, passages, strict=True)])
    return torch.cat([(vectors[a] * vectors[b]).sum(1) for a, b in (part.T for part in pairs.split(100_000))]).tolist()


def bi_encoder() -> pt.Transformer:
    return pt.apply.doc_score(lambda rows: similarity(rows["query"], rows["text"]), batch_size=10_000)


if __name__ == "__main__":
    main()
