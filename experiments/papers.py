"""What the papers evaluated: collections, first stages, checkpoints and maximum lengths. No collection or checkpoint is
read until a function is called.

The names of checkpoints and collections are those of published.csv.
"""

import dataclasses
import os
from pathlib import Path

import corpora
import pandas as pd

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.reranker import Reranker

HERE = Path(__file__).parent
DATA = os.path.relpath(HERE / "data")  # the user's own files: runs in TREC format, collections in folders
SHARED = Path(os.path.relpath(HERE.parents[1] / "shared" / "data"))  # only some machines have this folder
RUNS = [Path(DATA) / "runs", SHARED / "runs"]  # the user's own files and those of fetch.py come first

# Checkpoint -> window size; the stride is half of the window size
LIT5_V2: dict[str, int] = {f"castorini/LiT5-Distill-{size}-v2": 100 for size in ("base", "large", "xl")}
LIT5_V1: dict[str, int] = {f"castorini/LiT5-Distill-{size}": 20 for size in ("base", "large", "xl")}
LIT5_SCORE: list[str] = [f"castorini/LiT5-Score-{size}" for size in ("base", "large", "xl")]
MONOELECTRA: dict[str, str] = {
    f"monoELECTRA-{size} two-stage RankZephyr-CBv2": f"webis/monoelectra-{size}" for size in ("base", "large")
}
PE_RANK: dict[str, str] = {"PE-Rank (Jina)": "liuqi6777/pe-rank-mistral-jina"}

