"""A student that a new user trains scores the same after it is saved, exported, served or pushed to the hub."""

import corpora
import pandas as pd
import pytest
import sentence_transformers
import serve
from conftest import TINY
from fastapi.testclient import TestClient

from pyterrier_lit import CrossEncoder
from pyterrier_lit.training import FineTune


@pytest.fixture(scope="module")
def student():
    """The small cross-encoder after a few steps on two queries; the first query, and the passages of this query."""
    collection = corpora.load("python-docs/dev")
    topics, qrels = collection.get_topics().head(2), collection.get_qrels()
    others = [doc["docno"] for doc, _ in zip(collection.get_corpus_iter(), range(8), strict=False)]
    listed = [
        (qid, query, docno)
        for qid, query in topics[["qid", "query"]].itertuples(index=False)
        for docno in dict.fromkeys([*qrels[qrels["qid"] == qid]["docno"].head(4), *others])
    ]
    frame = collection.text_loader()(pd.DataFrame(listed, columns=["qid", "query", "docno"]))
    student = CrossEncoder(str(TINY / "cross-encoder"), device="cpu")
    before = student(frame)["score"].tolist()
    FineTune(student, steps=3, batch_size=2, learning_rate=1e-4, verbose=False).fit(frame, qrels)
    assert student(frame)["score"].tolist() != before
    first = frame[frame["qid"] == topics["qid"][0]]
    return student, topics["query"][0], first["text"].tolist()


def same(ranking, wanted):
    return [row["corpus_id"] for row in ranking] == [row["corpus_id"] for row in wanted] and [
        row["score"] for row in ranking
    ] == pytest.approx([row["score"] for row in wanted], abs=2e-5)


def same_but_for_what_is_cut(ranking, wanted, passages):
    """The scores of long passages may differ, because sentence-transformers may read more of a long passage."""
    short = {number for number, passage in enumerate(passages) if len(passage) < 200}
    assert 3 < len(short) < len(passages)
    one, other = ([row for row in rows if row["corpus_id"] in short] for rows in (ranking, wanted))
    return [row["corpus_id"] for row in ranking] == [row["corpus_id"] for row in wanted] and same(one, other)


def test_saved_it_ranks_alike_here_and_exported_in_sentence_transformers(student, tmp_path):
    reranker, query, passages = student
    wanted = reranker.rank(query, passages)
    reranker.save(tmp_path / "student")
    assert same(CrossEncoder(str(tmp_path / "student"), device="cpu").rank(query, passages), wanted)
    CrossEncoder(str(tmp_path / "student"), device="cpu").save(tmp_path / "exported", layout="transformers")
    stock = sentence_transformers.CrossEncoder(str(tmp_path / "exported"), device="cpu")
    assert same_but_for_what_is_cut(stock.rank(query, passages), wanted, passages)
    assert same(CrossEncoder(str(tmp_path / "exported"), device="cpu").rank(query, passages), wanted)


def test_the_example_serves_it(student, tmp_path):
    reranker, query, passages = student
    reranker.save(tmp_path / "student")
    with TestClient(serve.app(CrossEncoder(str(tmp_path / "student"), device="cpu"))) as client:
        answer = client.post("/rank", json={"query": query, "passages": passages, "top_k": 5}).json()
    assert same(answer, reranker.rank(query, passages, top_k=5))


def test_pushed_in_either_layout_it_is_loaded_again(student, hub):
    reranker, query, passages = student
    wanted = reranker.rank(query, passages)
    commit = reranker.push_to_hub("me/student")
    reranker.push_to_hub("me/student", revision="classifier", layout="transformers")
    for revision in (None, commit, "classifier"):
        assert same(CrossEncoder("me/student", revision=revision, device="cpu").rank(query, passages), wanted)
    stock = sentence_transformers.CrossEncoder("me/student", revision="classifier", device="cpu")
    assert same_but_for_what_is_cut(stock.rank(query, passages), wanted, passages)
    card = hub.at("me/student")[1]["README.md"].decode()
    assert "learned from: labels, 2 lists" in card and '>> CrossEncoder("me/student")' in card
    assert "saved as 'me/student'" in repr(reranker)
