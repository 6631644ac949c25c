"""experiments: sweeps that resume, first stages whose results are kept, and the costs of a reranker."""

import dataclasses
import gzip
import json
import subprocess
import sys

import corpora
import costs
import first_stages
import pandas as pd
import papers
import pyterrier as pt
import pytest
import sweep
import torch
from conftest import ROOT
from ir_measures import RR, P
from scipy.stats import ttest_rel

from pyterrier_lit import CrossEncoder

HERE = ROOT / "experiments"
TOPICS = pd.DataFrame({"qid": list("123"), "query": list("abc")})
QRELS = pd.DataFrame({"qid": list("123"), "docno": ["x", "y", "x"], "label": 1})


class Fixed(pt.Transformer):
    """Ranks the same documents for every query, and counts the queries."""

    def __init__(self, *docnos):
        self.docnos, self.asked = docnos, 0

    def transform(self, inp):
        pt.validate.query_frame(inp, extra_columns=["query"])
        self.asked += len(inp)
        rows = [(q.qid, q.query, d, -float(i)) for q in inp.itertuples() for i, d in enumerate(self.docnos)]
        return pt.model.add_ranks(pd.DataFrame(rows, columns=["qid", "query", "docno", "score"]))

    def __repr__(self):
        return f"Fixed{self.docnos}"


def experiment(folder, **pipelines):
    return sweep.experiment(pipelines, TOPICS, QRELS, [RR @ 3], folder, baseline=next(iter(pipelines)))


def test_a_run_is_computed_once_and_used_again(tmp_path):
    first, second = Fixed("x", "y", "z"), Fixed("y", "x", "z")
    before, queries = experiment(tmp_path, first=first, second=second)
    assert before["RR@3"].tolist() == pytest.approx([(1 + 1 / 2 + 1) / 3, (1 / 2 + 1 + 1 / 2) / 3])
    assert queries.query("model == 'second'").set_index("qid").value.to_dict() == {"1": 0.5, "2": 1.0, "3": 0.5}
    after, _ = experiment(tmp_path, first=Fixed("x", "y", "z"), second=Fixed("y", "x", "z"))
    pd.testing.assert_frame_equal(after, before)
    again = Fixed("x", "y", "z")
    experiment(tmp_path, first=again)
    assert again.asked == 0
    experiment(tmp_path / "elsewhere", first=again)
    assert again.asked == 3


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    class Fails(Fixed):
        def transform(self, inp):
            if not inp.empty:
                raise KeyboardInterrupt
            return super().transform(inp)

    done = Fixed("x", "y")
    with pytest.raises(KeyboardInterrupt):
        experiment(tmp_path, done=done, late=Fails("y", "x"))
    assert done.asked == 3
    table, _ = experiment(tmp_path, done=done, late=Fixed("y", "x"))
    assert done.asked == 3 and table["name"].tolist() == ["done", "late"]


def test_another_pipeline_of_the_same_name_or_other_topics_are_computed_anew(tmp_path):
    experiment(tmp_path, first=Fixed("x", "y"))
    changed = Fixed("y", "x")
    table, _ = experiment(tmp_path, first=changed)
    assert changed.asked == 3 and table["RR@3"].tolist() == pytest.approx([2 / 3])
    fewer = Fixed("y", "x")
    sweep.experiment({"first": fewer}, TOPICS.head(2), QRELS, [RR @ 3], tmp_path, baseline="first")
    assert fewer.asked == 2


def test_the_test_is_paired_and_holm_corrected(tmp_path):
    stages = {"base": Fixed("x", "y", "z"), "b": Fixed("y", "x", "z"), "c": Fixed("z", "y", "x")}
    table, queries = sweep.experiment(stages, TOPICS, QRELS, [RR @ 3], tmp_path, baseline="base")
    values = queries.pivot(index="qid", columns="model", values="value")
    p = {name: ttest_rel(values["base"], values[name]).pvalue for name in "bc"}
    low, high = sorted(p, key=p.get)
    corrected = {low: min(2 * p[low], 1), high: min(max(2 * p[low], p[high]), 1)}  # Holm (1979)
    found = table.set_index("name")["RR@3 p-value corrected"]
    assert found[["b", "c"]].tolist() == pytest.approx([corrected["b"], corrected["c"]]) and pd.isna(found["base"])


def test_an_unknown_baseline_is_named(tmp_path):
    with pytest.raises(ValueError, match="baseline='bm25' is none of the pipelines 'first'"):
        sweep.experiment({"first": Fixed("x")}, TOPICS, QRELS, [RR @ 3], tmp_path, baseline="bm25")


