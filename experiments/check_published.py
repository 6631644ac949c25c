"""Checks the published checkpoints: fetches and loads them, and compares their results with known values.

python experiments/check_published.py --sizes                 prints how much would be fetched; fetches nothing
python experiments/check_published.py monoelectra-base v2     checks the checkpoints with one of these words in the name
python experiments/check_published.py                         checks all published checkpoints

The script first prints the sizes of the downloads. An interrupted download resumes. Each checkpoint is checked in a
process of its own, and a failed check does not stop the other checks. The report has a table of all checks: each one
passed, failed or was not run. You can attach the report to an issue. --report names the file of the report.

The collection DL19 is read from ir_datasets, as in trec_dl.ipynb. When ir_datasets first reads the texts of DL19's
passages, it fetches all texts of MS MARCO (1 GB). --dl19 names a folder from which DL19 is read instead.
"""

import argparse
import multiprocessing
import platform
import re
import resource
import textwrap
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import compare
import corpora
import costs
import fetch
import first_stages
import measured
import pandas as pd
import papers
import public_runs
import pyterrier as pt
import safetensors
import torch
from huggingface_hub import snapshot_download
from ir_measures import nDCG
from sweep import MISSING

from pyterrier_lit.models.checkpoints import BESIDE_WEIGHTS
from pyterrier_lit.models.errors import first_line
from pyterrier_lit.reranker import Reranker

RUNS = {"LiT5": "dl19.bm25", "Rank-DistiLLM": "dl19.bm25-terrier", "PE-Rank": "dl19.bm25"}  # each paper's BM25 on DL19
QUERY = "why is the sky blue?"
PASSAGES = [
    "Bread rises because yeast turns sugar into carbon dioxide.",
    "Sunsets are red: low sunlight crosses more air, which has scattered the blue away before it arrives.",
    "The blues is a kind of music that began in the south of the United States.",
    "Molecules of air scatter the short waves of sunlight far more than the long ones, so blue reaches the eye from"
    " everywhere in the sky.",
    "Water absorbs red light more than blue, so the sea is blue where it is deep.",
    "A clear sky makes a cold night, since no cloud keeps the warmth of the ground.",
    "The rate of a mortgage depends on its term and on the central bank.",
    "Rayleigh scattering grows with the fourth power of the frequency of light.",
    "Painters made blue from lapis lazuli, which cost more than gold.",
    "On Mars the sky is yellow by day, since its dust absorbs blue light.",
]
ANSWER = 4  # the number of the passage that answers QUERY
COLUMNS = ["checkpoint", "check", "result", "known", "found", "seconds", "peak GB"]


class Subject(NamedTuple):
    """A published checkpoint: its paper, its name in published.csv, its reranker, and the name or folder of the
    collection DL19."""

    paper: str
    name: str
    reranker: Reranker
    dl19: str


class Finding(NamedTuple):
    """The outcome of a check: whether it passed, the known value, and the value that was found."""

    passed: bool
    known: str
    found: str


