"""Training from a run in a file, without a frame: memory holds a few bytes per row, and each batch looks up its texts.

A result frame with all texts can be too large for memory. A StoredRun therefore leaves the texts in their source, such
as a document store. For each row, memory holds the docno and the target. For each query, memory holds the qid, the text
of the query and the index of the query's first row. A list is a query with its passages. The lists of a StoredRun equal
the lists of a result frame with the same rows. Training on the StoredRun therefore gives the same student as training
on the frame.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pyterrier_lit.files.candidates import ID, Lookup, Row, best_first, documents, run_rows
from pyterrier_lit.files.candidates import topics as topics_in
from pyterrier_lit.frames import ColumnSets, Ranking, whole
from pyterrier_lit.training.data import (
    Teacher,
    Texts,
    basis_of,
    check_ranked,
    is_trec,
    label_values,
    none_relevant,
    run_records,
    score_values,
)

SHOWN = 20_000  # approximate number of passages per call of a teacher
LOOKED_AT = 100  # the texts of at least this many lists are checked before the first step
COLUMNS = ("qid", "docno", "score", "rank")

Values = Iterable[tuple[str, str, float]]  # (qid, docno, label or score) of some passages


class StoredRun:
    """A run in a file, together with a source of the passages' texts. `fit` takes a StoredRun in place of a result
    frame::

        first = StoredRun("colbert.run.gz", topics, dataset, depth=100)
        Distil(student, "rankzephyr.run.gz").fit(first)

    Args:
        path: a TREC run, JSON lines or a parquet file. A TREC run and JSON lines may be gzipped. The rows of a query
            must be consecutive. If all passages of a query have a rank, they are ordered by rank, and passages with
            equal ranks by descending score. If some of them have no rank but all have a score, they are ordered by
            descending score. Otherwise, they keep the order of the file.
        topics: the text of each query: a frame with qid and query, a mapping qid -> text, or a file. Each line of the
            file is a qid, a tab and the query. In a .jsonl[.gz] file, each line is {qid, query}.
        texts: the text of each docno: a text loader, a dataset or an index with a text loader, a document store of
            ir_datasets, a mapping docno -> text, or a file. Each line of the file is a docno, a tab and the text. In a
            .jsonl[.gz] file, each line is {docno, text}. A text loader must add the column that the student's
            `text_field` names.
        depth: how many passages of each query to use, from the top of the ranking. None uses all passages.

    The constructor reads the run once. It raises OSError if the run cannot be read, and TypeError if `topics` has none
    of the types named above. It raises ValueError, with the line,

    - if the run is malformed or empty;
    - if the rows of a query are not consecutive;
    - if a query has a passage twice;
    - if a qid is missing from the topics.

    If a passage has no text, `fit` raises ValueError with the qid and the docno. Before the first step, `fit` checks
    the texts of at least 100 queries, spread over the run. If the run has fewer queries, `fit` checks all. The texts of
    the remaining queries are checked when their passages are sampled.
    """

    def __init__(self, path: str | Path, topics: Any, texts: Any, *, depth: int | None = None):
        self.path, self.texts = Path(path).expanduser(), texts
        self.qids, self.queries, self.docnos = Strings(), Strings(), Strings()
        self.starts = array("q", [0])  # the index of each query's first row, and at the end the number of rows
        self.targets: array[float] | None = None  # one target per row; NaN for a row without a target
        ask = queries_of(topics)
        for rows in best_first(self.path, rows_in(self.path), depth):
            query = ask([rows[0].qid]).get(rows[0].qid)
            if not isinstance(query, str):
                raise ValueError(f"{rows[0].where}: qid {rows[0].qid!r} has no query among the topics, but {query!r}")
            self.qids.append(rows[0].qid)
            self.queries.append(whole(query))
            self.docnos.append(" ".join(row.docno for row in rows))
            self.starts.append(self.starts[-1] + len(rows))

    def __len__(self) -> int:
        """The number of passages, summed over all queries."""
        return self.starts[-1]

    def __repr__(self) -> str:
        return f"StoredRun({str(self.path)!r}: {len(self.qids)} queries, {len(self)} passages)"

    def docnos_of(self, query: int) -> list[str]:
        """Return the docnos of a query's passages, best first. `query` is the index of the query in the run (from
        0)."""
        docnos: str = self.docnos[query]
        return docnos.split(" ")

    def labelled(self, qrels: pd.DataFrame | None) -> "StoredRun":
        """Return a copy with labels as targets. The targets, and the errors, are those of `data.with_labels` for a
        frame with the same rows.

        Args:
            qrels: a frame with qid, docno and label.
        """
        targets = self._joined(label_values(qrels), missing=0.0)
        if not any(target > 0 for target in targets):
            raise none_relevant(len(self))
        return self._with(targets)

    def taught(self, teacher: Teacher, text_field: str) -> "StoredRun":
        """Return a copy with a teacher's scores as targets. The targets are those of `data.with_teacher` for a frame
        with the same rows.

        Args:
            teacher: as for `data.with_teacher`. A teacher that is a transformer is called with about 20,000 passages at
                a time.
            text_field: the name of the column with the texts of the passages, for a teacher that is a transformer.
        """
        if teacher is None:
            lengths = (end - start for start, end in pairwise(self.starts))
            return self._with(array("d", (-float(place) for length in lengths for place in range(length))))
        scores: Values
        if isinstance(teacher, str | Path):
            scores = scores_in(Path(teacher).expanduser())
        elif isinstance(teacher, pd.DataFrame):
            scores = score_values(teacher)
        else:
            scores = self._asked(teacher, text_field)
        targets = self._joined(scores, missing=math.nan)
        check_ranked(sum(target == target for target in targets), len(self))
        return self._with(targets)

    def lists(self, column_sets: ColumnSets, text_field: str) -> "StoredLists":
        """Return the lists that a student reads. These lists equal the lists of `frames.rankings` for a frame with the
        same rows.

        Args:
            column_sets: alternative sets of columns, each as column name -> type. The first set that a stored run can
                supply is used. A stored run can supply the texts and the targets, but no other columns.
            text_field: the name of the column with the texts.

        Raises ValueError if a stored run can supply none of the column sets. Raises TypeError if the run's argument
        `texts` has a type that StoredRun does not accept.
        """
        held = {text_field, "target"}
        columns = next((columns for columns in column_sets if columns.keys() <= held), None)
        if columns is None:
            wanted = " or ".join(", ".join(columns) for columns in column_sets)
            raise ValueError(f"this recipe reads {wanted}, and a stored run has texts alone; fit it on a result frame")
        return StoredLists(
            self, text_field if text_field in columns else None, look_up(self.texts, text_field, self.path)
        )

    def _with(self, targets: "array[float]") -> "StoredRun":
        run = copy(self)
        run.targets = targets
        return run

    def _joined(self, values: Values, missing: float) -> "array[float]":
        """Return one value for each row of the run: the first value with the row's qid and docno. If there is no such
        value, return `missing` for the row."""
        found, number_of = array("d", [math.nan]) * len(self), {qid: i for i, qid in enumerate(self.qids)}
        last, row_of = None, dict[str, int]()
        for qid, docno, value in values:
            if qid != last:
                query = number_of.get(qid)
                docnos = [] if query is None else self.docnos_of(query)
                last, row_of = (
                    qid,
                    {docno: i for i, docno in enumerate(docnos, 0 if query is None else self.starts[query])},
                )
            row = row_of.pop(docno, None)
            if row is not None and found[row] != found[row]:
                found[row] = value
        return found if missing != missing else array("d", (missing if v != v else v for v in found))

    def _asked(self, teacher: pt.Transformer, text_field: str) -> Values:
        lists, rows = self.lists([{text_field: str}], text_field), list[dict[str, Any]]()
        for i, given in enumerate(lists):
            passages = zip(given.columns["docno"], given.columns[text_field], strict=True)
            rows += [
                {"qid": given.qid, "query": given.query, "docno": docno, text_field: text, "rank": rank}
                for rank, (docno, text) in enumerate(passages)
            ]
            if len(rows) >= SHOWN or i == len(lists) - 1:
                yield from score_values(teacher.transform(pd.DataFrame(rows)))
                rows = []


class StoredLists(Sequence[Ranking]):
    """The lists of a stored run. Each list is built anew on each access.

    The lists are ordered as in a frame with the same rows. If the run has no targets, the lists are in the order of the
    run. If the run has targets, the lists are sorted by the rank of the first passage that has a target. Lists for
    which this rank is equal keep the order of the run. If no passage of a query has a target, the query has no list.

    Args:
        run: the stored run.
        text_field: the name of the column with the texts, or None if the texts are not read.
        look_up: a function: qid, docnos -> the texts of the docnos.
    """

    def __init__(self, run: StoredRun, text_field: str | None, look_up: Callable[[str, list[str]], list[str]]):
        self.run, self.text_field, self.look_up = run, text_field, look_up
        first = array("q", map(self._first, range(len(run.qids))))
        self.order = array("q", sorted((i for i, place in enumerate(first) if place >= 0), key=first.__getitem__))

    def _first(self, query: int) -> int:
        """Return the rank (from 0) of a query's first passage that has a target. Returns -1 if no passage of this query
        has a target, and 0 if the run has no targets. `query` is the index of the query in the run."""
        start, targets = self.run.starts[query], self.run.targets
        if targets is None:
            return 0
        return next(
            (row - start for row in range(start, self.run.starts[query + 1]) if targets[row] == targets[row]), -1
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: Any) -> Any:
        i = self.order[i]
        qid, docnos, columns = self.run.qids[i], self.run.docnos_of(i), dict[str, Any]()
        if self.run.targets is not None:
            targets = self.run.targets[self.run.starts[i] : self.run.starts[i + 1]].tolist()
            docnos = [docno for docno, target in zip(docnos, targets, strict=True) if target == target]
            columns["target"] = [target for target in targets if target == target]
        if self.text_field is not None:
            columns[self.text_field] = Texts(self.look_up, qid, docnos)
        return Ranking(qid, self.run.queries[i], columns | {"docno": docnos})

    def some_texts(self) -> list[list[str]]:
        """Look up the texts of at least 100 lists, evenly spaced in the run, or of all lists if there are fewer.
        Returns one list of texts per list that was looked up. Raises ValueError if a passage has no text."""
        some = range(0, len(self), max(len(self) // LOOKED_AT, 1))
        return [] if self.text_field is None else [list(self[i].columns[self.text_field]) for i in some]


class Strings(Sequence[str]):
    """Many strings, concatenated in memory. Each string takes eight bytes more than its UTF-8 form."""

    def __init__(self) -> None:
        self.bytes, self.ends = bytearray(), array("q")

    def append(self, text: str) -> None:
        self.bytes += text.encode()
        self.ends.append(len(self.bytes))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        i = range(len(self))[i]
        return self.bytes[self.ends[i - 1] if i else 0 : self.ends[i]].decode()


def rows_in(path: Path) -> Iterator[Row]:
    """Yield the rows of a run file. Raises ValueError if a docno contains white space."""
    if is_trec(path):
        yield from run_rows(path)
        return
    for row in run_records(path, COLUMNS):
        if not ID.fullmatch(row["docno"]):
            raise ValueError(f"{row['where']} has docno {row['docno']!r}; a stored run needs one without white space")
        yield Row(row["where"], row["qid"], row["docno"], row["rank"], row["score"])


def scores_in(path: Path) -> Iterator[tuple[str, str, float]]:
    """Yield the score of each row of a run file, as (qid, docno, score). If at least one row of the file has no score,
    the score of each row is its negative rank, as in `data.read_run`.

    Raises ValueError if at least one row has no score and at least one row has no rank, or if the file has no rows.
    """
    basis, row = basis_of(path), None
    for row in rows_in(path):
        value = row.score if basis == "score" else row.rank
        if value is None:
            break
        yield row.qid, row.docno, value if basis == "score" else -value
    else:
        if row is not None:
            return
    where = row.where if row else path
    raise ValueError(f"{where} has no score or rank; wanted qid, docno, and all with a score or all with a rank")


def queries_of(topics: Any) -> Lookup:
    """Return a function: qids -> a dict with the text of each known qid. Raises TypeError if StoredRun does not accept
    topics of this type."""
    if isinstance(topics, str | Path):
        return topics_in(str(topics))
    if isinstance(topics, pd.DataFrame) and {"qid", "query"} <= set(topics.columns):
        topics = dict(zip(topics["qid"].astype("str"), topics["query"], strict=True))
    if isinstance(topics, Mapping):
        return partial(_known, topics)
    raise TypeError(f"topics={type(topics).__name__}; wanted a frame with qid and query, a mapping, or a file")


def look_up(texts: Any, column: str, run: Path) -> Callable[[str, list[str]], list[str]]:
    """Return a function: qid, docnos -> the texts of these docnos. The returned function raises ValueError if a docno
    has no text.

    Args:
        texts: the argument `texts` of StoredRun.
        column: the name of the column that a text loader adds.
        run: the path of the run, for error messages.

    Raises TypeError if StoredRun does not accept texts of this type.
    """
    if isinstance(texts, str | Path):
        find = documents(str(texts))
    elif isinstance(texts, pt.Transformer) or hasattr(texts, "text_loader"):
        find = partial(_loaded, texts if isinstance(texts, pt.Transformer) else texts.text_loader(), column)
    elif hasattr(texts, "docs_store") or hasattr(texts, "get_many_iter"):
        find = partial(_in_store, texts.docs_store() if hasattr(texts, "docs_store") else texts)
    elif isinstance(texts, Mapping):
        find = partial(_known, texts)
    else:
        raise TypeError(
            f"texts={type(texts).__name__}; wanted a text loader, a dataset or an index with one, a document store of"
            " ir_datasets, a mapping, or a file"
        )
    return partial(_texts, find, run)


def _texts(find: Lookup, run: Path, qid: str, docnos: list[str]) -> list[str]:
    """Return the texts of docnos. Raises ValueError, with the path `run`, if a docno has no text."""
    try:
        found, error = find(docnos), None
    except TypeError:
        raise
    except Exception as raised:  # the type of the error for an unknown docno depends on the text loader
        if len(docnos) > 1:
            return [text for docno in docnos for text in _texts(find, run, qid, [docno])]
        found, error = {}, raised
    unknown = next((docno for docno in docnos if not isinstance(found.get(docno), str)), None)
    if unknown is not None:
        raise ValueError(
            f"qid {qid!r} has docno {unknown!r} in {run}, and its text is {found.get(unknown)!r}; wanted texts of all"
            " passages of the run"
        ) from error
    return [whole(found[docno]) for docno in docnos]


def _known(mapping: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    return {name: mapping[name] for name in names if name in mapping}


def _in_store(store: Any, docnos: Iterable[str]) -> dict[str, str]:
    return {doc.doc_id: doc.default_text() for doc in store.get_many_iter(docnos)}


def _loaded(loader: pt.Transformer, column: str, docnos: Iterable[str]) -> dict[str, str]:
    loaded = loader.transform(pd.DataFrame({"qid": "", "query": "", "docno": list(docnos)}))
    if column not in loaded:
        names = ", ".join(map(str, loaded.columns))
        raise TypeError(f"{loader!r} adds no column {column!r}, which the student reads; it gives {names}")
    return dict(zip(loaded["docno"], loaded[column], strict=True))
