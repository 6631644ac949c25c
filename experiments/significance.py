"""The papers' significance tests: p-values of rerankers against a baseline, corrected for multiple tests.

The tests take a reranker's value for each query, such as its nDCG@10. They take no runs or qrels. LiT5's test also
takes the published means of the other systems.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from scipy.stats import ttest_1samp, ttest_rel
from statsmodels.stats.multitest import multipletests

DAGGERS = Path(__file__).with_name("significance.csv")  # LiT5's table 1: which differences from XL are significant
XL = "castorini/LiT5-Distill-xl-v2"


def adjusted(p: pd.Series, correction: str) -> pd.Series:
    """The p-values, corrected for multiple tests by "holm" or "bonferroni". A nan stays nan and does not count as a
    test. A p-value is nan if a pipeline's values equal the baseline's on every query."""
    known = p.dropna()
    corrected = multipletests(known, method=correction)[1] if len(known) else known
    return pd.Series(corrected, known.index, dtype=float).reindex(p.index)


def against_means(values: pd.Series, means: Mapping[str, float], correction: str = "holm") -> pd.Series:
    """LiT5's test: does the mean of one system's values per query differ from the means of other systems?

    For each other system, the test is a one-sample t-test of the values against the mean of the other system. It is
    one-sided: "greater" if the mean of the values is greater than the mean of the other system, else "less". Returns
    the corrected p-value for each other system.
    """
    p = {
        name: ttest_1samp(values, mean, alternative="greater" if values.mean() > mean else "less").pvalue
        for name, mean in means.items()
    }
    return adjusted(pd.Series(p, dtype=float), correction)


def paired(values: pd.DataFrame, baseline: str, correction: str = "bonferroni") -> pd.Series:
    """Rank-DistiLLM's test: a paired t-test of each column (a reranker) against the column `baseline`, over the rows
    (queries). Returns the corrected p-value of each column except the baseline."""
    others = values.columns.drop(baseline)
    p = {name: ttest_rel(values[name], values[baseline]).pvalue for name in others}
    return adjusted(pd.Series(p, dtype=float), correction)


def daggers(queries: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """LiT5-XL against the other systems of LiT5's table 1 over the same first stage: a row for each comparison that has
    a dagger or a p-value.

    queries: values per query, from `sweep.run`. table: a table of `compare.table` with the published means. The test
    compares LiT5-XL's values in `queries` with the published mean of the other system (`against_means`). `dagger` is
    "yes" if the paper prints a dagger, else "no". `p` is the corrected p-value, and `significant` is "yes" if p < .05,
    else "no". If `queries` has no values of LiT5-XL, `p` is nan and `significant` is empty.
    """
    printed = pd.read_csv(DAGGERS).rename(columns={"significant": "dagger"})
    means = table.query("table == 'ecir_table1' and model != @XL").set_index(["collection", "first_stage"])
    found = []
    for place, values in queries.query("model == @XL").groupby(["collection", "first_stage"])["value"]:
        others = means.loc[[place]].set_index("model")["published"].dropna()
        p = against_means(values, others)
        found.append(
            pd.DataFrame({"model": p.index, "p": p.to_numpy()}).assign(collection=place[0], first_stage=place[1])
        )
    ours = pd.concat(found or [pd.DataFrame(columns=["collection", "first_stage", "model", "p"])])
    both = printed.drop(columns="table").merge(ours, how="outer", on=["collection", "first_stage", "model"], sort=False)
    significant = (both["p"] < 0.05).map({True: "yes", False: "no"}).where(both["p"].notna(), "")
    return both.assign(significant=significant).fillna({"dagger": "no"})