class NotRun(Exception):
    """Raised if a check cannot be run because something that it needs is missing."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="NAME", help="part of the checkpoints' names; default: all")
    parser.add_argument("--sizes", action="store_true", help="print how much would be fetched, and exit")
    parser.add_argument(
        "--dl19", default=papers.IRDS_DL["dl19"], help="folder with docs.jsonl[.gz], queries.tsv, qrels.txt"
    )
    parser.add_argument("--report", type=Path, default=Path("check_published.md"))
    options = parser.parse_args(arguments)
    known = subjects(options.dl19)
    if unknown := [part for part in options.wanted if not any(part in name for name in known)]:
        parser.error(f"{', '.join(unknown)}: wanted a part of one of {', '.join(known)}")
    names = [name for name in known if not options.wanted or any(part in name for part in options.wanted)]
    print(sizes(names).to_string(index=False), flush=True)
    if options.sizes:
        return 0
    bring_runs()
    rows = [
        tried("public runs", f"{name}, DL19 over BM25, nDCG@10", public_run, name)
        for name in (compare.FIRST_STAGE, "RankZephyr 7B")
    ]
    for name in names:
        rows += apart(name, options.dl19)
        table = pd.DataFrame(rows, columns=COLUMNS)
        options.report.write_text(report(table), encoding="utf-8")  # also if the run is stopped later
        for each in table[table["checkpoint"] == name].itertuples():
            print(f"{each.checkpoint}, {each.check}: {each.result}. {each.found}", flush=True)
    print(f"written: {options.report}")
    return int((table["result"] == "failed").any())


def subjects(dl19: str) -> dict[str, Subject]:
    return {
        reranker.model: Subject(comparison.paper, name, reranker, dl19)
        for comparison in papers.trec_dl()
        for name, reranker in comparison.rerankers.items()
    }


def sizes(names: Iterable[str]) -> pd.DataFrame:
    """A row per checkpoint: its size in GB, how many GB are still to be fetched, and the error if the hub did not give
    these sizes. The last row has the sums."""
    rows = []
    for name in names:
        try:
            files = snapshot_download(name, allow_patterns=[*BESIDE_WEIGHTS, "*.safetensors", "*.bin"], dry_run=True)
        except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
            error = error.__cause__ or error
            rows.append((name, float("nan"), float("nan"), f"{type(error).__name__}: {first_line(error)}"[:100]))
            continue
        if any(file.filename.endswith(".safetensors") for file in files):
            files = [file for file in files if not file.filename.endswith(".bin")]
        missing = [file.file_size for file in files if file.will_download]
        rows.append((name, sum(file.file_size for file in files) / 1e9, sum(missing) / 1e9, ""))
    table = pd.DataFrame(rows, columns=["checkpoint", "GB", "GB to fetch", "error"])
    table.loc[len(table)] = ["together", *table[["GB", "GB to fetch"]].sum(), ""]
    return table.round(3)


def bring_runs() -> None:
    """Fetch the runs and judgements of DL19 (1 MB) into experiments/data, except those that `papers.find` finds on this
    machine."""
    for name in ("dl19.qrels", *dict.fromkeys(RUNS.values())):
        if not papers.find(name).exists():
            try:
                fetch.main([f"runs/{name}.txt"])
            except (*MISSING, ValueError) as error:
                print(f"{name} was not fetched: {first_line(error)}")


def apart(name: str, dl19: str) -> list[dict[str, Any]]:
    """Run `examine` in a new process, and return its rows. The peak memory is then that of this checkpoint alone. If
    memory runs out, only the new process is killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(examine, name, dl19).result()
        except BrokenProcessPool:
            found = "the process was killed, most often for lack of memory"
            return [row(name, "all", "failed", "", found)]


def examine(name: str, dl19: str) -> list[dict[str, Any]]:
    subject, rows = subjects(dl19)[name], []
    try:
        folder = subject.reranker.folder()
    except (FileNotFoundError, ValueError) as error:
        return [row(name, "fetched", "not run", "", first_line(error))]
    rows.append(row(name, "fetched", "passed", "", f"revision {folder.path.name}"))
    loaded = True
    for check, which, look, *known in CHECKS:
        if not re.search(which, name):
            continue
        if not loaded:
            rows.append(row(name, check, "not run", "", "the checkpoint does not load"))
            continue
        rows.append(tried(name, check, look, subject, *known))
        loaded = loaded and not (look is loads and rows[-1]["result"] == "failed")
    return rows


def tried(name: str, check: str, look: Callable[..., Finding], *given: Any) -> dict[str, Any]:
    """Run a check and return its row of the report's table. If the check raises an exception, the row names the
    exception."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    try:
        passed, known, found = look(*given)
        result = "passed" if passed else "failed"
    except NotRun as error:
        result, known, found = "not run", "", first_line(error)
    except Exception as error:
        result, known, found = "failed", "", f"{type(error).__name__}: {first_line(error)}"
    return row(name, check, result, known, found, time.perf_counter() - begin, peak())


def row(
    name: str, check: str, result: str, known: str, found: str, seconds: float | None = None, peak: float | None = None
) -> dict[str, Any]:
    costs = ["" if cost is None else f"{cost:.2f}" for cost in (seconds, peak)]
    return dict(
        zip(
            COLUMNS, (name, check, result, known, textwrap.shorten(found, 240, placeholder=" ..."), *costs), strict=True
        )
    )


def peak() -> float:
    """The peak memory in GB. On a GPU, it is the peak of the GPU's memory since the check began. Without a GPU, it is
    the peak memory of the process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# Checks


