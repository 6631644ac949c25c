"""The README's demo: evaluates BM25 alone and BM25 with each reranker, and shows the results as a table and a chart. It
also prints the first three passages of one query before and after reranking.

quickstart.py                                           on Python's own documentation
quickstart.py --collection FOLDER --model NAME          on docs.jsonl[.gz], queries.tsv, qrels.txt[, run.txt] in FOLDER
quickstart.py --collection irds:vaswani --model NAME    on a dataset of ir_datasets
quickstart.py --first-stage terrier                     with Terrier in place of PISA; requires Java
"""

import argparse
import json
import os
import shutil
import textwrap
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import corpora
import first_stages
import measured
import pandas as pd
import pyterrier as pt
from pyterrier.measures import RR, nDCG

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.reranker import Reranker

TINY = Path(__file__).parent / "tiny"
HELD_OUT = {"python-docs": "test-"}  # beginning of the qids of test topics; other topics are for development
SHOWN = {"python-docs": "test-09"}  # qid of the query whose top three are printed; by default, the first query


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="python-docs", help="python-docs, a folder, or irds:ID")
    parser.add_argument("--model", help="a cross-encoder: hub id or folder; default: the project's small checkpoints")
    parser.add_argument(
        "--first-stage", choices=["pisa", "terrier"], default="pisa", help="the engine of BM25; terrier requires Java"
    )
    parser.add_argument("--depth", type=int, default=100, help="number of passages reranked per query")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for results.png and results.json")
    measured.add_option(parser)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    collection = corpora.load(arguments.collection)
    held_out = HELD_OUT.get(arguments.collection)
    topics, qrels = collection.get_topics(held_out), collection.get_qrels(held_out)
    name, first = first_stage(collection, held_out, arguments)
    chosen = rerankers(arguments.model)
    for reranker in chosen:
        reranker.load()  # so that loading does not count in mrt
    candidates = first % arguments.depth >> collection.text_loader()
    table = pt.Experiment(
        [first, *(candidates >> reranker for reranker in chosen)],
        topics,
        qrels,
        [nDCG @ 10, RR @ 10, "mrt"],
        names=[name, *(f"{name} >> {type(reranker).__name__}" for reranker in chosen)],
        baseline=0,
        plan="tree",
        verbose=False,
    )
    if arguments.record:
        found = measured.from_experiment(table, len(topics), [nDCG @ 10, RR @ 10])
        measured.record(f"Do the rerankers rank {collection.name}?", found)
    rows = table.rename(columns={"nDCG@10 p-value": "p"})[["name", "nDCG@10", "RR@10", "mrt", "p"]]
    print(f"\n{header(collection.name, len(topics), arguments)}\n")
    print(rows.to_string(index=False, float_format="{:.4f}".format, na_rep=""))
    gained, lost = table.loc[1, ["nDCG@10 +", "nDCG@10 -"]].astype(int)
    print(f"\n{rows['name'][1]}: nDCG@10 rises for {gained} of {len(topics)} queries and falls for {lost}.")
    query = topics[topics["qid"] == SHOWN.get(arguments.collection, topics["qid"][0])]
    show_top_three(query, qrels, {name: candidates, rows["name"][1]: candidates >> chosen[0]})
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    (arguments.output / "results.json").write_text(json.dumps(records, indent=2) + "\n")
    draw(rows, f"{collection.name}: {len(topics)} queries, {models(arguments)}", arguments.output / "results.png")
    print(f"\nwritten: {arguments.output / 'results.png'}, {arguments.output / 'results.json'}")


def rerankers(model: str | None) -> list[Reranker]:
    if model is not None:
        return [CrossEncoder(model, verbose=True)]
    return [
        CrossEncoder(str(TINY / "cross-encoder"), verbose=True),
        LiT5Distill(str(TINY / "lit5-distill"), verbose=True),
        LiT5Score(str(TINY / "lit5-score"), verbose=True),
        PERank(str(TINY / "pe-rank"), verbose=True),
    ]


def first_stage(
    collection: corpora.Collection, held_out: str | None, arguments: argparse.Namespace
) -> tuple[str, pt.Transformer]:
    """The name and the transformer of the first stage: the collection's own run or, if there is no run, BM25 (k1 = 0.9,
    b = 0.4) over a new index in PISA or Terrier."""
    if collection.run is not None:
        return "run.txt", pt.Transformer.from_df(collection.get_results(held_out))
    if arguments.first_stage == "terrier":
        print(f"indexing {collection.name} with Terrier")
        index = arguments.output / "index.terrier"
        return "BM25 (Terrier)", first_stages.terrier(collection, index, arguments.depth, overwrite=True)
    other = "; --first-stage terrier uses Terrier" if shutil.which("java") else ""
    print(f"indexing {collection.name} with PISA{other}")
    return "BM25", first_stages.bm25(collection, arguments.output / "index.pisa", arguments.depth, overwrite=True)


def header(collection: str, n_queries: int, arguments: argparse.Namespace) -> str:
    lines = [f"{collection}, {n_queries} queries; the first {arguments.depth} passages reranked by {models(arguments)}"]
    if collection == "python-docs":
        lines.append("Many questions avoid the docstrings' words on purpose, so BM25 scores low.")
    if arguments.model is None:
        lines.append("The small models were trained on Python's documentation alone: they show that everything runs,")
        lines.append("not how good the published checkpoints are. For other texts give another model with --model.")
    lines.append("mrt: milliseconds per query, first stage included; p: paired t-test on nDCG@10 against the first row")
    return "\n".join(lines)


def models(arguments: argparse.Namespace) -> str:
    return arguments.model or "small models of 2 to 6 million parameters"


def show_top_three(query: pd.DataFrame, qrels: pd.DataFrame, pipelines: dict[str, pt.Transformer]) -> None:
    """Print the first three passages of each pipeline for one query, with their grades in the judgements.

    query: a frame of one row, qid and query.
    """
    best = qrels["label"].max()
    print(f'The top three for "{query["query"].item()}", with the judged grades (0 to {best}):')
    grades = qrels[qrels["qid"] == query["qid"].item()].set_index("docno")["label"]
    for name, pipeline in pipelines.items():
        print(f"\n  {name}")
        for row in pipeline(query).sort_values("rank").head(3).itertuples():
            text = textwrap.shorten(row.text, 90, placeholder=" ...")
            print(f"  {row.rank + 1}. grade {grades.get(row.docno, 0)}: {text}")


def draw(rows: pd.DataFrame, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from plots import log_scale

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    middle = (rows["mrt"].min() * rows["mrt"].max()) ** 0.5
    for name, ndcg, mrt, p in rows[["name", "nDCG@10", "mrt", "p"]].itertuples(index=False):
        axes.scatter(mrt, ndcg, s=45)
        label = name if pd.isna(p) else f"{name}, p = {p:.2g}"
        side = {"ha": "right", "xytext": (-8, 0)} if mrt > middle else {"ha": "left", "xytext": (8, 0)}
        axes.annotate(label, (mrt, ndcg), textcoords="offset points", va="center", **side)
    log_scale(axes)
    axes.set(xlabel="milliseconds per query", ylabel="nDCG@10", title=title)
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
