"""Sweeps: every reranker of a comparison over every first stage. Runs are kept, so that a sweep goes on where it
stopped."""

import warnings
import zlib
from pathlib import Path

import compare
import corpora
import first_stages
import measured
import pandas as pd
import pyterrier as pt
from papers import Comparison


def run(
    comparison: Comparison, measures: list, folder: Path, *, depth: int, verbose: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The means as `compare.results` gives them, and the same per query: paper, collection, corpus, first_stage, model,
    qid, measure, value.

    folder: keeps indexes, first stages and runs, and is asked before anything is computed. A qid begins with its
    collection and a slash, for topics of two collections may share a number. Fewer than all topics are another
    collection by name.
    """
    means, queries = [], []
    for name, where in pt.tqdm(
        comparison.collections.items(), desc=comparison.paper, unit="collection", disable=not verbose
    ):
        collection = corpora.load(where.source)
        passages = corpora.load(where.source, comparison.text_of) if comparison.text_of else collection
        part = "" if comparison.topics is None else f", first {comparison.topics} topics"
        for stage, source in where.first_stages.items():
            here = folder / comparison.paper / name / stage
            first = first_stages.load(source, collection, here, depth)
            averages, each = experiment(
                {compare.FIRST_STAGE: first}
                | {
                    model: first >> passages.text_loader() >> reranker
                    for model, reranker in comparison.rerankers.items()
                },
                collection.get_topics().iloc[: comparison.topics],
                collection.get_qrels(),
                measures,
                here,
                verbose=verbose,
            )
            facts = {"paper": comparison.paper, "collection": name + part, "first_stage": stage}
            means.append(compare.results(averages, **facts, depth=depth))
            queries.append(each.assign(**facts, corpus=where.corpus + part, qid=f"{name}/" + each["qid"]))
    nothing = pd.DataFrame(columns=[*compare.KEY, "measured", "p"])
    return pd.concat(means or [nothing], ignore_index=True), pd.concat(queries or [pd.DataFrame()], ignore_index=True)


def experiment(
    pipelines: dict[str, pt.Transformer],
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    measures: list,
    folder: Path,
    *,
    baseline: str = compare.FIRST_STAGE,
    verbose: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`pt.Experiment` over pipelines by name: its table, and per query (model, qid, measure, value).

    The table has paired t-tests against the pipeline named `baseline`, Holm-corrected over the others.
    folder: keeps each pipeline's run. A run is used again when the pipeline's repr and the topics are the same; delete
        it when a checkpoint behind a name has changed. verbose: a bar over the pipelines, with the time that is left.
    """
    if baseline not in pipelines:
        raise ValueError(f"baseline={baseline!r} is none of the pipelines {', '.join(map(repr, pipelines))}")
    folder.mkdir(parents=True, exist_ok=True)
    asked = topics.to_csv(index=False)
    files = {
        f"{name.replace('/', '--')} {zlib.crc32((repr(pipeline) + asked).encode()):08x}": name
        for name, pipeline in pipelines.items()
    }
    alone = len(pipelines) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There are shared pipeline components")  # plan="tree" would keep no runs
        averages = pt.Experiment(
            list(pipelines.values()),
            topics,
            qrels,
            measures,
            names=list(files),
            baseline=None if alone else list(pipelines).index(baseline),
            correction=None if alone else "holm",
            save_dir=str(folder),
            save_mode="reuse",
            verbose=verbose,
        )
    queries = pd.read_csv(folder / "perquery.csv", dtype={"qid": str}).query("name in @files")
    queries = queries.assign(model=queries["name"].map(files)).drop(columns="name")
    averages = averages.assign(name=averages["name"].map(files))
    return measured.noted("/".join(folder.parts[-2:]), averages, len(topics), measures), queries
