"""Training data: adds targets to result frames, samples passages, and reads runs, questions and qrels from files.

A list is a query with its passages, in the order of the first stage. The target of a passage is a number that states
how relevant the passage is to its query (higher is better). The target is the passage's label in the qrels, or its
score from a teacher. In a result frame, the targets are in the column `target`.
"""

import hashlib
import json
import math
import random
import re
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_lit.files.candidates import LISTS, Candidates, key, number, objects, read_rerank_file, run_rows
from pyterrier_lit.files.lines import numbered_lines
from pyterrier_lit.files.teachers import SHAPES, read_taught
from pyterrier_lit.frames import Ranking, numbers, places

KEY = ["qid", "docno"]
NAMES = {"query_id": "qid", "doc_id": "docno"}  # column names in Rank-DistiLLM's files -> PyTerrier's names
Teacher = pt.Transformer | pd.DataFrame | str | Path | None


def with_labels(frame: pd.DataFrame, qrels: pd.DataFrame | None, what: str = "passages") -> pd.DataFrame:
    """Return a result frame with the labels of the qrels as targets. The target of an unjudged passage is 0.

    Args:
        frame: the result frame.
        qrels: a frame with qid, docno and label.
        what: the word for the passages in error messages.

    Raises ValueError if there are no qrels, if a label is not a finite number, or if none of the passages is judged
    relevant.
    """
    labelled = _joined(frame, label_values(qrels)).fillna({"target": 0})
    if not (labelled["target"] > 0).any():
        raise none_relevant(len(frame), what)
    return labelled


def with_teacher(frame: pd.DataFrame, teacher: Teacher) -> pd.DataFrame:
    """Return a result frame with a teacher's scores as targets. If the teacher gives ranks but no scores, the targets
    are the negative ranks. Passages that the teacher does not rank are left out, and a warning gives their number.

    Args:
        frame: the result frame.
        teacher: a transformer that reranks the frame, or a run. The run is a frame, or a file that `read_run` reads.
            If None, the targets follow the incoming order of the passages: 0 for the first passage of each list, -1 for
            the second, and so on.

    Raises ValueError if no passage is left, or if a score is not a finite number.
    """
    if teacher is None:
        return frame.assign(target=[-float(place) for place in places(frame)])
    if isinstance(teacher, str | Path):
        teacher = read_run(teacher)
    joined = _joined(frame, score_values(teacher if isinstance(teacher, pd.DataFrame) else teacher.transform(frame)))
    left = joined.dropna(subset="target")
    check_ranked(len(left), len(joined))
    return left


def none_relevant(n: int, what: str = "passages") -> ValueError:
    """Return the error to raise if none of n passages is judged relevant in the qrels. The error message calls the
    passages `what`, for example "validation passages"."""
    return ValueError(
        f"none of the {n} {what} is judged relevant in the qrels: check that qids and docnos belong to the same"
        " collection"
    )


def check_ranked(ranked: int, n: int) -> None:
    """Raise ValueError if a teacher ranks none of n passages. Warn if it ranks only some of them.

    Args:
        ranked: the number of passages that the teacher ranks.
        n: the number of passages.
    """
    if not ranked:
        raise ValueError(
            f"the teacher ranks none of the {n} passages: check that qids and docnos belong to the same collection"
        )
    if ranked < n:
        warnings.warn(f"{n - ranked} of {n} passages are not in the teacher's ranking and are left out", stacklevel=3)


