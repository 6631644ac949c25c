"""Terrier in pipelines with the rerankers. The tests need Java and Terrier's jars.

A JVM keeps its signal handlers, and cannot be stopped or started again in the same process. `make test` therefore runs
these tests in a process of their own: `pytest -m terrier`.
"""

import faulthandler
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyterrier as pt
import pytest
from conftest import CHECKPOINTS, write_jsonl
from contract import assert_same_scores
from pyterrier.measures import RR, nDCG

from pyterrier_lit import CrossEncoder, __main__, scale, signals
from pyterrier_lit.training import FineTune

pytestmark = [pytest.mark.terrier, pytest.mark.usefixtures("java")]

WORDS = ["cat", "dog", "fish", "bird", "tree", "stone", "river", "cloud", "light", "water", "wind", "road", "mill"]
DOCS = [
    {"docno": f"d{i}", "text": " ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(2, 7 + i % 5)), "title": f"t{i}"}
    for i in range(40)
]
TOPICS = pd.DataFrame(
    [("q1", "cats and dogs"), ("q2", "the river's stone?"), ("q3", "nothing matches"), ("q4", "water mill")],
    columns=["qid", "query"],
)


@pytest.fixture(scope="session")
def index(java, tmp_path_factory):
    index = pt.terrier.TerrierIndex(str(tmp_path_factory.mktemp("index") / "index"))
    index.indexer(meta={"docno": 20, "text": 4096, "title": 20}, text_attrs=["text"]).index(iter(DOCS))
    return index


@pytest.fixture
def bm25(index):
    return pt.rewrite.tokenise() >> index.bm25(num_results=10) >> pt.rewrite.reset()


@pytest.fixture
def qrels(bm25):
    found = bm25(TOPICS)
    return found[found["rank"].isin([2, 3])].assign(label=1)[["qid", "docno", "label"]]


@pytest.fixture
def one():
    return CrossEncoder(str(CHECKPOINTS["cross-encoder"]), device="cpu")


def texts(frame):
    return frame.assign(text=frame["docno"].map({doc["docno"]: doc["text"] for doc in DOCS}))


def docnos(frame):
    return {qid: rows.sort_values("rank")["docno"].tolist() for qid, rows in frame.groupby("qid")}


# Before a reranker


def test_every_way_to_the_text_gives_the_same_ranking(index, small):
    ways = {
        "text_loader": index.bm25(num_results=10) >> index.text_loader(["text"]),
        "include_fields": index.bm25(num_results=10, include_fields=["docno", "text"]),
        "metadata": pt.terrier.Retriever(index.index_ref(), wmodel="BM25", num_results=10, metadata=["docno", "text"]),
        "get_text": index.bm25(num_results=10) >> pt.text.get_text(index.index_ref(), "text"),
    }
    expected = small()(texts(index.bm25(num_results=10)(TOPICS.iloc[[0, 3]])))
    assert len(expected) > 10 and expected["qid"].nunique() == 2
    for way, first in ways.items():
        out = (first >> small())(TOPICS.iloc[[0, 3]])
        assert docnos(out) == docnos(expected), way
        assert_same_scores(out, expected)


def test_cutoffs_reach_terrier_and_change_no_document(index, small):
    pipeline = (index.bm25() % 7 >> index.text_loader() >> small()) % 3
    compiled = pipeline.compile()
    topics = TOPICS.iloc[[0, 3]]
    assert docnos(compiled(topics)) == docnos(pipeline(topics))
    assert compiled[0](topics).groupby("qid").size().tolist() == [7, 7]
    assert all(len(found) == 3 for found in docnos(pipeline(topics)).values())


def test_queries_without_hits_are_left_out(index, small, bm25):
    pipeline = bm25 >> index.text_loader() >> small()
    assert set(pipeline(TOPICS)["qid"]) == {"q1", "q2", "q4"}
    nothing = pipeline(TOPICS.iloc[[2]])
    assert nothing.empty and {"score", "rank", "text"} <= set(nothing.columns)


def test_an_experiment_shares_the_first_stage(index, small, bm25, qrels):
    candidates = bm25 >> index.text_loader()
    table = pt.Experiment(
        [bm25, candidates >> small(), candidates % 5 >> small()],
        TOPICS,
        qrels,
        [nDCG @ 10, RR @ 10, "mrt"],
        names=["BM25", "reranked", "five"],
        baseline=0,
        plan="tree",
        verbose=False,
    )
    assert table["name"].tolist() == ["BM25", "reranked", "five"]
    assert table["nDCG@10"].between(0, 1).all() and table["nDCG@10 p-value"].notna().sum() == 2


@pytest.mark.parametrize("expansion", ["rm3", "bo1"])
def test_expanded_queries_are_reset_before_the_model_reads_them(index, one, bm25, expansion):
    retriever = index.bm25(num_results=10)
    expanded = pt.rewrite.tokenise() >> retriever >> getattr(index, expansion)() >> retriever
    reset = expanded >> pt.rewrite.reset() >> pt.rewrite.reset() >> index.text_loader()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = (reset >> one)(TOPICS.iloc[[0, 3]])
    assert set(out["query"]) == set(TOPICS["query"].iloc[[0, 3]])
    with pytest.warns(UserWarning, match=r"Terrier's query language.*pt\.rewrite\.reset\(\)"):
        (expanded >> index.text_loader() >> one)(TOPICS.iloc[[0, 3]])


# Fusion, features, passages, files, threads


def test_it_is_fused_and_becomes_a_feature(index, small, bm25, qrels):
    dph = pt.rewrite.tokenise() >> index.dph(num_results=10) >> pt.rewrite.reset()
    both = (bm25 | dph) >> index.text_loader() >> small()
    assert set(both(TOPICS)["qid"]) == {"q1", "q2", "q4"} and "score" in both(TOPICS)
    candidates = bm25 >> index.text_loader()
    summed = candidates + (candidates >> small())
    assert set(summed(TOPICS)["docno"]) == set(candidates(TOPICS)["docno"])
    from sklearn.linear_model import LinearRegression

    learned = candidates >> (pt.Transformer.identity() ** small()) >> pt.ltr.apply_learned_model(LinearRegression())
    learned.fit(TOPICS, qrels)
    assert len(learned(TOPICS)) == len(candidates(TOPICS))


def test_passages_of_a_document_give_it_their_best_score(index, one, bm25):
    windows = pt.text.sliding("text", length=3, stride=2, prepend_attr=None)
    passages = bm25 >> index.text_loader() >> windows >> one
    scored = passages(TOPICS)
    best = scored.assign(docno=scored["docno"].str.split("%p").str[0]).groupby(["qid", "docno"])["score"].max()
    out = (passages >> pt.text.max_passage())(TOPICS).set_index(["qid", "docno"])["score"]
    assert len(scored) > len(out) == len(best) and (out - best).abs().max() == 0


def test_a_run_that_terrier_wrote_is_reranked_alike_from_files(index, bm25, tmp_path):
    pt.io.write_results(bm25(TOPICS), str(tmp_path / "bm25.txt"))
    (tmp_path / "topics.tsv").write_text("".join(f"{qid}\t{query}\n" for qid, query in TOPICS.values))
    documents = write_jsonl(tmp_path / "docs.jsonl.gz", DOCS)
    for name, folder in CHECKPOINTS.items():
        arguments = f"rerank --reranker {name} --model {folder} --device cpu --input {tmp_path}/bm25.txt".split()
        files = f"--topics {tmp_path}/topics.tsv --documents {documents} --output {tmp_path}/{name}.txt".split()
        assert __main__.main([*arguments, *files]) == 0
        run = pt.io.read_results(f"{tmp_path}/{name}.txt")
        kind = __main__.RERANKERS[name]
        out = (bm25 >> index.text_loader() >> kind(str(folder), device="cpu"))(TOPICS)
        assert docnos(run) == docnos(out)
        if name == "cross-encoder":
            assert_same_scores(run.merge(out[["qid", "docno"]], how="right"), out)


def test_threads_may_retrieve_and_rerank_at_once(index, small):
    """The retriever has `threads` and an index of its own. Threads that share an index can hang inside Terrier."""
    path = str(Path(index.path).resolve())
    concurrent = pt.terrier.Retriever(path, wmodel="BM25", num_results=10, metadata=["docno", "text"], threads=2)
    pipeline = pt.rewrite.tokenise() >> concurrent >> pt.rewrite.reset() >> small()
    expected = docnos(pipeline(TOPICS))
    with ThreadPoolExecutor(3) as threads:
        assert all(docnos(out) == expected for out in threads.map(pipeline, [TOPICS] * 6))


# Training, Ctrl-C and Ray, in a process with a JVM


def test_a_student_learns_beside_java_which_then_retrieves(index, electra, bm25, qrels):
    student = CrossEncoder.from_backbone(str(electra), device="cpu")
    settings = dict(steps=2, batch_size=2, micro_batch=1, verbose=False)
    pipeline = bm25 >> index.text_loader() >> FineTune(student, **settings)
    before = pipeline(TOPICS)
    pipeline.fit(TOPICS, qrels, TOPICS, qrels)
    after = pipeline(TOPICS)
    assert set(after["docno"]) == set(before["docno"]) and (after["score"] - before["score"]).abs().max() > 0


def test_ctrl_c_stops_a_call_and_both_go_on(index, one, bm25):
    pipeline = bm25 >> index.text_loader() >> one
    expected = docnos(pipeline(TOPICS))

    def interrupted():
        threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            pipeline(TOPICS)

    with pytest.raises(KeyboardInterrupt):
        for _ in range(5):  # Python ignores a KeyboardInterrupt inside a destructor
            interrupted()
    assert docnos(pipeline(TOPICS)) == expected


def handlers():
    return [signals.handler(getattr(signal, name)) for name in signals.JAVAS]


@pytest.mark.filterwarnings("error:Java and Ray")
def test_java_has_its_signals_while_ray_runs_and_afterwards(bm25, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    options = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000, "log_to_driver": False}
    before = handlers()
    ray.init(**options)
    assert handlers() != before or faulthandler.is_enabled()  # if pytest has enabled it, Ray does not
    assert scale._ray_started() is ray
    during, out = handlers(), bm25(TOPICS)
    ray.shutdown()
    assert during == before == handlers()
    assert docnos(bm25(TOPICS)) == docnos(out)


def test_ray_that_keeps_the_signals_is_told_of(monkeypatch):
    monkeypatch.setattr(scale, "_ray", lambda: type("Ray", (), {"is_initialized": lambda: True}))
    monkeypatch.setattr(scale, "TAKES_SIGNALS", True)
    with pytest.warns(UserWarning, match=r"Import pyterrier_lit\.scale before ray"):
        scale._ray_started()
