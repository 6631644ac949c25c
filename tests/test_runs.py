"""files.runs: writing runs in chunks, resuming, ties, memory, and failures that lose no finished queries."""

import fcntl
import gzip
import os
import shutil
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
    """Scores like `by_length`, and raises ValueError at the query `fails_at`."""

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
    for torn in (b"q4 Q0 d1 1 9", bytes(1_000)):  # after a kill during a write; after a power failure
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
    assert raised.value.__notes__ == [f"what was finished is in {part}, a run file; resume continues it"]
    return part


def test_an_unfinished_run_is_not_overwritten_nor_continued_otherwise(tmp_path):
    part = interrupted(tmp_path)
    before = part.read_bytes()
    with pytest.raises(FileExistsError, match=r"part is an unfinished run; resume continues it"):
        write(tmp_path / "run.txt", Failing())
    for other in ({"reranker": by_length}, {"system": "y"}, {"chunk": 11}):
        with pytest.raises(ValueError, match="was started with another reranker"):
            write(tmp_path / "run.txt", **{"reranker": Failing(), "resume": True} | other)
    for queries in (QUERIES[1:], [QUERIES[0]._replace(docnos=list("abcde")), *QUERIES[1:]]):
        with pytest.raises(ValueError, match="was started with another input"):
            write(tmp_path / "run.txt", Failing(), queries=queries, resume=True)
    with pytest.raises(ValueError, match="was started with another input"):
        write(tmp_path / "run.txt", Failing(), queries=QUERIES[:2], resume=True)
    assert part.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [part.name]


def test_a_finished_run_is_not_overwritten(tmp_path):
    write(tmp_path / "run.txt")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"run.txt exists already; move it away"):
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


# A part is an unfinished run. It is resumed only with what it was started with


@pytest.mark.parametrize(
    "change, named",
    [
        ({"queries": [*QUERIES[:6], QUERIES[6]._replace(query="another"), QUERIES[7]]}, "input, order or depth"),
        (
            {"queries": [*QUERIES[:7], QUERIES[7]._replace(texts=["other", *QUERIES[7].texts[1:]])]},
            "input, order or depth",
        ),
        ({"queries": [QUERIES[1], QUERIES[0], *QUERIES[2:]]}, "input, order or depth"),
        ({"queries": [QUERIES[0]._replace(docnos=QUERIES[0].docnos[::-1]), *QUERIES[1:]]}, "input, order or depth"),
        ({"queries": [query._replace(docnos=query.docnos[:4], texts=query.texts[:4]) for query in QUERIES]}, "depth"),
        ({"queries": [*QUERIES, QUERIES[0]._replace(qid="q8")]}, "input, order or depth"),
        ({"queries": QUERIES[:5]}, "input, order or depth"),
        ({"weights": lambda: "trained anew"}, "weights or another device"),
        ({"weights": None}, "weights or another device"),
        ({"system": "y", "weights": None}, "option, chunk or system and other weights or another device"),
    ],
)
def test_what_is_not_as_it_was_is_named_and_the_part_kept(tmp_path, change, named):
    with pytest.raises(ValueError, match="nan"):
        write(tmp_path / "run.txt", Failing("q4"), weights=lambda: "of yesterday")
    (part,) = tmp_path.iterdir()
    before = part.read_bytes()
    reranker = Failing()
    with pytest.raises(ValueError, match=rf"part was started with .*{named}; use the same again, or delete it"):
        write(tmp_path / "run.txt", reranker, **{"weights": lambda: "of yesterday", "resume": True} | change)
    assert reranker.seen == [] and part.read_bytes() == before
    write(tmp_path / "run.txt", reranker, weights=lambda: "of yesterday", resume=True)
    assert reranker.seen == ["q4", "q5", "q6", "q7"]


