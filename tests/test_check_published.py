"""experiments/check_published.py, with a stand-in for the hub: which checks pass, fail or are not run."""

import json
import os
import shutil
import signal
import subprocess
import sys

import check_published
import compare
import costs
import pandas as pd
import papers
import public_runs
import pytest
import safetensors.torch
from conftest import ELECTRA, ROOT, T5, TINY

from pyterrier_lit import CrossEncoder

MONO, DISTILL, SCORE, PE = (
    "webis/monoelectra-base",
    "castorini/LiT5-Distill-base-v2",
    "castorini/LiT5-Score-base",
    "liuqi6777/pe-rank-mistral-jina",
)
FOLDERS = {MONO: ELECTRA, DISTILL: T5, "castorini/LiT5-Distill-base": T5, SCORE: T5, PE: TINY / "pe-rank"}
NAMES = {MONO: "monoELECTRA-base two-stage RankZephyr-CBv2", PE: "PE-Rank (Jina)"}  # names in published.csv
DOCS = {"d1": "water power", "d2": "light is measured", "d3": "old mills of the river"}
RUN = "".join(f"{qid} Q0 d{i} {i} {-i} x\n" for qid in (1, 2) for i in (1, 2, 3))


@pytest.fixture
def put(hub):
    """put(name, tmp_path, change): put a checkpoint with this name on the stand-in. `change(folder)` can change it."""

    def put(name, tmp_path, change=lambda folder: None):
        folder = tmp_path / name.replace("/", "--")
        shutil.copytree(FOLDERS[name], folder)
        change(folder)
        hub.create(name)
        hub.commit(name, "main", {file.name: file.read_bytes() for file in folder.iterdir()}, "all")

    return put


