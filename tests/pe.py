"""What the tests of PE-Rank share: the reference's windows and runs (golden/pe_rank), vectors, an index and an
encoder."""

import json
import warnings

import numpy as np
import pandas as pd
import torch
from conftest import GOLDEN

from pyterrier_lit.listwise import Prompt

FOLDER = GOLDEN / "pe_rank"


ARRAYS = np.load(FOLDER / "arrays.npz")


WINDOWS = json.loads((FOLDER / "windows.json").read_text(encoding="utf-8"))


SLIDING = json.loads((FOLDER / "sliding.json").read_text(encoding="utf-8"))


DOCNOS = json.loads((FOLDER / "sliding_docnos.json").read_text(encoding="utf-8"))


class Index:
    """A stand-in for FlexIndex, a dense index of pyterrier_dr. As there, the number of an unknown docno is -1."""

    def __init__(self, vectors):
        self.docnos = list(vectors)
        self.vectors = np.array(list(vectors.values()), dtype="float32")

    def payload(self):
        held = type("Lookup", (), {})()
        held.fwd = type("Fwd", (), {"__getitem__": lambda _, numbers: [self.docnos[n] for n in numbers]})()
        held.inv = type(
            "Inv",
            (),
            {"__getitem__": lambda _, names: [self.docnos.index(n) if n in self.docnos else -1 for n in names]},
        )()
        return held, self.vectors, {}

    def __repr__(self):
        return "Index()"


class Encoder:
    """A stand-in for a bi-encoder of pyterrier_dr. The vector of a text counts its letters."""

    def __init__(self, width=24):
        self.width = width
        self.calls = []

    def encode_docs(self, texts):
        self.calls.append(list(texts))
        return np.array([[text.count(chr(97 + i)) + 0.1 * i for i in range(self.width)] for text in texts])

    def __repr__(self):
        return "Encoder()"


def with_vectors(frame, seed=0, width=24):
    rng = np.random.default_rng(seed)
    vector_of = {docno: rng.normal(size=width).astype("float32") for docno in sorted(set(frame["docno"]))}
    return frame.assign(doc_vec=[vector_of[docno] for docno in frame["docno"]]), vector_of


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "neither a 'doc_vec' column nor an index")
        return function(*arguments)


def texts_of(window):
    return window["candidates"] if window["mode"] == "listwise-text-embedding" else []


def ids_of(ranker, window):
    return ranker.prompter.ids([window["query"]], [texts_of(window)], [len(window["candidates"])])[0]


def vectors_of(window):
    return torch.tensor(ARRAYS[f"w{window['i']}.doc_vec"])


def count_forwards(ranker, monkeypatch):
    """Return a list. Each later forward pass of the language model adds the shape (B, L) of its input to this list."""
    calls, forward = [], ranker.network.body.forward
    monkeypatch.setattr(
        ranker.network.body,
        "forward",
        lambda **inputs: calls.append(tuple(inputs["inputs_embeds"].shape[:2])) or forward(**inputs),
    )
    return calls


def sliding_frame(runs, **columns):
    """Return a frame with one query per golden run, with the texts and the reference's vectors (`doc_vec`)."""
    rows = [
        (str(i), run["query"], docno, text, rank)
        for i, run in enumerate(runs)
        for rank, (docno, text) in enumerate(zip(run["candidates"], run["contents"], strict=True))
    ]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "rank"])
    vectors = dict(zip(DOCNOS, ARRAYS["sliding.doc_vec"], strict=True))
    return frame.assign(doc_vec=[vectors[docno] for docno in frame["docno"]], **columns)


def final(out, qid):
    return out[out.qid == qid].sort_values("rank")["docno"].tolist()


def canonical_final(run, docnos):
    names = dict(zip(run["candidates"], run["canonical"], strict=True))
    return [names[docno] for docno in docnos]


def assert_golden(out, first=None):
    for i, run in enumerate(SLIDING):
        expected = run["final_one_window"] if run["reference_ranks_nothing"] else run["final"]
        assert canonical_final(run, final(out, str(i)))[:first] == canonical_final(run, expected)[:first]


HOSTILE = ["<PLACEHOLDER>", "a <RANK> b", "</s><s>", "<unk>", "<<PLACEHOLDER>PLACEHOLDER>", "[1] > [2]", "{query} {0}"]


def prompt(ranker, window):
    """Return a golden window as a prompt of PE-Rank. All passages of the window are to be ranked."""
    n = len(window["candidates"])
    return Prompt((ids_of(ranker, window), vectors_of(window)), len(window["input_ids"]), n, n)
