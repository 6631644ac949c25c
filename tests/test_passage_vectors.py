"""models.passage_vectors: vectors from a column, an index or an encoder; what is wrong with them is named."""

import re
import warnings

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from contract import assert_same_scores, by_docno
from pe import FOLDER, SLIDING, Encoder, Index, assert_golden, quietly, sliding_frame, with_vectors

from pyterrier_lit import PERank


@pytest.fixture
def make():
    return lambda **arguments: PERank(**{"model": str(FOLDER / "checkpoint"), "device": "cpu"} | arguments)


def test_the_length_of_the_vectors_does_not_count(make):
    frame = sliding_frame(SLIDING)
    assert_golden(quietly(make(), frame.assign(doc_vec=[3.7 * vector for vector in frame["doc_vec"]])))


def test_a_column_goes_before_an_index_and_an_index_before_an_encoder(make, frame):
    column, vector_of = with_vectors(frame)
    encoder, other = Encoder(), Index(with_vectors(frame, seed=9)[1])
    expected = by_docno(quietly(make(), column))
    bare = frame.drop(columns="text")
    assert by_docno(quietly(make(vectors=Index(vector_of), encoder=encoder), bare)) == expected
    assert by_docno(quietly(make(vectors=other, encoder=encoder), column.drop(columns="text"))) == expected
    assert by_docno(quietly(make(vectors=other), bare)) != expected
    assert encoder.calls == []


def test_each_distinct_passage_is_encoded_once(make, frame):
    encoder = Encoder()
    out = make(encoder=encoder)(pd.concat([frame, frame.assign(qid="z" + frame.qid)]))
    assert [sorted(texts) for texts in encoder.calls] == [sorted(set(frame["text"]))]
    assert out[out.qid == "zq1"]["rank"].tolist() == out[out.qid == "q1"]["rank"].tolist()


def test_a_docid_of_another_index_is_not_read(make, frame):
    vector_of = with_vectors(frame)[1]
    reranker = make(vectors=Index(vector_of))
    assert_same_scores(quietly(reranker, frame.assign(docid=range(6, -1, -1))), quietly(reranker, frame))


def test_docnos_that_an_index_does_not_hold_are_named(make, frame):
    vector_of = with_vectors(frame)[1]
    del vector_of["d3"], vector_of["d7"]
    with pytest.raises(ValueError, match=r"Index\(\) holds no vectors of 2 of 7 docnos, such as 'd7', 'd3'"):
        make(vectors=Index(vector_of))(frame)


@pytest.mark.parametrize("source", ["column", "index", "encoder"])
def test_vectors_of_another_length_are_refused_with_both_numbers(make, frame, source):
    column, vector_of = with_vectors(frame, width=7)
    frame = column if source == "column" else frame
    arguments = {"index": {"vectors": Index(vector_of)}, "encoder": {"encoder": Encoder(7)}}.get(source, {})
    with pytest.raises(ValueError, match=r"7 dimensions and this checkpoint reads 24; .*encoder \(mean pooling\)"):
        make(**arguments)(frame)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("source", ["column", "index", "encoder"])
def test_vectors_that_are_not_finite_are_named(make, frame, source, wrong):
    column, vector_of = with_vectors(frame)
    vector_of["d4"][3] = wrong
    encoder = Encoder()
    encode = encoder.encode_docs
    encoder.encode_docs = lambda texts: np.where(np.array(texts)[:, None] == "", wrong, encode(texts))  # d4 has no text
    frame = column if source == "column" else frame
    arguments = {"index": {"vectors": Index(vector_of)}, "encoder": {"encoder": encoder}}.get(source, {})
    with pytest.raises(ValueError, match=rf"{wrong}: docno 'd4' \(1 of 7"):
        make(**arguments)(frame)


@pytest.mark.parametrize("value", [None, float("nan"), "0.1 0.2", ["a"], [[0.1]]])
def test_a_vector_that_is_none_is_named(make, frame, value):
    frame = with_vectors(frame)[0]
    frame["doc_vec"] = frame["doc_vec"].astype(object)
    frame.iat[3, frame.columns.get_loc("doc_vec")] = value
    with pytest.raises(TypeError, match=f"'doc_vec' of docno '{frame.iloc[3].docno}' is {re.escape(repr(value))}"):
        make()(frame)


def test_vectors_of_two_lengths_in_one_column_are_named(make, frame):
    frame = with_vectors(frame)[0]
    frame.iat[3, frame.columns.get_loc("doc_vec")] = np.zeros(3, dtype="float32")
    with pytest.raises(ValueError, match=rf"docno '{frame.iloc[3].docno}' has 3 dimensions, that of docno 'd\d' 24"):
        make()(frame)


def test_vectors_may_be_lists_tensors_or_of_any_number_type(make, frame):
    frame = with_vectors(frame)[0]
    expected = quietly(make(), frame)
    for change in (list, torch.tensor, lambda vector: vector.astype("float64"), lambda vector: vector.astype(object)):
        assert_same_scores(quietly(make(), frame.assign(doc_vec=[change(v) for v in frame["doc_vec"]])), expected)
    halves = frame.assign(doc_vec=[vector.astype("float16") for vector in frame["doc_vec"]])
    assert sorted(quietly(make(), halves)["rank"]) == [0, 0, 1, 1, 2, 3, 4]


def test_what_is_no_index_or_no_encoder_is_refused(make, frame):
    with pytest.raises(TypeError, match=r"vectors='path' is not a dense index; wanted a pyterrier_dr.FlexIndex"):
        make(vectors="path")(frame)
    with pytest.raises(TypeError, match=r"encoder='minilm' cannot encode passages; wanted a pyterrier_dr.BiEncoder"):
        make(encoder="minilm")(frame)


def test_vectors_without_a_name_are_warned_of(make, frame):
    with pytest.warns(UserWarning, match=r"this checkpoint reads those of encoder \(mean pooling\)"):
        make()(with_vectors(frame)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make()(frame)


def test_no_text_is_needed_with_vectors_and_a_text_that_is_none_does_not_matter(make, frame):
    column = with_vectors(frame)[0]
    assert_same_scores(quietly(make(), column.assign(text=None)), quietly(make(), column.drop(columns="text")))
    with pytest.raises(pt.validate.InputValidationError, match="text"):
        make(mode="text+embedding")(column.drop(columns="text"))


def test_from_backbone_needs_the_length_of_the_vectors(backbone):
    with pytest.raises(ValueError, match="embedding_size=None without encoder_name="):
        PERank.from_backbone(backbone("mistral"), device="cpu")
