"""Finds run files, public ones and your own, and gives their systems the names of published.csv.

Files are called COLLECTION.qrels.txt, COLLECTION.STAGE.txt (a first stage) and COLLECTION.STAGE.SYSTEM.txt (reranked).
For example, dl19.bm25.rankzephyr.txt is RankZephyr over BM25 on DL19. All files are in TREC format, gzipped or not. In
the name of a system, "--" stands for a slash. Nothing is ranked or measured in this module.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import compare
import pandas as pd
import papers
from papers import CORPORA, RUNS, SHARED, TASKS, TIREX, Collection, Comparison, find

ADVICE = "python experiments/fetch.py lists what can be fetched for which notebook"

SYSTEMS = {"rankvicuna": "RankVicuna 7B", "rankzephyr": "RankZephyr 7B"} | {
    f"rankgpt3.5-{n}": f"RankGPT 3.5 #{n}" for n in range(1, 6)
}
TIREX_SYSTEMS = {
    "MonoT5 Base (tira-ir-starter-gygaggle)": "monoT5-base",
    "MonoT5 Large (tira-ir-starter-gygaggle)": "monoT5-large",
    "latent-wetland": "monoT5-3B",  # TIREx does not name monoT5-3B; the figures of this system agree
}


def collection(name: str, stages: Mapping[str, str], tables: Iterable[str]) -> Collection:
    """The judgements, first stages and systems of a collection, without its documents.

    stages: the name of a first stage in published.csv -> its name in the file names. tables: names of tables in
    published.csv. A system that has figures only in other tables is left out.
    """
    figures = compare.published()
    printed = figures["table"].isin(list(tables))
    elsewhere = set(figures["model"]) - set(figures.loc[printed, "model"])
    systems = {
        stage: {
            system: str(path)
            for system, path in systems_over(f"{name}.{file}").items()
            if re.sub(r" #\d+$", "", system) not in elsewhere
        }
        for stage, file in stages.items()
    }
    first_stages = {stage: str(find(f"{name}.{file}")) for stage, file in stages.items()}
    return Collection(str(find(f"{name}.qrels")), first_stages, systems=systems)


def systems_over(first_stage: str) -> dict[str, Path]:
    """The run files over a first stage, as a dict sorted by name: name of the system in published.csv -> path.
    first_stage: the collection and the first stage, such as "dl19.bm25"."""
    found = {}
    for folder in reversed(RUNS):
        for path in folder.glob(f"{first_stage}.*.txt*"):
            system = re.sub(r"\.txt(\.gz)?$", "", path.name).removeprefix(f"{first_stage}.")
            found[SYSTEMS.get(system, system.replace("--", "/"))] = path
    return dict(sorted(found.items()))


def trec_dl() -> list[Comparison]:
    """The papers' comparisons on TREC DL, with public runs in place of models. The comparisons need judgements, but no
    texts."""
    stages = [{"bm25": "bm25", "splade++ed": "splade++ed"}, {"bm25": "bm25-terrier", "colbertv2": "colbertv2"}]
    return [
        dataclasses.replace(
            paper,
            collections={name: collection(name, names, paper.tables) for name in paper.collections},
            rerankers={},
            depth=100,
        )
        for paper, names in zip(papers.trec_dl(), [*stages, {"bm25": "bm25"}], strict=True)
    ]


def beir() -> list[Comparison]:
    """BM25 on NFCorpus, and the user's own runs on any collection of BEIR whose judgements are available."""
    nfcorpus = {"beir/nfcorpus": Collection(str(SHARED / "nfcorpus"), {"bm25": "bm25:anserini"})}
    return [
        dataclasses.replace(
            paper,
            collections=(nfcorpus if paper.paper == "LiT5" else {})
            | papers.where_present(
                {name: collection(name.replace("/", "-"), {"bm25": "bm25"}, paper.tables) for name in paper.collections}
            ),
            rerankers={},
            depth=100,
        )
        for paper in papers.beir()
    ]


def tirex() -> list[Comparison]:
    """BM25 with TIREx's settings on two corpora of TIREx: Cranfield and Vaswani."""
    corpora = {name: Collection(str(SHARED / name), {TIREX: "bm25:terrier"}, name) for name in ("cranfield", "vaswani")}
    return [dataclasses.replace(papers.tirex()[0], collections=corpora, rerankers={})]


def tirex_evaluations() -> pd.DataFrame:
    """TIREx's own nDCG@10 for the rows of monoT5 in Rank-DistiLLM's table 2. Returns a row per task and model, with the
    columns task, corpus, model, value.

    TIREx does not name monoT5-3B. We take the system whose figures agree with those of monoT5-3B. If the file with the
    evaluations is missing, the frame is empty, and a printed line says what to fetch.
    """
    path = next((path for folder in RUNS if (path := folder / "tirex.all_evaluations.json").exists()), None)
    if path is None:
        print(f"{RUNS[0] / 'tirex.all_evaluations.json'} is not here; {ADVICE}")
    evaluations = json.loads(path.read_text(encoding="utf-8")) if path else {}
    tasks = {re.sub(r"/\d{4}-\d\d-\d\d", "", task).replace("/", "-"): task for task in TASKS["ir_datasets_id"]}
    corpus = dict(zip(TASKS["ir_datasets_id"], TASKS["corpus"].map(CORPORA), strict=True))
    rows = [
        (task := tasks[re.sub(r"-\d{8}-training$", "", name)], corpus[task], TIREX_SYSTEMS[system], figures["ndcg@10"])
        for name, systems in evaluations.items()
        for system, figures in systems.items()
        if system in TIREX_SYSTEMS and figures
    ]
    return pd.DataFrame(rows, columns=["task", "corpus", "model", "value"])
