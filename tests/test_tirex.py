"""files.tirex: TIRA's loader makes the input, and TIRA's checker accepts the output of every reranker.
A failure leaves no run and no metadata."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys

import pandas as pd
import pyterrier as pt
import pytest
from conftest import CHECKPOINTS, ROOT, write_jsonl

from pyterrier_lit import CrossEncoder, reranker
from pyterrier_lit.__main__ import RERANKERS, main
from pyterrier_lit.files import tirex
from pyterrier_lit.models.checkpoints import Folder

if importlib.util.find_spec("tira") is None or importlib.util.find_spec("tirex_tracker") is None:
    pytest.skip("needs the tirex extra", allow_module_level=True)

import yaml
from tira.check_format import check_format

DOCS = {
    101: "solar power plants turn light into electricity",
    102: "fluid dynamics of water in narrow pipes",
    103: "the power of water drives old mills",
    104: "wind turbines stand in rows off the coast",
    105: "a mill grinds grain between two stones",
    106: "light is measured in lumen",
    107: "pipes of an organ sound when air flows",
    108: "grain prices fell in spring",
    109: "the coast is rocky and cold",
    110: "electricity is lost in long lines",
}
QUERIES = {"1": "water power", "2": "wind and light", "3": "grain"}


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    for name in ("TIRA_INPUT_DATASET", "inputDataset", "TIRA_OUTPUT_DIR", "outputDir", "inputRun", "TIRA_DATASET_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tira_input(tmp_path_factory):
    """A folder with input directories that TIRA's own loader makes: `input` with candidates to rerank, and `full`
    without candidates. The candidates are in the folder `run`: ten passages for each of three queries."""
    from ir_datasets import registry
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
    from ir_datasets.util import LocalDownload as Local
    from tira.ir_datasets_loader import IrDatasetsLoader

    folder = tmp_path_factory.mktemp("tira")
    name = "mini-of-the-tirex-tests"
    (folder / "docs.tsv").write_text("".join(f"{docno}\t{text}\n" for docno, text in DOCS.items()))
    (folder / "queries.tsv").write_text("".join(f"{qid}\t{query}\n" for qid, query in QUERIES.items()))
    (folder / "qrels.txt").write_text("1 0 103 1\n2 0 104 1\n3 0 108 1\n")
    (folder / "run").mkdir()
    lines = [f"{qid} Q0 {docno} {rank} {20 - rank} bm25\n" for qid in QUERIES for rank, docno in enumerate(DOCS, 1)]
    (folder / "run" / "run.txt").write_text("".join(lines))
    parts = (
        TsvDocs(Local(folder / "docs.tsv"), namespace=name, lang="en"),
        TsvQueries(Local(folder / "queries.tsv"), namespace=name, lang="en"),
        TrecQrels(Local(folder / "qrels.txt"), {1: "relevant"}),
    )
    before = os.environ.get("IR_DATASETS_HOME")
    os.environ["IR_DATASETS_HOME"] = str(folder / "home")
    try:
        registry.register(name, Dataset(*parts))
        loader = IrDatasetsLoader()
        loader.load_dataset_for_rerank(name, folder / "input", folder / "truth", True, folder / "run")
        loader.load_dataset_for_fullrank(name, folder / "full", folder / "full-truth")
    finally:
        os.environ.pop("IR_DATASETS_HOME")
        if before is not None:
            os.environ["IR_DATASETS_HOME"] = before
    return folder


def words(reranker="cross-encoder", *more):
    model = ["--reranker", reranker, "--model", CHECKPOINTS[reranker], "--device", "cpu"]
    return [str(word) for word in ["tirex", *model, *more]]


def in_tira(monkeypatch, folder, output):
    monkeypatch.setenv("TIRA_INPUT_DATASET", str(folder))
    monkeypatch.setenv("TIRA_OUTPUT_DIR", str(output))
    monkeypatch.setenv("TIRA_DATASET_ID", "mini-20261121-training")


@pytest.mark.parametrize("reranker", RERANKERS)
def test_tiras_checker_accepts_run_metadata_and_both_together(tira_input, tmp_path, monkeypatch, reranker):
    first = json.loads(pt.io.autoopen(str(tira_input / "input" / "rerank.jsonl.gz"), "rt").readline())
    assert isinstance(first["docno"], int) and first["rank"] == 1 and isinstance(first["original_document"], list)
    in_tira(monkeypatch, tira_input / "input", tmp_path / "new" / "out")
    assert main(words(reranker, "--system", f"{reranker}-tiny", "--depth", 8, "--team", "tests")) == 0
    for wanted in ("run.txt", "ir_metadata", "run-with-metadata"):
        status, message = check_format(tmp_path / "new" / "out", wanted)
        assert status.name == "OK", message
    assert {file.name for file in (tmp_path / "new" / "out").iterdir()} == {"run.txt", "ir-metadata.yml"}

    from tira.third_party_integrations import load_rerank_data

    candidates = pt.model.add_ranks(load_rerank_data(str(tira_input / "input")))
    expected = (pt.RankCutoff(8) >> RERANKERS[reranker](str(CHECKPOINTS[reranker]), device="cpu"))(candidates)
    run = pt.io.read_results(str(tmp_path / "new" / "out" / "run.txt"))
    both = expected.merge(run, on=["qid", "docno"], suffixes=("", "_written"))
    assert len(both) == len(run) == 24
    assert (both["rank"] + 1 == both["rank_written"]).all()
    assert set(run["name"]) == {f"{reranker}-tiny"}


def test_the_metadata_say_what_one_needs_to_repeat_the_run(tira_input, tmp_path, monkeypatch):
    in_tira(monkeypatch, tira_input / "input", tmp_path)
    repository = "https://example.org/my/code"
    assert main(words("lit5-distill", "--top-k", 5, "--team", "tests", "--repository", repository)) == 0
    found = yaml.safe_load((tmp_path / "ir-metadata.yml").read_text(encoding="utf-8"))
    description = found["method"]["description"]
    for said in (
        "tiny-trained",
        "window_size=None",
        "stride=None",
        "passes=1",
        "top_k=5",
        "dtype='float32'",
        "max_length=None",
    ):
        assert said in description
    assert found["method"]["name"] == found["tag"] == "lit5-distill-tiny-trained"
    assert found["data"]["test collection"]["name"] == "mini-20261121-training"
    assert found["actor"]["team"] == "tests"
    assert found["implementation"]["source"]["repository"] == repository
    assert any(package.startswith("torch==") for package in found["implementation"]["python"]["packages"])
    assert found["platform"]["hardware"]["cpu"]["model"] and found["platform"]["operating system"]
    assert "energy used system" in found["resources"]["cpu"] and found["resources"]["runtime"]["wallclock"]
    assert "archive" not in (tmp_path / "ir-metadata.yml").read_text()


def test_nothing_of_the_work_tree_is_written_beside_the_run(tira_input, tmp_path):
    """tirex-tracker makes an archive of the git work tree in which it runs, with all files that git does not ignore."""
    subprocess.run(["git", "init", "--quiet", tmp_path / "tree"], check=True)
    (tmp_path / "tree" / "secret.txt").write_text("a key")
    more = ["--input", tira_input / "input", "--output", tmp_path / "tree" / "out", "--compress"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pyterrier_lit", *words("cross-encoder", *more)]
    done = subprocess.run(command, cwd=tmp_path / "tree", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "tree" / "out").rglob("*")} == {"run.txt.gz", "ir-metadata.yml"}
    metadata = yaml.safe_load((tmp_path / "tree" / "out" / "ir-metadata.yml").read_text())
    assert metadata["data"]["test collection"]["name"] == "input"
    assert "3 queries, 30 pairs in" in done.stdout


def test_an_earlier_systems_run_is_reranked_where_there_is_no_rerank_file(tira_input, tmp_path, monkeypatch):
    in_tira(monkeypatch, tira_input / "full", tmp_path / "a")
    monkeypatch.setenv("inputRun", str(tira_input / "run"))
    assert main(words()) == 0
    in_tira(monkeypatch, tira_input / "input", tmp_path / "b")
    assert main(words()) == 0
    assert (tmp_path / "a" / "run.txt").read_bytes() == (tmp_path / "b" / "run.txt").read_bytes()


def test_a_run_and_its_first_stage_go_back_into_an_experiment(tira_input, tmp_path, monkeypatch):
    from pyterrier.measures import nDCG
    from tira.third_party_integrations import load_rerank_data

    in_tira(monkeypatch, tira_input / "input", tmp_path)
    assert main(words()) == 0
    candidates = pt.model.add_ranks(load_rerank_data(str(tira_input / "input")))
    first_stage = pt.Transformer.from_df(candidates)
    published = pt.Transformer.from_df(pt.model.add_ranks(pt.io.read_results(str(tmp_path / "run.txt"))))
    topics = candidates[["qid", "query"]].drop_duplicates()
    qrels = pt.io.read_qrels(str(tira_input / "truth" / "qrels.txt"))
    reranker = CrossEncoder(str(CHECKPOINTS["cross-encoder"]), device="cpu")
    systems = [first_stage, published, first_stage >> reranker]
    table = pt.Experiment(systems, topics, qrels, [nDCG @ 10], names=["first", "published", "here"], verbose=False)
    first, then, here = table["nDCG@10"]
    assert then == here != first


def refused(arguments, capsys):
    assert main(arguments) == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_a_full_ranking_input_without_a_run_is_named(tira_input, tmp_path, monkeypatch, capsys):
    in_tira(monkeypatch, tira_input / "full", tmp_path)
    assert "holds no rerank.jsonl[.gz]" in refused(words(), capsys)
    assert list(tmp_path.iterdir()) == []


def test_what_the_checker_refuses_is_said_in_its_words(tmp_path, monkeypatch, capsys):
    rows = [{"qid": qid, "query": "x", "docno": i, "text": "x" * i} for qid in ("1", "2") for i in range(5)]
    write_jsonl(tmp_path / "rerank.jsonl", rows)
    in_tira(monkeypatch, tmp_path, tmp_path / "out")
    said = refused(words(), capsys)
    assert "TIRA's checker refuses" in said and "has only 2 queries" in said
    assert (tmp_path / "out" / "run.txt").exists()


@pytest.mark.parametrize("lost", ["actor", "data"])
def test_metadata_that_the_checker_refuses_are_said_too(tira_input, tmp_path, monkeypatch, capsys, lost):
    merged = tirex._merged
    monkeypatch.setattr(tirex, "_merged", lambda found, own: {k: v for k, v in merged(found, own).items() if k != lost})
    in_tira(monkeypatch, tira_input / "input", tmp_path)
    said = refused(words(), capsys)
    assert f"TIRA's checker refuses {tmp_path} as " in said and f"The required field {lost} is missing" in said


def test_a_run_that_exists_is_named_before_the_model_is_fetched(tira_input, tmp_path, monkeypatch, capsys):
    in_tira(monkeypatch, tira_input / "input", tmp_path)
    (tmp_path / "run.txt").write_text("a run\n")
    assert "run.txt exists already" in refused(words("cross-encoder", "--model", "no/such"), capsys)
    assert "system='two words'" in refused(
        words("cross-encoder", "--model", "no/such", "--system", "two words"), capsys
    )


def test_a_failure_leaves_no_run_and_no_metadata(tira_input, tmp_path, monkeypatch, capsys):
    data = (tira_input / "input" / "rerank.jsonl.gz").read_bytes()
    (tmp_path / "rerank.jsonl.gz").write_bytes(data[:-40])
    in_tira(monkeypatch, tmp_path, tmp_path / "out")
    assert "it is cut short or damaged" in refused(words(), capsys)
    assert list((tmp_path / "out").iterdir()) == []
    in_tira(monkeypatch, tira_input / "input", tmp_path / "out")
    assert "there is no folder" in refused(words("cross-encoder", "--model", tmp_path / "nowhere"), capsys)
    assert "system='two words'" in refused(words("cross-encoder", "--system", "two words"), capsys)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_resumed_submission_is_whole_and_says_so(tira_input, tmp_path, monkeypatch, capsys):
    in_tira(monkeypatch, tira_input / "input", tmp_path / "whole")
    assert main(words("cross-encoder", "--chunk", 10)) == 0
    lines = (tmp_path / "whole" / "run.txt").read_bytes().splitlines(keepends=True)

    def fail(self, queries, columns):
        if "wind and light" in queries:
            raise ValueError("the power failed")
        return results(self, queries, columns)

    results = CrossEncoder.results
    monkeypatch.setattr(CrossEncoder, "results", fail)
    in_tira(monkeypatch, tira_input / "input", tmp_path / "out")
    assert "the power failed; what was finished is in" in refused(words("cross-encoder", "--chunk", 10), capsys)
    monkeypatch.setattr(CrossEncoder, "results", results)
    (part,) = (tmp_path / "out").iterdir()
    assert part.read_bytes() == b"".join(lines[:10])
    assert main(words("cross-encoder", "--chunk", 10, "--resume")) == 0
    assert (tmp_path / "out" / "run.txt").read_bytes() == b"".join(lines)
    description = yaml.safe_load((tmp_path / "out" / "ir-metadata.yml").read_text())["method"]["description"]
    assert description.endswith("; resumed: runtime and resources are those of the last part")


def test_input_and_output_are_asked_for_where_the_environment_names_none(capsys):
    with pytest.raises(SystemExit):
        main(words())
    assert "required: --input, --output" in capsys.readouterr().err


def test_the_tirex_extra_is_asked_for_where_it_is_missing(tira_input, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tira" else find(name))
    in_tira(monkeypatch, tira_input / "input", tmp_path)
    assert "tira cannot be imported; pip install 'pyterrier-lit[tirex]'" in refused(words(), capsys)


def test_a_model_from_the_hub_is_described_with_its_revision(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(reranker, "fetch", lambda model, revision: Folder(snapshot))
    described = tirex.describe(CrossEncoder("webis/monoelectra-base", device="cpu"), 100)
    assert "model='webis/monoelectra-base'" in described and "revision 0123abcd" in described
    assert "over the first 100 candidates" in described


def test_the_dockerfile_and_make_image_take_every_step_of_the_script():
    steps = re.findall(r"^(\w+)\(\)", (ROOT / ".ci" / "image").read_text(), re.MULTILINE)
    assert steps == ["install", "bake", "check"]
    for file in ("Dockerfile", "Makefile"):
        assert re.findall(r"\.ci/image (\w+)", (ROOT / file).read_text()) == steps


def test_make_container_tells_another_score_another_order_and_missing_rows():
    compare = runpy.run_path(str(ROOT / ".ci" / "container"))["compare"]
    rows = [("1", "d1", 0, 2.0), ("1", "d2", 1, 1.0), ("2", "d1", 0, 3.0)]
    outside = pd.DataFrame(rows, columns=["qid", "docno", "rank", "score"])
    assert compare(outside, outside.sample(frac=1, random_state=0)) == ""
    assert compare(outside, outside.assign(score=[2.0, 1.001, 3.0])) == "scores differ by 0.001"
    assert compare(outside, outside.assign(rank=[1, 0, 0])) == "docno d1 of qid 1 has rank 0 outside, 1 inside"
    assert compare(outside, outside[:2]) == "3 rows outside, 2 inside"
