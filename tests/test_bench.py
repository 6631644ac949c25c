"""experiments/bench.py: its arithmetic, systems that are missing or fail, and a small row from end to end."""

import re
import sys
from pathlib import Path

import bench
import bench_work
import measured
import pytest
import torch

PASSAGES = {"MiniLM": 100, "BERT-base": 50}  # passages per query in pt_docs/speed.rst
ANSWER = {"seconds": 2.0, "peak GB": 1.0, "results": [[3.0, 2.0, 1.0]]}


def test_a_row_says_seconds_share_of_the_floor_and_times_as_fast():
    row = bench.Row("cross-encoder", "MiniLM", "float32", ("ours", "peer", "missing"), queries=2)
    found = {
        "ours": ANSWER | {"flops": 6e9, "bytes": 1e9},
        "peer": ANSWER | {"seconds": 5.0, "results": [[3.0, 1.0, 2.0]]},
        "missing": {"not run": "No module named 'onnxruntime'"},
    }
    rows = bench.tidy("a row", row, found, (6e9, 2e9))
    values = {(each["setting"], each["measure"]): each["value"] for each in rows}
    assert values == {
        ("a row: ours", "seconds a query"): 1.0,
        ("a row: ours", "peak GB"): 1.0,
        ("a row: ours", "floor, seconds a query"): 0.75,
        ("a row: ours", "share of the floor"): 0.75,
        ("a row: ours", "times as fast as peer"): 2.5,
        ("a row: ours", "pairs ordered as peer"): pytest.approx(2 / 3),
        ("a row: peer", "seconds a query"): 2.5,
        ("a row: peer", "peak GB"): 1.0,
    }
    text = bench.table("a row", rows, found)
    assert "not run: No module named 'onnxruntime'" in text
    assert "2.50 x as fast as peer, 66.7% of pairs alike" in text


def test_only_pairs_with_one_of_the_first_passages_are_compared():
    ours, theirs = [[4.0, 3.0, 2.0, 1.0]], [[4.0, 3.0, 1.0, 2.0]]
    assert bench.alike(ours, theirs, top=2) == 1
    assert bench.alike(ours, theirs, top=3) == pytest.approx(5 / 6)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a very small cross-encoder, and with the queries and passages to rerank."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setitem(bench_work.ENCODERS, "small", small)
    texts = ["how to wait"], [["sleep pauses a program", "a list of numbers", "time and calendars"]]
    bench_work.make("cross-encoder", "small", "float32", *texts, tmp_path)
    return tmp_path


def test_ours_scores_as_sentence_transformers_and_says_what_it_cost(work):
    answers = {}
    for system in ("ours", "sentence-transformers"):
        process = bench.Process(work, system, sys.executable, Path(bench.__file__).parents[1], 1)
        answers[system] = process.ask("run")
        if system == "ours":
            cost = process.ask("cost")
        process.end()
    assert torch.allclose(*(torch.tensor(answer["results"]) for answer in answers.values()), atol=1e-5)
    assert all(answer["seconds"] > 0 and answer["peak GB"] > 0 for answer in answers.values())
    assert cost["flops"] > 0 and cost["bytes"] == 0  # bytes are counted in decoders only


def test_a_system_that_is_not_installed_is_not_run(work):
    process = bench.Process(work, "rank_llm", sys.executable, Path(bench.__file__).parents[1], 1)
    assert "rank_llm" in process.ask("run")["not run"]
    process.end()


def test_a_system_that_dies_says_why(work):
    (work / "config.json").write_text("{}")
    process = bench.Process(work, "ours", sys.executable, Path(bench.__file__).parents[1], 1)
    with pytest.raises(RuntimeError, match=r"ours failed:[\s\S]*ValueError"):
        process.ask("run")


def test_an_unknown_row_or_system_is_named(monkeypatch, capsys):
    for wrong in (["colbert"], ["--python", "vLLM=python"]):
        monkeypatch.setattr(sys, "argv", ["bench.py", *wrong])
        with pytest.raises(SystemExit):
            bench.main()
        assert f"{wrong[-1].partition('=')[0]!r} is no row or system" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in bench.ROWS if "43" not in name and "bfloat16" not in name])
def test_a_row_runs_from_end_to_end(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measured.record, "__defaults__", (tmp_path / "measured.csv",))
    monkeypatch.setattr(sys, "argv", ["bench.py", name, "--quick", "--record"])
    bench.main()
    rows = measured.read(bench.QUESTION, tmp_path / "measured.csv")
    assert rows["setting"].str.endswith(": ours").any() and (rows["value"] > 0).all()


def test_the_page_says_what_was_measured():
    page = (Path(bench.__file__).parents[1] / "pyterrier_lit" / "pt_docs" / "speed.rst").read_text(encoding="utf-8")
    found = measured.read(bench.QUESTION)
    found = measured.latest(found[found["threads"] == 2], "machine")
    avx2, vnni = page.split("int8 on a CPU with VNNI\n")
    for part, machine, n in ((avx2, "2 cores, AVX2", 12), (vnni, "2 cores, AVX2, AVX-512, VNNI", 21)):
        rows = found[found["machine"] == machine]
        line = r'^   "?(MiniLM|BERT-base)(, 43 queries)?"?, "?([\w ,-]+?)"?, ([\d.]+), ([\d.]+)$'
        lines = re.findall(line, part, re.MULTILINE)
        assert len(lines) == n
        for size, queries, system, *figures in lines:
            passages = 25 if queries else PASSAGES[size]
            setting = f"cross-encoder, {size}, float32{queries}, {passages} passages: {system}"
            values = rows[rows["setting"] == setting].set_index("measure")["value"]
            assert [float(figure) for figure in figures] == pytest.approx(
                [values["seconds a query"], values["peak GB"]], abs=0.006
            )
    rows = found[found["machine"] == "2 cores, AVX2"]
    lines = re.findall(r'^   "?(LiT5-\w+|PE-Rank)(?:, ``(.+)``)?"?, ([\d.]+), ([\d.]+), (\d+) %$', page, re.MULTILINE)
    assert len(lines) == 6
    for reranker, option, *figures in lines:
        size, peer = ("44 M", "published procedure") if reranker == "PE-Rank" else ("T5-base", "library's T5")
        setting = f"{reranker.lower()}, {size}, float32, 100 passages: ours"
        setting += f", {option}".replace('""', '"') if option else ""
        values = rows[rows["setting"] == setting].set_index("measure")["value"]
        found = values[["seconds a query", f"times as fast as {peer}", "share of the floor"]] * [1, 1, 100]
        assert [float(figure) for figure in figures] == pytest.approx(found.tolist(), rel=0.01)


def test_the_quick_way_leaves_out_what_ten_passages_cannot_show():
    row = bench.quick(bench.ROWS["pe-rank, 44 M, float32"])
    assert row.queries == 1
    assert row.systems == ("ours", 'ours, decoding="first"', "published procedure")
