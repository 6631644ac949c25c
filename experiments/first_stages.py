"""First stages: a stored run, or an index that is built once and whose results are kept."""

import contextlib
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import corpora
import pandas as pd
import pyterrier as pt

from pyterrier_lit.training.data import read_run

# Name of a source -> settings of PISA's BM25 with Porter2 stemming: stop words, k1, b
BM25 = {
    "bm25": ("terrier", 0.9, 0.4),
    "bm25:anserini": ("lucene", 0.9, 0.4),  # as in BEIR's tables; `load` adds `WithoutItself`
    "bm25:terrier": ("terrier", 1.2, 0.75),  # as in TIREx
}


def load(source: str, collection: corpora.Collection, folder: Path, depth: int) -> pt.Transformer:
    """A transformer that returns the first `depth` passages of each topic, without texts. The source is one of these:

    * A name in `BM25`: PISA over the collection, with the settings of this name.
    * "terrier:NAME": BM25 over Terrier's ready-made index of this name. It needs Java.
    * The path of a run file in TREC format.
    * The path of a file of candidates with their texts (.json, .jsonl[.gz]), as the papers' authors publish them.

    folder: keeps the index and the results of BM25. A later call with the same folder uses them again.
    """
    if source in BM25:
        stops, k1, b = BM25[source]
        name = source.replace(":", "-")
        itself = source == "bm25:anserini"
        stage = bm25(collection, folder / f"{name}.pisa", depth + itself, stops=stops, k1=k1, b=b)
        return cached(stage >> WithoutItself() % depth if itself else stage, folder / f"{name}.{depth}.cache")
    if source.startswith("terrier:"):
        terrier = pt.terrier.Retriever.from_dataset(
            source.removeprefix("terrier:"), "terrier_stemmed", wmodel="BM25", num_results=depth
        )
        return cached(pt.rewrite.tokenise() >> terrier >> pt.rewrite.reset(), folder / f"terrier.{depth}.cache")
    return stored(source) % depth


def stored(path: str | Path) -> "Ranking":
    """The ranking in a run file, or in a file of candidates with their texts, in descending order of score. Passages of
    equal score keep the order of the lines. Raises FileNotFoundError if there is no such file."""
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path} is not here; wanted a run in TREC format (qid Q0 docno rank score name), such as the first stage"
            " that the paper's authors publish, or another first stage in papers.py"
        )
    return Ranking(read_run(path).drop(columns="query", errors="ignore"), str(path))


def ranked(topics: pd.DataFrame, teacher: str | pt.Transformer) -> pd.DataFrame:
    """The topics for which a teacher ranks passages. If the teacher is the path of a run file, these are the topics in
    this file. If the teacher is a transformer, these are all topics."""
    if isinstance(teacher, pt.Transformer):
        return topics
    return topics[topics["qid"].isin(read_run(teacher)["qid"])].reset_index(drop=True)


class Ranking(pt.Transformer):
    """Returns stored rows for each topic. The rows come from a run file or from an earlier retrieval.

    The repr of a `Ranking` depends only on its name and its rows. So a sweep finds its stored runs again in a later
    process.
    """

    def __init__(self, rows: pd.DataFrame, name: str):
        self.rows, self.name = pt.Transformer.from_df(rows), name
        self.crc = zlib.crc32(pd.util.hash_pandas_object(rows, index=False).to_numpy().tobytes())

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        return self.rows(inp)

    def __repr__(self) -> str:
        return f"Ranking({self.name!r}, crc={self.crc:08x})"


class WithoutItself(pt.Transformer):
    """Leaves out a document whose id is the query's id, as Anserini's option -removeQuery does. The queries of ArguAna,
    for example, are documents of the collection."""

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        return pt.model.add_ranks(inp[inp["docno"] != inp["qid"]])

    def __repr__(self) -> str:
        return "WithoutItself()"


def bm25(
    collection: corpora.Collection,
    folder: Path,
    depth: int,
    overwrite: bool = False,
    *,
    stops: str = "terrier",
    k1: float = 0.9,
    b: float = 0.4,
) -> pt.Transformer:
    """PISA's BM25 with Porter2 stemming. The index in `folder` is built if it is missing or if `overwrite` is True."""
    from pyterrier_pisa import PisaIndex

    index = PisaIndex(str(folder), text_field="text", stemmer="porter2", stops=stops, overwrite=overwrite)
    with silence():
        if overwrite or not index.built():
            index.index(collection.get_corpus_iter())
        retriever = index.bm25(num_results=depth, k1=k1, b=b)
        retriever.search("warm up")  # PISA computes its score bounds at first use, and prints lines then
    return retriever


def terrier(collection: corpora.Collection, folder: Path, depth: int, overwrite: bool = False) -> pt.Transformer:
    """Terrier's BM25 with k1 = 0.9 and b = 0.4, as by default in `bm25`, but with Porter's first stemmer. The index in
    `folder` is built if it is missing or if `overwrite` is True. Needs Java."""
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    index = pt.terrier.TerrierIndex(str(folder))
    if not index.built():
        index.indexer(meta={"docno": 200}).index(collection.get_corpus_iter())
    return pt.rewrite.tokenise() >> index.bm25(num_results=depth, k1=0.9, b=0.4) >> pt.rewrite.reset()


def cached(stage: pt.Transformer, folder: Path) -> pt.Transformer:
    from pyterrier_caching import RetrieverCache

    return RetrieverCache(str(folder), stage)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress all output of an index, from C++ and from Python."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
