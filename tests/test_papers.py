"""experiments/papers.py: collections, first stages, models and lengths are those that the papers name."""

import subprocess
import sys

import compare
import papers
import pytest
from conftest import ROOT

TREC_DL, BEIR, TIREX = papers.trec_dl(), papers.beir(), papers.tirex()
COMPARISONS = [*TREC_DL, *BEIR, *TIREX]


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: f"{comparison.paper}-{comparison.tables[0]}")
def test_every_collection_stage_and_model_of_a_comparison_has_a_published_figure(comparison):
    figures = compare.published(table=comparison.tables, paper=comparison.paper, measure="nDCG@10", depth=["100", ""])
    assert set(comparison.rerankers) <= set(figures.model)
    stages = {(name, stage) for name, where in comparison.collections.items() for stage in where.first_stages}
    if comparison.paper != "Rank-DistiLLM" or comparison.tables != (
        "arxiv_table2",
    ):  # in this table, a figure is of a corpus; our collections are tasks over a corpus
        assert stages <= set(zip(figures.collection, figures.first_stage, strict=True))
    else:
        printed = set(figures.collection) - {"arithmetic mean", "geometric mean"}
        assert {where.corpus for where in comparison.collections.values()} == printed


def test_no_published_collection_is_forgotten():
    def published(table):
        return {name for name in compare.published(table=table).collection if "mean" not in name}

    assert set(TREC_DL[0].collections) == published("ecir_table1") == {"dl19", "dl20", "dl21", "dl22"}
    assert set(TREC_DL[1].collections) == published("arxiv_table1") == {"dl19", "dl20"}
    assert set(BEIR[0].collections) == published("ecir_table2") and len(BEIR[0].collections) == 17
    assert set(BEIR[1].collections) == {name for name in published("paper_main") if name.startswith("beir/")}
    assert len(TIREX[0].collections) == 31 and len({c.corpus for c in TIREX[0].collections.values()}) == 14


def test_papers_lengths_and_windows():
    distill = {name: r for name, r in TREC_DL[0].rerankers.items() if "Distill" in name}
    for name, reranker in distill.items():
        v2 = name.endswith("v2")
        assert (reranker.window_size, reranker.stride) == ((100, 50) if v2 else (20, 10))
        assert (reranker.max_length, reranker.passes, reranker.decoding) == (150, 1, "constrained")
    assert {r.max_length for r in BEIR[0].rerankers.values()} == {512}
    scores = [r for name, r in TREC_DL[0].rerankers.items() if "Score" in name]
    assert {(r.n_passages, r.max_length, r.answer_length, r.aggregation) for r in scores} == {(100, 150, 20, "mean")}
    for comparison in (TREC_DL[1], TIREX[0]):
        assert {(r.query_length, r.doc_length) for r in comparison.rerankers.values()} == {(32, 256)}
    assert {(r.window_size, r.stride, r.mode) for r in TREC_DL[2].rerankers.values()} == {(20, 10, "embedding")}
    assert len(distill) == 6 and len(scores) == 3


def test_checkpoints_are_those_of_the_papers():
    models = {r.model for comparison in COMPARISONS for r in comparison.rerankers.values()}
    lit5 = {
        f"castorini/LiT5-{kind}"
        for size in ("base", "large", "xl")
        for kind in (f"Distill-{size}", f"Distill-{size}-v2", f"Score-{size}")
    }
    assert models == lit5 | {"webis/monoelectra-base", "webis/monoelectra-large", "liuqi6777/pe-rank-mistral-jina"}


def test_every_ir_datasets_id_is_known():
    from ir_datasets import registry

    for comparison in COMPARISONS:
        for where in comparison.collections.values():
            if where.source.startswith("irds:"):
                assert where.source.removeprefix("irds:") in registry, where.source


def test_nothing_is_built_before_it_is_asked_for():
    code = (
        "from pyterrier_lit.reranker import Reranker\n"
        "built = []\nReranker.__post_init__ = lambda self: built.append(self)\n"
        "import papers, small\nprint(len(built))\npapers.lit5()\nprint(len(built))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "experiments", capture_output=True, text=True)
    assert done.stdout.split() == ["0", "9"], done.stderr
