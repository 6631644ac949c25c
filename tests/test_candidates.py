"""candidates: re-ranking files and runs are read, and an error names each bad line."""

import gzip
import json
import os

import pytest
from conftest import write_jsonl

from pyterrier_lit.files.candidates import Candidates, documents, read_rerank_file, read_run, topics

GOOD = {"qid": "q1", "query": "red fox", "docno": "d1", "text": "a fox", "rank": 1, "score": 2.0}


def read(tmp_path, *records, depth=None):
    return list(read_rerank_file(write_jsonl(tmp_path / "rerank.jsonl", records), depth))


def test_a_line_of_tira_is_read_with_numbers_as_names_and_without_the_originals(tmp_path):
    originals = {"original_query": {"query_id": 3}, "original_document": [{"doc_id": 7, "text": "not this"}]}
    lines = [
        {"qid": 3, "query": "é fox", "docno": 7, "text": "a\u2028fox", "rank": 2, "score": 5} | originals,
        {"qid": 3, "query": "é fox", "docno": "8", "text": "", "rank": 1, "score": 9.5} | originals,
        {"qid": "1", "query": "cat", "docno": 7, "text": "a cat", "rank": "1", "score": "0.5"},
    ]
    expected = [
        Candidates("3", "é fox", ["8", "7"], ["", "a\u2028fox"]),
        Candidates("1", "cat", ["7"], ["a cat"]),
    ]
    assert read(tmp_path, *lines) == expected
    assert list(read_rerank_file(write_jsonl(tmp_path / "rerank.jsonl.gz", lines))) == expected
    assert read(tmp_path, *lines, depth=1)[0].docnos == ["8"]


def test_best_is_the_lowest_rank_else_the_highest_score_else_the_first_line(tmp_path):
    rows = [
        GOOD | {"docno": docno, "rank": rank, "score": score}
        for docno, rank, score in [("a", 10, 1), ("b", 2, 2), ("c", 9, 3)]
    ]
    assert read(tmp_path, *rows)[0].docnos == ["b", "c", "a"]
    del rows[1]["rank"]
    assert read(tmp_path, *rows)[0].docnos == ["c", "b", "a"]
    rows[1]["rank"], rows[0]["score"] = None, None
    assert read(tmp_path, *rows)[0].docnos == ["a", "b", "c"]


@pytest.mark.parametrize("rank", [0, 1, -3, "0", 0.5])
def test_among_equal_ranks_the_highest_score_is_best(tmp_path, rank):
    scores = {"a": 1.5, "b": 3, "c": -2, "d": 2}
    rows = [GOOD | {"docno": docno, "rank": rank, "score": score} for docno, score in scores.items()]
    assert read(tmp_path, *rows)[0].docnos == ["b", "d", "a", "c"]
    assert read(tmp_path, *rows, depth=2)[0].docnos == ["b", "d"]
    rows[1]["score"] = None
    assert read(tmp_path, *rows)[0].docnos == ["d", "a", "c", "b"]
    for row in rows:
        row["score"] = None
    assert read(tmp_path, *rows)[0].docnos == ["a", "b", "c", "d"]
    (tmp_path / "run.txt").write_text("".join(f"q1 Q0 {docno} {rank} {score} x\n" for docno, score in scores.items()))
    (query,) = read_run(tmp_path / "run.txt", lambda ids: dict.fromkeys(ids, "x"), lambda ids: dict.fromkeys(ids, "x"))
    assert query.docnos == ["b", "d", "a", "c"]


