"""Compares the speed of each reranker with other implementations and with a lower bound. Run by hand.

    python experiments/bench.py [ROW ...] [--data ../shared/data/dl19] [--quick] [--threads 1]
        [--python OpenVINO=../openvino/bin/python] [--before CHECKOUT] [--record]

A ROW is a model with random weights, some queries with 100 passages each, and the systems that rerank these passages.
--help lists the rows. Each system runs in a process of its own. The systems take turns, so that other jobs on the
machine slow down all systems alike. The shortest time of each system counts. A system that is not installed is skipped.
If a system is installed in another environment, --python names the interpreter of that environment.

The lower bound is called the floor: the least time in which this machine can do the reranker's computations. The floor
is the sum of two times. The first time is the reranker's FLOPs, divided by the FLOP/s that the machine reaches in
matrix products. The second time is the bytes that the decoder reads in its forward passes, divided by the memory
bandwidth. These bytes are the decoder's weights and, for LiT5, also keys and values. The script measures the FLOP/s and
the bandwidth.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench_work
import measured
import pandas as pd
import torch

from pyterrier_lit.models.devices import choose_dtype

SYSTEMS = Path(__file__).with_name("bench_systems.py")
TOP = 10  # `alike` compares pairs of passages; one passage of each pair is among our first TOP passages
QUESTION = "How fast is each reranker beside what else does its work?"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, the number of queries, and the systems that rerank the passages of these queries. A system other than
    this package is called a peer."""

    kind: str
    size: str
    dtype: str
    systems: tuple[str, ...]
    queries: int = 1


INT8 = ("ONNX int8", "OpenVINO int8")
CLASSIFIERS = {
    "float32": ("ours", "ours, int8", "sentence-transformers", "ONNX", "OpenVINO", *INT8),
    "bfloat16": ("ours", "ours, int8", "sentence-transformers", "OpenVINO", *INT8),
}
ROWS = {
    **{
        f"cross-encoder, {size}, {dtype}": Row("cross-encoder", size, dtype, systems)
        for size in bench_work.ENCODERS
        for dtype, systems in CLASSIFIERS.items()
    },
    **{
        f"cross-encoder, MiniLM, {dtype}, 43 queries": Row("cross-encoder", "MiniLM", dtype, systems, 43)
        for dtype, systems in CLASSIFIERS.items()
    },
    **{
        f"lit5-distill, T5-base, {dtype}": Row(
            "lit5-distill", "T5-base", dtype, ("ours", "ours, top_k=10", "library's T5", "rank_llm")
        )
        for dtype in CLASSIFIERS
    },
    **{
        f"lit5-score, T5-base, {dtype}": Row("lit5-score", "T5-base", dtype, ("ours", "library's T5"))
        for dtype in CLASSIFIERS
    },
    "pe-rank, 44 M, float32": Row(
        "pe-rank",
        "44 M",
        "float32",
        ("ours", "ours, top_k=10", 'ours, decoding="first"', "published procedure"),
        queries=4,
    ),
    "pe-rank, 44 M, against texts": Row("pe-rank", "44 M", "float32", ("ours", "ours, top_k=10", "passages as text")),
}
# If no ROW is given, --quick runs the rows whose names begin with one of these
QUICK = ("cross-encoder, MiniLM", "lit5-distill", "pe-rank, 44 M, float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"one of {'; '.join(ROWS)}; default: those with fewer than 43 queries and a dtype that the CPU supports",
    )
    parser.add_argument("--data", default="python-docs", help="a collection that corpora.py loads")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a trial of two minutes: a few rows, with one query of 10 passages and two turns",
    )
    parser.add_argument("--passages", type=int, default=100, help="number of passages of each query")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--python", action="append", default=[], metavar="SYSTEM=PYTHON", help="the interpreter to run this system in"
    )
    parser.add_argument("--before", type=Path, help="another checkout of this package, which runs as one more system")
    parser.add_argument("--plot", type=Path, help="draw measured.csv's rows as a chart into this file, and run nothing")
    measured.add_option(parser)
    arguments = parser.parse_args()
    if arguments.plot:
        return plot(measured.read(QUESTION)).savefig(arguments.plot, bbox_inches="tight")
    pythons = dict(pair.partition("=")[::2] for pair in arguments.python)
    names = arguments.rows or [name for name, row in ROWS.items() if row.queries < 43 and runs_here(row.dtype)]
    if arguments.quick and not arguments.rows:
        names = [name for name in names if name.startswith(QUICK)]
    unknown = [name for name in names if name not in ROWS] + [name for name in pythons if name not in known()]
    if unknown:
        parser.error(f"{unknown[0]!r} is no row or system; wanted rows of {'; '.join(ROWS)}, systems of {known()}")
    torch.set_num_threads(arguments.threads)
    for name in names:
        row = quick(ROWS[name]) if arguments.quick else ROWS[name]
        passages, turns = (10, 2) if arguments.quick else (arguments.passages, arguments.turns)
        found = compare(row, arguments.data, passages, turns, arguments.threads, pythons, arguments.before)
        rows = tidy(f"{name}, {passages} passages", row, found, machine_rates(getattr(torch, row.dtype)))
        print(table(name, rows, found), flush=True)
        if arguments.record:
            measured.record(QUESTION, rows)