@pytest.fixture
def folder(tmp_path):
    docs = {
        "d1": "solar power plants",
        "d2": "fluid dynamics of water",
        "d3": "power of water",
        "d4": "unrelated words",
    }
    folder = tmp_path / "four"
    folder.mkdir()
    with gzip.open(folder / "docs.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"docno": d, "text": text, "title": "T  1"}) + "\n" for d, text in docs.items())
    (folder / "queries.tsv").write_text("q1\twater power\nq2\tfluid\nq3\tsolar\n")
    (folder / "qrels.txt").write_text("q1 0 d3 2\nq1 0 d1 1\nq2 0 d2 1\nq3 0 d1 1\n")
    (folder / "a run.txt").write_text("q1 Q0 d1 1 3.0 x\nq1 Q0 d3 2 2.0 x\nq2 Q0 d2 1 2.0 x\nq3 Q0 d4 1 1.0 x\n")
    return folder


def test_a_comparison_runs_every_reranker_over_every_first_stage(folder, cross_encoder_folder, tmp_path):
    collection = papers.Collection(str(folder), {"bm25": "bm25", "run": str(folder / "a run.txt")}, corpus="small")
    reranker = CrossEncoder(str(cross_encoder_folder), device="cpu")
    comparison = papers.Comparison("mine", (), {"a/four": collection}, {"model": reranker}, corpora.titled_text)
    means, queries = sweep.run(comparison, [P @ 1], tmp_path / "kept", depth=3)
    assert means[["first_stage", "model"]].values.tolist() == [
        [stage, model] for stage in ("bm25", "run") for model in ("first stage", "model")
    ]
    assert set(means.paper) == {"mine"} and set(means.collection) == {"a/four"} and set(means.depth) == {"3"}
    assert means.set_index(["first_stage", "model"]).measured["run", "first stage"] == pytest.approx(2 / 3)
    assert set(queries.qid) == {"a/four/q1", "a/four/q2", "a/four/q3"} and set(queries.corpus) == {"small"}
    assert sweep.run(dataclasses.replace(comparison, collections={}), [P @ 1], tmp_path, depth=3)[0].empty


def test_bm25_is_indexed_and_asked_once(folder, tmp_path, monkeypatch):
    collection = corpora.load(str(folder))
    first = first_stages.load("bm25", collection, tmp_path, 2)(collection.get_topics())
    assert first.groupby("qid")["docno"].first().to_dict() == {"q1": "d3", "q2": "d2", "q3": "d1"}
    monkeypatch.setattr(first_stages, "bm25", lambda *_, **__: Fixed("nothing"))  # would give other documents
    again = first_stages.load("bm25", collection, tmp_path, 2)(collection.get_topics())
    assert again.groupby("qid")["docno"].first().to_dict() == {"q1": "d3", "q2": "d2", "q3": "d1"}


def test_a_stored_run_is_cut_and_one_that_is_missing_is_named(folder, tmp_path):
    collection = corpora.load(str(folder))
    run = first_stages.load(str(folder / "a run.txt"), collection, tmp_path, 1)(collection.get_topics())
    assert run[["qid", "docno", "rank"]].values.tolist() == [["q1", "d1", 0], ["q2", "d2", 0], ["q3", "d4", 0]]
    with pytest.raises(FileNotFoundError, match=r"dl19.colbertv2.txt is not here; wanted a run in TREC format"):
        first_stages.load("data/runs/dl19.colbertv2.txt", collection, tmp_path, 1)


def test_bm25_finds_a_document_by_its_title(folder, tmp_path):
    (folder / "docs.jsonl.gz").unlink()
    (folder / "docs.jsonl").write_text('{"docno": "d1", "title": "aspirin", "text": "lowers fever"}\n')
    first = first_stages.load("bm25", corpora.load(str(folder)), tmp_path, 2)
    assert first.search("aspirin").docno.tolist() == ["d1"]


def test_a_query_that_is_a_document_does_not_find_itself_where_beir_says_so(folder, tmp_path):
    collection = corpora.load(str(folder))
    query = pd.DataFrame({"qid": ["d1"], "query": ["solar power water"]})
    found = first_stages.load("bm25:anserini", collection, tmp_path, 2)(query).sort_values("rank")
    assert found["docno"].tolist() == ["d3", "d2"] and found["rank"].tolist() == [0, 1]
    assert first_stages.load("bm25:terrier", collection, tmp_path, 2)(query)["docno"].tolist()[0] == "d1"


def test_a_stored_run_is_the_same_in_another_process_and_another_with_other_content(folder):
    path = folder / "a run.txt"
    here = repr(first_stages.stored(path) % 2)
    code = f"import first_stages; print(first_stages.stored({str(path)!r}) % 2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here
    path.write_text(path.read_text().replace("3.0", "1.0"))
    assert repr(first_stages.stored(path) % 2) != here


def test_a_student_is_asked_only_what_its_teacher_ranks(folder):
    topics = pd.DataFrame({"qid": ["q3", "q9"], "query": "solar"})
    assert first_stages.ranked(topics, str(folder / "a run.txt"))["qid"].tolist() == ["q3"]
    assert first_stages.ranked(topics, Fixed("x")) is topics


def test_what_is_missing_is_named_and_the_rest_goes_on(folder, tmp_path, capsys):
    stages = {"bm25": "bm25", "colbertv2": "data/runs/absent.txt"}
    collections = {"four": papers.Collection(str(folder), stages), "gone": papers.Collection("nowhere", stages)}
    means, _ = sweep.run(papers.Comparison("mine", (), collections), [P @ 1], tmp_path / "kept", depth=3)
    assert means[["collection", "first_stage"]].values.tolist() == [["four", "bm25"]]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": left out. ")[0] for line in said] == ["four, colbertv2", "gone, bm25", "gone, colbertv2"]
    assert said[0].endswith(". data/runs/absent.txt is not here")


