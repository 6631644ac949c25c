"""experiments/significance.py: the papers' significance tests agree with scipy and with cases worked out by hand."""

import compare
import pandas as pd
import pytest
import significance
from scipy.stats import ttest_1samp, ttest_rel

VALUES = pd.Series([0.5, 0.7, 0.6, 0.9])


def test_what_has_no_p_value_is_not_counted():
    p = pd.Series({"a": 0.01, "same": float("nan"), "b": 0.03})
    assert significance.adjusted(p, "holm").round(9).to_dict() | {"same": 0} == {"a": 0.02, "same": 0, "b": 0.03}
    assert significance.adjusted(p, "bonferroni").round(9)["b"] == 0.06
    assert significance.adjusted(p[["same"]], "holm").isna().all()


def test_lit5s_test_is_of_one_sample_and_one_side():
    found = significance.against_means(VALUES, {"lower": 0.4, "higher": 0.8})
    lower = ttest_1samp(VALUES, 0.4).pvalue / 2
    higher = ttest_1samp(VALUES, 0.8).pvalue / 2
    assert found["lower"] == pytest.approx(2 * lower) and found["higher"] == pytest.approx(higher)


def test_rank_distillms_test_is_paired_with_bonferroni():
    table = pd.DataFrame({"base": VALUES, "a": VALUES[::-1].to_numpy(), "b": VALUES + VALUES**2})
    found = significance.paired(table, "base")
    assert found["b"] == pytest.approx(2 * ttest_rel(table["b"], table["base"]).pvalue) and found["a"] == 1


def test_daggers_stand_beside_what_the_same_test_finds():
    queries = pd.DataFrame({"model": significance.XL, "collection": "dl19", "first_stage": "bm25", "value": VALUES})
    table = compare.published(table="ecir_table1").rename(columns={"value": "published"})
    found = significance.daggers(queries, table).set_index(["collection", "first_stage", "model"])
    here = found.loc[("dl19", "bm25")]
    assert here.loc["first stage", "dagger"] == "yes" and here.loc["RankVicuna 7B", "dagger"] == "no"
    means = table.query("collection == 'dl19' and first_stage == 'bm25'").set_index("model")["published"]
    expected = significance.against_means(VALUES, means.drop(significance.XL)).to_dict()
    assert here["p"].to_dict() == pytest.approx(expected)
    assert found.loc[("dl20", "bm25", "first stage")].tolist() == ["yes", pytest.approx(float("nan"), nan_ok=True), ""]
    assert (found["dagger"] == "yes").sum() == 14
