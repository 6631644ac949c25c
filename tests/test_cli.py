"""The command line: the same run as in Python, resuming after a kill, and one line on stderr for each mistake."""

import importlib
import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from itertools import accumulate, groupby

import ir_measures
import pandas as pd
import pyterrier as pt
import pytest
from conftest import CHECKPOINTS, GOLDEN, ROOT, write_jsonl
from ir_measures import AP, RR, nDCG

import pyterrier_lit
from pyterrier_lit import CrossEncoder
from pyterrier_lit.__main__ import RERANKERS, SET_HERE, constructor_options, documented, flag, main


def golden_rows():
    """Return the rows of a re-ranking file with the queries and passages of golden/lit5, without duplicates. The ranks
    start at 1. The rows of a query begin with the last rank."""
    lines = map(json.loads, (GOLDEN / "lit5" / "data.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {
            "qid": line["qid"],
            "query": line["query"],
            "docno": doc["docno"],
            "text": doc["text"],
            "rank": rank,
            "score": -rank,
        }
        for line in lines
        for rank, doc in reversed(list(enumerate(distinct(line["docs"])[:25], 1)))
    ]


def distinct(docs):
    return list({doc["text"]: doc for doc in docs}.values())


def words(file, output, *more, reranker="cross-encoder"):
    model = ["--reranker", reranker, "--model", CHECKPOINTS[reranker], "--device", "cpu"]
    return [str(word) for word in ["rerank", "--input", file, "--output", output, *model, *more]]


