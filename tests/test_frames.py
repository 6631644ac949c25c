"""frames: the rows of a result frame stay, and get new scores and ranks."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit import frames

rows = st.lists(st.tuples(st.sampled_from(["1", "2", "ü"]), st.integers(0, 20), st.integers(-3, 3)), max_size=25)


def rerank(frame, score, **arguments):
    return frames.rerank(
        frame, lambda queries, columns: {"score": score(queries, columns["text"])}, [{"text": str}], **arguments
    )


def by_length(queries, passages):
    return [[float(len(passage)) for passage in ranking] for ranking in passages]


@given(rows, st.randoms())
def test_rows_stay_and_ranks_follow_the_scores(rows, random):
    frame = pd.DataFrame(
        [(qid, f"query {qid}", f"d{i}", "x" * length, score) for i, (qid, length, score) in enumerate(rows)],
        columns=["qid", "query", "docno", "text", "score"],
    )
    frame.index = random.sample(range(100), len(frame))
    out = rerank(frame, by_length)
    assert out.docno.tolist() == frame.docno.tolist()
    assert out.score.tolist() == [float(len(text)) for text in frame.text]
    for _, ranking in out.assign(before=frame.score.tolist()).groupby("qid"):
        expected = ranking.assign(row=ranking.index).sort_values(
            ["score", "before", "row"], ascending=[False, False, True]
        )
        assert expected["rank"].tolist() == list(range(len(ranking)))


def passages_seen(frame):
    seen = {}

    def score(queries, passages):
        seen.update(zip(queries, passages, strict=True))
        return by_length(queries, passages)

    rerank(frame, score)
    return seen


def test_passages_come_best_first_by_rank_else_score_else_row():
    frame = pd.DataFrame(
        {
            "qid": "q",
            "query": "x",
            "docno": list("abc"),
            "text": list("abc"),
            "rank": [2, 0, 1],
            "score": [1.0, 2.0, 3.0],
        }
    )
    assert passages_seen(frame)["x"] == ["b", "c", "a"]
    assert passages_seen(frame.drop(columns="rank"))["x"] == ["c", "b", "a"]
    assert passages_seen(frame.drop(columns=["rank", "score"]))["x"] == ["a", "b", "c"]
    assert passages_seen(frame.assign(rank=[3, 1, float("nan")]))["x"] == ["b", "a", "c"]
    assert passages_seen(frame.assign(rank=frame["rank"] + 1))["x"] == ["b", "c", "a"]


def test_ranks_and_scores_that_are_strings_count_as_numbers():
    frame = pd.DataFrame(
        {"qid": "q", "query": "x", "docno": list("abc"), "text": list("abc"), "rank": ["2", "10", "9"]}
    )
    assert passages_seen(frame)["x"] == ["a", "c", "b"]
    assert passages_seen(frame.drop(columns="rank").assign(score=["2.5", "10", "9"]))["x"] == ["b", "c", "a"]
    with pytest.raises(ValueError, match="first"):
        passages_seen(frame.assign(rank=["first", "2", "3"]))


def test_columns_that_stand_twice_or_would_be_overwritten_are_named_before_scoring():
    frame = pd.DataFrame({"qid": ["1"], "query": "q", "docno": "a", "text": "x", "score": 1.0})
    for column in ("text", "score", "qid"):
        with pytest.raises(ValueError, match=f"two columns '{column}'"):
            rerank(pd.concat([frame, frame[[column]]], axis=1), None)
    for column in ("score", "rank", "text", "query"):
        with pytest.raises(ValueError, match=f"cannot be called '{column}'"):
            rerank(frame, None, query_columns=[column])


def test_all_queries_are_scored_in_one_call_each_once():
    frame = pd.DataFrame(
        {"qid": ["2", "1", "2"], "query": ["same", "same", "same"], "docno": ["a", "a", "a"], "text": ["x", "y", "z"]}
    )
    calls = []
    out = rerank(frame, lambda queries, passages: calls.append((queries, passages)) or by_length(queries, passages))
    assert calls == [(["same", "same"], [["x", "z"], ["y"]])]
    assert out["rank"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", ["object", "category", "string", "int"])
def test_any_dtype_of_qid_and_docno(dtype):
    frame = pd.DataFrame({"qid": ["1", "2"], "query": ["a", "b"], "docno": ["3", "4"], "text": ["x", "y"]}).astype(
        {"qid": dtype, "docno": dtype}
    )
    out = rerank(frame, by_length)
    assert out["rank"].tolist() == [0, 0]
    assert (out.qid.dtype, out.docno.dtype) == (frame.qid.dtype, frame.docno.dtype)


@pytest.mark.parametrize("column", ["qid", "docno"])
def test_a_row_without_qid_or_docno_is_named(column):
    frame = pd.DataFrame({"qid": ["1", "1"], "query": "q", "docno": ["a", "b"], "text": "x"}).astype({column: object})
    frame.loc[1, column] = None
    with pytest.raises(ValueError, match=f"row 1 .*has no {column}"):
        rerank(frame, by_length)


def test_two_queries_under_one_qid_are_an_error():
    frame = pd.DataFrame({"qid": ["1", "1"], "query": ["cat", "dog"], "docno": ["a", "b"], "text": "x"})
    with pytest.raises(ValueError, match="qid '1' has two queries, 'cat' and 'dog'"):
        rerank(frame, by_length)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_named(wrong):
    frame = pd.DataFrame({"qid": ["1", "1"], "query": "q", "docno": ["a", "b"], "text": ["x", "yy"]})
    with pytest.raises(ValueError, match=f"gave {wrong} for query 'q', docno 'b'; try"):
        rerank(frame, lambda queries, passages: [[1.0, wrong]])
    with pytest.raises(ValueError, match=f"gave {wrong} for query 'q', docno 'a' and 1 more of its passages; try"):
        rerank(frame, lambda queries, passages: [[wrong, wrong]])


def test_huge_and_negative_scores_rank():
    frame = pd.DataFrame({"qid": "1", "query": "q", "docno": list("abc"), "text": "x"})
    assert rerank(frame, lambda queries, passages: [[-1e300, 1e300, -np.pi]])["rank"].tolist() == [2, 0, 1]


def test_a_read_only_frame_works():
    frame = pd.DataFrame({"qid": "1", "query": "q", "docno": list("ab"), "text": ["x", "yy"], "score": [1.0, 2.0]})
    frame["score"].to_numpy().flags.writeable = False
    assert rerank(frame, by_length)["rank"].tolist() == [1, 0]


def test_a_query_in_terriers_language_is_told_of_once_and_two_of_them_name_the_cure():
    expanded = ["applypipeline:off cat^0.6 dog^0.4", "applypipeline:off fish^0.9"]
    frame = pd.DataFrame({"qid": ["1", "2"], "query": expanded, "docno": "d", "text": "t", "query_0": ["cat", "fish"]})
    with pytest.warns(UserWarning, match=r"Terrier's query language .* put pt\.rewrite\.reset\(\)") as caught:
        rerank(frame, by_length)
    assert sum(issubclass(it.category, UserWarning) for it in caught) == 1
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"its own qid, or put pt\.rewrite\.reset\(\)"):
        rerank(frame.assign(qid="1"), by_length)
