"""experiments/compare.py: the published figures, and their comparison with measured ones, against cases worked out by
hand."""

import math
from pathlib import Path

import compare
import pandas as pd
import pytest
import significance

STATUSES = {"confirmed", "readme", "recalled", "erratum"}


def measured(*rows, paper="LiT5", collection="dl19", first_stage="bm25", depth=100):
    experiment = pd.DataFrame(rows, columns=["name", "nDCG@10"])
    return compare.results(experiment, paper=paper, collection=collection, first_stage=first_stage, depth=depth)


def test_every_published_figure_has_a_source_and_a_known_status():
    figures = compare.published()
    assert len(figures) == 692 and set(figures.paper) == {"LiT5", "Rank-DistiLLM", "PE-Rank"}
    assert set(figures.status) == STATUSES and (figures.source != "").all() and figures.value.notna().all()


def test_the_published_figures_are_those_of_the_reference_data(shared):
    reference = Path(shared.ROOT).parent / "published"
    for paper, file in (("LiT5", "lit5"), ("Rank-DistiLLM", "rank_distillm"), ("PE-Rank", "pe_rank")):
        theirs = pd.read_csv(reference / f"{file}.csv", dtype=str, keep_default_na=False).astype({"value": float})
        pd.testing.assert_frame_equal(compare.published(paper=paper).drop(columns="paper"), theirs)


def test_every_table_has_all_its_cells():
    """The numbers are systems x collections x first stages, as in the papers."""
    cells = {
        "ecir_table1": 2 * 4 * (1 + 3) + 2 * (2 + 1) + 8 + 8 + 4 + 8,  # first stage and LiT5; MonoT5, RankT5; LLMs
        "ecir_table2": 5 * (17 + 1),
        "arxiv_table1": 12 * 4,
        "arxiv_table2": 7 * (14 + 2),
        "ecir_ablation_depth": 2 * 4,
        "ecir_ablation_queries": 2 * 4,
        "ref_readme_2024": 9 * 4,
        "paper_main": 2 * (2 + 8 + 1),
    }
    found = compare.published().groupby("table").size()
    assert found[list(cells)].to_dict() == cells


def test_every_claim_has_a_place_and_every_dagger_a_figure(shared):
    claims = compare.claims()
    assert {2.6, 7.4, 4.4, 173, 24, 0.002, 0.001, 89, 95} <= set(claims["value"]) and (claims["where"] != "").all()
    daggers = pd.read_csv(significance.DAGGERS)
    pd.testing.assert_frame_equal(daggers, pd.read_csv(Path(shared.ROOT).parent / "published/significance_lit5.csv"))
    where = ["table", "collection", "first_stage", "model"]
    assert len(daggers.merge(compare.published(measure="nDCG@10"), on=where)) == len(daggers) == 16


def test_runs_of_one_system_are_one_row_with_their_extremes():
    results = measured(("RankGPT 3.5 #1", 0.80), ("RankGPT 3.5 #2", 0.68), ("first stage", 0.5)).assign(
        p=[0.1, 0.2, 0.3]
    )
    rows = compare.table(compare.repeated(results), ["ecir_table1"]).query("measured.notna()").set_index("model")
    assert rows.loc["RankGPT 3.5", ["measured", "lowest", "highest"]].tolist() == pytest.approx([0.74, 0.68, 0.80])
    assert rows.loc["RankGPT 3.5", "reproduced"] == "within" and pd.isna(rows.loc["RankGPT 3.5", "p"])
    assert rows.loc["first stage", "p"] == 0.3 and pd.isna(rows.loc["first stage", "lowest"])


def test_progress_counts_the_cells_of_a_table():
    rows = compare.table(measured(("first stage", 0.5058), ("RankVicuna 7B", 0.5)), ["ecir_table1"])
    assert compare.progress(rows).loc[("LiT5", "ecir_table1")].to_dict() == {
        "cells": 66, "measured": 2, "within": 1, "outside": 1, "waiting": 64
    }  # fmt: skip


def test_figures_are_found_by_their_columns():
    figures = compare.published(
        table="ecir_table1", collection=["dl19", "dl20"], model="first stage", first_stage="bm25"
    )
    assert figures[["collection", "value"]].values.tolist() == [["dl19", 0.506], ["dl20", 0.480]]


def test_a_measured_figure_stands_beside_the_published_one():
    rows = compare.table(measured(("first stage", 0.5058), ("castorini/LiT5-Distill-large-v2", 0.720)), ["ecir_table1"])
    first, reranked = (rows[(rows.collection == "dl19") & rows.measured.notna()]).to_dict("records")
    assert (first["published"], first["reproduced"]) == (0.506, "within")
    assert math.isclose(first["difference"], -0.0002, abs_tol=1e-9)
    assert (reranked["published"], reranked["reproduced"], reranked["tolerance"]) == (0.733, "outside", 0.005)
    assert math.isclose(reranked["difference"], -0.013, abs_tol=1e-9)
    assert reranked["status"] == "confirmed" and reranked["source"].startswith("LiT and Lean")


def test_asked_tables_are_shown_whole_and_what_was_not_measured_is_blank():
    rows = compare.table(measured(("first stage", 0.5)), ["ecir_table1"])
    assert len(rows) == 66 and rows.measured.notna().sum() == 1
    assert set(rows[rows.measured.isna()].reproduced) == {""}


def test_without_asking_only_what_was_measured_is_shown_once_per_table_that_prints_it():
    rows = compare.table(measured(("castorini/LiT5-Distill-base-v2", 0.717), ("mine", 0.9)))
    assert rows.table.tolist() == ["ecir_table1", "ref_readme_2024", ""]
    assert rows.reproduced.tolist() == ["within", "within", ""] and math.isnan(rows.published.iloc[2])


