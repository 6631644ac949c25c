"""What the notebooks run in each profile: which collections, first stages, checkpoints and lengths.

"paper" is what the papers evaluated (`papers.py`); it requires a GPU, MS MARCO and checkpoints. "small" runs anywhere,
offline. "runs" uses no models: it puts public runs next to the published figures, in `trec_dl`, `beir` and `tirex`.
`distillation.ipynb` has one more, "trec", for two cores with ../shared/data. The notebooks' first cell chooses a
profile by name; no other cell knows which it is. Nothing is built or looked for until a profile is called.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import papers
import public_runs
from papers import DATA, SHARED, TIREX, Collection, Comparison

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.reranker import Reranker

HERE = Path(__file__).parent
TINY = os.path.relpath(HERE / "tiny")  # the project's own small checkpoints


@dataclasses.dataclass(frozen=True)
class Profile:
    """The inputs of every notebook."""

    depth: int  # passages reranked
    verbose: bool
    pipelines: dict  # pipelines.ipynb: collection, encoders, rerankers
    trec_dl: list[Comparison]
    beir: list[Comparison]
    tirex: list[Comparison]
    efficiency: dict  # efficiency.ipynb: collection, rerankers, their peers, depths, windows
    open_questions: dict  # open_questions.ipynb: collection, rerankers and what is varied
    scaling: dict  # scaling.ipynb: collection, queries, passages, rerankers, speeds of the model, workers of a machine
    distillation: (
        dict  # distillation.ipynb: collections to learn from and to test on, student, teacher and what is varied
    )


def tiny() -> dict[str, Reranker]:
    """The small checkpoints of all four rerankers, on the CPU, so that every machine gives the same figures."""
    return {
        "tiny CrossEncoder": CrossEncoder(f"{TINY}/cross-encoder", device="cpu"),
        "tiny LiT5-Distill": LiT5Distill(f"{TINY}/lit5-distill", device="cpu"),
        "tiny LiT5-Score": LiT5Score(f"{TINY}/lit5-score", device="cpu"),
        "tiny PE-Rank": PERank(f"{TINY}/pe-rank", device="cpu"),
    }


def small_rerankers() -> dict[str, Reranker]:
    """The small checkpoints by the method's name."""
    return {name.removeprefix("tiny "): reranker for name, reranker in tiny().items()}


def where_present(collections: dict[str, Collection]) -> dict[str, Collection]:
    return {name: collection for name, collection in collections.items() if Path(collection.source).exists()}


def shared_runs(collection: str, files: dict[str, str]) -> Collection:
    folder = SHARED / collection
    return Collection(str(folder), {name: str(folder / file) for name, file in files.items()})


PYTHON_DOCS = {"python-docs": Collection("python-docs/test", {"bm25": "bm25"})}


def small_dl() -> list[Comparison]:
    """The small checkpoints on Python's documentation, and the public runs that are here."""
    first = dataclasses.replace(papers.trec_dl()[0], collections=PYTHON_DOCS, rerankers=tiny())
    return [first, *map(at_hand, runs_dl())]


def small_beir() -> list[Comparison]:
    """As `small_dl`, for BEIR."""
    first = dataclasses.replace(papers.beir()[0], collections=PYTHON_DOCS, rerankers=tiny())
    return [first, *map(at_hand, runs_beir())]


def small_tirex() -> list[Comparison]:
    """As `small_dl`, for TIREx."""
    first = dataclasses.replace(
        papers.tirex()[0],
        collections={
            f"python-docs/{part}": Collection(f"python-docs/{part}", {TIREX: "bm25"}, "python-docs")
            for part in ("dev", "test")
        },
        rerankers={"tiny CrossEncoder": tiny()["tiny CrossEncoder"]},
    )
    return [first, *map(at_hand, runs_tirex())]


def at_hand(comparison: Comparison) -> Comparison:
    """The comparison without the collections whose files are missing."""
    return dataclasses.replace(comparison, collections=where_present(comparison.collections))


def runs_dl() -> list[Comparison]:
    """Public runs of first stages and systems, with judgements only."""
    stages = [{"bm25": "bm25", "splade++ed": "splade++ed"}, {"bm25": "bm25-terrier", "colbertv2": "colbertv2"}]
    return [
        dataclasses.replace(
            paper,
            collections={name: public_runs.collection(name, names, paper.tables) for name in paper.collections},
            rerankers={},
            depth=100,
        )
        for paper, names in zip(papers.trec_dl(), [*stages, {"bm25": "bm25"}], strict=True)
    ]


