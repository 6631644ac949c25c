"""runs: candidates to a run file in chunks; resuming, ties, memory, failures that keep what was finished."""

import gzip
import tracemalloc
from functools import partial

import pyterrier as pt
import pytest
import torch
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_lit.files.candidates import Candidates, documents, read_rerank_file, read_run, topics
from pyterrier_lit.files.runs import falling, write_run

by_length = pt.apply.doc_score(lambda row: float(len(row["text"])))
QUERIES = [
    Candidates(f"q{i}", f"query {i}", [f"d{j}" for j in range(5)], ["x" * ((7 * i + 3 * j) % 11) for j in range(5)])
    for i in range(8)
]


class Failing(pt.Transformer):
    """by_length until a query comes that it cannot do."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.seen = []

    def transform(self, inp):
        self.seen += inp["qid"].unique().tolist()
        if self.fails_at in self.seen:
            raise ValueError("the model gave nan")
        return by_length(inp)

    def __repr__(self):
        return "Failing()"


def columns(path):
    return [line.split(" ") for line in path.read_text().splitlines()]


def write(output, reranker=by_length, queries=QUERIES, **arguments):
    return write_run(reranker, lambda: iter(queries), output, **{"system": "x", "chunk": 10} | arguments)


def test_a_run_has_six_columns_ranks_from_1_and_the_rerankers_scores(tmp_path):
    summary = write(tmp_path / "new" / "run.txt", queries=QUERIES[:1])
    assert columns(tmp_path / "new" / "run.txt") == [
        ["q0", "Q0", "d3", "1", "9", "x"],
        ["q0", "Q0", "d2", "2", "6", "x"],
        ["q0", "Q0", "d1", "3", "3", "x"],
        ["q0", "Q0", "d4", "4", "1", "x"],
        ["q0", "Q0", "d0", "5", "0", "x"],
    ]
    assert (summary.queries, summary.pairs, summary.found) == (1, 5, 0)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["run.txt"]


@pytest.mark.parametrize("chunk", [1, 7, 10, 1_000])
def test_the_chunk_changes_nothing_but_what_is_reranked_together(tmp_path, chunk):
    reranker = Failing()
    write(tmp_path / "run.txt", reranker, chunk=chunk)
    write(tmp_path / "whole.txt", chunk=10**6)
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert reranker.seen == [query.qid for query in QUERIES]


def test_a_gzipped_run_is_the_same_run(tmp_path):
    write(tmp_path / "run.txt")
    write(tmp_path / "run.txt.gz")
    assert gzip.decompress((tmp_path / "run.txt.gz").read_bytes()) == (tmp_path / "run.txt").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"run.txt", "run.txt.gz"}


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@given(st.lists(numbers | st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2.0**-23]), max_size=20))
def test_written_scores_fall_strictly_even_as_float32_and_change_only_at_ties(scores):
    scores = sorted(scores, reverse=True)
    written = torch.tensor([float(f"{score:.9g}") for score in falling(scores)], dtype=torch.float32)
    assert (written[1:] < written[:-1]).all()
    distinct = len(set(scores)) == len(scores)
    assert not distinct or written.tolist() == scores
    assert all(below <= score for below, score in zip(written.tolist(), scores, strict=True))


def test_equal_scores_keep_their_incoming_order_under_trec_evals_rule(tmp_path):
    query = Candidates("q", "query", ["d2", "d9", "d1", "d5"], ["xx", "xx", "xx", "x"])
    write(tmp_path / "run.txt", queries=[query])
    rows = [(float(score), docno) for _, _, docno, _, score, _ in columns(tmp_path / "run.txt")]
    assert [docno for _, docno in sorted(rows, reverse=True)] == ["d2", "d9", "d1", "d5"]


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resume_repeats_nothing_that_was_finished(tmp_path, stop):
    write(tmp_path / "whole.txt", Failing())
    with pytest.raises(ValueError, match="nan"):
        write(tmp_path / "run.txt", Failing(f"q{stop}"))
    done = stop // 2 * 2  # whole chunks of two queries
    reranker = Failing()
    summary = write(tmp_path / "run.txt", reranker, resume=True)
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert reranker.seen == [f"q{i}" for i in range(done, 8)]
    assert (summary.found, summary.queries) == (done, 8 - done)
    assert not list(tmp_path.glob("*.part"))


def test_resume_loses_nothing_wherever_the_file_was_cut_off(tmp_path):
    write(tmp_path / "whole.txt", Failing())
    whole = (tmp_path / "whole.txt").read_bytes()
    part = interrupted(tmp_path)
    for length in range(len(whole) // 3, len(whole) + 1):
        part.write_bytes(whole[:length])
        write(tmp_path / "run.txt", Failing(), resume=True)
        assert (tmp_path / "run.txt").read_bytes() == whole
        (tmp_path / "run.txt").unlink()


def test_a_torn_end_is_cut_off_for_good_even_if_the_resumed_run_fails_too(tmp_path):
    part = interrupted(tmp_path)
    finished = part.read_bytes()
    for torn in (b"q4 Q0 d1 1 9", bytes(1_000)):  # a write that was killed, a file system that lost power
        part.write_bytes(finished + torn)
        with pytest.raises(ValueError, match="nan"):
            write(tmp_path / "run.txt", Failing("q4"), resume=True)
        assert part.read_bytes() == finished
    part.write_bytes(finished + bytes(1_000))
    write(tmp_path / "run.txt", Failing(), resume=True)
    write(tmp_path / "whole.txt", Failing())
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


def interrupted(tmp_path):
    with pytest.raises(ValueError, match="nan") as raised:
        write(tmp_path / "run.txt", Failing("q4"))
    (part,) = tmp_path.glob("run.txt.*.part")
    assert raised.value.__notes__ == [f"what was finished is in {part}, a run file; resume goes on with it"]
    return part


def test_an_unfinished_run_is_not_overwritten_nor_continued_otherwise(tmp_path):
    part = interrupted(tmp_path)
    before = part.read_bytes()
    with pytest.raises(FileExistsError, match=r"part holds an unfinished run; resume goes on with it"):
        write(tmp_path / "run.txt", Failing())
    for other in ({"reranker": by_length}, {"system": "y"}, {"chunk": 11}):
        with pytest.raises(ValueError, match="was begun with another reranker"):
            write(tmp_path / "run.txt", **{"reranker": Failing(), "resume": True} | other)
    for queries in (QUERIES[1:], [QUERIES[0]._replace(docnos=list("abcde")), *QUERIES[1:]]):
        with pytest.raises(ValueError, match="was begun with another input"):
            write(tmp_path / "run.txt", Failing(), queries=queries, resume=True)
    with pytest.raises(ValueError, match="was begun with another input"):
        write(tmp_path / "run.txt", Failing(), queries=QUERIES[:2], resume=True)
    assert part.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [part.name]


def test_a_finished_run_is_not_overwritten(tmp_path):
    write(tmp_path / "run.txt")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"run.txt is there already; move it away"):
            write(tmp_path / "run.txt", queries=QUERIES[:1], resume=resume)
    assert len(columns(tmp_path / "run.txt")) == 40


def test_what_fails_before_anything_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        write(tmp_path / "run.txt", Failing("q0"))
    assert list(tmp_path.iterdir()) == []


def test_input_that_is_wrong_at_its_end_is_named_before_anything_is_reranked(tmp_path):
    def read():
        yield from QUERIES
        raise ValueError("line 900 has no text")

    reranker = Failing()
    with pytest.raises(ValueError, match="line 900"):
        write_run(reranker, read, tmp_path / "run.txt", system="x")
    assert reranker.seen == []
    part = interrupted(tmp_path)
    before = part.read_bytes()
    with pytest.raises(ValueError, match="line 900"):
        write_run(reranker, read, tmp_path / "run.txt", system="x", chunk=10, resume=True)
    assert part.read_bytes() == before


@pytest.mark.parametrize("arguments", [{"system": "two words"}, {"system": ""}, {"system": "é"}, {"chunk": 0}])
def test_a_system_or_chunk_that_cannot_be_is_named(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"system=|chunk=0"):
        write(tmp_path / "run.txt", **arguments)


def test_memory_does_not_grow_with_the_number_of_queries(tmp_path):
    def peak(name, n, source):
        rows = ((f"q{i}", f"d{i}-{j}", j) for i in range(n) for j in range(10))
        if source == "jsonl":
            records = (
                {"qid": qid, "query": "x", "docno": docno, "text": docno * 400, "rank": j} for qid, docno, j in rows
            )
            read = partial(read_rerank_file, write_jsonl(tmp_path / f"{name}.jsonl.gz", records))
        else:
            (tmp_path / f"{name}.txt").write_text("".join(f"{qid} Q0 {docno} {j} {-j} x\n" for qid, docno, j in rows))
            write_jsonl(tmp_path / f"{name}-q.jsonl", ({"qid": f"q{i}", "query": "x"} for i in range(n)))
            docs = ({"docno": f"d{i}-{j}", "text": f"d{i}-{j}" * 400} for i in range(n) for j in range(10))
            write_jsonl(tmp_path / f"{name}-d.jsonl", docs)
            lookups = topics(str(tmp_path / f"{name}-q.jsonl")), documents(str(tmp_path / f"{name}-d.jsonl"))
            read = partial(read_run, tmp_path / f"{name}.txt", *lookups)
        tracemalloc.start()
        write_run(by_length, read, tmp_path / f"{name}-run.txt", system="x", chunk=50)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    for source in ("jsonl", "run"):
        peak(f"warm-{source}", 10, source)
        few, many = peak(f"few-{source}", 20, source), peak(f"many-{source}", 400, source)  # texts: 0.5 MB, 10 MB
        assert many < few + 500_000
