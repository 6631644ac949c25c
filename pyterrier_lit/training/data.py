"""Training data: result frames with targets, samples of their lists, and files of runs and questions.

A target is a number that says how good a passage is for its query, higher is better: its label in the qrels, or the
score that a teacher gives it. It stands in the column `target` of a result frame.
"""

import gzip
import json
import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_lit.files.candidates import LISTS, Candidates, read_rerank_file
from pyterrier_lit.frames import Ranking

KEY = ["qid", "docno"]
Teacher = pt.Transformer | pd.DataFrame | str | Path | None


def with_labels(frame: pd.DataFrame, qrels: pd.DataFrame | None) -> pd.DataFrame:
    """A result frame with the labels of the qrels as targets, and 0 for passages without one.

    Raises ValueError without qrels, and where none of the passages is judged relevant.
    """
    if qrels is None:
        raise ValueError(
            "there are no labels to learn from: give fit(topics, qrels), or take Distil for a teacher's ranking"
        )
    judged = qrels.drop_duplicates(KEY)[[*KEY, "label"]].rename(columns={"label": "target"})
    labelled = _joined(frame, judged).fillna({"target": 0})
    if not (labelled["target"] > 0).any():
        raise ValueError(
            f"none of the {len(frame)} passages is judged relevant in the qrels ({len(qrels)} rows): check that qids"
            " and docnos are of one collection"
        )
    return labelled


def with_teacher(frame: pd.DataFrame, teacher: Teacher) -> pd.DataFrame:
    """A result frame with a teacher's scores as targets, or, where it has only ranks, their negative.

    teacher: a transformer, which reranks the frame; a run, as a frame or as a file that `read_run` reads; None is the
        order in which the passages come.

    Passages that the teacher does not rank are left out, with a warning. Raises ValueError where none is left, and for
    a score that is missing.
    """
    if teacher is None:
        order = frame[["rank"]].rank(ascending=False) if "rank" in frame else frame[["score"]]
        return frame.assign(target=order.iloc[:, 0].astype("float64"))
    if isinstance(teacher, str | Path):
        teacher = read_run(teacher)
    run = teacher if isinstance(teacher, pd.DataFrame) else teacher.transform(frame)
    values = run["score"] if "score" in run else -run["rank"]
    if values.isna().any():
        row = run[values.isna()].iloc[0]
        raise ValueError(f"the teacher gives no number for qid {row['qid']!r}, docno {row['docno']!r}")
    joined = _joined(frame, run[KEY].assign(target=values.astype("float64")).drop_duplicates(KEY))
    left = joined.dropna(subset="target")
    if left.empty:
        raise ValueError(
            f"the teacher ranks none of the {len(frame)} passages: check that qids and docnos are of one collection"
        )
    if len(left) < len(joined):
        warnings.warn(
            f"{len(joined) - len(left)} of {len(joined)} passages are not in the teacher's ranking and are left out",
            stacklevel=2,
        )
    return left


def sample(targets: Sequence[float], n: int | None, how: str, rng: random.Random) -> list[int]:
    """The positions of n passages of a list to learn from; of all, if there are no more or n is None.

    targets: those of the passages, in the order of the first stage. how: the name of one of SAMPLERS (the names are
    those of lightning-ir); ValueError for another.
    """
    if how not in SAMPLERS:
        raise ValueError(f"sampling={how!r}; wanted one of {', '.join(map(repr, SAMPLERS))}")
    count = len(targets)
    return SAMPLERS[how](targets, min(count, n or count), rng)


def _one_relevant(targets: Sequence[float], n: int, rng: random.Random) -> list[int]:
    relevant = [i for i, target in enumerate(targets) if target > 0]
    others = [i for i, target in enumerate(targets) if target <= 0]
    return [rng.choice(relevant), *rng.sample(others, min(n - 1, len(others)))]


def _log_random(targets: Sequence[float], n: int, rng: random.Random) -> list[int]:
    # The n largest of u^(1/w) are a sample without replacement by weights w (Efraimidis and Spirakis, 2006)
    keys = [rng.random() ** math.log1p(i + 1) for i in range(len(targets))]
    return sorted(sorted(range(len(targets)), key=lambda i: -keys[i])[:n])


