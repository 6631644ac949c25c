"""What is learned from: labels and teachers beside result frames, samples of lists, files. Beside frames.py the room that knows pandas.

A target says what a passage is worth for its query, higher is better, in the column `target`.
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

from pyterrier_lit.files.candidates import Candidates
from pyterrier_lit.frames import Ranking

KEY = ["qid", "docno"]
Teacher = pt.Transformer | pd.DataFrame | str | Path | None


def with_labels(frame: pd.DataFrame, qrels: pd.DataFrame | None) -> pd.DataFrame:
    """A result frame with the judgements as targets, 0 where there is none. ValueError without any judgement of a passage that is there."""
    if qrels is None:
        raise ValueError(
            "there are no labels to learn from: give fit(topics, qrels), or take Distil for a teacher's ranking"
        )
    judged = qrels.drop_duplicates(KEY)[[*KEY, "label"]].rename(columns={"label": "target"})
    labelled = _joined(frame, judged).fillna({"target": 0})
    if not (labelled["target"] > 0).any():
        raise ValueError(
            f"none of the {len(frame)} passages is judged relevant in the qrels ({len(qrels)} rows): check that qids and docnos are of one collection"
        )
    return labelled


def with_teacher(frame: pd.DataFrame, teacher: Teacher) -> pd.DataFrame:
    """A result frame with a teacher's scores as targets, or where it has ranks alone, higher numbers for better ranks.

    teacher: a transformer, which is given the frame; a run, as a frame or a file that `read_run` reads; None is the order in which
        the passages came. Passages that the teacher does not rank are left out, with a warning; ValueError when none is left.
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
    taught = _joined(frame, run[KEY].assign(target=values.astype("float64")).drop_duplicates(KEY))
    left = taught.dropna(subset="target")
    if left.empty:
        raise ValueError(
            f"the teacher ranks none of the {len(frame)} passages: check that qids and docnos are of one collection"
        )
    if len(left) < len(taught):
        warnings.warn(
            f"{len(taught) - len(left)} of {len(taught)} passages are not in the teacher's ranking and are left out",
            stacklevel=2,
        )
    return left


def sample(targets: Sequence[float], n: int | None, how: str, chosen: random.Random) -> list[int]:
    """Which n passages of a list to learn from, as positions; all where there are no more, or n is None.

    targets: of the passages, best first by the first stage. how: one of SAMPLERS, which have lightning-ir's names; ValueError for another.
    """
    if how not in SAMPLERS:
        raise ValueError(f"sampling={how!r}; wanted one of {', '.join(map(repr, SAMPLERS))}")
    count = len(targets)
    return SAMPLERS[how](targets, min(count, n or count), chosen)


def _one_relevant(targets: Sequence[float], n: int, chosen: random.Random) -> list[int]:
    relevant = [i for i, target in enumerate(targets) if target > 0]
    others = [i for i, target in enumerate(targets) if target <= 0]
    return [chosen.choice(relevant), *chosen.sample(others, min(n - 1, len(others)))]


def _log_random(targets: Sequence[float], n: int, chosen: random.Random) -> list[int]:
    # The n largest of u^(1/w) are a draw without replacement by weights w (Efraimidis and Spirakis, 2006)
    keys = [chosen.random() ** math.log1p(i + 1) for i in range(len(targets))]
    return sorted(sorted(range(len(targets)), key=lambda i: -keys[i])[:n])


SAMPLERS: dict[str, Callable[[Sequence[float], int, random.Random], list[int]]] = {
    "top": lambda targets, n, chosen: list(range(n)),
    "random": lambda targets, n, chosen: sorted(chosen.sample(range(len(targets)), n)),
    "top_and_random": lambda targets, n, chosen: [
        *range(n // 2),
        *sorted(chosen.sample(range(n // 2, len(targets)), n - n // 2)),
    ],
    "log_random": _log_random,  # a passage at rank r with weight 1 / log(1 + r)
    "single_relevant": _one_relevant,  # one of the relevant passages first, then others at random
}


def window(
    targets: Sequence[float], smallest: int, largest: int, shuffle: float, chosen: random.Random
) -> tuple[list[int], list[int]]:
    """A window of smallest to largest passages of a list: which, as they are shown, and their positions best first.

    They are shown in the list's order or, with probability `shuffle`, in any; ties are to stay as they are shown.
    """
    size = min(chosen.randint(smallest, largest), len(targets))
    shown = sorted(chosen.sample(range(len(targets)), size))
    if chosen.random() < shuffle:
        chosen.shuffle(shown)
    return shown, sorted(range(size), key=lambda position: -targets[shown[position]])


def uneven(lists: Sequence[Ranking]) -> list[Ranking]:
    """The lists of several passages that are not all worth the same: those that say which is better."""
    return [given for given in lists if len(set(given.columns["target"])) > 1]


def read_run(path: str | Path, depth: int | None = None) -> pd.DataFrame:
    """A ranking from a TREC run, a parquet file or JSON lines, each perhaps with .gz behind: qid, docno, score, rank (from 0) and,
    where the file has them, query and text.

    depth: ranks to keep of each query. Of a passage that comes twice for a query the first is kept. Read are Rank-DistiLLM's files,
    TIREx's re-ranking input and what `pt.io.write_results` writes; ranks follow from the scores, or where there are none the scores from the ranks.
    """
    path = Path(path).expanduser()
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".parquet"):
        run = pd.read_parquet(path)
    elif kind.endswith((".jsonl", ".json")):
        run = pd.DataFrame(_json_lines(path))
    else:
        run = pt.io.read_results(str(path))
    run = run.rename(columns={"query_id": "qid", "doc_id": "docno"})
    missing = [column for column in KEY if column not in run] or ["score or rank"] * (not {"score", "rank"} & set(run))
    if missing:
        raise ValueError(
            f"{path} has no {missing[0]} (it has {', '.join(map(str, run.columns))}); wanted qid, docno and score or rank"
        )
    if "score" not in run:
        run["score"] = -run["rank"].astype("float64")
    run = run.astype({"qid": str, "docno": str, "score": "float64"}).drop_duplicates(KEY)
    run = pt.model.add_ranks(run.sort_values("score", ascending=False, kind="stable")).sort_values(["qid", "rank"])
    kept = [column for column in ("qid", "query", "docno", "text", "score", "rank") if column in run]
    return run[run["rank"] < (depth or len(run))][kept].reset_index(drop=True)


def read_qa(path: str | Path) -> pd.DataFrame:
    """Questions with answers and passages from the usual JSON lines (or one JSON array) of question answering: question, answers, and
    ctxs with text and perhaps title and id -> qid, query, docno, text, answers, rank: what `FineTune` of a LiT5Score takes.
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
            docno = str(passage.get("id", passage.get("docno", f"{number}-{rank}")))
            rows.append((str(record.get("id", number)), record["question"], docno, text, answers, rank))
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "answers", "rank"])


def read_qrels(path: Path | None) -> pd.DataFrame | None:
    """Judgements in TREC's format; None without a file."""
    return None if path is None else pt.io.read_qrels(str(path))


def as_frame(candidates: Iterable[Candidates]) -> pd.DataFrame:
    """A result frame of candidates, each query's best first."""
    rows = [
        (given.qid, given.query, docno, text, rank)
        for given in candidates
        for rank, (docno, text) in enumerate(zip(given.docnos, given.texts, strict=True))
    ]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "rank"])


def _joined(frame: pd.DataFrame, targets: pd.DataFrame) -> pd.DataFrame:
    """The rows of a frame with their targets, NaN where there is none, whatever types the keys have."""
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
