"""Result frames in, result frames out: the only room that knows pandas. It knows no model and never looks for words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyterrier as pt


def rerank(
    frame: pd.DataFrame,
    score: Callable[[list[str], list[list[str]]], Any],
    text_field: str = "text",
    context: pt.Transformer | None = None,
    query_columns: Sequence[str] = (),
) -> pd.DataFrame:
    """Give every row of a result frame a new score and rank, from the queries and one column of passages.

    Args:
        frame: rows with `qid`, `query`, `docno` and `text_field`, in any order and under any index; it is not changed.
        score: called once with all queries and, for each, its passages best first (by `rank`, else by `score`, else as the
            rows stand); returns one list of scores per query, higher is better.
        context: the transformer that PyTerrier names in its error when a column is missing.
        query_columns: columns to add besides; then `score` returns (scores, values, ...), for each column one value per query.

    Returns the same rows in the same order with every other column kept, `score` (float64) and `rank` (from 0) new.
    Equal scores keep the order in which they came, whatever the order of the rows. Half a surrogate pair, which no
    tokenizer takes, is handed on as U+FFFD; the column keeps it. What becomes of other odd input: pt_docs/bad_input.rst.

    Raises pt.validate.InputValidationError for a missing column, TypeError for a query or text that is not a string, and
    ValueError for a missing qid or docno, two queries under one qid, an incoming rank or score that is no number, or a
    new score that is not finite.
    """
    return rerank_columns(
        frame, lambda queries, columns: score(queries, columns[text_field]), [{text_field: str}], context, query_columns
    )


def rerank_columns(
    frame: pd.DataFrame,
    score: Callable[[list[str], dict[str, list[list[Any]]]], Any],
    ways: Sequence[Mapping[str, type]],
    context: pt.Transformer | None = None,
    query_columns: Sequence[str] = (),
) -> pd.DataFrame:
    """`rerank` for passages that are more than a text, and may be given in several ways.

    ways: each the columns of one way and what their values must be (str, or object for anything); the first way whose
        columns are all there is taken.
    score: called once with all queries and the columns of that way, and `docno`: for each column a list per query of its
        values best first.
    """
    _check_columns(frame, ways, context, query_columns)
    if frame.empty:
        nothing = {column: pd.Series(dtype="object") for column in query_columns}
        return pt.model.add_ranks(frame.reset_index(drop=True).assign(score=pd.Series(dtype="float64"), **nothing))
    rows, lists, queries, columns = _read(frame, ways)
    found = score(queries, columns)
    scores, *per_query = found if query_columns else (found,)
    added = {
        column: np.repeat(value, [len(ranking) for ranking in lists])
        for column, value in zip(query_columns, per_query, strict=True)
    }
    best_first = rows.iloc[np.concatenate(lists)].assign(score=np.concatenate(scores).astype("float64"), **added)
    _check_finite(best_first)
    return pt.model.add_ranks(best_first).sort_index()


class Ranking(NamedTuple):
    """A query with its passages best first, column by column."""

    qid: str
    query: str
    columns: dict[str, list[Any]]


def rankings(
    frame: pd.DataFrame, ways: Sequence[Mapping[str, type]], context: pt.Transformer | None = None
) -> list[Ranking]:
    """What a reranker would be given of a result frame, query by query: to learn from it. Arguments and errors as in `rerank_columns`."""
    _check_columns(frame, ways, context)
    if frame.empty:
        return []
    rows, lists, queries, columns = _read(frame, ways)
    qids = rows["qid"].tolist()
    return [
        Ranking(str(qids[rows_of[0]]), query, {name: values[i] for name, values in columns.items()})
        for i, (rows_of, query) in enumerate(zip(lists, queries, strict=True))
    ]


def _read(
    frame: pd.DataFrame, ways: Sequence[Mapping[str, type]]
) -> tuple[pd.DataFrame, list[np.ndarray], list[str], dict[str, list[list[Any]]]]:
    """The rows, numbered; the numbers of each query's rows best first; the queries; `docno` and the columns of the first way that is there."""
    way = next(way for way in ways if way.keys() <= set(frame.columns))
    rows = frame.reset_index(drop=True)
    _check_keys(rows)
    queries = _strings(rows, "query")
    values = {column: _strings(rows, column) if kind is str else rows[column].tolist() for column, kind in way.items()}
    values["docno"] = rows["docno"].tolist()
    lists = _lists(rows)
    columns = {column: [[cells[row] for row in ranking] for ranking in lists] for column, cells in values.items()}
    return rows, lists, _of_each(queries, rows, lists), columns


def _lists(rows: pd.DataFrame) -> list[np.ndarray]:
    """The row numbers of each query, best first."""
    for column, ascending in (("rank", True), ("score", False)):
        if column in rows:
            numbers = _numbers(rows, column)
            rows = rows.loc[numbers.sort_values(ascending=ascending, kind="stable").index]
            break
    return [ranking.to_numpy() for ranking in rows.groupby("qid", sort=False, observed=True).groups.values()]


def _of_each(queries: list[str], rows: pd.DataFrame, lists: list[np.ndarray]) -> list[str]:
    """The query of each list."""
    for ranking in lists:
        differing = next((queries[row] for row in ranking if queries[row] != queries[ranking[0]]), None)
        if differing is not None:
            raise ValueError(
                f"qid {rows.at[ranking[0], 'qid']!r} has two queries, {queries[ranking[0]]!r} and {differing!r}; give each its own qid"
            )
    return [queries[ranking[0]] for ranking in lists]


def _check_columns(
    frame: pd.DataFrame,
    ways: Sequence[Mapping[str, type]],
    context: pt.Transformer | None,
    added: Sequence[str] = (),
) -> None:
    with pt.validate.any(frame, context=context) as accepted:
        for way in ways:
            accepted.result_frame(extra_columns=["query", *way])
    used = ["qid", "query", "docno", *{column for way in ways for column in way}, "score", "rank"]
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
    return [_whole(cell) for cell in cells]


def _whole(text: str) -> str:
    """The text as UTF-8 can hold it: half a surrogate pair becomes U+FFFD, two halves their character, as in browsers."""
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
            f"{column!r} of {_name(rows, wrong[0])} is {rows.at[wrong[0], column]!r}, not a number; mend or drop the column"
        )
    return numbers


def _check_finite(rows: pd.DataFrame) -> None:
    wrong = np.flatnonzero(~np.isfinite(rows["score"]))
    if len(wrong):
        first = rows.iloc[wrong[0]]
        raise ValueError(
            f"the model gave {first['score']} for qid {first['qid']!r}, docno {first['docno']!r} ({len(wrong)} of {len(rows)} scores are not"
            " finite); try dtype='float32', and check the checkpoint's weights"
        )


def _name(rows: pd.DataFrame, row: int) -> str:
    return f"row {row} (qid {rows.at[row, 'qid']!r}, docno {rows.at[row, 'docno']!r})"