def runs_beir() -> list[Comparison]:
    """BM25 over NFCorpus, and your own runs over any collection whose judgements are there."""
    nfcorpus = Collection(str(SHARED / "nfcorpus"), {"bm25": "bm25:anserini"})
    return [
        dataclasses.replace(
            paper,
            collections=({"beir/nfcorpus": nfcorpus} if paper.paper == "LiT5" else {})
            | where_present(
                {
                    name: public_runs.collection(name.replace("/", "-"), {"bm25": "bm25"}, paper.tables)
                    for name in paper.collections
                }
            ),
            rerankers={},
            depth=100,
        )
        for paper in papers.beir()
    ]


def runs_tirex() -> list[Comparison]:
    """BM25 with TIREx's settings, over those of its corpora that are in ../shared/data."""
    corpora = {name: Collection(str(SHARED / name), {TIREX: "bm25:terrier"}, name) for name in ("cranfield", "vaswani")}
    return [dataclasses.replace(papers.tirex()[0], collections=corpora, rerankers={})]


# Settings of training runs of seconds and of minutes
SHORT = {"steps": 6, "batch_size": 4, "micro_batch": 4, "learning_rate": 1e-4, "verbose": False}
MINUTES = {
    "steps": 40,
    "batch_size": 8,
    "micro_batch": 8,
    "learning_rate": 2e-5,
    "warmup": 15,
    "schedule": "cosine",
    "precision": "bfloat16",
}


def paper() -> Profile:
    """As in the papers."""
    return Profile(
        depth=100,
        verbose=True,
        pipelines={
            "collection": papers.IRDS_DL["dl19"],
            "encoders": {
                "splade": "naver/splade-cocondenser-ensembledistil",
                "colbert": "lightonai/GTE-ModernColBERT-v1",
                "dense": "sentence-transformers/all-MiniLM-L6-v2",
            },
            "rerankers": papers.one_of_each(),
        },
        trec_dl=papers.trec_dl(),
        beir=papers.beir(),
        tirex=papers.tirex(),
        efficiency={
            "collection": Collection(papers.IRDS_DL["dl19"], {"bm25": "bm25"}),  # a run of 100 passages is too short
            "rerankers": papers.lit5() | papers.cross_encoders() | papers.pe_rankers(),
            "encoders": {
                "dense": "sentence-transformers/all-MiniLM-L6-v2",
                "colbert": "lightonai/GTE-ModernColBERT-v1",
            },
            "peers": {"monoT5-3B": ("pyterrier_t5", "MonoT5ReRanker", {"model": "castorini/monot5-3b-msmarco"})},
            "depths": [10, 20, 50, 100, 200, 500, 1000],
            "windows": [5, 10, 20, 50, 100],
        },
        open_questions={
            "collection": papers.trec_dl()[0].collections["dl19"],
            "rerankers": papers.one_of_each(),
            "dense": "sentence-transformers/all-MiniLM-L6-v2",
            "score_weights": [*papers.LIT5_SCORE, *papers.LIT5_V2, "google/flan-t5-base"],
            "n_passages": [5, 10, 20, 50, 100],
            "deep": {"first": "bm25", "n_passages": [100, 200, 500]},  # a run of 100 passages is too short
            "qa": papers.qa(),
            "windows": [(5, 2), (10, 5), (20, 10), (40, 20), (100, 50)],
            "lit5_windows": [(10, 5), (20, 10), (50, 25), (100, 50)],
            "passes": [1, 2, 3],
            "noise": [0, 0.25, 0.5, 1, 2, 4],
            "teachers": {"RankZephyr": f"{DATA}/runs/msmarco-train.rankzephyr-colbertv2.txt"} | papers.one_of_each(),
            "taught": 1_000,
            "further": papers.further(),
        },
        scaling={
            "collection": papers.trec_dl()[0].collections["dl19"],
            "queries": None,
            "passages": 100,
            "rerankers": papers.one_of_each(),
            "speeds": [1, 10, 100],
            "workers": 8,
        },
        distillation={
            "train": Collection("irds:msmarco-passage/train", {"first": f"{DATA}/runs/msmarco-train.colbertv2.txt"}),
            "test": papers.trec_dl()[1].collections,
            "student": functools.partial(
                CrossEncoder.from_backbone, "google/electra-base-discriminator", query_length=32, doc_length=256
            ),
            "teacher": f"{DATA}/runs/msmarco-train.rankzephyr-colbertv2.txt",  # of Zenodo's record 15131907
            "labels": {},  # settings that differ from the papers'
            "rankings": {},
            "depths": [10, 20, 50],  # besides all of them; queries likewise
            "queries": [1_000, 2_000, 5_000],
        },
    )


