"""What the notebooks run: which collections, first stages, checkpoints and lengths, as in the papers or small. Data
only.

`profiles.PAPER` is what the papers evaluated and wants a GPU, MS MARCO and checkpoints; `profiles.SMALL` runs anywhere,
offline. `distillation.ipynb` has a third between them, "trec", for two cores with ../shared/data. The notebooks' first
cell chooses one by name; no other cell knows which it is.
"""

import dataclasses
import functools
import os
from pathlib import Path

import corpora
import pandas as pd

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.reranker import Reranker

HERE = Path(__file__).parent
TINY = os.path.relpath(HERE / "tiny")  # the project's own small checkpoints
SHARED = Path(os.path.relpath(HERE.parents[1] / "shared" / "data"))  # collections that some machines have; never needed
DATA = "data"  # the reader's own files: runs in TREC format, collections in folders (see experiments/README.md)


@dataclasses.dataclass(frozen=True)
class Collection:
    """A collection, and by name the first stages over it, as `corpora.load` and `first_stages.load` read them."""

    source: str
    first_stages: dict[str, str]
    corpus: str = ""  # TIREx: the corpus that a task belongs to


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rerankers by the name that `published.csv` gives them, over all first stages of these collections."""

    paper: str
    tables: tuple[str, ...]  # of published.csv
    collections: dict[str, Collection]
    rerankers: dict[str, Reranker] = dataclasses.field(default_factory=dict)  # none: the first stages alone
    text_of: corpora.TextOf | None = None  # the passages' text from their fields, None: ir_datasets' default
    topics: int | None = None  # the first so many, None: all


@dataclasses.dataclass(frozen=True)
class Profile:
    """The inputs of every notebook."""

    depth: int  # passages reranked
    verbose: bool
    pipelines: dict  # pipelines.ipynb: collection, topics, documents, encoders, rerankers
    trec_dl: list[Comparison]
    beir: list[Comparison]
    tirex: list[Comparison]
    efficiency: dict  # efficiency.ipynb: collection, topics, rerankers, their peers, depths, windows
    open_questions: dict  # open_questions.ipynb: collection, topics, rerankers and what is varied
    scaling: dict  # scaling.ipynb: collection, queries, passages, rerankers, speeds of the model, workers of a machine
    distillation: (
        dict  # distillation.ipynb: collections to learn from and to test on, student, teacher and what is varied
    )


# The papers' checkpoints by the names in published.csv (specs: lit5 section 7, cross-encoder section 3, pe-rank section
# 7)

LIT5_V2 = {f"castorini/LiT5-Distill-{size}-v2": 100 for size in ("base", "large", "xl")}  # window: one for all 100
LIT5_V1 = {f"castorini/LiT5-Distill-{size}": 20 for size in ("base", "large", "xl")}  # windows of 20, stride 10
LIT5_SCORE = [f"castorini/LiT5-Score-{size}" for size in ("base", "large", "xl")]
MONOELECTRA = {
    f"monoELECTRA-{size} two-stage RankZephyr-CBv2": f"webis/monoelectra-{size}" for size in ("base", "large")
}
PE_RANK = {"PE-Rank (Jina)": "liuqi6777/pe-rank-mistral-jina"}


def distill(models: dict[str, int], max_length: int) -> dict[str, Reranker]:
    return {
        name: LiT5Distill(name, window_size=window, stride=window // 2, max_length=max_length, verbose=True)
        for name, window in models.items()
    }


CROSS_ENCODERS = {  # 32 and 256 pieces
    name: CrossEncoder(model, query_length=32, doc_length=256, verbose=True) for name, model in MONOELECTRA.items()
}
PE_RANKERS = {name: PERank(model, window_size=20, stride=10, verbose=True) for name, model in PE_RANK.items()}
LIT5_AT_150 = {  # tokens of a prompt on MS MARCO
    **distill(LIT5_V2, 150),
    **distill(LIT5_V1, 150),
    **{name: LiT5Score(name, n_passages=100, max_length=150, answer_length=20, verbose=True) for name in LIT5_SCORE},
}


# TREC DL: LiT5 table 1, Rank-DistiLLM table 1, PE-Rank's rows (BM25 is Anserini's for LiT5 and PE-Rank, Terrier's for
# Rank-DistiLLM)

IRDS_DL = {
    "dl19": "irds:msmarco-passage/trec-dl-2019/judged",
    "dl20": "irds:msmarco-passage/trec-dl-2020/judged",
    "dl21": "irds:msmarco-passage-v2/trec-dl-2021/judged",
    "dl22": "irds:msmarco-passage-v2/trec-dl-2022/judged",
}


def runs_of(collection: str, *names: str) -> dict[str, str]:
    return {name: f"{DATA}/runs/{collection}.{name}.txt" for name in names}


PAPER_DL = [
    Comparison(
        "LiT5",
        ("ecir_table1", "ref_readme_2024"),
        {name: Collection(source, runs_of(name, "bm25", "splade++ed")) for name, source in IRDS_DL.items()},
        LIT5_AT_150,
    ),
    Comparison(
        "Rank-DistiLLM",
        ("arxiv_table1", "ecir_dl"),
        {
            name: Collection(IRDS_DL[name], {"bm25": "terrier:msmarco_passage"} | runs_of(name, "colbertv2"))
            for name in ("dl19", "dl20")
        },
        CROSS_ENCODERS,
    ),
    Comparison(
        "PE-Rank",
        ("issue5", "figure1", "paper_main"),
        {name: Collection(IRDS_DL[name], runs_of(name, "bm25")) for name in ("dl19", "dl20")},
        PE_RANKERS,
    ),
]


# BEIR: LiT5 table 2 (17 collections, prompts of 512 tokens) and PE-Rank's eight; BM25 over title and text ("flat")

BEIR = {
    "beir/trec-covid": "irds:beir/trec-covid",
    "beir/bioasq": f"{DATA}/beir/bioasq",  # BioASQ, Signal-1M, TREC-NEWS and Robust04 may not be downloaded freely:
    "beir/nfcorpus": "irds:beir/nfcorpus/test",  # folders with docs.jsonl (docno, title, text), queries.tsv, qrels.txt
    "beir/nq": "irds:beir/nq",
    "beir/hotpotqa": "irds:beir/hotpotqa/test",
    "beir/fiqa": "irds:beir/fiqa/test",
    "beir/signal1m": f"{DATA}/beir/signal1m",
    "beir/trec-news": f"{DATA}/beir/trec-news",
    "beir/robust04": f"{DATA}/beir/robust04",
    "beir/arguana": "irds:beir/arguana",
    "beir/webis-touche2020": "irds:beir/webis-touche2020/v2",
    "beir/quora": "irds:beir/quora/test",
    "beir/dbpedia-entity": "irds:beir/dbpedia-entity/test",
    "beir/scidocs": "irds:beir/scidocs",
    "beir/fever": "irds:beir/fever/test",
    "beir/climate-fever": "irds:beir/climate-fever",
    "beir/scifact": "irds:beir/scifact/test",
}
PE_RANK_BEIR = (
    "trec-covid",
    "nfcorpus",
    "webis-touche2020",
    "dbpedia-entity",
    "scifact",
    "signal1m",
    "trec-news",
    "robust04",
)

PAPER_BEIR = [
    Comparison(
        "LiT5",
        ("ecir_table2",),
        {name: Collection(source, {"bm25": "bm25"}) for name, source in BEIR.items()},
        distill(LIT5_V2, 512),
        text_of=corpora.text_alone,  # the prompts have no title
    ),
    Comparison(
        "PE-Rank",
        ("paper_main",),
        {f"beir/{name}": Collection(BEIR[f"beir/{name}"], {"bm25": "bm25"}) for name in PE_RANK_BEIR},
        PE_RANKERS,
        text_of=corpora.titled_text,
    ),
]


# TIREx: Rank-DistiLLM table 2, the 31 tasks; first stage: PyTerrier's BM25, ChatNoir's for ClueWeb (runs, top 100)

TIREX = "tirex (bm25; chatnoir for clueweb)"
TASKS = pd.read_csv(HERE / "tirex_tasks.csv")
CORPORA = {  # as published.csv spells them
    "Antique": "antique",
    "Args.me": "argsme",
    "ClueWeb09": "clueweb09",
    "ClueWeb12": "clueweb12",
    "CORD-19": "cord19",
    "Cranfield": "cranfield",
    "Disks4+5": "disks45",
    "GOV": "gov",
    "GOV2": "gov2",
    "MEDLINE": "medline",
    "MS MARCO": "msmarco-passage",
    "NFCorpus": "nfcorpus",
    "Vaswani": "vaswani",
    "WaPo": "wapo",
}
PAPER_TIREX = [
    Comparison(
        "Rank-DistiLLM",
        ("arxiv_table2",),
        {
            task: Collection(
                f"irds:{task}", {TIREX: f"{DATA}/runs/tirex/{task.replace('/', '-')}.txt"}, CORPORA[corpus]
            )
            for corpus, task in TASKS[["corpus", "ir_datasets_id"]].itertuples(index=False)
        },
        CROSS_ENCODERS,
    )
]


# Small: the quickstart's collection, the project's own checkpoints, few topics; besides, what ../shared/data has


def tiny() -> dict[str, Reranker]:
    """The small checkpoints of all four, on the CPU, so that every machine gives the same figures."""
    return {
        "tiny CrossEncoder": CrossEncoder(f"{TINY}/cross-encoder", device="cpu"),
        "tiny LiT5-Distill": LiT5Distill(f"{TINY}/lit5-distill", device="cpu"),
        "tiny LiT5-Score": LiT5Score(f"{TINY}/lit5-score", device="cpu"),
        "tiny PE-Rank": PERank(f"{TINY}/pe-rank", device="cpu"),
    }


def where_present(collections: dict[str, Collection]) -> dict[str, Collection]:
    return {name: collection for name, collection in collections.items() if Path(collection.source).exists()}


def shared_runs(collection: str, files: dict[str, str]) -> Collection:
    folder = SHARED / collection
    return Collection(str(folder), {name: str(folder / file) for name, file in files.items()})


PYTHON_DOCS = {"python-docs": Collection("python-docs/test", {"bm25": "bm25"})}

SMALL_DL = [
    dataclasses.replace(PAPER_DL[0], collections=PYTHON_DOCS, rerankers=tiny(), topics=6),
    dataclasses.replace(
        PAPER_DL[0],
        collections=where_present(
            {
                name: shared_runs(name, {"bm25": "run.bm25.txt", "splade++ed": "run.splade++ed.txt"})
                for name in ("dl19", "dl21")
            }
        ),
        rerankers={},
    ),
    dataclasses.replace(
        PAPER_DL[1],
        collections=where_present(
            {
                "dl19": shared_runs(
                    "dl19", {"bm25": "runs/terrier-bm25.txt.gz", "colbertv2": "runs/colbertv2-webis.txt.gz"}
                )
            }
        ),
        rerankers={},
    ),
    dataclasses.replace(PAPER_DL[2], collections={}, rerankers={}),
]
SMALL_BEIR = [
    dataclasses.replace(PAPER_BEIR[0], collections=PYTHON_DOCS, rerankers=tiny(), topics=6),
    dataclasses.replace(
        PAPER_BEIR[0],
        collections=where_present({"beir/nfcorpus": Collection(str(SHARED / "nfcorpus"), {"bm25": "bm25"})}),
        rerankers={},
    ),
    dataclasses.replace(PAPER_BEIR[1], collections={}, rerankers={}),
]
SMALL_TIREX = [
    dataclasses.replace(
        PAPER_TIREX[0],
        collections={
            f"python-docs/{part}": Collection(f"python-docs/{part}", {TIREX: "bm25"}, "python-docs")
            for part in ("dev", "test")
        },
        rerankers={"tiny CrossEncoder": tiny()["tiny CrossEncoder"]},
        topics=6,
    ),
    dataclasses.replace(
        PAPER_TIREX[0],
        collections=where_present(
            {
                name: Collection(str(SHARED / name), {TIREX: "bm25"}, name)
                for name in ("cranfield", "vaswani", "nfcorpus")
            }
        ),
        rerankers={},
    ),
]


# Pipelines, efficiency, open questions

RERANKERS = {
    "CrossEncoder": CROSS_ENCODERS["monoELECTRA-base two-stage RankZephyr-CBv2"],
    "LiT5-Distill": LIT5_AT_150["castorini/LiT5-Distill-base-v2"],
    "LiT5-Score": LIT5_AT_150["castorini/LiT5-Score-base"],
    "PE-Rank": PE_RANKERS["PE-Rank (Jina)"],
}
SMALL_RERANKERS = {name.removeprefix("tiny "): reranker for name, reranker in tiny().items()}

# A training of seconds
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

PAPER = Profile(
    depth=100,
    verbose=True,
    pipelines={
        "collection": IRDS_DL["dl19"],
        "topics": None,
        "documents": None,
        "encoders": {
            "splade": "naver/splade-cocondenser-ensembledistil",
            "colbert": "lightonai/GTE-ModernColBERT-v1",
            "dense": "sentence-transformers/all-MiniLM-L6-v2",
        },
        "rerankers": RERANKERS,
    },
    trec_dl=PAPER_DL,
    beir=PAPER_BEIR,
    tirex=PAPER_TIREX,
    efficiency={
        "collection": Collection(IRDS_DL["dl19"], {"bm25": "bm25"}),  # a run of 100 passages is too short
        "topics": None,
        "rerankers": LIT5_AT_150 | CROSS_ENCODERS | PE_RANKERS,
        "encoders": {"dense": "sentence-transformers/all-MiniLM-L6-v2", "colbert": "lightonai/GTE-ModernColBERT-v1"},
        "peers": {"monoT5-3B": ("pyterrier_t5", "MonoT5ReRanker", {"model": "castorini/monot5-3b-msmarco"})},
        "depths": [10, 20, 50, 100, 200, 500, 1000],
        "windows": [5, 10, 20, 50, 100],
    },
    open_questions={
        "collection": PAPER_DL[0].collections["dl19"],
        "topics": None,
        "rerankers": RERANKERS,
        "dense": "sentence-transformers/all-MiniLM-L6-v2",
        "score_weights": [*LIT5_SCORE, *LIT5_V2],  # an answerer, and what was trained to write orders
        "n_passages": [5, 10, 20, 50, 100],
        "windows": [(5, 2), (10, 5), (20, 10), (40, 20), (100, 50)],
    },
    scaling={
        "collection": PAPER_DL[0].collections["dl19"],
        "queries": None,
        "passages": 100,
        "rerankers": RERANKERS,
        "speeds": [1, 10, 100],
        "workers": 8,
    },
    distillation={
        "train": Collection("irds:msmarco-passage/train", {"first": f"{DATA}/runs/msmarco-train.colbertv2.txt"}),
        "test": PAPER_DL[1].collections["dl19"],
        "student": functools.partial(
            CrossEncoder.from_backbone, "google/electra-base-discriminator", query_length=32, doc_length=256
        ),
        "teacher": f"{DATA}/runs/msmarco-train.rankzephyr-colbertv2.txt",  # of hub dataset webis/rank-distillm
        "labels": {},  # settings besides the papers'
        "rankings": {},
        "depths": [10, 25, 50],  # and all, as for the queries
        "queries": [100, 1_000],
    },
)
SMALL = Profile(
    depth=20,
    verbose=False,
    pipelines={
        "collection": "python-docs/test",
        "topics": 4,
        "documents": 120,
        "encoders": {"splade": "stand-in", "colbert": "stand-in", "dense": "stand-in"},
        "rerankers": SMALL_RERANKERS,
    },
    trec_dl=SMALL_DL,
    beir=SMALL_BEIR,
    tirex=SMALL_TIREX,
    efficiency={
        "collection": PYTHON_DOCS["python-docs"],
        "topics": 2,
        "rerankers": SMALL_RERANKERS,
        "encoders": {"dense": "stand-in", "colbert": "stand-in"},
        "peers": {},
        "depths": [5, 10, 20],
        "windows": [5, 10, 20],
    },
    open_questions={
        "collection": PYTHON_DOCS["python-docs"],
        "topics": 4,
        "rerankers": SMALL_RERANKERS,
        "dense": "stand-in",
        "score_weights": [f"{TINY}/lit5-score", f"{TINY}/lit5-distill"],
        "n_passages": [5, 10, 20],
        "windows": [(4, 2), (10, 5), (20, 10)],
    },
    scaling={
        "collection": PYTHON_DOCS["python-docs"],
        "queries": 3,
        "passages": 100,
        "rerankers": SMALL_RERANKERS,
        "speeds": [1, 10, 100, 1_000],
        "workers": 8,
    },
    distillation={
        "train": Collection("python-docs/dev", {"first": "bm25"}),
        "test": Collection("python-docs/test", {"bm25": "bm25"}),
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
TREC = dataclasses.replace(  # the students begin as the first of real_teachers.py, which knows MiniLM's cosines
    SMALL,
    depth=100,
    verbose=True,
    distillation={
        "train": shared_runs("dl19", {"first": "run.bm25.txt"}),
        "test": shared_runs("dl21", {"bm25": "run.bm25.txt"}),
        "student": functools.partial(CrossEncoder, "results/real_teachers/CrossEncoder, cosines", dtype="bfloat16"),
        "teacher": str(SHARED / "dl19" / "teachers" / "rankvicuna7b.bm25.k100.r1.txt.gz"),
        "labels": MINUTES,
        "rankings": MINUTES | {"n_passages": 16, "sampling": "log_random"},
        "depths": [20],
        "queries": [10],
    },
)
PROFILES = {"paper": PAPER, "small": SMALL, "trec": TREC}
