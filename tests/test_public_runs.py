"""experiments/public_runs.py: run files and TIREx's evaluations get the names of their systems in published.csv."""

import json

import papers
import public_runs
import pytest
import sweep
from ir_measures import nDCG

RUN = "1 Q0 a 1 2.0 x\n1 Q0 b 2 1.0 x\n"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The user's own folder of runs, which is empty. A second folder has qrels, a first stage and three systems."""
    own, others = tmp_path / "own", tmp_path / "others"
    own.mkdir(), others.mkdir()
    monkeypatch.setattr(papers, "RUNS", [own, others])
    monkeypatch.setattr(public_runs, "RUNS", [own, others])
    (others / "dl19.qrels.txt").write_text("1 0 b 1\n")
    for system in ("", ".rankvicuna", ".rankgpt3.5-2", ".castorini--LiT5-Distill-base-v2"):
        (others / f"dl19.bm25{system}.txt").write_text(RUN)
    return own


def test_files_are_named_after_the_rows_of_a_table(runs):
    found = public_runs.collection("dl19", {"bm25": "bm25"}, ["ecir_table1"])
    assert list(found.systems["bm25"]) == ["RankGPT 3.5 #2", "RankVicuna 7B", "castorini/LiT5-Distill-base-v2"]
    assert public_runs.collection("dl19", {"bm25": "bm25"}, ["issue5"]).systems == {"bm25": {}}


def test_a_run_of_ones_own_joins_and_comes_before_anothers(runs, tmp_path):
    (runs / "dl19.bm25.mine.txt").write_text(RUN.replace("2.0", "0.5"))
    (runs / "dl19.bm25.rankvicuna.txt").write_text(RUN)
    found = public_runs.collection("dl19", {"bm25": "bm25"}, ["ecir_table1"])
    assert found.systems["bm25"]["RankVicuna 7B"].startswith(str(runs))
    means, _ = sweep.run(papers.Comparison("LiT5", (), {"dl19": found}), [nDCG @ 10], tmp_path / "kept", depth=10)
    measured = means.set_index("model")["measured"]
    assert measured["first stage"] < measured["mine"] == 1


def test_tirex_evaluations_are_read_by_task(runs, capsys):
    assert public_runs.tirex_evaluations().empty and "fetch.py" in capsys.readouterr().out
    task, wetland = "argsme-touche-2020-task-1-20230209-training", {"latent-wetland": {"ndcg@10": 0.5}, "x": None}
    (runs / "tirex.all_evaluations.json").write_text(json.dumps({task: wetland}))
    assert public_runs.tirex_evaluations().values.tolist() == [
        ["argsme/2020-04-01/touche-2020-task-1", "argsme", "monoT5-3B", 0.5]
    ]


@pytest.mark.slow
def test_the_public_runs_give_the_published_figures(shared, tmp_path, monkeypatch):
    """12 figures of LiT5's table 1 and 3 figures of Rank-DistiLLM's table are reproduced. No figure disagrees."""
    import compare

    for comparison, cells in zip(public_runs.trec_dl(), (12, 3, 0), strict=True):
        means, _ = sweep.run(comparison, [nDCG @ 10], tmp_path, depth=100)
        table = compare.table(compare.repeated(means), comparison.tables[:1])
        assert table["reproduced"].value_counts().reindex(["within", "outside"], fill_value=0).tolist() == [cells, 0]