def judgements(frame: pd.DataFrame, qrels: pd.DataFrame) -> pd.DataFrame:
    """Return the qrels of the validation queries, in the form that ir_measures takes: a frame with query_id, doc_id and
    relevance.

    Args:
        frame: a result frame with the validation queries and their passages.
        qrels: a frame with qid, docno and label.

    Raises ValueError if a label is not a whole number. Also raises ValueError if no passage in the frame is judged
    relevant, because the `nDCG@10` on the validation queries would then always be 0.
    """
    with_labels(frame, qrels, "validation passages")
    labels = numbers(qrels, "label").to_numpy()
    if (labels % 1 != 0).any():
        raise ValueError(f"the qrels of the validation have a label {labels[labels % 1 != 0][0]}; wanted whole numbers")
    judged = pd.DataFrame({"query_id": qrels["qid"], "doc_id": qrels["docno"]}).astype("str")
    judged["relevance"] = labels.astype("int64")
    return judged[judged["query_id"].isin(set(frame["qid"].astype("str")))].reset_index(drop=True)


def digest(parts: Iterable[Any]) -> str:
    """Return a digest of training data, 16 hexadecimal digits. Training data with equal queries, passages, targets and
    vectors has equal digests.

    Args:
        parts: the parts of the training data, such as its lists.
    """
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part, default=_content).encode())
    return found.hexdigest()[:16]


def _content(value: Any) -> Any:
    """Convert a value that JSON cannot hold. A vector or scalar of NumPy or torch becomes a digest, an array of objects
    a list, and any other value its `repr`."""
    if hasattr(value, "numpy"):  # a torch tensor
        value = value.numpy()
    is_vector = hasattr(value, "tobytes") and value.dtype != object
    return hashlib.sha256(value.tobytes()).hexdigest() if is_vector else getattr(value, "tolist", value.__repr__)()


def sample(targets: Sequence[float], n: int | None, how: str, rng: random.Random) -> list[int]:
    """Sample n passages of a list. Return their positions in the list (from 0). If n is None or the list has at most n
    passages, all positions are returned. The sampling "single_relevant" is an exception: it always samples exactly one
    passage with a positive target.

    Args:
        targets: the targets of the passages, in the order of the first stage.
        n: the number of passages to sample, or None.
        how: the name of the sampling, a key of SAMPLERS. lightning-ir uses the same names.
        rng: the random generator.

    Raises ValueError if SAMPLERS does not have the name, or if "single_relevant" finds no positive target.
    """
    if how not in SAMPLERS:
        raise ValueError(f"sampling={how!r}; wanted one of {', '.join(map(repr, SAMPLERS))}")
    count = len(targets)
    return SAMPLERS[how](targets, min(count, n or count), rng)


def _one_relevant(targets: Sequence[float], n: int, rng: random.Random) -> list[int]:
    relevant = [i for i, target in enumerate(targets) if target > 0]
    others = [i for i, target in enumerate(targets) if target <= 0]
    if not relevant:
        raise ValueError(
            f"sampling='single_relevant' needs a passage with a positive target in each list, but the highest of these "
            f"{len(targets)} targets is {max(targets)}. For a teacher whose scores are not labels, use another "
            "sampling, such as 'log_random'"
        )
    return [rng.choice(relevant), *rng.sample(others, min(n - 1, len(others)))]


def _log_random(targets: Sequence[float], n: int, rng: random.Random) -> list[int]:
    """Sample n positions without replacement. The passage at rank r = 1, 2, ... has the weight w = 1 / log(1 + r)."""
    # Efraimidis and Spirakis (2006): draw u from [0, 1] for each passage, and take the n passages with the largest
    # u^(1/w)
    keys = [rng.random() ** math.log1p(i + 1) for i in range(len(targets))]
    return sorted(sorted(range(len(targets)), key=lambda i: -keys[i])[:n])


