"""Converts a result frame into a reranker's input, and new scores into a result frame. Rerankers read and write frames
only through this module. The module does not deal with models."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyterrier as pt

Columns = dict[str, list[list[Any]]]  # column name -> a list per query, with one value per passage, best first
ColumnSets = Sequence[Mapping[str, type]]  # alternative sets of columns, each a mapping: column name -> str or object


def rerank(
    frame: pd.DataFrame,
    results: Callable[[list[str], Columns], Mapping[str, list[Any]]],
    column_sets: ColumnSets,
    query_columns: Sequence[str] = (),
    context: pt.Transformer | None = None,
) -> pd.DataFrame:
    """Rerank a result frame: `results` computes a new score for every row, and the ranks follow from the scores.

    Args:
        frame: a frame with the columns `qid`, `query` and `docno`, and with the columns of one of `column_sets`. Its
            rows may have any order and any index. The frame is not modified.
        results: a function that is called once, with the list of all queries and a dict: column name -> a list per
            query, with one value per passage, such as {"docno": [["d1", "d2"], ["d7"]]}. The columns are `docno` and
            the columns of the set in `column_sets` that is used. The passages of a query are ordered by `rank`. Without
            a column `rank`, they are ordered by descending `score`. Without either column, they are in the order of
            their rows. The function returns a dict. Its entry `score` has one list per query, with one score per
            passage (higher is better). For each name in `query_columns`, the dict also has an entry with one value per
            query.
        column_sets: alternative sets of columns. Each set maps a column name to the type of its values: str, or object
            for any type. The first set whose columns are all in the frame is used.
        query_columns: names of columns that are added to the frame besides `score` and `rank`.
        context: the transformer that PyTerrier names in its error message if a column is missing.

    Returns a frame with the same rows in the same order. The columns `score` (float64) and `rank` (from 0) have new
    values, and all other columns are kept. If pt.model.STRICT_SORT is set, the rows are sorted by qid and rank.
    Passages with equal scores keep their incoming order.

    No tokenizer accepts half of a surrogate pair in a text. The model reads U+FFFD instead, and the text in the frame
    is unchanged. PyTerrier's operator `+` can produce rows without a query. Such a row takes the query of another row
    with the same qid. For other unusual input, see pt_docs/bad_input.rst.

    Raises pt.validate.InputValidationError if a column is missing, and TypeError if a query or text is not a string.
    Raises ValueError if a column occurs twice, if a qid or docno is missing, or if a qid has two queries. Also raises
    ValueError if an incoming rank or score is not a number, or if a new score is not finite.
    """
    _check_columns(frame, column_sets, context, query_columns)
    if frame.empty:
        nothing = {column: pd.Series(dtype="object") for column in query_columns}
        return pt.model.add_ranks(frame.reset_index(drop=True).assign(score=pd.Series(dtype="float64"), **nothing))
    rows, lists, queries, columns = _read(frame, column_sets)
    found = results(queries, columns)
    counts = [len(ranking) for ranking in lists]
    added = {column: np.repeat(found[column], counts) for column in query_columns}
    scores = np.concatenate(found["score"]).astype("float64")
    best_first = rows.iloc[np.concatenate(lists)].assign(score=scores, **added)
    _check_finite(best_first)
    ranked = pt.model.add_ranks(best_first)
    return ranked.reset_index(drop=True) if pt.model.STRICT_SORT else ranked.sort_index()


def not_finite(value: object, query: str, docnos: Sequence[Any]) -> ValueError:
    """The error to raise if a model returned nan or an infinity for passages of a query.

    value: what the model returned. docnos: the docnos of these passages.
    """
    others = f" and {len(docnos) - 1} more of its passages" if len(docnos) > 1 else ""
    return ValueError(
        f"the model gave {value} for query {query!r}, docno {docnos[0]!r}{others}; try dtype='float32', and check the"
        " checkpoint's weights"
    )


class Ranking(NamedTuple):
    """A query and its passages."""

    qid: str
    query: str
    columns: dict[str, list[Any]]  # column name -> the value of each passage, best first


def rankings(frame: pd.DataFrame, column_sets: ColumnSets, context: pt.Transformer | None = None) -> list[Ranking]:
    """The queries of a result frame, each with its passages in the order in which `rerank` would pass them to a model.

    This function is used for training. frame, column_sets, context: as in `rerank`. For invalid frames, raises the same
    errors as `rerank`.
    """
    _check_columns(frame, column_sets, context)
    if frame.empty:
        return []
    rows, lists, queries, columns = _read(frame, column_sets)
    qids = rows["qid"].tolist()
    return [
        Ranking(str(qids[rows_of[0]]), query, {name: values[i] for name, values in columns.items()})
        for i, (rows_of, query) in enumerate(zip(lists, queries, strict=True))
    ]


def places(frame: pd.DataFrame) -> list[int]:
    """For each row of a frame, the position of its passage in the list of its query, from 0.

    The passages of a list are ordered as in `rerank`.
    """
    rows = frame.reset_index(drop=True)
    _check_keys(rows)
    place_of = {row: place for ranking in _lists(rows) for place, row in enumerate(ranking.tolist())}
    return [place_of[row] for row in range(len(rows))]


def numbers(frame: pd.DataFrame, column: str) -> pd.Series:
    """A column of a frame as a series of numbers, with NaN for missing values. Raises ValueError if a value is not a
    number; the message names the row of this value."""
    return _numbers(frame.reset_index(drop=True), column)


def sampled(frame: pd.DataFrame, columns: list[str], n: int) -> list[list[Any]]:
    """Draw n random rows of a frame, or all rows if the frame has fewer than n. Returns for each column in `columns` a
    list with the values of the column in these rows. The random seed is fixed, so each call draws the same rows.

    Raises ValueError if the frame lacks one of the columns or has no rows, or if n is not a positive number.
    """
    if n < 1:
        raise ValueError(f"{n} rows of the frame were asked for; wanted at least 1")
    if frame.empty or not set(columns) <= set(frame.columns):
        raise ValueError(
            f"a frame of {len(frame)} rows with the columns {', '.join(map(str, frame.columns))} cannot be used;"
            f" wanted candidates with {' and '.join(columns)}"
        )
    rows = frame[columns].sample(min(n, len(frame)), random_state=0)
    return [rows[column].tolist() for column in columns]


def _read(
    frame: pd.DataFrame, column_sets: ColumnSets
) -> tuple[pd.DataFrame, list[np.ndarray], list[str], dict[str, list[list[Any]]]]:
    """Check a frame and split it into queries and passages.

    Returns four things: the rows with a new index from 0; the row numbers of each query, best first; the queries; and
    the columns that `rerank` passes to `results`.
    """
    column_set = next(columns for columns in column_sets if columns.keys() <= set(frame.columns))
    rows = frame.reset_index(drop=True)
    _check_keys(rows)
    queries = _strings(_with_queries(rows), "query")
    values = {
        column: _strings(rows, column) if kind is str else rows[column].tolist() for column, kind in column_set.items()
    }
    values["docno"] = rows["docno"].tolist()
    if any(query.startswith("applypipeline:") for query in queries):
        warnings.warn(
            "a query begins with 'applypipeline:', which is Terrier's query language (RM3 and Bo1 write it), and the"
            " model reads it so: put pt.rewrite.reset() between query expansion and reranker",
            stacklevel=4,
        )
    lists = _lists(rows)
    columns = {column: [[cells[row] for row in ranking] for ranking in lists] for column, cells in values.items()}
    return rows, lists, _of_each(queries, rows, lists), columns


def _lists(rows: pd.DataFrame) -> list[np.ndarray]:
    """For each query, the numbers of its rows, best first."""
    for column, ascending in (("rank", True), ("score", False)):
        if column in rows:
            numbers = _numbers(rows, column)
            rows = rows.loc[numbers.sort_values(ascending=ascending, kind="stable").index]
            break
    return [ranking.to_numpy() for ranking in rows.groupby("qid", sort=False, observed=True).groups.values()]


def _with_queries(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows. A row without a query gets the query of another row with the same qid."""
    missing = rows["query"].isna()
    if not missing.any():
        return rows
    known = dict(zip(rows["qid"][~missing], rows["query"][~missing], strict=True))
    queries = [
        known.get(qid, query) if is_missing else query
        for qid, query, is_missing in zip(rows["qid"], rows["query"], missing, strict=True)
    ]
    return rows.assign(query=pd.Series(queries, dtype="object"))


