"""Collections to experiment on: Python's own documentation, a folder of files, or any dataset of ir_datasets."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_lit.training.data import read_qrels, read_run

PYTHON_DOCS = Path(__file__).parent / "python_docs"

TextOf = Callable[[dict[str, Any]], str]


class Collection(pt.datasets.Dataset):
    """Documents, topics, judgements and optionally a run, with the methods of PyTerrier datasets.

    docs: a function without arguments that yields a dict {docno, text} for each document. texts: a function that takes
    docnos and returns a dict {docno: text}. topics: a frame (qid, query). qrels: a frame (qid, docno, label). run: a
    frame (qid, docno, score, rank) with ranks from 0, or None.
    """

    def __init__(
        self,
        name: str,
        docs: Callable[[], Iterable[dict[str, str]]],
        texts: Callable[[Iterable[str]], dict[str, str]],
        topics: pd.DataFrame,
        qrels: pd.DataFrame,
        run: pd.DataFrame | None = None,
    ):
        self.name, self.docs, self.texts, self.topics, self.qrels, self.run = name, docs, texts, topics, qrels, run

    def get_corpus_iter(self, *, verbose: bool = False) -> Iterator[dict[str, str]]:
        return iter(pt.tqdm(self.docs(), desc=self.name, unit="doc") if verbose else self.docs())

    def get_topics(self, variant: str | None = None) -> pd.DataFrame:
        """All topics, or those whose qid begins with `variant`, for example "test-"."""
        return self.topics[self.topics.qid.str.startswith(variant or "")].reset_index(drop=True)

    def get_qrels(self, variant: str | None = None) -> pd.DataFrame:
        return self.qrels[self.qrels.qid.str.startswith(variant or "")].reset_index(drop=True)

    def get_results(self, variant: str | None = None) -> pd.DataFrame:
        if self.run is None:
            raise NotImplementedError(f"{self.name} has no run of its own")
        return self.run.merge(self.get_topics(variant), on="qid")

    def text_loader(self) -> "TextLoader":
        return TextLoader(self)


class TextLoader(pt.Transformer):
    """Adds the column `text` with the text of each `docno`. Raises KeyError if the collection has no document of this
    docno."""

    def __init__(self, collection: Collection):
        self.collection = collection

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        pt.validate.columns(inp, includes=["docno"], context=self)
        if "text" in inp:  # the rows have their texts already
            return inp
        texts = self.collection.texts(inp["docno"].unique())
        unknown = next((docno for docno in inp["docno"] if docno not in texts), None)
        if unknown is not None:
            raise KeyError(f"docno {unknown!r} is not a document of {self.collection.name}")
        return inp.assign(text=[texts[docno] for docno in inp["docno"]])

    def __repr__(self) -> str:
        return f"TextLoader({self.collection.name!r})"


def load(name: str, text_of: TextOf | None = None) -> Collection:
    """Load a collection by its name:

    * `python-docs`: Python's documentation. `python-docs/dev` has only the development topics, and `python-docs/test`
      only the test topics. All three have the same documents.
    * `irds:ID`: a dataset of ir_datasets.
    * A folder with docs.jsonl[.gz] (docno, text and perhaps more fields), queries.tsv (qid, tab, query), qrels.txt and
      optionally run.txt. qrels.txt and run.txt are in TREC format.
    * A file NAME.qrels.txt[.gz]: judgements and the ids of their queries, without query texts or documents.

    text_of: a function that makes the text of a document from its fields. By default, a document of ir_datasets gets
    its default text, and a document from a folder gets its title and its text, joined.
    """
    if name.split("/")[0] == "python-docs":
        docs, topics = python_docs(), read_topics(PYTHON_DOCS)
        topics = topics[topics["qid"].str.startswith(name.partition("/")[2])].reset_index(drop=True)
        qrels = read_qrels(PYTHON_DOCS / "qrels.txt").query("docno in @docs.docno and qid in @topics.qid")
        return in_memory(name, docs, topics, qrels)
    if name.startswith("irds:"):
        return from_ir_datasets(name, text_of)
    return judged(Path(name)) if ".qrels." in Path(name).name else from_folder(Path(name), text_of)


def text_alone(doc: dict[str, str]) -> str:
    return doc["text"]


def title_and_text(doc: dict[str, str]) -> str:
    """The title (if there is one) and the text, joined as in ir_datasets."""
    return f"{doc['title']} {doc['text']}" if doc.get("title") else doc["text"]


def titled_text(doc: dict[str, str]) -> str:
    """The title (if there is one) and the text, joined as PE-Rank reads BEIR's documents. White space is collapsed."""
    return " ".join((f"Title: {doc['title']} Content: {doc['text']}" if doc.get("title") else doc["text"]).split())