def test_parts_of_other_outputs_and_empty_ones_are_none(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        write(tmp_path / "run.txt.gz", Failing("q4"))
    (tmp_path / "run.txt.00000000-11111111-22222222.part").touch()  # killed before anything was written
    write(tmp_path / "run.txt", Failing())
    write(tmp_path / "run.txt.gz", Failing(), resume=True)
    assert gzip.decompress((tmp_path / "run.txt.gz").read_bytes()) == (tmp_path / "run.txt").read_bytes()


def test_a_part_of_an_earlier_version_is_not_gone_on_with(tmp_path):
    (tmp_path / "run.txt.0123abcd.part").write_text("q0 Q0 d3 1 9 x\n")
    with pytest.raises(ValueError, match=r"0123abcd.part was started with another reranker"):
        write(tmp_path / "run.txt", resume=True)


@pytest.mark.parametrize(
    "column, damage", [(0, "q3"), (1, ""), (2, "d9"), (3, "2"), (4, "\0\0"), (4, "1e"), (5, "y\n")]
)
def test_a_damaged_line_in_a_part_is_reranked_again_with_what_follows(tmp_path, column, damage):
    write(tmp_path / "whole.txt", Failing())
    part = interrupted(tmp_path)
    lines = part.read_bytes().splitlines(keepends=True)
    words = lines[10].decode().split(" ")
    words[column] = damage
    part.write_bytes(b"".join([*lines[:10], " ".join(words).encode(), *lines[11:]]))
    write(tmp_path / "run.txt", Failing(), resume=True)
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


# An input that changes


@pytest.mark.parametrize(
    "later, number",
    [
        (QUERIES[:5], 6),
        ([*QUERIES, QUERIES[0]._replace(qid="q8")], 9),
        ([*QUERIES[:5], QUERIES[5]._replace(texts=QUERIES[5].texts[::-1]), *QUERIES[6:]], 6),
        ([QUERIES[1], QUERIES[0], *QUERIES[2:]], 1),
        ([], 1),
    ],
)
def test_an_input_that_changes_between_its_readings_is_an_error_and_gives_no_run(tmp_path, later, number):
    given = iter([QUERIES, later])
    with pytest.raises(ValueError, match=f"the input changed while it was read: query {number} is not what it was"):
        write_run(by_length, lambda: iter(next(given)), tmp_path / "run.txt", system="x", chunk=10)
    assert not (tmp_path / "run.txt").exists()
    for part in tmp_path.iterdir():
        assert len(part.read_bytes().splitlines()) == (number - 2) // 2 * 10


# One writer


class Meanwhile(Failing):
    """Scores like `by_length`, and calls `other` before the first scores."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def transform(self, inp):
        if not self.seen:
            self.other()
        return super().transform(inp)


def test_a_second_writer_is_told_at_once_and_the_first_is_not_disturbed(tmp_path):
    told = []

    def second():
        for more in ({}, {"queries": QUERIES[:3]}, {"resume": True}):
            with pytest.raises(BlockingIOError) as raised:
                write(tmp_path / "run.txt", **more)
            told.append(str(raised.value))
        write(tmp_path / "other.txt")  # another output in the same folder

    write(tmp_path / "run.txt", Meanwhile(second))
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "other.txt").read_bytes()
    assert len(told) == 3 and all(f"is being written already, by process {os.getpid()} on" in line for line in told)
    assert {file.name for file in tmp_path.iterdir()} == {"run.txt", "other.txt"}


def test_a_link_to_an_output_is_that_output(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "run.txt").symlink_to(tmp_path / "far" / "away.txt")

    def second():
        with pytest.raises(BlockingIOError, match=r"away.txt is being written already"):
            write(tmp_path / "far" / "away.txt")

    write(tmp_path / "run.txt", Meanwhile(second))
    assert (tmp_path / "run.txt").is_symlink()
    assert [file.name for file in (tmp_path / "far").iterdir()] == ["away.txt"]
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path / "run.txt")


def test_a_lock_that_a_killed_process_left_holds_nobody_up(tmp_path):
    (tmp_path / ".run.txt.lock").write_text("process 1 on nowhere")
    write(tmp_path / "run.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["run.txt"]


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"has no locks \(.*not supported\): see to it that nothing else"):
        write(tmp_path / "run.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["run.txt"]


def test_an_output_folder_that_goes_away_is_an_error_as_soon_as_something_is_written(tmp_path):
    reranker = Meanwhile(lambda: shutil.rmtree(tmp_path / "out"))
    with pytest.raises(OSError, match=r"part cannot be extended \(.*No such file"):
        write(tmp_path / "out" / "run.txt", reranker)
    assert len(reranker.seen) == 2


@pytest.mark.parametrize("name", ["run.txt", "run.txt.gz"])
def test_a_run_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, name):
    synced = []

    def fsync(file):
        assert not (tmp_path / name).exists()
        synced.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / name)
    assert synced == [(tmp_path / name).stat().st_size]


def test_a_disk_that_fails_at_the_end_keeps_what_was_finished(tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(5, "Input/output error")

    for name in ("run.txt", "run.txt.gz"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=f"cannot become {name} .*Input/output error"):
            patch.setattr(os, "fsync", fsync)
            write(tmp_path / name, Failing())
        (part,) = tmp_path.glob(f"{name}*")
        assert len(part.read_bytes().splitlines()) == 40
        assert write(tmp_path / name, Failing(), resume=True).found == 8


def test_scores_do_not_depend_on_torchs_default_dtype_or_device():
    scores = [3.0, 1.0, 1.0, 0.1, 0.1]
    wanted = list(falling(scores))
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        try:
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            assert list(falling(scores)) == wanted
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
