"""Tests of Toy, a fifth reranker: test_fifth.py runs them on a copy of the package to which Toy was added."""

import json

import pandas as pd
import pyterrier as pt
import pytest
import torch
from contract import Contract, assert_same_scores, many

import pyterrier_lit
from pyterrier_lit import Toy
from pyterrier_lit.__main__ import main
from pyterrier_lit.training import FineTune


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    Toy.from_backbone(str(folder), device="cpu", scale=0.5).save(folder)
    return folder


@pytest.fixture
def make(folder):
    return lambda **arguments: Toy(**{"model": str(folder), "device": "cpu"} | arguments)


@pytest.fixture
def reranker(make):
    return make()


class TestContract(Contract):
    pass


def test_it_is_listed():
    assert pyterrier_lit.__all__[-1] == "Toy"


def test_a_compiled_cutoff_stops_early(reranker, frame):
    fused = (pt.Transformer.from_df(frame) >> reranker % 2).compile()
    assert "top_k=2" in repr(fused)


@pytest.fixture
def candidates(frame, tmp_path):
    file = tmp_path / "rerank.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in frame.sort_values("qid").to_dict("records")))
    return file


def test_the_command_line_reranks(candidates, folder, tmp_path):
    words = ["rerank", "--reranker", "toy", "--model", folder, "--input", candidates, "--output", tmp_path / "run.txt"]
    assert main([str(word) for word in [*words, "--window-size", 3, "--stride", 2]]) == 0
    run = pt.io.read_results(str(tmp_path / "run.txt"))
    assert sorted(run["docno"]) == [f"d{i}" for i in range(1, 8)]


def test_the_command_line_trains(candidates, folder, tmp_path):
    words = ["train", "--reranker", "toy", "--backbone", folder, "--scale", 0.1, "--input", candidates, "--order"]
    assert main([str(word) for word in [*words, "--set", "steps=2", "--output", tmp_path / "trained"]]) == 0
    assert Toy(str(tmp_path / "trained"), device="cpu").load().network.weight.abs().max() < 1.5


def test_it_learns(make):
    student, frame = make(), pd.concat([many(5, qid) for qid in "abcd"])
    frame["query"] = frame["qid"].map({"a": "passage 0", "b": "passage 1", "c": "passage 2", "d": "passage 3"})
    qrels = pd.DataFrame({"qid": list("abcd"), "docno": ["d0", "d1", "d2", "d3"], "label": 1})
    pipeline = pt.Transformer.from_df(frame) >> FineTune(student, verbose=False, steps=60)
    pipeline.fit(frame[["qid", "query"]].drop_duplicates(), qrels)
    assert student(frame).query("rank == 0").set_index("qid")["docno"].to_dict() == dict(qrels[["qid", "docno"]].values)


def test_ray_gives_the_same_results(reranker):
    pytest.importorskip("ray", reason="needs the extra ray")
    from pyterrier_lit.scale import Distributed

    frame = pd.concat([many(n, str(n)) for n in (3, 5, 8)])
    distributed = Distributed(reranker, num_workers=1)
    assert_same_scores(distributed(frame), reranker(frame))
    distributed.close()