def test_a_reranker_is_unloaded_when_its_rows_are_done(folder, cross_encoder_folder, tmp_path):
    loaded = []

    class Watched(CrossEncoder):
        def results(self, queries, columns):
            loaded.append([one.in_memory() is not None for one in (first, second)])
            return super().results(queries, columns)

    first, second = (Watched(str(cross_encoder_folder), device="cpu", max_tokens=n) for n in (500, 600))
    comparison = papers.Comparison(
        "mine", (), {"four": papers.Collection(str(folder), {"bm25": "bm25"})}, {"a": first, "b": second}
    )
    sweep.run(comparison, [P @ 1], tmp_path / "kept", depth=3)
    assert [True, True] not in loaded and loaded and first.in_memory() is second.in_memory() is None


def test_a_pipeline_that_equals_the_baseline_is_no_rejection_and_does_not_count(tmp_path):
    stages = {"base": Fixed("x", "y", "z"), "same": Fixed("x", "y", "z"), "c": Fixed("z", "y", "x")}
    table, queries = sweep.experiment(stages, TOPICS, QRELS, [RR @ 3], tmp_path, baseline="base")
    values = queries.pivot(index="qid", columns="model", values="value")
    found = table.set_index("name")
    assert found["RR@3 p-value corrected"]["c"] == pytest.approx(ttest_rel(values["base"], values["c"]).pvalue)
    assert not found["RR@3 reject"]["same"] and pd.isna(found["RR@3 p-value corrected"]["same"])


def test_candidates_of_the_papers_authors_are_a_first_stage_with_its_own_texts(folder, tmp_path):
    collection = corpora.load(str(folder))
    hits = [{"qid": "q1", "docid": docid, "content": f"own {docid}"} for docid in ("d2", "d1")]
    (tmp_path / "dl19_top100.jsonl").write_text(json.dumps({"query": "solar power", "hits": hits}) + "\n")
    first = first_stages.load(str(tmp_path / "dl19_top100.jsonl"), collection, tmp_path, 100)
    out = (first >> collection.text_loader())(collection.get_topics())
    assert out[["qid", "docno", "text", "rank"]].values.tolist() == [
        ["q1", "d2", "own d2", 0],
        ["q1", "d1", "own d1", 1],
    ]
    assert "query" in out


def test_the_text_of_a_document_is_made_of_its_fields(folder):
    def text(**options):
        return corpora.load(str(folder), **options).text_loader()(pd.DataFrame({"docno": ["d1"]})).text[0]

    assert text() == "T  1 solar power plants"
    assert text(text_of=corpora.text_alone) == "solar power plants"
    assert text(text_of=corpora.titled_text) == "Title: T 1 Content: solar power plants"
    assert corpora.titled_text({"title": "", "text": "a  b"}) == "a b"


def test_flops_are_those_of_the_network(cross_encoder_folder):
    reranker = CrossEncoder(str(cross_encoder_folder), device="cpu")
    frame = pd.DataFrame({"qid": "1", "query": "a", "docno": list("xy"), "text": ["b c", "d e"], "score": [2.0, 1.0]})
    network = reranker.load().network
    length, width, wide = 6, 32, 64  # [CLS] a [SEP] b c [SEP]

    def layer(rows):  # keys and values of all tokens; the rest of the layer for `rows` tokens
        projections = 2 * 2 * (length + rows) * width * width
        return projections + 2 * 2 * rows * width * wide + 2 * 2 * rows * length * width

    # The embeddings are projected to the width. The last layer computes [CLS] alone, and [CLS] gives the score
    body = 2 * length * 16 * width + layer(length) + layer(1) + 2 * width
    assert costs.flops(reranker, frame) == pytest.approx(2 * body, rel=0.01)
    assert costs.parameters(reranker) == sum(p.numel() for p in network.parameters())
    paid = costs.of(reranker, frame)
    assert paid["GFLOP"] * 1e9 == costs.flops(reranker, frame) and paid["seconds"] > 0
    assert paid["parameters"] * 1e6 == costs.parameters(reranker)


def test_costs_know_the_cpus_attention_kernel():
    query = torch.rand(1, 2, 8, 16)
    assert costs._attention(query.shape, query.shape, query.shape) == 2 * 2 * 2 * 8 * 8 * 16


def test_a_peer_that_is_not_installed_is_left_out():
    peers = {"absent": ("no_such_package_here", "X", {}), "cutoff": ("pyterrier", "RankCutoff", {"k": 3})}
    assert {name: repr(peer) for name, peer in costs.installed(peers).items()} == {"cutoff": "RankCutoff(3)"}