@pytest.mark.parametrize("name", ["qid", "query", "docno", "text"])
def test_a_missing_field_is_named_with_its_line(tmp_path, name):
    other = GOOD | {"docno": "d2"}
    del other[name]
    with pytest.raises(ValueError, match=rf"rerank.jsonl, line 2 has no {name}; wanted a"):
        read(tmp_path, GOOD, other)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"text": None}, "line 2 has text None; wanted a string"),
        ({"query": 7}, "line 2 has query 7; wanted a string"),
        ({"docno": 7.5}, "line 2 has docno 7.5; wanted a string or a whole number"),
        ({"qid": True}, "line 2 has qid True"),
        ({"docno": "d 2"}, "line 2 has docno 'd 2'; it may not be empty or contain white space"),
        ({"docno": ""}, "line 2 has docno ''"),
        ({"docno": "d\0"}, "line 2 has docno 'd\\x00'"),
        ({"rank": "first"}, "line 2 has rank 'first'; wanted a number"),
        ({"score": float("nan")}, "line 2 has score nan; wanted a number"),
        ({"score": 10**400}, "line 2 has score 1000"),
        ({}, "line 2: qid 'q1' has docno 'd1' twice; keep one of them"),
        ({"docno": "d2", "query": "blue fox"}, "line 2: qid 'q1' has two queries, 'red fox' and 'blue fox'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, wrong, message):
    with pytest.raises(ValueError) as raised:
        read(tmp_path, GOOD, GOOD | wrong)
    assert message in str(raised.value)


def test_a_query_that_comes_again_after_another_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="line 3: qid 'q1' came before, with others in between; sort the file by qid"):
        read(tmp_path, GOOD, GOOD | {"qid": "q2"}, GOOD | {"docno": "d2"})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no candidates"),
        (b"\n\n", "holds no candidates"),
        (json.dumps(GOOD).encode()[:-9], "line 1 is not valid JSON, or is cut short"),
        (b"[1, 2]\n", "item 1 holds a int, wanted an object"),
        (json.dumps([GOOD]).encode()[:-9], "is not valid JSON, or is cut short"),
        (b"{}\n[1]".replace(b"{}", json.dumps(GOOD).encode()), "line 2 holds a list, wanted an object"),
        (100_000 * b"[", "is not valid JSON, or is cut short"),
        (bytes(100), "line 1 is not valid JSON, or is cut short"),
        (
            json.dumps(GOOD | {"docno": "d\ud83d"}).encode(),
            r"line 1 has docno 'd\\ud83d'; it may not .* surrogate",
        ),
        (
            json.dumps(GOOD | {"qid": "\udc00"}).encode(),
            r"line 1 has qid '\\udc00'; it may not .* surrogate",
        ),
        (b"\xff\xfe\n", "cannot be read beyond line 0: it is cut short or damaged"),
    ],
)
def test_a_file_that_is_empty_or_something_else_is_named(tmp_path, content, message):
    (tmp_path / "rerank.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"rerank.jsonl.*{message}"):
        list(read_rerank_file(tmp_path / "rerank.jsonl"))


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-20], lambda data: b"not gzip" + data, lambda data: data[:200] + bytes(50) + data[250:]],
)
def test_a_truncated_or_damaged_gz_is_an_error_and_gives_no_query_in_part(tmp_path, damage):
    path = write_jsonl(
        tmp_path / "rerank.jsonl.gz", [GOOD | {"docno": str(i), "text": str(hash(i * 0.1))} for i in range(300)]
    )
    path.write_bytes(damage(path.read_bytes()))
    queries = []
    with pytest.raises(
        ValueError, match=r"rerank.jsonl.gz cannot be read beyond line \d+: it is cut short or damaged|not valid JSON"
    ):
        queries.extend(read_rerank_file(path))
    assert queries == []


def test_a_run_takes_queries_and_texts_from_other_files(tmp_path):
    (tmp_path / "run.txt").write_text("q2 Q0 7 2 1.5 x\nq2 Q0 d1 1 2.5 x\nq1 Q0 7 0 1.0 x\n")
    (tmp_path / "queries.tsv").write_text("q1\tred\tfox\nq2\tcat\n")
    write_jsonl(tmp_path / "docs.jsonl.gz", [{"docno": 7, "text": "seven"}, {"docno": "d1", "text": "one"}])
    write_jsonl(tmp_path / "queries.jsonl", [{"qid": "q1", "query": "red\tfox"}, {"qid": "q2", "query": "cat"}])
    (tmp_path / "docs.tsv").write_text("7\tseven\nd1\tone\n")
    expected = [Candidates("q2", "cat", ["d1", "7"], ["one", "seven"]), Candidates("q1", "red\tfox", ["7"], ["seven"])]
    for queries, docs in (("queries.tsv", "docs.jsonl.gz"), ("queries.jsonl", "docs.tsv")):
        lookups = topics(str(tmp_path / queries)), documents(str(tmp_path / docs))
        assert list(read_run(tmp_path / "run.txt", *lookups)) == expected
        assert [query.docnos for query in read_run(tmp_path / "run.txt", *lookups, 1)] == [["d1"], ["7"]]