def python_docs() -> pd.DataFrame:
    """A frame (docno, text) with some 5,300 docstrings of the standard library of this Python, sorted by name."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(PYTHON_DOCS / "docstrings.py")]
    collected = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return pd.DataFrame(json.loads(collected), columns=["docno", "text"])


def in_memory(
    name: str, docs: pd.DataFrame, topics: pd.DataFrame, qrels: pd.DataFrame, run: pd.DataFrame | None = None
) -> Collection:
    records = docs.to_dict("records")
    texts = dict(zip(docs.docno, docs.text, strict=True))
    return Collection(name, lambda: records, lambda docnos: texts, topics, qrels, run)


def judged(qrels: Path) -> Collection:
    """A collection without query texts and documents. Runs can be evaluated on its judgements."""
    if not qrels.exists():
        raise FileNotFoundError(f"{qrels} is not here; wanted judgements in TREC format (qid 0 docno label)")
    labels = pt.io.read_qrels(str(qrels))
    topics = pd.DataFrame({"qid": labels["qid"].unique()}).assign(query="")
    return in_memory(qrels.name.split(".qrels.")[0], pd.DataFrame(columns=["docno", "text"]), topics, labels)


def from_folder(folder: Path, text_of: TextOf | None = None) -> Collection:
    missing = [file for file in ("queries.tsv", "qrels.txt") if not (folder / file).exists()]
    documents = next((file for file in (folder / "docs.jsonl", folder / "docs.jsonl.gz") if file.exists()), None)
    if missing or documents is None:
        raise FileNotFoundError(
            f"{folder} is not a collection: it lacks"
            f" {', '.join([*missing, *(['docs.jsonl[.gz]'] * (documents is None))])}; wanted docs.jsonl[.gz],"
            " queries.tsv, qrels.txt and, if there is a first stage, run.txt"
        )
    with (gzip.open if documents.suffix == ".gz" else open)(documents, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    texts = [(text_of or title_and_text)(record) for record in records]
    docs = pd.DataFrame({"docno": [record["docno"] for record in records], "text": texts})
    docs["docno"] = docs["docno"].astype(str)
    run = folder / "run.txt"
    ranking = read_run(run) if run.exists() else None
    return in_memory(folder.resolve().name, docs, read_topics(folder), read_qrels(folder / "qrels.txt"), ranking)


def from_ir_datasets(name: str, text_of: TextOf | None = None) -> Collection:
    import ir_datasets

    dataset = ir_datasets.load(name.removeprefix("irds:"))

    def text(doc: Any) -> str:
        return doc.default_text() if text_of is None else text_of(doc._asdict())

    def texts(docnos: Iterable[str]) -> dict[str, str]:
        return {doc.doc_id: text(doc) for doc in dataset.docs_store().get_many_iter(docnos)}

    def docs() -> Iterator[dict[str, str]]:
        return ({"docno": doc.doc_id, "text": text(doc)} for doc in dataset.docs_iter())

    topics = pd.DataFrame([(q.query_id, q.default_text()) for q in dataset.queries_iter()], columns=["qid", "query"])
    judged = [(qrel.query_id, qrel.doc_id, qrel.relevance) for qrel in dataset.qrels_iter()]
    return Collection(name, docs, texts, topics, pd.DataFrame(judged, columns=["qid", "docno", "label"]))


def read_topics(folder: Path) -> pd.DataFrame:
    lines = (folder / "queries.tsv").read_text(encoding="utf-8").split("\n")
    return pd.DataFrame([line.split("\t", 1) for line in lines if line], columns=["qid", "query"])