def small() -> Profile:
    """Offline, in some minutes: 50 questions about Python, 20 passages of each."""
    return Profile(
        depth=20,
        verbose=False,
        pipelines={
            "collection": "python-docs/test",
            "encoders": {"splade": "stand-in", "colbert": "stand-in", "dense": "stand-in"},
            "rerankers": small_rerankers(),
        },
        trec_dl=small_dl(),
        beir=small_beir(),
        tirex=small_tirex(),
        efficiency={
            "collection": PYTHON_DOCS["python-docs"],
            "rerankers": small_rerankers(),
            "encoders": {"dense": "stand-in", "colbert": "stand-in"},
            "peers": {},
            "depths": [5, 10, 20],
            "windows": [5, 10, 20],
        },
        open_questions={
            "collection": PYTHON_DOCS["python-docs"],
            "rerankers": small_rerankers(),
            "dense": "stand-in",
            "score_weights": [f"{TINY}/lit5-score", f"{TINY}/lit5-distill"],
            "n_passages": [5, 10, 20],
            "deep": {"first": "bm25", "n_passages": [20, 50, 100]},
            "qa": PYTHON_DOCS,
            "windows": [(4, 2), (10, 5), (20, 10)],
            "lit5_windows": [(4, 2), (10, 5), (20, 10)],
            "passes": [1, 2],
            "noise": [0, 1, 4],
            "teachers": {name: small_rerankers()[name] for name in ("CrossEncoder", "LiT5-Distill")},
            "taught": 20,
            "further": {"python-docs/dev": Collection("python-docs/dev", {"bm25": "bm25"})},
        },
        scaling={
            "collection": PYTHON_DOCS["python-docs"],
            "queries": 3,
            "passages": 100,
            "rerankers": small_rerankers(),
            "speeds": [1, 10, 100, 1_000],
            "workers": 8,
        },
        distillation={
            "train": Collection("python-docs/dev", {"first": "bm25"}),
            "test": {"python-docs": Collection("python-docs/test", {"bm25": "bm25"})},
            "student": functools.partial(
                CrossEncoder.from_backbone, f"{TINY}/cross-encoder", query_length=24, doc_length=64
            ),
            "teacher": CrossEncoder(f"{TINY}/cross-encoder", device="cpu"),
            "labels": SHORT,
            "rankings": SHORT,
            "depths": [5],
            "queries": [5],
        },
    )


def trec() -> Profile:
    """Two cores and ../shared/data: students begin as the first student of real_teachers.py, which knows MiniLM's
    cosines."""
    return dataclasses.replace(
        small(),
        depth=100,
        verbose=True,
        distillation={
            "train": shared_runs("dl19", {"first": "run.bm25.txt"}),
            "test": {"dl21": shared_runs("dl21", {"bm25": "run.bm25.txt"})},
            "student": functools.partial(CrossEncoder, "results/real_teachers/CrossEncoder, cosines", dtype="bfloat16"),
            "teacher": str(SHARED / "dl19" / "teachers" / "rankvicuna7b.bm25.k100.r1.txt.gz"),
            "labels": MINUTES,
            "rankings": MINUTES | {"n_passages": 16, "sampling": "log_random"},
            "depths": [20],
            "queries": [10],
        },
    )


def runs() -> Profile:
    """No model: public runs and BM25 next to the published figures, in a minute. All else is as in "small"."""
    return dataclasses.replace(small(), depth=100, trec_dl=runs_dl(), beir=runs_beir(), tirex=runs_tirex())


PROFILES: dict[str, Callable[[], Profile]] = {"paper": paper, "small": small, "trec": trec, "runs": runs}