def test_half_a_surrogate_pair_in_a_query_or_document_is_the_replacement_character(tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"qid": "q1", "query": "\\udc00 fox \\ud83e\\udd8a"}\n')
    (tmp_path / "docs.jsonl").write_text('{"docno": "d1", "text": "a fox \\ud83e"}\n')
    (tmp_path / "run.txt").write_text("q1 Q0 d1 1 2.5 x\n")
    lookups = topics(str(tmp_path / "queries.jsonl")), documents(str(tmp_path / "docs.jsonl"))
    assert list(read_run(tmp_path / "run.txt", *lookups)) == [
        Candidates("q1", "\ufffd fox \U0001f98a", ["d1"], ["a fox \ufffd"])
    ]


def test_marks_blanks_and_carriage_returns_are_no_part_of_an_id(tmp_path):
    (tmp_path / "queries.tsv").write_bytes("\ufeffq1\tred fox\r\n q2 \tcat\r\n".encode())
    (tmp_path / "docs.tsv").write_bytes("d1\tone\r\n".encode("utf-16"))
    (tmp_path / "run.txt").write_bytes(b"\xef\xbb\xbfq1\tQ0\td1\t1\t2.5\tx\r\nq2 Q0 d1 1 2.5 x\r\n")
    lookups = topics(str(tmp_path / "queries.tsv")), documents(str(tmp_path / "docs.tsv"))
    assert list(read_run(tmp_path / "run.txt", *lookups)) == [
        Candidates("q1", "red fox", ["d1"], ["one"]),
        Candidates("q2", "cat", ["d1"], ["one"]),
    ]


def test_a_pipe_which_cannot_be_read_twice_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "rerank.jsonl")
    with pytest.raises(ValueError, match=r"rerank.jsonl is a pipe or a terminal; .* so write them into a file"):
        list(read_rerank_file(tmp_path / "rerank.jsonl"))


def test_a_run_that_does_not_fit_its_topics_or_documents_is_an_error(tmp_path):
    (tmp_path / "run.txt").write_text("q1 Q0 d1 1 2.5 x\nq1 Q0 d9 2 1.5 x\n")
    known = {"q1": "fox", "d1": "a fox"}

    def look(ids):
        return {id: known[id] for id in ids if id in known}

    with pytest.raises(ValueError, match="line 2: docno 'd9' is not among the documents"):
        list(read_run(tmp_path / "run.txt", look, look))
    with pytest.raises(ValueError, match="line 1: qid 'q1' is not among the topics"):
        list(read_run(tmp_path / "run.txt", lambda ids: {}, look))
    (tmp_path / "run.txt").write_text("q1 d1 1 2.5 x\n")
    with pytest.raises(ValueError, match="line 1 has 5 columns; wanted six: qid Q0 docno rank score system"):
        list(read_run(tmp_path / "run.txt", look, look))


def test_topics_and_documents_that_are_wrong_are_named(tmp_path):
    (tmp_path / "queries.tsv").write_text("q1\tfox\nq1\tcat\n")
    with pytest.raises(ValueError, match=r"queries.tsv has 'q1' twice"):
        topics(str(tmp_path / "queries.tsv"))
    (tmp_path / "queries.tsv").write_text("q1 fox\n")
    with pytest.raises(ValueError, match="line 1 has no tab; wanted qid and query with a tab between"):
        topics(str(tmp_path / "queries.tsv"))
    with pytest.raises(ValueError, match="irds:no-such is not known to ir_datasets"):
        documents("irds:no-such")
    with gzip.open(tmp_path / "docs.jsonl.gz", "wt") as file:
        file.write('{"docno": "d1"}\n')
    with pytest.raises(ValueError, match=r"docs.jsonl.gz, line 1 has no text; wanted a string"):
        documents(str(tmp_path / "docs.jsonl.gz"))


