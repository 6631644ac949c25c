"""Stand-ins for the data and models that the notebooks read in the profiles "paper" and "runs".

`install` replaces the hub, ir_datasets, Terrier's index and large encoders by small ones, and shortens each training to
two steps. `lay_out` writes runs and collections. test_notebooks.py copies this file into a copy of experiments/.
"""

import dataclasses
import datetime
import json
import os
import re
import typing
import zlib
from pathlib import Path

import encoders
import first_stages
import ir_datasets
import papers

from pyterrier_lit.models import checkpoints
from pyterrier_lit.training import distil

TINY = Path(__file__).parent / "tiny"
CHECKPOINTS = {  # regular expression for names on the hub -> the folder that is read instead
    r"webis/monoelectra|google/electra": TINY / "cross-encoder",
    "castorini/LiT5-Distill": TINY / "lit5-distill",
    "castorini/LiT5-Score|google/flan-t5": TINY / "lit5-score",
    "liuqi6777/pe-rank": TINY / "pe-rank",
}
QUERIES = {"1": "water power", "2": "wind and light"}
WORDS = ("water", "wind", "light", "power", "mills", "rivers", "turbines", "stones", "the", "of")
N = int(os.environ.get("STANDIN_DOCUMENTS", "30"))
DOCS = {f"d{i}": " ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 9)) for i in range(N)}
QRELS = [("1", "d3", 1), ("1", "d7", 1), ("2", "d4", 1)]


def install() -> None:
    """Replace, in the running process, the functions that read data and models."""
    import pyterrier_lit.models.pe_checkpoint
    import pyterrier_lit.reranker

    def fetch(model, **options):
        standin = next((folder for name, folder in CHECKPOINTS.items() if re.match(name, str(model))), model)
        return checkpoints.fetch(standin, **options)

    for module in (pyterrier_lit.reranker, pyterrier_lit.models.pe_checkpoint):
        module.fetch = fetch
    load = ir_datasets.load
    ir_datasets.load = lambda name: Dataset(load(name))
    for name in ("splade", "dense", "LateInteraction"):
        setattr(encoders, name, at_hand(getattr(encoders, name)))
    first = first_stages.load
    first_stages.load = lambda source, *rest: first(re.sub("^terrier:.*", "bm25:terrier", source), *rest)
    train = distil.train

    def short(objective, lists, recipe, settings, **options):
        few, quiet = recipe.replace(steps=2, batch_size=2, micro_batch=1), dataclasses.replace(settings, verbose=False)
        return train(objective, lists, few, quiet, **options)

    distil.train = short


def at_hand(encoder):
    return lambda name: encoder("stand-in")


class Dataset:
    """A small collection. Its documents, queries and judgements have the same classes as those of the real
    collection."""

    def __init__(self, real):
        self.real = real

    def docs_iter(self):
        return self.get_many_iter(DOCS)

    def docs_store(self):
        return self

    def get_many_iter(self, ids):
        return (made(self.real.docs_cls(), DOCS[i], doc_id=i) for i in ids)

    def queries_iter(self):
        return (made(self.real.queries_cls(), text, query_id=qid) for qid, text in QUERIES.items())

    def qrels_iter(self):
        kind = self.real.qrels_cls()
        return (made(kind, "0", query_id=qid, doc_id=docno, relevance=label) for qid, docno, label in QRELS)


def made(kind, text, **known):
    """Return a named tuple with the fields `known`. Every other text is `text`, and every other field is empty."""
    empty = {str: text, bytes: text.encode(), int: 0, float: 0.0, datetime.datetime: datetime.datetime(2026, 1, 1)}
    kinds = {name: typing.get_origin(of) or of for name, of in kind.__annotations__.items()}
    return kind(**({name: empty.get(of, None if of is typing.Union else ()) for name, of in kinds.items()} | known))


def lay_out() -> None:
    """Write stand-ins for those runs and folders that the profiles "paper" and "runs" read and that are missing."""
    import public_runs

    parts = [part() for source in (papers, public_runs) for part in (source.trec_dl, source.beir, source.tirex)]
    collections = [where for part in parts for comparison in part for where in comparison.collections.values()]
    collections += [*papers.qa().values(), *papers.further().values(), papers.ms_marco()]
    files = [*(stage for where in collections for stage in where.first_stages.values()), papers.RANKZEPHYR]
    files += [str(papers.RUNS[0] / "dl19.bm25.rankvicuna.txt")]
    for file in {file for file in files if file.endswith(".txt") and not Path(file).exists()}:
        order = sorted(DOCS, key=lambda docno, file=file: zlib.crc32(f"{docno} {file}".encode()))
        lines = [f"{qid} Q0 {docno} {i} {-i} x\n" for qid in QUERIES for i, docno in enumerate(order, 1)]
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("".join(lines))
    qrels = "".join(f"{qid} 0 {docno} {label}\n" for qid, docno, label in QRELS)
    docs = [json.dumps({"docno": docno, "text": text, "title": "T"}) + "\n" for docno, text in DOCS.items()]
    for source in {where.source for where in collections if not where.source.startswith("irds:")}:
        if ".qrels." in source:
            Path(source).write_text(qrels)
            continue
        folder = Path(source)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "docs.jsonl").write_text("".join(docs))
        (folder / "queries.tsv").write_text("".join(f"{qid}\t{text}\n" for qid, text in QUERIES.items()))
        (folder / "qrels.txt").write_text(qrels)


if __name__ == "__main__":
    lay_out()
