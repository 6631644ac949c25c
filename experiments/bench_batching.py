"""Measures how much of a batch is padding, for five ways to batch a cross-encoder's query-passage pairs. Run by hand.

    python experiments/bench_batching.py ../shared/data/dl19 [--model experiments/tiny/cross-encoder] [--record]

Each query of the collection is paired with its first 100 passages in the collection's run. For each way to batch, the
script prints the number of tokens with padding, divided by the number of tokens without padding. This ratio depends
only on the lengths of the pairs in tokens.
"""

import argparse
from pathlib import Path

import corpora
import measured
import pyterrier as pt

from pyterrier_lit import CrossEncoder
from pyterrier_lit.batching import map_batches


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", help="a folder with docs.jsonl[.gz], queries.tsv, qrels.txt and run.txt")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "tiny" / "cross-encoder")
    measured.add_option(parser)
    arguments = parser.parse_args()
    collection = corpora.load(arguments.collection)
    first = pt.RankCutoff(100) >> collection.text_loader()
    reranker = CrossEncoder(arguments.model, query_length=32, doc_length=256)
    lists = []
    for _, ranking in first(collection.get_results()).sort_values(["qid", "rank"]).groupby("qid"):
        layout, pairs = reranker.pairs(list(zip(ranking["query"], ranking.text, strict=True)))
        lists.append([layout.length(pair) for pair in pairs])
    arrived = [length for ranking in lists for length in ranking]
    in_queries = [length for ranking in lists for length in sorted(ranking)]
    print(f"{len(lists)} queries, {len(arrived)} pairs, {sum(arrived) / len(arrived):.1f} tokens a pair")
    rows = []
    for name, batches in {
        "four queries in one tensor": chunks(arrived, 400),
        "one query at a time": lists,
        "32 pairs in arrival order": chunks(arrived, 32),
        "32 pairs, sorted within a query": chunks(in_queries, 32),
        **{f"ours: map_batches, {tokens:,} tokens": token_batches(arrived, tokens) for tokens in (1_024, 16_384)},
    }.items():
        padded = sum(len(batch) * max(batch) for batch in batches)
        print(f"{name:40} {padded / sum(arrived):.3f} padded / real tokens")
        rows.append({"setting": name, "n": len(arrived), "value": padded / sum(arrived)})
    if arguments.record:
        measured.record("How much of a batch is padding?", [row | {"measure": "padded / real tokens"} for row in rows])


def chunks(lengths: list[int], size: int) -> list[list[int]]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]


def token_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    map_batches(lambda batch: batches.append(batch) or batch, lengths, lengths, max_tokens)
    return batches


if __name__ == "__main__":
    main()