SAMPLERS: dict[str, Callable[[Sequence[float], int, random.Random], list[int]]] = {
    "top": lambda targets, n, rng: list(range(n)),
    "random": lambda targets, n, rng: sorted(rng.sample(range(len(targets)), n)),
    "top_and_random": lambda targets, n, rng: [
        *range(n // 2),
        *sorted(rng.sample(range(n // 2, len(targets)), n - n // 2)),
    ],
    "log_random": _log_random,
    "single_relevant": _one_relevant,
}


def window(
    targets: Sequence[float], smallest: int, largest: int, shuffle: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Sample a window of passages from a list. First, the size of the window is drawn: all sizes from `smallest` to
    `largest` passages are equally likely. If the list has fewer passages, the window has all passages of the list.

    Args:
        targets: the targets of the passages, in the order of the list.
        smallest: the smallest number of passages in a window.
        largest: the largest number of passages in a window.
        shuffle: the probability that the window is shuffled.
        rng: the random generator.

    Returns two lists of numbers, such as [7, 2, 9] and [2, 0, 1]. The first list has the passages in the order in which
    the student sees them, as positions in the list of the query (from 0). This order is random with probability
    `shuffle`. Otherwise, it is the order of the list of the query. The second list has the passages by target, highest
    first, as positions in the first list (from 0). In the example, 2 stands for the third passage of the window, which
    has the highest target. Passages with equal targets keep the order in which the student sees them.
    """
    size = min(rng.randint(smallest, largest), len(targets))
    shown = sorted(rng.sample(range(len(targets)), size))
    if rng.random() < shuffle:
        rng.shuffle(shown)
    return shown, sorted(range(size), key=lambda position: -targets[shown[position]])


class Lists(Sequence[Ranking]):
    """The lists at some positions of a longer sequence of lists, in the order of `positions`. No list is copied."""

    def __init__(self, lists: Sequence[Ranking], positions: Iterable[int]):
        self.lists, self.positions = lists, array("q", positions)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: Any) -> Any:
        return Lists(self.lists, self.positions[i]) if isinstance(i, slice) else self.lists[self.positions[i]]


def uneven(lists: Sequence[Ranking]) -> Lists:
    """Return the lists that have at least two different targets. If all targets of a list are equal, the list has no
    order that a student could learn."""
    return Lists(lists, (i for i, given in enumerate(lists) if len(set(given.columns["target"])) > 1))


class Texts(Sequence[str]):
    """A column with the texts of a query's passages. The texts are looked up by docno on each access.

    Args:
        look_up: a function: qid, docnos -> the texts of these docnos.
        qid: the qid of the query.
        docnos: the docnos of the passages.
    """

    def __init__(self, look_up: Callable[[str, list[str]], list[str]], qid: str, docnos: list[str]):
        self.look_up, self.qid, self.docnos = look_up, qid, docnos

    def __len__(self) -> int:
        return len(self.docnos)

    def __getitem__(self, i: Any) -> Any:
        return take(self, [i])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(take(self, range(len(self))))

    def __repr__(self) -> str:
        return "texts of the docnos"


def take(column: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    """Return the values of a column at the given positions. A `Texts` column looks up all these values with a single
    call."""
    if isinstance(column, Texts):
        return column.look_up(column.qid, [column.docnos[i] for i in positions])
    return [column[i] for i in positions]


def some_of(given: Ranking, positions: Sequence[int]) -> Ranking:
    """Return a list reduced to the passages at the given positions, in the order of `positions`."""
    return given._replace(columns={name: take(column, positions) for name, column in given.columns.items()})


class Passages(Sequence[Ranking]):
    """The passages of some lists, each as a list with a single passage. Passages with empty texts are left out. Of
    several passages with equal texts, only the first is kept.

    Args:
        lists: the lists.
        text_field: the name of the column with the texts.
    """

    def __init__(self, lists: Sequence[Ranking], text_field: str):
        self.lists, self.positions, self.places = lists, array("q"), array("q")
        seen = set[bytes]()
        for position, given in enumerate(lists):
            for place, text in enumerate(given.columns[text_field]):
                known = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if text.strip() and known not in seen:
                    seen.add(known)
                    self.positions.append(position)
                    self.places.append(place)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: Any) -> Any:
        return some_of(self.lists[self.positions[i]], [self.places[i]])


def read_run(path: str | Path) -> pd.DataFrame:
    """Read a run from a TREC file, from JSON lines or from a parquet file. A TREC file and JSON lines may be gzipped.
    The runs can come from

    - Rank-DistiLLM;
    - `pt.io.write_results`;
    - rank_llm;
    - TIREx: files with input for rerankers;
    - JSON lines with permutations: {qid, final_list: [docno, ...]}, with the best docno first.

    Returns a frame with qid, docno, score, rank (from 0) and, if the file has them, query and text. If at least one row
    of the file has no score, the score of each row is its negative rank. The ranks in the frame are computed from the
    scores. If a query has a passage twice, the first of the two rows is kept.

    Raises ValueError

    - if the file has no rows;
    - if a row has no qid or docno;
    - if a score or a rank is invalid;
    - if some rows have no score and some rows have no rank.
    """
    path = Path(path).expanduser()
    rows = list(run_records(path))
    basis = "score" if all(row["score"] is not None for row in rows) else "rank"
    lacking = next((row for row in rows if row[basis] is None), None)
    if lacking is not None or not rows:
        where = lacking["where"] if lacking else path
        raise ValueError(f"{where} has no score or rank; wanted qid, docno, and all with a score or all with a rank")
    run = pd.DataFrame(rows).astype({"score": "float64"}).drop_duplicates(KEY)
    if basis == "rank":
        run["score"] = -run["rank"].astype("float64")
    run = pt.model.add_ranks(run.sort_values("score", ascending=False, kind="stable")).sort_values(["qid", "rank"])
    kept = [c for c in ("qid", "query", "docno", "text", "score", "rank") if run[c].notna().any()]
    return run[kept].reset_index(drop=True)


def run_records(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run file in one of the formats of `read_run`. Each row is a dict with qid, docno, score,
    rank, query, text and `where`, the place of the row in the file. Missing values are None.

    Args:
        path: the file.
        columns: the columns to read from a parquet file. None reads all columns.
    """
    if path.suffix == ".parquet":
        for number, record in enumerate(_parquet(path, columns), 1):
            yield _ranked(f"{path}, row {number}", record)
    elif {".jsonl", ".json"} & set(path.suffixes):
        _, first = next(objects(path), ("", {}))
        if SHAPES & first.keys():
            raise ValueError(
                f"{path} is teacher data with its passages; read it by read_teacher, and fit on that frame"
            )
        if "final_list" in first:
            for where, record in objects(path):
                yield from _permuted(where, record)
        elif LISTS & first.keys():
            for given in read_rerank_file(path):
                for rank, (docno, text) in enumerate(zip(given.docnos, given.texts, strict=True)):
                    row = {"where": str(path), "qid": given.qid, "docno": docno, "score": None, "rank": rank}
                    yield row | {"query": given.query, "text": text}
        else:
            for where, record in objects(path):
                yield _ranked(where, record)
    else:
        for line in run_rows(path):
            yield line._asdict() | {"query": None, "text": None}


def is_trec(path: Path) -> bool:
    """Return whether a run is in TREC's format: its file name has none of the suffixes .parquet, .jsonl and .json."""
    return not {".parquet", ".jsonl", ".json"} & set(path.suffixes)


def basis_of(path: Path) -> str:
    """Return the name of the column that determines the order of a run: "score" if all rows have a score, as in TREC's
    format, else "rank"."""
    if is_trec(path):
        return "score"
    return "score" if all(row["score"] is not None for row in run_records(path, ["qid", "docno", "score"])) else "rank"


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, each as a dict. Only one batch of rows is in memory at a time. NaN becomes
    None."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if columns is None or NAMES.get(name, name) in columns]
        for batch in file.iter_batches(columns=names):
            for record in batch.to_pylist():
                yield {name: None if value != value else value for name, value in record.items()}


def _ranked(where: str, record: dict[str, Any]) -> dict[str, Any]:
    record = {NAMES.get(name, name): value for name, value in record.items()}
    ids = {name: key(record, name, where) for name in KEY}
    values = {name: number(record, name, where) for name in ("score", "rank")}
    return {"where": where} | ids | values | {name: record.get(name) for name in ("query", "text")}


def _permuted(where: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a record {qid, final_list: [docno, ...]}. The docnos are in the order of the ranking."""
    docnos = record.get("final_list")
    if not isinstance(docnos, list) or not all(isinstance(docno, str | int) for docno in docnos):
        raise ValueError(f"{where} has no list of docnos in final_list")
    row = {"where": where, "qid": key(record, "qid", where), "score": None, "query": None, "text": None}
    return [row | {"docno": str(docno), "rank": rank} for rank, docno in enumerate(docnos)]


def read_teacher(path: str | Path, orders: str | Path | None = None) -> pd.DataFrame:
    """Read public teacher data that contains the passages, for `Distil`. The file is in one of three formats:
    RankZephyr's conversations, PE-Rank's train.jsonl, or the format that RankGPT and TWOLAR share. The file contains
    JSON lines or one JSON array, and may be gzipped.

    Args:
        path: the file.
        orders: the second file of RankGPT's data, a JSON array of the teacher's answers. None for all other data. The
            format of RankGPT and TWOLAR has the passages in the field `retrieved_passages`. Without `orders`, these
            must already be in the teacher's order, as in TWOLAR's data. The other two formats contain the order.

    Returns a frame with qid, query, docno, text, rank and shown. The column `rank` has the rank that the teacher gave
    the passage (from 0). The column `shown` has the position of the passage in the teacher's input (from 0). If the
    teacher's order of a list does not name each passage exactly once, the order is repaired. Of several mentions of a
    passage, the first counts. The passages that are not named follow at the end, in the order of the teacher's input. A
    warning states how many orders were repaired.

    `files.teachers.read_taught` documents the formats and the errors.
    """
    names = ["qid", "query", "docno", "text", "rank", "shown"]
    rows, repaired, lists = [], 0, 0
    for given in read_taught(Path(path).expanduser(), None if orders is None else Path(orders).expanduser()):
        lists, repaired = lists + 1, repaired + given.repaired
        for rank, shown in enumerate(given.order):
            rows.append((given.qid, given.query, given.docnos[shown], given.texts[shown], rank, shown))
    if repaired:
        warnings.warn(
            f"{path}: {repaired} of {lists} orders do not name each passage once; first mentions count, and the rest"
            " follows as it was shown",
            stacklevel=2,
        )
    return pd.DataFrame(rows, columns=names)


def read_qa(path: str | Path) -> pd.DataFrame:
    """Read questions with their answers and passages, to train a LiT5Score with `FineTune`.

    Args:
        path: a file with JSON lines or one JSON array. Each record has the fields question, answers and ctxs. The field
            ctxs is a list of passages. Each passage has a text, and optionally a title and a docid (or id).

    Returns a frame with qid, query, docno, text, answers (a list of texts) and rank (from 0), with one row per passage.
    A title is put before the text of its passage.

    Raises ValueError, with the place in the file, if a field is missing.
    """
    rows = []
    for position, (where, record) in enumerate(objects(Path(path).expanduser())):
        lacking = [field for field in ("question", "ctxs") if field not in record]
        answers = record.get("answers", record.get("answer"))
        if lacking or not answers:
            raise ValueError(f"{where}: it has no {[*lacking, 'answers'][0]}; wanted question, answers and ctxs")
        answers = [answers] if isinstance(answers, str) else list(answers)
        qid = _key_or(record, ("id",), str(position), where)
        for rank, passage in enumerate(record["ctxs"]):
            if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
                raise ValueError(f"{where}: passage {rank} of ctxs has no text; wanted objects with a text")
            text = f"{passage['title']} {passage['text']}" if passage.get("title") else passage["text"]
            docno = _key_or(passage, ("docid", "id", "docno"), f"{position}-{rank}", where)
            rows.append((qid, record["question"], docno, text, answers, rank))
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "answers", "rank"])


def _key_or(record: dict[str, Any], names: Sequence[str], default: str, where: str) -> str:
    name = next((name for name in names if record.get(name) is not None), None)
    return default if name is None else key(record, name, where)


def read_qrels(path: Path | None) -> pd.DataFrame | None:
    """Read qrels in TREC's format. Returns a frame with qid, docno and label, or None if `path` is None. Raises
    ValueError with the number of the line if a line is malformed."""
    if path is None:
        return None
    rows = []
    for where, line in numbered_lines(path):
        columns = line.split()
        if len(columns) != 4 or not re.fullmatch(r"[+-]?\d+", columns[3]):
            raise ValueError(
                f"{where} is not a judgement; wanted four columns, qid 0 docno label, the label a whole number"
            )
        rows.append((columns[0], columns[2], int(columns[3])))
    return pd.DataFrame(rows, columns=["qid", "docno", "label"])


def as_frame(candidates: Iterable[Candidates]) -> pd.DataFrame:
    """Return candidates as a result frame with qid, query, docno, text and rank (from 0). The passages of a query keep
    their order."""
    rows = [
        (given.qid, given.query, docno, text, rank)
        for given in candidates
        for rank, (docno, text) in enumerate(zip(given.docnos, given.texts, strict=True))
    ]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "rank"])


def label_values(qrels: pd.DataFrame | None) -> Iterator[tuple[str, str, float]]:
    """Return the labels of qrels, each as (qid, docno, label). Raises ValueError if there are no qrels, if a column is
    missing, if a row has no qid or docno, or if a label is not a finite number."""
    if qrels is None:
        raise ValueError(
            "there are no labels to learn from: call fit(topics, qrels), or use Distil for a teacher's ranking"
        )
    return _values(qrels, "label", "the qrels")


def score_values(run: pd.DataFrame) -> Iterator[tuple[str, str, float]]:
    """Return the scores of a teacher's run, each as (qid, docno, score). If the run has ranks but no scores, the scores
    are the negative ranks. Raises ValueError if a column is missing, if a row has no qid or docno, or if a score is not
    a finite number."""
    if "score" not in run and "rank" in run:
        run = run.assign(score=-numbers(run, "rank").to_numpy())
    return _values(run, "score", "the teacher's ranking")


def _values(given: pd.DataFrame, column: str, who: str) -> Iterator[tuple[str, str, float]]:
    """Yield (qid, docno, value) for each row of a frame, with the values of `column`. Error messages call the frame
    `who`, for example "the qrels".

    Raises ValueError if a column is missing, if a row has no qid or docno, or if a value is not a finite number.
    """
    missing = [name for name in (*KEY, column) if name not in given]
    if missing:
        raise ValueError(
            f"no column {missing[0]!r} in {who}, which has {', '.join(map(str, given.columns))}; wanted qid, docno and"
            f" {column}"
        )
    for qid, docno, target in zip(given["qid"], given["docno"], numbers(given, column), strict=True):
        if pd.isna(qid) or pd.isna(docno):
            raise ValueError(
                f"a row of {who} has qid {qid!r} and docno {docno!r}; wanted both. An id such as NA is kept by"
                " pd.read_csv(..., dtype=str, keep_default_na=False)"
            )
        if not math.isfinite(target):
            raise ValueError(f"no number for qid {qid!r}, docno {docno!r} in {who}, but {target}")
        yield str(qid), str(docno), float(target)


def _joined(frame: pd.DataFrame, values: Iterable[tuple[str, str, float]]) -> pd.DataFrame:
    """Return the frame with a new column `target`. The target of a row is the value for its qid and docno, or NaN if
    there is no such value.

    Qids and docnos are compared as text. If several values have the same qid and docno, the first one counts.
    """
    value_of: dict[tuple[str, str], float] = {}
    for qid, docno, target in values:
        value_of.setdefault((qid, docno), target)
    found = [value_of.get((str(qid), str(docno))) for qid, docno in zip(frame["qid"], frame["docno"], strict=True)]
    return frame.assign(target=pd.Series(found, index=frame.index, dtype="float64"))
