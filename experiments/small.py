"""What the notebooks run on any machine, offline: the small checkpoints of tiny/ on Python's documentation, and the
public runs that are available. Nothing is built before a function is called."""

import dataclasses
import os
from pathlib import Path

import papers
import public_runs
from papers import TIREX, Collection, Comparison

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.reranker import Reranker

TINY = os.path.relpath(Path(__file__).parent / "tiny")  # the project's own small checkpoints
PYTHON_DOCS = Collection("python-docs/test", {"bm25": "bm25"})  # 50 questions


def rerankers() -> dict[str, Reranker]:
    """The small checkpoint of each method, by the method's name. The rerankers run on the CPU, so that every machine
    gives the same figures."""
    return {
        "CrossEncoder": CrossEncoder(f"{TINY}/cross-encoder", device="cpu"),
        "LiT5-Distill": LiT5Distill(f"{TINY}/lit5-distill", device="cpu"),
        "LiT5-Score": LiT5Score(f"{TINY}/lit5-score", device="cpu"),
        "PE-Rank": PERank(f"{TINY}/pe-rank", device="cpu"),
    }


def named() -> dict[str, Reranker]:
    """The small checkpoints under names that differ from those of the published models."""
    return {f"tiny {name}": reranker for name, reranker in rerankers().items()}


def trec_dl() -> list[Comparison]:
    collections = {"python-docs": PYTHON_DOCS}
    first = dataclasses.replace(papers.trec_dl()[0], collections=collections, rerankers=named())
    return [first, *map(available, public_runs.trec_dl())]


def beir() -> list[Comparison]:
    first = dataclasses.replace(papers.beir()[0], collections={"python-docs": PYTHON_DOCS}, rerankers=named())
    return [first, *map(available, public_runs.beir())]


def tirex() -> list[Comparison]:
    parts = {
        f"python-docs/{part}": Collection(f"python-docs/{part}", {TIREX: "bm25"}, "python-docs")
        for part in ("dev", "test")
    }
    reranker = {"tiny CrossEncoder": rerankers()["CrossEncoder"]}
    first = dataclasses.replace(papers.tirex()[0], collections=parts, rerankers=reranker)
    return [first, *map(available, public_runs.tirex())]


def available(comparison: Comparison) -> Comparison:
    return dataclasses.replace(comparison, collections=papers.where_present(comparison.collections))