def quick(row: Row) -> Row:
    """The row with one query, as --quick runs it. Systems with `top_k=10` are left out, since the query has only 10
    passages. Systems in int8 are left out, since quantisation takes longer than all the rest."""
    systems = tuple(name for name in row.systems if "top_k=10" not in name and "int8" not in name)
    return dataclasses.replace(row, queries=1, systems=systems)


def runs_here(dtype: str) -> bool:
    """Whether this CPU has instructions for a dtype. Without such instructions, bfloat16 takes tens of times as long as
    float32."""
    return getattr(torch, dtype) in (torch.float32, choose_dtype("auto", torch.device("cpu")))


def known() -> list[str]:
    return sorted({system for row in ROWS.values() for system in row.systems})


def compare(
    row: Row, data: str, passages: int, turns: int, threads: int, pythons: Mapping[str, str], before: Path | None
) -> dict[str, dict[str, Any]]:
    """Run all systems of a row. Returns a dict: name of a system -> its answer. An answer has the keys "seconds" (the
    shortest time), "peak GB" and "results". Systems whose names begin with "ours" also answer with "flops" and
    "bytes", except in int8. If a system is not installed, its answer has only the key "not run", with the reason as its
    value."""
    systems = {system: (system, pythons.get(system, sys.executable), SYSTEMS.parents[1]) for system in row.systems}
    if before:
        systems["before"] = ("ours", sys.executable, before.resolve())
    with tempfile.TemporaryDirectory() as folder:
        texts = bench_work.read(data, row.queries, passages, Path(folder))
        (work := Path(folder) / "work").mkdir()
        bench_work.make(row.kind, row.size, row.dtype, *texts, work)
        processes = {name: Process(work, *how, threads) for name, how in systems.items()}
        answers: dict[str, dict[str, Any]] = {name: process.ask("run") for name, process in processes.items()}
        running = [name for name, answer in answers.items() if "not run" not in answer]
        for _, name in itertools.product(range(turns - 1), running):
            answers[name] = min(answers[name], processes[name].ask("run"), key=lambda answer: answer["seconds"])
        for name in running:
            if name.startswith("ours") and "int8" not in name:  # PyTorch's counter does not count products in int8
                answers[name] |= processes[name].ask("cost")
        for process in processes.values():
            process.end()
    return answers