def program(arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pyterrier_lit", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "rerank.jsonl.gz", golden_rows())


@pytest.mark.parametrize("reranker", RERANKERS)
def test_a_run_scores_identically_to_the_same_pipeline_in_python(tmp_path, file, capsys, reranker):
    more = ["--depth", 20, "--max-tokens", 3_000, *(["--top-k", 5] if "top_k" in taken_by(reranker) else [])]
    assert main(words(file, tmp_path / "run.txt", *more, reranker=reranker)) == 0
    assert "5 queries, 92 pairs in" in capsys.readouterr().out

    options = {"max_tokens": 3_000} | ({"top_k": 5} if "top_k" in taken_by(reranker) else {})
    model = RERANKERS[reranker](str(CHECKPOINTS[reranker]), device="cpu", **options)
    frame = pd.DataFrame(golden_rows())
    frame["rank"] -= 1
    expected = (pt.RankCutoff(20) >> model)(frame)

    run = pt.io.read_results(str(tmp_path / "run.txt"))
    both = expected.merge(run, on=["qid", "docno"], suffixes=("", "_written"))
    assert len(both) == len(run) == len(expected) == 92
    assert (both["rank"] + 1 == both["rank_written"]).all()
    assert (both["score"] == both["score_written"].astype("float32")).all()
    labels = [hash(docno * 3) % 3 for docno in range(len(both))]
    qrels = both.assign(relevance=labels).rename(columns={"qid": "query_id", "docno": "doc_id"})
    measures = [nDCG @ 10, AP, RR]
    assert measured(measures, qrels, expected) == measured(measures, qrels, run)


def measured(measures, qrels, run):
    run = run.rename(columns={"qid": "query_id", "docno": "doc_id"})
    return sorted(map(str, ir_measures.iter_calc(measures, qrels, run)))


def taken_by(reranker):
    return [name for name, owners in constructor_options().items() if reranker in owners]


@pytest.mark.parametrize("reranker", RERANKERS)
def test_every_argument_of_a_constructor_is_an_option_unless_it_is_an_object_or_set_here(reranker):
    arguments = inspect.signature(RERANKERS[reranker]).parameters
    objects = {"vectors", "encoder"}
    assert set(taken_by(reranker)) == set(arguments) - set(SET_HERE) - objects


def test_a_run_with_topics_and_documents_gives_the_same_as_a_rerank_file(tmp_path, file):
    rows = golden_rows()
    (tmp_path / "first.txt").write_text(
        "".join(f"{r['qid']} Q0 {r['docno']} {r['rank']} {r['score']} bm25\n" for r in rows)
    )
    (tmp_path / "queries.tsv").write_text("".join({f"{r['qid']}\t{r['query']}\n": 0 for r in rows}))
    write_jsonl(tmp_path / "docs.jsonl.gz", [{"docno": r["docno"], "text": r["text"]} for r in rows])
    assert main(words(file, tmp_path / "a.txt")) == 0
    more = ["--topics", tmp_path / "queries.tsv", "--documents", tmp_path / "docs.jsonl.gz"]
    assert main(words(tmp_path / "first.txt", tmp_path / "b.txt", *more)) == 0
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()


def test_candidates_of_rank_llm_give_the_same_as_a_rerank_file(tmp_path, file):
    queries = {}
    for row in golden_rows()[::-1]:
        query = queries.setdefault(row["qid"], {"query": {"qid": row["qid"], "text": row["query"]}, "candidates": []})
        query["candidates"].append({"docid": row["docno"], "score": row["score"], "doc": {"contents": row["text"]}})
    (tmp_path / "top100.json").write_text(json.dumps(list(queries.values())[::-1], indent=2))
    assert main(words(file, tmp_path / "a.txt")) == 0
    assert main(words(tmp_path / "top100.json", tmp_path / "b.txt")) == 0
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()


def test_a_killed_run_that_is_resumed_is_the_uninterrupted_run_byte_by_byte(tmp_path):
    rows = [row | {"qid": f"{copy}{row['qid']}"} for copy in range(12) for row in golden_rows()]
    file = write_jsonl(tmp_path / "rerank.jsonl", rows)
    assert main(words(file, tmp_path / "whole.txt", "--chunk", 60, "--system", "x")) == 0
    whole = (tmp_path / "whole.txt").read_bytes()

    again = words(file, tmp_path / "run.txt", "--chunk", 60, "--system", "x")
    process = program(again)
    while process.poll() is None and not any(part.stat().st_size > 3_000 for part in tmp_path.glob("run.txt.*.part")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run.txt").exists()
    (part,) = tmp_path.glob("run.txt.*.part")
    left = part.read_bytes()
    assert whole.startswith(left) and 3_000 < len(left) < len(whole)
    part.write_bytes(left[:-7])  # as if the kill had come in the middle of a write

    assert main([*again]) == 1  # fails without --resume
    assert part.read_bytes() == left[:-7]
    process = program([*again, "--resume"])
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert (tmp_path / "run.txt").read_bytes() == whole
    by_query = [
        b"".join(lines) for _, lines in groupby(whole.splitlines(keepends=True), key=lambda line: line.split()[0])
    ]
    ends = list(accumulate(map(len, by_query)))[1::2]  # the ends of the chunks, which have two queries each
    found = 2 * sum(end <= len(left) - 7 for end in ends)
    assert out.startswith(f"{60 - found} queries") and out.endswith(f"; done before: {found} queries\n")
    assert not list(tmp_path.glob("*.part"))


def refused(arguments, capsys):
    """Run a command that fails, and return its only line on stderr."""
    assert main(arguments) != 0
    said = [line for line in capsys.readouterr().err.splitlines() if line and "pair/s" not in line]
    assert len(said) == 1, said
    return said[0].removeprefix("python -m pyterrier_lit: ")


def test_bad_input_is_one_clear_line_and_leaves_no_run(tmp_path, capsys):
    rows = golden_rows()
    cases = {
        "has no text; wanted a string": [*rows[:30], {k: v for k, v in rows[30].items() if k != "text"}],
        "twice; keep one of them": [*rows, rows[-1]],
        "came before, with others in between": [*rows, rows[0]],
        "holds no candidates": [],
    }
    for message, wrong in cases.items():
        assert message in refused(
            words(write_jsonl(tmp_path / "in.jsonl", wrong), tmp_path / "out" / "run.txt"), capsys
        )
        assert list((tmp_path / "out").iterdir()) == []
    cut = write_jsonl(tmp_path / "in.jsonl.gz", rows)
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "it is cut short or damaged" in refused(words(cut, tmp_path / "out" / "run.txt"), capsys)
    assert "No such file" in refused(words(tmp_path / "no.jsonl", tmp_path / "out" / "run.txt"), capsys)


def test_a_model_or_argument_that_cannot_be_is_one_clear_line(tmp_path, file, capsys):
    for more, message in (
        (["--model", tmp_path / "nowhere"], "there is no folder"),
        (["--device", "toaster"], "device='toaster' cannot be used here"),
        (["--max-tokens", 0], "max_tokens=0; wanted a positive whole number"),
        (["--system", "two words"], "system='two words'"),
    ):
        assert message in refused(words(file, tmp_path / "out" / "run.txt", *more), capsys)
        assert not list(tmp_path.glob("out/*"))


def test_options_that_do_not_go_together_are_named(tmp_path, file, capsys):
    for more, message in (
        (["--window-size", 7], "--window-size is an option of lit5-distill and pe-rank, not of cross-encoder"),
        (["--topics", "q.tsv"], "--topics and --documents go together"),
        (["--input", "run.txt"], "a run needs --topics and --documents with it"),
        (["--depth", 0], "'0' is not a positive whole number"),
        (["--max-tokens", "many"], "invalid int value"),
        (["--reranker", "bm25"], "invalid choice: 'bm25'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words(file, tmp_path / "run.txt", *more))
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--special-tokens", "keep"], "special_tokens='keep'; wanted one of"),
        (["--device", "toaster"], "device='toaster' cannot be used here"),
        (["--query-length", "0"], "query_length=0; wanted a positive whole number"),
        (["--system", "two words"], "system='two words'"),
    ],
)
def test_options_are_checked_before_files_and_models_are_read(tmp_path, capsys, more, message):
    assert message in refused(words(tmp_path / "no.jsonl", tmp_path / "run.txt", "--model", "no/such", *more), capsys)


def test_an_output_that_exists_is_named_before_documents_are_indexed_or_models_read(tmp_path, capsys):
    (tmp_path / "run.txt").write_text("a run\n")
    more = ["--topics", tmp_path / "no.tsv", "--documents", tmp_path / "no.tsv", "--model", "no/such"]
    assert "run.txt exists already" in refused(words(tmp_path / "no.txt", tmp_path / "run.txt", *more), capsys)
    assert "no.tsv" in refused(words(tmp_path / "no.txt", tmp_path / "new.txt", *more), capsys)


def test_input_is_read_before_the_model(tmp_path, file, capsys):
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [*golden_rows(), golden_rows()[-1]])
    assert "twice; keep one" in refused(words(wrong, tmp_path / "run.txt", "--model", "no/such"), capsys)
    assert "the hub did not provide" in refused(words(file, tmp_path / "run.txt", "--model", "no/such"), capsys)


def interrupted(arguments, monkeypatch, capsys, after):
    """Interrupt a command when it reranks more than `after` queries. Returns its last line on stderr."""
    results, seen = CrossEncoder.results, []

    def stop(self, queries, columns):
        seen.extend(queries)
        if len(seen) > after:
            raise KeyboardInterrupt
        return results(self, queries, columns)

    with monkeypatch.context() as patch:
        patch.setattr(CrossEncoder, "results", stop)
        assert main(arguments) == 130
    return capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_keeps_what_is_done_at_the_default_chunk_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    rows = [row | {"qid": f"{copy}{row['qid']}"} for copy in range(4) for row in golden_rows()]
    arguments = words(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "run.txt")
    said = interrupted(arguments, monkeypatch, capsys, after=8)
    (part,) = tmp_path.glob("run.txt.*.part")
    assert said.endswith(f"interrupted; what was finished is in {part}, a run file; --resume continues it")
    assert pt.io.read_results(str(part)).qid.nunique() in range(4, 9)
    assert "--resume continues it, or delete it to start again" in refused(arguments, capsys)
    assert main([*arguments, "--resume"]) == 0
    assert main(words(tmp_path / "in.jsonl", tmp_path / "whole.txt")) == 0
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    early = words(tmp_path / "in.jsonl", tmp_path / "early.txt")
    assert interrupted(early, monkeypatch, capsys, after=0).endswith("interrupted")
    assert not list(tmp_path.glob("early*"))


def test_resume_refuses_what_would_mix_two_runs_in_one(tmp_path, file, monkeypatch, capsys):
    model = shutil.copytree(CHECKPOINTS["cross-encoder"], tmp_path / "model")
    arguments = [*words(file, tmp_path / "run.txt", "--model", model), "--chunk", "20", "--resume"]
    interrupted(arguments, monkeypatch, capsys, after=3)
    rows, weights = golden_rows(), (model / "model.safetensors").read_bytes()
    half = weights[: len(weights) // 2]

    def again(*more):
        assert not (tmp_path / "run.txt").exists()
        return refused([*arguments, *more], capsys)

    for more in (
        ["--depth", "9"],
        ["--chunk", "21"],
        ["--system", "x"],
        ["--doc-length", "9"],
        ["--dtype", "bfloat16"],
    ):
        assert "was started with another" in again(*more)
    for changed in (rows[::-1], [*rows, rows[0] | {"qid": "new"}], [rows[0] | {"text": "changed"}, *rows[1:]]):
        write_jsonl(file, changed)
        assert "was started with another input, order or depth; use the same again" in again()
    write_jsonl(file, rows)
    (model / "model.safetensors").write_bytes(half + bytes(100) + weights[len(half) + 100 :])
    assert "was started with other weights or another device; use the same again" in again()
    (model / "model.safetensors").write_bytes(weights)
    assert main(arguments) == 0


def test_of_two_processes_on_one_output_the_second_ends_at_once_with_one_line(tmp_path):
    rows = [row | {"qid": f"{copy}{row['qid']}"} for copy in range(20) for row in golden_rows()]
    inputs = [write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[::-1])]
    begun = [program(words(given, tmp_path / "run.txt", "--chunk", 60, "--system", "x")) for given in inputs]
    ended = [(process.communicate()[1], process.returncode) for process in begun]
    assert sorted(code for _, code in ended) == [0, 1]
    (said,) = [error.splitlines()[-1] for error, code in ended if code]
    assert "run.txt is being written already, by process " in said or "run.txt exists already" in said
    first = rows if ended[0][1] == 0 else rows[::-1]
    written = [line.split()[0] for line in (tmp_path / "run.txt").read_text().splitlines()]
    assert list(dict.fromkeys(written)) == list(dict.fromkeys(row["qid"] for row in first))
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


def test_the_help_of_every_option_is_what_the_docstring_says_of_the_argument(capsys):
    for name, parameters in constructor_options().items():
        for reranker in parameters:
            assert len(documented(RERANKERS[reranker])[name]) > 10, (reranker, name)
    for reranker in RERANKERS:
        with pytest.raises(SystemExit):
            main(["rerank", "--reranker", reranker, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        for name, parameters in constructor_options().items():
            assert (f"{flag(name)} " in said) == (reranker in parameters)
            if reranker in parameters:  # argparse also breaks lines at hyphens
                assert documented(RERANKERS[reranker])[name].rstrip(".").replace(" ", "") in said.replace(" ", "")
    with pytest.raises(SystemExit):
        main(["rerank", "--help"])
    everything = capsys.readouterr().out
    assert all(flag(name) in everything for name in constructor_options())


def test_the_console_script_is_this_command_line_and_says_its_version(capsys, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["pyterrier-lit"].partition(":")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pyterrier-lit", "--version"])
    with pytest.raises(SystemExit) as end:
        getattr(importlib.import_module(module), function)()
    assert end.value.code == 0 and capsys.readouterr().out == f"pyterrier_lit {pyterrier_lit.__version__}\n"
    with pytest.raises(SystemExit):
        main(["rerank"])
    assert capsys.readouterr().err.startswith("usage: pyterrier-lit rerank")


def test_an_output_that_cannot_be_written_is_one_clear_line_before_the_model_loads(tmp_path, file, capsys):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "locked").mkdir(mode=0o500)
    places = ["taken"] if os.geteuid() == 0 else ["taken", "locked"]  # root may write everywhere
    for place in places:
        arguments = words(file, tmp_path / place / "run.txt", "--model", "no/such-model")
        assert refused(arguments, capsys).startswith(f"{tmp_path / place} cannot be written to (")


def test_a_full_disk_is_one_clear_line_and_what_was_finished_is_a_run(tmp_path, file):
    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))

    settings = [
        "--chunk",
        30,
        "--system",
        100 * "x",
    ]  # long lines: torch may write a small file of its own as it starts
    arguments = words(file, tmp_path / "run.txt", *settings)
    process = program(arguments, preexec_fn=small)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in error
    line = error.splitlines()[-1]
    assert (
        "cannot be extended ([Errno 27] File too large)" in line
        and "what was finished is in" in line
        and "resume continues it" in line
    )
    (part,) = tmp_path.glob("run.txt.*.part")
    kept = pt.io.read_results(str(part))
    assert kept.groupby("qid").size().tolist() == [25, 25]
    assert main([*arguments, "--resume"]) == 0
    assert main(words(file, tmp_path / "whole.txt", *settings)) == 0
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


def test_the_summary_has_queries_pairs_seconds_and_tokens(tmp_path, file, capsys):
    assert main(words(file, tmp_path / "run.txt.gz", "--chunk", 1)) == 0
    said = capsys.readouterr().out.replace(",", "")
    _, pairs, seconds, speed, padded, real, ratio = (
        float(word) for word in said.split() if word.replace(".", "").isdigit()
    )
    assert (pairs, ratio) == (112, round(padded / real, 3))
    assert pairs / (seconds + 0.06) < speed < pairs / max(seconds - 0.06, 1e-9)  # one decimal of the seconds is shown
    assert padded > real > 112 * 3