RANK_LLM = {
    "query": {"qid": 7, "text": "red fox"},
    "candidates": [
        {"docid": "d2", "score": 1.5, "doc": {"contents": "a fox"}},
        {"docid": 9, "score": 2.5, "doc": {"title": "Cats", "text": "a cat", "url": "x"}},
        {"docid": "d1", "score": 0.5, "doc": {"segment": "fur"}},
    ],
}
PE_RANK = {
    "query": "red fox",
    "hits": [
        {"content": "a fox", "qid": 7, "docid": "d2", "rank": 2, "score": 1.5},
        {"content": "a cat", "qid": 7, "docid": 9, "rank": 1, "score": 2.5},
    ],
}
LIT5 = {
    "question": "red fox",
    "answers": [""],
    "id": "7",
    "ctxs": [{"docid": "d2", "text": "a fox"}, {"docid": "9", "title": "Cats", "text": "a cat"}],
}


@pytest.mark.parametrize(
    "record, docnos, texts",
    [
        (RANK_LLM, ["d2", "9", "d1"], ["a fox", "Title: Cats Content: a cat", "fur"]),
        (PE_RANK, ["d2", "9"], ["a fox", "a cat"]),
        (LIT5, ["d2", "9"], ["a fox", "Cats a cat"]),
    ],
    ids=["rank_llm", "PE-Rank", "LiT5"],
)
def test_the_files_that_the_papers_authors_published_are_read_by_their_keys(tmp_path, record, docnos, texts):
    other = json.loads(json.dumps(record).replace("7", "8"))
    expected = [Candidates(qid, "red fox", docnos, texts) for qid in ("7", "8")]
    assert read(tmp_path, record, other) == expected  # in the order of the list, whatever the scores
    assert read(tmp_path, record, depth=1) == [Candidates("7", "red fox", docnos[:1], texts[:1])]
    (tmp_path / "array.json").write_text(json.dumps([record, other], indent=2))
    assert list(read_rerank_file(tmp_path / "array.json")) == expected
    empty = {name: [] if name in ("candidates", "hits", "ctxs") else value for name, value in record.items()}
    assert read(tmp_path, empty, record) == expected[:1]


@pytest.mark.parametrize(
    "record, message",
    [
        (RANK_LLM | {"query": "red fox"}, "line 1, query has no qid; wanted a string or a whole number"),
        (RANK_LLM | {"query": {"qid": "7"}}, "line 1, query has no text; wanted a string"),
        (
            RANK_LLM | {"candidates": [{"docid": "d", "doc": {"body": 3}}]},
            "line 1, candidates 1 has body 3; wanted a s",
        ),
        (
            RANK_LLM | {"candidates": [{"docid": "d", "doc": None}]},
            "line 1, candidates 1 has doc None; wanted a string",
        ),
        (
            RANK_LLM | {"candidates": {"d": 1}},
            "line 1 has no list of passages under candidates; wanted an object for each",
        ),
        (PE_RANK | {"hits": [{"qid": 1, "content": "x"}]}, "line 1, hits 1 has no docid; wanted a string"),
        (PE_RANK | {"hits": [{"docid": 1, "content": "x"}]}, "line 1, hits 1 has no qid; wanted a string"),
        (LIT5 | {"ctxs": [LIT5["ctxs"][0]] * 2}, "line 1, ctxs 2: qid '7' has docno 'd2' twice; keep one of them"),
        ({name: value for name, value in LIT5.items() if name != "id"}, "line 1 has no id; wanted a string"),
    ],
)
def test_what_is_wrong_in_such_a_file_is_named_with_its_place(tmp_path, record, message):
    with pytest.raises(ValueError) as raised:
        read(tmp_path, record)
    assert message in str(raised.value)