class Process:
    """A system in a process of its own, which answers one request at a time."""

    def __init__(self, folder: Path, system: str, python: str, checkout: Path, threads: int):
        self.system, self.log = system, (folder / f"{system}.log").open("w+")
        paths = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, SYSTEMS, folder, system, str(threads)],
            env=os.environ | paths, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def ask(self, request: str) -> dict[str, Any]:
        """Send a request and return the answer. If the process died, RuntimeError is raised with the end of the
        process's log."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{request}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.system} failed:\n{self.log.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        self.process.communicate()
        self.log.close()


def machine_rates(dtype: torch.dtype, seconds: float = 1.0) -> tuple[float, float]:
    """Measure two rates: FLOP/s of matrix products, and bytes/s of reading memory. Each rate is measured for `seconds`,
    and the fastest call counts."""
    left, right = torch.randn(1024, 768).to(dtype), torch.randn(768, 3072).to(dtype)
    large = torch.zeros(2**28, dtype=torch.uint8).view(torch.int64)
    flops = best(lambda: left @ right, seconds)
    return 2 * 1024 * 768 * 3072 / flops, 2**28 / best(lambda: large.sum(), seconds)


def best(call: Any, seconds: float) -> float:
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - started)
    return least


def tidy(setting: str, row: Row, found: Mapping[str, dict[str, Any]], rates: tuple[float, float]) -> list[dict]:
    """Rows of measured.csv. Each system has its seconds per query and its peak memory. A system of this package has
    more rows:

    * For each peer: how many times as fast as the peer the system is. If the peer returns scores, also the share of
      pairs of passages that the two systems order alike (`alike`).
    * If the FLOPs are counted: the floor, and the floor divided by the measured seconds.
    """
    rows = []
    peers = {name: answer for name, answer in found.items() if not name.startswith("ours") and "not run" not in answer}
    for name, answer in found.items():
        if "not run" in answer:
            continue
        values = {"seconds a query": answer["seconds"] / row.queries, "peak GB": answer["peak GB"]}
        if name.startswith("ours"):
            if "flops" in answer:
                floor = answer["flops"] / rates[0] + answer["bytes"] / rates[1]
                values |= {"floor, seconds a query": floor / row.queries}
                values |= {"share of the floor": floor / answer["seconds"]}
            for peer, theirs in peers.items():
                values[f"times as fast as {peer}"] = theirs["seconds"] / answer["seconds"]
                if theirs["results"]:
                    values[f"pairs ordered as {peer}"] = alike(answer["results"], theirs["results"])
        rows += [
            {"setting": f"{setting}: {name}", "n": row.queries, "measure": measure, "value": value}
            for measure, value in values.items()
        ]
    return rows


def alike(ours: list[list[float]], theirs: list[list[float]], top: int = TOP) -> float:
    """The share of pairs of passages that two systems order alike. Each pair has one of our first `top` passages of a
    query, and a passage that we rank below this passage. ours, theirs: the scores of each query's passages."""
    same = total = 0
    for left, right in zip(ours, theirs, strict=True):
        ranked = sorted(range(len(left)), key=lambda passage: -left[passage])
        for place, first in enumerate(ranked[:top]):
            later = ranked[place + 1 :]
            same += sum(right[first] > right[second] for second in later)
            total += len(later)
    return same / total


def table(name: str, rows: list[dict], found: Mapping[str, dict[str, Any]]) -> str:
    lines = [f"\n{name}"]
    for system, answer in found.items():
        if "not run" in answer:
            lines.append(f"  {system:24} not run: {answer['not run'].splitlines()[0][:90]}")
            continue
        of = {row["measure"]: row["value"] for row in rows if row["setting"].endswith(f": {system}")}
        line = f"  {system:24}{of['seconds a query']:9.3f} s a query{of['peak GB']:7.2f} GB"
        if "share of the floor" in of:
            line += f"  floor {of['floor, seconds a query']:.3f} s ({of['share of the floor']:.0%})"
        lines.append(line)
        for measure, value in of.items():
            if measure.startswith("times as fast"):
                same = of.get(measure.replace("times as fast", "pairs ordered"))
                pairs = "" if same is None else f", {same:.1%} of pairs alike"
                lines.append(f"{'':26}{value:6.2f} x {measure.removeprefix('times ')}{pairs}")
    return "\n".join(lines)


def plot(rows: pd.DataFrame) -> Any:
    """A chart of the seconds per query: one panel for each row, and one bar for each system. Only the newest values
    that were measured with two threads are drawn. Bars of this package are blue."""
    import matplotlib.pyplot as plt

    rows = measured.latest(rows[(rows["measure"] == "seconds a query") & (rows["threads"] == 2)])
    parts = rows["setting"].str.partition(": ")
    rows = rows.assign(row=parts[0], system=parts[2].replace({"library's T5": "T5 of transformers"}))
    panels = sorted(rows.groupby("row"), key=lambda panel: list(ROWS).index(panel[0].rpartition(", ")[0]))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.5, 0.75 * len(panels) + 0.33 * len(rows)), layout="constrained",
        height_ratios=[1.5 + len(systems) for _, systems in panels],
    )  # fmt: skip
    for place, (name, systems) in zip(axes, panels, strict=True):
        colours = ["tab:blue" if system.startswith("ours") else "lightgray" for system in systems["system"]]
        bars = place.barh(systems["system"], systems["value"], color=colours)
        place.bar_label(bars, fmt="%.2f s", padding=3, fontsize=11)
        title = name.replace(", float32", "").replace("cross-encoder", "CrossEncoder").replace("pe-rank", "PE-Rank")
        title = title.replace("lit5-distill", "LiT5-Distill").replace("lit5-score", "LiT5-Score")
        place.set_title(f"{title}\n{systems['machine'].iloc[-1]}", loc="left", fontsize=11)
        place.tick_params(axis="y", labelsize=11)
        place.invert_yaxis()
        place.margins(x=0.12)
        place.xaxis.set_visible(False)
        place.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