@pytest.fixture
def dl19(tmp_path, monkeypatch):
    """The folder of a small collection in place of DL19. Its BM25 runs are in another folder."""
    folder, runs = tmp_path / "dl19", tmp_path / "runs"
    folder.mkdir(), runs.mkdir()
    (folder / "docs.jsonl").write_text("".join(json.dumps({"docno": d, "text": t}) + "\n" for d, t in DOCS.items()))
    (folder / "queries.tsv").write_text("1\twater mills\n2\tlight\n")
    (folder / "qrels.txt").write_text("1 0 d3 1\n2 0 d2 1\n")
    for name in ("dl19.bm25", "dl19.bm25-terrier"):
        (runs / f"{name}.txt").write_text(RUN)
    shutil.copy(folder / "qrels.txt", runs / "dl19.qrels.txt")
    for module in (papers, public_runs):
        monkeypatch.setattr(module, "RUNS", [runs])
    return str(folder)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(*rows): replace published.csv by a file with these rows."""

    def publish(*rows):
        columns = ["paper", "table", "collection", "measure", "first_stage", "depth", "model", "value"]
        figures = pd.DataFrame(rows, columns=columns).assign(source="", status="confirmed")
        figures.to_csv(tmp_path / "published.csv", index=False)
        monkeypatch.setattr(compare, "PUBLISHED", tmp_path / "published.csv")

    return publish


def results(rows):
    return {row["check"]: row["result"] for row in rows}


def found(rows, check):
    return next(row["found"] for row in rows if row["check"] == check)


def test_a_t5_of_its_name_passes_and_one_without_an_output_layer_does_not(put, tmp_path, dl19):
    put(DISTILL, tmp_path)
    rows = check_published.examine(DISTILL, dl19)
    assert results(rows) | {"names of weights": "passed", "loads": "passed", "window and stride": "passed"} == results(
        rows
    )

    def headless(folder):
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        safetensors.torch.save_file(
            weights | {"other": weights["shared.weight"][:1].clone()}, folder / "model.safetensors"
        )

    put(SCORE, tmp_path, headless)
    rows = check_published.examine(SCORE, dl19)
    assert results(rows)["names of weights"] == "failed"
    assert found(rows, "names of weights").endswith("missing lm_head.weight, unknown other, no lm_head.weight")


def test_what_does_not_load_fails_once_and_the_rest_is_not_run(put, tmp_path, dl19):
    put(MONO, tmp_path, lambda folder: (folder / "model.safetensors").write_bytes(b"half"))
    rows = check_published.examine(MONO, dl19)
    assert results(rows)["fetched"] == "passed" and results(rows)["loads"] == "failed"
    assert set(list(results(rows).values())[2:]) == {"not run"} and len(rows) == 5
    assert "model.safetensors" in found(rows, "loads")


def test_what_the_hub_has_not_is_not_run(hub, dl19):
    (row,) = check_published.examine(MONO, dl19)
    assert row["result"] == "not run" and MONO in row["found"]


def test_a_window_of_another_size_fails(put, tmp_path, dl19):
    def recorded(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"window_size": 7}))

    put(DISTILL, tmp_path, recorded)
    rows = check_published.examine(DISTILL, dl19)
    assert results(rows)["window and stride"] == "failed" and found(rows, "window and stride") == "7, 3"
    put("castorini/LiT5-Distill-base", tmp_path)
    rows = check_published.examine("castorini/LiT5-Distill-base", dl19)
    assert results(rows)["window and stride"] == "passed" and found(rows, "window and stride") == "20, 10"


@pytest.mark.parametrize(("off", "result"), [(0.0005, "passed"), (0.002, "failed")])
def test_known_scores_are_reached_within_a_thousandth(put, tmp_path, dl19, publish, off, result):
    ((score,),) = CrossEncoder(str(ELECTRA), query_length=32, doc_length=256).score(["a fox"], [["is red"]])
    pair = "query: a fox / passage: is red"
    publish(("Rank-DistiLLM", "known_scores", pair, "relevance score", "", "", MONO, score + off))
    put(MONO, tmp_path)
    rows = check_published.examine(MONO, dl19)
    assert results(rows)["known scores"] == result and found(rows, "known scores") == f"{score:.4f}"


def test_the_scores_tokens_and_figures_that_are_published_are_found(put, tmp_path, dl19):
    """The small checkpoints do not have the published results, so these checks fail."""
    put(MONO, tmp_path), put(PE, tmp_path)
    known = [
        {row["check"]: row["known"] for row in check_published.examine(name, dl19) if row["result"] == "failed"}
        for name in (MONO, PE)
    ]
    assert known[0]["known scores"] == "7.7892; -3.5815" and known[1]["tokens a query"] == "2,942"
    over_bm25 = [each["DL19 over BM25, nDCG@10"] for each in known]
    assert over_bm25 == [f"first stage 0.4800; {NAMES[MONO]} 0.7200 or 0.7210", f"{NAMES[PE]} 0.7048"]


@pytest.mark.parametrize(("more", "result"), [(0, "passed"), (1, "failed")])
def test_tokens_of_prompts_are_counted(put, tmp_path, dl19, publish, more, result):
    reranker = papers.pe_rankers()[NAMES[PE]]
    reranker.model = str(TINY / "pe-rank")
    topics = pd.DataFrame({"qid": ["1"] * 100 + ["2"] * 100, "query": ["water mills"] * 100 + ["light"] * 100})
    tokens = costs.prompt_tokens(reranker, topics)
    measure = "processed tokens per query"
    publish(("PE-Rank", "figure1", "dl19", measure, "bm25", "100", NAMES[PE], round(tokens) + more))
    put(PE, tmp_path)
    rows = check_published.examine(PE, dl19)
    assert results(rows)["tokens a query"] == result and found(rows, "tokens a query") == f"{tokens:,.2f}"


@pytest.mark.parametrize(("place", "result"), [(0, "passed"), (1, "failed")])
def test_of_ten_passages_the_one_that_answers_is_first(put, tmp_path, dl19, monkeypatch, place, result):
    order = CrossEncoder(str(ELECTRA), query_length=32, doc_length=256).rank(
        check_published.QUERY, check_published.PASSAGES
    )
    monkeypatch.setattr(check_published, "ANSWER", order[place]["corpus_id"] + 1)
    put(MONO, tmp_path)
    rows = check_published.examine(MONO, dl19)
    assert results(rows)["ten passages"] == result
    assert found(rows, "ten passages") == " ".join(str(passage["corpus_id"] + 1) for passage in order)


@pytest.mark.parametrize(("off", "result"), [(0.0, "passed"), (0.002, "passed"), (0.004, "failed")])
def test_dl19_is_beside_what_is_published(put, tmp_path, dl19, publish, off, result):
    put(MONO, tmp_path)
    where, first = ("dl19", "nDCG@10", "bm25", "100"), 0.5655  # the relevant passages have the ranks 3 and 2
    measured = measured_of(check_published.examine(MONO, dl19))
    publish(
        ("Rank-DistiLLM", "arxiv_table1", *where, "first stage", first),
        ("Rank-DistiLLM", "arxiv_table1", *where, NAMES[MONO], measured + off),
        ("Rank-DistiLLM", "readme", *where, NAMES[MONO], 0.1),  # it is enough to match one of the two figures
    )
    rows = check_published.examine(MONO, dl19)
    assert results(rows)["DL19 over BM25, nDCG@10"] == result and measured_of(rows) == measured
    # A first stage with another nDCG@10 is not the paper's BM25
    publish(("Rank-DistiLLM", "arxiv_table1", *where, "first stage", first + 0.01))
    assert results(check_published.examine(MONO, dl19))["DL19 over BM25, nDCG@10"] == "failed"


def measured_of(rows):
    return float(found(rows, "DL19 over BM25, nDCG@10").split(";")[1].split()[-1])


def test_without_its_run_or_texts_dl19_is_not_run(put, tmp_path, dl19):
    put(PE, tmp_path)
    papers.find("dl19.bm25").write_text(RUN.replace("d3", "d9"))
    assert "d9" in found(check_published.examine(PE, dl19), "DL19 over BM25, nDCG@10")
    papers.find("dl19.bm25").unlink()
    rows = check_published.examine(PE, str(tmp_path / "nowhere"))
    assert [row["result"] for row in rows if row["check"] in ("tokens a query", "DL19 over BM25, nDCG@10")] == [
        "not run"
    ] * 2


def test_public_runs_are_beside_what_is_published(dl19, publish):
    where, papers_bm25 = ("LiT5", "ecir_table1", "dl19", "nDCG@10", "bm25", "100"), 0.5655
    publish((*where, "first stage", papers_bm25), (*where, "RankZephyr 7B", 0.742))

    def result(name):
        return check_published.tried("public runs", name, check_published.public_run, name)["result"]

    assert (result("first stage"), result("RankZephyr 7B")) == ("passed", "not run")
    (papers.RUNS[0] / "dl19.bm25.rankzephyr.txt").write_text(RUN)
    assert result("RankZephyr 7B") == "failed"
    publish((*where, "first stage", papers_bm25 + 0.01), (*where, "RankZephyr 7B", papers_bm25))
    assert (result("first stage"), result("RankZephyr 7B")) == ("failed", "passed")


def test_sizes_are_of_what_is_read_and_still_missing(put, hub, tmp_path):
    put(MONO, tmp_path)
    _, files = hub.at(MONO)
    hub.commit(MONO, "main", files | {"pytorch_model.bin": b"x" * 10**6, "onnx.bin": b"x"}, "more")
    read = sum(len(data) for path, data in files.items())
    table = check_published.sizes([MONO, "castorini/LiT5-Score-xl"])
    assert table["GB"][0] == table["GB to fetch"][0] == table["GB"][2] == pytest.approx(read / 1e9, abs=5e-4)
    assert table["error"][1].startswith("RepositoryNotFoundError")
    papers.cross_encoders()[NAMES[MONO]].folder()
    assert check_published.sizes([MONO])["GB to fetch"][0] == 0


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_checkpoint_whose_process_is_killed_stops_no_other(monkeypatch):
    monkeypatch.setattr(check_published, "examine", killed)
    (row,) = check_published.apart(MONO, "dl19")
    assert row["result"] == "failed" and "memory" in row["found"]


def test_the_command_writes_a_report_and_says_by_its_status_that_something_failed(put, hub, dl19, tmp_path):
    put(MONO, tmp_path)
    command = [sys.executable, str(ROOT / "experiments" / "check_published.py"), "electra-base", "--dl19", dl19]
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.index("GB to fetch") < done.stdout.index("passed"), done.stderr
    written = (tmp_path / "check_published.md").read_text()
    assert "| webis/monoelectra-base | known scores " in written and "| 7.7892; -3.5815" in written
    assert "10. On Mars" in written
    assert str(tmp_path) not in written


def test_a_name_that_is_no_part_of_a_checkpoints_is_refused(capsys):
    with pytest.raises(SystemExit):
        check_published.main(["monoelectra", "bert"])
    assert "bert: wanted a part of one of castorini/LiT5" in capsys.readouterr().err
