"""experiments: the collections that corpora reads, and the quickstart from end to end."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import corpora
import first_stages
import pandas as pd
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def quickstart(*arguments, cwd):
    command = [sys.executable, str(EXPERIMENTS / "quickstart.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    """The folder of a collection with four documents."""
    docs = {
        "d1": "solar power plants",
        "d2": "fluid dynamics of water",
        "d3": "power of water",
        "d4": "unrelated words",
    }
    with gzip.open(tmp_path / "docs.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"docno": docno, "text": text}) + "\n" for docno, text in docs.items())
    (tmp_path / "queries.tsv").write_text("q1\twater power\nq2\tfluid\nq3\tsolar\n")
    (tmp_path / "qrels.txt").write_text("q1 0 d3 2\nq1 0 d1 1\nq2 0 d2 1\nq3 0 d1 1\n")
    return tmp_path


def test_python_docs_are_many_and_the_same_each_time():
    docs = corpora.python_docs()
    assert len(docs) > 4_500
    assert docs.docno.is_unique and docs.docno.is_monotonic_increasing
    assert not docs.text.str.contains(r" at 0x[0-9a-f]{6,}").any()
    pd.testing.assert_frame_equal(corpora.python_docs(), docs)
    assert docs.set_index("docno").text["str.removeprefix"].startswith("str.removeprefix(prefix)\nReturn a str")


def test_python_docs_have_topics_and_judgements_apart_for_development_and_test():
    collection = corpora.load("python-docs")
    dev, test = collection.get_topics("dev-"), collection.get_topics("test-")
    assert (len(dev), len(test)) == (20, 50) and len(collection.get_topics()) == 70
    known = {doc["docno"] for doc in collection.get_corpus_iter()}
    assert set(collection.get_qrels().docno) <= known
    best = collection.get_qrels().groupby("qid").label.max()
    assert set(best.index) == set(collection.get_topics().qid)


def test_a_folder_is_a_collection(folder):
    collection = corpora.load(str(folder))
    assert [doc["docno"] for doc in collection.get_corpus_iter()] == ["d1", "d2", "d3", "d4"]
    assert collection.get_topics().values.tolist() == [["q1", "water power"], ["q2", "fluid"], ["q3", "solar"]]
    frame = collection.text_loader()(pd.DataFrame({"docno": ["d3", "d1", "d3"]}))
    assert frame.text.tolist() == ["power of water", "solar power plants", "power of water"]
    with pytest.raises(KeyError, match="'d9' is not a document"):
        collection.text_loader()(pd.DataFrame({"docno": ["d9"]}))
    with pytest.raises(NotImplementedError):
        collection.get_results()
    (folder / "run.txt").write_text("q1 Q0 d1 1 3.0 x\nq1 Q0 d3 2 2.0 x\n")
    results = corpora.load(str(folder)).get_results()
    assert results[["docno", "rank"]].values.tolist() == [["d1", 0], ["d3", 1]]
    (folder / "qrels.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks qrels.txt; wanted docs.jsonl"):
        corpora.load(str(folder))


def test_an_id_of_ir_datasets_is_a_collection(folder, monkeypatch):
    from ir_datasets import registry
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
    from ir_datasets.util import LocalDownload as Local

    monkeypatch.setenv("IR_DATASETS_HOME", str(folder / "home"))
    (folder / "docs.tsv").write_text("d1\tsolar power\nd2\tfluid dynamics\n")
    parts = (
        TsvDocs(Local(folder / "docs.tsv"), namespace="mini-of-the-tests", lang="en"),
        TsvQueries(Local(folder / "queries.tsv"), namespace="mini-of-the-tests", lang="en"),
        TrecQrels(Local(folder / "qrels.txt"), {1: "relevant"}),
    )
    registry.register("mini-of-the-tests", Dataset(*parts))
    collection = corpora.load("irds:mini-of-the-tests")
    assert list(collection.get_corpus_iter())[1] == {"docno": "d2", "text": "fluid dynamics"}
    assert collection.get_topics().qid.tolist() == ["q1", "q2", "q3"]
    assert collection.get_qrels().label.tolist() == [2, 1, 1, 1]
    assert collection.text_loader()(pd.DataFrame({"docno": ["d2", "d1"]})).text.tolist() == [
        "fluid dynamics",
        "solar power",
    ]


def test_the_quickstart_reranks_pythons_documentation(tmp_path):
    pytest.importorskip("pyterrier_pisa", reason="needs the demo extra")
    done = quickstart("--depth", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [list(row) for row in rows] == [["name", "nDCG@10", "RR@10", "mrt", "p"]] * 5
    students = ("CrossEncoder", "LiT5Distill", "LiT5Score", "PERank")
    assert [row["name"] for row in rows] == ["BM25", *(f"BM25 >> {student}" for student in students)]
    assert rows[0]["p"] is None
    for row in rows[1:]:
        assert row["nDCG@10"] > rows[0]["nDCG@10"] and 0 <= row["p"] <= 1
        assert f"{row['nDCG@10']:.4f}" in done.stdout
    assert "small models of 2 to 6 million parameters" in done.stdout and "on purpose" in done.stdout
    before, after = re.findall(r"\n  (BM25.*)\n((?:  [123]\. grade [0-3]: .*\n){3})", done.stdout)
    assert (before[0], after[0]) == ("BM25", "BM25 >> CrossEncoder") and before[1] != after[1]
    assert (tmp_path / "demo" / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the table is of Python 3.11's documentation")
def test_the_table_in_the_readme_is_what_its_first_block_prints(tmp_path):
    pytest.importorskip("pyterrier_pisa", reason="needs the demo extra")
    readme = (EXPERIMENTS.parent / "README.md").read_text(encoding="utf-8")
    block, shown = re.search(r"```python\n(.*?)```.*?^((?: {4}[^\n]*\n)+)", readme, re.S | re.M).groups()
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXPERIMENTS), str(EXPERIMENTS.parent)])}
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = re.compile(r" *(\S.*?) +(0\.\d+) +[\d.]+ *(.*?)\s*")  # without mrt
    printed, wanted = (
        [row.fullmatch(line).groups() for line in text.splitlines()[-3:]] for text in (done.stdout, shown)
    )
    assert printed == wanted and len(wanted) == 3


def test_the_quickstart_takes_a_folder_and_a_model(folder, cross_encoder_folder, tmp_path):
    pytest.importorskip("pyterrier_pisa", reason="needs the demo extra")
    done = quickstart("--collection", folder, "--model", cross_encoder_folder, "--output", tmp_path / "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads((tmp_path / "a" / "results.json").read_text())] == [
        "BM25",
        "BM25 >> CrossEncoder",
    ]
    (folder / "run.txt").write_text("q1 Q0 d1 1 3.0 x\nq1 Q0 d3 2 2.0 x\nq2 Q0 d2 1 2.0 x\n")
    done = quickstart("--collection", folder, "--model", cross_encoder_folder, "--output", tmp_path / "b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b" / "results.json").read_text())[0]["name"] == "run.txt"


def test_the_quickstart_names_a_folder_that_is_no_collection(tmp_path):
    done = quickstart("--collection", tmp_path, cwd=tmp_path)
    assert done.returncode != 0
    assert "is not a collection: it lacks queries.tsv, qrels.txt, docs.jsonl[.gz]" in done.stderr


@pytest.mark.terrier
def test_terriers_bm25_finds_what_pisas_does(java, folder, tmp_path):
    pytest.importorskip("pyterrier_pisa", reason="needs the demo extra")
    with gzip.open(folder / "docs.jsonl.gz", "at") as file:  # otherwise the idf of each word would be 0
        file.writelines(json.dumps({"docno": f"other {i}", "text": f"plain words {i}"}) + "\n" for i in range(20))
    collection = corpora.load(str(folder))
    topics = collection.get_topics()
    found = [
        stage(collection, tmp_path / stage.__name__, 10, overwrite=True)(topics)
        for stage in (first_stages.terrier, first_stages.bm25)
    ]
    ours, pisas = (frame.sort_values(["qid", "rank"])[["qid", "query", "docno"]].values.tolist() for frame in found)
    assert ours == pisas and len(ours) > 3
