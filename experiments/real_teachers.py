"""Trains small rerankers on all-MiniLM-L6-v2's cosines, and then on 43 rankings of a large language model.

    python experiments/real_teachers.py [--output FOLDER] [--share 1.0]

There are two kinds of students: cross-encoders that begin with MiniLM's weights, and a small LiT5-Distill
(`tiny/lit5.py`). The students are trained in two steps:

* First, they learn MiniLM's cosines. The queries are those of WikiQA, TREC QA and DL22, and sentences of passages.
  LiT5-Distill also learns from the queries of DL19.
* Then, they learn RankVicuna's rankings of BM25's first 100 passages for DL19. One cross-encoder learns DL19's labels
  instead of these rankings.

For comparison, another cross-encoder learns only the rankings. The students are tested on DL21 and Vaswani, whose
queries and judgements they have not seen. The script needs ../shared/data, and writes table.csv and the students to
FOLDER.
"""

import argparse
import functools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import encoders
import measured
import pandas as pd
import pyterrier as pt
import torch
from ir_measures import RR, nDCG
from papers import SHARED

sys.path += [str(Path(__file__).parent / "tiny"), str(SHARED)]
import load as shared
from make import GENTLE, Material, encode, lit5_distill, question

from pyterrier_lit import CrossEncoder, LiT5Distill
from pyterrier_lit.reranker import Reranker
from pyterrier_lit.training import Distil, FineTune

SEED = 42
DEPTH = 100
MEASURES = [nDCG @ 10, RR @ 10]
TEACHER = str(SHARED / "dl19" / "teachers" / "rankvicuna7b.bm25.k100.r1.txt.gz")
LEARNING = {"batch_size": 8, "micro_batch": 8, "schedule": "cosine", "precision": "bfloat16", "seed": SEED}
COSINES = {"loss": "kl", "loss_options": {"temperature": 0.05}, "n_passages": 8, "learning_rate": 1e-4, "warmup": 50}
RANKINGS = {"n_passages": 16, "sampling": "log_random", "warmup": 20}
PIECES = 10_000  # size of LiT5Distill's vocabulary
SENTENCES = 30_000  # number of passages from which a query is made, for LiT5Distill
KINDS = {"CrossEncoder": functools.partial(CrossEncoder, dtype="bfloat16"), "LiT5Distill": LiT5Distill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "real_teachers")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training steps, for a short trial")
    measured.add_option(parser)
    arguments = parser.parse_args()
    share, places = arguments.share, {}

    def kept(name: str, learned: Callable[[], Reranker]) -> str:
        place = places[name] = str(arguments.output / name)
        if not Path(place).exists():
            started = time.monotonic()
            student = learned()
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            student.save(place)
        return place

    cosines = kept("CrossEncoder, cosines", lambda: from_cosines(untrained(), share))
    kept("CrossEncoder, cosines, RankVicuna", lambda: from_rankings(CrossEncoder(cosines), 2e-5, share))
    kept("CrossEncoder, cosines, labels", lambda: from_labels(CrossEncoder(cosines), share))
    kept("CrossEncoder, RankVicuna", lambda: from_rankings(untrained(), 5e-5, share))
    orders = kept("LiT5Distill, cosines", lambda: lit5_from_cosines(share))
    kept("LiT5Distill, cosines, RankVicuna", lambda: lit5_from_rankings(LiT5Distill(orders), share))

    students = {name: KINDS[name.partition(",")[0]](place, verbose=True) for name, place in places.items()}
    tables = {collection: tested(students, collection) for collection in ("dl21", "vaswani")}
    pd.concat(tables.values()).to_csv(arguments.output / "table.csv", index=False, float_format="%.4f")
    for collection, table in tables.items():
        question = f"What do 43 rankings of a large language model teach, on {collection}?"
        report(table, question, arguments.record)


def untrained() -> CrossEncoder:
    return CrossEncoder.from_backbone(encoders.minilm(), query_length=24, doc_length=80)


def material(*collections: str, n_sentences: int, asked: Sequence[str] | None = None, bm25: float = 0.0) -> Material:
    """The training data: the passages and queries of the collections, the queries of WikiQA and TREC QA, and queries
    that are made from sentences of passages.

    n_sentences: as in `sentences`. asked: the collections whose queries are used; by default, all. bm25: the weight of
    BM25's scores in the teacher's scores.
    """
    docs = pd.concat([shared.docs(name) for name in collections]).drop_duplicates("docno", ignore_index=True)
    names = ("wikiqa", "trecqa", *(collections if asked is None else asked))
    queries = pd.concat([shared.topics(name)["query"] for name in names])
    drawn = sentences(docs.text.tolist(), n_sentences)
    return Material(Path(encoders.minilm()), docs, [*queries, *drawn], bm25)


