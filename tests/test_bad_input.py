"""Every row of the table in pt_docs/bad_input.rst, for all four rerankers. The page has the outcomes, and
this file has the inputs."""

import builtins
import csv
import re

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from test_imports import PACKAGE


def promised():
    """Return {input: outcome}, read from the page."""
    text = (PACKAGE / "pt_docs" / "bad_input.rst").read_text(encoding="utf-8")
    table = text.split(":widths: 35, 65\n\n")[1].split("\n\n")[0]
    return {name.strip(): outcome.strip() for name, outcome in csv.reader(table.splitlines(), delimiter="|")}


def put(column, value, row=3):
    """Return a function that sets one cell of a frame."""

    def change(frame):
        frame = frame.astype({column: object})
        frame.iat[row, frame.columns.get_loc(column)] = value
        return frame

    return change


def of_dtype(dtype):
    return lambda frame: frame.astype(dict.fromkeys(["qid", "query", "docno", "text", "title"], dtype))


def arrow(frame):
    pytest.importorskip("pyarrow", reason="needs pyarrow for strings of an Arrow dtype")
    return of_dtype("string[pyarrow]")(frame)


def read_only(frame):
    cells = frame.to_numpy()
    cells.flags.writeable = False
    return pd.DataFrame(cells, columns=frame.columns, copy=False)


def texts(*values):
    """Return a function that replaces the 7 texts of a frame by `values`, repeated as needed."""
    return lambda frame: frame.assign(text=pd.Series((values * 7)[:7], index=frame.index, dtype=object))


def query(value):
    return lambda frame: frame.assign(query=pd.Series([value] * 7, index=frame.index, dtype=object))


def many(queries, passages):
    return lambda frame: pd.DataFrame(
        {
            "qid": np.repeat([f"q{i}" for i in range(queries)], passages),
            "query": np.repeat([f"words {i}" for i in range(queries)], passages),
            "docno": [f"d{i}" for i in range(queries * passages)],
            "text": [f"passage {i}" for i in range(queries * passages)],
        }
    )


HOSTILE = [
    "[SEP] [CLS] [PAD]",
    "</s><s><unk><pad>",
    "<PLACEHOLDER> <RANK>",
    "[3] > [1]",
    "Relevance Ranking: ",
    "<extra_id_0>",
]

SAME = {  # inputs that must give the ranks of the unchanged frame
    "rows under a MultiIndex": lambda frame: frame.set_axis(pd.MultiIndex.from_product([["x"], range(7)])),
    "repeated labels in the index": lambda frame: frame.set_axis([0] * 7),
    "an index named like a column": lambda frame: frame.set_index("qid", drop=False),
    "a column whose name is a number": lambda frame: frame.assign(**{"extra": 1}).rename(columns={"extra": 7}),
    "a read-only frame": read_only,
    "no column score": lambda frame: frame.drop(columns="score"),
    "no column rank": lambda frame: frame.drop(columns="rank"),
    "qid and docno are integers": lambda frame: frame.assign(
        qid=frame.qid.str[1:].astype(int), docno=frame.docno.str[1:].astype(int)
    ),
    "qid and docno are categories": lambda frame: frame.astype({"qid": "category", "docno": "category"}),
    "strings of dtype object (pandas 2)": of_dtype(object),
    "strings of dtype str (pandas 3)": of_dtype("str"),
    "strings of dtype string": of_dtype("string[python]"),
    "strings of an Arrow dtype": arrow,
    "ranks from 1": lambda frame: frame.assign(rank=frame["rank"] + 1),
    "a rank that is NaN": lambda frame: frame.assign(rank=frame["rank"].astype(float).where(frame.docno != "d5")),
    "query is None": put("query", None),
    "query is NaN": put("query", float("nan")),
    "ranks that are strings": lambda frame: frame.astype({"rank": "str"}),
    "scores of 1e308, -1e308 and infinity": lambda frame: frame.assign(
        score=[1e308, np.inf, 0, 1e308, -1e308, -1, -np.inf]
    ).drop(columns="rank"),
    "a score that is NaN, without ranks": lambda frame: frame.assign(score=frame.score.where(frame.docno != "d5")).drop(
        columns="rank"
    ),
}