SAMPLERS: dict[str, Callable[[Sequence[float], int, random.Random], list[int]]] = {
    "top": lambda targets, n, rng: list(range(n)),
    "random": lambda targets, n, rng: sorted(rng.sample(range(len(targets)), n)),
    "top_and_random": lambda targets, n, rng: [
        *range(n // 2),
        *sorted(rng.sample(range(n // 2, len(targets)), n - n // 2)),
    ],
    "log_random": _log_random,  # a passage at rank r with weight 1 / log(1 + r)
    "single_relevant": _one_relevant,  # one of the relevant passages first, then others at random
}


def window(
    targets: Sequence[float], smallest: int, largest: int, shuffle: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """A window of `smallest` to `largest` passages of a list, where all sizes are equally likely.

    Returns the positions of the passages in the list, in the order in which the student is shown them (the list's, or
    with probability `shuffle` a random one), and their positions in the window best first. Of passages with equal
    targets the one that is shown first counts as the better.
    """
    size = min(rng.randint(smallest, largest), len(targets))
    shown = sorted(rng.sample(range(len(targets)), size))
    if rng.random() < shuffle:
        rng.shuffle(shown)
    return shown, sorted(range(size), key=lambda position: -targets[shown[position]])


def uneven(lists: Sequence[Ranking]) -> list[Ranking]:
    """The lists with at least two different targets: from the others no order can be learned."""
    return [given for given in lists if len(set(given.columns["target"])) > 1]


def read_run(path: str | Path) -> pd.DataFrame:
    """A run from a TREC file, a parquet file or JSON lines, perhaps compressed (.gz): Rank-DistiLLM's files, TIREx's
    re-ranking input, the rankings that rank_llm writes, and what `pt.io.write_results` writes.

    Returns qid, docno, score, rank (from 0) and, where the file has them, query and text. Ranks follow from the scores;
    a file without scores gets them from its ranks. Of a passage that stands twice under a query the first is kept.
    Raises ValueError for a file without qid, docno, or both score and rank.
    """
    path = Path(path).expanduser()
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".parquet"):
        run = pd.read_parquet(path)
    elif kind.endswith((".jsonl", ".json")):
        run = pd.DataFrame(_json_lines(path))
        if set(LISTS) & set(run):
            run = as_frame(read_rerank_file(path))
    else:
        run = pt.io.read_results(str(path))
    run = run.rename(columns={"query_id": "qid", "doc_id": "docno"})
    missing = [column for column in KEY if column not in run] or ["score or rank"] * (not {"score", "rank"} & set(run))
    if missing:
        raise ValueError(
            f"{path} has no {missing[0]} (it has {', '.join(map(str, run.columns))}); wanted qid, docno and score or"
            " rank"
        )
    if "score" not in run:
        run["score"] = -run["rank"].astype("float64")
    run = run.astype({"qid": str, "docno": str, "score": "float64"}).drop_duplicates(KEY)
    run = pt.model.add_ranks(run.sort_values("score", ascending=False, kind="stable")).sort_values(["qid", "rank"])
    kept = [column for column in ("qid", "query", "docno", "text", "score", "rank") if column in run]
    return run[kept].reset_index(drop=True)


def read_qa(path: str | Path) -> pd.DataFrame:
    """Questions with their answers and passages, as `FineTune` of a LiT5Score takes them: qid, query, docno, text,
    answers and rank.

    path: JSON lines or one JSON array of records with question, answers, and ctxs, which have text and perhaps title
    and docid (or id). Raises ValueError, with the number of the question, where one of these is missing.
    """
    rows = []
    for number, record in enumerate(_json_lines(Path(path).expanduser())):
        lacking = [field for field in ("question", "ctxs") if field not in record]
        answers = record.get("answers", record.get("answer"))
        if lacking or not answers:
            raise ValueError(
                f"{path}, question {number}: it has no {[*lacking, 'answers'][0]}; wanted question, answers and ctxs"
            )
        answers = [answers] if isinstance(answers, str) else list(answers)
        for rank, passage in enumerate(record["ctxs"]):
            text = f"{passage['title']} {passage['text']}" if passage.get("title") else passage["text"]
            names = (passage[name] for name in ("docid", "id", "docno") if name in passage)
            docno = str(next(names, f"{number}-{rank}"))
            rows.append((str(record.get("id", number)), record["question"], docno, text, answers, rank))
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "answers", "rank"])


def read_qrels(path: Path | None) -> pd.DataFrame | None:
    """Judgements in TREC's format; None without a file."""
    return None if path is None else pt.io.read_qrels(str(path))


def as_frame(candidates: Iterable[Candidates]) -> pd.DataFrame:
    """A result frame of candidates, which are ranked as they come."""
    rows = [
        (given.qid, given.query, docno, text, rank)
        for given in candidates
        for rank, (docno, text) in enumerate(zip(given.docnos, given.texts, strict=True))
    ]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "rank"])


def _joined(frame: pd.DataFrame, targets: pd.DataFrame) -> pd.DataFrame:
    """The frame with the targets of its passages, NaN where there is none. Keys are compared as strings."""
    value_of = {
        (str(qid), str(docno)): target
        for qid, docno, target in zip(*(targets[c] for c in [*KEY, "target"]), strict=True)
    }
    found = [value_of.get((str(qid), str(docno))) for qid, docno in zip(frame["qid"], frame["docno"], strict=True)]
    return frame.assign(target=pd.array(found, dtype="Float64").to_numpy("float64", na_value=float("nan")))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        text = file.read()
    try:
        records = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except ValueError as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from error
    return records