def weight_names(subject: Subject) -> Finding:
    """Check whether the weights of a LiT5 have the names of the weights of a T5 1.1. A T5 1.1 has a separate output
    layer and gated feed-forward layers."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = subject.reranker.folder()
    config = T5Config(**{field: value for field, value in folder.config.items() if field != "transformers_version"})
    with torch.device("meta"):
        known = set(T5ForConditionalGeneration(config).state_dict())
    twins = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # optional copies of shared.weight
    found = {name for file in folder.path.glob("*.safetensors") for name in stored_names(file)}
    for file in [] if found else folder.path.glob("pytorch_model*.bin"):
        found |= set(torch.load(file, mmap=True, map_location="cpu", weights_only=True))
    missing, more = known - found - twins, found - known
    own_head, gated = "lm_head.weight" in found, any(name.endswith("wi_1.weight") for name in found)
    said = [
        f"{len(found)} names",
        *(f"missing {name}" for name in sorted(missing)[:3]),
        *(f"unknown {name}" for name in sorted(more)[:3]),
        *([] if own_head else ["no lm_head.weight"]),
        *([] if gated else ["no wi_1.weight"]),
    ]
    return Finding(
        not missing and not more and own_head and gated, "those of a T5 1.1: lm_head, wi_0, wi_1", ", ".join(said)
    )


def stored_names(file: Path) -> list[str]:
    with safetensors.safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def loads(subject: Subject) -> Finding:
    """Check whether the checkpoint loads. Loading is strict: a missing weight, an unknown weight or a weight of another
    shape is an error."""
    checkpoint = subject.reranker.load()
    weight = next(checkpoint.network.parameters())
    size = costs.parameters(subject.reranker) / 1e6
    return Finding(True, "every weight has its place", f"{size:,.1f} M parameters, {weight.dtype} on {weight.device}")


def window(subject: Subject, size: int, stride: int) -> Finding:
    found = pt.inspect.transformer_apply_attributes(subject.reranker, window_size=None, stride=None).window()
    return Finding(found == (size, stride), f"{size}, {stride}", "{}, {}".format(*found))


def scores(subject: Subject, tolerance: float) -> Finding:
    """Check the reranker's scores in float32 for the query-passage pairs whose scores are published. The check passes
    if each score differs from the published one by at most `tolerance`."""
    figures = compare.published(table="known_scores", model=subject.reranker.model)
    pairs = [re.fullmatch(r"query: (.*) / passage: (.*)", pair).groups() for pair in figures["collection"]]
    exact = pt.inspect.transformer_apply_attributes(subject.reranker, dtype="float32")
    found = [score for (score,) in exact.score([query for query, _ in pairs], [[passage] for _, passage in pairs])]
    passed = all(abs(one - other) <= tolerance for one, other in zip(found, figures["value"], strict=True))
    return Finding(
        passed, "; ".join(f"{value:.4f}" for value in figures["value"]), "; ".join(f"{s:.4f}" for s in found)
    )


def tokens(subject: Subject) -> Finding:
    """Check the number of tokens of PE-Rank's prompts per query. The number is the mean over DL19's topics, with 100
    passages for each topic."""
    topics = collection(subject).get_topics()
    figures = compare.published(table="figure1", measure="processed tokens per query", model=subject.name)
    found = costs.prompt_tokens(subject.reranker, topics.loc[topics.index.repeat(100)])
    (known,) = figures["value"]
    return Finding(round(found) == known, f"{known:,.0f}", f"{found:,.2f}")


def ten_passages(subject: Subject) -> Finding:
    """Rerank ten passages. The check passes if the passage that answers the query is first. A person should look at the
    order of the other passages."""
    order = [passage["corpus_id"] + 1 for passage in subject.reranker.rank(QUERY, PASSAGES)]
    return Finding(order[0] == ANSWER, f"{ANSWER} first; look at the rest", " ".join(map(str, order)))


def over_bm25(subject: Subject) -> Finding:
    """Check nDCG@10 on DL19 over the paper's BM25. The check passes if the nDCG@10 of the reranker and the nDCG@10 of
    BM25 are each within the tolerance of a published figure."""
    where = collection(subject)
    try:
        first = first_stages.load(str(papers.find(RUNS[subject.paper])), where, Path(), 100)
        candidates = (first >> where.text_loader())(where.get_topics())
    except (*MISSING, KeyError) as error:  # KeyError: a passage of the run without a text
        raise NotRun(str(error)) from error
    begin = time.perf_counter()
    reranked = subject.reranker(candidates)
    seconds = (time.perf_counter() - begin) / candidates["qid"].nunique()
    frames = {compare.FIRST_STAGE: candidates, subject.name: reranked}
    figures = beside(subject.paper, frames, where.get_qrels())
    return Finding(
        subject.name in figures and all(figure.passed for figure in figures.values()),
        "; ".join(f"{name} {figure.known}" for name, figure in figures.items()),
        "; ".join(f"{name} {figure.found}" for name, figure in figures.items()) + f"; {seconds:.2f} s a query",
    )


def public_run(name: str) -> Finding:
    """Check the nDCG@10 on DL19 of a public run, cut to its first 100 passages. The run is LiT5's BM25, or that of a
    system that reranks this BM25. The check passes if the nDCG@10 is within the tolerance of a published figure."""
    runs = {compare.FIRST_STAGE: papers.find("dl19.bm25")} | public_runs.systems_over("dl19.bm25")
    if name not in runs:
        raise NotRun(f"its run is missing; wanted it at experiments/data/runs/dl19.bm25.{name}.txt")
    try:
        run, qrels = first_stages.stored(runs[name]) % 100, corpora.load(str(papers.find("dl19.qrels")))
    except MISSING as error:
        raise NotRun(str(error)) from error
    return beside("LiT5", {name: run(qrels.get_topics())}, qrels.get_qrels())[name]


def beside(paper: str, frames: dict[str, pd.DataFrame], qrels: pd.DataFrame) -> dict[str, Finding]:
    """Compare the nDCG@10 of rankings over DL19's BM25 with published figures. Returns a `Finding` for each ranking
    whose name has published figures. A ranking passes if its nDCG@10 is within the tolerance of one of these figures.

    frames: name of a system in published.csv -> its ranking.
    """
    averages = pd.DataFrame(
        [(name, pt.Evaluate(frame, qrels, [nDCG @ 10])["nDCG@10"]) for name, frame in frames.items()],
        columns=["name", "nDCG@10"],
    )
    rows = compare.results(averages, paper=paper, collection="dl19", first_stage="bm25", depth=100)
    table = compare.table(rows)
    table = table[table["reproduced"] != ""]
    return {
        name: Finding(
            bool((known["reproduced"] == "within").any()),
            " or ".join(f"{value:.4f}" for value in dict.fromkeys(known["published"])),
            f"{averages.set_index('name')['nDCG@10'][name]:.4f}",
        )
        for name, known in table.groupby("model", sort=False)
    }


def collection(subject: Subject) -> corpora.Collection:
    """The collection DL19. Raises NotRun if the collection is not on this machine and cannot be fetched."""
    try:
        return corpora.load(subject.dl19)
    except MISSING as error:
        raise NotRun(str(error)) from error


CHECKS = [  # name, regular expression for the checkpoints' names, function, its arguments after `subject`
    ("names of weights", "LiT5", weight_names),
    ("loads", "", loads),
    ("window and stride", r"LiT5-Distill-\w+-v2$", window, 100, 50),
    ("window and stride", r"LiT5-Distill-\w+$", window, 20, 10),
    ("known scores", "webis/monoelectra-base$", scores, 1e-3),
    ("tokens a query", "pe-rank", tokens),
    ("ten passages", "", ten_passages),
    ("DL19 over BM25, nDCG@10", "", over_bm25),
]


# The report


def report(table: pd.DataFrame) -> str:
    packages = ("torch", "transformers", "tokenizers", "huggingface_hub", "pyterrier", "pyterrier_lit")
    counts = table["result"].value_counts().reindex(["passed", "failed", "not run"], fill_value=0)
    facts = [
        f"{date.today()}, {measured.machine()}, {torch.get_num_threads()} threads",
        f"commit {measured.commit() or 'unknown'}, Python {platform.python_version()}",
        ", ".join(f"{name} {version(name)}" for name in packages),
        ", ".join(f"{number} {result}" for result, number in counts.items()),
    ]
    passages = [f"{number}. {passage}" for number, passage in enumerate(PASSAGES, 1)]
    return "\n".join(
        [
            "# Check of the published checkpoints",
            "",
            *(f"* {fact}" for fact in facts),
            "",
            table.to_markdown(index=False, disable_numparse=True),
            "",
            f'Seconds are those of the check. The ten passages, for "{QUERY}":',
            "",
            *passages,
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