def _of_each(queries: list[str], rows: pd.DataFrame, lists: list[np.ndarray]) -> list[str]:
    """The query of each list of passages.

    queries: the query of each row of the frame. lists: for each list, the numbers of its rows. Raises ValueError if the
    rows of a list have different queries.
    """
    for ranking in lists:
        differing = next((queries[row] for row in ranking if queries[row] != queries[ranking[0]]), None)
        if differing is not None:
            expanded = ", or put pt.rewrite.reset() after query expansion" if "query_0" in rows else ""
            raise ValueError(
                f"qid {rows.at[ranking[0], 'qid']!r} has two queries, {queries[ranking[0]]!r} and {differing!r}; give"
                f" each its own qid{expanded}"
            )
    return [queries[ranking[0]] for ranking in lists]


def _check_columns(
    frame: pd.DataFrame,
    column_sets: ColumnSets,
    context: pt.Transformer | None,
    added: Sequence[str] = (),
) -> None:
    with pt.validate.any(frame, context=context) as accepted:
        for columns in column_sets:
            accepted.result_frame(extra_columns=["query", *columns])
    used = ["qid", "query", "docno", *{column for columns in column_sets for column in columns}, "score", "rank"]
    twice = [column for column in used if list(frame.columns).count(column) > 1]
    if twice:
        raise ValueError(f"the frame has two columns {twice[0]!r}; drop or rename one of them")
    clash = [column for column in added if column in used]
    if clash:
        raise ValueError(
            f"a new column cannot be called {clash[0]!r}, which the result frame needs; choose another name"
        )