ODD = {
    **{
        f"no column {column}": lambda frame, column=column: frame.drop(columns=column)
        for column in ("qid", "docno", "query", "text")
    },
    "neither rank nor score": lambda frame: frame.drop(columns=["rank", "score"]),
    "a duplicate column": lambda frame: pd.concat([frame, frame[["text"]]], axis=1),
    "qid only in the index": lambda frame: frame.set_index("qid"),
    "columns under a MultiIndex": lambda frame: pd.concat({"left": frame}, axis=1),
    "no rows": lambda frame: frame.head(0),
    "text is bytes": put("text", b"cat"),
    "query is a number": put("query", 7, row=0),
    "text is None": put("text", None),
    "text is NaN": put("text", float("nan")),
    "text is NA": put("text", pd.NA),
    "no row of a qid has a query": lambda frame: frame.assign(query=frame["query"].where(frame["qid"] != "q1")),
    "qid is None": put("qid", None),
    "docno is NaN": put("docno", float("nan")),
    "text is empty or white space": texts("", " ", "\n\t \u00a0\u3000"),
    "query is empty": query(""),
    "query is white space": query(" \n\t\u3000"),
    "half a surrogate pair in a text": texts("a\ud800b", "\udfff", "\ud83d\ude00", "plain"),
    "half a surrogate pair in a query": query("what is \ud800"),
    "NUL characters": lambda frame: query("a\0b")(texts("\0", "a\0\0b", "\0c")(frame)),
    "right-to-left text": lambda frame: query("\u05de\u05d4\u05d5 \u05d7\u05ea\u05d5\u05dc")(
        texts("\u202eabc\u202c", "\u0642\u0637\u0629", "\u05d7\u05ea\u05d5\u05dc")(frame)
    ),
    "emoji": lambda frame: query("\U0001f98a?")(
        texts("\U0001f98a", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2603\ufe0f")(frame)
    ),
    "special tokens and identifiers": lambda frame: query(" ".join(HOSTILE))(texts(*HOSTILE)(frame)),
    "a passage of 1 MB": put("text", "cats and dogs " * 75_000),
    "a passage of 100,000 letters, no blank": put("text", "x" * 100_000),
    "5,000 passages for one query": many(1, 5_000),
    "10,000 queries of one passage": many(10_000, 1),
    "a docno twice under one qid": lambda frame: frame.assign(docno=frame.docno.replace("d3", "d2")),
    "two queries under one qid": put("query", "what is a dog?"),
    "two queries of the same text": lambda frame: frame.assign(query="red fox"),
    "rows out of order": lambda frame: frame.sample(frac=1, random_state=1),
    "a rank that is a word": put("rank", "first"),
    "a score that is a word, without ranks": lambda frame: put("score", "high")(frame.drop(columns="rank")),
    "tied scores, without ranks": lambda frame: frame.assign(score=1.0).drop(columns="rank"),
}  # fmt: skip


def test_the_table_has_the_rows_that_are_tested():
    assert sorted(promised()) == sorted([*SAME, *ODD])
    assert not SAME.keys() & ODD.keys()


SLOW = ("5,000 passages for one query", "10,000 queries of one passage")


def marked(name):
    return pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("name", [marked(name) for name in (*SAME, *ODD)])
def test_the_input_has_the_outcome_that_is_promised(small, frame, name):
    given, outcome = (SAME | ODD)[name](frame), promised()[name]
    if outcome.split(";")[0] != "works":
        error, message = re.fullmatch(r"``(\w+): (.*)``", outcome).groups()
        with pytest.raises(getattr(builtins, error, None) or getattr(pt.validate, error), match=re.escape(message)):
            small(model="no/such-model")(given)
        return
    before = given.copy(deep=True)
    out = small()(given)
    pd.testing.assert_frame_equal(given, before)
    kept = [column for column in given if column not in ("score", "rank")]
    pd.testing.assert_frame_equal(out[kept], given[kept].reset_index(drop=True))
    assert np.isfinite(out["score"]).all()
    for _, ranking in out.groupby("qid", observed=True):
        assert sorted(ranking["rank"]) == list(range(len(ranking)))
        assert ranking.sort_values("rank")["score"].is_monotonic_decreasing
    if name in SAME:
        assert out["rank"].tolist() == small()(frame)["rank"].tolist()


def test_half_a_surrogate_pair_counts_as_the_replacement_character(small):
    passages = ["a\ud800b", "\udfff red fox", "fox \ud83d\ude00"]
    replaced = ["a\ufffdb", "\ufffd red fox", "fox \U0001f600"]
    given = pd.DataFrame(
        {"qid": "1", "query": ["red \ud800"] * 3, "docno": list("abc"), "text": passages}, dtype=object
    )
    meant = given.assign(query="red \ufffd", text=replaced)
    assert small()(given)["score"].tolist() == small()(meant)["score"].tolist()
