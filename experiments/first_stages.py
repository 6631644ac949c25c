"""First stages: a stored run, or an index that is made once and asked once. Knows collections, but no reranker."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import corpora
import pyterrier as pt

from pyterrier_lit.training import data


def load(source: str, collection: corpora.Collection, folder: Path, depth: int) -> pt.Transformer:
    """Topics -> the best `depth` of each, without texts.

    source: "bm25" (PISA over the collection, k1 = 0.9, b = 0.4, Porter2: Anserini's settings), "terrier:NAME" (BM25
        over Terrier's ready-made index of that name; needs Java), the path of a run file in TREC format, or that of a
        file of candidates with their texts (.json, .jsonl[.gz]), as the papers' authors publish them.
    folder: keeps index and results; a second call, also of an interrupted sweep, asks nothing again.
    """
    if source == "bm25":
        return cached(bm25(collection, folder / "bm25.pisa", depth), folder / f"bm25.{depth}.cache")
    if source.startswith("terrier:"):
        terrier = pt.terrier.Retriever.from_dataset(
            source.removeprefix("terrier:"), "terrier_stemmed", wmodel="BM25", num_results=depth
        )
        return cached(pt.rewrite.tokenise() >> terrier >> pt.rewrite.reset(), folder / f"terrier.{depth}.cache")
    return stored(source) % depth


def stored(path: str | Path) -> pt.Transformer:
    """The ranking of a run file, in the order of its scores (ties: in the order of its lines), or of a file of
    candidates, whose texts come with it."""
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path} is not here; wanted a run in TREC format (qid Q0 docno rank score name), such as the first stage"
            " that the paper's authors publish, or another first stage in profiles.py"
        )
    if {".json", ".jsonl"} & set(Path(path).suffixes):
        return pt.Transformer.from_df(data.read_run(path).drop(columns="query"))
    return pt.Transformer.from_df(pt.model.add_ranks(pt.io.read_results(str(path))))


def bm25(collection: corpora.Collection, folder: Path, depth: int, overwrite: bool = False) -> pt.Transformer:
    """PISA's BM25 (k1 = 0.9, b = 0.4, Porter2) over an index in `folder`, made where there is none or to overwrite
    it."""
    from pyterrier_pisa import PisaIndex

    index = PisaIndex(str(folder), text_field="text", stemmer="porter2", overwrite=overwrite)
    with silence():
        if overwrite or not index.built():
            index.index(collection.get_corpus_iter())
        retriever = index.bm25(num_results=depth, k1=0.9, b=0.4)
        retriever.search("warm up")  # PISA computes its score bounds on first use, aloud
    return retriever


def cached(stage: pt.Transformer, folder: Path) -> pt.Transformer:
    """A first stage that answers from `folder` what it was asked before."""
    from pyterrier_caching import RetrieverCache

    return RetrieverCache(str(folder), stage)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what an index prints, from C++ and from Python, to itself."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