@pytest.mark.parametrize(
    ("value", "mark"), [(0.7219, "within"), (0.722, "within"), (0.7221, "outside"), (0.7119, "outside")]
)
def test_the_border_of_the_tolerance_is_within(value, mark):
    rows = compare.table(measured(("castorini/LiT5-Distill-base-v2", value)), ["ecir_table1"])
    assert rows[rows.measured.notna()].reproduced.tolist() == [mark]


def test_tolerances_go_by_paper_model_and_measure():
    tolerance = compare.tolerance
    assert tolerance("LiT5", "castorini/LiT5-Distill-base", "nDCG@10") == 0.008
    assert tolerance("LiT5", "castorini/LiT5-Distill-base-v2", "nDCG@10") == 0.005
    assert tolerance("LiT5", "castorini/LiT5-Score-base", "nDCG@10") == 0.005
    assert tolerance("Rank-DistiLLM", "monoELECTRA-base two-stage RankZephyr-CBv2", "nDCG@10") == 0.003
    assert tolerance("PE-Rank", "PE-Rank (Jina)", "nDCG@10") == 0.005
    assert tolerance("Rank-DistiLLM", "first stage", "nDCG@10") == 0.001
    assert math.isnan(tolerance("PE-Rank", "PE-Rank (Jina)", "seconds per query (GPU not stated)"))


def test_recalled_and_wrong_figures_get_no_mark():
    rows = compare.table(measured(("PE-Rank (Jina)", 0.6354), paper="PE-Rank", collection="dl20"))
    assert (rows.status.tolist(), rows.published.tolist(), rows.reproduced.tolist()) == (["recalled"], [0.6354], [""])
    erratum = measured(
        ("first stage", 0.012),
        paper="Rank-DistiLLM",
        collection="cranfield",
        first_stage="tirex (bm25; chatnoir for clueweb)",
    )
    assert set(compare.table(erratum).status) == {"erratum"} and set(compare.table(erratum).reproduced) == {""}


def test_another_depth_is_another_figure_but_a_first_stage_has_none():
    model = "monoELECTRA-base two-stage RankZephyr-CBv2"
    assert compare.table(measured((model, 0.72), paper="Rank-DistiLLM", depth=20)).published.isna().all()
    assert compare.table(measured((model, 0.72), paper="Rank-DistiLLM", depth=100)).published.notna().all()
    assert compare.table(measured(("first stage", 0.48), paper="Rank-DistiLLM", depth=20)).published.eq(0.480).all()


def test_one_papers_bm25_is_not_anothers():
    assert set(compare.table(measured(("first stage", 0.48), paper="Rank-DistiLLM")).published) == {0.480}
    assert set(compare.table(measured(("first stage", 0.48), paper="LiT5")).published) == {0.506}


def test_the_corrected_p_value_is_taken_where_there_is_one():
    plain = pd.DataFrame(
        {"name": ["a"], "nDCG@10": [0.5], "nDCG@10 +": [1], "nDCG@10 -": [2], "nDCG@10 p-value": [0.04]}
    )
    corrected = plain.assign(**{"nDCG@10 reject": [False], "nDCG@10 p-value corrected": [0.08]})
    where = {"paper": "LiT5", "collection": "dl19", "first_stage": "bm25", "depth": 100}
    assert compare.results(plain, **where)[["measure", "measured", "p"]].values.tolist() == [["nDCG@10", 0.5, 0.04]]
    assert compare.results(corrected, **where).p.tolist() == [0.08]


def test_a_pivot_prints_collections_side_by_side():
    two = [measured(("first stage", 0.505)), measured(("first stage", 0.479), collection="dl20")]
    wide = compare.pivot(compare.table(pd.concat(two), ["ecir_table1"]))
    assert wide.columns[:4].tolist() == [
        (name, value) for name in ("dl19", "dl20") for value in ("measured", "published")
    ]
    assert wide.loc[("bm25", "first stage")].tolist()[:4] == [0.505, 0.506, 0.479, 0.480]
    assert wide.loc[("splade++ed", "castorini/LiT5-Distill-xl-v2")][("dl20", "published")] == 0.804


def test_a_table_is_exported_to_markdown_and_latex(tmp_path):
    rows = compare.table(measured(("first stage", 0.5058)), ["ecir_table1"]).head(1)
    compare.export(rows[["model", "first_stage", "measured", "published", "p"]], tmp_path / "sub" / "dl")
    markdown = (tmp_path / "sub" / "dl.md").read_text().splitlines()
    assert [cell.strip() for cell in markdown[2].split("|")[1:-1]] == ["first stage", "bm25", "0.506", "0.506", ""]
    latex = (tmp_path / "sub" / "dl.tex").read_text()
    assert r"first\_stage" in latex and "first stage & bm25 & 0.506 & 0.506 &  \\\\" in latex


def test_a_shown_table_leaves_out_columns_that_say_nothing():
    html = compare.show(compare.table(measured(("mine", 0.25)))).to_html()
    assert "0.250" in html and "published" not in html and "nan" not in html


def test_a_difference_that_rounds_to_zero_has_no_sign(tmp_path):
    table = pd.DataFrame({"model": ["mine"], "difference": [-0.0002]})
    assert ">0.000<" in compare.show(table).to_html()
    compare.export(table, tmp_path / "table")
    assert "-0.000" not in (tmp_path / "table.md").read_text() + (tmp_path / "table.tex").read_text()
