"""A long run through one reranker: does memory stay flat, and is every query answered once? Run by hand.

    python experiments/soak.py [--queries 20000] [--passages 20] [--model FOLDER] [--output soak]

The reranker gets one frame of --frame queries after the other, as in a `pt.Experiment(batch_size=...)`. The texts are
generated from a few words, some of which are not English, with a fixed seed. The script writes the memory after each
frame to OUTPUT/soak.json. If matplotlib is installed, it also draws a chart, OUTPUT/soak.png. The exit code is 1 if a
query was lost or repeated. It is also 1 if memory grew by more than --allowed MB after the first fifth of the queries.
"""

import argparse
import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import measured
import pandas as pd
import pyterrier as pt

from pyterrier_lit import CrossEncoder

SMALLEST = Path(__file__).parents[1] / "tests" / "golden" / "cross_encoder" / "ckpt" / "electra_bias"
WORDS = [
    "cat",
    "dog",
    "power",
    "water",
    "of",
    "the",
    "a",
    "python",
    "list",
    "Straße",
    "日本",
    "☃",
    "1999",
    "don't",
    "fluid-dynamics",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--frame", type=int, default=200, help="number of queries per frame")
    parser.add_argument("--model", type=Path, default=SMALLEST)
    parser.add_argument("--allowed", type=float, default=50, help="MB by which memory may grow after the first fifth")
    parser.add_argument("--output", type=Path, default=Path("soak"))
    measured.add_option(parser)
    arguments = parser.parse_args()
    reranker = CrossEncoder(str(arguments.model), device="cpu")
    answered: Counter[str] = Counter()
    samples, start = [{"queries": 0, "seconds": 0.0, "MB": resident()}], time.perf_counter()
    for frame in pt.tqdm(list(numbers(arguments.queries, arguments.frame)), unit="frame"):
        out = reranker(queries(frame, arguments.passages))
        counts = out.groupby("qid")["rank"].agg(lambda ranks: sorted(ranks) == list(range(arguments.passages)))
        answered.update(qid for qid, whole in counts.items() if whole)
        del out
        gc.collect()
        seconds = round(time.perf_counter() - start, 1)
        samples.append({"queries": frame.stop, "seconds": seconds, "MB": resident()})
    wrong = [f"q{i}" for i in range(arguments.queries) if answered[f"q{i}"] != 1]
    settled = samples[max(1, len(samples) // 5) :]
    growth = max(sample["MB"] for sample in settled) - settled[0]["MB"]
    rate = arguments.queries * arguments.passages / samples[-1]["seconds"]
    print(
        f"{arguments.queries} queries x {arguments.passages} passages in {samples[-1]['seconds']} s ({rate:.0f}"
        f" pairs/s); lost or repeated: {len(wrong)}; memory {settled[0]['MB']:.0f} MB after a fifth,"
        f" {samples[-1]['MB']:.0f} MB at the end, {growth:.0f} MB more at most"
    )
    if arguments.record:
        found = {"after a fifth": settled[0]["MB"], "at the end": samples[-1]["MB"], "growth at most": growth}
        rows = [{"setting": name, "measure": "MB", "value": value} for name, value in found.items()]
        rows.append({"setting": arguments.model.name, "measure": "pairs/s", "value": rate})
        measured.record("Does memory stay flat over a long run?", [row | {"n": arguments.queries} for row in rows])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "soak.json").write_text(json.dumps(samples, indent=1) + "\n")
    draw(samples, arguments.output / "soak.png")
    sys.exit(bool(wrong) or growth > arguments.allowed)


def numbers(n: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, n)) for start in range(0, n, size))


def queries(which: range, passages: int) -> pd.DataFrame:
    """Candidates (qid, query, docno, text) for the queries with these numbers. A number gives the same candidates in
    every run."""
    rows = []
    for i in which:
        drawn = random.Random(i)
        query = " ".join(drawn.choices(WORDS, k=drawn.randrange(1, 12)))
        rows += [
            (f"q{i}", query, f"d{i}-{j}", " ".join(drawn.choices(WORDS, k=drawn.randrange(1, 150))))
            for j in range(passages)
        ]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text"])


def resident() -> float:
    """The resident memory of this process now, in MB. Works on Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4_096 / 1e6, 1)


def draw(samples: list[dict[str, float]], file: Path):
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([sample["queries"] for sample in samples], [sample["MB"] for sample in samples])
    axes.set(xlabel="queries answered", ylabel="resident memory (MB)", ylim=(0, None))
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