def _check_keys(rows: pd.DataFrame) -> None:
    for column in ("qid", "docno"):
        missing = np.flatnonzero(rows[column].isna())
        if len(missing):
            raise ValueError(f"{_name(rows, missing[0])} has no {column}; every row of a result frame needs one")


def _strings(rows: pd.DataFrame, column: str) -> list[str]:
    cells = rows[column].tolist()
    for row, cell in enumerate(cells):
        if not isinstance(cell, str):
            raise TypeError(
                f"{column!r} of {_name(rows, row)} is {cell!r}, not a string; load or fill it before reranking"
            )
    return [whole(cell) for cell in cells]


def whole(text: str) -> str:
    """The text in valid UTF-8: a lone surrogate becomes U+FFFD, and a surrogate pair becomes its character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _numbers(rows: pd.DataFrame, column: str) -> pd.Series:
    numbers = pd.to_numeric(rows[column], errors="coerce")
    wrong = np.flatnonzero(numbers.isna() & rows[column].notna())
    if len(wrong):
        raise ValueError(
            f"{column!r} of {_name(rows, wrong[0])} is {rows.at[wrong[0], column]!r}, not a number; mend or drop the"
            " column"
        )
    return numbers


def _check_finite(rows: pd.DataFrame) -> None:
    wrong = rows[~np.isfinite(rows["score"])]
    if len(wrong):
        first = wrong.iloc[0]
        raise not_finite(first["score"], first["query"], wrong[wrong["qid"] == first["qid"]]["docno"].tolist())


def _name(rows: pd.DataFrame, row: int) -> str:
    return f"row {row} (qid {rows.at[row, 'qid']!r}, docno {rows.at[row, 'docno']!r})"