IRDS_DL: dict[str, str] = {
    "dl19": "irds:msmarco-passage/trec-dl-2019/judged",
    "dl20": "irds:msmarco-passage/trec-dl-2020/judged",
    "dl21": "irds:msmarco-passage-v2/trec-dl-2021/judged",
    "dl22": "irds:msmarco-passage-v2/trec-dl-2022/judged",
}
# BioASQ, Signal-1M, TREC-NEWS and Robust04 may not be downloaded freely. Their sources are folders of the user, with
# docs.jsonl (docno, title, text), queries.tsv and qrels.txt
BEIR: dict[str, str] = {
    "beir/trec-covid": "irds:beir/trec-covid",
    "beir/bioasq": f"{DATA}/beir/bioasq",
    "beir/nfcorpus": "irds:beir/nfcorpus/test",
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
PE_RANK_BEIR: list[str] = [
    *("trec-covid", "nfcorpus", "webis-touche2020", "dbpedia-entity"),
    *("scifact", "signal1m", "trec-news", "robust04"),
]
NANO_BEIR: list[str] = [  # collections of 50 queries each, in ir_datasets
    *("arguana", "climate-fever", "dbpedia-entity", "fever", "fiqa", "hotpotqa", "msmarco", "nfcorpus", "nq", "quora"),
    *("scidocs", "scifact", "webis-touche2020"),
]
TASKS = pd.read_csv(HERE / "tirex_tasks.csv")
TIREX = "tirex (bm25; chatnoir for clueweb)"
CORPORA: dict[str, str] = {  # corpus of a task of TIREx -> its name in published.csv
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


@dataclasses.dataclass(frozen=True)
class Collection:
    """A collection and its first stages.

    source: what `corpora.load` loads, such as `python-docs/test`, `irds:ID`, a folder or a qrels file. first_stages:
    name of a first stage -> its source for `first_stages.load`. systems: the public runs over each first stage, as name
    of the first stage -> name of the system -> file.
    """

    source: str
    first_stages: dict[str, str]
    corpus: str = ""  # TIREx: the corpus that a task belongs to
    systems: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rerankers of a paper, and the collections on which they are evaluated. Each reranker reranks each first stage
    of each collection. The keys of `rerankers` are the rerankers' names. A published checkpoint has the same name as in
    published.csv."""

    paper: str
    tables: tuple[str, ...]  # names of tables of published.csv
    collections: dict[str, Collection]
    rerankers: dict[str, Reranker] = dataclasses.field(default_factory=dict)  # empty: only the first stages
    text_of: corpora.TextOf | None = None  # makes a passage's text from its fields; None: ir_datasets' default
    depth: int | None = None  # number of passages reranked; None: the depth of the profile


def runs_of(collection: str, *names: str) -> dict[str, str]:
    """The run files of a collection's first stages, as a dict: name of a first stage -> path."""
    return {name: str(find(f"{collection}.{name}")) for name in names}


def find(name: str) -> Path:
    """The path of the file NAME.txt or NAME.txt.gz in a folder of RUNS. If there is no such file, the path of NAME.txt
    in the first of these folders."""
    wanted = [folder / f"{name}.txt{packed}" for folder in RUNS for packed in ("", ".gz")]
    return next((path for path in wanted if path.exists()), wanted[0])


def where_present(collections: dict[str, Collection]) -> dict[str, Collection]:
    return {name: collection for name, collection in collections.items() if Path(collection.source).exists()}


def lit5_distill(models: dict[str, int], max_length: int) -> dict[str, Reranker]:
    """LiT5-Distill checkpoints. models: name -> window size. max_length: maximum length of a prompt in tokens."""
    return {
        name: LiT5Distill(name, window_size=window, stride=window // 2, max_length=max_length, verbose=True)
        for name, window in models.items()
    }


def lit5() -> dict[str, Reranker]:
    """All LiT5 checkpoints as evaluated on MS MARCO, with prompts of at most 150 tokens."""
    scores: dict[str, Reranker] = {
        name: LiT5Score(name, n_passages=100, max_length=150, answer_length=20, verbose=True) for name in LIT5_SCORE
    }
    return lit5_distill(LIT5_V2, 150) | lit5_distill(LIT5_V1, 150) | scores


def cross_encoders() -> dict[str, Reranker]:
    """Rank-DistiLLM's cross-encoders. They read at most 32 tokens of a query and 256 of a passage."""
    return {
        name: CrossEncoder(model, query_length=32, doc_length=256, verbose=True) for name, model in MONOELECTRA.items()
    }


def pe_rankers() -> dict[str, Reranker]:
    return {name: PERank(model, window_size=20, stride=10, verbose=True) for name, model in PE_RANK.items()}


def one_of_each() -> dict[str, Reranker]:
    return {
        "CrossEncoder": cross_encoders()["monoELECTRA-base two-stage RankZephyr-CBv2"],
        "LiT5-Distill": lit5()["castorini/LiT5-Distill-base-v2"],
        "LiT5-Score": lit5()["castorini/LiT5-Score-base"],
        "PE-Rank": pe_rankers()["PE-Rank (Jina)"],
    }


def trec_dl() -> list[Comparison]:
    """The comparisons on TREC DL: LiT5's table 1, Rank-DistiLLM's table 1, and the figures of PE-Rank. BM25 is
    Anserini's for LiT5 and PE-Rank, and Terrier's for Rank-DistiLLM."""
    return [
        Comparison(
            "LiT5",
            ("ecir_table1", "ref_readme_2024"),
            {name: Collection(source, runs_of(name, "bm25", "splade++ed")) for name, source in IRDS_DL.items()},
            lit5(),
        ),
        Comparison(
            "Rank-DistiLLM",
            ("arxiv_table1", "ecir_dl"),
            {
                name: Collection(IRDS_DL[name], {"bm25": "terrier:msmarco_passage"} | runs_of(name, "colbertv2"))
                for name in ("dl19", "dl20")
            },
            cross_encoders(),
        ),
        Comparison(
            "PE-Rank",
            ("issue5", "figure1", "paper_main"),
            {name: Collection(IRDS_DL[name], runs_of(name, "bm25")) for name in ("dl19", "dl20")},
            pe_rankers(),
        ),
    ]


def beir() -> list[Comparison]:
    """The comparisons on BEIR: LiT5's table 2 (17 collections, prompts of at most 512 tokens) and the eight collections
    of PE-Rank. The first stage is BM25 over title and text ("flat")."""
    return [
        Comparison(
            "LiT5",
            ("ecir_table2",),
            {name: Collection(source, {"bm25": "bm25:anserini"}) for name, source in BEIR.items()},
            lit5_distill(LIT5_V2, 512),
            text_of=corpora.text_alone,  # the prompts have no title
        ),
        Comparison(
            "PE-Rank",
            ("paper_main",),
            {f"beir/{name}": Collection(BEIR[f"beir/{name}"], {"bm25": "bm25:anserini"}) for name in PE_RANK_BEIR},
            pe_rankers(),
            text_of=corpora.titled_text,
        ),
    ]


def tirex() -> list[Comparison]:
    """The comparison on the 31 tasks of Rank-DistiLLM's table 2. The first stage is a run of 100 passages per query:
    PyTerrier's BM25 or, for ClueWeb, ChatNoir. The run of the task antique/test, for example, is the file
    tirex/antique-test.txt in a folder of RUNS."""
    tasks = TASKS[["corpus", "ir_datasets_id"]].itertuples(index=False)
    collections = {
        task: Collection(f"irds:{task}", {TIREX: str(find(f"tirex/{task.replace('/', '-')}"))}, CORPORA[corpus])
        for corpus, task in tasks
    }
    return [Comparison("Rank-DistiLLM", ("arxiv_table2",), collections, cross_encoders())]


def qa() -> dict[str, Collection]:
    """Collections of questions with short answers: WikiQA, TREC QA and BEIR's NQ. WikiQA and TREC QA are in folders,
    and their first stage is BM25 over the candidates of each question."""
    places = {name: (Path(DATA) / name, SHARED / name) for name in ("wikiqa", "trecqa")}
    folders = {name: shared if shared.exists() and not own.exists() else own for name, (own, shared) in places.items()}
    candidates = {name: Collection(str(path), {"bm25": f"{path}/run.txt"}) for name, path in folders.items()}
    return candidates | {"beir/nq": Collection(BEIR["beir/nq"], {"bm25": "bm25:anserini"})}


def further() -> dict[str, Collection]:
    """Collections on which none of the papers evaluated: NanoBEIR and DL23."""
    nano = {f"nano-beir/{name}": Collection(f"irds:nano-beir/{name}", {"bm25": "bm25:anserini"}) for name in NANO_BEIR}
    return nano | {"dl23": Collection("irds:msmarco-passage-v2/trec-dl-2023/judged", runs_of("dl23", "bm25"))}


# The rankings of Rank-DistiLLM's teacher (Zenodo 15131907)
RANKZEPHYR: str = f"{DATA}/runs/msmarco-train.rankzephyr-colbertv2.txt"


def ms_marco() -> Collection:
    """The training data of Rank-DistiLLM's students: the first passages of ColBERTv2 for training queries of MS
    MARCO."""
    return Collection("irds:msmarco-passage/train", {"first": f"{DATA}/runs/msmarco-train.colbertv2.txt"})


def monoelectra() -> CrossEncoder:
    """Rank-DistiLLM's student before training."""
    return CrossEncoder.from_backbone("google/electra-base-discriminator", query_length=32, doc_length=256)