def sentences(passages: list[str], n: int, seed: int = SEED) -> list[str]:
    """Queries that are made from sentences of n of the passages. A passage without a sentence of 4 to 20 words gives no
    query."""
    chosen = random.Random(seed)
    drawn = {question(f"\n{text}", chosen, openings=("",)) for text in chosen.sample(passages, n)}
    return sorted(drawn - {None})


def from_cosines(student: CrossEncoder, share: float) -> CrossEncoder:
    candidates = material("dl22", n_sentences=6_000).candidates
    near = candidates[candidates["rank"] < 30].groupby("qid").filter(lambda rows: len(rows) > 7)
    near = near.assign(score=near.teacher)
    Distil(student, near, steps=int(600 * share), **COSINES, **LEARNING).fit(near)
    return student


def from_rankings(student: CrossEncoder, learning_rate: float, share: float) -> CrossEncoder:
    training = Distil(student, TEACHER, steps=int(60 * share), learning_rate=learning_rate, **RANKINGS, **LEARNING)
    training.fit(shared.res("dl19", "run.bm25.txt", DEPTH))
    return student


def from_labels(student: CrossEncoder, share: float) -> CrossEncoder:
    training = FineTune(student, steps=int(60 * share), learning_rate=2e-5, warmup=20, **LEARNING)
    training.fit(shared.res("dl19", "run.bm25.txt", DEPTH), shared.qrels("dl19"))
    return student


def lit5_from_cosines(share: float) -> LiT5Distill:
    with tempfile.TemporaryDirectory() as folder:
        return lit5_distill(material("dl22", "dl19", n_sentences=SENTENCES), Path(folder), share, PIECES)


def lit5_from_rankings(student: LiT5Distill, share: float) -> LiT5Distill:
    Distil(student, TEACHER, decay=0.5, clip=1.0, steps=int(100 * share), **GENTLE).fit(
        shared.res("dl19", "run.bm25.txt", DEPTH)
    )
    return student


def tested(students: dict[str, Reranker], collection: str, folder: Path | None = None) -> pd.DataFrame:
    """Evaluate three kinds of systems over BM25's first 100 passages: BM25 alone, MiniLM as a bi-encoder, and the
    students. The p-values are against BM25, with Holm's correction.

    folder: keeps the runs, which a later call uses again.
    """
    first = pt.Transformer.from_df(shared.res(collection, "run.txt", DEPTH))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    table = pt.Experiment(
        [first, first >> bi_encoder(), *(first >> student for student in students.values())],
        shared.topics(collection),
        shared.qrels(collection),
        MEASURES,
        names=["BM25", "MiniLM, bi-encoder", *students],
        baseline=0,
        correction="holm",
        verbose=False,
        **({"save_dir": str(folder), "save_mode": "reuse"} if folder else {}),
    )
    table.insert(0, "collection", collection)
    return table[["collection", "name", "nDCG@10", "RR@10", "nDCG@10 p-value corrected"]]


def report(table: pd.DataFrame, question: str, record: bool) -> None:
    """Print the table that `tested` returned for one collection. record: also write its values to measured.csv, under
    this question."""
    print(table.to_string(index=False, float_format="{:.3f}".format, na_rep=""), flush=True)
    if record:
        n = len(shared.topics(table["collection"].iloc[0]))
        measured.record(question, measured.from_experiment(table, n, MEASURES))


def bi_encoder() -> pt.Transformer:
    return pt.apply.doc_score(lambda rows: similarity(rows["query"], rows["text"]), batch_size=10_000)


def similarity(queries: pd.Series, passages: pd.Series) -> list[float]:
    """MiniLM's cosine of each query with the passage at the same position."""
    texts = sorted({*queries, *passages})
    vectors, number = encode(Path(encoders.minilm()), texts), {text: i for i, text in enumerate(texts)}
    pairs = torch.tensor([(number[query], number[passage]) for query, passage in zip(queries, passages, strict=True)])
    return (vectors[pairs[:, 0]] * vectors[pairs[:, 1]]).sum(1).tolist()


if __name__ == "__main__":
    main()
