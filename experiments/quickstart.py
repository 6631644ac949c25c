"""The README's first command: BM25 against BM25 and each reranker on a real collection, as a table and a chart.

quickstart.py                                           Python's own documentation
quickstart.py --collection FOLDER --model NAME          docs.jsonl[.gz], queries.tsv, qrels.txt[, run.txt]
quickstart.py --collection irds:vaswani --model NAME    ir_datasets' id
quickstart.py --first-stage terrier                     Terrier in place of PISA; needs Java
"""

import argparse
import json
import os
import shutil
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
HELD_OUT = {"python-docs": "test-"}  # the topics to evaluate on, where a collection has others for development


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="python-docs", help="python-docs, a folder, or irds:ID")
    parser.add_argument("--model", help="a cross-encoder: hub id or folder; default: the project's small checkpoints")
    parser.add_argument(
        "--first-stage", choices=["pisa", "terrier"], default="pisa", help="whose BM25; terrier needs Java"
    )
    parser.add_argument("--depth", type=int, default=100, help="passages reranked per query")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for results.png and results.json")
    measured.add_option(parser)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    collection = corpora.load(arguments.collection)
    held_out = HELD_OUT.get(arguments.collection)
    name, first = first_stage(collection, held_out, arguments)
    chosen = rerankers(arguments.model)
    candidates = first % arguments.depth >> collection.text_loader()
    table = pt.Experiment(
        [first, *(candidates >> reranker for reranker in chosen)],
        collection.get_topics(held_out),
        collection.get_qrels(held_out),
        [nDCG @ 10, RR @ 10, "mrt"],
        names=[name, *(f"{name} >> {type(reranker).__name__}" for reranker in chosen)],
        baseline=0,
        plan="tree",
        verbose=False,
    )
    if arguments.record:
        found = measured.from_experiment(table, len(collection.get_topics(held_out)), [nDCG @ 10, RR @ 10])
        measured.record(f"Do the rerankers rank {collection.name}?", found)
    rows = table.rename(columns={"nDCG@10 p-value": "p"})[["name", "nDCG@10", "RR@10", "mrt", "p"]]
    show(rows, collection, arguments)


def rerankers(model: str | None) -> list[Reranker]:
    """A cross-encoder of the reader's, or the project's small checkpoints."""
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
    """The collection's own run if it has one, else BM25 (k1 = 0.9, b = 0.4) over an index made now, PISA's or
    Terrier's."""
    if collection.run is not None:
        return "run.txt", pt.Transformer.from_df(collection.get_results(held_out))
    if arguments.first_stage == "terrier":
        print(f"indexing {collection.name} with Terrier")
        index = arguments.output / "index.terrier"
        return "BM25 (Terrier)", first_stages.terrier(collection, index, arguments.depth, overwrite=True)
    other = "; --first-stage terrier takes Terrier" if shutil.which("java") else ""
    print(f"indexing {collection.name} with PISA{other}")
    return "BM25", first_stages.bm25(collection, arguments.output / "index.pisa", arguments.depth, overwrite=True)


def show(rows: pd.DataFrame, collection: corpora.Collection, arguments: argparse.Namespace) -> None:
    """Print the table; write results.json and results.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = arguments.model or f"the small checkpoints of {TINY.name}"
    print(f"\n{collection.name}, {shown}, the first {arguments.depth} passages reranked")
    print("mrt: milliseconds per query, of the whole pipeline; p: paired t-test on nDCG@10 against the first row\n")
    print(rows.to_string(index=False, float_format="{:.4f}".format, na_rep=""))
    if arguments.model is None and arguments.collection != "python-docs":
        print(
            "\nThese small models have only ever read Python's documentation: for other texts give a real one with"
            " --model."
        )
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    (arguments.output / "results.json").write_text(json.dumps(records, indent=2) + "\n")

    axes = rows.plot.bar(x="name", y=["nDCG@10", "RR@10"], rot=0, ylim=(0, 1), figsize=(11, 4), width=0.7)
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.3f")
    axes.set(
        title=f"{collection.name}: {len(collection.get_topics(HELD_OUT.get(arguments.collection)))} queries", xlabel=""
    )
    axes.legend(loc="upper left")
    pyplot.tight_layout()
    pyplot.savefig(arguments.output / "results.png", dpi=150)
    print(f"\nwritten: {arguments.output / 'results.png'}, {arguments.output / 'results.json'}")


if __name__ == "__main__":
    main()
