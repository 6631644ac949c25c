"""Runs every reranker of a comparison over every first stage. The runs are stored, so that an interrupted sweep
resumes."""

import dataclasses
import gc
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import compare
import corpora
import first_stages
import measured
import pandas as pd
import pyterrier as pt
import requests
import torch
from papers import Comparison
from significance import adjusted

from pyterrier_lit.reranker import Reranker

MISSING = (FileNotFoundError, ConnectionError, requests.ConnectionError)  # raised for a missing run, corpus or network


@dataclasses.dataclass(frozen=True)
class Place:
    """A first stage over a collection. A comparison evaluates its rerankers and public systems on this first stage."""

    collection: str
    stage: str
    corpus: str
    topics: pd.DataFrame
    qrels: pd.DataFrame
    first: pt.Transformer
    texts: pt.Transformer | None  # None: the comparison has no rerankers
    systems: dict[str, pt.Transformer]
    folder: Path

    def pipelines(self, rerankers: dict[str, Reranker]) -> dict[str, pt.Transformer]:
        """A dict of pipelines by name: the first stage alone, each reranker over the first stage, and the public
        systems."""
        reranked = {name: self.first >> self.texts >> reranker for name, reranker in rerankers.items()}
        return {compare.FIRST_STAGE: self.first} | reranked | self.systems


def run(
    comparison: Comparison, measures: list, folder: Path, *, depth: int, verbose: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluate a comparison. Returns two frames. The first has the means, with the columns of `compare.results`. The
    second has the values per query, with the columns paper, collection, corpus, first_stage, model, qid, measure,
    value. Each qid of the second frame begins with the collection and a slash, since two collections may use the same
    qid.

    Each reranker is evaluated over all first stages, and then unloaded before the next reranker is loaded. If a run or
    a licensed corpus is missing, its rows are left out, and a printed line names the missing data.

    depth: number of passages reranked, unless the comparison sets it. folder: keeps indexes, first stages and runs,
    which a later call uses again.
    """
    depth = comparison.depth or depth
    found = list(places(comparison, folder, depth, verbose))
    for name, reranker in comparison.rerankers.items():
        for place in pt.tqdm(found, desc=name, unit="first stage", disable=not verbose):
            evaluate({name: place.pipelines({name: reranker})[name]}, place.topics, place.qrels, measures, place.folder)
        unload(reranker)
    means, queries = [], []
    for place in found:
        averages, each = experiment(
            place.pipelines(comparison.rerankers), place.topics, place.qrels, measures, place.folder
        )
        facts = {"paper": comparison.paper, "collection": place.collection, "first_stage": place.stage}
        means.append(compare.results(averages, **facts, depth=depth))
        queries.append(each.assign(**facts, corpus=place.corpus, qid=f"{place.collection}/" + each["qid"]))
    nothing = pd.DataFrame(columns=[*compare.KEY, "measured", "p"])
    nobody = pd.DataFrame(columns=["model", "qid", "measure", "value", *compare.KEY[:3], "corpus"])
    return pd.concat(means or [nothing], ignore_index=True), pd.concat(queries or [nobody], ignore_index=True)


def places(comparison: Comparison, folder: Path, depth: int, verbose: bool = False) -> Iterator[Place]:
    """Yield a `Place` for each first stage over each collection of a comparison. If a collection or a first stage is
    missing, a line is printed, and no `Place` is yielded for it."""
    for name in pt.tqdm(comparison.collections, desc=comparison.paper, unit="collection", disable=not verbose):
        for stage in comparison.collections[name].first_stages:
            try:
                yield _place(comparison, name, stage, folder / comparison.paper / name / stage, depth)
            except MISSING as error:
                missing, _, _ = str(error).partition("; wanted")  # the rest says which format a file must have
                print(f"{name}, {stage}: left out. {missing}")


def unload(reranker: Reranker) -> None:
    """Free the memory of a reranker. Its weights are loaded again when it is used next."""
    reranker.hold(None)
    gc.collect()
    torch.cuda.empty_cache()


def experiment(
    pipelines: dict[str, pt.Transformer],
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    measures: list,
    folder: Path,
    *,
    baseline: str = compare.FIRST_STAGE,
    correction: str = "holm",
    verbose: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run a `pt.Experiment` over named pipelines. Returns its table, and a frame of the values per query (model, qid,
    measure, value).

    The table has paired t-tests against the pipeline named `baseline`. Their p-values are corrected ("holm",
    "bonferroni") for the number of other pipelines. A pipeline whose values all equal the baseline's has no p-value,
    and does not count in the correction. Raises ValueError if `baseline` is none of the pipelines.

    folder: keeps the run of each pipeline. A run is used again if the pipeline's repr and the topics are the same. If a
    checkpoint has changed under the same name, delete the run. verbose: show a progress bar over the pipelines.
    """
    if baseline not in pipelines:
        raise ValueError(f"baseline={baseline!r} is none of the pipelines {', '.join(map(repr, pipelines))}")
    number = None if len(pipelines) == 1 else list(pipelines).index(baseline)
    averages, queries = evaluate(pipelines, topics, qrels, measures, folder, baseline=number, verbose=verbose)
    if number is not None:
        averages = corrected(averages, measures, correction)
    return measured.noted("/".join(folder.parts[-2:]), averages, len(topics), measures), queries


def evaluate(
    pipelines: dict[str, pt.Transformer],
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    measures: list,
    folder: Path,
    *,
    baseline: int | None = None,
    verbose: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run a `pt.Experiment` as `experiment` does, but without correction of the p-values. baseline: position of the
    baseline in `pipelines`, from 0. If it is None, no tests are made."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = topics.to_csv(index=False)
    files = {
        f"{name.replace('/', '--')} {zlib.crc32((repr(pipeline) + asked).encode()):08x}": name
        for name, pipeline in pipelines.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There are shared pipeline components")  # with plan="tree", no runs are kept
        warnings.filterwarnings("ignore", "Evaluation measures differ between the existing")  # tests add columns
        averages = pt.Experiment(
            list(pipelines.values()),
            topics,
            qrels,
            measures,
            names=list(files),
            baseline=baseline,
            save_dir=str(folder),
            save_mode="reuse",
            verbose=verbose,
        )
    queries = pd.read_csv(folder / "perquery.csv", dtype={"qid": str}).query("name in @files")
    queries = queries.assign(model=queries["name"].map(files)).drop(columns="name")
    return averages.assign(name=averages["name"].map(files)), queries


def corrected(averages: pd.DataFrame, measures: list, correction: str) -> pd.DataFrame:
    """Add two columns for each measure: "MEASURE p-value corrected", and "MEASURE reject" (True if the corrected
    p-value is below .05)."""
    columns = {}
    for measure in map(str, measures):
        p = adjusted(averages[f"{measure} p-value"], correction)
        columns |= {f"{measure} reject": p < 0.05, f"{measure} p-value corrected": p}
    return averages.assign(**columns)


def _place(comparison: Comparison, name: str, stage: str, folder: Path, depth: int) -> Place:
    where = comparison.collections[name]
    collection = corpora.load(where.source)
    topics = collection.get_topics()
    first = first_stages.load(where.first_stages[stage], collection, folder, depth)
    texts = corpora.load(where.source, comparison.text_of).text_loader() if comparison.rerankers else None
    if texts is not None:
        (first >> texts)(topics.head(1))  # raises an error now, not after hours, if the corpus is missing
    systems = {system: first_stages.stored(path) % depth for system, path in where.systems.get(stage, {}).items()}
    return Place(name, stage, where.corpus, topics, collection.get_qrels(), first, texts, systems, folder)
